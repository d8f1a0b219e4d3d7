"""Look at the world once for one VMRestore and write down what was seen: its snapshot, its VM, and a plan or why there is none.

Only looks; what follows is `plan.next_restore`. Where it has changed something already is found by `restore_search`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.core.driver import Fit
from vmsnapshot_operator.core.effects import Condition, Failure, Record
from vmsnapshot_operator.core.machine import AgentState, Machine, PowerState
from vmsnapshot_operator.core.markers import Gate
from vmsnapshot_operator.core.planning import Patience, Refusal
from vmsnapshot_operator.core.restoring import (
    RestoreGroup,
    RestorePlan,
    RestoreRequest,
    RestoreSeen,
    Safety,
)
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    DriverError,
    HypervisorError,
    RefusedError,
)
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.kube import contents, distill
from vmsnapshot_operator.plan import access, fingerprints, new_definition, restore_plan
from vmsnapshot_operator.plan.next_restore import conditions_of_end
from vmsnapshot_operator.strategies.restore_search import (
    HYPERVISOR_GONE,
    Found,
    find,
    marker_of,
    search,
    second_definition,
    show,
    with_clones,
)
from vmsnapshot_operator.strategies.world import World, clock

CHECK_TIMEOUT = Seconds(30.0)
AGENT_SECONDS = Seconds(2.0)


@dataclass(slots=True)
class Memory:
    """What this process remembers of one VMRestore between two looks; it may be lost at any moment without harm."""

    since: Seconds
    broken: Failure | None = None
    stopped: bool = False
    started: bool = False
    trouble: str = ""
    retry_at: Seconds | None = None
    failures: int = 0
    progress: dict[str, tuple[int, int]] = field(default_factory=dict)


def safety_name(request: RestoreRequest) -> str:
    """Name of the safety snapshot's VMSnapshot: follows from the restore, so that a repeat finds it."""
    return f"{request.name[:200]}-safety-{request.uid[:8]}"


async def gather(world: World, body: Mapping[str, Any], memory: Memory) -> RestoreSeen:
    """Return one frozen observation of everything that concerns this VMRestore. Raises RefusedError, KubeError."""
    request, told = distill.restore(body), body.get("status") or {}
    seen = RestoreSeen(
        request=request,
        deleting=bool(body["metadata"].get("deletionTimestamp")),
        finalizer=FINALIZER in (body["metadata"].get("finalizers") or ()),
        ended=_ended(body),
        begun=bool(told.get("startTime")),
        told_half_done=_told_half_done(told),
        since=_since(request, told),
        hypervisor=str(told.get("hypervisorName") or ""),
        broken=memory.broken,
        stopped=memory.stopped,
        started=memory.started,
        leader=world.leadership.is_leader(),
        known_for=Seconds(clock() - memory.since),
        trouble=memory.trouble,
        retry_in=Seconds(max(0.0, memory.retry_at - clock())) if memory.retry_at is not None else Seconds(0.0),
        progress=dict(memory.progress),
    )
    snapshot = await world.cluster.snapshot(request.namespace, request.snapshot)
    record = await record_of(world, snapshot)
    refusal = restore_plan.refuse_snapshot(request, restore_plan.SnapshotSeen(body=snapshot, record=record))
    if snapshot is not None:
        seen = replace(seen, hypervisor=str(snapshot["spec"]["source"]["hypervisorName"]))
    try:
        if snapshot is None or record is None or record.problem:
            return await _without_record(world, replace(seen, refusal=refusal), _began_with(told))
        if request.in_place and seen.finalizer and _began_elsewhere(told, record):
            there = await search(world, seen, _began_with(told))
            if there.gated or there.is_done or there.went_back or there.half_done:
                return await _of_another_snapshot(world, there)
        marker = marker_of(world, request, str(snapshot["metadata"]["uid"]))
        return await _look(world, request, replace(seen, record=record, marker=marker), record, refusal)
    except HypervisorError as error:
        seen = replace(seen, record=record if record is not None and not record.problem else None)
        gone = error.reason == HYPERVISOR_GONE
        seen = replace(seen, problem=error.message, problem_reason=error.reason, no_hypervisor=gone, refusal=refusal)
        return await with_clones(world, seen)
    except RefusedError as error:
        if not seen.finalizer:
            return replace(seen, refusal=Refusal(reason=error.reason, message=error.message))
        # What stands in the VM cannot be read, and may be our own gate.
        return await with_clones(
            world, replace(seen, problem=error.message, problem_reason=error.reason, refusal=refusal)
        )


def _began_elsewhere(told: Mapping[str, Any], record: Record) -> bool:
    """Whether it was begun with another VM than the snapshot is of: then that is another snapshot of the same name."""
    before = _began_with(told)
    return bool(before) and before != record.plan.vm_uuid


def _began_with(told: Mapping[str, Any]) -> str:
    """The UUID of the VM that status names. Whoever writes into it shows another VM, which does not bear this restore's marker."""
    return str((told.get("vm") or {}).get("uuid") or "")


def _since(request: RestoreRequest, told: Mapping[str, Any]) -> datetime:
    """When it said that the first change was about to be made; earlier is safe, so else when it was created."""
    try:
        return distill.moment(str(told.get("startTime") or ""))
    except ValueError:
        return request.created


def _told_half_done(told: Mapping[str, Any]) -> bool:
    return any(
        (c.get("type"), c.get("reason")) == ("VolumesRestored", "HalfDone") for c in told.get("conditions") or ()
    )


async def _of_another_snapshot(world: World, seen: RestoreSeen) -> RestoreSeen:
    """The snapshot was deleted after the VM's disks were taken, and its name is another one's now: never mix them."""
    began = seen.marker.snapshot_uid if seen.marker is not None else ""
    message = f'VMSnapshot "{seen.request.snapshot}" is another one than this restore began with, whose UID was {began}'
    seen = replace(seen, record=None, refusal=Refusal(reason="SnapshotUIDMismatch", message=message))
    return await with_clones(world, await _safety(world, seen.request, seen))


async def _without_record(world: World, seen: RestoreSeen, began_with: str) -> RestoreSeen:
    """The snapshot is gone, or what was on record of it: what this restore has changed is found by its own marker."""
    if not seen.finalizer and (seen.ended or not seen.begun):
        return seen
    seen = await search(world, seen, began_with)
    return await with_clones(world, await _safety(world, seen.request, seen))


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


async def record_of(world: World, snapshot: Mapping[str, Any] | None) -> Record | None:
    """Return what is on record of a VMSnapshot, or None. Raises KubeError."""
    if snapshot is None:
        return None
    asked = distill.request(snapshot)
    content = await world.cluster.content(contents.name_for(asked.uid))
    return contents.from_body(content, asked, world.installation) if content is not None else None


async def _look(
    world: World, request: RestoreRequest, unseen: RestoreSeen, record: Record, refusal: Refusal | None
) -> RestoreSeen:
    begun = unseen.finalizer or unseen.begun
    found = await find(world, request, unseen.hypervisor, record.plan.vm_uuid, begun=begun)
    defined = found.defined
    seen = show(world, unseen, defined) if defined is not None else unseen
    if seen.gated and defined is not None and (second := await second_definition(found.client, defined)) is not None:
        return replace(seen, problem=second.message, problem_reason=second.reason)
    own = seen.gated or seen.done == seen.marker or bool(seen.went_back)
    labels = await world.cluster.namespace_labels(request.namespace)
    name = seen.vm_name or request.new_name or record.plan.vm_name
    if not access.may_use(found.live.access, labels, name):
        refused = access.not_found(name, seen.hypervisor, request.namespace)
        if not own:
            return await with_clones(world, replace(unseen, refusal=refused))
        # It was allowed when it began: what is half done is brought back, and nothing else is done any more.
        broken = seen.broken or Failure(reason=refused.reason, message=refused.message)
        seen = await _safety(world, request, replace(seen, refusal=refused, broken=broken))
        return await with_clones(world, seen)
    if own and seen.marker != unseen.marker:
        return await _of_another_snapshot(world, seen)
    if seen.is_done and request.start_after and seen.power is PowerState.RUNNING and defined is not None:
        seen = replace(seen, agent_answers=await _agent(found.client, defined))
    seen = await with_clones(world, seen)
    if seen.ended and not seen.gated:
        return seen
    seen = await _safety(world, request, seen)
    if seen.is_done or seen.went_back:
        return seen
    if refusal is not None and not seen.gated:
        return replace(seen, refusal=refusal)
    if request.in_place:
        return await _plan_in_place(world, request, seen, record, found)
    return await _plan_new(world, request, seen, record, found)


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
    record = await record_of(world, body)
    if record is not None and record.taken and record.ready and not record.problem:
        return replace(seen, safety_name=name, safety=Safety.READY, safety_record=record)
    stalled = conditions.get("Stalled") or {}
    if stalled.get("status") == "True" or body["metadata"].get("deletionTimestamp"):
        message = str(stalled.get("message", "it is being deleted"))
        return replace(seen, safety_name=name, safety=Safety.FAILED, safety_message=message)
    under_way = str((conditions.get("Reconciling") or {}).get("message", ""))
    return replace(seen, safety_name=name, safety=Safety.TAKING, safety_message=under_way)


async def _plan_in_place(
    world: World, request: RestoreRequest, seen: RestoreSeen, record: Record, found: Found
) -> RestoreSeen:
    volumes = restore_plan.wanted(request, record)
    if isinstance(volumes, Refusal):
        return replace(seen, refusal=volumes)
    if found.defined is None:
        return replace(seen, refusal=access.not_found(record.plan.vm_name, seen.hypervisor, request.namespace))
    if seen.gate is not None and not seen.gated:
        message = f"VMRestore {seen.gate.marker.restore} has begun to set this VM back; waiting until that has ended"
        return replace(seen, in_use_by=message)
    holder = world.claims.get(found.defined.ref.uuid, request.uid)
    if holder != request.uid and not seen.gated:
        return replace(seen, in_use_by="another operation on this VM is under way; waiting until it has ended")
    if seen.gated:
        # The disks were held against what is on record before the gate was closed; now the gate holds them.
        return replace(seen, plan=restore_plan.make(record, volumes, {v.target: v.volume for v in volumes}))
    if (second := await second_definition(found.client, found.defined)) is not None:
        return replace(seen, refusal=Refusal(reason=second.reason, message=second.message))
    machine = await found.client.describe(found.defined.ref, ask_agent=False)
    seen = replace(seen, power=machine.power)  # what was checked, and not what it was a moment before
    if (refusal := restore_plan.refuse_vm(request, machine, gated=False)) is not None:
        return replace(seen, refusal=refusal)
    bear = restore_plan.onto(volumes, machine.disks)
    if isinstance(bear, Refusal):
        return replace(seen, refusal=bear)
    plan = restore_plan.make(record, volumes, bear)
    refusal = restore_plan.refuse_revert(plan, record, safety=request.safety) or _refuse_to_gate(
        seen, plan, record, found
    )
    refusal = refusal or await _refuse_formats(world, plan, record)
    if refusal is not None:
        return replace(seen, refusal=refusal)
    try:
        # Also while the VM runs: it is not stopped for what cannot be done.
        answers = await _ask(world, plan, record)
    except DriverError as error:
        return replace(seen, refusal=Refusal(reason=error.reason, message=error.message, patience=Patience.WAIT))
    if (refusal := restore_plan.refuse_fits(answers, plan, power=machine.power)) is not None:
        return replace(seen, refusal=refusal)
    return _judge_safety(replace(seen, plan=plan), machine)


def _refuse_to_gate(seen: RestoreSeen, plan: RestorePlan, record: Record, found: Found) -> Refusal | None:
    """Why the gate could not be closed once the VM is off, or None."""
    assert seen.marker is not None, "told with the record"  # noqa: S101 - for the type checker
    assert found.defined is not None, "asked before"  # noqa: S101 - for the type checker
    if found.defined.managed_save:
        message = (
            f"domain {found.defined.ref.name} was saved with its memory, which goes with its disks as they are now: start it and"
            " shut it down, or throw its memory away (virsh managedsave-remove)"
        )
        return Refusal(reason="VMSaved", message=message)
    targets = restore_plan.targets_now(plan, record)
    return restore_plan.refuse_gate(found.defined.xml, Gate(marker=seen.marker, targets=targets, autostart=False))


def _judge_safety(seen: RestoreSeen, machine: Machine) -> RestoreSeen:
    """A safety snapshot is none that lacks what is set back, nor any more once the VM, which is off, ran after it.

    Disks without a fingerprint, as network disks, do not betray that.
    """
    if machine.power is not PowerState.SHUT_OFF or seen.safety_record is None:
        return seen
    volumes = seen.safety_record.plan.volumes
    holds = {v.volume.id for v in volumes}
    wanted = {v.id: v.label for g in seen.plan.groups for v in g.onto} if seen.plan is not None else {}
    if lacks := [label for v, label in wanted.items() if v not in holds]:
        message = f"it does not hold {', '.join(lacks)} (see its status.excluded), so nobody could go back to that"
        return replace(seen, safety=Safety.FAILED, safety_message=message)
    groups = [g for g in seen.safety_record.plan.groups if any(v.id in wanted for v in g.volumes)]
    if unable := [g.class_name for g in groups if not g.capabilities.revert]:
        message = f"class {', '.join(unable)} took it and cannot set disks back, so nobody could go back to it"
        return replace(seen, safety=Safety.FAILED, safety_message=message)
    if ran := fingerprints.written_to(volumes, machine.disks):
        return replace(seen, safety=Safety.FAILED, safety_message=f"disk {', '.join(ran)} was written to after it")
    if gone := fingerprints.missing(volumes, machine.disks):
        message = (
            f"disk {', '.join(gone)} was taken from the VM after it, so nobody can see whether the VM ran meanwhile"
        )
        return replace(seen, safety=Safety.FAILED, safety_message=message)
    if unseen := fingerprints.unseen(volumes, machine.disks):
        message = (
            f"whether disk {', '.join(unseen)} was written to after the safety snapshot cannot be seen: libvirt's pool does not know"
            " it now; see that the pool is active and has the disk (`virsh pool-refresh`)"
        )
        return replace(seen, refusal=Refusal(reason="VolumeNotFound", message=message, patience=Patience.WAIT))
    return seen


async def _plan_new(
    world: World, request: RestoreRequest, seen: RestoreSeen, record: Record, found: Found
) -> RestoreSeen:
    volumes = restore_plan.wanted(request, record)
    if isinstance(volumes, Refusal):
        return replace(seen, refusal=volumes)
    if found.defined is not None:
        message = f'there is a VM "{request.new_name}" already; take another name (spec.newVM.name)'
        return replace(seen, refusal=Refusal(reason="NameTaken", message=message))
    if not record.plan.definition:
        message = "the snapshot does not hold the VM's definition: define the new VM by hand, from clones"
        return replace(seen, refusal=Refusal(reason="DefinitionMissing", message=message))
    plan = restore_plan.make(record, volumes, {})
    assert seen.marker is not None, "told with the record"  # noqa: S101 - for the type checker
    identity = new_definition.Identity(name=request.new_name, seed=request.uid)
    refusal = restore_plan.refuse_clone(plan, record) or restore_plan.refuse_new_vm(plan, record, identity, seen.marker)
    refusal = refusal or await _refuse_formats(world, plan, record)
    return replace(seen, refusal=refusal) if refusal is not None else replace(seen, plan=plan)


async def _refuse_formats(world: World, plan: RestorePlan, record: Record) -> Refusal | None:
    """Ask the drivers whether they can read the handles; why not, or that they do not answer, or None."""

    async def ask(group: RestoreGroup) -> tuple[str, int]:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        return group.class_name, (await host.capabilities(timeout=CHECK_TIMEOUT)).handle_format

    try:
        known = dict(await asyncio.gather(*(ask(g) for g in plan.groups)))
    except DriverError as error:
        return Refusal(reason=error.reason, message=error.message, patience=Patience.WAIT)
    return restore_plan.refuse_formats(known, record)


async def _ask(world: World, plan: RestorePlan, record: Record) -> Mapping[str, Sequence[Fit]]:
    async def ask(group: RestoreGroup) -> tuple[str, Sequence[Fit]]:
        host = await world.classes.host_of_record(record.groups[group.class_name])
        return group.class_name, await host.check_revert(group.cut, group.onto, timeout=CHECK_TIMEOUT)

    return dict(await asyncio.gather(*(ask(g) for g in plan.groups)))
