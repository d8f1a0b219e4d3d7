"""The conditions of a VMSnapshot, from what is on record and what is under way. Not their times (the writer adds those)."""

from __future__ import annotations

from vmsnapshot_operator.core.effects import Condition, Failure, Observation, Record
from vmsnapshot_operator.core.evidence import WindowOutcome
from vmsnapshot_operator.core.planning import Method, Policy, Refusal
from vmsnapshot_operator.plan import verdict

PLANNED = "Planned"
QUIESCED = "Quiesced"
VOLUMES_SNAPSHOTTED = "VolumesSnapshotted"
UNQUIESCED = "Unquiesced"
READY = "Ready"
DEGRADED = "Degraded"
RECONCILING = "Reconciling"
STALLED = "Stalled"

_NOT_YET = "NotYet"


def _unknown(kind: str, reason: str = _NOT_YET, message: str = "") -> Condition:
    return Condition(type=kind, status=None, reason=reason, message=message)


def _progress(reconciling: bool, reason: str, message: str = "") -> tuple[Condition, Condition]:
    return (
        Condition(type=RECONCILING, status=reconciling, reason=reason, message=message),
        Condition(type=STALLED, status=False, reason="NotStalled"),
    )


def _planned(seen: Observation) -> Condition:
    plan = seen.record.plan if seen.record is not None else seen.plan
    if plan is None:
        return _unknown(PLANNED)
    groups = ", ".join(f"{len(g.volumes)} by {g.driver}" for g in plan.groups)
    volumes = (
        f"{len(plan.disks)} disks{' and the variables of the firmware' if len(plan.disks) < len(plan.volumes) else ''}"
    )
    message = "; ".join((f"{volumes} ({groups}), quiesce {plan.quiesce.method}", *plan.notes))
    return Condition(type=PLANNED, status=True, reason="Planned", message=message)


def _of_window(seen: Observation, record: Record | None) -> tuple[Condition, Condition, Condition]:
    """Quiesced, VolumesSnapshotted, Unquiesced: from the recorded window only, never from hope."""
    outcome = record.outcome if record is not None else None
    if record is None or outcome is None:
        # While a journal is there, nobody has confirmed yet that the guest is free.
        free = (
            _unknown(UNQUIESCED, "Recovering", "the VM is being freed")
            if seen.journal is not None
            else _unknown(UNQUIESCED)
        )
        return _unknown(QUIESCED), _unknown(VOLUMES_SNAPSHOTTED), free
    return _quiesced(seen, outcome), _snapshotted(record, outcome), _unquiesced(outcome)


def _quiesced(seen: Observation, outcome: WindowOutcome) -> Condition:
    evidence = outcome.evidence
    still = evidence.still_from is not None
    if evidence.method == Method.NONE:
        if seen.request.policy is Policy.NEVER and not still:
            return Condition(type=QUIESCED, status=False, reason="NotRequested", message="policy Never")
        return Condition(
            type=QUIESCED, status=still, reason="StoodStill" if still else "NotStill", message="nothing had to be held"
        )
    if not still:
        return _never_still(outcome)
    if evidence.method == Method.GUEST_AGENT:
        message = f"{evidence.frozen} file systems frozen"
        return Condition(type=QUIESCED, status=True, reason="Frozen", message=message)
    if evidence.method == Method.HYPERVISOR_SNAPSHOT:
        frozen = f"{evidence.frozen} file systems frozen around the switch" if evidence.frozen else "nothing was frozen"
        message = f"{len(seen.record.plan.disks) if seen.record is not None else 0} disks on overlays; {frozen}"
        return Condition(type=QUIESCED, status=True, reason="Switched", message=message)
    return Condition(type=QUIESCED, status=True, reason="Paused" if evidence.method == Method.PAUSE else "Held")


_WAY_FAILED = {
    str(Method.GUEST_AGENT): "FreezeFailed",
    str(Method.HYPERVISOR_SNAPSHOT): "SwitchFailed",
    str(Method.PAUSE): "PauseFailed",
}


def _never_still(outcome: WindowOutcome) -> Condition:
    """It was to be held: either it never came to that, or it was asked to stand still and did not."""
    evidence = outcome.evidence
    if evidence.frozen_time is None:
        return Condition(type=QUIESCED, status=False, reason="NotStarted", message=outcome.message)
    failed = outcome.reason if outcome.reason == "FreezeFailed" else _WAY_FAILED.get(evidence.method, "NotStill")
    return Condition(type=QUIESCED, status=False, reason=failed, message="; ".join(evidence.notes) or outcome.message)


def _snapshotted(record: Record, outcome: WindowOutcome) -> Condition:
    if not outcome.ok:
        return Condition(
            type=VOLUMES_SNAPSHOTTED, status=False, reason=outcome.reason or "CutFailed", message=outcome.message
        )
    groups = ", ".join(
        f"{g.class_name} {g.cut_milliseconds} ms" for g in record.groups.values() if g.cut_milliseconds is not None
    )
    return Condition(type=VOLUMES_SNAPSHOTTED, status=True, reason="Snapshotted", message=groups)


def _unquiesced(outcome: WindowOutcome) -> Condition:
    if not outcome.free:
        return _unknown(UNQUIESCED, "NotConfirmed", "nobody has confirmed yet that the VM is free")
    method = outcome.evidence.method
    if method == Method.GUEST_AGENT:
        message = f"{outcome.evidence.thawed} file systems thawed after {outcome.evidence.frozen_milliseconds} ms"
        return Condition(type=UNQUIESCED, status=True, reason="Thawed", message=message)
    if method == Method.HYPERVISOR_SNAPSHOT and outcome.evidence.frozen:
        message = f"{outcome.evidence.thawed} file systems thawed after {outcome.evidence.frozen_milliseconds} ms"
        return Condition(type=UNQUIESCED, status=True, reason="Thawed", message=message)
    reason = {str(Method.PAUSE): "Resumed", str(Method.NONE): "NothingHeld"}.get(method, "LetGo")
    return Condition(type=UNQUIESCED, status=True, reason=reason)


def _freed(record: Record) -> Condition:
    """Whether the VM of a snapshot that failed goes on. Without a journal in it nobody goes on with freeing it."""
    outcome = record.outcome
    if outcome is None:
        return Condition(type=UNQUIESCED, status=True, reason="Free", message="no journal of it is in its VM")
    if outcome.free:
        return Condition(type=UNQUIESCED, status=True, reason="Free", message="the VM is confirmed free")
    return _unknown(
        UNQUIESCED,
        "FreeUnknown",
        "nobody has confirmed that the VM is free, and its journal is gone, so nobody tries any more: look at the VM",
    )


def in_progress(seen: Observation, reason: str, message: str = "") -> tuple[Condition, ...]:
    """Something is under way."""
    return (
        _planned(seen),
        *_of_window(seen, seen.record),
        _unknown(READY, _NOT_YET) if not seen.deleting else Condition(type=READY, status=False, reason="Deleting"),
        *_progress(True, reason, message),
    )


def waiting(seen: Observation, refusal: Refusal) -> tuple[Condition, ...]:
    """It cannot begin as things are; that may change on its own."""
    return (
        Condition(type=PLANNED, status=False, reason=refusal.reason, message=refusal.message),
        *_of_window(seen, seen.record),
        _unknown(READY),
        *_progress(True, refusal.reason, refusal.message),
    )


def refused(seen: Observation, failure: Failure) -> tuple[Condition, ...]:
    """It was refused, for good, before anything was touched."""
    nothing = "nothing was touched"
    return (
        Condition(type=PLANNED, status=False, reason=failure.reason, message=failure.message),
        Condition(type=QUIESCED, status=False, reason="NotStarted", message=nothing),
        Condition(type=VOLUMES_SNAPSHOTTED, status=False, reason="NotStarted", message=nothing),
        Condition(type=UNQUIESCED, status=True, reason="NothingHeld", message=nothing),
        *(
            []
            if seen.request.dry_run
            else [Condition(type=READY, status=False, reason=failure.reason, message=failure.message)]
        ),
        Condition(type=RECONCILING, status=False, reason="Stalled"),
        Condition(type=STALLED, status=True, reason=failure.reason, message=failure.message),
    )


def dry_run(seen: Observation) -> tuple[Condition, ...]:
    """Planned and left so. There is no Ready condition: it never will be, and waiting for it would never end."""
    return (_planned(seen), *_progress(False, "DryRun", "spec.dryRun: planned only, nothing is done"))


def failed(
    seen: Observation, record: Record, failure: Failure, under_way: str = "", message: str = ""
) -> tuple[Condition, ...]:
    """It failed for good. What is left on storage is removed meanwhile."""
    quiesced, _, _ = _of_window(seen, record)
    leftover = "; ".join(f'class "{c}" cannot be asked: {m}' for c, m in sorted(seen.unlisted.items()))
    if under_way:
        progress = (
            Condition(type=RECONCILING, status=True, reason=under_way, message=message or leftover or seen.trouble),
            Condition(type=STALLED, status=False, reason="NotStalled"),
        )
    else:
        progress = (
            Condition(type=RECONCILING, status=False, reason="Stalled", message=leftover),
            Condition(type=STALLED, status=True, reason=failure.reason, message=failure.message),
        )
    return (
        _planned(seen),
        quiesced if record.outcome is not None else Condition(type=QUIESCED, status=False, reason=failure.reason),
        Condition(type=VOLUMES_SNAPSHOTTED, status=False, reason=failure.reason, message=failure.message),
        _freed(record),
        Condition(type=READY, status=False, reason=failure.reason, message=failure.message),
        *progress,
    )


def lost(seen: Observation) -> tuple[Condition, ...]:
    """It was taken, and what was on record of it is gone: nothing can be claimed or restored any more."""
    reason = "ContentLost"
    message = (
        f'VMSnapshotContent "{seen.lost.get("contentName", "")}" is gone (deleted by hand, or not restored from a backup): nothing says any more what'
        " the storage systems hold of it, so it cannot be restored. Restore that object from a backup; or delete this"
        " VMSnapshot: what the storage systems still hold under its names is removed then"
    )
    return (
        # Nobody looks for a journal of it but the sweep, which frees the VM and brings it back onto its own disks.
        *(_unknown(kind, reason) for kind in (PLANNED, QUIESCED, VOLUMES_SNAPSHOTTED, UNQUIESCED)),
        Condition(type=READY, status=False, reason=reason, message=message),
        Condition(type=RECONCILING, status=False, reason="Stalled"),
        Condition(type=STALLED, status=True, reason=reason, message=message),
    )


def ready(seen: Observation, record: Record, under_way: str = "", message: str = "") -> tuple[Condition, ...]:
    """It can be restored; something about the VM may still be under way."""
    word = verdict.overall(record.verdicts).word
    return (
        _planned(seen),
        *_of_window(seen, record),
        Condition(type=READY, status=True, reason="Ready", message=f"consistency {word}"),
        *(
            [Condition(type=DEGRADED, status=True, reason="SnapshotLost", message=seen.degraded)]
            if seen.degraded
            else []
        ),
        *(_progress(True, under_way, message) if under_way else _progress(False, "Ready")),
    )
