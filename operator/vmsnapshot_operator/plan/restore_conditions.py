"""The conditions of a VMRestore, from what is so and what is under way. Not their times (the writer adds those)."""

from __future__ import annotations

from vmsnapshot_operator.core.effects import Condition, Failure
from vmsnapshot_operator.core.planning import Refusal
from vmsnapshot_operator.core.restoring import RestoreSeen, Safety
from vmsnapshot_operator.plan import restore_plan

PLANNED = "Planned"
SAFETY_SNAPSHOT_TAKEN = "SafetySnapshotTaken"
VOLUMES_RESTORED = "VolumesRestored"
VM_DEFINED = "VMDefined"
READY = "Ready"
RECONCILING = "Reconciling"
STALLED = "Stalled"

_NOT_YET = "NotYet"


def _unknown(kind: str, reason: str = _NOT_YET, message: str = "") -> Condition:
    return Condition(type=kind, status=None, reason=reason, message=message)


def _planned(seen: RestoreSeen) -> Condition:
    if seen.plan is None and not seen.gated and not seen.is_done:
        return _unknown(PLANNED)
    if seen.plan is None:
        return Condition(type=PLANNED, status=True, reason="Planned")
    groups = ", ".join(f"{len(g.onto)} by {g.class_name}" for g in seen.plan.groups)
    message = "; ".join((f"{', '.join(seen.plan.targets)} ({groups})", *seen.plan.notes))
    return Condition(type=PLANNED, status=True, reason="Planned", message=message)


def _safety(seen: RestoreSeen) -> Condition:
    if not seen.request.in_place or not seen.request.safety:
        return Condition(type=SAFETY_SNAPSHOT_TAKEN, status=False, reason="NotRequested")
    if seen.safety is Safety.READY:
        return Condition(
            type=SAFETY_SNAPSHOT_TAKEN, status=True, reason="Taken", message=f'VMSnapshot "{seen.safety_name}"'
        )
    if seen.safety is Safety.FAILED:
        return Condition(
            type=SAFETY_SNAPSHOT_TAKEN, status=False, reason="SafetySnapshotFailed", message=seen.safety_message
        )
    return _unknown(SAFETY_SNAPSHOT_TAKEN, message=seen.safety_message)


def _redefined(seen: RestoreSeen) -> str:
    if seen.overtaken_by:
        return f"somebody defined the VM anew meanwhile, and VMRestore {seen.overtaken_by} has had its disks since"
    return "somebody defined the VM anew meanwhile, so that it can be started"


def _volumes(seen: RestoreSeen) -> Condition:
    if seen.is_done:
        reason = "Restored" if seen.request.in_place else "Cloned"
        return Condition(type=VOLUMES_RESTORED, status=True, reason=reason)
    if seen.gated:
        message = "disks may be neither old nor new; the VM cannot be started until they are"
        return Condition(type=VOLUMES_RESTORED, status=False, reason="HalfDone", message=message)
    if seen.half_done:
        # Also where nobody can look: what was told once is not forgotten for that.
        message = "disks may be neither old nor new" + (f"; {_redefined(seen)}" if seen.power is not None else "")
        return Condition(type=VOLUMES_RESTORED, status=False, reason="HalfDone", message=message)
    if seen.went_back:
        message = f'all disks are what they were at the safety snapshot "{seen.safety_name}"'
        return Condition(type=VOLUMES_RESTORED, status=False, reason="WentBack", message=message)
    return _unknown(VOLUMES_RESTORED)


def _defined(seen: RestoreSeen) -> Condition:
    if seen.is_done:
        return Condition(type=VM_DEFINED, status=True, reason="Defined")
    if seen.gated:
        return Condition(type=VM_DEFINED, status=False, reason="Gated", message="its disks are taken from it meanwhile")
    if seen.half_done and seen.power is not None:
        return Condition(type=VM_DEFINED, status=False, reason="HalfDone", message=_redefined(seen))
    return _unknown(VM_DEFINED)


def _progress(reconciling: bool, reason: str, message: str = "") -> tuple[Condition, Condition]:
    return (
        Condition(type=RECONCILING, status=reconciling, reason=reason, message=message),
        Condition(type=STALLED, status=False, reason="NotStalled"),
    )


def in_progress(seen: RestoreSeen, reason: str, message: str = "") -> tuple[Condition, ...]:
    """Something is under way."""
    ready = Condition(type=READY, status=False, reason="Deleting") if seen.deleting else _unknown(READY)
    return (
        _planned(seen),
        _safety(seen),
        _volumes(seen),
        _defined(seen),
        ready,
        *_progress(True, reason, message or _bytes(seen)),
    )


def _bytes(seen: RestoreSeen) -> str:
    return "; ".join(f"{c}: {done} of {total} bytes" for c, (done, total) in sorted(seen.progress.items()))


def waiting(seen: RestoreSeen, refusal: Refusal) -> tuple[Condition, ...]:
    """It cannot begin as things are; that may change on its own."""
    return (
        Condition(type=PLANNED, status=False, reason=refusal.reason, message=refusal.message),
        _safety(seen),
        _volumes(seen),
        _defined(seen),
        _unknown(READY),
        *_progress(True, refusal.reason, refusal.message),
    )


def failed(seen: RestoreSeen, failure: Failure) -> tuple[Condition, ...]:
    """It failed for good; nothing is half done, unless VolumesRestored says so."""
    planned = _planned(seen)
    if planned.status is None:
        planned = Condition(type=PLANNED, status=False, reason=failure.reason, message=failure.message)
    parts = [
        c if c.status is not None else Condition(type=c.type, status=False, reason="NotStarted")
        for c in (_safety(seen), _volumes(seen), _defined(seen))
    ]
    return (
        planned,
        *parts,
        Condition(type=READY, status=False, reason=failure.reason, message=failure.message),
        Condition(type=RECONCILING, status=False, reason="Stalled"),
        Condition(type=STALLED, status=True, reason=failure.reason, message=failure.message),
    )


def _left(seen: RestoreSeen) -> tuple[str, ...]:
    """What was not restored stays said when all else is done."""
    if seen.record is None or isinstance(volumes := restore_plan.wanted(seen.request, seen.record), Refusal):
        return ()
    return restore_plan.notes(seen.record, volumes, in_place=seen.request.in_place)


def ready(seen: RestoreSeen) -> tuple[Condition, ...]:
    """It is done."""
    again = seen.done != seen.marker
    message = "it was done before, by a VMRestore of this name" if again else ""
    return (
        Condition(type=PLANNED, status=True, reason="Planned", message="" if again else "; ".join(_left(seen))),
        _safety(seen) if not again else Condition(type=SAFETY_SNAPSHOT_TAKEN, status=False, reason="NotRequested"),
        _volumes(seen),
        _defined(seen),
        Condition(type=READY, status=True, reason="AlreadyRestored" if again else "Ready", message=message),
        *_progress(False, "Ready"),
    )
