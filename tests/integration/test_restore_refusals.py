"""What a restore is refused for on real parts, before anything is touched; and what has to wait for each other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt
import pytest

from tests import proof
from tests.chaos.injector import Injector
from tests.integration.sweep_support import events, get
from tests.integration.test_restores import finished, gated, refused
from tests.lab import Lab, LabError
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack, conditions, until
from vmsnapshot_operator.core.steps import Moment, Step
from vmsnapshot_operator.plan import definition

DISKS = {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="file"), "vdc": GuestDisk(kind="rbd")}
COPIED = {"vda": GuestDisk(kind="file", pool="plain")}
SNAPSHOTS, CONTENTS = "vmsnapshots.vmsnapshot.io", "vmsnapshotcontents.vmsnapshot.io"


class Rig:
    """A VM that boots nothing, and what is made of it; all of it is taken away at the end of a test."""

    def __init__(self, stack: Stack, vm: Guest, fresh: Callable[[str], str]) -> None:
        self.stack, self.vm, self.fresh = stack, vm, fresh
        self.snapshots: list[str] = []
        self.restores: list[str] = []

    def snapshot(self, **spec: object) -> str:
        """A VMSnapshot that is Ready."""
        name = self.stack.snapshot(self.fresh("row"), self.vm.name, **spec)
        self.snapshots.append(name)
        self.stack.wait(name)
        return name

    def restore(self, snapshot: str, **spec: object) -> str:
        """A VMRestore without a safety snapshot: the next thing that is done is the deed."""
        if spec.get("mode", "InPlace") == "InPlace":
            spec.setdefault("safetySnapshot", False)
        self.restores.append(self.stack.restore(self.fresh("row"), snapshot, **spec))
        return self.restores[-1]

    def refused(self, snapshot: str, reason: str, **spec: object) -> str:
        """The refusal's message."""
        return refused(self.stack, self.restore(snapshot, **spec), reason)

    def off(self) -> None:
        if self.vm.domain().isActive():
            self.vm.destroy()

    @contextmanager
    def redefined(self, change: Callable[[ET.Element], None]) -> Iterator[None]:
        """The stored definition is another one meanwhile."""
        before = self.vm.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        root = ET.fromstring(before)  # noqa: S314 - libvirt's own
        change(root)
        self.vm.connection().defineXML(ET.tostring(root, encoding="unicode"))
        try:
            yield
        finally:
            self.vm.connection().defineXML(before)

    def clean(self) -> None:
        for name in self.restores:
            self.stack.delete_restore(name)
        for name in self.snapshots:
            self.stack.delete(name)


@pytest.fixture
def rig(lab: Lab, stack: Stack, fresh: Callable[[str], str]) -> Iterator[Rig]:
    vm = lab.domain_stub("demo-rows", DISKS)
    made = Rig(stack, vm, fresh)
    yield made
    made.clean()
    vm.remove()


def _disk(root: ET.Element, target: str) -> ET.Element:
    return next(d for d in root.iter("disk") if d.find("target").get("dev") == target)  # type: ignore[union-attr]  # each has one


# --- the VM's disks -------------------------------------------------------------------------------------------------------


def test_disks_that_are_not_what_they_were(rig: Rig) -> None:
    snapshot = rig.snapshot()
    rig.off()
    path = Path(rig.vm.disks["vdb"].path)
    size = path.stat().st_size
    os.truncate(path, size + (1 << 20))
    try:
        assert "resize it back" in rig.refused(snapshot, "DisksChanged")
    finally:
        os.truncate(path, size)

    def unplug(root: ET.Element) -> None:
        root.find("devices").remove(_disk(root, "vdb"))  # type: ignore[union-attr]  # there is one

    with rig.redefined(unplug):
        assert "no disk vdb any more" in rig.refused(snapshot, "DisksChanged")

    def exchange(root: ET.Element) -> None:
        _disk(root, "vdb").find("source").set("file", str(path.with_name("another.raw")))  # type: ignore[union-attr]  # has one

    another = path.with_name("another.raw")
    shutil.copyfile(path, another)
    try:
        with rig.redefined(exchange):
            assert f"and was {path}" in rig.refused(snapshot, "DisksChanged")
    finally:
        another.unlink()


def test_a_disk_that_is_plugged_elsewhere_and_another_one_beside_it_do_no_harm(rig: Rig, lab: Lab) -> None:
    snapshot = rig.snapshot()
    rig.off()
    beside = lab.pool_path("reflink") / "beside.raw"
    beside.write_bytes(b"mine" + bytes((1 << 20) - 4))
    path = Path(rig.vm.disks["vdb"].path)
    before = path.read_bytes()
    with path.open("r+b") as disk:
        disk.write(b"later")

    def move(root: ET.Element) -> None:
        moved = _disk(root, "vdb")
        moved.find("target").set("dev", "vdy")  # type: ignore[union-attr]  # has one
        more = ET.fromstring(ET.tostring(moved))  # noqa: S314 - ours
        more.find("target").set("dev", "vdz")  # type: ignore[union-attr]  # has one
        more.find("source").set("file", str(beside))  # type: ignore[union-attr]  # has one
        for element in (moved, more):
            for address in element.findall("address"):
                element.remove(address)
        root.find("devices").append(more)  # type: ignore[union-attr]  # there is one

    try:
        with rig.redefined(move):
            rig.stack.wait_restore(rig.restore(snapshot))
            targets = [d.find("target").get("dev") for d in ET.fromstring(rig.vm.domain().XMLDesc()).iter("disk")]  # type: ignore[union-attr]  # noqa: S314 - each has one; libvirt's own
            assert {"vdy", "vdz"} <= set(targets), targets
        assert path.read_bytes() == before
        assert beside.read_bytes().startswith(b"mine")
    finally:
        beside.unlink()


def test_a_vm_is_not_stopped_for_what_cannot_be_done(rig: Rig) -> None:
    snapshot = rig.snapshot()
    rig.vm.domain().managedSave()
    try:
        assert "managedsave-remove" in rig.refused(snapshot, "VMSaved", safetySnapshot=True)
        safety = [b for b in rig.stack.all(SNAPSHOTS) if "vmsnapshot.io/safety-of" in b["metadata"].get("labels", {})]
        assert not [b for b in safety if b["metadata"]["name"].startswith(rig.restores[-1])], (
            "it is refused before that"
        )
    finally:
        rig.vm.domain().managedSaveRemove()
    rig.vm.domain().create()
    content = rig.stack.content(snapshot)
    assert content is not None
    handle = next(v["handle"] for v in content["spec"]["volumes"] if v["handle"].startswith("/"))
    rig.vm.connection().storageVolLookupByPath(handle).delete()
    assert "does not exist" in rig.refused(snapshot, "SnapshotLost", runningVM="Stop")
    assert rig.vm.domain().isActive()


def test_a_new_vm_of_one_of_the_disks(rig: Rig, lab: Lab) -> None:
    path = Path(rig.vm.disks["vdb"].path)
    with path.open("r+b") as disk:
        disk.write(b"one of three")
    snapshot, new = rig.snapshot(), rig.fresh("demo-part")
    before = {*proof.files(lab)}
    try:
        name = rig.restore(snapshot, mode="NewVM", newVM={"name": new}, volumes={"include": ["vdb"]})
        told = rig.stack.wait_restore(name)["status"]["volumes"]
        assert [(v["target"], v["result"]) for v in told] == [("vdb", "Cloned")]
        root = ET.fromstring(lab.libvirt().lookupByName(new).XMLDesc())  # noqa: S314 - libvirt's own
        (disk_of_it,) = root.iter("disk")
        assert disk_of_it.find("target").get("dev") == "vdb"  # type: ignore[union-attr]  # has one
        made = disk_of_it.find("source").get("file") or ""  # type: ignore[union-attr]  # has one
        assert Path(made).read_bytes() == path.read_bytes()
        assert Path(made) != path
        more = [f for f in proof.files(lab) if f not in before and "vms-probe-" not in f]
        assert more == [f"file {made}"], "nothing else was copied, and no mark is left"
    finally:
        proof.remove_vm(lab, new)


def test_a_restore_that_is_created_anew_does_nothing_whatever_was_restored_since(rig: Rig) -> None:
    """As by a tool that applies manifests again: both restores are there, the older of them first."""
    snapshot = rig.snapshot()
    body = rig.stack.get(snapshot)
    assert body is not None
    rig.off()
    pinned = {"snapshotUID": body["metadata"]["uid"], "safetySnapshot": False, "runningVM": "Stop"}
    older, _ = names = [rig.restore(snapshot, **pinned) for _ in range(2)]
    for name in names:
        rig.stack.wait_restore(name)
    rig.stack.delete_restore(older)
    rig.vm.domain().create()
    rig.stack.restore(older, snapshot, **pinned)
    assert conditions(rig.stack.wait_restore(older))["Ready"]["reason"] == "AlreadyRestored"
    assert rig.vm.domain().isActive(), "it was not stopped for that"


def test_a_vm_that_is_gone_and_one_that_runs(rig: Rig, lab: Lab) -> None:
    snapshot = rig.snapshot()
    assert "runningVM" in rig.refused(snapshot, "VMRunning", runningVM="Refuse")
    rig.off()
    before = rig.vm.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    rig.vm.domain().undefine()
    try:
        rig.refused(snapshot, "DomainNotFound")
        new = rig.fresh("demo-again")
        rig.stack.wait_restore(rig.restore(snapshot, mode="NewVM", newVM={"name": new}))
        proof.remove_vm(lab, new)
    finally:
        rig.vm.connection().defineXML(before)


# --- the snapshot ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_not_one_to_go_back_to(rig: Rig, lab: Lab) -> None:
    stack = rig.stack
    missing = stack.snapshot(rig.fresh("row"), "no-such-vm")
    rig.snapshots.append(missing)
    stack.wait(missing, "Stalled")
    rig.refused(missing, "SnapshotNotReady")

    snapshot = rig.snapshot()
    lab.kubectl("create", "namespace", "team-z")
    try:
        name = stack.restore(rig.fresh("row"), snapshot, namespace="team-z")
        found = conditions(stack.wait_restore(name, "Stalled", namespace="team-z"))["Stalled"]
        assert found["reason"] == "SnapshotNotFound"
        assert "of its own namespace only" in found["message"]
        stack.delete_restore(name, namespace="team-z")
    finally:
        lab.kubectl("delete", "namespace", "team-z", "--wait=false")

    _finalizers(lab, snapshot, add="example.com/hold")
    stack.delete(snapshot, wait=False)
    rig.refused(snapshot, "SnapshotDeleting")
    _finalizers(lab, snapshot, remove="example.com/hold")


def _finalizers(lab: Lab, name: str, *, add: str = "", remove: str = "") -> None:
    there = json.loads(lab.kubectl("-n", TENANT, "get", SNAPSHOTS, name, "-o", "json"))["metadata"].get(
        "finalizers", []
    )
    wanted = [f for f in there if f != remove] + ([add] if add else [])
    patch = json.dumps({"metadata": {"finalizers": wanted}})
    lab.kubectl("-n", TENANT, "patch", SNAPSHOTS, name, "--type=merge", "-p", patch)


def test_a_member_that_is_lost_on_the_storage_makes_it_degraded(rig: Rig) -> None:
    snapshot = rig.snapshot()
    content = rig.stack.content(snapshot)
    assert content is not None
    files = [v for v in content["spec"]["volumes"] if v["handle"].startswith("/")]
    assert len(files) == 2
    Path(files[0]["handle"]).unlink()
    rig.stack.programs["operator"].stop()
    rig.stack.start_operator()  # it looks at once, and then every ten minutes
    found = conditions(rig.stack.wait(snapshot, "Degraded"))["Degraded"]
    assert found["reason"] == "SnapshotLost"
    assert f"disk {files[0]['target']} " in found["message"]
    rig.off()
    assert files[0]["target"] in rig.refused(snapshot, "SnapshotDegraded")


def test_handles_of_a_later_driver_are_not_guessed_at(rig: Rig, lab: Lab) -> None:
    snapshot = rig.snapshot()
    content = rig.stack.content(snapshot)
    assert content is not None
    groups = content["spec"]["groups"]
    groups[0]["capabilities"]["handleFormat"] = 99
    patch = json.dumps({"spec": {"groups": groups}})
    lab.kubectl("patch", CONTENTS, content["metadata"]["name"], "--type=merge", "-p", patch)
    rig.off()
    assert "99" in rig.refused(snapshot, "DriverTooOld")
    new = rig.fresh("demo-never")
    assert "99" in rig.refused(snapshot, "DriverTooOld", mode="NewVM", newVM={"name": new})


# --- room -----------------------------------------------------------------------------------------------------------------


def test_without_room_for_a_copy_nothing_is_left(lab: Lab, stack: Stack, fresh: Callable[[str], str]) -> None:
    vm = lab.domain_stub("demo-copied", COPIED)
    rig = Rig(stack, vm, fresh)
    filler = lab.pool_path("plain") / "filler"
    try:
        rig.off()
        disk = Path(vm.disks["vda"].path)
        with disk.open("r+b") as file:
            file.write(os.urandom(8 << 20))
        snapshot = rig.snapshot()
        _fill(filler, leave=4 << 20)
        before = proof.files(lab)
        name = rig.restore(snapshot, mode="NewVM", newVM={"name": fresh("demo-full")})

        def is_told() -> bool:
            told = conditions(stack.get_restore(name) or {}).values()
            return any("the pool plain has" in c["message"] and "are needed" in c["message"] for c in told)

        until("it says how much room is missing, and tries again", is_told)
        stack.delete_restore(name)
        assert proof.files(lab) == before
        held = disk.read_bytes()
        assert "are needed" in rig.refused(snapshot, "NoSpace")
        assert disk.read_bytes() == held
    finally:
        filler.unlink(missing_ok=True)
        rig.clean()
        vm.remove()


def _fill(path: Path, leave: int) -> None:
    """Take the room of a file system, also what is reserved for root, but for so many bytes."""
    with path.open("wb") as file:
        for step in (256 << 20, 16 << 20, 1 << 20):
            with contextlib.suppress(OSError):  # the last of it, a file system keeps for itself
                while (stat := os.fstatvfs(file.fileno())).f_bfree * stat.f_frsize > leave + step:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)


# --- at the same time -----------------------------------------------------------------------------------------------------


def test_two_restores_and_a_snapshot_of_one_vm_come_one_after_the_other(rig: Rig) -> None:
    first, second = rig.snapshot(), rig.snapshot()
    rig.off()
    names = [rig.restore(first), rig.restore(second)]
    meanwhile = rig.stack.snapshot(rig.fresh("row"), rig.vm.name)
    rig.snapshots.append(meanwhile)
    for name in names:
        rig.stack.wait_restore(name)
    rig.stack.wait(meanwhile)
    assert all(finished(rig.stack, n) for n in names)
    assert not [x for x in proof.leftovers(rig.stack.lab) if "metadata" in x]


def test_a_snapshot_that_a_restore_uses_is_deleted_after_it(
    lab: Lab, stack: Stack, fresh: Callable[[str], str]
) -> None:
    """The restore waits for a guest that does not hear it; the snapshot waits for the restore, and says so."""
    vm = lab.guest("demo-deaf", {"vda": GuestDisk(kind="file")}, writer=False, memory_mib=96)
    rig = Rig(stack, vm, fresh)
    try:
        snapshot = rig.snapshot()
        vm.hang_agent()
        try:
            name = rig.restore(snapshot, runningVM="Stop")
            until("the restore is at it", lambda: _has_finalizer(stack, name))
            stack.delete(snapshot, wait=False)

            def is_told() -> bool:
                found = conditions(stack.get(snapshot) or {})
                return any(c.get("reason") == "InUseByRestore" and name in c["message"] for c in found.values())

            until("the snapshot says for whom it waits", is_told)
        finally:
            vm.hang_agent(hang=False)
        assert "being deleted" in refused(stack, name, "SnapshotDeleting")
        until("the snapshot is gone", lambda: stack.get(snapshot) is None)
    finally:
        rig.clean()
        vm.remove()


def _has_finalizer(stack: Stack, name: str) -> bool:
    return bool((stack.get_restore(name) or {}).get("metadata", {}).get("finalizers"))


# --- what is taken away while the gate is closed ----------------------------------------------------------------------------


def _killed_behind_its_gate(rig: Rig, snapshot: str, **spec: object) -> str:
    """A restore whose operator was killed while the VM's disks were taken from it."""
    for _ in range(5):
        name = rig.restore(snapshot, **spec)
        until("the gate is closed", lambda n=name: gated(rig.vm) or _has_ended(rig.stack, n))  # type: ignore[misc]
        rig.stack.programs["operator"].kill()
        if gated(rig.vm):
            with pytest.raises(libvirt.libvirtError, match="VMRestore"):
                rig.vm.domain().create()
            return name
        rig.stack.start_operator()
        rig.stack.wait_restore(name)
    raise AssertionError("no restore was caught behind its gate")


def _has_ended(stack: Stack, name: str) -> bool:
    found = conditions(stack.get_restore(name) or {})
    return any(found.get(t, {}).get("status") == "True" for t in ("Ready", "Stalled"))


def _force_away(lab: Lab, resource: str, name: str) -> None:
    """Delete an object as an impatient administrator does: its finalizers first."""
    lab.kubectl("-n", TENANT, "delete", resource, name, "--wait=false")
    patch = json.dumps({"metadata": {"finalizers": []}})
    with contextlib.suppress(LabError):  # it may be gone
        lab.kubectl("-n", TENANT, "patch", resource, name, "--type=merge", "-p", patch)


def _written_later(vm: Guest) -> Path:
    """A disk that holds something else than when the snapshot was taken."""
    path = Path(vm.disks["vdb"].path)
    with path.open("r+b") as disk:
        disk.write(b"later")
        disk.flush()
        os.fsync(disk.fileno())
    # Else the pool knows of that only after the safety snapshot, as if it had been written then.
    vm.connection().storagePoolLookupByName("reflink").refresh(0)
    return path


def test_a_vm_behind_its_gate_goes_back_when_the_record_of_the_snapshot_is_lost(rig: Rig, lab: Lab) -> None:
    snapshot = rig.snapshot()
    rig.off()
    path = _written_later(rig.vm)
    name = _killed_behind_its_gate(rig, snapshot, safetySnapshot=True)
    content = rig.stack.content(snapshot)
    assert content is not None
    lab.kubectl("delete", CONTENTS, content["metadata"]["name"])
    rig.stack.start_operator()
    assert "not Ready" in refused(rig.stack, name, "SnapshotNotReady")
    assert not gated(rig.vm)
    safety = (rig.stack.get_restore(name) or {})["status"]["safetySnapshotName"]
    rig.snapshots.append(safety)
    assert path.read_bytes().startswith(b"later"), "as it was before the restore"
    rig.vm.domain().create()


def test_a_gate_that_nobody_can_open_is_told_until_a_person_does(rig: Rig, lab: Lab) -> None:
    stack, snapshot = rig.stack, rig.snapshot()
    rig.off()
    name = _killed_behind_its_gate(rig, snapshot)
    _force_away(lab, SNAPSHOTS, snapshot)
    stack.start_operator()

    def said() -> dict[str, object]:
        return conditions(stack.get_restore(name) or {}).get("Reconciling", {})

    until("it says that it is blocked", lambda: said().get("reason") == "Blocked")
    assert "VMSnapshotContent back" in str(said()["message"])
    stack.delete_restore(name, wait=False)
    until("it is being deleted", lambda: "deletionTimestamp" in (stack.get_restore(name) or {})["metadata"])
    assert not _left_gates(stack), "its VMRestore is at it"
    _force_away(lab, "vmrestores.vmsnapshot.io", name)
    until("the hypervisor tells of it", lambda: [g["domain"] for g in _left_gates(stack)] == [rig.vm.name])
    assert f"VMRestore {TENANT}/{name}" in _left_gates(stack)[0]["message"]
    assert any(f"{TENANT}/{name}" in note for note in events(stack, "GateLeft"))
    assert 'vmsnapshot_left_gates{hypervisor="lab"} 1.0' in stack.http("/metrics")[1]

    domain = rig.vm.domain()
    before = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    gate = definition.gate_of(before)
    assert gate is not None
    rig.vm.connection().defineXML(definition.reopened(before, gate.marker))
    until("it is forgotten", lambda: not _left_gates(stack))


def _left_gates(stack: Stack) -> list[dict[str, str]]:
    status = (get(stack, "hypervisors.vmsnapshot.io", "lab") or {}).get("status") or {}
    return list(status.get("leftGates") or ())


# --- what is started or defined while the gate is closed --------------------------------------------------------------------


def _killed_before_the_first_disk(rig: Rig, injector: Injector, snapshot: str, **spec: object) -> str:
    """A restore whose operator was killed when it was about to set the first disk back, and had said so."""
    with injector.trap(Step.REVERT_DRIVER, Moment.BEFORE) as trap:
        name = rig.restore(snapshot, **spec)
        assert trap.wait(60)
        rig.stack.programs["operator"].kill()
    if spec.get("safetySnapshot"):
        rig.snapshots.append((rig.stack.get_restore(name) or {})["status"]["safetySnapshotName"])
    return name


def _true_definition(vm: Guest) -> str:
    return vm.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)


def _files(vm: Guest) -> list[int]:
    """Each disk's inode: a driver that sets a file back makes a new one, which is of another number while a QEMU has the old one open."""
    return [Path(disk.path).stat().st_ino for disk in vm.disks.values() if disk.kind == "file"]


def _waits_for(stack: Stack, name: str, reason: str) -> None:
    def said() -> dict[str, dict[str, object]]:
        return conditions(stack.get_restore(name) or {})

    until(f"it waits: {reason}", lambda: said().get("Reconciling", {}).get("reason") == reason)
    assert said()["VolumesRestored"]["reason"] == "HalfDone"
    assert _has_finalizer(stack, name)


def test_no_disk_is_replaced_beneath_a_vm_that_was_started_past_its_gate(rig: Rig, injector: Injector) -> None:
    """As `virsh create FILE` does: with a definition of its own, whatever libvirt keeps."""
    snapshot, definition_of_it = rig.snapshot(), _true_definition(rig.vm)
    rig.off()
    path = _written_later(rig.vm)
    name = _killed_before_the_first_disk(rig, injector, snapshot)
    rig.vm.connection().createXML(definition_of_it)
    before = _files(rig.vm)
    rig.stack.start_operator()
    _waits_for(rig.stack, name, "VMRunning")
    assert _files(rig.vm) == before
    assert gated(rig.vm)
    rig.vm.destroy()
    rig.stack.wait_restore(name)
    assert not path.read_bytes().startswith(b"later"), "set back once it was off"


def test_no_disk_is_replaced_beneath_a_vm_that_runs_from_a_second_definition(
    rig: Rig, injector: Injector, lab: Lab
) -> None:
    """Not forwards, nor, once the snapshot's record is lost, back."""
    snapshot, definition_of_it = rig.snapshot(), _true_definition(rig.vm)
    rig.off()
    path = _written_later(rig.vm)
    first, second = lab.host, lab.second_host()
    try:
        rig.stack.spread([first, second])
        name = _killed_before_the_first_disk(rig, injector, snapshot, safetySnapshot=True)
        before = _files(rig.vm)
        with second.connection() as connection:
            domain = connection.defineXML(definition_of_it)
            try:
                domain.create()
                rig.stack.start_operator()
                _waits_for(rig.stack, name, "DomainAmbiguous")
                content = rig.stack.content(snapshot)
                assert content is not None
                lab.kubectl("delete", CONTENTS, content["metadata"]["name"])
                _waits_for(rig.stack, name, "DomainAmbiguous")
                domain.destroy()
                _waits_for(rig.stack, name, "DomainAmbiguous")
                assert _files(rig.vm) == before
            finally:
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
                domain.undefine()
        assert "not Ready" in refused(rig.stack, name, "SnapshotNotReady")
        assert not gated(rig.vm)
        assert conditions(rig.stack.get_restore(name) or {})["VolumesRestored"]["reason"] == "WentBack"
        assert path.read_bytes().startswith(b"later"), "as it was before the restore"
    finally:
        rig.stack.spread([first])
        lab.end_second_host()


@pytest.mark.parametrize("started", [True, False])
def test_a_vm_that_is_defined_anew_while_it_is_set_back(rig: Rig, injector: Injector, started: bool) -> None:
    """Off, it is gated again and set back; one that runs is left alone, and nobody says that nothing was changed."""
    snapshot, definition_of_it = rig.snapshot(), _true_definition(rig.vm)
    rig.off()
    path = _written_later(rig.vm)
    name = _killed_before_the_first_disk(rig, injector, snapshot, safetySnapshot=True)
    rig.vm.connection().defineXML(definition_of_it)
    if started:
        rig.vm.domain().create()
    before = _files(rig.vm)
    rig.stack.start_operator()
    if not started:
        rig.stack.wait_restore(name)
        assert not path.read_bytes().startswith(b"later")
        return
    assert f'VMSnapshot "{rig.snapshots[-1]}" with spec.safetySnapshot: false' in refused(rig.stack, name, "HalfDone")
    assert conditions(rig.stack.get_restore(name) or {})["VolumesRestored"]["reason"] == "HalfDone"
    assert _files(rig.vm) == before
    rig.off()
    rig.stack.wait_restore(rig.restore(rig.snapshots[-1]))
    assert path.read_bytes().startswith(b"later"), "as it was before the restore"
