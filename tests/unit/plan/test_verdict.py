"""What is claimed is never better than the evidence: held against the definition of `consistency`, written down once more here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.plan import builders as b
from vmsnapshot_operator.core.driver import CutResult, Hold
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Method, Plan
from vmsnapshot_operator.core.volumes import Consistency, Handle, Seconds
from vmsnapshot_operator.plan import verdict

S = Seconds


def outcome(
    plan: Plan, *, start: float = 2, end: float = 3, atomic: bool = False, hold: Hold = Hold.NOTHING, **facts: Any
) -> WindowOutcome:
    """A window in which the VM stood still from 1 to 4 and every group was cut between `start` and `end`."""
    told: dict[str, Any] = {
        "method": plan.quiesce.method,
        "still_from": S(1.0),
        "still_until": S(4.0),
        "covered": frozenset(v.volume.id for v in plan.volumes if v.covered),
        "frozen": 3,
        "thawed": 3,
        "same_vm": True,
    }
    groups = {
        g.class_name: GroupOutcome(
            class_name=g.class_name,
            bracket=Bracket(start=S(start), end=S(end)),
            result=CutResult(handles={v.id: Handle("h") for v in g.volumes}, atomic=atomic, hold=hold),
        )
        for g in plan.groups
    }
    return WindowOutcome(attempt=1, evidence=Evidence(**(told | facts)), groups=groups, free=True)


def claimed(plan: Plan, **facts: Any) -> Consistency:
    """The claim for the whole."""
    return verdict.overall(verdict.judge(plan, outcome(plan, **facts)))


def test_frozen_by_us_and_thawed_by_us_is_filesystem() -> None:
    assert claimed(b.plan()) is Consistency.FILESYSTEM


@pytest.mark.parametrize(
    "facts",
    [
        {"thawed": 2},
        {"thawed": 0},
        {"frozen": 0, "thawed": 0},
        {"frozen": 2, "thawed": 2},
        {"freed_by_other": True},
        {"still_from": None},
        {"still_until": None},
        {"start": 0.5},
        {"end": 4.5},
        {"covered": frozenset()},
    ],
)
def test_a_broken_freeze_over_two_drivers_is_per_volume(facts: dict[str, Any]) -> None:
    assert claimed(b.plan(), **facts) is Consistency.PER_VOLUME


def test_a_thaw_that_ended_with_an_error_is_told_with_the_guest_s_words() -> None:
    made = b.plan()
    said = "couldn't hold writes: fsfreeze is limited up to 10 seconds"
    found = verdict.judge(made, outcome(made, thawed=0, notes=("cut: slow", f"thaw: {said}")))
    assert {v.consistency for v in found.values()} == {Consistency.PER_VOLUME}
    assert all(said in v.why for v in found.values())


def test_another_vm_afterwards_is_unknown() -> None:
    assert claimed(b.plan(), same_vm=False) is Consistency.UNKNOWN


def test_cache_unsafe_is_unknown() -> None:
    found = b.machine(disks=(replace(b.DISKS[0], cache="unsafe"), *b.DISKS[1:]))
    assert claimed(b.plan(found=found)) is Consistency.UNKNOWN


def test_pause_is_crash() -> None:
    assert claimed(b.plan(b.request(method=Method.PAUSE))) is Consistency.CRASH
    assert claimed(b.plan(b.request(method=Method.PAUSE)), freed_by_other=True) is Consistency.PER_VOLUME


def test_one_job_of_the_hypervisor_is_one_instant_for_whatever_classes() -> None:
    classes = (b.BACKUP, replace(b.CEPH, capabilities=b.BACKUP.capabilities))
    made = b.plan(b.NEVER, classes=classes)
    assert claimed(made, atomic=True, hold=Hold.JOB, still_from=None) is Consistency.CRASH
    assert claimed(made, atomic=True, still_from=None) is Consistency.PER_VOLUME


def test_never_is_per_volume_but_for_one_atomic_group() -> None:
    assert claimed(b.plan(b.NEVER), still_from=None) is Consistency.PER_VOLUME
    one = b.plan(replace(b.NEVER, exclude=("vda", "vdb")))
    assert claimed(one, still_from=None, atomic=True) is Consistency.CRASH
    assert claimed(one, still_from=None, atomic=False) is Consistency.PER_VOLUME


@pytest.mark.parametrize(
    ("within_before", "within", "expected"),
    [(True, True, Consistency.FILESYSTEM), (True, False, Consistency.CRASH), (False, False, Consistency.CRASH)],
)
def test_shut_off(within_before: bool, within: bool, expected: Consistency) -> None:
    off = b.machine(power=PowerState.SHUT_OFF, shut_down_from_within=within_before, agent=None)
    assert claimed(b.plan(found=off), shut_down_from_within=within) is expected
    assert claimed(b.plan(found=off), shut_down_from_within=within, freed_by_other=True) is Consistency.PER_VOLUME


@pytest.mark.parametrize(
    ("hold", "fingerprint", "expected"),
    [
        (Hold.NOTHING, "", Consistency.CRASH),
        (Hold.BASE, "1", Consistency.CRASH),
        (Hold.BASE, "", Consistency.UNKNOWN),
    ],
)
def test_a_copy_of_a_vm_that_is_off_needs_what_betrays_a_write(
    hold: Hold, fingerprint: str, expected: Consistency
) -> None:
    disks = (b.disk("vda", b.file_layer("vda", fingerprint=fingerprint)),)
    plan = b.plan(found=b.machine(power=PowerState.SHUT_OFF, agent=None, disks=disks))
    assert verdict.overall(verdict.judge(plan, outcome(plan, hold=hold))) is expected


def test_nothing_is_claimed_of_what_was_not_cut() -> None:
    plan = b.plan()
    whole = outcome(plan)
    partial = replace(whole, groups={**whole.groups, "ceph": GroupOutcome(class_name="ceph", reason="DriverError")})
    assert verdict.overall(verdict.judge(plan, partial)) is Consistency.UNKNOWN
    assert verdict.overall({}) is Consistency.UNKNOWN


FACTS = st.fixed_dictionaries(
    {
        "still_from": st.sampled_from([None, S(1.0)]),
        "still_until": st.sampled_from([None, S(4.0)]),
        "frozen": st.integers(0, 4),
        "thawed": st.integers(0, 4),
        "freed_by_other": st.booleans(),
        "same_vm": st.booleans(),
        "start": st.sampled_from([0.5, 1.0, 2.0]),
        "end": st.sampled_from([3.0, 4.0, 4.5]),
        "atomic": st.booleans(),
        "shut_down_from_within": st.booleans(),
    }
)
PLANS = st.sampled_from(
    [
        b.plan(),
        b.plan(b.NEVER),
        b.plan(b.request(method=Method.PAUSE)),
        b.plan(found=b.machine(power=PowerState.SHUT_OFF, agent=None)),
        b.plan(found=b.machine(power=PowerState.PAUSED, agent=None)),
        b.plan(b.request(exclude=("vda", "vdb"))),
        b.plan(found=b.machine(agent=b.agent(("vda",)))),
    ]
)


@given(PLANS, FACTS)
def test_never_better_than_the_definition(plan: Plan, facts: dict[str, Any]) -> None:
    """The definition, in the words of the API's documentation."""
    whole = claimed(plan, **facts)
    still = facts["still_from"] is not None and facts["still_until"] is not None and not facts["freed_by_other"]
    within = still and facts["start"] >= 1.0 and facts["end"] <= 4.0
    counted = facts["frozen"] >= max(1, plan.quiesce.expected_filesystems) and facts["thawed"] == facts["frozen"]
    frozen_by_us = plan.quiesce.method == Method.GUEST_AGENT and counted and all(v.covered for v in plan.volumes)
    off = plan.power == PowerState.SHUT_OFF and facts["shut_down_from_within"]
    one_group = len(plan.groups) == 1 and facts["atomic"]
    held = within and plan.quiesce.method != Method.GUEST_AGENT
    if whole is Consistency.APPLICATION:
        pytest.fail("the agent gives no evidence for it")
    if whole is Consistency.FILESYSTEM:
        assert facts["same_vm"]
        assert within
        assert frozen_by_us or off
    if whole is Consistency.CRASH:
        assert facts["same_vm"]
        assert held or one_group
    if not facts["same_vm"]:
        assert whole is Consistency.UNKNOWN


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, Consistency.FILESYSTEM),
        ({"frozen": 0, "thawed": 0}, Consistency.CRASH),
        ({"thawed": 2}, Consistency.CRASH),
        ({"frozen": 2, "thawed": 2}, Consistency.CRASH),
        ({"covered": frozenset()}, Consistency.CRASH),
        ({"still_from": None}, Consistency.PER_VOLUME),
        ({"start": 0.5}, Consistency.PER_VOLUME),
        ({"same_vm": False}, Consistency.UNKNOWN),
    ],
)
def test_one_atomic_switch_is_one_instant(facts: dict[str, Any], expected: Consistency) -> None:
    made = b.plan(b.request(method=Method.HYPERVISOR_SNAPSHOT), room=b.ROOM)
    assert claimed(made, **facts) is expected
