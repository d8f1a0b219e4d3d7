"""From any crash after any prefix of steps the next looks converge: to a true, terminal state, a free VM, and no leftovers."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.plan import builders as b
from tests.unit.plan.world import Crash, World
from vmsnapshot_operator.core import effects as e
from vmsnapshot_operator.core.driver import Fit, Hold
from vmsnapshot_operator.core.evidence import Evidence, WindowOutcome
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Machine
from vmsnapshot_operator.core.planning import Method, Patience, Policy, Refusal
from vmsnapshot_operator.core.volumes import Consistency
from vmsnapshot_operator.plan import next_effect, report, verdict

POLICIES = st.sampled_from(list(Policy))
STEPS = st.lists(st.integers(0, 14), max_size=3)


def kstatus(conditions: tuple[e.Condition, ...]) -> str:
    """What tools make of it, by the published rules of kstatus: Reconciling, Stalled, then Ready."""
    found = {c.type: c.status for c in conditions}
    if found.get("Reconciling"):
        return "InProgress"
    if found.get("Stalled"):
        return "Failed"
    if "Ready" in found and found["Ready"] is not True:
        return "InProgress"
    return "Current"


def world(policy: Policy = Policy.PREFER, **facts: object) -> World:
    asked = b.request(policy=policy)
    return World(request=asked, plan=b.plan(asked), **facts)  # type: ignore[arg-type]  # fields of World


def overlaid(policy: Policy = Policy.PREFER, **facts: object) -> World:
    """A VM that is switched to overlays, and storage that copies."""
    asked = b.request(policy=policy, method=Method.HYPERVISOR_SNAPSHOT)
    return World(request=asked, plan=b.plan(asked, room=b.ROOM), **facts)  # type: ignore[arg-type]  # fields of World


def copied(policy: Policy = Policy.PREFER, **facts: object) -> World:
    """A VM of whose disks the hypervisor copies some."""
    asked = b.request(policy=policy)
    made = b.plan(asked, classes=(b.BACKUP, b.CEPH))
    return World(request=asked, plan=made, by_job="files", **facts)  # type: ignore[arg-type]  # fields of World


def check(done: World) -> None:
    """What must hold at rest, whatever happened before."""
    assert not done.frozen
    assert done.journal is None
    assert not done.overlay, "the VM is on its own disks"
    assert all(x == "as at the switch" for x in done.copied_from), "copied while it stood still"
    assert all(n == 1 for n in done.freezes.values()), "one freeze per attempt"
    assert done.job != "running", "nothing is copied for nobody"
    assert all(n <= 1 + done.deaths.get(x, 0) for x, n in done.thaws.items()), (
        "one thaw, and one more by who comes after a death"
    )
    if done.gone:
        assert not done.names_held
        assert done.record is None
        return
    record = done.record
    assert record is not None
    conditions = {c.type: c for c in done.said[-1]}
    assert kstatus(done.said[-1]) in ("Current", "Failed")
    if record.ready:
        assert kstatus(done.said[-1]) == "Current"
        assert done.names_held == {g.request.name for g in record.groups.values()}, "exactly the recorded attempt's"
        if done.by_job:
            assert record.groups[done.by_job].request.name in done.marked, "ready, and not proved whole"
        claimed = verdict.overall(record.verdicts)
        if claimed >= Consistency.CRASH:
            assert all(done.still_at_cut[g.request.name] for g in record.groups.values()), "claimed more than was"
    else:
        assert record.failure is not None
        assert not done.names_held
        assert conditions["Stalled"].status is True
        assert conditions["Ready"].status is False
        assert conditions["Unquiesced"].status is True


@given(POLICIES, STEPS, st.sampled_from(list(Hold)), st.sampled_from(["", "files", "ceph"]), st.booleans())
def test_crashes_anywhere_converge_with_overlays(
    policy: Policy, crashes: list[int], hold: Hold, bad: str, guarded: bool
) -> None:
    done = overlaid(policy, hold=hold, bad_cut=bad, guarded=guarded)
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    check(done)
    assert done.record is not None
    assert done.record.ready or bad
    assert done.record.collapsed


@given(POLICIES, STEPS, st.sampled_from(list(Hold)), st.integers(0, 25))
def test_deletion_anywhere_with_overlays(policy: Policy, crashes: list[int], hold: Hold, before: int) -> None:
    done = overlaid(policy, hold=hold)
    done.budget_of_steps = before
    done.settle_down()
    done.deleting = True
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.budget_of_steps = None
    done.settle_down()
    assert done.gone
    check(done)


@given(POLICIES, STEPS, st.booleans(), st.sampled_from(["", "ceph"]))
def test_crashes_anywhere_converge_while_the_hypervisor_copies(
    policy: Policy, crashes: list[int], short: bool, bad: str
) -> None:
    done = copied(policy, job_ends_with_the_process=short, bad_cut=bad)
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    check(done)
    assert done.record is not None
    if not bad and not (short and crashes):
        assert done.record.ready
    if not done.record.ready and not bad:
        assert done.record.failure is not None
        assert done.record.failure.reason == "SnapshotLost"


@given(POLICIES, STEPS, st.booleans(), st.integers(0, 25))
def test_deletion_anywhere_while_the_hypervisor_copies(
    policy: Policy, crashes: list[int], short: bool, before: int
) -> None:
    done = copied(policy, job_ends_with_the_process=short)
    done.budget_of_steps = before
    with suppress(Crash):
        for _ in range(20):
            done.turn()
    done.crash()
    done.deleting = True
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.budget_of_steps = None
    done.settle_down()
    assert done.gone
    check(done)


def test_a_vm_that_stopped_on_its_overlay_is_waited_for() -> None:
    done = overlaid(hold=Hold.BASE)
    while done.record is None or not done.record.ready:
        done.turn()
    done.off = True
    for _ in range(5):
        done.turn()
    told = {c.type: c for c in done.said[-1]}
    assert done.overlay == "on"
    assert told["Ready"].status is True
    assert (told["Reconciling"].status, told["Reconciling"].reason) == (True, "OverlayInUse")
    assert "ShutOff" in told["Reconciling"].message
    done.off = False
    done.settle_down()
    check(done)


@given(POLICIES, STEPS, st.booleans(), st.booleans())
def test_crashes_anywhere_converge_to_ready(policy: Policy, crashes: list[int], early: bool, guarded: bool) -> None:
    done = world(policy, early_thaw=early, guarded=guarded)
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    check(done)
    if policy is Policy.REQUIRE and early:
        assert done.record is not None
        assert done.record.failure is not None
        assert done.record.failure.reason == "PolicyNotMet"


@given(STEPS, st.sampled_from(["files", "ceph"]))
def test_a_failing_cut_ends_as_failed_and_leaves_nothing(crashes: list[int], bad: str) -> None:
    done = world(bad_cut=bad)
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    check(done)
    assert done.record is not None
    assert done.record.failure is not None


@given(POLICIES, st.integers(0, 14), st.lists(st.integers(0, 6), max_size=2))
def test_deletion_at_any_moment_leaves_nothing(policy: Policy, moment: int, crashes: list[int]) -> None:
    done = world(policy)
    done.budget_of_steps = moment
    done.settle_down()
    done.crash()
    done.deleting = True
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    assert done.gone
    check(done)


@given(st.integers(0, 14))
def test_deletion_waits_for_a_storage_that_does_not_answer(moment: int) -> None:
    done = world()
    done.budget_of_steps = moment
    done.settle_down()
    done.crash()
    done.deleting, done.storage_answers = True, False
    before = done.names_held
    had = done.finalizer
    done.settle_down()
    assert done.gone is not had
    assert done.names_held == before
    done.storage_answers = True
    done.settle_down()
    assert done.gone
    check(done)


@pytest.mark.parametrize(("policy", "reason"), [(Policy.REQUIRE, "FreezeFailed"), (Policy.PREFER, "")])
def test_a_freeze_that_fails(policy: Policy, reason: str) -> None:
    done = world(policy, bad_freeze=True)
    done.settle_down()
    check(done)
    assert done.record is not None
    assert (done.record.failure.reason if done.record.failure is not None else "") == reason
    if not reason:
        assert done.record.plan.quiesce.method == "Pause"
        assert done.record.attempt == 2


@pytest.mark.parametrize(("patience", "seconds"), [(Patience.SETTLE, 5.0), (Patience.WAIT, 600.0)])
def test_a_refusal_becomes_final_when_its_patience_is_over(patience: Patience, seconds: float) -> None:
    done = World(plan=Refusal(reason="ClassNotReady", message="no class", patience=patience))
    effect = done.turn()
    assert isinstance(effect, e.Wait)
    assert kstatus(done.said[-1]) == "InProgress"
    done.settle_down(2000)
    assert seconds <= done.clock < seconds + 3
    assert kstatus(done.said[-1]) == "Failed"
    assert not done.finalizer
    done.plan = b.plan()
    done.settle_down()
    assert done.record is None, "a refusal stays one, whatever comes later"


def test_a_dry_run_touches_nothing_and_is_not_in_progress_for_ever() -> None:
    done = World(request=b.request(dry_run=True))
    done.settle_down()
    assert (done.record, done.finalizer, done.freezes) == (None, False, {})
    assert kstatus(done.said[-1]) == "Current"
    assert "Ready" not in {c.type for c in done.said[-1]}


def test_a_dry_run_that_was_refused_stays_so() -> None:
    done = World(request=b.request(dry_run=True), plan=Refusal(reason="NoDisks", message="it has none"))
    done.settle_down(2000)
    assert done.refused is not None
    told = done.said[-1]
    assert kstatus(told) == "Failed"
    for _ in range(3):
        assert isinstance(done.turn(), e.Wait)
        assert done.said[-1] == told, "else each look writes status, and what is written wakes the next look"


def test_a_dry_run_says_what_is_in_the_way() -> None:
    seen = replace(World(request=b.request(dry_run=True)).gather(), plan=None, in_use_by="somebody may hold it still")
    decision = next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION)
    assert isinstance(decision.effect, e.Wait)
    assert [c.reason for c in decision.conditions if c.message == "somebody may hold it still"]


def test_retain_keeps_what_was_taken() -> None:
    done = World(request=b.request(retain=True))
    done.settle_down()
    held = done.names_held
    done.deleting = True
    done.settle_down()
    assert done.gone
    assert done.names_held == held
    assert done.record is not None


def test_a_changed_deletion_policy_is_written_down_before_it_is_needed() -> None:
    done = World()
    done.settle_down()
    assert done.record is not None
    assert not done.record.retain
    done.request = b.request(retain=True)
    done.settle_down()
    assert done.record.retain, "else the content would say Delete when the VMSnapshot is gone"
    done.request = b.request(retain=False)
    done.settle_down()
    assert not done.record.retain


@given(st.lists(st.integers(0, 2), max_size=2))
def test_retain_that_comes_with_the_deletion_is_written_down_first(crashes: list[int]) -> None:
    done = World()
    done.settle_down()
    done.request, done.deleting = b.request(retain=True), True
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    assert done.gone
    assert done.record is not None
    assert done.record.retain


@given(st.integers(0, 12), st.lists(st.integers(0, 3), max_size=2))
def test_retain_that_comes_in_mid_deletion_keeps_all_or_nothing(moment: int, crashes: list[int]) -> None:
    done = World()
    done.settle_down()
    everything, done.deleting = done.names_held, True
    done.budget_of_steps = moment
    with suppress(Crash):
        while not done.gone:
            done.turn()
    done.crash()
    done.request = b.request(retain=True)
    for after in crashes:
        done.budget_of_steps = after
        done.settle_down()
        done.crash()
    done.settle_down()
    assert done.gone
    if done.record is not None:
        assert (done.record.ready, done.record.retain) == (True, True)
        assert done.names_held == everything, "what is said to be kept is not there as a whole"
    else:
        assert not done.names_held


def test_a_content_that_is_lost_is_said_and_nothing_is_taken_again() -> None:
    done = World()
    done.settle_down()
    lost = replace(done.gather(), record=None, held=None, lost={"contentName": "vmsnapcontent-u"})
    for late in (0.0, 1e6):
        decision = next_effect.decide(lost, b.at(late), installation=b.INSTALLATION)
        assert decision.effect == e.Wait()
        assert kstatus(decision.conditions) == "Failed"
        told = {c.type: c for c in decision.conditions}
        assert told["Ready"].reason == "ContentLost"
        assert "vmsnapcontent-u" in told["Ready"].message
        assert told["Unquiesced"].status is None, "the VM may bear a journal, and nobody has looked"
        assert "nothing was touched" not in {c.message for c in decision.conditions}
        said = report.status(lost, decision.conditions)
        assert (said["contentName"], said["phase"], "consistency" in said) == ("vmsnapcontent-u", "Failed", False)
    held = {"files": frozenset({"n"})}
    deleted = replace(lost, deleting=True, held=held)
    assert next_effect.decide(deleted, b.CREATED, installation=b.INSTALLATION).effect == e.RollBack(held)


def test_a_snapshot_that_a_restore_uses_is_not_deleted_under_it() -> None:
    done = World()
    done.settle_down()
    held = {"files": frozenset({"n"})}
    seen = replace(done.gather(), deleting=True, restored_by="back", held=held)
    decision = next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION)
    assert isinstance(decision.effect, e.Wait)
    assert [c.message for c in decision.conditions if c.reason == "InUseByRestore" and "back" in c.message]
    free = next_effect.decide(replace(seen, restored_by=""), b.CREATED, installation=b.INSTALLATION)
    assert not isinstance(free.effect, e.Wait)


def test_nothing_begins_without_the_lease_a_guardian_or_a_free_vm() -> None:
    seen = World().gather()
    for change in ({"leader": False}, {"in_use_by": "another snapshot"}):
        decision = next_effect.decide(replace(seen, **change), b.CREATED, installation=b.INSTALLATION)  # type: ignore[arg-type]
        assert isinstance(decision.effect, e.Wait)
    ready = World(finalizer=True)
    ready.turn()
    blind = replace(ready.gather(), guardian=Fit(ok=False, reason="GuardianNotReady", message="it does not answer"))
    decision = next_effect.decide(blind, b.CREATED, installation=b.INSTALLATION)
    assert isinstance(decision.effect, e.Wait)
    assert "it does not answer" in decision.conditions[-2].message


@pytest.mark.parametrize(
    "found",
    [
        b.machine(disks=(*b.DISKS, b.disk("vdd")), agent=b.agent(("vda", "vdb", "vdc", "vdd"))),
        b.machine(agent=b.agent(("vda", "vdb"))),
    ],
    ids=["a disk was plugged", "a file system was unmounted"],
)
def test_a_vm_that_changed_since_it_was_prepared_is_rolled_back_and_prepared_anew(found: Machine) -> None:
    done = World(finalizer=True)
    done.turn()
    assert done.prepared == 1
    left = next(iter(done.names_of(1)))
    done.held.setdefault("ceph", set()).add(left)  # what a driver had made while it prepared
    done.plan = b.plan(found=found)
    effects = [done.turn() for _ in range(3)]
    assert [type(x) for x in effects] == [e.Wait, e.RollBack, e.Prepare]
    assert isinstance(effects[2], e.Prepare)
    assert effects[2].attempt == 2


def test_what_a_later_attempt_made_is_not_rolled_back_by_who_decides_on_an_earlier_one() -> None:
    done = World(finalizer=True)
    done.turn()
    done.prepared = None
    early, late = done.names_of(1), done.names_of(2)
    seen = replace(done.gather(), held={"ceph": frozenset({*early, *late})})
    effect = next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION).effect
    assert isinstance(effect, e.RollBack)
    assert effect.names == {"ceph": frozenset(early)}
    gone = next_effect.decide(replace(seen, deleting=True), b.CREATED, installation=b.INSTALLATION).effect
    assert isinstance(gone, e.RollBack)
    assert gone.names == {"ceph": frozenset({*early, *late})}


def test_who_is_not_the_leader_frees_and_does_nothing_else() -> None:
    done = World(finalizer=True)
    done.turn()
    for change in ({}, {"deleting": True}, {"prepared": None}):
        seen = replace(done.gather(), leader=False, **change)  # type: ignore[arg-type]  # fields of the observation
        assert isinstance(next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION).effect, e.Wait)
    journal = Journal(
        installation=b.INSTALLATION, owner_uid=b.UID, nonce="n", attempt=1, method="GuestAgent", budget=30.0
    )
    seen = replace(done.gather(), leader=False, journal=journal)
    assert isinstance(next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION).effect, e.Recover)


def test_what_cannot_be_read_is_kept_where_it_shall_be_retained() -> None:
    done = World(finalizer=True)
    done.turn()
    assert done.record is not None
    done.record = replace(done.record, problem="it was edited by hand")
    request = replace(done.request, retain=True)
    seen = replace(done.gather(), request=request, deleting=True, held={"ceph": frozenset(done.names_of(1))})
    assert isinstance(next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION).effect, e.Forget)


def test_a_forged_content_is_refused_and_survives_deletion() -> None:
    done = World(finalizer=True)
    done.turn()
    assert done.record is not None
    done.record = replace(done.record, problem="it belongs to somebody else", foreign=True)
    seen = done.gather()
    decision = next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION)
    assert kstatus(decision.conditions) == "Failed"
    assert isinstance(decision.effect, e.Wait)
    gone = next_effect.decide(replace(seen, deleting=True, held={}), b.CREATED, installation=b.INSTALLATION)
    assert isinstance(gone.effect, e.Forget)


def test_when_it_cannot_be_seen_whether_the_vm_is_free_nothing_is_terminal() -> None:
    done = World(finalizer=True)
    done.turn()
    blind = replace(done.gather(), journal_problem="libvirt does not answer")
    for change in ({}, {"deleting": True}):
        decision = next_effect.decide(replace(blind, **change), b.at(10_000), installation=b.INSTALLATION)  # type: ignore[arg-type]
        assert isinstance(decision.effect, e.Wait)
        assert kstatus(decision.conditions) == "InProgress"


def test_attempts_are_not_endless() -> None:
    done = world(finalizer=True, budget_of_steps=4, dies_again=4)  # in each window, for ever
    done.settle_down(next_effect.MAX_ATTEMPTS * 20)
    done.dies_again = done.budget_of_steps = None
    done.settle_down()
    check(done)
    assert done.record is not None
    assert done.record.failure is not None
    assert done.record.failure.reason == "Interrupted"
    assert done.record.attempt == next_effect.MAX_ATTEMPTS


@pytest.mark.parametrize("touched", [False, True])
def test_what_fails_before_the_vm_is_touched_is_tried_until_the_deadline(touched: bool) -> None:
    done = World(finalizer=True)
    done.turn()
    assert done.record is not None
    done.record = replace(done.record, attempt=next_effect.MAX_ATTEMPTS)
    outcome = WindowOutcome(
        attempt=next_effect.MAX_ATTEMPTS,
        evidence=Evidence(method="GuestAgent", frozen_time=b.CREATED if touched else None),
        interrupted=True,
        free=True,
        reason="StorageUnavailable",
        message="it does not answer",
    )
    seen = replace(done.gather(), outcome=outcome, held={}, prepared=None)
    effect = next_effect.decide(seen, b.CREATED, installation=b.INSTALLATION).effect
    assert isinstance(effect, e.Fail if touched else e.Prepare)
    late = next_effect.decide(seen, b.at(10_000), installation=b.INSTALLATION).effect
    assert isinstance(late, e.Fail)
