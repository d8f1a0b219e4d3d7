"""Look at the world for one VMRestore, and perform one effect of it. What follows from what is `plan.next_restore`.

Everything here may be repeated: the gate and the done-marker in the VM's definition say how far it came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmsnapshot_operator.api.meta import API_VERSION, FINALIZER
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import CutResult, Fit, Progress
from vmsnapshot_operator.core.effects import Condition, Failure, Record
from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Patience, Refusal
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
    RestorePlan,
    RestoreRequest,
    RestoreSeen,
    Revert,
    Safety,
    Start,
    Stop,
    TakeSafety,
)
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Layer, Seconds, VolumeId
from vmsnapshot_operator.errors import (
    ConflictError,
    DomainGoneError,
    DriverError,
    HypervisorError,
    RefusedError,
    SnapshotError,
)
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.kube import contents, distill
from vmsnapshot_operator.plan import access, definition, new_definition, restore_plan
from vmsnapshot_operator.plan.next_restore import conditions_of_end
from vmsnapshot_operator.strategies.world import LiveHypervisor, World, clock

log = logging.getLogger(__name__)

CHECK_TIMEOUT = Seconds(30.0)
WORK_TIMEOUT = Seconds(86_400.0)
STALL_SECONDS = Seconds(120.0)
"""A copy that says nothing for so long is taken to hang."""
DELETE_TIMEOUT = Seconds(60.0)
SHUTDOWN_SECONDS = Seconds(120.0)
AGENT_SECONDS = Seconds(2.0)
BUSY_SECONDS = Seconds(5.0)


@dataclass(slots=True)
class Memory:
    """What this process remembers of one VMRestore between two looks; it may be lost at any moment without harm."""

    since: Seconds
    broken: Failure | None = None
    started: bool = False
    trouble: str = ""
    retry_at: Seconds | None = None
    failures: int = 0
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Where a restore works: the snapshot's record, the hypervisor, and the VM that is set back or was made."""

    record: Record
    hypervisor: str
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


def safety_name(request: RestoreRequest) -> str:
    """Name of the safety snapshot's VMSnapshot: follows from the restore, so that a repeat finds it."""
    return f"{request.name[:200]}-safety-{request.uid[:8]}"


async def gather(world: World, body: Mapping[str, Any], memory: Memory) -> RestoreSeen:
    """Return one frozen observation of everything that concerns this VMRestore. Raises RefusedError, KubeError."""
    request = distill.restore(body)
    seen = RestoreSeen(
        request=request,
        deleting=bool(body["metadata"].get("deletionTimestamp")),
        finalizer=FINALIZER in (body["metadata"].get("finalizers") or ()),
        ended=_ended(body),
        broken=memory.broken,
        started=memory.started,
        leader=world.leadership.is_leader(),
        known_for=Seconds(clock() - memory.since),
        trouble=memory.trouble,
        retry_in=Seconds(max(0.0, memory.retry_at - clock())) if memory.retry_at is not None else Seconds(0.0),
        progress=dict(memory.progress),
    )
    snapshot = await world.cluster.snapshot(request.namespace, request.snapshot)
    uid = str(snapshot["metadata"]["uid"]) if snapshot is not None else ""
    record = await _record(world, snapshot)
    refusal = restore_plan.refuse_snapshot(request, restore_plan.SnapshotSeen(body=snapshot, record=record))
    if record is None or record.problem or snapshot is None:
        return replace(seen, refusal=refusal)
    seen = replace(seen, record=record, marker=marker_of(world, request, uid))
    hypervisor = str(snapshot["spec"]["source"]["hypervisorName"])
    try:
        found = await _find(world, request, record, hypervisor)
        return await _look(world, request, seen, found, refusal)
    except HypervisorError as error:
        return replace(seen, problem=error.message, refusal=refusal)
    except RefusedError as error:
        return replace(seen, refusal=Refusal(reason=error.reason, message=error.message))


def _ended(body: Mapping[str, Any]) -> tuple[Condition, ...]:
    """An end that was told before, as it was told; else nothing."""
    words = {"True": True, "False": False}
    told = tuple(
        Condition(
            type=str(c.get("type")),
            status=words.get(str(c.get("status"))),
            reason=str(c.get("reason", "")),
            message=str(c.get("message", "")),
        )
        for c in (body.get("status") or {}).get("conditions") or ()
    )
    return told if conditions_of_end(told) else ()


async def _record(world: World, snapshot: Mapping[str, Any] | None) -> Record | None:
    if snapshot is None:
        return None
    asked = distill.request(snapshot)
    content = await world.cluster.content(contents.name_for(asked.uid))
    return contents.from_body(content, asked, world.installation) if content is not None else None


async def _find(world: World, request: RestoreRequest, record: Record, hypervisor: str) -> Found:
    live = world.hypervisors.get(hypervisor)
    if live is None:
        raise HypervisorError(f'there is no Hypervisor "{hypervisor}"', reason="HypervisorNotFound")
    if live.client is None:
        raise HypervisorError(
            f'hypervisor "{hypervisor}" cannot be used: {live.problem}', reason="HypervisorUnreachable", retryable=True
        )
    wanted = record.plan.vm_uuid if request.in_place else request.new_name
    return Found(
        record=record,
        hypervisor=hypervisor,
        live=live,
        client=live.client,
        defined=await definitions.look(live.client, wanted),
    )


async def _look(
    world: World, request: RestoreRequest, seen: RestoreSeen, found: Found, refusal: Refusal | None
) -> RestoreSeen:
    labels = await world.cluster.namespace_labels(request.namespace)
    name = found.defined.ref.name if found.defined is not None else request.new_name or found.record.plan.vm_name
    if not access.may_use(found.live.access, labels, name):
        return replace(seen, refusal=access.not_found(name, found.hypervisor, request.namespace))
    defined = found.defined
    if defined is not None:
        seen = replace(
            seen,
            gate=definition.gate_of(defined.xml) if request.in_place else None,
            done=definition.done(defined.xml),
            power=defined.power,
            vm_name=defined.ref.name,
            vm_uuid=defined.ref.uuid,
        )
    if seen.is_done and request.start_after and seen.power is PowerState.RUNNING and defined is not None:
        seen = replace(seen, agent_answers=await _agent(found.client, defined))
    if not request.in_place and seen.finalizer:
        seen = replace(seen, held=await _held(world, request, found.record))
    if seen.ended:
        return seen
    seen = await _safety(world, request, seen)
    if seen.is_done:
        return seen
    if refusal is not None and not seen.gated:
        return replace(seen, refusal=refusal)
    if request.in_place:
        return await _plan_in_place(world, request, seen, found)
    return _plan_new(request, seen, found)


async def _agent(client: Hypervisor, defined: definitions.Defined) -> bool | None:
    if not defined.agent_channel:
        return None
    try:
        state, _ = await definitions.wait_for_agent(client, defined.ref, AGENT_SECONDS)
    except HypervisorError:
        return False
    return state not in (AgentState.ABSENT, AgentState.SILENT)


async def _safety(world: World, request: RestoreRequest, seen: RestoreSeen) -> RestoreSeen:
    if not request.in_place or not request.safety:
        return seen
    name = safety_name(request)
    body = await world.cluster.snapshot(request.namespace, name)
    if body is None:
        return replace(seen, safety_name=name)
    conditions = {c.get("type"): c for c in (body.get("status") or {}).get("conditions") or ()}
    record = await _record(world, body)
    if record is not None and record.taken and record.ready and not record.problem:
        return replace(seen, safety_name=name, safety=Safety.READY, safety_record=record)
    stalled = conditions.get("Stalled") or {}
    if stalled.get("status") == "True" or body["metadata"].get("deletionTimestamp"):
        message = str(stalled.get("message", "it is being deleted"))
        return replace(seen, safety_name=name, safety=Safety.FAILED, safety_message=message)
    under_way = str((conditions.get("Reconciling") or {}).get("message", ""))
    return replace(seen, safety_name=name, safety=Safety.TAKING, safety_message=under_way)


async def _plan_in_place(world: World, request: RestoreRequest, seen: RestoreSeen, found: Found) -> RestoreSeen:
    volumes = restore_plan.wanted(request, found.record)
    if isinstance(volumes, Refusal):
        return replace(seen, refusal=volumes)
    if found.defined is None:
        return replace(seen, refusal=access.not_found(found.record.plan.vm_name, found.hypervisor, request.namespace))
    if seen.gate is not None and not seen.gated:
        message = f"VMRestore {seen.gate.marker.restore} has begun to set this VM back; waiting until that has ended"
        return replace(seen, in_use_by=message)
    holder = world.claims.get(found.defined.ref.uuid, request.uid)
    if holder != request.uid and not seen.gated:
        return replace(seen, in_use_by="another operation on this VM is under way; waiting until it has ended")
    if seen.gated:
        # The disks were held against what is on record before the gate was closed; now the gate holds them.
        return replace(seen, plan=restore_plan.make(found.record, volumes, {v.target: v.volume for v in volumes}))
    machine = await found.client.describe(found.defined.ref, ask_agent=False)
    if (refusal := restore_plan.refuse_vm(request, machine, gated=False)) is not None:
        return replace(seen, refusal=refusal)
    bear = restore_plan.onto(volumes, machine.disks)
    if isinstance(bear, Refusal):
        return replace(seen, refusal=bear)
    plan = restore_plan.make(found.record, volumes, bear)
    if machine.power is PowerState.SHUT_OFF:  # while it runs, every driver would say that its disks are in use
        try:
            answers = await _ask(world, plan, found.record)
        except DriverError as error:
            refusal = Refusal(reason=error.reason, message=error.message, patience=Patience.WAIT)
            return replace(seen, refusal=refusal)
        if (refusal := restore_plan.refuse_fits(answers, plan)) is not None:
            return replace(seen, refusal=refusal)
    return replace(seen, plan=plan)


def _plan_new(request: RestoreRequest, seen: RestoreSeen, found: Found) -> RestoreSeen:
    volumes = restore_plan.wanted(request, found.record)
    if isinstance(volumes, Refusal):
        return replace(seen, refusal=volumes)
    if found.defined is not None:
        message = f'there is a VM "{request.new_name}" already; take another name (spec.newVM.name)'
        return replace(seen, refusal=Refusal(reason="NameTaken", message=message))
    if not found.record.plan.definition:
        message = "the snapshot does not hold the VM's definition: define the new VM by hand, from clones"
        return replace(seen, refusal=Refusal(reason="DefinitionMissing", message=message))
    if unable := [g.class_name for g in found.record.plan.groups if not g.capabilities.clone]:
        message = f"class {', '.join(unable)} cannot clone what it has snapshotted; use mode InPlace"
        return replace(seen, refusal=Refusal(reason="CloneNotSupported", message=message))
    return replace(seen, plan=restore_plan.make(found.record, volumes, {}))


async def _ask(world: World, plan: RestorePlan, record: Record) -> Mapping[str, Sequence[Fit]]:
    async def ask(group: RestoreGroup) -> tuple[str, Sequence[Fit]]:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        return group.class_name, await host.check_revert(group.cut, group.onto, timeout=CHECK_TIMEOUT)

    return dict(await asyncio.gather(*(ask(g) for g in plan.groups)))


def clone_name(world: World, request: RestoreRequest, group: RestoreGroup | str) -> str:
    """What the clones of one class are called until they are the new VM's."""
    class_name = group if isinstance(group, str) else group.class_name
    return names.request_name(world.installation, request.uid, 1, class_name, ())


async def _held(world: World, request: RestoreRequest, record: Record) -> frozenset[str] | None:
    prefix = names.object_prefix(world.installation, request.uid)

    async def ask(class_name: str) -> Sequence[str]:
        host = await world.classes.host_of_record(record.groups[class_name])
        return await host.list(prefix, timeout=CHECK_TIMEOUT)

    try:
        found = await asyncio.gather(*(ask(c) for c in record.groups))
    except DriverError:
        return None
    return frozenset(n for part in found for n in part if n.startswith(prefix))


# --- doing ---------------------------------------------------------------------------------------------------------------


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
        case _:
            record = seen.record
            assert record is not None, "nothing is done without a record"  # noqa: S101 - invariant of decide
            snapshot = await world.cluster.snapshot(seen.request.namespace, seen.request.snapshot)
            if snapshot is None:
                raise ConflictError(f"VMSnapshot {seen.request.snapshot} is gone; looking again")
            hypervisor = str(snapshot["spec"]["source"]["hypervisorName"])
            found = await _find(world, seen.request, record, hypervisor)
            await _act(world, effect, seen, found, memory)


async def _act(world: World, effect: RestoreEffect, seen: RestoreSeen, found: Found, memory: Memory) -> None:
    match effect:
        case Clone(groups):
            await _clone(world, groups, seen, found, memory)
            return
        case RemoveClones(held):
            await _remove_clones(world, held, found.record)
            return
        case HandOver(held):
            await _hand_over(world, held, seen.request.uid, found.record)
            return
        case _:
            pass
    if found.defined is None:
        raise DomainGoneError(f"domain {seen.vm_name} is gone")
    client, ref = found.client, found.defined.ref
    match effect:
        case Stop():
            await definitions.stop(client, ref, SHUTDOWN_SECONDS)
        case CloseGate(targets):
            await _close_gate(world, seen, found, targets)
        case Revert(groups):
            await _revert(world, groups, seen, found, memory)
        case GoBack():
            await _go_back(world, seen, found, memory)
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
                "labels": {"vmsnapshot.io/safety-of": request.name[:63]},
            },
            "spec": spec,
        }
    )


async def _close_gate(world: World, seen: RestoreSeen, found: Found, targets: tuple[str, ...]) -> None:
    assert seen.marker is not None, "told with the record"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    ref = found.defined.ref
    if not world.claim(ref.uuid, seen.request.uid):
        raise ConflictError("another operation on this VM is under way")
    try:
        gate = Gate(marker=seen.marker, targets=_targets_now(seen, targets), autostart=found.defined.autostart)
        async with step(Step.GATE_CLOSE, seen.request.uid):
            await definitions.redefine(found.client, ref, lambda text: definition.gated(text, gate))
        await definitions.set_autostart(found.client, ref, on=False)
    finally:
        world.release(seen.request.uid)


def _targets_now(seen: RestoreSeen, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Where the disks are plugged now, which may be another target than at the snapshot."""
    assert seen.plan is not None, "a gate is closed for a plan"  # noqa: S101 - for the type checker
    now = {v.id: v.label for g in seen.plan.groups for v in g.onto}
    assert seen.record is not None, "told with the plan"  # noqa: S101 - for the type checker
    then = {v.target: v.volume.id for v in seen.record.plan.volumes}
    return tuple(now.get(then[t], t) for t in targets)


async def _revert(
    world: World, groups: tuple[RestoreGroup, ...], seen: RestoreSeen, found: Found, memory: Memory
) -> None:
    await _set_back(world, groups, found.record, seen.request.uid, memory)
    await _open(seen, found, reopen=False)


async def _set_back(world: World, groups: Sequence[RestoreGroup], record: Record, uid: str, memory: Memory) -> None:
    async def revert(group: RestoreGroup) -> None:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        async with step(Step.REVERT_DRIVER, uid, group.class_name):
            await host.revert(
                group.cut,
                group.onto,
                timeout=WORK_TIMEOUT,
                stall=STALL_SECONDS,
                on_progress=_progress(memory, group.class_name),
            )

    await _all(revert(g) for g in groups)


def _progress(memory: Memory, class_name: str) -> Callable[[Progress], None]:
    def note(progress: Progress) -> None:
        memory.progress[class_name] = (progress.done_bytes, progress.total_bytes)

    return note


async def _all(work: Any) -> None:
    """Do all at once, to the end, and raise the first error: none is left behind at work."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _open(seen: RestoreSeen, found: Found, *, reopen: bool) -> None:
    """Put the true disks back into the definition; `reopen`: as if nothing had been done."""
    marker, gate = seen.marker, seen.gate
    assert marker is not None, "told with the record"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    genid = new_definition.genid(seen.request.uid)

    def change(text: str) -> str:
        return definition.reopened(text, marker) if reopen else definition.restored(text, marker, genid=genid)

    async with step(Step.GATE_OPEN, seen.request.uid):
        if gate is not None and gate.autostart:
            await definitions.set_autostart(found.client, found.defined.ref, on=True)
        await definitions.redefine(found.client, found.defined.ref, change)


async def _go_back(world: World, seen: RestoreSeen, found: Found, memory: Memory) -> None:
    record = seen.safety_record
    assert record is not None, "one goes back to a safety snapshot that is Ready"  # noqa: S101 - invariant of decide
    volumes = tuple(v for v in record.plan.volumes if _is_wanted(seen, v.volume.id))
    plan = restore_plan.make(record, volumes, {v.target: v.volume for v in volumes})
    await _set_back(world, plan.groups, record, seen.request.uid, memory)
    await _open(seen, found, reopen=True)
    if memory.broken is None and seen.refusal is not None:
        memory.broken = Failure(reason=seen.refusal.reason, message=seen.refusal.message)


def _is_wanted(seen: RestoreSeen, volume: VolumeId) -> bool:
    include = seen.request.include
    record = seen.record
    return record is None or any(
        v.volume.id == volume and (not include or v.target in include) for v in record.plan.volumes
    )


async def _clone(
    world: World, groups: tuple[RestoreGroup, ...], seen: RestoreSeen, found: Found, memory: Memory
) -> None:
    """Clone all wanted volumes, and define the new VM on them."""
    request, record, marker = seen.request, found.record, seen.marker
    assert marker is not None, "told with the record"  # noqa: S101 - for the type checker
    made: dict[VolumeId, Layer] = {}

    async def clone(group: RestoreGroup) -> None:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        wanted = {v.id for v in group.onto}
        cut = CutResult(
            handles={v: h for v, h in group.cut.handles.items() if v in wanted},
            atomic=group.cut.atomic,
            group=group.cut.group,
        )
        async with step(Step.CLONE_DRIVER, request.uid, group.class_name):
            made.update(
                await host.clone(
                    cut,
                    clone_name(world, request, group),
                    timeout=WORK_TIMEOUT,
                    stall=STALL_SECONDS,
                    on_progress=_progress(memory, group.class_name),
                )
            )

    await _all(clone(g) for g in groups)
    sources = {v.target: made[v.volume.id] for v in record.plan.volumes if v.volume.id in made}
    identity = new_definition.Identity(name=request.new_name, seed=request.uid)
    new = new_definition.as_new_vm(record.plan.definition, identity, sources, marker)
    endpoint = record.plan.endpoint if record.plan.endpoint in found.client.endpoints else found.client.endpoints[0]
    async with step(Step.CLONE_DEFINE, request.uid):
        await definitions.define(found.client, endpoint, new.xml)


async def _hand_over(world: World, held: frozenset[str], uid: str, record: Record) -> None:
    for class_name, group in record.groups.items():
        host = await world.classes.host_of_record(group)
        for name in sorted(held):
            async with step(Step.CLONE_KEEP, uid, class_name):
                await host.keep(name, timeout=DELETE_TIMEOUT)


async def _remove_clones(world: World, held: frozenset[str], record: Record) -> None:
    problems = []
    for class_name, group in record.groups.items():
        host = await world.classes.host_of_record(group)
        for name in sorted(held):
            try:
                await host.delete(name, timeout=DELETE_TIMEOUT)
            except SnapshotError as error:
                problems.append(f'class "{class_name}": {name}: {error.message}')
    if problems:
        text = f"still on storage, trying again: {'; '.join(problems)}"
        raise DriverError(text, reason="StorageUnavailable", retryable=True)
