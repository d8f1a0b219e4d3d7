"""Conditions get their times on a flip alone, and a status is written only when it brings news."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.api.conditions import Condition as ApiCondition
from vmsnapshot_operator.core.effects import Condition
from vmsnapshot_operator.kube.conditions import changed, merge

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
STAMP = "2026-01-02T03:04:05Z"

decisions = st.lists(
    st.builds(
        Condition,
        type=st.sampled_from(["Planned", "Quiesced", "Ready", "Stalled"]),
        status=st.sampled_from([True, False, None]),
        reason=st.sampled_from(["NotYet", "Done", "Failed"]),
        message=st.text(max_size=5),
    ),
    unique_by=lambda c: c.type,
    max_size=4,
)


def test_a_first_visit_writes_all_of_them() -> None:
    decided = [
        Condition(type="Planned", status=True, reason="Planned", message="3 disks"),
        Condition(type="Ready", status=None, reason="NotYet"),
    ]
    assert merge([], decided, 4, NOW) == [
        {
            "type": "Planned",
            "status": "True",
            "observedGeneration": 4,
            "lastTransitionTime": STAMP,
            "reason": "Planned",
            "message": "3 disks",
        },
        {
            "type": "Ready",
            "status": "Unknown",
            "observedGeneration": 4,
            "lastTransitionTime": STAMP,
            "reason": "NotYet",
            "message": "",
        },
    ]


def test_the_time_moves_on_a_flip_alone() -> None:
    old = merge([], [Condition(type="Ready", status=None, reason="NotYet")], 1, NOW)
    later = NOW + timedelta(hours=1)
    same = merge(old, [Condition(type="Ready", status=None, reason="Copying", message="half")], 2, later)
    assert (same[0]["lastTransitionTime"], same[0]["reason"], same[0]["observedGeneration"]) == (STAMP, "Copying", 2)
    flipped = merge(same, [Condition(type="Ready", status=True, reason="Ready")], 2, later)
    assert flipped[0]["lastTransitionTime"] == "2026-01-02T04:04:05Z"


def test_what_is_no_longer_decided_is_dropped() -> None:
    old = merge([], [Condition(type="Ready", status=True, reason="Ready")], 1, NOW)
    assert merge(old, [], 1, NOW) == []


@given(decisions, decisions)
def test_the_order_is_that_of_the_decision_and_all_fit_the_schema(
    first: list[Condition], second: list[Condition]
) -> None:
    merged = merge(merge([], first, 1, NOW), second, 2, NOW + timedelta(seconds=9))
    assert [c["type"] for c in merged] == [c.type for c in second]
    for condition in merged:
        ApiCondition.from_body(condition)


@given(decisions)
def test_saying_it_again_is_no_news(decided: list[Condition]) -> None:
    status: dict[str, Any] = {"observedGeneration": 1, "conditions": merge([], decided, 1, NOW)}
    again = merge(status["conditions"], decided, 1, NOW + timedelta(days=1))
    shuffled = {**status, "conditions": list(reversed(status["conditions"]))}
    assert not changed(shuffled, {**status, "conditions": again})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"phase": "Ready"}),
        ({"phase": "Ready"}, {}),
        ({"phase": "Ready"}, {"phase": "Failed"}),
        ({"volumes": [{"target": "vda"}]}, {"volumes": []}),
        ({"volumes": [{"target": "vda"}, {"target": "vdb"}]}, {"volumes": [{"target": "vdb"}, {"target": "vda"}]}),
        ({"quiesce": {"attempts": 1, "added": "by hand"}}, {"quiesce": {"attempts": 1}}),
        ({"observedGeneration": -1}, {"observedGeneration": 0}),
        ({"groups": [{"atomic": True}]}, {"groups": [{"atomic": False}]}),
        ({"groups": [{}]}, {"groups": [{"atomic": False}]}),
        ({"conditions": [{"type": "Ready", "status": "True"}]}, {"conditions": [{"type": "Ready", "status": "False"}]}),
        ({"conditions": [{"type": "Ready"}, {"type": "Evil"}]}, {"conditions": [{"type": "Ready"}]}),
    ],
)
def test_news(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert changed(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({"quiesce": {"attempts": 0, "mountpoints": []}}, {"quiesce": {}}),
        ({"leftovers": []}, {}),
        ({"volumes": [{"target": "vda", "sizeBytes": 0}]}, {"volumes": [{"target": "vda"}]}),
    ],
)
def test_empty_defaults_of_the_schema_are_no_news(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert not changed(old, new)
