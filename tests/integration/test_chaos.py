"""The injector's fixed part runs: every kind of fault at least once. What the judge finds is tested beside this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import cases
from tests.chaos.faults import FAULTS
from tests.stack import ROOT, Stack
from vmsnapshot_operator.core.steps import Step


def test_every_fault_is_in_the_walk_and_every_step_has_a_way() -> None:
    walk = cases.walk(len(FAULTS), 1)
    assert {c.fault.name for c in walk} == {f.name for f in FAULTS}
    assert {c.step for c in cases.every()} == set(Step)
    assert cases.walk(60, 7) == cases.walk(60, 7), "a seed repeats a run"
    assert cases.walk(60, 7) != cases.walk(60, 8)
    assert all(cases.parse(c.name) == c for c in walk)
    assert {cases.instead(c) for c in cases.every()} <= set(cases.every()), "every fault can be met there"


def test_summary(tmp_path: Path) -> None:
    from tests.chaos import runner
    from tests.chaos.judge import Finding

    results = [
        runner.Result(
            case="deleted@Keep:after",
            number=n,
            reached=True,
            seconds=1.0,
            recovery_seconds=float(n),
            longest_freeze_milliseconds=100 * n,
            outcome="gone",
            findings=(Finding("leaked", "x", "y"),) if n == 2 else (),
        )
        for n in range(3)
    ]
    found = runner.write(results, 5, tmp_path / "chaos.json")
    assert json.loads((tmp_path / "chaos.json").read_text()) == found
    assert (found["injections"], found["leaked"], found["lied"]) == (3, 1, 0)
    assert found["recoverySeconds"]["max"] == 2.0
    assert found["longestFreezeMilliseconds"] == 200
    assert len((tmp_path / "chaos.jsonl").read_text().splitlines()) == 3


GUARD_SECONDS = 1800


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
        assert done.returncode == 0, log.read_text()[-9000:]
        found = json.loads((ROOT / "build" / "chaos.json").read_text())
        assert found["injections"] >= 40
        assert set(found["byFault"]) == {f.name for f in FAULTS}
    finally:
        stack.start()
