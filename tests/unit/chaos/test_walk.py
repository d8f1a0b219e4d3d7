"""The walk over faults and steps, and what is written of a run. No laboratory."""

from __future__ import annotations

import json
from pathlib import Path

from tests.chaos import cases, fleet, results, table
from tests.chaos.cases import Way
from tests.chaos.faults import FAULTS
from tests.chaos.judge import Finding
from vmsnapshot_operator.core.steps import Step


def test_some_ways_alone() -> None:
    walk = cases.walk(200, 1, ways=[Way.CLONE, Way.OVERLAY])
    assert {c.way for c in walk} == {Way.CLONE, Way.OVERLAY}
    for fault in {c.fault for c in walk}:
        chosen = [c for c in walk if c.fault is fault]
        there = [c for c in cases.every() if c.fault is fault and c.way in (Way.CLONE, Way.OVERLAY)]
        assert len(set(chosen)) == min(len(chosen), len(there)), "none of its cases twice before all were"


def test_every_fault_is_in_the_walk_and_every_step_has_a_way() -> None:
    walk = cases.walk(len(FAULTS), 1)
    assert {c.fault.name for c in walk} == {f.name for f in FAULTS}
    assert {c.step for c in cases.every()} == set(Step)
    assert cases.walk(60, 7) == cases.walk(60, 7), "a seed repeats a run"
    assert cases.walk(60, 7) != cases.walk(60, 8)
    assert all(cases.parse(c.name) == c for c in walk)
    assert {cases.instead(c) for c in cases.every()} <= set(cases.every()), "every fault can be met there"


def test_what_is_written_of_a_run_and_added_up(tmp_path: Path) -> None:
    made = [
        results.Result(
            case="deleted@Keep:after",
            number=n,
            reached=n < 3,
            seconds=1.0,
            recovery_seconds=float(n),
            longest_freeze_milliseconds=100 * n,
            outcome="gone",
            findings=(Finding("leaked", "x", "y"),) if n == 2 else (),
        )
        for n in range(4)
    ]
    found = results.write(made, 5, tmp_path / "chaos.json")
    assert json.loads((tmp_path / "chaos.json").read_text()) == found
    assert (found["injections"], found["leaked"], found["lied"], found["unbootable"]) == (3, 1, 0, 0)
    assert found["byWay"] == {"take": 3}
    assert found["recoverySeconds"] == {"p50": 1.0, "p99": 1.98, "max": 2.0}
    assert found["longestFreezeMilliseconds"] == 200

    for seed, file in ((5, "one"), (6, "two")):
        for result in made:
            results.append(result, seed, tmp_path / file)
    text = table.markdown(list(table.lines([tmp_path / "one", tmp_path / "two"])))
    assert "| deleted | 6 | 0 | 2 | 0 | 0 | 0 | 1.0 s | 2.0 s | 2.0 s |" in text
    assert "Seeds: 5, 6." in text
    assert f"Pairs of fault and moment met: 1 of {len(cases.every())}." in text


def test_a_pair_counts_once_and_only_if_it_was_met() -> None:
    first, second = cases.every()[:2]
    lines = [
        {"case": first.name, "reached": True},
        {"case": first.name, "reached": True},
        {"case": second.name, "reached": False},
        {"case": "deleted@fleet", "reached": True},
    ]
    assert table.coverage(lines).endswith(f" 1 of {len(cases.every())}.")


def test_what_is_done_to_one_of_a_fleet_depends_on_its_number_alone() -> None:
    chosen = [fleet.choose(7, n) for n in range(200)]
    again = [fleet.choose(7, n) for n in reversed(range(200))]
    assert [(c.fault, c.pause, c.pair) for c in chosen] == [(c.fault, c.pause, c.pair) for c in reversed(again)]
    assert len({c.fault for c in chosen}) > 15
    assert {c.fault for c in chosen} <= {f.name for f in FAULTS}
    assert fleet.replay(85, 7) == "make chaos SEED=7 N=0 FLEET=40 FLEET_FIRST=80"


def test_one_injection_is_its_own_median() -> None:
    assert results.percentiles([7.0]) == {"p50": 7.0, "p99": 7.0, "max": 7.0}
    assert results.percentiles([]) == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_what_is_left_out_has_a_reason_and_no_fault_is_left_out_of_everything() -> None:
    possible = cases.every()
    assert {c.fault.name for c in possible} == {f.name for f in FAULTS}
    on_restores = {c.fault.name for c in possible if c.way in cases.RESTORING}
    of_the_window = {f.name for f in FAULTS if f.only is not None and f.name not in on_restores}
    assert {f.name for f in FAULTS} - on_restores == of_the_window
    assert all(len(reason) > 20 for _, _, reason in cases.LEFT_OUT)
