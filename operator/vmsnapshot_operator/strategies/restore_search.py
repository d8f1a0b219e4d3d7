"""Find what a VMRestore has changed already: the VM that bears its marker, on whatever hypervisor, and its clones on the storage.

By marker and names alone, so that it is found whatever became of the snapshot. Only looks. Not what may follow from the snapshot
for that VM (`restore_gather`), nor how a marker reads (`plan.definition`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.markers import Marker
from vmsnapshot_operator.core.restoring import RestoreGroup, RestoreRequest, RestoreSeen
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import (
    DomainAmbiguousError,
    DomainGoneError,
    DriverError,
    DriverUnavailableError,
    HypervisorError,
    HypervisorUnreachableError,
    RefusedError,
)
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.plan import definition
from vmsnapshot_operator.plan.new_definition import Identity
from vmsnapshot_operator.strategies.world import LiveHypervisor, World

HYPERVISOR_GONE = "HypervisorNotFound"

LIST_TIMEOUT = Seconds(30.0)

_STRANGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where a restore works: the hypervisor, and the VM that is set back or was made."""

    live: LiveHypervisor
    client: Hypervisor
    defined: definitions.Defined | None


def marker_of(world: World, request: RestoreRequest, snapshot_uid: str) -> Marker:
    """What stands in a VM that this restore has changed."""
    return Marker(
        installation=world.installation,
        restore=f"{request.namespace}/{request.name}",
        restore_uid=request.uid,
        snapshot_uid=snapshot_uid,
    )


def clone_name(world: World, request: RestoreRequest, group: RestoreGroup | str) -> str:
    """What the clones of one class are called until they are the new VM's."""
    class_name = group if isinstance(group, str) else group.class_name
    return names.request_name(world.installation, request.uid, 1, class_name, ())


async def search(world: World, seen: RestoreSeen, began_with: str) -> RestoreSeen:
    """Look for this restore's marker on all hypervisors; that it is nowhere is certain only if all of them answer.

    `began_with`: the UUID of the VM that status names. Raises HypervisorError unless it was found, or is certainly nowhere;
    RefusedError for a marker that cannot be read.
    """
    everyone = await world.cluster.hypervisor_names()
    problems = []
    for name in sorted(everyone):
        try:
            client = client_of(world, name)
            for defined in await _candidates(client, seen.request, began_with):
                there = show(world, replace(seen, hypervisor=name), defined)
                if there.gated and (second := await second_definition(client, defined)) is not None:
                    return replace(there, problem=second.message, problem_reason=second.reason)
                if there.gated or there.is_done or there.went_back:
                    return there
        except HypervisorError as error:
            problems.append(error.message)
    lost = seen.hypervisor if seen.hypervisor not in everyone else ""
    if problems:
        raise HypervisorUnreachableError("; ".join(problems))
    if lost:
        raise HypervisorError(_no_hypervisor(lost), reason=HYPERVISOR_GONE)
    return seen


async def _candidates(client: Hypervisor, request: RestoreRequest, began_with: str) -> tuple[definitions.Defined, ...]:
    """Return the VMs of a hypervisor that may bear this restore's marker. Raises HypervisorError."""
    if not request.in_place:
        return await _look_new(client, request)
    gates, silent = await client.gates()
    # Each where it stands: the VM may run elsewhere, from a definition that knows nothing of it.
    looks = [await definitions.look_on(client, g.ref) for g in gates if request.uid in g.definition]
    there = tuple(d for d in looks if d is not None)
    problems = [*silent.values(), *(f"domain {g.ref.name}: {g.problem}" for g in gates if g.problem)]
    if problems and not there:
        raise HypervisorUnreachableError("; ".join(sorted(problems)))
    return there or (await definitions.look_everywhere(client, began_with) if began_with else ())


async def _look_new(client: Hypervisor, request: RestoreRequest) -> tuple[definitions.Defined, ...]:
    """Return the new VM by its UUID, which follows from the restore, whatever it is called by now; else whoever has its name."""
    return await definitions.look(client, _identity(request).uuid) or await definitions.look(client, request.new_name)


def _identity(request: RestoreRequest) -> Identity:
    return Identity(name=request.new_name, seed=request.uid)


def show(world: World, seen: RestoreSeen, defined: definitions.Defined) -> RestoreSeen:
    """Add what a VM shows. By its own marker a restore is known, whatever became of the snapshot. Raises RefusedError."""
    gate = definition.gate_of(defined.xml) if seen.request.in_place else None
    done = definition.done(defined.xml)
    back, why = definition.went_back(defined.xml) or (None, "")
    there = (gate.marker if gate is not None else None, *done, back)
    own = next((m for m in there if m is not None and _is_of(world, seen.request, m)), None)
    later = None
    if seen.half_done and seen.since is not None:
        later = definition.later_restore(defined.xml, seen.request.uid, seen.since)
    seen = replace(
        seen,
        gate=gate,
        went_back=why if back is not None and back == own else "",
        overtaken_by=later.restore if later is not None else "",
        marker=own or seen.marker,
        power=defined.power,
        vm_name=defined.ref.name,
        vm_uuid=defined.ref.uuid,
    )
    if not seen.request.in_place and defined.ref.uuid == _identity(seen.request).uuid and seen.marker is not None:
        # It was defined when its clones were whole; somebody defined it anew since, without our metadata.
        done = (*done, seen.marker)
    mine = (s for m in done if (s := replace(seen, done=m)).is_done)
    return next(mine, replace(seen, done=done[0] if done else None))


async def find(world: World, request: RestoreRequest, hypervisor: str, vm_uuid: str, *, begun: bool = False) -> Found:
    """Return where this restore works: where its marker is, whatever else there is by now; else where the VM runs, or is defined.

    `begun`: that its marker is nowhere is certain only if all endpoints answer. Raises HypervisorError, with the reason HYPERVISOR_GONE
    if there is no such object; KubeError; RefusedError for a marker that cannot be read, and for several VMs of a new VM's name.
    """
    live = world.hypervisors.get(hypervisor)
    if live is None and hypervisor not in await world.cluster.hypervisor_names():
        raise HypervisorError(_no_hypervisor(hypervisor), reason=HYPERVISOR_GONE)
    client = client_of(world, hypervisor)
    assert live is not None, "it has a client"  # noqa: S101 - for the type checker
    if not request.in_place:
        try:
            seen = await _look_new(client, request)
        except DomainGoneError as error:  # there are several
            raise RefusedError(error.message, reason="NameTaken") from error
        return Found(live=live, client=client, defined=seen[0] if seen else None)
    try:
        seen = await definitions.look_everywhere(client, vm_uuid)
        silent = None
    except HypervisorUnreachableError as error:
        seen = await definitions.look(client, vm_uuid)
        silent = error
    ranks = {d.ref: _rank(world, request, d) for d in seen}
    first = min(seen, key=lambda d: ranks[d.ref], default=None)
    if silent is not None and begun and (first is None or ranks[first.ref] == _STRANGE):
        raise silent
    return Found(live=live, client=client, defined=first)


def client_of(world: World, hypervisor: str) -> Hypervisor:
    """Return the connections of a Hypervisor object. Raises HypervisorUnreachableError."""
    live = world.hypervisors.get(hypervisor)
    if live is None or live.client is None:
        why = live.problem if live is not None else "it has not been seen yet"
        raise HypervisorUnreachableError(f'hypervisor "{hypervisor}" cannot be used: {why}')
    return live.client


def _no_hypervisor(name: str) -> str:
    return f'there is no Hypervisor "{name}" any more'


def _rank(world: World, request: RestoreRequest, defined: definitions.Defined) -> int:
    """A gate that this restore closed comes first, since that has to be opened again; then what says that it has done so."""
    gate, back = definition.gate_of(defined.xml), definition.went_back(defined.xml)
    if gate is not None and _is_of(world, request, gate.marker):
        return 0
    ends = (*definition.done(defined.xml), back[0] if back is not None else None)
    return 1 if any(m is not None and _is_of(world, request, m) for m in ends) else _STRANGE


def _is_of(world: World, request: RestoreRequest, marker: Marker) -> bool:
    return (marker.installation, marker.restore_uid) == (world.installation, request.uid)


async def second_definition(client: Hypervisor, defined: definitions.Defined) -> DomainAmbiguousError | None:
    """Why a VM of which there is another definition on another endpoint cannot be set back: that would be open while ours is gated.

    Raises HypervisorError unless all endpoints answer.
    """
    places = await client.places(defined.ref)
    if places == (defined.ref,):
        return None
    why = "whoever starts it from another definition than the one that is set back starts it with disks that are half done"
    return DomainAmbiguousError(defined.ref.name, [p.endpoint for p in places], why)


async def with_clones(world: World, seen: RestoreSeen) -> RestoreSeen:
    """Ask the storage what it holds of a new VM's volumes; a driver that does not say it is told as trouble. Raises KubeError."""
    if seen.request.in_place or not seen.finalizer:
        return seen
    prefix = names.object_prefix(world.installation, seen.request.uid)
    try:
        hosts = await hosts_of(world, seen.record)
        parts = await asyncio.gather(*(h.list(prefix, timeout=LIST_TIMEOUT) for h in hosts.values()))
    except DriverError as error:
        return replace(seen, held=None, trouble=seen.trouble or error.message)
    return replace(seen, held=frozenset(n for part in parts for n in part if n.startswith(prefix)))


async def hosts_of(world: World, record: Record | None) -> dict[str, DriverHost]:
    """Return by class the drivers that may hold something of a restore: those on record, else those of all classes.

    Raises DriverError, KubeError.
    """
    if record is not None:
        return {c: await world.classes.host_of_record(group) for c, group in record.groups.items()}
    hosts = {}
    for name in await world.cluster.class_names():
        if (host := world.classes.host(name)) is None:
            text = f'class "{name}": its driver does not run, so what its storage holds is not known; mend the class'
            raise DriverUnavailableError(text)
        hosts[name] = host
    return hosts
