"""Perform one effect of a VMRestore. What follows from what is `plan.next_restore`; what was seen comes from `restore_gather`.

Everything here may be repeated: the gate and the done-marker in the VM's definition say how far it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vmsnapshot_operator.api.meta import API_VERSION, LABEL_SAFETY_OF, label_of
from vmsnapshot_operator.core.driver import Progress
from vmsnapshot_operator.core.effects import Failure, Record
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.markers import Gate
from vmsnapshot_operator.core.restoring import (
    Claim,
    Clone,
    CloseGate,
    GoBack,
    HandOver,
    LetGo,
    RemoveClones,
    RestoreEffect,
    RestoreGroup,
    RestoreSeen,
    Revert,
    Start,
    Stop,
    TakeSafety,
)
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import NVRAM, Layer, Seconds, VolumeId, volume_id
from vmsnapshot_operator.errors import (
    ConflictError,
    DomainGoneError,
    DriverError,
    HypervisorError,
    HypervisorUnreachableError,
    RefusedError,
    SnapshotError,
)
from vmsnapshot_operator.hypervisors import definitions, domain_xml
from vmsnapshot_operator.plan import definition, new_definition, restore_plan
from vmsnapshot_operator.strategies.restore_gather import Memory, safety_name
from vmsnapshot_operator.strategies.restore_search import (
    Found,
    client_of,
    clone_name,
    find,
    hosts_of,
    second_definition,
)
from vmsnapshot_operator.strategies.world import World

WORK_TIMEOUT = Seconds(86_400.0)
STALL_SECONDS = Seconds(120.0)
"""A copy that says nothing for so long is taken to hang."""
DELETE_TIMEOUT = Seconds(60.0)
SHUTDOWN_SECONDS = Seconds(120.0)


async def apply(
    world: World, effect: RestoreEffect, seen: RestoreSeen, body: Mapping[str, Any], memory: Memory
) -> None:
    """Perform one effect. Raises SnapshotError; the next look sees what was done."""
    match effect:
        case Claim():
            await world.cluster.add_finalizer(body)
        case LetGo():
            await world.cluster.remove_finalizer(body)
        case TakeSafety():
            await _take_safety(world, seen)
        case RemoveClones(held):
            await _remove_clones(world, held, seen.record)
        case HandOver(held):
            await _hand_over(world, held, seen.request.uid, seen.record)
        case _:
            found = await find(world, seen.request, seen.hypervisor, seen.vm_uuid)
            await _act(world, effect, seen, found, memory)


async def _act(world: World, effect: RestoreEffect, seen: RestoreSeen, found: Found, memory: Memory) -> None:
    if isinstance(effect, Clone):
        await _clone(world, effect.groups, seen, found, memory)
        return
    if found.defined is None:
        raise DomainGoneError(f"domain {seen.vm_name} is gone")
    client, ref = found.client, found.defined.ref
    match effect:
        case Stop():
            memory.stopped = True
            await definitions.stop(client, ref, SHUTDOWN_SECONDS)
        case CloseGate():
            await _close_gate(world, seen, found)
        case Revert(groups):
            await _revert(world, groups, seen, found, memory)
        case GoBack(why):
            await _go_back(world, seen, found, memory, why)
        case Start():
            await definitions.start(client, ref)
            memory.started = True
        case _:
            raise AssertionError(f"no way to apply {effect!r}")


async def _take_safety(world: World, seen: RestoreSeen) -> None:
    request = seen.request
    snapshot = await world.cluster.snapshot(request.namespace, request.snapshot)
    if snapshot is None:
        raise ConflictError(f"VMSnapshot {request.snapshot} is gone; looking again")
    spec: dict[str, Any] = {
        "source": {"hypervisorName": snapshot["spec"]["source"]["hypervisorName"], "domain": seen.vm_uuid},
        "quiesce": {"policy": "Prefer"},
    }
    if excluded := ((snapshot["spec"].get("volumes") or {}).get("exclude")):
        spec["volumes"] = {"exclude": list(excluded)}
    await world.cluster.create_snapshot(
        {
            "apiVersion": API_VERSION,
            "kind": "VMSnapshot",
            "metadata": {
                "namespace": request.namespace,
                "name": safety_name(request),
                "labels": {LABEL_SAFETY_OF: label_of(request.name)},
            },
            "spec": spec,
        }
    )


async def _close_gate(world: World, seen: RestoreSeen, found: Found) -> None:
    assert seen.marker is not None, "told with the record"  # noqa: S101 - for the type checker
    assert seen.record is not None, "told with the plan"  # noqa: S101 - for the type checker
    assert seen.plan is not None, "a gate is closed for a plan"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    ref = found.defined.ref
    if not world.claim(ref.uuid, seen.request.uid):
        raise ConflictError("another operation on this VM is under way")
    try:
        targets = restore_plan.targets_now(seen.plan, seen.record)
        gate = Gate(marker=seen.marker, targets=targets, autostart=found.defined.autostart)
        again_since = seen.since if seen.half_done else None
        async with step(Step.GATE_CLOSE, seen.request.uid):
            await definitions.redefine(
                found.client,
                ref,
                lambda text: definition.gated(text, gate, again_since=again_since),
                take_back=True,
                permit=lambda: _permit(world),
            )
        await definitions.set_autostart(found.client, ref, on=False)
    finally:
        world.release(seen.request.uid)


async def _revert(
    world: World, groups: tuple[RestoreGroup, ...], seen: RestoreSeen, found: Found, memory: Memory
) -> None:
    assert seen.record is not None, "told with the groups"  # noqa: S101 - for the type checker
    await _must_still_be_closed(seen, found)
    await _set_back(world, groups, seen.record, seen.request.uid, memory)
    await _open(world, seen, found)


def _permit(world: World) -> str:
    return "" if world.leadership.is_leader() else "another instance may have taken over"


async def _must_still_be_closed(seen: RestoreSeen, found: Found) -> None:
    """Ask right before disks are replaced: for files the driver cannot know whether a QEMU has them open.

    Raises ConflictError if the VM bears the gate no more, HypervisorError if it runs all the same, or could from another definition.
    """
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    gate, name = definition.gate_of(found.defined.xml), found.defined.ref.name
    if gate is None or gate.marker != seen.marker:
        raise ConflictError(f"domain {name} does not bear the gate of this restore any more; looking again")
    if found.defined.power is not PowerState.SHUT_OFF:
        text = f"domain {name} is {found.defined.power} although its disks were taken from it: none of them is touched"
        raise HypervisorError(text, reason="VMRunning", retryable=True)
    if (second := await second_definition(found.client, found.defined)) is not None:
        raise second


async def _set_back(world: World, groups: Sequence[RestoreGroup], record: Record, uid: str, memory: Memory) -> None:
    async def revert(group: RestoreGroup) -> None:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        async with step(Step.REVERT_DRIVER, uid, group.class_name):
            await host.revert(
                group.cut,
                group.onto,
                timeout=WORK_TIMEOUT,
                stall=STALL_SECONDS,
                on_progress=_progress(world, memory, group.class_name),
            )

    await _all(revert(g) for g in groups)


def _progress(world: World, memory: Memory, class_name: str) -> Callable[[Progress], None]:
    def note(progress: Progress) -> None:
        before, _ = memory.progress.get(class_name, (0, 0))
        world.metrics.copied(class_name, max(0, progress.done_bytes - before))
        memory.progress[class_name] = (progress.done_bytes, progress.total_bytes)

    return note


async def _all(work: Any) -> None:
    """Do all at once, to the end, and raise the first error: none is left behind at work."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _open(world: World, seen: RestoreSeen, found: Found, why: str = "") -> None:
    """Put the true disks back into the definition; `why`: the reason for which all went back, and nothing was done."""
    marker, gate = seen.marker, seen.gate
    assert marker is not None, "told with the record"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    genid = new_definition.genid(seen.request.uid)

    def change(text: str) -> str:
        if why:
            return definition.reopened(text, marker, why=why, now=world.now())
        return definition.restored(text, marker, genid=genid, now=world.now())

    async with step(Step.GATE_OPEN, seen.request.uid):
        if gate is not None and gate.autostart:
            await definitions.set_autostart(found.client, found.defined.ref, on=True)
        await definitions.redefine(found.client, found.defined.ref, change, permit=lambda: _permit(world))


async def _go_back(world: World, seen: RestoreSeen, found: Found, memory: Memory, why: Failure) -> None:
    record = seen.safety_record
    assert record is not None, "one goes back to a safety snapshot that is Ready"  # noqa: S101 - invariant of decide
    await _must_still_be_closed(seen, found)
    touched = _touched(seen, found, record)
    volumes = tuple(v for v in record.plan.volumes if v.volume.id in touched)
    plan = restore_plan.make(record, volumes, {v.target: v.volume for v in volumes})
    await _set_back(world, plan.groups, record, seen.request.uid, memory)
    await _open(world, seen, found, why.reason)
    memory.broken = memory.broken or why


def _touched(seen: RestoreSeen, found: Found, safety: Record) -> frozenset[VolumeId]:
    """Return what may have been changed: what was asked for, or, where the snapshot is gone, at least that.

    The gate names the disks then; whether the variables of the firmware were among it follows from the request. Raises
    RefusedError unless the safety snapshot holds all of it.
    """
    request, record = seen.request, seen.record
    if record is not None:
        return frozenset(v.volume.id for v in record.plan.volumes if not request.include or v.target in request.include)
    assert seen.marker is not None, "told with the gate"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    gate = definition.gate_of(found.defined.xml)
    if gate is None:
        raise ConflictError("the VM bears no gate any more; looking again")
    disks, _ = domain_xml.parse(definition.reopened(found.defined.xml, seen.marker))
    taken = frozenset(volume_id(d.layers[0]) for d in disks if d.target in gate.targets and d.layers)
    held = frozenset(v.volume.id for v in safety.plan.volumes)
    if lacks := len(taken - held):
        text = f'the safety snapshot "{seen.safety_name}" lacks {lacks} of the {len(taken)} disks that were taken from the VM'
        raise RefusedError(text, reason="DisksChanged")
    if request.include and NVRAM not in request.include:
        return taken
    return taken | {v.volume.id for v in safety.plan.volumes if v.volume.is_nvram}


async def _clone(
    world: World, groups: tuple[RestoreGroup, ...], seen: RestoreSeen, found: Found, memory: Memory
) -> None:
    """Clone all wanted volumes, and define the new VM on them."""
    request, record, marker = seen.request, seen.record, seen.marker
    assert record is not None, "told with the groups"  # noqa: S101 - for the type checker
    assert marker is not None, "told with the record"  # noqa: S101 - for the type checker
    made: dict[VolumeId, Layer] = {}

    async def clone(group: RestoreGroup) -> None:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        wanted = {v.id for v in group.onto}
        cut = replace(group.cut, handles={v: h for v, h in group.cut.handles.items() if v in wanted})
        async with step(Step.CLONE_DRIVER, request.uid, group.class_name):
            made.update(
                await host.clone(
                    cut,
                    clone_name(world, request, group),
                    timeout=WORK_TIMEOUT,
                    stall=STALL_SECONDS,
                    on_progress=_progress(world, memory, group.class_name),
                )
            )

    await _all(clone(g) for g in groups)
    sources = {v.target: made[v.volume.id] for v in record.plan.volumes if v.volume.id in made}
    identity = new_definition.Identity(name=request.new_name, seed=request.uid)
    new = new_definition.as_new_vm(record.plan.definition, identity, sources, marker)
    endpoint = record.plan.endpoint if record.plan.endpoint in found.client.endpoints else found.client.endpoints[0]
    async with step(Step.CLONE_DEFINE, request.uid):
        await definitions.define(found.client, endpoint, new.xml)


async def _hand_over(world: World, held: frozenset[str], uid: str, record: Record | None) -> None:
    for class_name, host in (await hosts_of(world, record)).items():
        for name in sorted(held):
            async with step(Step.CLONE_KEEP, uid, class_name):
                await host.keep(name, timeout=DELETE_TIMEOUT)


async def _remove_clones(world: World, held: frozenset[str], record: Record | None) -> None:
    await _must_be_unused(world, held)
    problems = []
    for class_name, host in (await hosts_of(world, record)).items():
        for name in sorted(held):
            try:
                await host.delete(name, timeout=DELETE_TIMEOUT)
            except SnapshotError as error:
                problems.append(f'class "{class_name}": {name}: {error.message}')
    if problems:
        text = f"still on storage, trying again: {'; '.join(problems)}"
        raise DriverError(text, reason="StorageUnavailable", retryable=True)


async def _must_be_unused(world: World, held: frozenset[str]) -> None:
    """Raise DriverError (`InUse`) or HypervisorError unless all hypervisors say that no VM has any of these clones among its disks.

    Not every storage refuses to delete what a VM uses, and the new VM may bear another name by now, or no marker.
    """
    for hypervisor in await world.cluster.hypervisor_names():
        users, silent = await client_of(world, hypervisor).users(held)
        if users:
            text = (
                f"VM {', '.join(sorted(set(users.values())))} has {', '.join(sorted(users))} among its disks: undefine that VM (its disks"
                " are removed then), or give it other ones"
            )
            raise DriverError(text, reason="InUse", retryable=True)
        if silent:
            text = f"whether a VM has clones among its disks is not known: {'; '.join(silent.values())}"
            raise HypervisorUnreachableError(text)
