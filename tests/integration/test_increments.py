"""Copies by the hypervisor of only what changed, on real parts: the whole truth in each, in whatever order they go, and nothing left."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import proof
from tests.chaos.injector import Injector
from tests.integration.brake import Brake
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until
from vmsnapshot_operator.core.steps import Moment, Step

CLASS = "copied-changes"
DISKS = {
    "vda": GuestDisk(kind="file", format="qcow2", size_mib=1024),
    "vdb": GuestDisk(kind="file", format="qcow2"),
    "vdc": GuestDisk(kind="file"),
}
REMEMBER = {"vda", "vdb"}


@pytest.fixture(scope="module", autouse=True)
def served(lab: Lab, stack: Stack) -> Iterator[None]:
    """A class that copies only what changed, for all disks of one guest."""
    (document,) = (stack.fitted(d) for d in stack.example("storage-class-incremental.yaml"))
    document["metadata"] = {"name": CLASS}
    document["spec"] |= {"match": [{"type": "file", "sourcePattern": "*/demo-changing-*"}], "priority": 10}
    stack.apply(document)
    lab.kubectl("wait", "--for=condition=Ready", "--timeout=60s", f"storagedriverclasses.vmsnapshot.io/{CLASS}")
    yield
    lab.kubectl("delete", f"storagedriverclasses.vmsnapshot.io/{CLASS}")


@pytest.fixture(scope="module")
def made(lab: Lab) -> Iterator[Guest]:
    """A guest with two disks that remember what is written to them, and one that does not."""
    guest = lab.guest("demo-changing", DISKS, memory_mib=96)
    yield guest
    guest.remove()


@pytest.fixture
def guest(made: Guest) -> Guest:
    """The same, running."""
    made.up()
    return made


@pytest.fixture
def take(stack: Stack, guest: Guest, vmsnapshot: Callable[..., str]) -> Callable[..., str]:
    """Take a snapshot and wait until it can be restored."""

    def taken(stem: str) -> str:
        name = vmsnapshot(stem, domain=guest.name, quiesce={"policy": "Require"})
        stack.wait(name)
        return name

    return taken


def said(stack: Stack, name: str) -> dict[str, str]:
    """What a snapshot says of each disk: how it was copied."""
    body = stack.get(name) or {}
    parts = body["status"]["groups"][0]["message"].split("; disk ")
    return {p.removeprefix("disk ")[:3]: p.removeprefix("disk ")[5:] for p in parts}


def changes(stack: Stack, name: str) -> set[str]:
    """The disks of which only what changed was copied."""
    return {
        target for target, how in said(stack, name).items() if how.startswith("what was written since its copy of ")
    }


def truth(lab: Lab, stack: Stack, name: str, folder: Path) -> int:
    """See that all disks of a snapshot hold the same records and are clean; return how many."""
    content = stack.content(name)
    assert content is not None
    found = proof.read(lab, content, folder)
    assert found.one_instant, found.records
    assert found.clean, found.fsck
    return found.records["vda"]


def left(lab: Lab, guest: Guest) -> tuple[set[str], set[str]]:
    """The checkpoints that libvirt lists of a guest, and the bitmaps that are in its disks."""
    return {c.getName() for c in guest.domain().listAllCheckpoints()}, set(proof.bitmaps(guest.domain()))


def handles(stack: Stack, name: str) -> dict[str, Path]:
    """The files of a snapshot, by disk."""
    content = stack.content(name)
    assert content is not None
    return {v["target"]: Path(v["handle"]) for v in content["spec"]["volumes"]}


def checkpoints(stack: Stack, name: str) -> set[str]:
    """The names of the checkpoints of a snapshot."""
    return {path.name for target, path in handles(stack, name).items() if target in REMEMBER}


def test_each_copy_is_whole_whatever_becomes_of_the_others(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], tmp_path: Path
) -> None:
    first = take("first")
    assert "no earlier copy" in said(stack, first)["vda"]
    assert "raw keeps no bitmap" in said(stack, first)["vdc"]
    assert left(lab, guest) == (checkpoints(stack, first), checkpoints(stack, first))

    second, third = take("second"), take("third")
    assert changes(stack, second) == changes(stack, third) == REMEMBER
    counts = [truth(lab, stack, n, tmp_path) for n in (first, second, third)]
    assert counts == sorted(set(counts)), "each holds what was written since the one before"
    assert left(lab, guest) == (checkpoints(stack, third), checkpoints(stack, third)), "those of the others are gone"

    stack.delete(second)
    assert [truth(lab, stack, n, tmp_path) for n in (first, third)] == [counts[0], counts[2]]
    stack.delete(first)
    assert truth(lab, stack, third, tmp_path) == counts[2]

    fourth = take("fourth")
    assert changes(stack, fourth) == REMEMBER
    assert truth(lab, stack, fourth, tmp_path) > counts[2]
    stack.delete(fourth)
    assert left(lab, guest) == (set(), set())
    fifth = take("fifth")
    assert "bitmap of its last copy" in said(stack, fifth)["vda"]
    for name in (third, fifth):
        stack.delete(name)
    assert not [x for x in proof.leftovers(lab) if guest.name in x or "vms-" in x]


def test_into_a_new_vm(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path
) -> None:
    take("base")
    snapshot = take("changes")
    assert changes(stack, snapshot) == REMEMBER
    count = truth(lab, stack, snapshot, tmp_path)
    new, restore = fresh("demo-new"), fresh("beside")
    try:
        stack.restore(restore, snapshot, mode="NewVM", newVM={"name": new})
        stack.wait_restore(restore)
        found = proof.of_domain(lab, lab.libvirt().lookupByName(new), tmp_path)
        assert set(found.records.values()) == {count}
        assert found.clean
    finally:
        stack.delete_restore(restore)
        proof.remove_vm(lab, new)


def test_a_bitmap_that_is_lost(lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], tmp_path: Path) -> None:
    before = take("before")
    guest.kill(signal.SIGKILL)
    until("it is off", lambda: not guest.domain().isActive())
    guest.up()
    after = take("after")
    assert changes(stack, after) == set()
    assert "bitmap of its last copy" in said(stack, after)["vda"]
    assert truth(lab, stack, after, tmp_path) > truth(lab, stack, before, tmp_path)
    assert left(lab, guest) == (checkpoints(stack, after), checkpoints(stack, after)), "what was broken is removed"
    again = take("again")
    assert changes(stack, again) == REMEMBER
    truth(lab, stack, again, tmp_path)


def test_a_shutdown_between_two_copies(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], tmp_path: Path
) -> None:
    before = take("before")
    guest.shutdown()
    guest.up()
    after = take("after")
    assert changes(stack, after) == REMEMBER
    assert truth(lab, stack, after, tmp_path) > truth(lab, stack, before, tmp_path)


def test_an_earlier_copy_that_is_not_what_it_was(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], tmp_path: Path
) -> None:
    before = take("before")
    files = handles(stack, before)
    with files["vda"].open("r+b") as file:
        file.seek(4096)
        file.write(b"somebody else")
    files["vdb"].unlink()
    after = take("after")
    told = said(stack, after)
    assert "was written to since it was copied" in told["vda"]
    assert "does not exist" in told["vdb"]
    assert changes(stack, after) == set()
    truth(lab, stack, after, tmp_path)


def test_an_operator_that_is_killed_while_it_copies_goes_on(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    take("before")
    guest.control(["sh", "-c", "dd if=/dev/zero of=/mnt/vda/much bs=1M count=800 && sync"], timeout=120)
    brake = Brake(lab, guest)
    try:
        name = vmsnapshot("killed", domain=guest.name, quiesce={"policy": "Require"})
        brake.wait()
        stack.wait(name, "VolumesSnapshotted")
        stack.programs["operator"].kill()
        stack.start_operator()
        until("its progress is told", lambda: "MiB" in reconciling(stack, name))
        brake.let_go()
        stack.wait(name)
    finally:
        brake.close()
    assert changes(stack, name) == REMEMBER
    truth(lab, stack, name, tmp_path)
    until("the others' are gone", lambda: left(lab, guest) == (checkpoints(stack, name), checkpoints(stack, name)))


def test_a_copy_that_is_given_up_takes_its_checkpoint_with_it(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path
) -> None:
    before = take("before")
    guest.control(["sh", "-c", "dd if=/dev/zero of=/mnt/vda/much bs=1M count=800 && sync"], timeout=120)
    brake = Brake(lab, guest)
    try:
        name = stack.snapshot(fresh("given-up"), guest.name)
        brake.wait()
        stack.wait(name, "VolumesSnapshotted")
        assert len(left(lab, guest)[0]) == 2 * len(REMEMBER)
        stack.delete(name)
    finally:
        brake.close()
    assert left(lab, guest) == (checkpoints(stack, before), checkpoints(stack, before))
    after = take("after")
    assert changes(stack, after) == REMEMBER, "the copy before the one that was given up still serves"
    truth(lab, stack, after, tmp_path)


def test_what_a_vm_that_is_off_keeps_is_removed_when_it_runs(
    lab: Lab, stack: Stack, guest: Guest, fresh: Callable[[str], str]
) -> None:
    name = stack.snapshot(fresh("off"), guest.name)
    stack.wait(name)
    guest.shutdown()
    stack.delete(name)
    assert len(left(lab, guest)[0]) == len(REMEMBER)
    guest.up()
    stack.programs["operator"].kill()  # the next one looks at once
    stack.start_operator()
    until("nothing is left", lambda: left(lab, guest) == (set(), set()))


@pytest.mark.parametrize(
    ("step", "moment"),
    [
        (Step.PREPARE_INHERIT, Moment.AFTER),
        (Step.PREPARE_CHECKPOINT, Moment.AFTER),
        (Step.WINDOW_BEGIN, Moment.AFTER),
        (Step.SETTLE_CHECKPOINT, Moment.AFTER),
    ],
)
def test_an_operator_that_is_killed_at_a_step_leaves_nothing(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    injector: Injector,
    take: Callable[..., str],
    vmsnapshot: Callable[..., str],
    tmp_path: Path,
    step: Step,
    moment: Moment,
) -> None:
    before = take("before")
    with injector.trap(step, moment) as trap:
        name = vmsnapshot("killed", domain=guest.name, quiesce={"policy": "Require"})
        assert trap.wait(60)
        stack.programs["operator"].kill()
    stack.start_operator()
    stack.wait(name)
    again = step is not Step.SETTLE_CHECKPOINT
    assert changes(stack, name) == (set() if again else REMEMBER), "in a second attempt all is copied"
    assert truth(lab, stack, name, tmp_path) > truth(lab, stack, before, tmp_path)
    assert left(lab, guest) == (checkpoints(stack, name), checkpoints(stack, name))

    with injector.trap(Step.ROLL_BACK_CHECKPOINT, moment) as trap:
        stack.delete(name, wait=False)
        assert trap.wait(60)
        stack.programs["operator"].kill()
    stack.start_operator()
    until("it is gone", lambda: stack.get(name) is None)
    assert left(lab, guest) == (set(), set())
    truth(lab, stack, before, tmp_path)


def test_a_migration_between_two_copies(
    lab: Lab, stack: Stack, guest: Guest, take: Callable[..., str], tmp_path: Path
) -> None:
    first, second = lab.host, lab.second_host()
    stack.spread([first, second])
    try:
        before = take("before")
        guest.migrate(second)
        listed, there = left(lab, guest)
        assert (listed, there) == (set(), checkpoints(stack, before)), "libvirt forgets what the disks remember"
        after = take("after")
        assert changes(stack, after) == REMEMBER
        assert truth(lab, stack, after, tmp_path) > truth(lab, stack, before, tmp_path)
        assert left(lab, guest) == (checkpoints(stack, after), checkpoints(stack, after))
        guest.migrate(first)
        stack.delete(after)
        assert left(lab, guest) == (set(), set())
    finally:
        if guest.host != first:
            guest.migrate(first)
        stack.spread([first])
        lab.end_second_host()


def reconciling(stack: Stack, name: str) -> str:
    found: Any = conditions(stack.get(name) or {}).get("Reconciling", {})
    return str(found.get("message", ""))
