"""Connections to one libvirt daemon, reopened with back-off when they break, and enough of them that no request waits.

libvirtd works on five requests of one connection at a time; the sixth waits for one of them, and a request to an agent that
hangs takes as long as its time limit. So a VM that is held has its seat on a connection that few others use.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import libvirt

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import CallTimeoutError, HypervisorError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors.calls import Calls

CONNECT_TIMEOUT = Seconds(10.0)
SEATS = 4
"""Held VMs per connection: one less than libvirtd's max_client_requests, so that a call which was left behind harms nobody."""

_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 3, 3
_FIRST_BACKOFF, _MAX_BACKOFF = 0.2, 10.0

HANGING = 3
"""So many connects of one connection may hang at once, each in a thread: beyond that each try waits twice as long as the one before, up to
`HANGING_BACKOFF` seconds. Not without end: a connect hangs for ever if its host died when it had taken it."""

HANGING_BACKOFF = 600.0

_loop_lock = threading.Lock()
_loop_started = False


def start_event_loop() -> None:
    """Run libvirt's event loop in one thread of this process; needed by events and keep-alive, before any connection."""
    global _loop_started  # noqa: PLW0603 - libvirt has one event loop per process
    with _loop_lock:
        if _loop_started:
            return
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_turn, name="libvirt events", daemon=True).start()
        _loop_started = True


def _turn() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            # One turn failed, and nobody could be told: the next one tries again, but does not spin.
            time.sleep(0.1)


class _Attempt:
    """One connect, as its thread and the one who waits for it leave it: what it made belongs to the last one there."""

    def __init__(self, returned: Callable[[bool], None]) -> None:
        self._returned = returned
        self._lock = threading.Lock()
        self._over = self._left = False
        self._made: tuple[Any, Callable[[], None] | None] | None = None

    def end(self, made: tuple[Any, Callable[[], None] | None] | None) -> None:
        """Its thread is at its end: with what it made, or (None) with an error."""
        with self._lock:
            self._over, self._made = True, made
            left = self._left
        if not left:
            return
        try:
            if made is not None:
                _shut(*made)
        finally:
            self._returned(made is not None)

    def made(self) -> tuple[Any, Callable[[], None] | None] | None:
        """What it made, if anything."""
        return self._made

    def leave(self) -> bool:
        """Wait for it no more; True if it goes on, and `returned` is called, in its thread, when it has come to its end."""
        with self._lock:
            self._left = not self._over
            return self._left


class Connection:
    """One connection, opened at first use and again after it broke, with back-off in between.

    `last_answer`: when the daemon last answered on it (`time.monotonic`); 0 if it never did. `opened` is called, in a thread, with
    each new virConnect, and returns what is called before it is closed.
    """

    def __init__(
        self, uri: str, name: str, calls: Calls, opened: Callable[[Any], Callable[[], None]] | None = None
    ) -> None:
        self.name = name
        self.last_answer = 0.0
        self._uri = uri
        self._calls = calls
        self._opened = opened
        self._connection: Any = None
        self._closing: Callable[[], None] | None = None
        self._lock = asyncio.Lock()
        self._failures = 0
        self._hanging = 0
        self._not_before = 0.0
        self._why = "not connected"

    @property
    def live(self) -> Any | None:
        """The virConnect if it is not known to be broken; asks nobody."""
        return self._connection if self._connection is not None and self._connection.isAlive() else None

    async def get(self) -> Any:
        """Return a live virConnect. Raises HypervisorUnreachableError."""
        if (live := self.live) is not None:
            return live
        async with self._lock:
            if (live := self.live) is not None:
                return live
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before:
                raise HypervisorUnreachableError(f"{self.name}: {self._why}; trying again shortly")
            await self._drop()

            def returned(made: bool) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                    loop.call_soon_threadsafe(self._returned, made)

            attempt = _Attempt(returned)
            try:
                await self._calls.act(f"connect to {self.name}", self._open, attempt, timeout=CONNECT_TIMEOUT)
            except CallTimeoutError as error:
                self._leave(attempt)
                if self._connection is None:
                    self._failed(error.message)
                    raise HypervisorUnreachableError(error.message) from error
            except HypervisorError as error:
                self._failed(error.message)
                raise HypervisorUnreachableError(error.message) from error
            except asyncio.CancelledError:
                self._leave(attempt)
                raise
            else:
                self._leave(attempt)
            self._failures = 0
            self.answered()
            return self._connection

    def answered(self) -> None:
        """Note that the daemon answered now."""
        self.last_answer = time.monotonic()

    async def close(self) -> None:
        """Close the connection."""
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        """Close what is there, broken or not: its event callbacks keep it in memory until it is closed."""
        connection, self._connection = self._connection, None
        closing, self._closing = self._closing, None
        if connection is not None:
            try:
                await self._calls.act(f"close {self.name}", _shut, connection, closing, timeout=CONNECT_TIMEOUT)
            except HypervisorError:
                return  # it was broken: there is nobody at the other end to be told

    def _leave(self, attempt: _Attempt) -> None:
        """Take what an attempt made, also if it came in the last moment, or count it as one that hangs."""
        if attempt.leave():
            self._hanging += 1
            if self._hanging > HANGING:
                self._why = f"{self._hanging} connects have not returned"
                self._not_before = asyncio.get_running_loop().time() + self._pause()
        elif (made := attempt.made()) is not None:
            self._connection, self._closing = made

    def _returned(self, made: bool) -> None:
        """Note that a connect which hung has returned. If it was made, the daemon answers again: nobody waits any more."""
        self._hanging -= 1
        if made:
            self._failures, self._not_before = 0, 0.0
        else:
            self._not_before = min(self._not_before, asyncio.get_running_loop().time() + self._pause())

    def _failed(self, why: str) -> None:
        self._failures += 1
        self._why = why
        self._not_before = asyncio.get_running_loop().time() + self._pause()

    def _pause(self) -> float:
        """Seconds until the next attempt."""
        doublings = self._hanging - HANGING
        if doublings > 0:
            return min(HANGING_BACKOFF, _MAX_BACKOFF * 2.0 ** min(doublings, 8))
        return min(_MAX_BACKOFF, _FIRST_BACKOFF * 2.0 ** min(self._failures, 8))

    def _open(self, attempt: _Attempt) -> None:
        made: tuple[Any, Callable[[], None] | None] | None = None
        try:
            made = self._connect()
        finally:
            attempt.end(made)

    def _connect(self) -> tuple[Any, Callable[[], None] | None]:
        start_event_loop()
        connection = libvirt.open(self._uri)
        try:
            if not self._uri.startswith("test:"):
                connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
            return connection, self._opened(connection) if self._opened is not None else None
        except libvirt.libvirtError:
            connection.close()
            raise


def _shut(connection: Any, closing: Callable[[], None] | None) -> None:
    try:
        if closing is not None:
            closing()
    finally:
        connection.close()


class Lane:
    """Connections for VMs that are held, few to each. A seat is given back when its owner is no more."""

    def __init__(self, uri: str, name: str, calls: Calls) -> None:
        self._uri = uri
        self._name = name
        self._calls = calls
        self._seats: list[tuple[Connection, weakref.WeakSet[Any]]] = []

    async def seat(self, owner: object) -> Any:
        """Return a live virConnect that at most three others use now. Raises HypervisorUnreachableError."""
        for connection, owners in self._seats:
            if owner in owners:
                return await connection.get()
        for connection, owners in self._seats:
            if len(owners) < SEATS:
                owners.add(owner)
                return await connection.get()
        made = Connection(self._uri, f"{self._name} {len(self._seats) + 1}", self._calls)
        self._seats.append((made, weakref.WeakSet((owner,))))
        return await made.get()

    async def open(self) -> None:
        """Have one connection ready, so that nobody waits for it later. Raises HypervisorUnreachableError."""
        if not self._seats:
            self._seats.append((Connection(self._uri, f"{self._name} 1", self._calls), weakref.WeakSet()))
        await self._seats[0][0].get()

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(connection.close() for connection, _ in self._seats))
