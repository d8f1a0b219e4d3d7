"""A small model of the world in which `decide` is tried: a VM, a storage, a content, and a process that may die anywhere.

Each effect is performed step by step. A crash may come before any step: what lies in the process is lost, the world stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.unit.plan import builders as b
from vmsnapshot_operator.core import effects as e
from vmsnapshot_operator.core.chains import BlockJob, Chains, DiskChain, Overlaid
from vmsnapshot_operator.core.driver import CutResult, Fit, Hold
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Method, Plan, Refusal, Request
from vmsnapshot_operator.core.volumes import Handle, Seconds
from vmsnapshot_operator.plan import collapse, next_effect


class Crash(Exception):  # noqa: N818 - what it is
    """The process died."""


@dataclass(slots=True)
class World:
    """`budget_of_steps`: steps until the process dies; None: it lives on. `bad_cut`: a class whose cut fails. `guarded`: a
    guardian frees the VM when the process dies; else it stands still until somebody recovers it.
    """

    request: Request = field(default_factory=b.request)
    plan: Plan | Refusal = field(default_factory=b.plan)
    clock: float = 0.0
    # the world
    frozen: bool = False
    journal: Journal | None = None
    held: dict[str, set[str]] = field(default_factory=dict)
    record: e.Record | None = None
    finalizer: bool = False
    guarded: bool = False
    refused: e.Failure | None = None
    gone: bool = False
    deleting: bool = False
    storage_answers: bool = True
    bad_cut: str = ""
    bad_freeze: bool = False
    early_thaw: bool = False
    hold: Hold = Hold.NOTHING
    off: bool = False
    base: str = "as at the switch"
    overlay: str = (
        ""  # "made", "on" (the VM writes to it), "committing", "left" (after the pivot), or it does not exist
    )
    copied_from: list[str] = field(default_factory=list)
    by_job: str = ""  # the class whose disks the hypervisor copies
    job: str = ""  # "running", "over", or none was begun
    job_ends_with_the_process: bool = False
    marked: set[str] = field(default_factory=set)
    # what was seen, for judging
    freezes: dict[int, int] = field(default_factory=dict)
    thaws: dict[str, int] = field(default_factory=dict)
    deaths: dict[str, int] = field(default_factory=dict)
    still_at_cut: dict[str, bool] = field(default_factory=dict)
    said: list[tuple[e.Condition, ...]] = field(default_factory=list)
    # the process
    prepared: int | None = None
    outcome: WindowOutcome | None = None
    agent_failed: str = ""
    listening: bool = False
    broken: e.Failure | None = None
    trouble: bool = False
    budget_of_steps: int | None = None
    dies_again: int | None = None

    def step(self) -> None:
        """One moment at which the process may die."""
        if self.budget_of_steps is not None:
            if self.budget_of_steps == 0:
                raise Crash
            self.budget_of_steps -= 1
        self.clock += 0.01

    def crash(self) -> None:
        """Lose what lay in the process; a guardian, if there is one, frees the VM."""
        self.prepared = self.outcome = None
        self.agent_failed = ""
        self.listening, self.broken = False, None
        if self.job == "running" and self.job_ends_with_the_process:
            self.job = "over"
        if self.journal is not None:
            self.deaths[self.journal.nonce] = self.deaths.get(self.journal.nonce, 0) + 1
        self.frozen = self.frozen and not self.guarded
        self.budget_of_steps = self.dies_again

    def thaw(self) -> None:
        """Free the VM, for the sake of the journal that is in it."""
        assert self.journal is not None, "no journal says that it is ours to free"
        self.thaws[self.journal.nonce] = self.thaws.get(self.journal.nonce, 0) + 1
        self.frozen = False

    def gather(self) -> e.Observation:
        """Look, as the operator does."""
        record = self.record
        planning = (
            not self.deleting
            and self.refused is None
            and (record is None or (record.outcome is None and record.failure is None))
        )
        made = self._replanned() if planning and self.journal is None else None
        untried = record is not None and self.prepared == record.attempt
        pending = record is not None and record.outcome is None and record.failure is None
        asked = self.deleting or (record is not None and record.failure is not None) or (pending and not untried)
        held = {c: frozenset(n) for c, n in self.held.items()}
        return e.Observation(
            request=self.request,
            deleting=self.deleting,
            finalizer=self.finalizer,
            refused=self.refused if record is None else None,
            known_for=Seconds(self.clock),
            plan=made if isinstance(made, Plan) else None,
            refusal=made if isinstance(made, Refusal) else None,
            record=record,
            journal=self.journal,
            overlays=collapse.judge(self.journal, self._overlaid()) if self.journal is not None else (),
            held=held if asked and self.storage_answers else ({} if asked else None),
            unlisted={} if self.storage_answers or not asked else {"ceph": "it does not answer"},
            prepared=self.prepared,
            outcome=self.outcome,
            broken=self.broken,
            guardian=Fit(ok=True, reason="Ready"),
        )

    def _replanned(self) -> Plan | Refusal:
        if isinstance(self.plan, Plan) and self.agent_failed:
            return b.planned(self.request, failed_before=self.agent_failed)
        return self.plan

    def _overlaid(self) -> Overlaid:
        """What can be seen of the one overlay that stands for all."""
        on = self.overlay in ("on", "committing")
        chain = ("overlay", "base") if on else ("base",)
        job = BlockJob(commit=True, ready=True) if self.overlay == "committing" and not self.off else None
        return Overlaid(
            chains=Chains(
                run_id=7,
                power=PowerState.SHUT_OFF if self.off else PowerState.RUNNING,
                disks=(DiskChain(target="vda", live=() if self.off else chain, saved=chain[:1], job=job),),
            ),
            fingerprints={"volume": self.base},
            pristine=frozenset({"volume"}) if self.overlay == "made" else frozenset(),
            missing=frozenset({"volume"}) if not self.overlay else frozenset(),
            on_base=frozenset({"volume"}) if not on and not self.off else frozenset(),
        )

    def names_of(self, attempt: int) -> list[str]:
        """What an attempt's groups are called."""
        assert isinstance(self.plan, Plan)
        requests = next_effect.requests_for(self.plan, b.INSTALLATION, self.request.uid, attempt)
        return [requests["ceph"].name] if "ceph" in requests else [r.name for r in requests.values()]

    def turn(self) -> e.Effect:
        """Gather, decide, tell, apply."""
        seen = self.gather()
        decision = next_effect.decide(seen, b.at(self.clock), installation=b.INSTALLATION)
        self.said.append(decision.conditions)
        told = {c.type: c for c in decision.conditions}
        if self.record is None and told["Stalled"].status and told["Planned"].status is False:
            self.refused = e.Failure(reason=told["Planned"].reason, message=told["Planned"].message)
        self._apply(decision.effect, seen)
        return decision.effect

    def _apply(self, effect: e.Effect, seen: e.Observation) -> None:
        handlers: dict[type, Callable[[Any, e.Observation], None]] = {
            e.Recover: self._recover,
            e.Collapse: self._collapse,
            e.Adopt: self._adopt,
            e.Prepare: self._prepare,
            e.TakeWindow: self._window,
            e.Keep: self._keep,
            e.Amend: self._amend,
            e.Settle: self._settle,
            e.RollBack: self._roll_back,
            e.Fail: self._fail,
            e.DropContent: self._drop,
            e.Forget: self._forget,
            e.Wait: self._wait,
        }
        handlers[type(effect)](effect, seen)

    def _wait(self, effect: e.Wait, _seen: e.Observation) -> None:
        self.clock += effect.seconds if effect.seconds is not None else 0.0
        self.prepared = None  # whoever waits holds no driver process

    def _recover(self, _effect: e.Recover, _seen: e.Observation) -> None:
        self.step()
        self.thaw()
        self.step()
        if self.overlay == "on":
            assert self.journal is not None
            self.journal = replace(self.journal, phase=Phase.OVERLAID)
            return
        self.journal = None
        self.overlay = ""

    def _collapse(self, effect: e.Collapse, seen: e.Observation) -> None:
        assert self.journal is not None
        for ruling in seen.overlays:
            if ruling.move in (collapse.Move.COMMIT, collapse.Move.PIVOT):
                self.step()
                self.journal = replace(self.journal, phase=Phase.COLLAPSING, begun=("volume",))
                self.step()
                self.overlay = "committing"
                self.base = "committed onto"
                self.step()
                self.overlay = "left"
                self.step()
                self.journal = replace(self.journal, pivoted=("volume",))
            if ruling.move is not collapse.Move.KEEP:
                self.step()
                assert self.overlay in ("left", "made", ""), "an overlay that holds writes is never removed"
                self.overlay = ""
        self.step()
        self.journal = None

    def _adopt(self, _effect: e.Adopt, _seen: e.Observation) -> None:
        self.step()
        self.finalizer = True

    def _prepare(self, effect: e.Prepare, seen: e.Observation) -> None:
        assert self.record is None or effect.attempt > self.record.attempt, "an attempt's names are used once"
        assert self.finalizer, "nothing is written before the finalizer is there"
        self.outcome = None
        self.step()
        groups = {
            g.class_name: e.RecordedGroup(
                class_name=g.class_name,
                driver=g.driver,
                parameters=g.parameters,
                secret_name=g.secret_name,
                request=effect.requests[g.class_name],
            )
            for g in effect.plan.groups
        }
        self.record = e.Record(name="content", attempt=effect.attempt, plan=effect.plan, groups=groups)
        if self.by_job:
            self.step()
            self.held.setdefault(self.by_job, set()).add(effect.requests[self.by_job].name)
        self.step()
        self.prepared = effect.attempt

    def _window(self, effect: e.TakeWindow, _seen: e.Observation) -> None:
        self.prepared = None
        assert self.journal is None
        assert not self.frozen, "a VM that still stands still is not made to stand still again"
        self.step()
        self.journal = Journal(
            installation=b.INSTALLATION,
            owner_uid=b.UID,
            nonce=f"{effect.attempt:032x}",
            attempt=effect.attempt,
            method="GuestAgent",
            budget=30,
        )
        self.step()
        method = effect.plan.quiesce.method
        if method == Method.HYPERVISOR_SNAPSHOT:
            self._switch(effect)
            return
        self.freezes[effect.attempt] = self.freezes.get(effect.attempt, 0) + 1
        if self.bad_freeze and method == "GuestAgent":
            self.thaw()
            self.journal = None
            self.agent_failed = "the hook failed"
            self.outcome = self._outcome(effect, {}, reason="FreezeFailed", fallback=True)
            return
        self.frozen = True
        groups: dict[str, GroupOutcome] = {}
        failed = ""
        for name, request in effect.requests.items():
            self.step()
            if self.early_thaw:
                self.frozen = False
            if name == self.bad_cut:
                self.held.setdefault(name, set()).add(request.name)  # half done: deleting by name must find it
                failed = name
                break
            self.held.setdefault(name, set()).add(request.name)
            self.still_at_cut[request.name] = self.frozen
            if name == self.by_job:
                assert self.job != "running", "a domain has one job at a time"
                self.job, self.listening = "running", True
            handles = {v.id: Handle(request.name) for v in request.volumes}
            groups[name] = GroupOutcome(
                class_name=name,
                bracket=Bracket(start=Seconds(1.0), end=Seconds(2.0)),
                result=CutResult(handles=handles, atomic=False, hold=Hold.JOB if name == self.by_job else Hold.NOTHING),
            )
        self.step()
        freed_early = not self.frozen
        self.thaw()
        self.step()
        self.journal = None
        self.outcome = self._outcome(effect, groups, reason="DriverError" if failed else "", freed_early=freed_early)

    def _switch(self, effect: e.TakeWindow) -> None:
        assert self.journal is not None
        assert self.overlay in ("", "made"), "the VM is on its own disks when it is switched"
        self.journal = replace(self.journal, overlays={"volume": "overlay"}, run_id=7)
        self.overlay, self.base = "made", "as at the switch"
        self.freezes[effect.attempt] = self.freezes.get(effect.attempt, 0) + 1
        self.frozen = True
        self.step()
        self.overlay = "on"
        self.step()
        self.thaw()
        self.step()
        self.journal = replace(self.journal, phase=Phase.OVERLAID, bases={"volume": self.base})
        groups: dict[str, GroupOutcome] = {}
        failed = ""
        for name, request in effect.requests.items():
            self.step()
            self.held.setdefault(name, set()).add(request.name)
            if name == self.bad_cut:
                failed = name
                break
            self.still_at_cut[request.name] = True
            handles = {v.id: Handle(request.name) for v in request.volumes}
            groups[name] = GroupOutcome(
                class_name=name,
                bracket=Bracket(start=Seconds(1.0), end=Seconds(2.0)),
                result=CutResult(handles=handles, atomic=False, hold=self.hold),
            )
        self.outcome = self._outcome(effect, groups, reason="DriverError" if failed else "")

    def _outcome(
        self,
        effect: e.TakeWindow,
        groups: dict[str, GroupOutcome],
        *,
        reason: str = "",
        fallback: bool = False,
        freed_early: bool = False,
    ) -> WindowOutcome:
        plan = effect.plan
        every = {g.class_name: groups.get(g.class_name, GroupOutcome(class_name=g.class_name)) for g in plan.groups}
        evidence = Evidence(
            method=plan.quiesce.method,
            still_from=Seconds(0.5),
            still_until=Seconds(3.0),
            frozen=3,
            thawed=0 if freed_early else 3,
            freed_by_other=freed_early,
            covered=frozenset(v.volume.id for v in plan.volumes if v.covered),
            same_vm=True,
        )
        return WindowOutcome(
            attempt=effect.attempt,
            evidence=evidence,
            groups=every,
            free=True,
            fallback=fallback,
            reason=reason,
            message=reason,
        )

    def _keep(self, effect: e.Keep, seen: e.Observation) -> None:
        self.step()
        assert self.record is not None
        groups = {c: replace(g, result=effect.outcome.groups[c].result) for c, g in self.record.groups.items()}
        self.record = replace(self.record, groups=groups, outcome=effect.outcome, verdicts=effect.verdicts)
        self.outcome = None

    def _amend(self, _effect: e.Amend, seen: e.Observation) -> None:
        self.step()
        assert self.record is not None
        assert not _effect.collapsed or self.journal is None
        collapsed = _effect.collapsed or self.record.collapsed
        self.record = replace(self.record, retain=seen.request.retain, collapsed=collapsed)

    def _settle(self, _effect: e.Settle, _seen: e.Observation) -> None:
        self.step()
        if self.hold is Hold.BASE:
            assert self.journal is not None, "what is copied stands still"
            self.copied_from.append(self.base)
        assert self.record is not None
        if self.by_job and not self._finish_job(self.record.groups[self.by_job].request.name):
            return
        self.record = replace(self.record, ready=True)

    def _finish_job(self, name: str) -> bool:
        if name not in self.marked:
            if self.job != "running" and not self.listening:
                self.broken = e.Failure(reason="SnapshotLost", message="nobody was listening")
                return False
            self.listening = True
            self.step()
            self.job = "over"
            self.step()
            self.marked.add(name)
        self.step()
        return True

    def _roll_back(self, effect: e.RollBack, _seen: e.Observation) -> None:
        assert not self.frozen, "the VM is freed first"
        if self.by_job:
            self.step()
            self.job = ""
        for name, held in effect.names.items():
            for one in held:
                self.step()
                if self.storage_answers:
                    self.held[name].discard(one)
                    self.marked.discard(one)

    def _fail(self, effect: e.Fail, _seen: e.Observation) -> None:
        self.step()
        assert self.record is not None
        self.record = replace(self.record, failure=effect.failure, ready=False)
        self.outcome = self.broken = None

    def _drop(self, _effect: e.DropContent, _seen: e.Observation) -> None:
        self.step()
        self.record = None

    def _forget(self, _effect: e.Forget, _seen: e.Observation) -> None:
        self.step()
        self.finalizer = False
        self.gone = True

    def settle_down(self, most: int = 200) -> None:
        """Turn until nothing is left to do; a deletion without a finalizer is done by the API server."""
        for _ in range(most):
            if self.gone or (self.deleting and not self.finalizer):
                self.gone = True
                return
            try:
                effect = self.turn()
            except Crash:
                self.crash()
                continue
            if isinstance(effect, e.Wait) and effect.seconds is None:
                return
            if isinstance(effect, e.Wait) and not self.storage_answers:
                return
        raise AssertionError(f"no rest after {most} turns; last: {self.said[-1]}")

    @property
    def names_held(self) -> set[str]:
        """All that storage holds."""
        return {n for found in self.held.values() for n in found}
