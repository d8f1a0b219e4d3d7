"""Copies that the hypervisor itself makes, on real parts: of one instant with all else, whole or not there, and stopped when nobody wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import proof
from tests.integration.brake import Brake
from tests.integration.sweep_support import NOBODY, a_journal, mark, marked
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import VolumeId

BIG = {
    "vda": GuestDisk(kind="file", size_mib=1024),
    "vdb": GuestDisk(kind="file", pool="plain"),
    "vdc": GuestDisk(kind="rbd"),
}
MANY = {
    "vda": GuestDisk(kind="file", format="qcow2"),
    "vdb": GuestDisk(kind="file"),
    "vdc": GuestDisk(kind="rbd"),
}
CLASSES = {
    "copied-files": [{"type": "file", "sourcePattern": "*/demo-backed-*"}],
    "copied-all": [
        {"type": "file", "sourcePattern": "*/demo-copied-*"},
        {"type": "network", "protocol": "rbd", "sourcePattern": "*/demo-copied-*"},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def classes(lab: Lab, stack: Stack) -> Iterator[None]:
    """Two classes whose disks the hypervisor copies: the files of one guest, and all of another one."""
    (found,) = stack.example("storage-class-backup.yaml")
    for name, match in CLASSES.items():
        document = stack.fitted({**found, "metadata": {"name": name}})
        document["spec"] |= {"match": match, "priority": 10}
        stack.apply(document)
    for name in CLASSES:
        lab.kubectl("wait", "--for=condition=Ready", "--timeout=60s", f"storagedriverclasses.vmsnapshot.io/{name}")
    yield
    for name in CLASSES:
        lab.kubectl("delete", f"storagedriverclasses.vmsnapshot.io/{name}")


@pytest.fixture(scope="module")
def backed(lab: Lab) -> Iterator[Guest]:
    """A guest with two files and an image on Ceph; the first holds enough that the brake is pressed before it is copied.

    A copy has made some 200 MB by then, where nothing else is at work.
    """
    made = lab.guest("demo-backed", BIG, memory_mib=96)
    made.control(["sh", "-c", "dd if=/dev/urandom of=/mnt/vda/much bs=1M count=640 && sync"], timeout=120)
    yield made
    made.remove()


@pytest.fixture(scope="module")
def copied(lab: Lab) -> Iterator[Guest]:
    """A guest with disks of all kinds, all of which the hypervisor copies."""
    made = lab.guest("demo-copied", MANY, memory_mib=96)
    yield made
    made.remove()


@pytest.fixture(autouse=True)
def up(backed: Guest) -> None:
    """The guest runs at the beginning of each test."""
    backed.up()


@pytest.fixture
def brake(lab: Lab, backed: Guest, up: None) -> Iterator[Brake]:
    made = Brake(lab, backed)
    yield made
    made.close()


def truth(lab: Lab, stack: Stack, name: str, folder: Path) -> proof.Truth:
    content = stack.content(name)
    assert content is not None
    return proof.read(lab, content, folder)


def ours(lab: Lab) -> list[str]:
    """What storage holds of ours."""
    return [f for f in proof.files(lab) if "vms-probe-" not in f]


def lost(stack: Stack, name: str) -> str:
    """Wait until a snapshot has failed as lost, and return what it says."""
    body = stack.wait(name, "Stalled")
    found = conditions(body)["Stalled"]
    assert found["reason"] == "SnapshotLost", found
    return str(found["message"])


def test_all_disks_of_whatever_storage_by_one_job(
    lab: Lab, stack: Stack, copied: Guest, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("crash", domain=copied.name, quiesce={"policy": "Never"})
    status = stack.wait(name)["status"]
    assert status["consistency"] == "Crash"
    assert [g["className"] for g in status["groups"]] == ["copied-all"]
    held = truth(lab, stack, name, tmp_path)
    assert held.in_order, held.records
    assert min(held.records.values()) > 0


def test_one_freeze_with_storage_that_cuts_in_an_instant(
    lab: Lab, stack: Stack, backed: Guest, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("mixed", domain=backed.name, quiesce={"policy": "Require"})
    status = stack.wait(name)["status"]
    assert status["consistency"] == "Filesystem"
    assert status["quiesce"]["method"] == "GuestAgent"
    assert {g["className"] for g in status["groups"]} == {"copied-files", "ceph-vms"}
    held = truth(lab, stack, name, tmp_path)
    assert held.one_instant, held.records
    assert held.clean, held.fsck


def test_an_operator_that_is_killed_while_it_copies_goes_on(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("killed", domain=backed.name, quiesce={"policy": "Require"})
    brake.wait()

    def told() -> str:
        """The version of a status that tells of progress."""
        body = stack.get(name) or {}
        message = conditions(body).get("Reconciling", {}).get("message", "")
        return str(body["metadata"]["resourceVersion"]) if "MiB" in message else ""

    stack.wait(name, "VolumesSnapshotted")
    until("its progress is told", lambda: bool(told()))
    stack.programs["operator"].kill()
    before = told()
    stack.start_operator()
    until("its progress is told again, by another process", lambda: told() not in ("", before))
    brake.let_go()
    assert stack.wait(name)["status"]["consistency"] == "Filesystem"
    held = truth(lab, stack, name, tmp_path)
    assert held.one_instant, held.records
    assert held.clean, held.fsck


def test_what_ended_while_nobody_listened_is_not_called_whole(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, fresh: Callable[[str], str]
) -> None:
    name = stack.snapshot(fresh("unheard"), backed.name)
    brake.wait()
    stack.wait(name, "VolumesSnapshotted")
    stack.programs["operator"].kill()
    brake.let_go()
    until("the copy is over", lambda: not brake.job())
    stack.start_operator()
    assert "nobody was listening" in lost(stack, name)
    until("all of it is removed", lambda: not ours(lab))
    stack.delete(name)


def test_a_vm_that_is_destroyed_takes_its_copy_with_it(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, fresh: Callable[[str], str]
) -> None:
    name = stack.snapshot(fresh("destroyed"), backed.name)
    brake.wait()
    stack.wait(name, "VolumesSnapshotted")
    backed.destroy()
    assert "the copy failed" in lost(stack, name)
    until("all of it is removed", lambda: not ours(lab))
    stack.delete(name)


def test_a_deletion_stops_the_copy(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, fresh: Callable[[str], str]
) -> None:
    name = stack.snapshot(fresh("deleted"), backed.name)
    brake.wait()
    stack.wait(name, "VolumesSnapshotted")
    stack.delete(name)
    assert not brake.job()
    assert not ours(lab)


def test_another_programs_copy_is_waited_for_and_not_touched(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    target = lab.pool_path("plain") / "somebody"
    domain: Any = backed.domain()
    domain.backupBegin(
        "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'><driver type='raw'/>"
        f"<target file='{target}'/></disk><disk name='vdb' backup='no'/><disk name='vdc' backup='no'/></disks></domainbackup>",
        None,
    )
    try:
        brake.wait()
        waiting = vmsnapshot("waits", domain=backed.name)
        until("it waits", lambda: planned(stack, waiting).get("reason") == "BackupRunning")
        assert str(target) in planned(stack, waiting)["message"]
        stack.delete(waiting)
        assert str(target) in brake.job(), "it is still at work"
        again = vmsnapshot("after", domain=backed.name, quiesce={"policy": "Require"})
        brake.let_go()
        stack.wait(again)
        assert truth(lab, stack, again, tmp_path).one_instant
    finally:
        target.unlink(missing_ok=True)


def test_an_orphan_is_not_removed_beneath_a_copy(
    lab: Lab, stack: Stack, backed: Guest, brake: Brake, extra_class: Callable[..., str]
) -> None:
    """A journal of ours proves whose it is; a class that is new is scanned at once. It is not the class that copied."""
    orphan = names.request_name(stack.installation(), NOBODY, 1, "copied-files", [VolumeId("v")])
    target = lab.pool_path("plain") / f"{orphan}-{names.member(VolumeId('v'))}"
    domain: Any = backed.domain()
    domain.backupBegin(
        "<domainbackup mode='push'><disks><disk name='vda' backup='yes' type='file'><driver type='raw'/>"
        f"<target file='{target}'/></disk><disk name='vdb' backup='no'/><disk name='vdc' backup='no'/></disks></domainbackup>",
        None,
    )
    try:
        brake.wait()
        mark(backed, journals.to_xml(a_journal(stack.installation())))
        until("the journal is removed", lambda: not marked(backed))
        assert str(target) in brake.job()
        assert target.exists()
        parameters = {"poolName": "plain", "socketPath": str(lab.libvirt_socket)}
        extra_class("scans-anew", "libvirt-volume", [{"sourcePattern": "/nowhere/*"}], parameters=parameters)
        until("the orphan is removed", lambda: not target.exists())
        assert not brake.job(), "its copy was stopped before"
    finally:
        target.unlink(missing_ok=True)


def planned(stack: Stack, name: str) -> dict[str, Any]:
    return conditions(stack.get(name) or {}).get("Planned", {})


def test_back_in_place_and_into_a_new_vm(
    lab: Lab, stack: Stack, backed: Guest, vmsnapshot: Callable[..., str], fresh: Callable[[str], str], tmp_path: Path
) -> None:
    snapshot = vmsnapshot("way-back", domain=backed.name, quiesce={"policy": "Require"})
    stack.wait(snapshot)
    held = truth(lab, stack, snapshot, tmp_path)
    assert held.one_instant, held.records
    new, restores = fresh("demo-new"), [fresh("beside"), fresh("back")]
    try:
        stack.restore(restores[0], snapshot, mode="NewVM", newVM={"name": new})
        stack.wait_restore(restores[0])
        made = proof.of_domain(lab, lab.libvirt().lookupByName(new), tmp_path)
        assert made.records == held.records
        assert made.clean
        until("the guest writes on", lambda: backed.records() > max(held.records.values()) + 50)

        stack.restore(restores[1], snapshot)
        body = stack.wait_restore(restores[1])
        assert conditions(body)["SafetySnapshotTaken"]["reason"] == "Taken"
        assert proof.of_domain(lab, backed.domain(), tmp_path).records == held.records
        later = truth(lab, stack, body["status"]["safetySnapshotName"], tmp_path)
        assert min(later.records.values()) > max(held.records.values()), "copied of a VM that is off"
    finally:
        for name in restores:
            stack.delete_restore(name)
        for each in stack.all("vmsnapshots.vmsnapshot.io"):
            if each["metadata"].get("labels", {}).get("vmsnapshot.io/safety-of") in restores:
                stack.delete(each["metadata"]["name"])
        proof.remove_vm(lab, new)
