"""What the guardian remembers: a VM that was found nowhere is freed as soon as it is seen again, wherever that is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.guardian import release, watch
from vmsnapshot_operator.guardian.release import Outcome
from vmsnapshot_operator.guardian.watch import Watch

JOURNAL = Journal(installation="i", owner_uid="u", nonce="n", attempt=1, method="GuestAgent", budget=30.0)
GUARD_SECONDS = 30.0


class World:
    """Which host the VM runs on, who was asked to free it where, and what comes of looking at it `again`: last, that it is over."""

    def __init__(self) -> None:
        self.where = ""
        self.now = 1000.0
        self.freed: list[str] = []
        self.again: list[Outcome | Exception] = []
        self.gone: list[bool] = []

    def attempt(
        self, uri: str, _domain: str, _method: str, _nonce: str, *, again: bool, armed: bool, gone: bool
    ) -> Outcome:
        self.gone.append(gone)
        if uri != self.where:
            return Outcome.ELSEWHERE
        if again:
            found = self.again.pop(0) if self.again else Outcome.OVER
            if isinstance(found, Exception):
                raise found
            return found
        self.freed.append(uri)
        return Outcome.FREE


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    made = World()
    monkeypatch.setattr(release, "attempt", made.attempt)
    monkeypatch.setattr(watch, "LONGEST_PAUSE", 0.01)
    yield made
    # Whoever still looked at a VM of this test would do so in the world of the next one.
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("free ")])


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + GUARD_SECONDS
    while not holds():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def test_one_that_migrated_to_a_host_not_yet_followed_is_freed_when_it_is_seen_there(world: World) -> None:
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.release("n", "the process that armed it is gone")
    eventually(lambda: made.status()["armed"] == 0)
    made.seen("a", {})  # its journal went with it
    assert world.freed == []
    world.where = "b"
    made.seen("b", {"vm": JOURNAL})
    assert made.due() == ["n"]
    made.release("n", "its budget is over")
    eventually(lambda: world.freed == ["b"])


@pytest.mark.parametrize("silence", [Outcome.HELD, RuntimeError("the agent does not answer")], ids=["held", "raised"])
def test_one_that_was_freed_is_looked_at_again_also_after_a_look_that_came_to_nothing(
    world: World, silence: Outcome | Exception
) -> None:
    """A late freeze keeps the agent busy: the look at it fails, the next one finds the guest frozen."""
    world.where, world.again = "a", [Outcome.FREE, silence, Outcome.HELD, Outcome.FREE, Outcome.FREE]
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.release("n", "the process that armed it is gone")
    eventually(lambda: world.again == [])


def test_one_that_was_freed_and_then_migrates_is_freed_again_where_it_is_seen(world: World) -> None:
    world.where, world.again = "a", [Outcome.FREE, Outcome.ELSEWHERE]
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.release("n", "the process that armed it is gone")
    eventually(lambda: world.again == [])
    world.where = "b"

    def due_there() -> bool:
        made.seen("b", {"vm": JOURNAL})
        return made.due() == ["n"]

    eventually(due_there)


@pytest.mark.parametrize(
    ("armed", "late", "gone"), [(True, 0.0, True), (False, 0.0, False), (True, 30.0 + watch.SETTLE_SECONDS, False)]
)
def test_one_whose_journal_is_gone_is_freed_if_its_holder_asked_as_long_as_its_freeze_may_come(
    world: World, monkeypatch: pytest.MonkeyPatch, armed: bool, late: float, gone: bool
) -> None:
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 0.0)
    world.where = "a"
    made = Watch(clock=lambda: world.now)
    made._see("a", "vm", JOURNAL, armed=armed)
    world.now += late
    monkeypatch.setattr(watch, "WATCHFUL_SECONDS", 0.0)
    made.release("n", "the process that armed it is gone")
    eventually(lambda: len(world.gone) == 2)
    assert world.gone == [gone, False], "and once only"


@pytest.mark.parametrize("armed", [True, False])
def test_one_that_was_freed_is_looked_at_without_its_journal_as_long_as_an_order_of_its_holder_may_come(
    world: World, monkeypatch: pytest.MonkeyPatch, armed: bool
) -> None:
    """The operator is started again, finds the VM free and removes the journal; then libvirtd carries out what was in its line."""
    monkeypatch.setattr(watch, "SETTLE_SECONDS", 1.0)
    monkeypatch.setattr(watch, "WATCHFUL_SECONDS", 0.0)
    world.where, world.again = "a", [Outcome.OVER] * 3 + [Outcome.FREE]
    made = Watch(clock=lambda: world.now)
    made._see("a", "vm", JOURNAL, armed=armed)
    made.release("n", "the process that armed it is gone")
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("free ")])
    if armed:
        assert world.again == [], "it was looked at on"
        assert world.gone[1:5] == [True] * 4
        assert world.gone[-1] is False, "and no longer than that"
    else:
        assert len(world.again) == 3, "it was not ours to look at without its journal"


def test_one_that_is_held_waits_for_no_turn_of_those_that_were_free_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their host is gone: each look takes long, and there is no end of them."""
    monkeypatch.setattr(watch, "HOPELESS_TRIES", 0)
    looking, ended = threading.Semaphore(0), threading.Event()

    def attempt(uri: str, domain: str, *_: object, again: bool, **__: object) -> Outcome:
        if uri == "b" or not again:
            return Outcome.FREE
        looking.release()
        ended.wait(GUARD_SECONDS)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(release, "attempt", attempt)
    made = Watch(clock=lambda: world.now)
    lost = [f"lost{n}" for n in range(watch.HOPELESS_AT_ONCE)]
    made.seen("a", {name: replace(JOURNAL, nonce=name) for name in lost})
    for name in lost:
        made.release(name, "its budget is over")
    for _ in lost:
        assert looking.acquire(timeout=GUARD_SECONDS)
    made.seen("b", {"vm": JOURNAL})
    made.release("n", "its budget is over")
    assert made._held["n"].over.wait(GUARD_SECONDS), "it is freed while all those look"
    monkeypatch.setattr(release, "attempt", lambda *_, **__: Outcome.OVER)
    ended.set()


def test_a_failure_is_said_once(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.where, world.again = "a", [RuntimeError("no route"), RuntimeError("no route"), RuntimeError("refused")]
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.release("n", "the process that armed it is gone")
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("free ")])
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [s["why"] for s in said if s["guardian"] == "not free yet"] == ["no route", "refused"]


def test_nobody_is_waited_for_who_is_being_freed_already(world: World) -> None:
    """An agent that is dead for hours keeps one thread busy, not the one that looks whether something is due."""
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    world.now += JOURNAL.budget + 1
    assert made.rest() < watch.TURN_SECONDS, "it is due"
    made._held["n"].releasing = True
    assert made.rest() == watch.TURN_SECONDS


def test_one_that_is_off_for_long_is_forgotten(world: World) -> None:
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.release("n", "the process that armed it is gone")
    eventually(lambda: made.status()["armed"] == 0)
    world.now += watch.LOST_SECONDS + 1
    made.seen("a", {})
    made.seen("a", {"vm": JOURNAL})
    assert made.due() == [], "a journal seen for the first time has its whole budget"


def test_a_timer_starts_at_first_sight_and_the_journal_seen_again_does_not_start_it_anew(world: World) -> None:
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    world.now += 29.0
    made.seen("a", {"vm": JOURNAL})
    assert made.due() == []
    world.now += 1.0
    assert made.due() == ["n"]


def test_what_was_disarmed_is_never_due(world: World) -> None:
    made = Watch(clock=lambda: world.now)
    made.seen("a", {"vm": JOURNAL})
    made.disarm("n")
    world.now += 60.0
    assert made.due() == []
    made.release("n", "the process that armed it is gone")
    assert world.freed == []
