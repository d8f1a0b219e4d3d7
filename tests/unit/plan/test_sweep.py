"""What a sweep does about a journal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.plan import builders as b
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan.sweep import OVERDUE, SETTLED, Action, Found, judge

OURS = Journal(
    installation=b.INSTALLATION, owner_uid=b.UID, nonce="0" * 32, attempt=2, method="GuestAgent", budget=30.0
)
LEFT = Found(journal=OURS, installation=b.INSTALLATION, leader=True)
LONG = Seconds(OURS.budget + OVERDUE + 0.1)


def test_the_leader_frees_what_nobody_of_it_holds() -> None:
    ruling = judge(LEFT)
    assert ruling.action is Action.FREE
    assert "attempt 2" in ruling.why


def test_a_window_of_this_process_is_left_to_it() -> None:
    assert judge(replace(LEFT, owner=b.UID)).action is Action.WAIT
    assert judge(replace(LEFT, owner="another snapshot of the same VM")).action is Action.FREE


def test_a_standby_leaves_windows_to_the_leader_until_they_are_overdue() -> None:
    standby = replace(LEFT, leader=False)
    assert judge(standby).action is Action.WAIT
    assert judge(replace(standby, seen_for=Seconds(OURS.budget))).action is Action.WAIT
    assert judge(replace(standby, seen_for=LONG)).action is Action.FREE


def test_nobody_owns_a_window_longer_than_its_budget() -> None:
    ruling = judge(replace(LEFT, owner=b.UID, seen_for=LONG))
    assert ruling.action is Action.FREE
    assert "longer than the 30 s" in ruling.why


@pytest.mark.parametrize(
    "problem",
    [
        "the journal in the domain's metadata has version 9, this program knows 1",
        "the journal in the domain's metadata cannot be read: no element found",
    ],
)
def test_what_cannot_be_read_is_left_and_said(problem: str) -> None:
    ruling = judge(replace(LEFT, journal=None, problem=problem, seen_for=Seconds(1e9)))
    assert ruling.action is Action.LEAVE
    assert problem in ruling.why


@given(st.booleans(), st.sampled_from(["", b.UID]), st.floats(0, 1e6))
def test_another_installations_is_never_touched(leader: bool, owner: str, seen_for: float) -> None:
    theirs = replace(OURS, installation="zzzzzz")
    ruling = judge(
        Found(journal=theirs, installation=b.INSTALLATION, leader=leader, owner=owner, seen_for=Seconds(seen_for))
    )
    assert ruling.action is Action.LEAVE
    assert "zzzzzz" in ruling.why


@given(st.booleans(), st.sampled_from(["", b.UID, "other"]), st.floats(0, 1e6))
def test_every_journal_of_ours_is_freed_in_the_end(leader: bool, owner: str, seen_for: float) -> None:
    found = replace(LEFT, leader=leader, owner=owner, seen_for=Seconds(seen_for))
    assert judge(found).action in (Action.FREE, Action.WAIT)
    assert judge(replace(found, seen_for=Seconds(seen_for + LONG))).action is Action.FREE


def test_a_vm_that_stands_still_on_overlays_is_worth_more_than_its_snapshot() -> None:
    journal = replace(OURS, phase=Phase.OVERLAID, overlays={"v": "/over"}, bases={"v": "then"})
    overlaid = replace(LEFT, journal=journal, owner=b.UID)
    still = replace(overlaid, stalled=True)
    assert judge(overlaid).action is Action.WAIT
    ruling = judge(still)
    assert ruling.action is Action.COLLAPSE
    assert "to which it cannot write" in ruling.why
    assert judge(replace(still, journal=replace(journal, bases={}))).action is Action.WAIT, "it is being switched"
    committing = replace(journal, phase=Phase.COLLAPSING)
    assert judge(replace(still, journal=committing)).action is Action.WAIT, "this process is at it"
    assert judge(replace(still, journal=committing, owner="")).action is Action.COLLAPSE
    standby = replace(still, leader=False, owner="")
    assert judge(standby).action is Action.WAIT, "the leader does it"
    assert judge(replace(standby, seen_for=Seconds(SETTLED + 1))).action is Action.COLLAPSE
    assert judge(replace(still, installation="another")).action is Action.LEAVE
