"""A restore, step by step, in a small model of the world: from any crash it comes to an end that nobody has to mend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.driver import CutResult
from vmsnapshot_operator.core.effects import Condition, Failure
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Patience, Refusal
from vmsnapshot_operator.core.restoring import (
    Claim,
    Clone,
    CloseGate,
    GoBack,
    HandOver,
    LetGo,
    RemoveClones,
    Rest,
    RestoreEffect,
    RestoreGroup,
    RestorePlan,
    RestoreRequest,
    RestoreSeen,
    Revert,
    Safety,
    Start,
    Stop,
    TakeSafety,
)
from vmsnapshot_operator.core.volumes import Handle, Seconds
from vmsnapshot_operator.plan import next_restore, restore_report

MARKER = Marker(installation="abcdef", restore="team-a/back", restore_uid="r1", snapshot_uid="s1")
DISKS = ("vda", "vdb", "vdc")
PLAN = RestorePlan(
    groups=(
        RestoreGroup(class_name="files", cut=CutResult(handles={"v": Handle("h")}, atomic=False), onto=()),  # type: ignore[dict-item]
    ),
    targets=DISKS,
    gate=DISKS,
)


class Crash(Exception):  # noqa: N818 - what it is
    """The process died."""


def request(**changes: Any) -> RestoreRequest:
    """In place, of a VM that may be stopped."""
    asked = RestoreRequest(
        uid="r1", namespace="team-a", name="back", generation=1, created=b.CREATED, snapshot="snap", stop_running=True
    )
    return replace(asked, **changes)


def test_what_nothing_can_be_done_about_now_is_told_by_its_reason() -> None:
    seen = RestoreSeen(request=request(), gate=Gate(marker=MARKER, targets=DISKS, autostart=False), marker=MARKER)
    told = next_restore.decide(replace(seen, problem="defined twice", problem_reason="DomainAmbiguous"), b.CREATED)
    assert isinstance(told.effect, Rest), "nothing is set back, nor given up"
    found = {c.type: c for c in told.conditions}["Reconciling"]
    assert found.reason == "DomainAmbiguous"
    assert "defined twice" in found.message


@dataclass(slots=True)
class World:
    """Disks by what they hold, a VM, and a process that may die before any step."""

    request: RestoreRequest = field(default_factory=request)
    disks: dict[str, str] = field(default_factory=lambda: dict.fromkeys(DISKS, "now"))
    saved: dict[str, str] = field(default_factory=dict)
    gate: Gate | None = None
    done: Marker | None = None
    went_back: str = ""
    half_done: bool = False
    power: PowerState = PowerState.RUNNING
    clones: set[str] = field(default_factory=set)
    new_vm: bool = False
    finalizer: bool = False
    ended: tuple[Condition, ...] = ()
    deleting: bool = False
    gone: bool = False
    clock: float = 0.0
    refusal: Refusal | None = None
    bad_disk: str = ""
    safety_fails: bool = False
    said: list[tuple[Condition, ...]] = field(default_factory=list)
    starts: int = 0
    broken: Failure | None = None
    started: bool = False
    steps: int | None = None

    def step(self) -> None:
        if self.steps is not None:
            if self.steps == 0:
                raise Crash
            self.steps -= 1
        self.clock += 0.1

    def see(self) -> RestoreSeen:
        in_place = self.request.in_place
        safety = Safety.NONE
        if self.saved:
            safety = Safety.FAILED if self.safety_fails else Safety.READY
        return RestoreSeen(
            request=self.request,
            deleting=self.deleting,
            finalizer=self.finalizer,
            ended=self.ended,
            refusal=self.refusal,
            plan=PLAN if self.refusal is None else None,
            marker=MARKER,
            gate=self.gate,
            done=self.done,
            went_back=self.went_back,
            told_half_done=self.half_done,
            power=self.power if in_place or self.new_vm else None,
            started=self.started,
            safety=safety,
            safety_name="back-safety",
            held=frozenset(self.clones),
            broken=self.broken,
            known_for=Seconds(self.clock),
        )

    def turn(self) -> RestoreEffect:
        made = next_restore.decide(self.see(), b.at(self.clock))
        self.said.append(made.conditions)
        self.half_done = {c.type: c.reason for c in made.conditions}["VolumesRestored"] == "HalfDone"
        if next_restore.conditions_of_end(made.conditions):
            self.ended = made.conditions
        handlers: dict[type, Callable[[Any], None]] = {
            Claim: self._claim,
            TakeSafety: self._safety,
            Stop: self._stop,
            CloseGate: self._close,
            Revert: self._revert,
            GoBack: self._back,
            Clone: self._clone,
            HandOver: self._hand_over,
            RemoveClones: self._remove,
            Start: self._start,
            LetGo: self._let_go,
            Rest: self._rest,
        }
        handlers[type(made.effect)](made.effect)
        return made.effect

    def _claim(self, _: Claim) -> None:
        self.step()
        self.finalizer = True

    def _safety(self, _: TakeSafety) -> None:
        self.step()
        self.saved = dict(self.disks)

    def _stop(self, _: Stop) -> None:
        self.step()
        self.power = PowerState.SHUT_OFF

    def _close(self, effect: CloseGate) -> None:
        assert self.finalizer
        assert self.power is PowerState.SHUT_OFF
        self.step()
        self.gate = Gate(marker=MARKER, targets=effect.targets, autostart=False)

    def _revert(self, _: Revert) -> None:
        assert self.gate is not None, "nobody may start the VM while its disks are set back"
        assert self.power is PowerState.SHUT_OFF
        for disk in self.disks:
            self.step()
            if disk == self.bad_disk:
                self.broken = Failure(reason="SnapshotLost", message="it is gone")
                return
            self.disks[disk] = "snapshot"
        self.step()
        self.gate, self.done = None, MARKER

    def _back(self, effect: GoBack) -> None:
        assert self.power is PowerState.SHUT_OFF
        for disk in self.disks:
            self.step()
            self.disks[disk] = self.saved[disk]
        self.step()
        self.gate, self.went_back = None, effect.why.reason

    def _clone(self, _: Clone) -> None:
        self.step()
        self.clones.add("clone")
        self.step()
        if self.bad_disk:
            self.broken = Failure(reason="SnapshotLost", message="it is gone")
            return
        self.new_vm, self.power, self.done = True, PowerState.SHUT_OFF, MARKER

    def _hand_over(self, effect: HandOver) -> None:
        assert self.new_vm
        self.step()
        self.clones -= effect.names

    def _remove(self, effect: RemoveClones) -> None:
        assert not self.new_vm, "the disks of a VM are not removed"
        self.step()
        self.clones -= effect.names

    def _start(self, _: Start) -> None:
        self.step()
        assert self.gate is None
        self.starts += 1
        self.power, self.started = PowerState.RUNNING, True

    def _let_go(self, _: LetGo) -> None:
        self.step()
        self.finalizer = False
        self.gone = self.deleting

    def _rest(self, effect: Rest) -> None:
        self.clock += effect.seconds or 0.0

    def settle(self, most: int = 300) -> None:
        """Turn until nothing is left to do."""
        for _ in range(most):
            if self.deleting and not self.finalizer:
                self.gone = True
                return
            try:
                effect = self.turn()
            except Crash:
                self.crash()
                continue
            if isinstance(effect, Rest) and effect.seconds is None:
                return
        raise AssertionError(f"no rest; last: {self.said[-1]}")

    def crash(self) -> None:
        """Lose what lay in the process."""
        self.broken, self.started, self.steps = None, False, None

    def bootable(self) -> bool:
        """Whether all disks are of one moment and the VM may be started."""
        return self.gate is None and len(set(self.disks.values())) == 1


CRASHES = st.lists(st.integers(0, 12), max_size=3)


def run(world: World, crashes: list[int]) -> None:
    for after in crashes:
        world.steps = after
        world.settle()
        world.crash()
    world.settle()


@given(CRASHES, st.booleans(), st.booleans())
def test_in_place_converges(crashes: list[int], safety: bool, start: bool) -> None:
    world = World(request=request(safety=safety, start_after=start))
    run(world, crashes)
    assert world.bootable()
    assert set(world.disks.values()) == {"snapshot"}
    assert {c.type: c.status for c in world.said[-1]}["Ready"] is True
    assert not world.finalizer
    assert world.starts >= (1 if start else 0)
    assert world.saved == (dict.fromkeys(DISKS, "now") if safety else {}), (
        "taken of what was, not of what was half done"
    )


@given(CRASHES, st.sampled_from(DISKS))
def test_a_disk_that_cannot_be_set_back_brings_all_back_to_the_safety_snapshot(crashes: list[int], bad: str) -> None:
    world = World(bad_disk=bad)
    run(world, crashes)
    assert world.bootable()
    assert set(world.disks.values()) == {"now"}
    told = {c.type: c for c in world.said[-1]}
    assert (told["Stalled"].status, told["Stalled"].reason) == (True, "SnapshotLost")
    assert not world.finalizer


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("bad", ["", "vdb"])
def test_a_vm_that_somebody_defines_anew_in_the_middle_is_never_called_untouched(
    started: bool, deleting: bool, bad: str
) -> None:
    """Off, it is gated again and comes to its end; while it runs, the truth is told. Whenever that happens, and twice."""
    met = 0
    for before in range(20):
        world = World(power=PowerState.SHUT_OFF, bad_disk=bad)
        for steps in (before, before // 2):
            world.steps = steps
            with contextlib.suppress(Crash):
                while not isinstance(world.turn(), Rest):
                    pass
            world.crash()
            begun, world.gate = world.gate is not None, None
        world.deleting = deleting
        if started:
            world.power = PowerState.RUNNING
        world.settle()
        told = {c.type: c for c in world.said[-1]}
        assert not world.finalizer
        if world.half_done:
            met += 1
            assert started, "else it is gated again"
            if not deleting:
                assert (told["VolumesRestored"].reason, told["Stalled"].status) == ("HalfDone", True)
                assert 'VMSnapshot "back-safety" with spec.safetySnapshot: false' in told["Stalled"].message
        else:
            met += begun
            assert world.bootable()
    assert met > 3


def test_without_a_safety_snapshot_it_stays_gated_and_is_not_called_an_end() -> None:
    world = World(request=request(safety=False), bad_disk="vdb")
    for _ in range(30):
        world.turn()
    assert world.gate is not None
    told = {c.type: c.status for c in world.said[-1]}
    assert (told["Reconciling"], told["Stalled"]) == (True, False)
    world.bad_disk = ""
    world.broken = None
    world.settle()
    assert world.bootable()


@given(CRASHES, st.integers(0, 15), st.booleans())
def test_deletion_at_any_moment_leaves_a_vm_that_boots(crashes: list[int], before: int, new: bool) -> None:
    world = World(request=request(new_name="copy" if new else ""))
    for _ in range(before):
        if isinstance(world.turn(), Rest):
            break
    world.deleting = True
    run(world, crashes)
    assert world.gone
    assert world.bootable()
    assert not world.clones, "either removed, or handed over to the VM"


@given(CRASHES, st.booleans())
def test_a_new_vm_leaves_the_old_one_alone(crashes: list[int], bad: bool) -> None:
    world = World(request=request(new_name="copy", stop_running=False, start_after=True), bad_disk="vda" if bad else "")
    run(world, crashes)
    assert set(world.disks.values()) == {"now"}
    told = {c.type: c.status for c in world.said[-1]}
    if bad:
        assert told["Stalled"] is True
    else:
        assert told["Ready"] is True
        assert world.new_vm
        assert world.starts >= 1
    assert not world.clones


def test_an_end_that_was_told_is_never_begun_anew() -> None:
    world = World()
    world.settle()
    world.done = None  # somebody defined the VM anew, without our markers
    world.power = PowerState.SHUT_OFF
    world.disks = dict.fromkeys(DISKS, "later")
    world.crash()
    world.settle()
    assert set(world.disks.values()) == {"later"}


def test_a_manifest_that_is_applied_again_after_a_rebuild_does_nothing() -> None:
    world = World(request=request(snapshot_uid="s1", start_after=True))
    world.done = replace(MARKER, restore_uid="before")
    world.settle()
    assert set(world.disks.values()) == {"now"}
    assert {c.type: c.reason for c in world.said[-1]}["Ready"] == "AlreadyRestored"
    assert world.starts == 0
    other = World(request=request())
    other.done = replace(MARKER, restore_uid="before")
    other.settle()
    assert set(other.disks.values()) == {"snapshot"}, (
        "without the snapshot's UID it cannot be told from another restore"
    )


@pytest.mark.parametrize("patience", list(Patience))
def test_refusals(patience: Patience) -> None:
    world = World(refusal=Refusal(reason="SnapshotNotReady", message="not yet", patience=patience))
    world.settle(most=4000)
    assert set(world.disks.values()) == {"now"}
    told = {c.type: c for c in world.said[-1]}
    assert told["Stalled"].status is True
    assert "not yet" in told["Stalled"].message


def test_a_safety_snapshot_that_fails_ends_it_before_anything_is_changed() -> None:
    world = World(safety_fails=True)
    world.settle()
    assert set(world.disks.values()) == {"now"}
    assert {c.type: c.reason for c in world.said[-1]}["Stalled"] == "SafetySnapshotFailed"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stopped": True}, "; the VM was shut down for this (spec.runningVM is Stop) and is off"),
        ({}, "; the VM was shut down for this if it ran (spec.runningVM is Stop) and is off"),
        ({"power": PowerState.RUNNING}, ""),
        ({"finalizer": False}, ""),
        ({"request": request(stop_running=False)}, ""),
    ],
)
def test_a_failure_says_that_the_vm_was_shut_down_for_it(changes: dict[str, Any], words: str) -> None:
    refusal = Refusal(reason="SnapshotLost", message="it is gone")
    seen = RestoreSeen(request=request(), finalizer=True, power=PowerState.SHUT_OFF, refusal=refusal)
    told = next_restore.decide(replace(seen, known_for=Seconds(60.0), **changes), b.CREATED).conditions
    assert {c.type: c.message for c in told}["Stalled"] == f"it is gone{words}"


def test_a_vm_that_was_started_after_its_safety_snapshot_is_not_stopped_again() -> None:
    world = World(finalizer=True, power=PowerState.SHUT_OFF)
    assert isinstance(world.turn(), TakeSafety)
    world.power, world.disks = PowerState.RUNNING, dict.fromkeys(DISKS, "later")
    world.settle()
    assert world.power is PowerState.RUNNING
    assert set(world.disks.values()) == {"later"}
    assert {c.type: c.reason for c in world.said[-1]}["Stalled"] == "SafetySnapshotFailed"
    assert not world.finalizer


@pytest.mark.parametrize("on_record", [True, False])
def test_an_end_that_somebody_else_wrote_waits_for_a_storage_that_does_not_answer(on_record: bool) -> None:
    """On record or not: without a record the drivers of all classes are asked."""
    told = World(request=request(new_name="copy"))
    told.settle()
    world = World(request=request(new_name="copy"), finalizer=True, clones={"clone"}, ended=told.ended)
    seen = replace(world.see(), held=None, record=records.example() if on_record else None)
    effect = next_restore.decide(seen, b.CREATED).effect
    assert isinstance(effect, Rest)
    assert effect != Rest(), "it looks again"


@pytest.mark.parametrize("defined", [True, False])
def test_an_end_that_somebody_else_wrote_leaves_no_clones(defined: bool) -> None:
    """A tenant may write into a status: what is on storage is the new VM's, or nobody's, all the same."""
    world = World(request=request(new_name="copy"), finalizer=True, clones={"clone"})
    if defined:
        world.new_vm, world.done, world.power = True, MARKER, PowerState.SHUT_OFF
    told = World(request=request(new_name="copy"))
    told.settle()
    world.ended = told.ended
    world.settle()
    assert world.new_vm is defined
    assert not world.clones
    assert not world.finalizer


# --- where nobody can look --------------------------------------------------------------------------------------------------

UNSEEN = RestoreSeen(request=request(), finalizer=True, problem="it does not answer", known_for=Seconds(60.0))


def told_of(seen: RestoreSeen, seconds: float = 0.0) -> tuple[RestoreEffect, dict[str, Condition]]:
    made = next_restore.decide(seen, b.at(seconds))
    return made.effect, {c.type: c for c in made.conditions}


def test_what_was_never_begun_comes_to_its_end_without_its_hypervisor() -> None:
    gone = replace(UNSEEN, no_hypervisor=True)
    assert isinstance(told_of(gone)[0], Rest)
    assert isinstance(told_of(replace(gone, deleting=True))[0], LetGo)
    effect, told = told_of(gone, 7200)
    assert isinstance(effect, LetGo)
    assert (told["Stalled"].status, told["Stalled"].reason) == (True, "DeadlineExceeded")
    assert "it does not answer" in told["Stalled"].message


@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 7200.0])
def test_what_may_be_half_done_waits_for_a_hypervisor_that_is_gone(deleting: bool, seconds: float) -> None:
    effect, told = told_of(replace(UNSEEN, begun=True, no_hypervisor=True, deleting=deleting), seconds)
    assert isinstance(effect, Rest)
    assert effect != Rest()
    assert told["Stalled"].status is False
    assert "create the Hypervisor again" in told["Reconciling"].message


@pytest.mark.parametrize("deleting", [False, True])
def test_a_hypervisor_that_only_does_not_answer_is_waited_for(deleting: bool) -> None:
    """Status alone says that nothing was begun; whoever answers again says it better."""
    effect, told = told_of(replace(UNSEEN, deleting=deleting), 7200)
    assert isinstance(effect, Rest)
    assert told["Reconciling"].reason == "HypervisorUnreachable"


@pytest.mark.parametrize(("held", "end"), [(frozenset(), LetGo), (frozenset({"clone"}), Rest), (None, Rest)])
def test_a_new_vm_that_nobody_can_look_at_ends_once_storage_holds_nothing(
    held: frozenset[str] | None, end: type[RestoreEffect]
) -> None:
    seen = replace(UNSEEN, request=request(new_name="copy"), begun=True, no_hypervisor=True, deleting=True, held=held)
    assert isinstance(told_of(seen)[0], end), "clones may be the disks of a VM that is defined"


@pytest.mark.parametrize("finalizer", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"problem": "it is being connected to"}, {"leader": False}, {"retry_in": Seconds(5.0)}],
    ids=lambda c: next(iter(c)),
)
def test_an_end_stays_told_whatever_is_waited_for(changes: dict[str, Any], finalizer: bool) -> None:
    """An operator that starts does not reach the hypervisor yet: what has ended must not be begun anew for that."""
    done = World()
    done.settle()
    seen = RestoreSeen(request=request(), ended=done.ended, begun=True, finalizer=finalizer)
    effect, _ = told_of(replace(seen, **changes))
    assert isinstance(effect, Rest)
    assert next_restore.decide(replace(seen, **changes), b.CREATED).conditions == done.ended


@pytest.mark.parametrize("power", [p for p in PowerState if p is not PowerState.RUNNING])
@pytest.mark.parametrize("new", [False, True])
def test_it_is_not_ready_while_the_vm_that_was_started_does_not_run(power: PowerState, new: bool) -> None:
    asked = request(start_after=True, new_name="copy" if new else "")
    seen = RestoreSeen(
        request=asked, finalizer=True, marker=MARKER, done=MARKER, power=power, started=True, held=frozenset()
    )
    effect, told = told_of(seen)
    assert effect == Rest(Seconds(1.0))
    assert (told["Ready"].status, told["Reconciling"].reason) == (None, "VMStopped")
    effect, told = told_of(seen, 7200)
    assert isinstance(effect, LetGo)
    assert (told["Ready"].status, told["Stalled"].reason, told["VolumesRestored"].status) == (False, "VMStopped", True)
    assert f"it is {power}" in told["Stalled"].message
    assert told_of(replace(seen, power=PowerState.RUNNING))[1]["Ready"].status is True


# --- the gate without a record --------------------------------------------------------------------------------------------

GATED = RestoreSeen(
    request=request(),
    finalizer=True,
    begun=True,
    marker=MARKER,
    gate=Gate(marker=MARKER, targets=DISKS, autostart=False),
    refusal=Refusal(reason="SnapshotNotFound", message="there is no VMSnapshot"),
    power=PowerState.SHUT_OFF,
    known_for=Seconds(60.0),
)


@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("patience", list(Patience))
def test_a_gate_without_a_record_is_opened_onto_the_safety_snapshot(deleting: bool, patience: Patience) -> None:
    refusal = Refusal(reason="SnapshotNotReady", message="not Ready", patience=patience)
    effect, _ = told_of(replace(GATED, refusal=refusal, safety=Safety.READY, deleting=deleting))
    assert isinstance(effect, GoBack)


@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 7200.0])
@pytest.mark.parametrize("safety", [Safety.NONE, Safety.TAKING, Safety.FAILED])
def test_a_gate_with_neither_record_nor_safety_snapshot_is_never_let_go(
    safety: Safety, seconds: float, deleting: bool
) -> None:
    seen = replace(GATED, safety=safety, safety_name="back-safety", safety_message="its storage is gone")
    effect, told = told_of(replace(seen, deleting=deleting), seconds)
    assert isinstance(effect, Rest)
    assert effect != Rest(), "it looks again"
    assert told["Reconciling"].reason == "Blocked"
    assert told["VolumesRestored"].reason == "HalfDone"
    assert "there is no VMSnapshot" in told["Reconciling"].message
    assert "VMSnapshotContent back" in told["Reconciling"].message
    assert ("its storage is gone" in told["Reconciling"].message) is (safety is not Safety.NONE)


def test_a_gate_of_a_vm_that_the_namespace_may_not_use_any_more_asks_for_access() -> None:
    refusal = Refusal(reason="DomainNotFound", message="has no domain that the namespace may snapshot")
    broken = Failure(reason=refusal.reason, message=refusal.message)
    seen = replace(GATED, refusal=refusal, broken=broken, record=records.example())
    effect, told = told_of(seen)
    assert isinstance(effect, Rest)
    assert told["Reconciling"].reason == "Blocked"
    assert "spec.access of the Hypervisor" in told["Reconciling"].message
    assert "VMSnapshotContent" not in told["Reconciling"].message


# --- the guest that was started ---------------------------------------------------------------------------------------------

DONE = RestoreSeen(
    request=request(start_after=True),
    finalizer=True,
    begun=True,
    marker=MARKER,
    done=MARKER,
    power=PowerState.RUNNING,
    started=True,
)


@pytest.mark.parametrize("answers", [True, None])
def test_a_guest_whose_agent_answers_or_that_has_none_is_ready(answers: bool | None) -> None:
    effect, told = told_of(replace(DONE, agent_answers=answers))
    assert isinstance(effect, LetGo)
    assert told["Ready"].status is True


def test_an_agent_that_does_not_answer_is_waited_for_and_then_told() -> None:
    silent = replace(DONE, agent_answers=False)
    effect, told = told_of(silent)
    assert isinstance(effect, Rest)
    assert effect != Rest(), "it looks again"
    assert (told["Ready"].status, told["Reconciling"].reason) == (None, "WaitingForAgent")
    effect, told = told_of(silent, 7200.0)
    assert isinstance(effect, LetGo)
    assert (told["Ready"].status, told["Stalled"].reason) == (False, "AgentSilent")
    assert told["VolumesRestored"].status is True, "what was done stays told"
    assert "the disks are restored and the VM was started" in told["Stalled"].message


def test_a_vm_that_is_to_stay_off_asks_no_agent() -> None:
    effect, told = told_of(replace(DONE, request=request(), started=False, power=PowerState.SHUT_OFF))
    assert isinstance(effect, LetGo)
    assert told["Ready"].status is True


@pytest.mark.parametrize(
    ("seen", "result"),
    [
        (DONE, "Restored"),
        (replace(DONE, request=request(new_name="copy"), held=frozenset()), "Cloned"),
        (GATED, "Restoring"),
        (replace(GATED, gate=None), "Pending"),
        (replace(GATED, gate=None, problem="it does not answer"), "Restoring"),
        (replace(GATED, gate=None, told_half_done=True, known_for=Seconds(1.0)), "Restoring"),
    ],
)
def test_what_became_of_each_disk_is_told_also_when_there_is_no_plan_any_more(seen: RestoreSeen, result: str) -> None:
    """Once all is done nothing is planned; nor is it where the snapshot is gone. Where nobody can look, it is as it was told."""
    old = {"volumes": [{"target": "vda", "className": "files", "result": "Restoring"}]}
    told = restore_report.status(seen, next_restore.decide(seen, b.CREATED), old, b.CREATED)
    assert told["volumes"] == [{"target": "vda", "className": "files", "result": result}]


HALF_DONE = replace(GATED, gate=None, told_half_done=True, record=records.example(), safety_name="back-safety")
BUSY = Refusal(reason="StorageUnavailable", message="its driver is not up yet", patience=Patience.WAIT)
NO_VM = Refusal(reason="DomainNotFound", message="no such domain")


def test_disks_that_are_left_half_done_are_not_called_pending() -> None:
    seen = replace(HALF_DONE, power=PowerState.RUNNING, plan=PLAN, refusal=None)
    old = {"volumes": [{"target": "vda", "className": "files", "result": "Restoring"}]}
    told = restore_report.status(replace(seen, plan=None), next_restore.decide(seen, b.CREATED), old, b.CREATED)
    (volume,) = told["volumes"]
    assert (volume["result"], "neither old nor new" in volume["message"]) == ("Failed", True)


@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("power", [PowerState.SHUT_OFF, PowerState.RUNNING])
@pytest.mark.parametrize("plan", [PLAN, None])
def test_no_gate_is_closed_again_once_another_restore_had_the_disks(
    deleting: bool, power: PowerState, plan: RestorePlan | None
) -> None:
    """What that one has set back, and what the VM wrote after it, would be lost."""
    in_use_by = "" if plan is not None else "VMRestore team-a/b has begun"
    seen = replace(HALF_DONE, deleting=deleting, power=power, plan=plan, refusal=None, in_use_by=in_use_by)
    if power is PowerState.SHUT_OFF:
        assert isinstance(told_of(seen)[0], CloseGate if plan is not None else Rest)
    effect, told = told_of(replace(seen, overtaken_by="team-a/b"))
    assert isinstance(effect, LetGo)
    assert told["VolumesRestored"].reason == "HalfDone"
    if not deleting:
        assert (told["Stalled"].status, told["Stalled"].reason) == (True, "HalfDone")
        assert "VMRestore team-a/b has had them since" in told["Stalled"].message
        assert "can be started" not in told["VMDefined"].message


@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"refusal": BUSY}, 0.0),
        ({"refusal": None}, 0.0),
        ({"refusal": NO_VM, "power": None}, 0.0),
        ({"refusal": NO_VM, "power": None, "known_for": Seconds(0.1)}, 7200.0),
        ({"refusal": BUSY, "known_for": Seconds(0.1)}, 7200.0),
    ],
    ids=["driver", "nothing", "missing", "missing when it starts", "driver when it starts"],
)
def test_what_is_half_done_is_not_let_go_for_what_may_pass(
    changes: dict[str, Any], seconds: float, deleting: bool
) -> None:
    """Whoever likes can start it, and by the next moment it could be gated again."""
    seen = replace(HALF_DONE, deleting=deleting, **changes)
    effect, told = told_of(seen, seconds)
    assert effect == Rest(Seconds(1.0))
    assert (told["VolumesRestored"].reason, told["Reconciling"].status) == ("HalfDone", True)
    effect, told = told_of(replace(seen, known_for=Seconds(60.0)), 7200.0)
    assert isinstance(effect, LetGo), "not for ever"
    assert deleting or told["Stalled"].reason == "HalfDone"


def test_one_that_is_off_is_not_to_be_shut_down() -> None:
    effect, told = told_of(HALF_DONE)
    assert isinstance(effect, LetGo)
    assert "leave it off, and create a VMRestore" in told["Stalled"].message
    assert "shut it down" not in told["Stalled"].message
    message = told_of(replace(HALF_DONE, power=PowerState.RUNNING))[1]["Stalled"].message
    assert "shut it down, and create a VMRestore" in message
    assert "is off" not in message


@pytest.mark.parametrize("changes", [{"plan": PLAN, "refusal": None}, {}], ids=["forwards", "back"])
@pytest.mark.parametrize("power", [p for p in PowerState if p is not PowerState.SHUT_OFF])
@pytest.mark.parametrize("deleting", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 7200.0])
def test_nothing_is_set_back_beneath_a_vm_that_runs_although_it_is_gated(
    changes: dict[str, Any], power: PowerState, deleting: bool, seconds: float
) -> None:
    seen = replace(GATED, safety=Safety.READY, deleting=deleting, **changes)
    assert isinstance(told_of(seen, seconds)[0], Revert | GoBack)
    effect, told = told_of(replace(seen, power=power), seconds)
    assert effect == Rest(Seconds(1.0))
    assert told["Reconciling"].reason == "VMRunning"
    assert "shut it down" in told["Reconciling"].message


def test_a_finalizer_that_was_taken_away_while_the_gate_is_closed_is_put_on_again() -> None:
    seen = replace(GATED, finalizer=False, safety=Safety.READY)
    assert isinstance(told_of(seen)[0], Claim)
    assert isinstance(told_of(replace(seen, deleting=True))[0], GoBack), "it cannot be put on any more"
