"""Keep an eye on gates of restores that nobody opens any more, and tell of them. What is what is decided by `plan.gates`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from vmsnapshot_operator.errors import KubeError
from vmsnapshot_operator.hypervisors.domains import Gated, Hypervisor
from vmsnapshot_operator.plan import gates
from vmsnapshot_operator.plan.gates import Left
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)

MOST = 256


class LeftGates:
    """What was found last, by hypervisor."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Left, ...]] = {}
        self._told: dict[str, frozenset[tuple[str, str]]] = {}

    async def look(self, body: Mapping[str, Any], client: Hypervisor, world: World) -> tuple[Left, ...] | None:
        """Look, and tell of gates that are other ones than last time; return those that are there, None if that was never known."""
        name = str(body["metadata"]["name"])
        if not world.leadership.is_leader():
            return self._found.get(name)
        seen, silent = await client.gates()
        try:
            judged = [await _judge(g, world) for g in seen]
        except KubeError as error:
            log.warning("hypervisor %s: whose the gates of its VMs are is not known: %s", name, error.message)
            return self._found.get(name)
        # What stands where nobody can look is still there.
        hidden = {(g.ref.endpoint, g.ref.name) for g in seen if g.problem}
        unseen = [g for g in self._found.get(name, ()) if g.endpoint in silent or (g.endpoint, g.domain) in hidden]
        if silent and name not in self._found and not any(judged):
            return None
        self._found[name] = tuple([g for g in judged if g is not None] + unseen)
        await self._tell(body, world)
        return self._found[name]

    def remove(self, name: str) -> None:
        """Forget a hypervisor."""
        self._found.pop(name, None)
        self._told.pop(name, None)

    async def _tell(self, body: Mapping[str, Any], world: World) -> None:
        name = str(body["metadata"]["name"])
        found = self._found[name]
        world.metrics.left_gates(len(found), hypervisor=name)
        there = frozenset((g.domain, g.restore) for g in found)
        if there and there != self._told.get(name):
            said = "; ".join(f"domain {g.domain} on {g.endpoint}: {g.why}" for g in found)
            log.warning("hypervisor %s: %d gates are left: %s", name, len(found), said)
            await world.events.emit(body, "Warning", "GateLeft", said)
        self._told[name] = there


async def _judge(seen: Gated, world: World) -> Left | None:
    """Return it if nobody opens it. One of another installation is that one's business. Raises KubeError."""
    if seen.problem:
        return None
    gate = gates.read(seen.definition)
    if isinstance(gate, str):
        return Left(
            domain=seen.ref.name, endpoint=seen.ref.endpoint, why=f"its gate cannot be read, so nobody opens it: {gate}"
        )
    if gate.marker.installation != world.installation:
        return None
    why = gates.abandoned(gate, await world.cluster.restore(*gates.owner(gate)))
    if not why:
        return None
    return Left(domain=seen.ref.name, endpoint=seen.ref.endpoint, why=why, restore=gate.marker.restore)


def status(old: Mapping[str, Any], found: tuple[Left, ...] | None, moment: datetime) -> Any:
    """Return `leftGates` of a Hypervisor's status. Since when stays as it was first told, for the same VM and VMRestore."""
    told = old.get("leftGates")
    if found is None:
        return told
    before = {(e.get("endpoint"), e.get("domain"), e.get("restore")): e for e in told or ()}
    entries = []
    for gate in found[:MOST]:
        last = before.get((gate.endpoint, gate.domain, gate.restore or None), {})
        entry = {
            "domain": gate.domain,
            "endpoint": gate.endpoint,
            "restore": gate.restore or None,
            "sinceTime": last.get("sinceTime") or moment.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "message": clip(gate.why),
        }
        entries.append({key: value for key, value in entry.items() if value is not None})
    return entries or None
