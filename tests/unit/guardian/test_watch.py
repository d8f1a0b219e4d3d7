"""When the guardian frees whom: timers by a fake clock, journals as libvirt would show them; nothing is asked."""

from __future__ import annotations

import secrets
from types import SimpleNamespace

import pytest

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.guardian import release
from vmsnapshot_operator.guardian.release import Outcome
from vmsnapshot_operator.guardian.server import Server
from vmsnapshot_operator.guardian.watch import RefusedError, Watch

HERE, THERE = "qemu+tls://one/system", "qemu+tls://two/system"
VM = "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000"


class Clock:
    """Goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def journal(budget: float = 30.0) -> Journal:
    return Journal(
        installation="abc123",
        owner_uid="3b7f1f0e-0000-4000-8000-000000000000",
        nonce=secrets.token_hex(16),
        attempt=1,
        method="GuestAgent",
        budget=budget,
    )


def shown(monkeypatch: pytest.MonkeyPatch, found: Journal | Exception | None) -> None:
    """Have every libvirt hold one domain, whose journal reads so."""

    def read(_domain: object) -> Journal | None:
        if isinstance(found, Exception):
            raise found
        return found

    domain = SimpleNamespace(isActive=lambda: True)
    connection = SimpleNamespace(lookupByUUIDString=lambda _uuid: domain, close=lambda: None)
    monkeypatch.setattr(release, "reach", lambda _uri: None)
    monkeypatch.setattr(release, "connect", lambda _uri: connection)
    monkeypatch.setattr(release, "read", read)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nobody_is_freed_before_the_budget_and_the_grace_are_over(clock: Clock) -> None:
    watch, held = Watch(clock, grace=2.0), journal(30.0)
    watch.seen(HERE, {VM: held})
    clock.now += 31.999
    assert watch.due() == []
    clock.now += 0.001
    assert watch.due() == [held.nonce]


def test_without_grace_the_budget_alone_counts(clock: Clock) -> None:
    watch, held = Watch(clock), journal(30.0)
    watch.seen(HERE, {VM: held})
    clock.now += 29.999
    assert watch.due() == []
    clock.now += 0.001
    assert watch.due() == [held.nonce]


def test_seeing_it_again_neither_shortens_nor_prolongs(clock: Clock) -> None:
    watch, held = Watch(clock, grace=2.0), journal(10.0)
    watch.seen(HERE, {VM: held})
    for _ in range(11):
        clock.now += 1.0
        watch.seen(HERE, {VM: held})
        assert watch.due() == []
    clock.now += 1.0
    assert watch.due() == [held.nonce]


def test_a_journal_that_went_in_time_is_forgotten(clock: Clock) -> None:
    watch = Watch(clock, grace=2.0)
    watch.seen(HERE, {VM: journal(10.0)})
    watch.seen(HERE, {})
    clock.now += 1000
    assert watch.due() == []
    assert watch.status()["armed"] == 0


def test_the_next_journal_of_the_same_vm_has_a_timer_of_its_own(clock: Clock) -> None:
    watch, second = Watch(clock), journal(10.0)
    watch.seen(HERE, {VM: journal(10.0)})
    clock.now += 9.0
    watch.seen(HERE, {VM: second})
    clock.now += 9.0
    assert watch.due() == []
    clock.now += 1.0
    assert watch.due() == [second.nonce]


def test_a_host_that_does_not_show_it_any_more_counts_only_if_it_was_there(clock: Clock) -> None:
    watch, held = Watch(clock), journal(10.0)
    watch.seen(HERE, {VM: held})
    watch.seen(THERE, {})
    clock.now += 10.0
    assert watch.due() == [held.nonce]


def test_one_that_migrates_is_still_freed(clock: Clock) -> None:
    watch, held = Watch(clock), journal(10.0)
    watch.seen(HERE, {VM: held})
    clock.now += 5.0
    watch.seen(THERE, {VM: held})
    watch.seen(HERE, {})
    clock.now += 5.0
    assert watch.due() == [held.nonce]


def test_one_that_is_between_two_hosts_gets_a_new_timer_where_it_arrives(clock: Clock) -> None:
    watch, held = Watch(clock), journal(10.0)
    watch.seen(HERE, {VM: held})
    watch.seen(HERE, {})
    watch.seen(THERE, {VM: held})
    clock.now += 10.0
    assert watch.due() == [held.nonce]


def test_what_was_armed_is_kept_though_an_older_look_does_not_show_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, held = Watch(clock), journal(10.0)
    shown(monkeypatch, held)
    watch.arm(HERE, VM, held.nonce)
    watch.seen(HERE, {})
    clock.now += 10.0
    assert watch.due() == [held.nonce]


def test_one_that_comes_back_with_saved_memory_is_freed_at_once(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder found it off, and said that it is free; its journal was saved with the memory of a guest that is frozen."""
    watch, held, watched = Watch(clock), journal(30.0), journal(30.0)
    shown(monkeypatch, held)
    watch.arm(HERE, VM, held.nonce)
    watch.disarm(held.nonce)
    watch.seen(HERE, {})
    assert watch.due() == []
    watch.seen(HERE, {VM: held})
    assert watch.due() == [held.nonce]
    # One that nobody armed here may just have migrated, in mid-window.
    watch.seen(THERE, {VM: watched})
    watch.seen(THERE, {})
    watch.seen(THERE, {VM: watched})
    assert watch.due() == [held.nonce]


def test_what_was_seen_and_then_armed_is_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, held = Watch(clock), journal(10.0)
    shown(monkeypatch, held)
    watch.seen(HERE, {VM: held})
    watch.arm(HERE, VM, held.nonce)
    watch.seen(HERE, {})
    clock.now += 10.0
    assert watch.due() == [held.nonce]
    watch.disarm(held.nonce)
    watch.seen(HERE, {})
    assert watch.due() == []


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("method", ["GuestAgent", "Pause"])
@pytest.mark.parametrize("found", [None, journal()], ids=["gone", "another"])
def test_a_vm_without_this_journal_is_not_touched_but_a_guest_may_be_thawed(
    monkeypatch: pytest.MonkeyPatch, found: Journal | None, method: str, gone: bool, again: bool
) -> None:
    """`thaw` by hand removes the journal of a window that is open: its freeze may come after that, and its holder die.

    One that was free already may be paused only by the order of a holder that died, as long as that may come.
    """
    shown(monkeypatch, found)
    monkeypatch.setattr(release, "_resume", lambda _domain: Outcome.FREE)
    monkeypatch.setattr(release, "_thaw", lambda _domain, _ours: Outcome.FREE)
    touched = found is None and gone and (again or method == "GuestAgent")
    outcome = release.attempt(HERE, VM, method, journal().nonce, again=again, armed=True, gone=gone)
    assert outcome is (Outcome.FREE if touched else Outcome.OVER)


@pytest.mark.parametrize("theirs", [True, False])
def test_one_that_another_window_holds_by_now_is_not_thawed(monkeypatch: pytest.MonkeyPatch, theirs: bool) -> None:
    """It is frozen when it is looked at again: by a late order, or by the window of another attempt that has just begun."""
    thawed: list[str] = []
    frozen = SimpleNamespace(
        agentSetResponseTimeout=lambda *_: None, fsThaw=lambda *_: thawed.append("thaw"), UUIDString=lambda: VM
    )
    monkeypatch.setattr(release, "_status", lambda _domain: "thawed" if thawed else "frozen")
    assert release._thaw(frozen, lambda: not theirs) is Outcome.FREE
    assert bool(thawed) is not theirs


def test_a_journal_that_cannot_be_read_is_obeyed_only_if_its_holder_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown(monkeypatch, journals.UnreadableJournalError("of version 9"))
    monkeypatch.setattr(release, "_thaw", lambda _domain, _ours: Outcome.FREE)
    assert (
        release.attempt(HERE, VM, "GuestAgent", journal().nonce, again=False, armed=False, gone=False) is Outcome.OVER
    )
    assert release.attempt(HERE, VM, "GuestAgent", journal().nonce, again=False, armed=True, gone=False) is Outcome.FREE


def test_ending_frees_nothing_that_is_not_due(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> Outcome:
        raise AssertionError("a VM was touched")

    monkeypatch.setattr(release, "attempt", never)
    watch, held = Watch(clock, grace=2.0), journal()
    watch.seen(HERE, {VM: held})
    watch.finish(0.0)
    assert watch.status() == {"armed": 1, "releasing": 0, "followed": {}, "turned": 0.0}
    with pytest.raises(RefusedError, match="ending"):
        watch.arm(HERE, VM, held.nonce)


def test_one_that_only_watches_is_armed_by_nobody(clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("g") / "s")
    server = Server(path, Watch(clock), arms=False)
    armed: set[str] = set()
    for op in ("arm", "disarm"):
        line = f'{{"op": "{op}", "uri": "{HERE}", "domain": "{VM}", "nonce": "x"}}'.encode()
        assert server.answer(line, armed) == {"ok": False, "error": "this guardian only watches"}
    assert armed == set()
    assert server.answer(b'{"op": "status"}', armed)["ok"]
    server._listener.close()


@pytest.mark.parametrize(
    ("uri", "asked"),
    [
        ("qemu+tls://one.example.org/system?pkipath=/a", ("one.example.org", 16514)),
        ("qemu+tcp://[::1]:16510/system", ("::1", 16510)),
        ("qemu+libssh2://root@one/system", ("one", 22)),
        ("qemu+unix:///system?socket=/run/x", None),
        ("qemu:///system", None),
        ("test:///default", None),
    ],
)
def test_a_remote_host_is_asked_for_a_connection_first(
    monkeypatch: pytest.MonkeyPatch, uri: str, asked: tuple[str, int] | None
) -> None:
    calls: list[tuple[str, int]] = []

    class Link:
        def close(self) -> None:
            pass

    def create(address: tuple[str, int], _timeout: float) -> Link:
        calls.append(address)
        return Link()

    monkeypatch.setattr(release.socket, "create_connection", create)
    release.reach(uri)
    assert calls == ([asked] if asked else [])
