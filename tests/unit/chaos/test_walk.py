"""The walk over faults and steps, and what is written of a run. No laboratory."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos import cases, runner
from tests.chaos.cases import Way
from tests.chaos.faults import FAULTS
from tests.chaos.judge import Finding
from vmsnapshot_operator.core.steps import Step


def test_some_ways_alone() -> None:
    walk = cases.walk(200, 1, ways=[Way.CLONE, Way.OVERLAY])
    assert {c.way for c in walk} == {Way.CLONE, Way.OVERLAY}
    assert len(set(walk)) == 200, "no case twice before all were"


def test_every_fault_is_in_the_walk_and_every_step_has_a_way() -> None:
    walk = cases.walk(len(FAULTS), 1)
    assert {c.fault.name for c in walk} == {f.name for f in FAULTS}
    assert {c.step for c in cases.every()} == set(Step)
    assert cases.walk(60, 7) == cases.walk(60, 7), "a seed repeats a run"
    assert cases.walk(60, 7) != cases.walk(60, 8)
    assert all(cases.parse(c.name) == c for c in walk)
    assert {cases.instead(c) for c in cases.every()} <= set(cases.every()), "every fault can be met there"


def test_summary(tmp_path: Path) -> None:
    results = [
        runner.Result(
            case="deleted@Keep:after",
            number=n,
            reached=True,
            seconds=1.0,
            recovery_seconds=float(n),
            longest_freeze_milliseconds=100 * n,
            outcome="gone",
            findings=(Finding("leaked", "x", "y"),) if n == 2 else (),
        )
        for n in range(3)
    ]
    found = runner.write(results, 5, tmp_path / "chaos.json")
    assert json.loads((tmp_path / "chaos.json").read_text()) == found
    assert (found["injections"], found["leaked"], found["lied"], found["unbootable"]) == (3, 1, 0, 0)
    assert found["byWay"] == {"take": 3}
    assert found["recoverySeconds"]["max"] == 2.0
    assert found["longestFreezeMilliseconds"] == 200
    assert len((tmp_path / "chaos.jsonl").read_text().splitlines()) == 3
