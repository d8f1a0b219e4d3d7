"""The judge finds what is planted, and the injector's fixed part runs: every kind of fault at least once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from tests.chaos import cases, judge
from tests.chaos.faults import FAULTS
from tests.lab import Lab
from tests.lab.guests import Guest
from tests.stack import ROOT, Stack, until
from vmsnapshot_operator.core.steps import Step

JOURNAL = "https://vmsnapshot.io/journal/1"


@pytest.fixture
def guest(lab: Lab) -> Guest:
    return lab.guest("demo")


def kinds(lab: Lab, stack: Stack, guest: Guest) -> set[str]:
    return {f.kind for f in judge.judge_now(lab, stack, [guest])}


@pytest.fixture
def clean(lab: Lab, stack: Stack, guest: Guest) -> Iterator[None]:
    """Before and after a test the world is as it should be: what is found in between was planted."""
    until("the world is clean", lambda: not kinds(lab, stack, guest))
    yield
    until("the world is clean again", lambda: not kinds(lab, stack, guest))


@pytest.mark.usefixtures("clean")
def test_a_frozen_guest_and_a_paused_one_are_found(lab: Lab, stack: Stack, guest: Guest) -> None:
    guest.agent("guest-fsfreeze-freeze")
    try:
        assert kinds(lab, stack, guest) == {"frozen"}
    finally:
        guest.agent("guest-fsfreeze-thaw")
    guest.domain().suspend()
    try:
        assert kinds(lab, stack, guest) == {"frozen"}
    finally:
        guest.domain().resume()


@pytest.mark.usefixtures("clean")
def test_a_journal_is_found(lab: Lab, stack: Stack, guest: Guest) -> None:
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    element = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    guest.domain().setMetadata(element, "<journal/>", "vmsnapshot", JOURNAL, flags)
    try:
        assert kinds(lab, stack, guest) == {"leaked"}
    finally:
        guest.domain().setMetadata(element, None, None, JOURNAL, flags)


@pytest.mark.usefixtures("clean")
def test_leftovers_on_storage_are_found(lab: Lab, stack: Stack, guest: Guest) -> None:
    import rbd

    name = "vms-aaaaaa-bbbbbbbbbb-01-cccccc"
    left = lab.pool_path("reflink") / f"{name}-dddddddd"
    left.write_bytes(b"x")
    try:
        assert kinds(lab, stack, guest) == {"leaked"}
    finally:
        left.unlink()
    with lab.ceph.connect() as (_, ioctx):
        rbd.RBD().group_create(ioctx, name)
        try:
            assert kinds(lab, stack, guest) == {"leaked"}
        finally:
            rbd.RBD().group_remove(ioctx, name)
        with rbd.Image(ioctx, "demo-c") as image:
            image.create_snap(name)
            try:
                assert kinds(lab, stack, guest) == {"leaked"}
            finally:
                image.remove_snap(name)


@pytest.mark.usefixtures("clean")
def test_an_overlay_is_found(lab: Lab, stack: Stack, guest: Guest) -> None:
    overlay = lab.pool_path("reflink") / "vms-overlay.qcow2"
    xml = f"<domainsnapshot><disks><disk name='vda'><source file='{overlay}'/></disk><disk name='vdb' snapshot='no'/><disk name='vdc' snapshot='no'/></disks></domainsnapshot>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    guest.domain().snapshotCreateXML(xml, flags)
    try:
        assert "leaked" in kinds(lab, stack, guest)
    finally:
        domain = guest.domain()
        domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        until("the commit is ready", lambda: "ready='yes'" in domain.XMLDesc())
        domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        overlay.unlink()


@pytest.mark.usefixtures("clean")
def test_a_driver_that_outlived_its_operator_is_found(lab: Lab, stack: Stack, guest: Guest) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    words = [
        "python3",
        "-c",
        "import time; time.sleep(600)",
        "vmsnapshot_operator.drivers.worker",
        "3",
        str(dead.pid),
        "x",
    ]
    left = subprocess.Popen(words)
    try:
        until("it is found", lambda: kinds(lab, stack, guest) == {"leaked"})
    finally:
        left.kill()
        left.wait()


@pytest.mark.usefixtures("clean")
def test_lies_are_found(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], guest: Guest) -> None:
    name = vmsnapshot("lie", quiesce={"policy": "Never"})
    stack.wait(name)
    assert judge.judge_snapshot(lab, stack, name) == []
    honest = stack.get(name)
    assert honest is not None
    forged = {**honest, "status": {**honest["status"], "consistency": "Filesystem"}}
    content = stack.content(name)
    assert content is not None
    said = list(judge._lies(lab, forged, content))
    assert any("claims Filesystem" in text for text in said), said


@pytest.mark.usefixtures("clean")
def test_a_ready_snapshot_that_lost_a_member_is_a_lie(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], guest: Guest
) -> None:
    name = vmsnapshot("lost")
    stack.wait(name)
    assert judge.judge_snapshot(lab, stack, name) == []
    content = stack.content(name)
    assert content is not None
    handle = next(v["handle"] for v in content["spec"]["volumes"] if v["target"] == "vda")
    Path(handle).unlink()
    (found,) = judge.judge_snapshot(lab, stack, name)
    assert found.kind == "lied"
    assert "cannot be read" in found.what


@pytest.mark.usefixtures("clean")
def test_a_snapshot_of_another_instant_is_a_lie(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], guest: Guest
) -> None:
    """One disk's data is replaced by that of a later snapshot of the same disk."""
    first, later = vmsnapshot("early"), ""
    stack.wait(first)
    until("the writer went on", lambda: guest.records() > 0)
    later = vmsnapshot("late")
    stack.wait(later)
    early, late = stack.content(first), stack.content(later)
    assert early is not None
    assert late is not None
    ours, other = (next(v["handle"] for v in c["spec"]["volumes"] if v["target"] == "vda") for c in (early, late))
    Path(ours).write_bytes(Path(other).read_bytes())
    (found,) = judge.judge_snapshot(lab, stack, first)
    assert found.kind == "lied"


def test_every_fault_is_in_the_walk_and_every_step_has_a_way() -> None:
    walk = cases.walk(len(FAULTS), 1)
    assert {c.fault.name for c in walk} == {f.name for f in FAULTS}
    assert {c.step for c in cases.every()} == set(Step)
    assert cases.walk(60, 7) == cases.walk(60, 7), "a seed repeats a run"
    assert cases.walk(60, 7) != cases.walk(60, 8)
    assert all(cases.parse(c.name) == c for c in walk)


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


@pytest.mark.timeout(3600)
def test_the_fixed_part(stack: Stack) -> None:
    """Every kind of fault once, at steps that a seed chose; with an operator and a guardian of its own."""
    stack.stop()
    try:
        words = [sys.executable, "-m", "tests.chaos", "-n", str(len(FAULTS)), "--seed", "1"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        found = json.loads((ROOT / "build" / "chaos.json").read_text())
        assert found["injections"] >= 40
    finally:
        stack.start()
