"""The injector's fixed part runs: every kind of fault at least once. What the judge finds is tested beside this."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.chaos.faults import FAULTS
from tests.stack import ROOT, Stack

GUARD_SECONDS = 3300


@pytest.mark.timeout(2 * GUARD_SECONDS)
def test_the_fixed_part(stack: Stack) -> None:
    """Every kind of fault once, at steps that a seed chose; with an operator and a guardian of its own."""
    stack.stop()
    try:
        words = [sys.executable, "-m", "tests.chaos", "-n", str(len(FAULTS)), "--seed", "1"]
        log = stack.state / "chaos-fixed-part.log"
        with log.open("w") as out:
            try:
                done = subprocess.run(words, cwd=ROOT, stdout=out, stderr=out, check=False, timeout=GUARD_SECONDS)
            except subprocess.TimeoutExpired:
                pytest.fail(f"an injection hangs:\n{log.read_text()[-6000:]}")
        # What was found comes first: a pipeline's summary shows the first line.
        said = log.read_text()
        told = [line.strip() for line in said.splitlines() if "✘" in line or "replay:" in line]
        assert done.returncode == 0, f"{' '.join(told)}\n{said[-9000:]}"
        found = json.loads((ROOT / "build" / "chaos.json").read_text())
        assert found["injections"] >= 40
        assert {f.name for f in FAULTS} - set(found["byFault"]) == set(), "these had no effect, twice"
    finally:
        stack.start()
