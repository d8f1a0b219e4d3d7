"""Connections to one libvirt daemon: one for looking and holding, one of its own for thawing, reopened when they break."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import libvirt

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors.calls import call

CONNECT_TIMEOUT = Seconds(10.0)
_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT = 3, 3
_MAX_BACKOFF = 30.0

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

        def turn() -> None:
            while True:
                libvirt.virEventRunDefaultImpl()

        threading.Thread(target=turn, name="libvirt events", daemon=True).start()
        _loop_started = True


class Connection:
    """One connection, opened at first use and again after it broke, with back-off in between."""

    def __init__(self, uri: str, name: str) -> None:
        self.uri = uri
        self.name = name
        self.last_answer = 0.0
        self._connection: Any = None
        self._lock = asyncio.Lock()
        self._failures = 0
        self._not_before = 0.0

    async def get(self) -> Any:
        """Return a live virConnect. Raises HypervisorUnreachableError."""
        async with self._lock:
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            if time.monotonic() < self._not_before:
                raise HypervisorUnreachableError(f"{self.name}: not connected; trying again shortly")
            try:
                self._connection = await call(f"connect to {self.name}", self._open, timeout=CONNECT_TIMEOUT)
            except HypervisorError as error:
                self._failures += 1
                self._not_before = time.monotonic() + min(_MAX_BACKOFF, 0.2 * 2 ** min(self._failures, 8))
                raise HypervisorUnreachableError(error.message) from error
            self._failures = 0
            return self._connection

    def answered(self) -> None:
        """Note that the daemon answered now."""
        self.last_answer = time.monotonic()

    async def close(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await call(f"close {self.name}", connection.close, timeout=CONNECT_TIMEOUT)
            except HypervisorError:
                return  # the process or the daemon ends it

    def _open(self) -> Any:
        start_event_loop()
        connection = libvirt.open(self.uri)
        if not self.uri.startswith("test:"):
            connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
        return connection
