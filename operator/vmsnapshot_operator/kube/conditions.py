"""Conditions as they are written: a decision gets its times, and only news is worth a write. Not what is decided (`plan`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from vmsnapshot_operator.core.effects import Condition
from vmsnapshot_operator.plan.report import clip

_WORDS = {True: "True", False: "False", None: "Unknown"}


def merge(
    old: Iterable[Mapping[str, Any]], decided: Iterable[Condition], generation: int, now: datetime
) -> list[dict[str, Any]]:
    """Return the decided conditions in their order, as Kubernetes writes them; those no longer decided are dropped.

    `lastTransitionTime` moves only when a condition's status flips; `generation` is what was observed.
    """
    before = {str(c.get("type")): c for c in old}
    moment = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    merged = []
    for condition in decided:
        status = _WORDS[condition.status]
        last = before.get(condition.type, {})
        same = last.get("status") == status and last.get("lastTransitionTime")
        merged.append(
            {
                "type": condition.type,
                "status": status,
                "observedGeneration": generation,
                "lastTransitionTime": str(last["lastTransitionTime"]) if same else moment,
                "reason": condition.reason,
                "message": clip(condition.message),
            }
        )
    return merged


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Tell whether a status brings any news. The order of conditions is none; absent and null are the same."""
    return _comparable(old) != _comparable(new)


def _comparable(status: Mapping[str, Any]) -> dict[str, Any]:
    found = {k: _without_nulls(v) for k, v in status.items() if v is not None}
    if "conditions" in found:
        found["conditions"] = sorted(found["conditions"], key=lambda c: str(c.get("type")))
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value
