"""What a restore is refused for, each with what was found and what to do; and that it goes onto nothing but what it was cut from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from tests.unit.plan.test_next_restore import request
from vmsnapshot_operator.core.driver import Fit
from vmsnapshot_operator.core.effects import Failure, Record
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Disk, PowerState
from vmsnapshot_operator.core.planning import Patience, PlannedVolume, Refusal
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan import restore_plan
from vmsnapshot_operator.plan.restore_plan import SnapshotSeen

RECORD = records.example()
VOLUMES = RECORD.plan.volumes


def body(*conditions: tuple[str, str, str], **metadata: Any) -> dict[str, Any]:
    """A VMSnapshot with these conditions: type, status, message."""
    told = [{"type": t, "status": s, "message": m} for t, s, m in conditions]
    return {"metadata": {"name": "snap", "uid": "s1", **metadata}, "status": {"conditions": told}}


def disks(**changes: Disk | None) -> list[Disk]:
    """The VM's disks as they were, but for these."""
    found = {v.target: Disk(target=v.target, layers=(v.volume.writable,), size_bytes=1) for v in VOLUMES}
    return [d for t in found if (d := changes.get(t, found[t])) is not None]


# --- the snapshot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "reason", "patience"),
    [
        (SnapshotSeen(body=None), "SnapshotNotFound", Patience.SETTLE),
        (SnapshotSeen(body=body(uid="s2"), record=RECORD), "SnapshotUIDMismatch", Patience.SETTLE),
        (SnapshotSeen(body=body(deletionTimestamp="2026-01-01"), record=RECORD), "SnapshotDeleting", Patience.SETTLE),
        (
            SnapshotSeen(body=body(("Degraded", "True", "ceph: gone")), record=RECORD),
            "SnapshotDegraded",
            Patience.SETTLE,
        ),
        (SnapshotSeen(body=body(), record=replace(RECORD, problem="forged")), "ContentNotBound", Patience.SETTLE),
        (
            SnapshotSeen(body=body(), record=replace(RECORD, failure=Failure(reason="Broke", message="it broke"))),
            "SnapshotNotReady",
            Patience.SETTLE,
        ),
        (SnapshotSeen(body=body(), record=None), "SnapshotNotReady", Patience.WAIT),
        (SnapshotSeen(body=body(("Stalled", "True", "no")), record=None), "SnapshotNotReady", Patience.SETTLE),
    ],
)
def test_a_snapshot_that_cannot_be_gone_back_to(seen: SnapshotSeen, reason: str, patience: Patience) -> None:
    found = restore_plan.refuse_snapshot(request(snapshot_uid="s1"), seen)
    assert found is not None
    assert (found.reason, found.patience) == (reason, patience)


def test_a_snapshot_that_is_ready_is_good() -> None:
    ready = replace(RECORD, ready=True)
    assert restore_plan.refuse_snapshot(request(), SnapshotSeen(body=body(), record=ready)) is None


def test_a_part_of_the_disks() -> None:
    found = restore_plan.wanted(request(include=("vdb",)), RECORD)
    assert not isinstance(found, Refusal)
    assert [v.target for v in found] == ["vdb"]
    missing = restore_plan.wanted(request(include=("vdb", "vdx")), RECORD)
    assert isinstance(missing, Refusal)
    assert missing.reason == "IncludedTargetNotFound"
    assert "vdx" in missing.message
    assert "vda, vdb, vdc" in missing.message


# --- the VM ---------------------------------------------------------------------------------------------------------------

JOURNAL = Journal(installation="abcdef", owner_uid="u", nonce="n", attempt=1, method="GuestAgent", budget=Seconds(30.0))


@pytest.mark.parametrize(
    ("changes", "reason", "patience"),
    [
        ({"journal": JOURNAL}, "VMBusy", Patience.WAIT),
        ({"journal_error": "of a newer version"}, "VMBusy", Patience.WAIT),
        ({"migrating": True}, "VMMigrating", Patience.WAIT),
        ({"persistent": False}, "VMTransient", Patience.SETTLE),
        ({"power": PowerState.RUNNING}, "VMRunning", Patience.SETTLE),
        ({"power": PowerState.PAUSED}, "VMRunning", Patience.SETTLE),
    ],
)
def test_a_vm_that_cannot_be_set_back_now(changes: dict[str, Any], reason: str, patience: Patience) -> None:
    machine = b.machine(**{"power": PowerState.SHUT_OFF, **changes})
    found = restore_plan.refuse_vm(request(stop_running=False), machine, gated=False)
    assert found is not None
    assert (found.reason, found.patience) == (reason, patience)


def test_a_vm_that_is_off_or_may_be_stopped_is_good() -> None:
    off = b.machine(power=PowerState.SHUT_OFF)
    assert restore_plan.refuse_vm(request(stop_running=False), off, gated=False) is None
    assert restore_plan.refuse_vm(request(stop_running=True), b.machine(), gated=False) is None


# --- the disks ------------------------------------------------------------------------------------------------------------


def _elsewhere(target: str) -> Disk:
    return Disk(target=target, layers=(b.file_layer("other"),), size_bytes=1)


def _over(planned: PlannedVolume) -> Disk:
    layers = (b.file_layer("overlay", format="qcow2"), planned.volume.writable)
    return Disk(target=planned.target, layers=layers, size_bytes=1)


def _on(planned: PlannedVolume) -> Disk:
    return Disk(target=planned.target, layers=(planned.volume.writable, b.file_layer("base")), size_bytes=1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (None, "no disk vdb any more"),
        (_elsewhere("vdb"), "disk vdb is /pool/other.raw now, and was /b"),
        (_over(VOLUMES[1]), "a layer over /b: commit it first"),
        (_on(VOLUMES[1]), "lies on other layers"),
        (replace(disks()[1], size_bytes=2), "has 2 bytes now, and had 1: resize it back"),
    ],
)
def test_a_disk_that_is_not_what_it_was(changed: Disk | None, words: str) -> None:
    found = restore_plan.onto(VOLUMES, disks(vdb=changed))
    assert isinstance(found, Refusal)
    assert found.reason == "DisksChanged"
    assert words in found.message
    assert "NewVM" in found.message


def test_all_disks_that_changed_are_named_at_once() -> None:
    found = restore_plan.onto(VOLUMES, disks(vda=None, vdc=_elsewhere("vdc")))
    assert isinstance(found, Refusal)
    assert "vda" in found.message
    assert "vdc" in found.message


def test_disks_that_were_added_or_plugged_elsewhere_do_no_harm() -> None:
    """What counts is the volume: another disk beside it stays as it is, and its own target may be another one."""
    moved = replace(disks()[1], target="vdz")
    found = restore_plan.onto(VOLUMES, [*disks(vdb=moved), _elsewhere("vdd")])
    assert not isinstance(found, Refusal)
    assert {t: v.id for t, v in found.items()} == {v.target: v.volume.id for v in VOLUMES}
    assert found["vdb"].label == "vdz", "the gate is closed for the target that it has now"


# --- the drivers ----------------------------------------------------------------------------------------------------------


def _plan(record: Record = RECORD, include: tuple[str, ...] = ()) -> restore_plan.RestorePlan:
    volumes = restore_plan.wanted(request(include=include), record)
    assert not isinstance(volumes, Refusal)
    return restore_plan.make(record, volumes, {})


def test_only_what_is_wanted_must_be_able_to_be_cloned() -> None:
    groups = tuple(
        replace(g, capabilities=replace(g.capabilities, clone=g.class_name == "slow")) for g in RECORD.plan.groups
    )
    record = replace(RECORD, plan=replace(RECORD.plan, groups=groups))
    found = restore_plan.refuse_clone(_plan(record), record)
    assert found is not None
    assert (found.reason, "fast" in found.message, "slow" in found.message) == ("CloneNotSupported", True, False)
    assert restore_plan.refuse_clone(_plan(record, include=("vdc",)), record) is None


def test_handles_of_a_later_format_are_not_guessed_at() -> None:
    groups = tuple(replace(g, capabilities=replace(g.capabilities, handle_format=2)) for g in RECORD.plan.groups)
    record = replace(RECORD, plan=replace(RECORD.plan, groups=groups))
    found = restore_plan.refuse_formats({"fast": 1, "slow": 2}, record)
    assert found is not None
    assert (found.reason, '"fast"' in found.message, '"slow"' in found.message) == ("DriverTooOld", True, False)
    assert restore_plan.refuse_formats({"fast": 3, "slow": 2}, record) is None


@pytest.mark.parametrize(
    ("reasons", "patience"),
    [(("InUse", "InUse"), Patience.WAIT), (("InUse", "SnapshotLost"), Patience.SETTLE)],
)
def test_each_volume_that_a_driver_refuses_is_named(reasons: tuple[str, str], patience: Patience) -> None:
    fits = tuple(Fit(ok=False, reason=r, message=f"because {r}") for r in reasons)
    found = restore_plan.refuse_fits({"fast": fits}, _plan(), power=PowerState.SHUT_OFF)
    assert found is not None
    assert found.patience is patience
    assert all(f"because {r}" in found.message for r in reasons)
    yes = Fit(ok=True, reason="Fits")
    assert restore_plan.refuse_fits({"fast": (yes, yes), "slow": (yes,)}, _plan(), power=PowerState.SHUT_OFF) is None
