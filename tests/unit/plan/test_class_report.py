"""What a class's status says beside its conditions."""

from __future__ import annotations

import pytest

from vmsnapshot_operator.plan import class_report
from vmsnapshot_operator.plan.orphans import Findings, Orphan


@pytest.mark.parametrize(
    ("seconds", "p50", "p95"),
    [
        ([0.0101], 11, 11),
        ([0.001, 0.002], 1, 2),
        ([n / 1000 for n in range(100, 0, -1)], 50, 95),
        ([0.001] * 19 + [5.0], 1, 1),
        ([0.001] * 18 + [5.0, 6.0], 1, 5000),
    ],
)
def test_percentiles_are_of_the_nearest_rank_in_milliseconds_rounded_up(
    seconds: list[float], p50: int, p95: int
) -> None:
    assert class_report.latency(seconds) == {"p50": p50, "p95": p95, "samples": len(seconds)}


def test_without_a_cut_nothing_is_claimed() -> None:
    assert class_report.latency([]) is None


def test_findings_name_what_is_left_and_no_more_than_fits() -> None:
    many = tuple(Orphan(name=f"vms-{n:04}", why="") for n in range(300))
    told = class_report.findings(Findings(held=310, orphans=(*many, Orphan(name="old", why="", removable=True))))
    assert (told["snapshotsHeld"], told["orphansFound"], len(told["orphans"])) == (310, 300, 256)
    assert "old" not in told["orphans"]
    assert class_report.findings(Findings(held=1)) == {"snapshotsHeld": 1, "orphans": None, "orphansFound": 0}
    long = class_report.findings(Findings(orphans=(Orphan(name="x" * 300, why=""),)))
    assert len(long["orphans"][0]) == 255
