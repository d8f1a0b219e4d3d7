"""The list of faults and the walk over it, without a laboratory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.chaos import cases, runner
from tests.chaos.annex import Annex
from tests.chaos.faults import FAULTS, At, Fault, NoEffectError, Scene, guest, operator
from tests.chaos.faults.base import FROZEN, TAKING, WINDOW, at
from tests.chaos.faults.neighbours import is_over
from tests.chaos.injector import Trap
from tests.stack import Stack
from vmsnapshot_operator.core.steps import Moment, Step

NAMED = {
    "another-installation",
    "six-agents-hung",
    "guest-migrated",
    "guest-migrated-and-back",
    "agent-answers-late",
    "agent-fails-at-thaw",
    "thawed-inside-the-guest",
    "ceph-group-left-incomplete",
    "ceph-fences-its-driver",
    "pool-refuses",
    "deletion-fails-twice",
    "guardian-killed-as-it-is-armed",
    "agent-fails-at-freeze",
    "all-thawed-inside-the-guest",
    "api-read-conflict",
    "api-read-times-out",
    "api-away-for-longer-than-the-lease",
    "driver-answer-lost",
    "one-group-fails-after-another",
    "cut-comes-after-the-window",
    "file-driver-crashed",
    "two-snapshots-and-a-deletion-at-once",
    "guest-started",
    "restore-deleted",
    "another-restore-of-the-vm",
    "removal-of-clones-fails-twice",
    "operator-stays-dead",
    "guest-saved",
    "pool-wholly-full",
    "finalizer-stripped",
    "content-deleted",
    "deleted-by-force",
    "watches-deaf",
    *(f"order-to-{what}-comes-late" for what in ("freeze", "switch", "begin-a-copy", "commit", "define")),
}
PARTS = ("lab", "stack", "proxy", "injector", "annex", "guest", "random")


def a_scene(**given: Any) -> Scene:
    """A scene with none of the parts but those that are given."""
    return Scene(**{part: cast("Any", None) for part in PARTS} | given)


SCENE = a_scene()


def test_every_fault_has_a_name_of_its_own() -> None:
    named = [f.name for f in FAULTS]
    assert len(named) == len(set(named))
    assert set(named) >= NAMED


def test_every_fault_is_met_somewhere_for_certain() -> None:
    known = set(cases.every())
    for fault in FAULTS:
        assert cases.Case(fault, *fault.sure) in known, fault.name
        assert {cases.instead(c) for c in known if c.fault is fault} == {cases.Case(fault, *fault.sure)}


def test_a_fault_is_met_only_where_it_can_be_done() -> None:
    for case in cases.every():
        assert case.fault.only is None or (case.step, case.at) in case.fault.only
    inside = {c for c in cases.every() if c.fault.name == "thawed-inside-the-guest"}
    agents = {c for c in cases.every() if c.fault.name.startswith("agent-")}
    assert Step.STOP in {c.step for c in agents}
    assert not {c.step for c in agents} & {Step.REVERT_DRIVER, Step.GO_BACK}, "the VM is off"
    assert {(c.step, c.at) for c in inside} == FROZEN


def test_places() -> None:
    assert at([Step.KEEP], [At.AFTER]) == {(Step.KEEP, At.AFTER)}
    assert len(at([Step.KEEP, Step.SETTLE])) == 2 * len(At)
    assert FROZEN < WINDOW < TAKING
    assert {a.moment for a in (At.BEFORE, At.DURING)} == {Moment.BEFORE}
    assert At.AFTER.moment is Moment.AFTER


class Struck:
    """A fault that notes what is called, and a trap that it is let out of."""

    def __init__(self, error: Exception | None = None) -> None:
        self.called: list[str] = []
        self.error = error
        self.trap = Trap(Step.KEEP, Moment.BEFORE)
        self.fault = Fault(name="it", strike=self._strike, heal=lambda _: self.called.append("heal"))

    def _strike(self, _: Scene) -> None:
        self.called.append("strike")
        if self.error is not None:
            raise self.error


def test_a_fault_is_healed_after_the_operator_went_on() -> None:
    struck = Struck()
    runner.hurt(struck.fault, SCENE, struck.trap)
    assert struck.called == ["strike", "heal"]
    assert struck.trap.going


def test_a_fault_is_held_no_longer_than_it_can_do_anything() -> None:
    struck = Struck()
    held = replace(struck.fault, hold=3600.0, over=lambda _: True)
    runner.hurt(held, SCENE, struck.trap)
    assert struck.called == ["strike", "heal"]


@pytest.mark.parametrize("error", [NoEffectError("nothing"), OSError("failed")])
def test_a_fault_that_did_nothing_is_healed_and_told(error: Exception) -> None:
    struck = Struck(error)
    with pytest.raises(type(error)):
        runner.hurt(struck.fault, SCENE, struck.trap)
    assert struck.called == ["strike", "heal"]


@pytest.mark.parametrize(
    ("changed", "permitted"),
    [
        ({}, 30 + 3 + 2 + 12),
        ({"budget": 5.0}, 5 + 3 + 2 + 12),
        ({"budget": 5.0, "others": ["x"]}, 30 + 3 + 2 + 12),
    ],
)
def test_how_long_a_guest_may_stand_still(changed: dict[str, Any], permitted: float) -> None:
    scene = a_scene(**changed)
    fault = Fault(name="it", strike=lambda _: None, hold=3.0)
    assert runner._permitted(fault, scene, 2.0) == permitted
    assert not list(runner.frozen_too_long("demo", round(permitted * 1000), permitted))
    (found,) = runner.frozen_too_long("demo", round(permitted * 1000) + 1, permitted)
    assert (found.kind, found.subject) == ("frozen", "guest demo")


@pytest.mark.parametrize("status", ["frozen", "thawed"])
@pytest.mark.parametrize("fault", ["operator-stays-dead", "guest-saved"])
def test_a_guest_that_nobody_frees_is_told(fault: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        name = "demo"

        def freeze_status(self) -> str:
            return status

        def domain(self) -> Any:
            return SimpleNamespace(hasManagedSaveImage=lambda: True, create=lambda: None)

    started: list[Scene] = []
    monkeypatch.setattr(operator, "FREED_SECONDS", 0.05)
    monkeypatch.setattr(operator, "_start_operator", started.append)
    monkeypatch.setattr(guest, "SAVED_SECONDS", 0.05)
    scene = a_scene(guest=Held())
    next(f for f in FAULTS if f.name == fault).heal(scene)
    assert [f.kind for f in scene.findings] == ([] if status == "thawed" else ["frozen"])
    assert started == ([scene] if fault == "operator-stays-dead" else []), "only after it was waited for"


class FakeStack:
    """Answers with one VMSnapshot."""

    def __init__(self, body: dict[str, Any] | None) -> None:
        self._body = body

    def get(self, _name: str) -> dict[str, Any] | None:
        return self._body


def told(*, deleted: bool = False, **status: str) -> dict[str, Any]:
    listed = [{"type": t, "status": s} for t, s in status.items()]
    meta = {"deletionTimestamp": "now"} if deleted else {}
    return {"metadata": meta, "status": {"conditions": listed}}


@pytest.mark.parametrize(
    ("body", "over"),
    [
        (None, True),
        (told(Reconciling="False", Ready="True"), True),
        (told(Reconciling="False", Ready="False", Stalled="True"), True),
        (told(Reconciling="True", Ready="True"), False),
        (told(Reconciling="False", Ready="False", Stalled="False"), False),
        (told(Reconciling="False", Ready="True", deleted=True), False),
        ({"metadata": {}}, False),
    ],
)
def test_what_is_over(body: dict[str, Any] | None, over: bool) -> None:
    assert is_over(cast("Stack", FakeStack(body)), "it") is over


class FakeHost:
    """A host of this name."""

    def __init__(self, name: str) -> None:
        self.name = name


class FakeLab:
    """Two hosts while the second one runs."""

    def __init__(self, two: bool) -> None:
        self.host, self.second = FakeHost("one"), FakeHost("two")
        self.two = two

    @property
    def hosts(self) -> tuple[FakeHost, ...]:
        return (self.host, self.second) if self.two else (self.host,)

    def end_second_host(self) -> None:
        self.two = False


class FakeGuest:
    """Migrates, at the second try."""

    name = "demo"

    def __init__(self, host: FakeHost) -> None:
        self.host, self.tries = host, 0

    def migrate(self, to: FakeHost) -> None:
        from tests.lab import LabError

        self.tries += 1
        if self.tries == 1:
            raise LabError("the domain is busy")
        self.host = to


@pytest.mark.parametrize("two", [True, False])
def test_the_pool_has_one_host_again_after_a_migration(two: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(_what: str, ready: Callable[[], bool], _timeout: float = 0) -> None:
        assert any(ready() for _ in range(3))

    monkeypatch.setattr("tests.chaos.annex.until", at_once)
    lab, pools = FakeLab(two), []

    class Pool:
        def spread(self, hosts: tuple[FakeHost, ...]) -> None:
            pools.append([h.name for h in hosts])

    guest = FakeGuest(lab.second if two else lab.host)
    Annex(cast("Any", lab), cast("Any", Pool())).one_host(cast("Any", guest))
    assert guest.host is lab.host
    assert not lab.two
    assert pools == ([["one"]] if two else [])
