"""The one form of all measurements, and how it is shown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.stack import ROOT

FOLDER = ROOT / "build" / "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement. `goal` is said in words; `met` is None where there is nothing to meet.

    `paired`: each of `ours` was taken beside one of `against`, of the same quantity; only then their ratio means something.
    """

    name: str
    unit: str
    ours: Sequence[float]
    against: Sequence[float] = ()
    ours_is: str = "ours"
    against_is: str = ""
    goal: str = ""
    met: bool | None = None
    paired: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Median of the ratios pair by pair, which a drifting machine does not disturb; None where there are no pairs."""
        pairs = [a / b for a, b in zip(self.ours, self.against, strict=False) if b] if self.paired else []
        return statistics.median(pairs) if pairs else None

    def judged(self, most: float) -> Result:
        """The same, met if the ratio is at most this; without any pair it is not met."""
        ratio = self.ratio
        return replace(self, met=ratio is not None and ratio <= most)

    def write(self) -> Path:
        """Write build/bench/NAME.json."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        path = FOLDER / f"{self.name}.json"
        ratio = self.ratio
        document = {
            "name": self.name,
            "unit": self.unit,
            "samples": {"ours": list(self.ours), "against": list(self.against)},
            "median": {"ours": _median(self.ours), "against": _median(self.against)},
            "medianRatio": None if ratio is None else round(ratio, 4),
            "goal": self.goal,
            "met": self.met,
            "details": dict(self.details),
        }
        path.write_text(json.dumps(document, indent=2) + "\n")
        return path


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "—"
    middle, least, most = (_short(x) for x in (statistics.median(values), min(values), max(values)))
    return f"{middle}  ({least}-{most}, n={len(values)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def table(results: Sequence[Result]) -> Table:
    """All results for a person: medians, in brackets the spread."""
    shown = Table(title="Measured here, now", title_justify="left")
    for column in ("measurement", "unit", "ours", "against", "ratio", "goal", "met"):
        shown.add_column(column)
    for r in results:
        met = {True: "yes", False: "NO", None: "—"}[r.met]
        ratio = "—" if r.ratio is None else f"{r.ratio:.2f}"
        shown.add_row(
            f"{r.name}\n[dim]{r.ours_is}[/dim]",
            r.unit,
            _spread(r.ours),
            f"{_spread(r.against)}\n[dim]{r.against_is}[/dim]",
            ratio,
            r.goal,
            met,
        )
    return shown
