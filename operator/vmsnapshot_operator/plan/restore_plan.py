"""What a restore would do, or why it cannot be done as things are. Pure; everything is checked before anything is touched.

Not what the drivers answer (asked for the volumes of `candidates`), nor what is done in which order (`next_restore`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vmsnapshot_operator.core.driver import Fit
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.machine import Disk, Machine, PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Patience, PlannedVolume, Refusal
from vmsnapshot_operator.core.restoring import RestoreGroup, RestorePlan, RestoreRequest
from vmsnapshot_operator.core.volumes import NVRAM, Layer, SourceKind, Volume, volume_id
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.plan import definition, fingerprints, new_definition


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotSeen:
    """The VMSnapshot to go back to, and what is on record of it; `body` is None if there is none of that name."""

    body: Mapping[str, Any] | None
    record: Record | None = None


def refuse_snapshot(request: RestoreRequest, seen: SnapshotSeen) -> Refusal | None:
    """Why this snapshot cannot be gone back to, or None."""
    body, name = seen.body, request.snapshot
    if body is None:
        message = f'there is no VMSnapshot "{name}" in namespace "{request.namespace}"; a restore takes those of its own namespace only'
        return Refusal(reason="SnapshotNotFound", message=message)
    uid = str(body["metadata"].get("uid", ""))
    if request.snapshot_uid and uid != request.snapshot_uid:
        message = f'VMSnapshot "{name}" has the UID {uid}, not {request.snapshot_uid} (spec.snapshotUID): it is another one of that name'
        return Refusal(reason="SnapshotUIDMismatch", message=message)
    if body["metadata"].get("deletionTimestamp"):
        return Refusal(reason="SnapshotDeleting", message=f'VMSnapshot "{name}" is being deleted')
    conditions = {c.get("type"): c for c in (body.get("status") or {}).get("conditions") or ()}
    if (conditions.get("Degraded") or {}).get("status") == "True":
        message = f'VMSnapshot "{name}" is Degraded: {conditions["Degraded"].get("message", "")}'
        return Refusal(reason="SnapshotDegraded", message=message)
    record = seen.record
    if record is not None and record.problem:
        return Refusal(reason="ContentNotBound", message=record.problem)
    if record is not None and record.failure is not None:
        return Refusal(reason="SnapshotNotReady", message=f'VMSnapshot "{name}" failed: {record.failure.message}')
    if record is None or not record.taken or not record.ready:
        stalled = (conditions.get("Stalled") or {}).get("status") == "True"
        patience = Patience.SETTLE if stalled else Patience.WAIT
        return Refusal(reason="SnapshotNotReady", message=f'VMSnapshot "{name}" is not Ready', patience=patience)
    return None


def wanted(request: RestoreRequest, record: Record) -> tuple[PlannedVolume, ...] | Refusal:
    """Return the volumes of the snapshot that are to be restored."""
    targets = [v.target for v in record.plan.volumes]
    if missing := [t for t in request.include if t not in targets]:
        message = f"spec.volumes.include names {', '.join(missing)}, which the snapshot does not have; it has {', '.join(targets)}"
        return Refusal(reason="IncludedTargetNotFound", message=message)
    return tuple(v for v in record.plan.volumes if not request.include or v.target in request.include)


def refuse_vm(request: RestoreRequest, machine: Machine, *, gated: bool) -> Refusal | None:
    """Why the disks of this VM cannot be set back now, whatever they are; or None. `gated`: this restore has begun already."""
    if machine.journal is not None or machine.journal_error:
        message = (
            "a snapshot of this VM is being taken, or its overlays are not committed yet; waiting until that has ended"
        )
        return Refusal(reason="VMBusy", message=message, patience=Patience.WAIT)
    if machine.copied_into is not None:
        message = "the hypervisor is copying disks of the VM for a snapshot or another program, which ends with the VM; waiting until it is done"
        return Refusal(reason="BackupRunning", message=message, patience=Patience.WAIT)
    if machine.migrating:
        return Refusal(reason="VMMigrating", message="the VM is between two hosts", patience=Patience.WAIT)
    if not machine.persistent:
        return Refusal(
            reason="VMTransient",
            message="the domain is transient: nothing of it would be left when it is off; use mode NewVM",
        )
    if machine.power is not PowerState.SHUT_OFF and not request.stop_running and not gated:
        message = f"the VM is {machine.power}: its disks can be set back only while it is off; shut it down, or set spec.runningVM to Stop"
        return Refusal(reason="VMRunning", message=message)
    return None


def onto(volumes: Sequence[PlannedVolume], disks: Sequence[Disk]) -> Mapping[str, Volume] | Refusal:
    """Return the disks that bear these volumes now, by target of the snapshot; refuse unless each is what it was.

    Only the same writable layer is set back, whatever target it is plugged at, over the same layers beneath, of the same size.
    """
    found: dict[str, Volume] = {}
    problems = []
    present = {volume_id(d.layers[0]): d for d in disks if d.layers}
    for planned in volumes:
        volume, disk = planned.volume, present.get(planned.volume.id)
        if disk is None:
            problems.append(_elsewhere(planned, disks))
        elif disk.size_bytes and volume.size_bytes and disk.size_bytes != volume.size_bytes and volume.is_nvram:
            problems.append(
                f"the variables of the firmware have {disk.size_bytes} bytes now, and had {volume.size_bytes}: they are those of"
                " another firmware; leave them out by naming the disks in spec.volumes.include"
            )
        elif disk.size_bytes and volume.size_bytes and disk.size_bytes != volume.size_bytes:
            problems.append(
                f"disk {planned.target} has {disk.size_bytes} bytes now, and had {volume.size_bytes}: resize it back"
            )
        elif [layer.source for layer in disk.layers[1:]] != [layer.source for layer in volume.backing]:
            problems.append(f"disk {planned.target} lies on other layers than when it was snapshotted")
        elif changed := fingerprints.changed(volume.backing, disk.layers[1:]):
            problems.append(
                f"disk {planned.target} lies on {', '.join(changed)}, which was written to since it was snapshotted"
            )
        else:
            found[planned.target] = replace(volume, label=disk.target, writable=disk.layers[0])
    if problems:
        return Refusal(reason="DisksChanged", message=f"{'; '.join(problems)}; or use mode NewVM")
    return found


def _elsewhere(planned: PlannedVolume, disks: Sequence[Disk]) -> str:
    source = planned.volume.writable.source
    there = next((d for d in disks if d.target == planned.target and d.layers), None)
    if there is None:
        return f"the VM has no disk {planned.target} any more, which was {source}"
    if any(layer.source == source for layer in there.layers):
        return f"disk {planned.target} writes to {there.layers[0].source} now, a layer over {source}: commit it first"
    return f"disk {planned.target} is {there.layers[0].source} now, and was {source}"


def make(record: Record, volumes: Sequence[PlannedVolume], bear: Mapping[str, Volume]) -> RestorePlan:
    """Return the plan: the groups as they were cut, each with the volumes that are wanted."""
    groups = []
    for name, group in record.groups.items():
        mine = [v for v in volumes if v.class_name == name]
        if group.result is not None and mine:
            chosen = tuple(bear.get(v.target, v.volume) for v in mine)
            groups.append(RestoreGroup(class_name=name, cut=group.result, onto=chosen))
    disks = record.plan.disks
    return RestorePlan(
        groups=tuple(groups),
        targets=tuple(v.target for v in volumes),
        gate=tuple(v.target for v in disks if v in volumes) or tuple(v.target for v in disks),
        notes=notes(record, volumes, in_place=bool(bear)),
    )


def notes(record: Record, volumes: Sequence[PlannedVolume], *, in_place: bool) -> tuple[str, ...]:
    """Return what becomes of what is not restored, in words for the user."""
    left = [v.target for v in record.plan.disks if v not in volumes]
    found = [f"disk {', '.join(left)} stays as it is, which is of another moment"] if left and in_place else []
    held = any(v.volume.is_nvram for v in record.plan.volumes)
    there = held or any(e.name == NVRAM for e in record.plan.excluded)
    if there and not any(v.volume.is_nvram for v in volumes):
        what = "stay as they are" if in_place else "begin anew"
        why = "they are not asked for" if held else "the snapshot does not hold them"
        found.append(f"the variables of the firmware ({NVRAM}: boot entries, keys) {what}: {why}")
    return tuple(found)


def targets_now(plan: RestorePlan, record: Record) -> tuple[str, ...]:
    """Return where the disks of the gate are plugged now, which may be another target than at the snapshot."""
    now = {v.id: v.label for g in plan.groups for v in g.onto}
    then = {v.target: v.volume.id for v in record.plan.volumes}
    return tuple(now.get(then[t], t) for t in plan.gate)


def refuse_gate(text: str, gate: Gate) -> Refusal | None:
    """Why this gate could not be closed in the definition that the VM's next start takes, or None."""
    try:
        definition.gated(text, gate)
    except RefusedError as error:
        return Refusal(reason=error.reason, message=error.message)
    return None


def refuse_new_vm(
    plan: RestorePlan, record: Record, identity: new_definition.Identity, marker: Marker
) -> Refusal | None:
    """Why no new VM could be defined from the one on record, whatever its clones will be, or None."""
    clones = {t: Layer(kind=SourceKind.FILE, source=f"/clone/{t}", format="raw") for t in plan.targets}
    try:
        new_definition.as_new_vm(record.plan.definition, identity, clones, marker)
    except RefusedError as error:
        return Refusal(reason=error.reason, message=error.message)
    return None


def refuse_revert(plan: RestorePlan, record: Record, *, safety: bool) -> Refusal | None:
    """Why these volumes cannot be set back whatever the storage says, or None. `safety`: a snapshot of them is taken first."""
    can = {g.class_name: g.capabilities for g in record.plan.groups}
    if unable := [g.class_name for g in plan.groups if not can[g.class_name].revert]:
        message = f"class {', '.join(unable)} cannot set disks back to what it has snapshotted; use mode NewVM"
        return Refusal(reason="RevertNotSupported", message=message)
    newest = [g.class_name for g in plan.groups if can[g.class_name].revert_newest_only]
    if newest and safety:
        message = (
            f"class {', '.join(newest)} can go back to the newest snapshot alone, and the safety snapshot would be a newer one:"
            " set spec.safetySnapshot to false, or use mode NewVM"
        )
        return Refusal(reason="NewerSnapshots", message=message)
    return None


def refuse_clone(plan: RestorePlan, record: Record) -> Refusal | None:
    """Why these volumes cannot be cloned whatever the storage says, or None."""
    if not any(v.target in plan.targets for v in record.plan.disks):
        message = "a new VM without any of the disks would be empty: name one in spec.volumes.include"
        return Refusal(reason="NoVolumes", message=message)
    can = {g.class_name for g in record.plan.groups if g.capabilities.clone}
    if unable := [g.class_name for g in plan.groups if g.class_name not in can]:
        message = f"class {', '.join(unable)} cannot clone what it has snapshotted; use mode InPlace"
        return Refusal(reason="CloneNotSupported", message=message)
    return None


def refuse_formats(known: Mapping[str, int], record: Record) -> Refusal | None:
    """Why a driver cannot read the handles on record, or None; `known`: the newest format that it reads, by class."""
    kept = {g.class_name: (g.driver, g.capabilities.handle_format) for g in record.plan.groups}
    problems = [
        f'class "{name}": the snapshot was cut by a newer driver {kept[name][0]} (handles of format {kept[name][1]}; this one reads'
        f" up to {newest})"
        for name, newest in known.items()
        if kept[name][1] > newest
    ]
    if not problems:
        return None
    return Refusal(reason="DriverTooOld", message=f"{'; '.join(problems)}; install that version or a later one")


def refuse_fits(answers: Mapping[str, Sequence[Fit]], plan: RestorePlan, *, power: PowerState) -> Refusal | None:
    """Why a driver cannot do it, or None; `answers` by class, one for each volume of the group in its order.

    That disks are in use says nothing while the VM is not off: it is what uses them.
    """
    problems, reasons = [], []
    for group in plan.groups:
        for volume, fit in zip(group.onto, answers.get(group.class_name, ()), strict=False):
            if not fit.ok and (fit.reason != "InUse" or power is PowerState.SHUT_OFF):
                problems.append(f'disk {volume.label} (class "{group.class_name}"): {fit.message or fit.reason}')
                reasons.append(fit.reason)
    if not problems:
        return None
    in_use = all(r == "InUse" for r in reasons)
    return Refusal(
        reason=reasons[0], message="; ".join(problems), patience=Patience.WAIT if in_use else Patience.SETTLE
    )
