"""The status of a VMRestore beside its conditions. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from vmsnapshot_operator.core.effects import Condition
from vmsnapshot_operator.core.restoring import Clone, CloseGate, RestoreDecision, RestoreSeen, Safety
from vmsnapshot_operator.plan.report import clip, stamp
from vmsnapshot_operator.plan.restore_conditions import READY, RECONCILING, STALLED


def status(seen: RestoreSeen, decision: RestoreDecision, old: dict[str, Any], now: datetime) -> dict[str, Any]:
    """Return the whole status but for `conditions` and `observedGeneration`. `old` is what was told before: times stay.

    `startTime` is told before the first change is made: without it, and where nobody can look any more, nothing was changed.
    """
    by_type = {c.type: c for c in decision.conditions}
    stalled = by_type[STALLED] if by_type.get(STALLED) is not None and by_type[STALLED].status else None
    ready = by_type.get(READY)
    ended = stalled is not None or (ready is not None and ready.status is True)
    begun = seen.gated or seen.is_done or isinstance(decision.effect, CloseGate | Clone)
    if seen.ended and old.get("phase"):
        return {k: v for k, v in old.items() if k not in ("conditions", "observedGeneration")}
    parts: dict[str, Any] = {
        "phase": _phase(seen, by_type, stalled),
        "hypervisorName": seen.hypervisor or old.get("hypervisorName"),
        "vm": {"name": seen.vm_name, "uuid": seen.vm_uuid} if seen.vm_uuid else old.get("vm"),
        "volumes": _volumes(seen, old.get("volumes") or [], failed=stalled is not None) or None,
        "safetySnapshotName": seen.safety_name if seen.safety is not Safety.NONE else old.get("safetySnapshotName"),
        "startTime": old.get("startTime") or (stamp(now) if begun else None),
        "completionTime": old.get("completionTime") or (stamp(now) if ended else None),
        "error": {"reason": stalled.reason, "message": clip(stalled.message)} if stalled is not None else None,
    }
    return {k: v for k, v in parts.items() if v is not None}


def _phase(seen: RestoreSeen, by_type: dict[str, Condition], stalled: Condition | None) -> str:
    if seen.deleting:
        return "Deleting"
    if stalled is not None:
        return "Failed"
    if by_type[READY].status is True:
        return "Ready"
    return by_type[RECONCILING].reason


def _volumes(seen: RestoreSeen, old: list[dict[str, Any]], *, failed: bool) -> list[dict[str, Any]]:
    if seen.problem:
        return old
    named = {v.volume.id: v.target for v in seen.record.plan.volumes} if seen.record is not None else {}
    result, more = "Pending", {}
    if seen.is_done:
        result = "Restored" if seen.request.in_place else "Cloned"
    elif seen.half_done and failed:
        result, more = "Failed", {"message": "it may be neither old nor new"}
    elif seen.gated or seen.half_done:
        result = "Restoring"
    if seen.plan is None:  # it ended, or its snapshot is gone: the disks are those that were told before
        return [{**volume, "result": result, **more} for volume in old]
    return [
        {"target": named.get(v.id, v.label), "className": g.class_name, "result": result, **more}
        for g in seen.plan.groups
        for v in g.onto
    ]
