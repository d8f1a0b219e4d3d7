"""The endpoints of one Hypervisor object: of each its connections, its calls and what bounds them; and all of them asked at once.

Never blocks the event loop; everything raises HypervisorError or a child of it. Not what is asked, nor which endpoint a domain is on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors.calls import Calls
from vmsnapshot_operator.hypervisors.connection import Connection, Lane
from vmsnapshot_operator.hypervisors.events import EventHub

LOOK_TIMEOUT = Seconds(15.0)
SWEEP_TIMEOUT = Seconds(60.0)
"""Of a look at all domains of an endpoint."""

FREEZES = 10
"""Freezes at once, per endpoint: the workers that are left must suffice for the thaws."""

T = TypeVar("T")


class Host:
    """One endpoint: its connections, its calls, and what bounds them."""

    def __init__(self, endpoint: str, uri: str, hub: EventHub) -> None:
        self.endpoint = endpoint
        self.uri = uri
        self.calls = Calls(endpoint)
        self.main = Connection(uri, endpoint, self.calls, lambda c: hub.register(c, endpoint))
        self.holding = Lane(uri, f"{endpoint} (freeze)", self.calls)
        self.freeing = Lane(uri, f"{endpoint} (thaw)", self.calls)
        self.changing = Lane(uri, f"{endpoint} (change)", self.calls)
        self.freezes = asyncio.Semaphore(FREEZES)

    async def reach(self) -> None:
        """Have a connection of each kind ready, but for changes. Raises HypervisorUnreachableError."""
        await self.main.get()
        await asyncio.gather(self.holding.open(), self.freeing.open())

    async def look(self, what: str, function: Callable[..., T], *arguments: Any, timeout: Seconds = LOOK_TIMEOUT) -> T:  # noqa: ASYNC109 - handed on
        """Call `function(virConnect, *arguments)` on the main connection."""
        connection = await self.main.get()
        result = await self.calls.look(what, function, connection, *arguments, timeout=timeout)
        self.main.answered()
        return result

    async def act(self, what: str, act: Callable[[Any], T], *, timeout: Seconds) -> T:  # noqa: ASYNC109 - handed on
        """Call `act(virConnect)` on a connection that few use: what takes minutes five times over would stop a connection."""
        connection = await self.changing.seat(asyncio.current_task())
        return await self.calls.act(what, act, connection, timeout=timeout)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(c.close() for c in (self.main, self.holding, self.freeing, self.changing)))


async def ask_each(
    hosts: Mapping[str, Host], ask: Callable[[Host], Awaitable[T]]
) -> tuple[tuple[T, ...], Mapping[str, str]]:
    """Ask all at once; return their answers in the order in which they came, and which endpoints gave none, and why."""
    answers: list[T] = []
    problems: dict[str, str] = {}

    async def one(endpoint: str, host: Host) -> None:
        try:
            answers.append(await ask(host))
        except HypervisorError as error:
            problems[endpoint] = error.message

    await asyncio.gather(*(one(e, h) for e, h in hosts.items()))
    return tuple(answers), problems
