"""The status of a StorageDriverClass beside its conditions: what its driver promises, what was measured, what was found. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vmsnapshot_operator.core.driver import Capabilities
from vmsnapshot_operator.plan.orphans import Findings
from vmsnapshot_operator.plan.report import clip

MOST_NAMED = 256
_LONGEST_NAME = 255


def capabilities(can: Capabilities) -> dict[str, Any]:
    """Return what a driver promises."""
    return {
        "cut": can.cut,
        "atomic": can.atomic,
        "revert": can.revert,
        "revertNewestOnly": can.revert_newest_only,
        "clone": can.clone,
        "incremental": can.incremental,
        "handleFormat": can.handle_format,
    }


def latency(seconds: Sequence[float]) -> dict[str, int] | None:
    """Return how long cuts took, in milliseconds rounded up; None if there was none. Percentiles are of the nearest rank."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def rank(percent: int) -> int:
        return math.ceil(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] * 1000)

    return {"p50": rank(50), "p95": rank(95), "samples": len(ordered)}


def findings(found: Findings) -> dict[str, Any]:
    """Return what the last scan of the storage found; what was removed is no orphan any more, and a VM's disk is none."""
    named = [clip(o.name, _LONGEST_NAME) for o in found.listed]
    return {
        "snapshotsHeld": found.held,
        "orphans": sorted(set(named))[:MOST_NAMED] or None,
        "orphansFound": len(found.listed),
    }
