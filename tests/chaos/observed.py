"""The operator with an observer: each step waits until the injector, at the other end of a Unix socket, lets it go on.

`python -m tests.chaos.observed SOCKET run …` is `vmsnapshot-operator run …`, and nothing else is different. With nobody at the
other end a step goes on at once. The answer says by how many seconds the process's wall clock shall be wrong from now on, and what
shall become of the next thing that the driver of this step's class does (`Injector.orders`). Orders to libvirt are told in the same way,
in the very thread that is about to send them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import libvirt
import time_machine

from vmsnapshot_operator.cli import main
from vmsnapshot_operator.core import steps
from vmsnapshot_operator.core.steps import Moment, Step
from vmsnapshot_operator.drivers import host
from vmsnapshot_operator.drivers.process import DriverProcess
from vmsnapshot_operator.errors import DriverCrashedError, DriverError

_DEEDS = frozenset({"prepare", "cut", "wait_ready", "revert", "clone", "keep", "delete"})
"""What a driver does; everything else only asks."""


_ORDERS = (
    (libvirt.virDomain, "fsFreeze"),
    (libvirt.virDomain, "suspend"),
    (libvirt.virDomain, "snapshotCreateXML"),
    (libvirt.virDomain, "backupBegin"),
    (libvirt.virDomain, "blockCommit"),
    (libvirt.virDomain, "blockJobAbort"),
    (libvirt.virDomain, "createWithFlags"),
    (libvirt.virConnect, "defineXML"),
)
"""What libvirt is ordered to do that holds a VM or leaves something behind."""


def tell_of_orders(path: str) -> None:
    """Have the injector at this socket told of each of them before it is sent."""
    for owner, name in _ORDERS:
        setattr(owner, name, _told(path, name, getattr(owner, name)))


def _told(path: str, name: str, send: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(send)
    def tell_and_send(*arguments: Any, **options: Any) -> Any:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as link:
            link.connect(path)
            link.sendall(json.dumps({"call": name}).encode() + b"\n")
            link.makefile().readline()
        return send(*arguments, **options)

    return tell_and_send


class LossyProcess(DriverProcess):
    """A driver's process that dies before it does what it is asked, or before it says that it did, as its class's order says."""

    orders: dict[str, str] = {}  # noqa: RUF012 - one for all processes
    obeyed = 0

    async def call(self, operation: str, *arguments: Any, **options: Any) -> Any:
        """Ask the driver, and do as was ordered, once."""
        order = self.orders.pop(self.setup.class_name, "") if operation in _DEEDS else ""
        if order == "refuse":
            LossyProcess.obeyed += 1
            raise DriverError(self.setup.where(operation) + "it cannot be done; injected")
        if order != "fail":
            answer = await super().call(operation, *arguments, **options)
            if not order:
                return answer
        LossyProcess.obeyed += 1
        self.kill()
        raise DriverCrashedError(self.setup.where(operation) + "its process ended before it answered; injected")


class SocketObserver:
    """Tells the injector of each step, and waits for its answer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._wrong = 0
        self._clock: time_machine.travel | None = None

    async def reached(self, step: Step, moment: Moment, uid: str, detail: str) -> None:
        """Return when the injector answers, or is not there."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            return
        try:
            said: dict[str, Any] = {"step": step, "moment": moment, "uid": uid, "detail": detail}
            said |= {"pid": os.getpid(), "obeyed": LossyProcess.obeyed}
            writer.write(json.dumps(said).encode() + b"\n")
            order = json.loads(await reader.readline() or b"{}")
            if order.get("order"):
                LossyProcess.orders[detail] = order["order"]
            self._step_clock(order.get("clock", 0))
        except OSError:
            return
        finally:
            writer.close()

    def _step_clock(self, seconds: int) -> None:
        """Step the wall clock; the monotonic ones go on as they did."""
        if seconds == self._wrong:
            return
        if self._clock is not None:
            self._clock.stop()
            self._clock = None
        if seconds:
            self._clock = time_machine.travel(time.time() + seconds, tick=True)
            self._clock.start()
        self._wrong = seconds


if __name__ == "__main__":
    steps.observe(SocketObserver(sys.argv[1]))
    tell_of_orders(sys.argv[1])
    host.DriverProcess = LossyProcess  # type: ignore[misc]  # a class of its own is what it is replaced by
    main(sys.argv[2:])
