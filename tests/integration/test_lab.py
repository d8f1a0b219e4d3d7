"""The laboratory itself: it ends what it starts, and its truth test tells a good snapshot from a bad one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab, truth
from tests.lab.lab import COMPONENTS, leftovers
from tests.lab.supervisor import Control
from tests.stack import ROOT

OTHER = Path("/var/tmp/vmsnapshot-lab-test")  # noqa: S108 - short, since the paths of Unix sockets are


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"} | {"LAB_STATE": str(OTHER)}
    return subprocess.run(
        [sys.executable, "-m", "tests.lab", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )


@pytest.fixture
def other_lab() -> Iterator[Control]:
    """A second laboratory beside the shared one."""
    up = _command("up", "--no-guest")
    assert up.returncode == 0, up.stdout + up.stderr
    yield Control(OTHER)
    _command("down")


def test_down_leaves_nothing_even_after_its_supervisor_was_killed(lab: Lab, other_lab: Control) -> None:
    assert set(other_lab.pids()) == set(COMPONENTS)
    again = _command("up", "--no-guest")
    assert again.returncode == 0, again.stdout
    status = _command("status")
    assert all(name in status.stdout for name in COMPONENTS)
    found = [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit() and _is_supervisor(e)]
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    down = _command("down")
    assert down.returncode == 0, down.stdout
    assert leftovers(OTHER) == []
    assert not OTHER.exists()
    assert set(lab.control.pids()) == set(COMPONENTS)


def _is_supervisor(entry: Path) -> bool:
    try:
        words = (entry / "cmdline").read_bytes()
        environment = (entry / "environ").read_bytes()
    except OSError:
        return False
    return b"supervise" in words and f"LAB_STATE={OTHER}\0".encode() in environment


def test_the_truth_test_catches_copies_of_different_moments(lab: Lab, tmp_path: Path) -> None:
    guest = lab.guest("demo")
    files = [Path(d.path) for t, d in sorted(guest.disks.items()) if d.kind == "file"]
    counts = []
    for number, path in enumerate(files):
        truth.fetch_file(path, tmp_path / f"{number}.raw")
        counts.append(truth.records(tmp_path / f"{number}.raw"))
        time.sleep(0.5)
    assert counts[0] < counts[1]
    assert truth.fsck(tmp_path / "0.raw") == truth.NOT_REPLAYED


def test_the_truth_test_accepts_copies_of_a_frozen_guest(lab: Lab, tmp_path: Path) -> None:
    guest = lab.guest("demo")
    files = [Path(d.path) for t, d in sorted(guest.disks.items()) if d.kind == "file"]
    guest.agent("guest-fsfreeze-freeze")
    try:
        for number, path in enumerate(files):
            truth.fetch_file(path, tmp_path / f"{number}.raw")
            time.sleep(0.2)
    finally:
        guest.agent("guest-fsfreeze-thaw")
    assert len({truth.records(tmp_path / f"{n}.raw") for n in range(len(files))}) == 1
    assert {truth.fsck(tmp_path / f"{n}.raw") for n in range(len(files))} == {truth.CLEAN}
