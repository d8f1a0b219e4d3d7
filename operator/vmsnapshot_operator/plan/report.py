"""The status of a VMSnapshot beside its conditions: what was chosen, why, what happened. Pure; times come with the facts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from vmsnapshot_operator.core.effects import Condition, Observation, Record
from vmsnapshot_operator.core.planning import Plan
from vmsnapshot_operator.plan import verdict
from vmsnapshot_operator.plan.conditions import READY, RECONCILING, STALLED

MESSAGE_LIMIT = 1024
"""Characters of a text in status: long enough for a list of disks, short enough for a table."""


def clip(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Shorten a text to what the schema allows."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def stamp(moment: datetime | None) -> str | None:
    """Write a moment as Kubernetes does, in UTC with microseconds."""
    return None if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def phase(seen: Observation, conditions: tuple[Condition, ...]) -> str:
    """One word for people, derived from the conditions; never read by code."""
    by_type = {c.type: c for c in conditions}
    if seen.deleting:
        return "Deleting"
    if (stalled := by_type.get(STALLED)) is not None and stalled.status:
        return "Failed"
    if (ready := by_type.get(READY)) is not None and ready.status:
        return "Ready"
    if seen.request.dry_run and (reconciling := by_type.get(RECONCILING)) is not None and reconciling.status is False:
        return "Planned"
    return by_type[RECONCILING].reason if RECONCILING in by_type else "Unknown"


def under_way(copied: Mapping[str, tuple[int, int]], committed: Mapping[str, tuple[int, int]]) -> str:
    """Say how far copies (by class) and commits (by disk) are, or nothing."""
    words = [f'class "{c}": {_of(done, total)} copied' for c, (done, total) in sorted(copied.items())]
    words += [f"disk {t}: {_of(done, total)} committed" for t, (done, total) in sorted(committed.items())]
    return clip("; ".join(words))


def _of(done: int, total: int) -> str:
    return f"{done >> 20} of {max(1, total >> 20)} MiB"


def status(seen: Observation, conditions: tuple[Condition, ...]) -> dict[str, Any]:
    """Return the whole status but for `conditions` and `observedGeneration`; empty parts are left out."""
    record = seen.record if seen.record is not None and not seen.record.problem else None
    plan = record.plan if record is not None else seen.plan
    stalled = next((c for c in conditions if c.type == STALLED and c.status), None)
    parts: dict[str, Any] = {
        **seen.lost,
        "phase": phase(seen, conditions),
        "contentName": record.name if record is not None else seen.lost.get("contentName"),
        "consistency": verdict.overall(record.verdicts).word if record is not None and record.taken else None,
        "error": {"reason": stalled.reason, "message": clip(stalled.message)} if stalled is not None else None,
        "leftovers": _leftovers(seen) or None,
    }
    if plan is not None:
        parts |= _of_plan(plan) | {"quiesce": _quiesce(plan, record)}
        parts["volumes"] = [_volume(plan, record, i) for i in range(len(plan.volumes))]
        parts["groups"] = [_group(plan, record, g.class_name, seen.copied) for g in plan.groups]
    if record is not None and record.outcome is not None and record.taken:
        parts["creationTime"] = stamp(record.outcome.cut_time)
    return {k: v for k, v in parts.items() if v is not None}


def _of_plan(plan: Plan) -> dict[str, Any]:
    return {
        "vm": {"name": plan.vm_name, "uuid": plan.vm_uuid, "powerState": plan.power},
        "strategy": {"name": plan.strategy, "reason": clip(plan.strategy_reason)},
        "excluded": [{"name": e.name, "rule": e.rule, "message": clip(e.message)} for e in plan.excluded] or None,
    }


def _quiesce(plan: Plan, record: Record | None) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "method": plan.quiesce.method,
        "reason": clip(plan.quiesce.reason),
        "budgetSeconds": round(plan.quiesce.budget),
        "attempts": record.attempt if record is not None else None,
    }
    if record is not None and record.outcome is not None and plan.quiesce.holds_vm:
        evidence = record.outcome.evidence
        parts |= {
            "frozenTime": stamp(evidence.frozen_time),
            "thawedTime": stamp(evidence.thawed_time),
            "frozenMilliseconds": evidence.frozen_milliseconds,
            "filesystemsFrozen": evidence.frozen,
            "filesystemsThawed": evidence.thawed,
        }
    return {k: v for k, v in parts.items() if v is not None}


def _volume(plan: Plan, record: Record | None, index: int) -> dict[str, Any]:
    planned = plan.volumes[index]
    parts: dict[str, Any] = {
        "target": planned.target,
        "className": planned.class_name,
        "reason": clip(planned.reason),
        "sizeBytes": planned.volume.size_bytes,
    }
    if record is not None and record.taken and planned.volume.id in record.verdicts:
        found = record.verdicts[planned.volume.id]
        parts |= {"consistency": found.consistency.word, "consistencyReason": clip(found.why)}
    return parts


def _group(plan: Plan, record: Record | None, class_name: str, copied: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    planned = next(g for g in plan.groups if g.class_name == class_name)
    parts: dict[str, Any] = {"className": class_name, "driver": planned.driver, "volumes": len(planned.volumes)}
    kept = record.groups.get(class_name) if record is not None else None
    if record is not None and kept is not None and kept.result is not None:
        parts |= {
            "atomic": kept.result.atomic,
            "cutMilliseconds": kept.cut_milliseconds,
            "readyTime": stamp(record.ready_time),
        }
        if record.outcome is not None and (outcome := record.outcome.groups.get(class_name)) is not None:
            parts["message"] = clip(outcome.message) or None
    if class_name in copied:
        done, total = copied[class_name]
        parts |= {"copiedBytes": done, "bytesToCopy": total}
    return {k: v for k, v in parts.items() if v is not None}


def _leftovers(seen: Observation) -> list[dict[str, str]]:
    """What is still on storage although it should not be, or cannot be asked for."""
    wanted = set()
    if seen.record is not None and seen.record.taken and not seen.deleting:
        wanted = {g.request.name for g in seen.record.groups.values()}
    held = [
        {"className": c, "name": n, "message": clip(seen.trouble)}
        for c, found in sorted((seen.held or {}).items())
        for n in sorted(found - wanted)
    ]
    silent = [{"className": c, "name": "", "message": clip(m)} for c, m in sorted(seen.unlisted.items())]
    return held + silent
