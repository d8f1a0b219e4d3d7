"""What happened to a domain between two moments, as libvirt's events tell: an early resume, another run, the end of a backup.

And who shut a domain down that is off: libvirt tells that in the event alone, its state says the same of a guest that powered
off and of a QEMU that was asked to end by a signal.

Each connection is registered once, when it opens, for all domains: watching one costs no call, neither before nor while a
VM is held. Not: what follows from it (`quiesce`, `plan.verdict`).
"""

from __future__ import annotations

import threading
import time
import uuid as uuid_module
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import libvirt

from vmsnapshot_operator.core.backups import Ending
from vmsnapshot_operator.core.volumes import Seconds

_KEPT = 64
"""Events remembered for one watch: a guest that reboots in a loop fills no memory."""

_REMEMBERED = 4096
"""Domains that are off, of which it is remembered who shut them down."""


_ENDINGS_KEPT = 8
"""Ends of backups remembered for one domain: those that nobody asks for are of other programs."""


class Kind(StrEnum):
    """What may happen to a domain."""

    RESUMED = "resumed"
    PAUSED = "paused"
    STARTED = "started"
    STOPPED = "stopped"
    MIGRATED = "migrated"
    REBOOTED = "rebooted"
    AGENT_LOST = "agent lost"
    DISKS_CHANGED = "disks changed"


class Happening(NamedTuple):
    """One event. `at`: when this process heard of it, by the clock that goes on while the machine sleeps."""

    kind: Kind
    at: Seconds


class EventWatch:
    """What was heard of one domain. `blind`: the connection broke or was not there, so silence proves nothing."""

    def __init__(self, uuid: str, endpoint: str, *, blind: bool = False) -> None:
        self.uuid = uuid
        self.endpoint = endpoint
        self.blind = blind
        self._seen: set[Kind] = set()
        self._happenings: list[Happening] = []

    @property
    def happenings(self) -> tuple[Happening, ...]:
        """The first events, in the order in which they were heard."""
        return tuple(self._happenings)

    @property
    def resumed(self) -> bool:
        """Whether it was resumed, or nobody can say that it was not."""
        return self._may(Kind.RESUMED)

    @property
    def started(self) -> bool:
        """Whether it was started, or nobody can say that it was not."""
        return self._may(Kind.STARTED)

    @property
    def stopped(self) -> bool:
        """Whether it stopped or crashed, or nobody can say that it did not."""
        return self._may(Kind.STOPPED)

    @property
    def migrated(self) -> bool:
        """Whether it came from or went to another host, or nobody can say that it did not."""
        return self._may(Kind.MIGRATED)

    @property
    def rebooted(self) -> bool:
        """Whether its operating system was started anew, or nobody can say that it was not."""
        return self._may(Kind.REBOOTED)

    @property
    def agent_lost(self) -> bool:
        """Whether its agent went away, or nobody can say that it did not."""
        return self._may(Kind.AGENT_LOST)

    @property
    def disks_changed(self) -> bool:
        """Whether a device was added or removed or a medium changed, or nobody can say that none was."""
        return self._may(Kind.DISKS_CHANGED)

    def hear(self, *kinds: Kind) -> None:
        """Take note of an event."""
        at = _now()
        self._seen.update(kinds)
        self._happenings.extend(Happening(k, at) for k in kinds if len(self._happenings) < _KEPT)

    def _may(self, kind: Kind) -> bool:
        return self.blind or kind in self._seen


class EventHub:
    """Passes the events of all endpoints on to those who watch. Written by libvirt's event thread, read by anybody."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[EventWatch] = set()
        self._hearing: dict[str, Seconds] = {}
        self._endings: dict[tuple[str, str], deque[Ending]] = {}
        self._from_within: dict[str, str] = {}

    @contextmanager
    def watch(self, uuid: str, endpoint: str, *, blind: bool) -> Iterator[EventWatch]:
        """Hear of a domain until left. `blind`: there is no connection to its endpoint now."""
        watch = EventWatch(_canonical(uuid), endpoint, blind=blind)
        with self._lock:
            self._watches.add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                self._watches.discard(watch)

    def endings(self, uuid: str, endpoint: str, since: Seconds) -> tuple[Ending, ...] | None:
        """Return which backups of a domain ended after `since`; None if one may have that nobody here has heard of."""
        with self._lock:
            if self._hearing.get(endpoint, since) >= since:
                return None
            heard = tuple(e for e in self._endings.get((_canonical(uuid), endpoint), ()) if e.at >= since)
        return heard if len(heard) < _ENDINGS_KEPT else None

    def shut_down_from_within(self, uuid: str, endpoint: str) -> bool:
        """Whether it was heard that the guest itself shut this domain down, and nothing since that makes this untrue.

        False also if nobody listened then: what happened while there was no connection is not known.
        """
        with self._lock:
            return self._from_within.get(_canonical(uuid)) == endpoint

    def register(self, connection: Any, endpoint: str) -> Callable[[], None]:
        """Have a new connection tell us; return what ends that. Blocking, both; raise libvirtError."""
        self.lost(endpoint)  # whether or not the one before has told its end

        def live(domain: Any, event: int, detail: int) -> None:
            self._remember(domain.UUIDString(), endpoint, event, detail)
            tell(domain, *lifecycle(event, detail))

        def tell(domain: Any, *kinds: Kind) -> None:
            self._tell(domain.UUIDString(), *kinds)

        ids = libvirt
        wanted: list[tuple[int, Callable[..., None]]] = [
            (ids.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lambda _c, d, e, x, _o: live(d, e, x)),
        ]
        double = connection.getType() == "Test"  # libvirt's built-in double knows no other events
        if not double:
            wanted += [
                (ids.VIR_DOMAIN_EVENT_ID_REBOOT, lambda _c, d, _o: tell(d, Kind.REBOOTED)),
                (ids.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, lambda _c, d, s, _r, _o: tell(d, *agent(s))),
                (ids.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, lambda _c, d, _a, _o: tell(d, Kind.DISKS_CHANGED)),
                (ids.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, lambda _c, d, _a, _o: tell(d, Kind.DISKS_CHANGED)),
                (ids.VIR_DOMAIN_EVENT_ID_DISK_CHANGE, lambda _c, d, *_: tell(d, Kind.DISKS_CHANGED)),
                (
                    ids.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
                    lambda _c, d, job, _o: self._ended(d.UUIDString(), endpoint, job),
                ),
            ]
            connection.registerCloseCallback(lambda *_: self.lost(endpoint), None)
        numbers = [connection.domainEventRegisterAny(None, number, heard, None) for number, heard in wanted]
        with self._lock:
            self._hearing[endpoint] = _now()

        def end() -> None:
            # A connection with callbacks is kept open by libvirt, whoever closes it.
            if not double:
                connection.unregisterCloseCallback()
            for number in numbers:
                connection.domainEventDeregisterAny(number)

        return end

    def lost(self, endpoint: str) -> None:
        """The connection to an endpoint broke: what happens there from now on is not heard."""
        with self._lock:
            self._hearing.pop(endpoint, None)
            for watch in self._watches:
                if watch.endpoint == endpoint:
                    watch.blind = True
            # Of those on other endpoints as well: it may have been defined here too, and run unheard.
            self._from_within.clear()

    def _remember(self, uuid: str, endpoint: str, event: int, detail: int) -> None:
        """Keep in mind that a guest shut itself down, until it is started again, ended otherwise, or defined anew.

        Who defines it anew may have given it other disks, or set them back: what they hold then was not left by that shutdown.
        """
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
            return  # it follows each shutdown
        wanted = _canonical(uuid)
        with self._lock:
            self._from_within.pop(wanted, None)
            if event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN and detail == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST:
                self._from_within[wanted] = endpoint
                if len(self._from_within) > _REMEMBERED:
                    del self._from_within[next(iter(self._from_within))]

    def _ended(self, uuid: str, endpoint: str, job: Mapping[str, Any]) -> None:
        if job.get("operation") != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
            return
        whole = job.get("success") is True
        ending = Ending(
            whole, "" if whole else str(job.get("errmsg") or "libvirt does not say why; it ends with the VM"), _now()
        )
        with self._lock:
            self._endings.setdefault((_canonical(uuid), endpoint), deque(maxlen=_ENDINGS_KEPT)).append(ending)

    def _tell(self, uuid: str, *kinds: Kind) -> None:
        wanted = _canonical(uuid)
        with self._lock:
            for watch in self._watches:
                if watch.uuid == wanted:
                    watch.hear(*kinds)


def lifecycle(event: int, detail: int) -> tuple[Kind, ...]:
    """Return what a lifecycle event of libvirt says."""
    match event:
        case libvirt.VIR_DOMAIN_EVENT_RESUMED:
            moved = detail in (libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED, libvirt.VIR_DOMAIN_EVENT_RESUMED_POSTCOPY)
            return (Kind.RESUMED, Kind.MIGRATED) if moved else (Kind.RESUMED,)
        case libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            moved = detail in (libvirt.VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY)
            return (Kind.PAUSED, Kind.MIGRATED) if moved else (Kind.PAUSED,)
        case libvirt.VIR_DOMAIN_EVENT_STARTED:
            moved = detail == libvirt.VIR_DOMAIN_EVENT_STARTED_MIGRATED
            return (Kind.STARTED, Kind.MIGRATED) if moved else (Kind.STARTED,)
        case libvirt.VIR_DOMAIN_EVENT_STOPPED:
            moved = detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED
            return (Kind.STOPPED, Kind.MIGRATED) if moved else (Kind.STOPPED,)
        case (
            libvirt.VIR_DOMAIN_EVENT_SHUTDOWN | libvirt.VIR_DOMAIN_EVENT_CRASHED | libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED
        ):
            return (Kind.STOPPED,)
        case _:
            return ()  # defined, undefined: nothing happened to what runs


def agent(state: int) -> tuple[Kind, ...]:
    """Return what an event of the agent's channel says."""
    gone = state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_DISCONNECTED
    return (Kind.AGENT_LOST,) if gone else ()


def _now() -> Seconds:
    return Seconds(time.clock_gettime(time.CLOCK_BOOTTIME))


def _canonical(uuid: str) -> str:
    return str(uuid_module.UUID(uuid))
