"""The way back on real parts: every disk is what it was, or the VM cannot be started; what is made beside it is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from tests import proof
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until
from vmsnapshot_operator.plan import definition

MIXED = {
    "vda": GuestDisk(kind="file"),
    "vdb": GuestDisk(kind="file", pool="plain"),
    "vdc": GuestDisk(kind="rbd"),
}


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    """A guest with disks on a reflink file system, on storage that must copy, and on Ceph."""
    made = lab.guest("demo-back", MIXED, memory_mib=96)
    yield made
    made.remove()


@pytest.fixture
def vmrestore(stack: Stack, fresh: Callable[[str], str]) -> Iterator[Callable[..., str]]:
    """Create VMRestores that are deleted at the end of the test, and the safety snapshots that they leave."""
    made: list[str] = []

    def create(stem: str, snapshot: str, **spec: object) -> str:
        made.append(stack.restore(fresh(stem), snapshot, **spec))
        return made[-1]

    yield create
    for name in made:
        stack.delete_restore(name)
    for body in stack.all("vmsnapshots.vmsnapshot.io"):
        if body["metadata"].get("labels", {}).get("vmsnapshot.io/safety-of") in made:
            stack.delete(body["metadata"]["name"])


def test_back_in_place_with_a_safety_snapshot(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., str],
    tmp_path: Path,
) -> None:
    guest.up()
    snapshot = vmsnapshot("before", domain=guest.name, quiesce={"policy": "Require"})
    stack.wait(snapshot)
    held = of_snapshot(lab, stack, snapshot, tmp_path)
    assert held.one_instant
    until("the guest writes on", lambda: guest.records() > max(held.records.values()) + 200)
    refused(stack, vmrestore("running", snapshot, runningVM="Refuse"), "VMRunning")

    name = vmrestore("back", snapshot)
    body = stack.wait_restore(name)

    assert conditions(body)["SafetySnapshotTaken"]["reason"] == "Taken"
    assert not guest.domain().isActive()
    now = of_guest(lab, guest, tmp_path)
    assert now.records == held.records
    assert now.clean
    safety = body["status"]["safetySnapshotName"]
    later = of_snapshot(lab, stack, safety, tmp_path)
    assert min(later.records.values()) > max(held.records.values()), "what was written since is in the safety snapshot"
    guest.up()
    assert guest.records() > 0

    # What was undone can be redone: to the safety snapshot, started by the restore itself.
    again = stack.wait_restore(vmrestore("again", safety, safetySnapshot=False, startAfter=True))
    assert conditions(again)["SafetySnapshotTaken"]["reason"] == "NotRequested"
    assert guest.domain().isActive()
    guest.wait()


def test_another_vm_beside_the_one_that_runs(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., str],
    tmp_path: Path,
    fresh: Callable[[str], str],
) -> None:
    guest.up()
    snapshot = vmsnapshot("source", domain=guest.name, quiesce={"policy": "Require"})
    stack.wait(snapshot)
    held = of_snapshot(lab, stack, snapshot, tmp_path)
    new = fresh("demo-new")
    name = vmrestore("beside", snapshot, mode="NewVM", newVM={"name": new}, startAfter=True)
    try:
        stack.wait_restore(name)
        connection = lab.libvirt()
        domain = connection.lookupByName(new)
        assert domain.isActive()
        assert domain.UUIDString() != guest.uuid
        assert guest.domain().isActive(), "the VM itself runs on"
        domain.destroy()
        made = proof.of_domain(lab, domain, tmp_path)
        assert made.records.keys() == held.records.keys()
        assert all(made.records[t] >= n for t, n in held.records.items()), (made, held)
        assert made.one_instant or made.in_order
        # Its disks are its own: they stay when the snapshot and the restore go.
        stack.delete_restore(name)
        stack.delete(snapshot)
        assert proof.of_domain(lab, domain, tmp_path).records == made.records
    finally:
        proof.remove_vm(lab, new)
    assert not [x for x in proof.leftovers(lab) if new in x]


def test_an_operator_that_is_killed_sets_back_all_disks(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., str],
    tmp_path: Path,
) -> None:
    guest.up()
    snapshot = vmsnapshot("killed", domain=guest.name, quiesce={"policy": "Require"})
    stack.wait(snapshot)
    held = of_snapshot(lab, stack, snapshot, tmp_path)
    until("the guest writes on", lambda: guest.records() > max(held.records.values()) + 50)
    name = vmrestore("back", snapshot)
    until("the gate is closed", lambda: gated(guest) or finished(stack, name))
    stack.programs["operator"].kill()
    if gated(guest):
        with pytest.raises(libvirt.libvirtError):
            guest.domain().create()
    stack.start_operator()
    stack.wait_restore(name)
    assert of_guest(lab, guest, tmp_path).records == held.records


def test_what_cannot_be_done_is_refused(
    stack: Stack, guest: Guest, vmsnapshot: Callable[..., str], vmrestore: Callable[..., str]
) -> None:
    guest.up()
    snapshot = vmsnapshot("good", domain=guest.name)
    stack.wait(snapshot)
    assert "there is no VMSnapshot" in refused(stack, vmrestore("none", "not-there"), "SnapshotNotFound")
    said = refused(stack, vmrestore("disk", snapshot, volumes={"include": ["vdx"]}), "IncludedTargetNotFound")
    assert "vda, vdb, vdc" in said
    said = refused(stack, vmrestore("uid", snapshot, snapshotUID="00000000-0000-0000-0000-000000000000"))
    assert "another one of that name" in said
    said = refused(stack, vmrestore("run", snapshot, runningVM="Refuse"), "VMRunning")
    assert "spec.runningVM" in said
    said = refused(stack, vmrestore("taken", snapshot, mode="NewVM", newVM={"name": guest.name}), "NameTaken")
    assert guest.name in said
    assert guest.domain().isActive()


def refused(stack: Stack, name: str, reason: str = "") -> str:
    """The message of the Stalled condition, which must come."""
    body = stack.wait_restore(name, "Stalled")
    found = conditions(body)["Stalled"]
    assert not reason or found["reason"] == reason, found
    return str(found["message"])


def finished(stack: Stack, name: str) -> bool:
    return conditions(stack.get_restore(name) or {}).get("Ready", {}).get("status") == "True"


def gated(guest: Guest) -> bool:
    """Whether the disks are taken from the stored definition."""
    return definition.GATE_FOLDER in guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)


def of_snapshot(lab: Lab, stack: Stack, name: str, folder: Path) -> proof.Truth:
    content = stack.content(name)
    assert content is not None
    return proof.read(lab, content, folder)


def of_guest(lab: Lab, guest: Guest, folder: Path) -> proof.Truth:
    return proof.of_domain(lab, guest.domain(), folder)
