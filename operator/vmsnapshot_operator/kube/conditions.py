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
    """Tell whether a status brings any news.

    The order of conditions is none. What is only in `old` counts unless it is empty: the API server fills in empty defaults.
    """
    return not _says_the_same(_by_type(old), _by_type(new))


def _by_type(status: Mapping[str, Any]) -> dict[str, Any]:
    return {**status, "conditions": {str(c.get("type")): c for c in status.get("conditions") or ()}}


def _says_the_same(old: Any, new: Any) -> bool:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return all(_says_the_same(old.get(k), v) for k, v in new.items()) and not any(
            v for k, v in old.items() if k not in new
        )
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(_says_the_same(o, n) for o, n in zip(old, new, strict=True))
    return bool(old == new)
