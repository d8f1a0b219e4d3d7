"""What is done about an overlay: never lost while it holds writes, never committed onto a base that changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.core.chains import BlockJob, Chains, DiskChain, Move, Overlaid
from vmsnapshot_operator.core.journal import Journal, Phase, from_xml, to_xml
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.plan import collapse

JOURNAL = Journal(
    installation="abcdef",
    owner_uid="0b6f7d1e-0000-4000-8000-000000000001",
    nonce="0" * 32,
    attempt=1,
    method="HypervisorSnapshot",
    budget=30,
    overlays={"v": "/overlays/v"},
    bases={"v": "then"},
    run_id=7,
    phase=Phase.OVERLAID,
)
BEGUN = replace(JOURNAL, phase=Phase.COLLAPSING, begun=("v",))
ON = ("/overlays/v", "/base")
OFF = ("/base",)


def seen(
    chain: tuple[str, ...] = ON,
    *,
    power: PowerState = PowerState.RUNNING,
    run: int = 7,
    job: BlockJob | None = None,
    stalled: bool = False,
) -> Overlaid:
    """One disk with this chain, and a base that stands as it stood."""
    live = () if power in (PowerState.SHUT_OFF, PowerState.CRASHED) else chain
    disk = DiskChain(target="vda", live=live, saved=chain[:1], job=job)
    return Overlaid(
        chains=Chains(run_id=run, power=power, io_error=stalled, stalled=stalled, disks=(disk,)),
        fingerprints={"v": "then"},
        on_base=frozenset({"v"} if live == OFF else ()),
    )


def move(journal: Journal, found: Overlaid) -> Move:
    (ruling,) = collapse.judge(journal, found)
    assert ruling.why or ruling.move not in (Move.KEEP, Move.WAIT), "what is not done is explained"
    return ruling.move


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (None, Move.COMMIT),
        (BlockJob(commit=True), Move.WATCH),
        (BlockJob(commit=True, ready=True), Move.PIVOT),
        (BlockJob(commit=False), Move.WAIT),
    ],
)
def test_a_running_vm_on_its_overlay(job: BlockJob | None, expected: Move) -> None:
    assert move(JOURNAL, seen(job=job)) is expected
    assert move(BEGUN, seen(job=job)) is expected


def test_a_base_that_changed_is_never_committed_onto() -> None:
    assert move(JOURNAL, replace(seen(), fingerprints={"v": "now"})) is Move.KEEP
    assert move(JOURNAL, replace(seen(), fingerprints={})) is Move.WAIT, "it cannot be seen now"
    assert move(BEGUN, replace(seen(), fingerprints={"v": "now"})) is Move.COMMIT, "we changed it ourselves"
    another = replace(JOURNAL, phase=Phase.COLLAPSING, begun=("w",))
    assert move(another, replace(seen(), fingerprints={"v": "now"})) is Move.KEEP, (
        "the commit of another disk is no excuse"
    )


def test_a_switch_whose_bases_were_not_noted() -> None:
    unknown = replace(JOURNAL, bases={})
    assert move(unknown, seen()) is Move.COMMIT, "the same run: QEMU has kept the base to itself"
    assert move(unknown, seen(run=8)) is Move.KEEP


def test_a_vm_that_does_not_run_keeps_its_overlay_until_it_does() -> None:
    assert move(JOURNAL, seen(power=PowerState.SHUT_OFF, run=-1)) is Move.WAIT
    assert move(JOURNAL, seen(power=PowerState.PAUSED)) is Move.WAIT


STILL = PowerState.PAUSED


def test_a_vm_that_an_io_error_has_paused_is_brought_back_as_one_that_runs() -> None:
    """It waits for room that nobody else gives."""
    assert move(JOURNAL, seen(power=STILL, stalled=True)) is Move.COMMIT
    assert move(BEGUN, seen(power=STILL, stalled=True, job=BlockJob(commit=True, ready=True))) is Move.PIVOT
    assert move(BEGUN, seen(OFF, power=STILL, stalled=True)) is Move.REMOVE, "it is the same run"
    assert move(JOURNAL, replace(seen(power=STILL, stalled=True), fingerprints={"v": "now"})) is Move.KEEP
    assert collapse.stands(JOURNAL, seen(power=STILL, stalled=True)) == ""


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (seen(OFF, power=STILL, stalled=True), True),
        (replace(seen(OFF, power=STILL, stalled=True), missing=frozenset({"v"})), True),
        (replace(seen(power=STILL, stalled=True), fingerprints={"v": "now"}), False),
        (seen(power=STILL, stalled=True), False),
        (seen(power=STILL, stalled=True, job=BlockJob(commit=True, ready=True)), False),
        (seen(("/other", *ON), power=STILL, stalled=True), False),
        (seen(OFF, power=STILL), False),
        (seen(OFF), False),
        (Overlaid(chains=None), False),
    ],
    ids=["left", "removed", "kept", "to commit", "to pivot", "in the way", "paused by a person", "runs", "gone"],
)
def test_when_a_vm_that_stood_still_may_go_on(found: Overlaid, expected: bool) -> None:
    assert collapse.may_go_on(found, collapse.judge(BEGUN if found.on_base else JOURNAL, found)) is expected


def test_somebody_elses_layer_on_top() -> None:
    assert move(JOURNAL, seen(("/other", *ON))) is Move.WAIT


def test_an_overlay_that_was_left() -> None:
    assert move(JOURNAL, seen(OFF)) is Move.KEEP, "it holds writes, and nobody committed it"
    assert move(replace(JOURNAL, pivoted=("v",), phase=Phase.COLLAPSING), seen(OFF, run=9)) is Move.REMOVE
    assert move(BEGUN, seen(OFF)) is Move.REMOVE, "the same run left it by a pivot"
    assert move(BEGUN, seen(OFF, run=9)) is Move.KEEP
    assert move(BEGUN, seen(("/elsewhere",))) is Move.KEEP, "a disk that was replaced while its commit failed"
    detached = replace(seen(), chains=Chains(run_id=7, power=PowerState.RUNNING))
    assert move(BEGUN, detached) is Move.KEEP, "its commit was begun, and not seen to end"
    assert move(replace(BEGUN, begun=("w",)), seen(OFF)) is Move.KEEP, "it was another disk that was committed"
    assert move(JOURNAL, replace(seen(OFF), pristine=frozenset({"v"}))) is Move.REMOVE
    assert move(JOURNAL, replace(seen(OFF), missing=frozenset({"v"}))) is Move.GONE


def test_a_domain_that_is_gone() -> None:
    assert move(JOURNAL, Overlaid(chains=None)) is Move.KEEP
    assert move(JOURNAL, Overlaid(chains=None, pristine=frozenset({"v"}))) is Move.REMOVE
    assert move(JOURNAL, Overlaid(chains=None, missing=frozenset({"v"}))) is Move.GONE


def test_whether_the_bases_stand() -> None:
    assert collapse.stands(JOURNAL, seen()) == ""
    assert "has changed" in collapse.stands(JOURNAL, replace(seen(), fingerprints={"v": "now"}))
    assert collapse.stands(replace(JOURNAL, bases={}), seen())
    assert collapse.stands(replace(JOURNAL, phase=Phase.COLLAPSING), seen())
    assert collapse.stands(JOURNAL, seen(OFF))
    assert collapse.stands(JOURNAL, seen(power=PowerState.SHUT_OFF)), "it may start on its base by another definition"


PHASES = st.sampled_from(list(Phase))
CHAINS = st.sampled_from([ON, OFF, ("/other", *ON), ("/elsewhere",)])


@given(
    PHASES,
    CHAINS,
    st.sampled_from(list(PowerState)),
    st.integers(7, 8),
    st.sampled_from(["", "then", "now"]),
    st.booleans(),
    st.sampled_from([(), ("w",), ("v",), ("v", "w")]),
)
def test_an_overlay_with_writes_is_removed_only_after_a_proven_commit(
    phase: Phase, chain: tuple[str, ...], power: PowerState, run: int, now: str, noted: bool, begun: tuple[str, ...]
) -> None:
    journal = replace(JOURNAL, phase=phase, pivoted=("v",) if noted else (), begun=begun)
    found = replace(seen(chain, power=power, run=run), fingerprints={"v": now} if now else {})
    made = move(journal, found)
    if made is Move.REMOVE:
        assert found.chains is not None
        assert found.chains.with_image(ON[0]) is None
        assert noted or ("v" in begun and chain == OFF and run == 7 and power is PowerState.RUNNING)
    if made is Move.COMMIT:
        assert chain == ON
        assert power is PowerState.RUNNING
        assert "v" in begun or now == "then"


@given(PHASES, st.booleans(), st.integers(-1, 99))
def test_the_journal_says_it_again(phase: Phase, pivoted: bool, run: int) -> None:
    journal = replace(JOURNAL, phase=phase, begun=("v", "w"), pivoted=("v",) if pivoted else (), run_id=run)
    assert from_xml(to_xml(journal)) == journal
