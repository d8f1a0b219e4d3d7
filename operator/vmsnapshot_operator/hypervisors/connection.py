"""Connections to one libvirt daemon, reopened with back-off when they break, and enough of them that no request waits.

libvirtd works on five requests of one connection at a time; the sixth waits for one of them, and a request to an agent that
hangs takes as long as its time limit. So a VM that is held has its seat on a connection that few others use.
"""

from __future__ import annotations

import asyncio
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
_FIRST_BACKOFF, _MAX_BACKOFF = 0.2, 30.0

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
            if time.monotonic() < self._not_before:
                raise HypervisorUnreachableError(f"{self.name}: {self._why}; trying again shortly")
            await self._drop()
            unwanted = threading.Event()
            try:
                made, closing = await self._calls.act(
                    f"connect to {self.name}", self._open, unwanted, timeout=CONNECT_TIMEOUT
                )
            except HypervisorError as error:
                unwanted.set()
                self._failed(error)
                raise HypervisorUnreachableError(error.message) from error
            except asyncio.CancelledError:
                unwanted.set()
                raise
            self._connection, self._closing = made, closing
            self._failures = self._hanging = 0
            self.answered()
            return made

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

    def _failed(self, error: HypervisorError) -> None:
        self._failures += 1
        self._why = error.message
        if isinstance(error, CallTimeoutError):
            self._hanging += 1
        # Each attempt that hangs keeps a thread: the more of them, the rarer the attempts.
        backoff = min(_MAX_BACKOFF, _FIRST_BACKOFF * 2 ** min(self._failures, 8)) * (1 + self._hanging)
        self._not_before = time.monotonic() + backoff

    def _open(self, unwanted: threading.Event) -> tuple[Any, Callable[[], None] | None]:
        start_event_loop()
        connection = libvirt.open(self._uri)
        try:
            if not self._uri.startswith("test:"):
                connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
            closing = self._opened(connection) if self._opened is not None else None
        except libvirt.libvirtError:
            connection.close()
            raise
        if unwanted.is_set():
            _shut(connection, closing)  # whoever asked for it has given up
        return connection, closing


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
