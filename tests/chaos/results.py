"""What became of each injection, and what a run comes to: written down, and added up. Not how they are made (`runner`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.chaos.cases import WAYS
from tests.chaos.seen import Finding
from vmsnapshot_operator.core.steps import Step

KINDS = {"frozen": "leftFrozen", "leaked": "leaked", "lied": "lied", "stuck": "stuck", "unbootable": "unbootable"}
"""What the judge may find, and how it is counted: all have to stay 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one injection did. `recovery_seconds`: from the mending to the end of the snapshot, one way or the other."""

    case: str
    number: int
    reached: bool
    seconds: float
    recovery_seconds: float
    longest_freeze_milliseconds: int
    outcome: str
    findings: tuple[Finding, ...] = ()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the 99th percentile and the longest; 0 of nothing."""
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds, 0.0][:1] * 99
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": max(seconds, default=0.0)}


def _way(name: str) -> str:
    """On which way to its step a fault was injected; those of the fleet have none."""
    step = name.partition("@")[2].rpartition(":")[0]
    return str(WAYS[Step(step)]) if step in list(Step) else "fleet"


def summary(results: list[Result], seed: int) -> dict[str, Any]:
    """What `build/chaos.json` holds."""
    made = [r for r in results if r.reached]
    kinds = Counter(f.kind for r in results for f in r.findings)
    return {
        "injections": len(made),
        "byFault": dict(sorted(Counter(r.case.partition("@")[0] for r in made).items())),
        "byWay": dict(sorted(Counter(_way(r.case) for r in made).items())),
        **{name: kinds[kind] for kind, name in KINDS.items()},
        "recoverySeconds": percentiles([r.recovery_seconds for r in made]),
        "longestFreezeMilliseconds": max((r.longest_freeze_milliseconds for r in made), default=0),
        "seed": seed,
    }


def write(results: list[Result], seed: int, path: Path) -> dict[str, Any]:
    """Write the summary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = summary(results, seed)
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def append(result: Result, seed: int, path: Path) -> None:
    """Add one line for this injection to those of all runs (`tests.chaos.table` adds them up)."""
    line = {
        "seed": seed,
        "number": result.number,
        "case": result.case,
        "reached": result.reached,
        "outcome": result.outcome,
        "seconds": result.seconds,
        "recoverySeconds": result.recovery_seconds,
        "longestFreezeMilliseconds": result.longest_freeze_milliseconds,
        "findings": [{"kind": f.kind, "subject": f.subject, "what": f.what} for f in result.findings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(line) + "\n")
