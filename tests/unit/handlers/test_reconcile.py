"""What is told of a VMSnapshot, and when: a write for each decision that somebody may have to wait for, none for the others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.effects import (
    Condition,
    Decision,
    Effect,
    Failure,
    Observation,
    Record,
    RollBack,
    Settle,
    Wait,
)
from vmsnapshot_operator.core.planning import Request
from vmsnapshot_operator.core.restoring import (
    Clone,
    GoBack,
    RestoreDecision,
    RestoreEffect,
    RestoreRequest,
    RestoreSeen,
    Revert,
    Start,
    Stop,
)
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    DriverError,
    HypervisorError,
    HypervisorUnreachableError,
    RefusedError,
    SnapshotError,
)
from vmsnapshot_operator.handlers import reconcile, restores
from vmsnapshot_operator.handlers.reconcile import TELL_EVERY, Reconciler
from vmsnapshot_operator.handlers.restores import Restores
from vmsnapshot_operator.strategies.restore_gather import Memory
from vmsnapshot_operator.strategies.window import LEASE_MARGIN
from vmsnapshot_operator.strategies.world import World

pytestmark = pytest.mark.looptime

REQUEST: Request = b.request()
BODY = {
    "apiVersion": "vmsnapshot.io/v1alpha1",
    "kind": "VMSnapshot",
    "metadata": {"namespace": REQUEST.namespace, "name": REQUEST.name, "uid": REQUEST.uid},
}


REFUSALS = ("DomainNotFound", "ClassTie")


@dataclass
class Script:
    """A strategy that decides what it is told to, one effect after the other; each takes so many seconds."""

    effects: list[tuple[Effect, str]]
    seconds: float = 0.0
    done: list[Effect] = field(default_factory=list)

    def decide(self, _seen: Observation, _now: datetime) -> Decision:
        effect, reason = self.effects[len(self.done)]
        told = Condition(type="Reconciling", status=True, reason=reason)
        stalled = Condition(type="Stalled", status=reason in REFUSALS, reason=reason, message="said so")
        return Decision(effect=effect, conditions=(told, stalled))

    async def apply(self, effect: Effect, _seen: Observation, _body: Mapping[str, Any]) -> None:
        await asyncio.sleep(self.seconds)
        self.done.append(effect)


class Stage:
    """A reconciler, and what it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: Script) -> None:
        self.world: World = fakes.world(installation=b.INSTALLATION)
        self.cluster = cast("fakes.FakeCluster", self.world.cluster)
        self.cluster.snapshots[REQUEST.namespace, REQUEST.name] = dict(BODY)
        clock = type("Clock", (), {"now": staticmethod(lambda: b.CREATED)})
        cast("Any", self.cluster).client = type("Client", (), {"clock": clock})

        self.record: Record | None = None

        async def gather(_world: World, _body: Mapping[str, Any]) -> Observation:
            return Observation(request=REQUEST, record=self.record)

        monkeypatch.setattr(reconcile, "gather", gather)
        monkeypatch.setattr(reconcile, "choose", lambda *_: script)
        self.woken = asyncio.Event()
        self.reconciler = Reconciler(self.world, lambda *_: self.woken.set())

    async def look(self) -> None:
        self.woken.clear()
        await self.reconciler.reconcile(REQUEST.namespace, REQUEST.name, REQUEST.uid)

    def written(self) -> None:
        """Have the next look find the status that was written last."""
        _, status = self.cluster.statuses[-1]
        self.cluster.snapshots[REQUEST.namespace, REQUEST.name] = {**BODY, "status": status}

    @property
    def events(self) -> list[str]:
        return cast("fakes.FakeEvents", self.world.events).posted

    @property
    def told(self) -> list[str]:
        """The reasons that were written."""
        return [status["conditions"][0]["reason"] for _, status in self.cluster.statuses]


@pytest.mark.parametrize(("at_once", "told"), [(True, ["Ready"]), (False, ["Settling", "Ready"])])
async def test_what_ends_at_once_is_not_told_before(
    monkeypatch: pytest.MonkeyPatch, at_once: bool, told: list[str]
) -> None:
    stage = Stage(monkeypatch, Script([(Settle({}, at_once), "Settling"), (Wait(), "Ready")]))
    await stage.look()
    await stage.woken.wait()
    await stage.look()
    assert stage.told == told


async def test_what_was_to_end_at_once_and_does_not_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, Script([(Settle({}, True), "Settling"), (Wait(), "Ready")], seconds=4 * TELL_EVERY))
    await stage.look()
    await stage.woken.wait()
    assert stage.told == ["Settling"]
    await stage.look()
    assert stage.told == ["Settling", "Ready"]


async def test_nothing_is_begun_once_another_instance_may_be_about_to_take_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = Script([(Settle({}, True), "Settling")])
    stage = Stage(monkeypatch, script)
    leadership = cast("fakes.FakeLeadership", stage.world.leadership)
    leadership.left = LEASE_MARGIN
    assert await stage.reconciler.reconcile(REQUEST.namespace, REQUEST.name, REQUEST.uid) == reconcile.STANDBY_SECONDS
    restores = Restores(stage.world, lambda *_: None)
    assert await restores.reconcile("ns", "back", "uid") == reconcile.STANDBY_SECONDS
    assert (script.done, stage.told) == ([], [])


async def test_a_refusal_is_an_event_once(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script([(Wait(), "DomainNotFound")])
    stage = Stage(monkeypatch, script)
    await stage.look()
    assert stage.events == ["DomainNotFound: said so"]
    stage.written()
    script.effects = [(Wait(), "ClassTie")]  # as an instance that has just started would see it
    await stage.look()
    assert stage.told == ["DomainNotFound", "ClassTie"]
    assert stage.events == ["DomainNotFound: said so"], "it was refused, and everybody knows"


async def test_what_failed_after_it_began_has_had_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, Script([(Wait(), "ClassTie")]))
    stage.record = Record(name="c", attempt=1, plan=b.plan(), groups={})
    await stage.look()
    assert (stage.told, stage.events) == (["ClassTie"], [])


# --- an object that was taken away by force while something is under way ---------------------------------------------------


@pytest.mark.parametrize(("effect", "ends"), [(Settle({}, False), "Cancelled"), (RollBack({}), "Done")])
async def test_no_worker_waits_for_a_snapshot_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, effect: Effect, ends: str
) -> None:
    script = Script([(effect, "Settling")], seconds=300.0)
    stage = Stage(monkeypatch, script)
    await stage.look()
    await asyncio.sleep(1)
    stage.cluster.snapshots.clear()
    stage.world.claims["vm"] = REQUEST.uid
    start = asyncio.get_running_loop().time()
    await stage.look()
    assert asyncio.get_running_loop().time() == start
    assert stage.world.claims, "the VM is still being worked on"
    await stage.woken.wait()
    assert script.done == ([effect] if ends == "Done" else [])
    await stage.look()
    assert not stage.world.claims
    assert not stage.world.memories


@pytest.mark.parametrize(
    ("effect", "ends"),
    [
        (Clone(()), "Cancelled"),
        (Stop(), "Cancelled"),
        (Start(), "Cancelled"),
        (Revert(()), "Done"),
        (GoBack(Failure(reason="SnapshotLost", message="")), "Done"),
    ],
)
async def test_no_worker_waits_for_a_restore_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, effect: RestoreEffect, ends: str
) -> None:
    """What nobody wants any more is cancelled: no VM is defined for nobody. What is half done is brought to its end."""
    stage = Stage(monkeypatch, Script([]))
    done: list[RestoreEffect] = []
    request = RestoreRequest(uid="r1", namespace="ns", name="back", generation=1, created=b.CREATED, snapshot="snap")

    async def gather(*_: object) -> RestoreSeen:
        return RestoreSeen(request=request)

    async def apply(_world: World, given: RestoreEffect, *_: object) -> None:
        await asyncio.sleep(300.0)
        done.append(given)

    conditions = tuple(Condition(type=t, status=None, reason="Cloning") for t in ("Ready", "Reconciling", "Stalled"))
    monkeypatch.setattr(restores.restore_gather, "gather", gather)
    monkeypatch.setattr(restores.restore_apply, "apply", apply)
    monkeypatch.setattr(restores, "decide", lambda *_: RestoreDecision(effect=effect, conditions=conditions))
    stage.cluster.restores["ns", "back"] = {"kind": "VMRestore", "metadata": {"uid": "r1", "name": "back"}}
    driven = Restores(stage.world, lambda *_: stage.woken.set())
    await driven.reconcile("ns", "back", "r1")
    await asyncio.sleep(1)
    stage.cluster.restores.clear()
    stage.world.claims["vm"] = "r1"
    start = asyncio.get_running_loop().time()
    await driven.reconcile("ns", "back", "r1")
    assert asyncio.get_running_loop().time() == start
    assert stage.world.claims
    await stage.woken.wait()
    assert done == ([effect] if ends == "Done" else [])
    await driven.reconcile("ns", "back", "r1")
    assert not stage.world.claims


@pytest.mark.parametrize(
    ("effect", "error", "final"),
    [
        (Clone(()), RefusedError("nobody can tell what it shares", reason="DefinitionUnusable"), True),
        (Clone(()), HypervisorError("there is one", reason="NameTaken"), True),
        (Clone(()), HypervisorUnreachableError("it does not answer"), False),
        (Clone(()), DriverError("no room", reason="NoSpace"), True),
        (Clone(()), DriverError("it is starting", retryable=True), False),
        (Revert(()), DriverError("it is gone", reason="SnapshotLost"), True),
        (Revert(()), DriverError("somebody looks at it", reason="InUse", retryable=True), False),
        (Revert(()), RefusedError("disk vdb was removed: plug it in again", reason="DefinitionUnusable"), False),
    ],
)
async def test_what_no_retry_can_help_is_not_tried_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch, effect: RestoreEffect, error: SnapshotError, final: bool
) -> None:
    request = RestoreRequest(uid="r1", namespace="ns", name="back", generation=1, created=b.CREATED, snapshot="snap")

    async def apply(*_: object) -> None:
        raise error

    monkeypatch.setattr(restores.restore_apply, "apply", apply)
    memory = Memory(since=Seconds(0.0))
    driven = Restores(fakes.world(installation="abc234"), lambda *_: None)
    await driven._apply(effect, RestoreSeen(request=request), {}, memory)
    assert (memory.broken.reason if memory.broken is not None else "") == (error.reason if final else "")
    assert memory.trouble == error.message
