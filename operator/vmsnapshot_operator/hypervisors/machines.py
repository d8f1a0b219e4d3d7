"""A domain as a plan needs to know it: described where it is, and its agent asked, of few domains at once.

Never blocks the event loop; everything raises HypervisorError or a child of it. Not how libvirt describes it (`description`), nor what
an agent answers (`agent`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.errors import CallTimeoutError, HypervisorError
from vmsnapshot_operator.hypervisors import agent as agents
from vmsnapshot_operator.hypervisors import description
from vmsnapshot_operator.hypervisors.events import EventHub
from vmsnapshot_operator.hypervisors.hosts import Host
from vmsnapshot_operator.hypervisors.lookup import Lookup, Ref

AGENT_QUERIES, SUSPECT_QUERIES = 2, 1
"""Agent questions of plans at once, per endpoint: libvirtd has 20 workers, and each hung agent holds one. Those that were
silent the last time take turns among themselves, so that they delay nobody else's plan."""


class Machines:
    """Describes the domains of a Hypervisor object."""

    def __init__(self, hosts: Mapping[str, Host], lookup: Lookup, hub: EventHub) -> None:
        self._hosts = hosts
        self._lookup = lookup
        self._hub = hub
        self._silent: set[str] = set()
        self._queries = {e: asyncio.Semaphore(AGENT_QUERIES) for e in hosts}
        self._suspects = {e: asyncio.Semaphore(SUSPECT_QUERIES) for e in hosts}

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        """Return everything a plan needs to know of a domain. Raises DomainAmbiguousError, and what a look-up does."""
        here = await self._lookup.true_one(ref)
        host = self._hosts[here.endpoint]
        machine = await host.look(f"look at {ref.name}", _describe, here)
        if ask_agent and machine.power is PowerState.RUNNING:
            machine = replace(machine, agent=await self._ask(host, here))
        if machine.shut_down_from_within and not self._hub.shut_down_from_within(here.uuid, here.endpoint):
            why = f"{machine.power_reason}; it was not heard that its own system did that"
            machine = replace(machine, shut_down_from_within=False, power_reason=why)
        return machine

    async def _ask(self, host: Host, ref: Ref) -> Agent:
        async with (self._suspects if ref.uuid in self._silent else self._queries)[host.endpoint]:
            try:
                found = await host.look(f"agent of {ref.name}", _ask, ref.uuid)
            except CallTimeoutError:
                self._silent.add(ref.uuid)  # somebody else's question hangs in the agent, and ours behind it
                raise
        (self._silent.add if found.state is AgentState.SILENT else self._silent.discard)(ref.uuid)
        return found


# --- blocking, in a thread of their own --------------------------------------------------------------------------------


def _ask(connection: Any, uuid: str) -> Agent:
    return agents.ask(connection.lookupByUUIDString(uuid))


def _describe(connection: Any, ref: Ref) -> Machine:
    try:
        return description.describe(connection, ref.uuid, ref.endpoint)
    except ValueError as error:
        raise HypervisorError(f"domain {ref.name}: {error}") from error
