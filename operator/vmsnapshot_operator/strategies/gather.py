"""Look at the world once and write down what was seen: one VMSnapshot, its content, its VM, the classes, the storage.

Only looks: nothing here changes anything. What cannot be asked is said to be so, never guessed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import Ruling
from vmsnapshot_operator.core.driver import Fit
from vmsnapshot_operator.core.effects import Failure, Observation, Record
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Machine
from vmsnapshot_operator.core.planning import Method, Patience, Plan, Policy, Refusal, Request, StorageClass
from vmsnapshot_operator.core.volumes import Seconds, Volume, VolumeId
from vmsnapshot_operator.errors import (
    DomainAmbiguousError,
    DomainGoneError,
    DriverError,
    DriverUnavailableError,
    HypervisorError,
    QuiesceError,
    RefusedError,
    SnapshotError,
)
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.kube import contents, distill
from vmsnapshot_operator.plan import access, collapse, disks, grouping, planner
from vmsnapshot_operator.quiesce import base as quiesce
from vmsnapshot_operator.strategies import overlays
from vmsnapshot_operator.strategies.world import LiveHypervisor, Memory, World, clock

ASK_TIMEOUT = Seconds(10.0)
EARLY_SECONDS = Seconds(10.0)
"""So soon after the start the objects that were there before may not have been read yet, in whatever order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What planning says, or who is in the way."""

    plan: Plan | None = None
    refusal: Refusal | None = None
    in_use_by: str = ""
    guardian: Fit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Journalled:
    """Our own journal in the domain, with what is to be done about each overlay; or why that cannot be told; or no domain at all."""

    journal: Journal | None = None
    problem: str = ""
    rulings: tuple[Ruling, ...] = ()
    vm_gone: bool = False
    vm_unseen: bool = False


async def gather(world: World, body: Mapping[str, Any]) -> Observation:
    """Return one frozen observation of everything that concerns this VMSnapshot.

    Raises RefusedError when the object itself cannot be understood, KubeError when the API server does not answer.
    """
    request = distill.request(body)
    memory = world.memory(request.uid)
    await memory.enter(world.leadership.term)
    deleting = bool(body["metadata"].get("deletionTimestamp"))
    finalizer = FINALIZER in (body["metadata"].get("finalizers") or ())
    record = await _record(world, request)
    refused = _refused(body) if record is None and not deleting else None
    journalled = await _journal(world, request, record)
    if record is None or record.taken or record.failure is not None:
        world.release(request.uid)
    planned = _Planned()
    lost = _lost(body) if record is None and refused is None and not request.dry_run else {}
    if not deleting and refused is None and not lost and _undecided(record) and journalled.journal is None:
        planned = await _planning(world, request, memory, record)
    held, unlisted = await _held(
        world, request, record, memory, deleting=deleting and finalizer, told=_told_classes(body)
    )
    return Observation(
        request=request,
        deleting=deleting,
        finalizer=finalizer,
        refused=refused,
        known_for=Seconds(clock() - memory.since),
        plan=planned.plan,
        refusal=planned.refusal,
        record=record,
        journal=journalled.journal,
        journal_problem=journalled.problem,
        overlays=journalled.rulings,
        vm_gone=journalled.vm_gone,
        vm_unseen=journalled.vm_unseen,
        held=held,
        unlisted=unlisted,
        prepared=memory.prepared.attempt if memory.prepared is not None else None,
        outcome=memory.outcome,
        broken=memory.broken,
        lost=lost,
        leader=world.leadership.is_leader(),
        guardian=planned.guardian,
        in_use_by=planned.in_use_by,
        restored_by=await _restored_by(world, request, record) if deleting and finalizer else "",
        degraded=world.lost_of(request.uid) if record is not None and record.ready else "",
        copied=dict(memory.copied),
        trouble=memory.trouble,
        retry_in=Seconds(max(0.0, memory.retry_at - clock())) if memory.retry_at is not None else Seconds(0.0),
    )


async def _restored_by(world: World, request: Request, record: Record | None) -> str:
    if record is None or not record.ready:
        return ""
    return ", ".join(await world.cluster.restores_of(request.namespace, request.name))


async def locate(world: World, request: Request, record: Record | None) -> tuple[Hypervisor, Ref]:
    """Find the VM: by its pinned UUID once there is a plan on record. Raises as `find`."""
    return await find(world, request.hypervisor, record.plan.vm_uuid if record is not None else request.domain)


async def find(world: World, hypervisor: str, domain: str) -> tuple[Hypervisor, Ref]:
    """Find a VM by its UUID or name. Raises HypervisorError when it is not there or cannot be asked."""
    live = world.hypervisors.get(hypervisor)
    if live is None:
        raise DomainGoneError(f'there is no Hypervisor "{hypervisor}"', reason="HypervisorNotFound")
    if live.client is None:
        raise HypervisorError(
            f'hypervisor "{live.name}" cannot be used: {live.problem}', reason="HypervisorUnreachable", retryable=True
        )
    return live.client, await live.client.find(domain)


def _undecided(record: Record | None) -> bool:
    return record is None or (record.outcome is None and record.failure is None and not record.problem)


async def _record(world: World, request: Request) -> Record | None:
    content = await world.cluster.content(contents.name_for(request.uid))
    return contents.from_body(content, request, world.installation) if content is not None else None


def _refused(body: Mapping[str, Any]) -> Failure | None:
    """A refusal told before, for good: remembered by the object itself, since nothing else of it exists."""
    found = {c.get("type"): c for c in (body.get("status") or {}).get("conditions") or ()}
    stalled, planned = found.get("Stalled"), found.get("Planned")
    if stalled is None or stalled.get("status") != "True" or planned is None or planned.get("status") != "False":
        return None
    return Failure(reason=str(planned.get("reason", "")), message=str(planned.get("message", "")))


def _lost(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What status says of a content that was on record, since its name is told only after it was written; else nothing."""
    status = body.get("status") or {}
    if not status.get("contentName"):
        return {}
    return {k: status[k] for k in ("contentName", "vm", "groups", "creationTime") if k in status}


def _told_classes(body: Mapping[str, Any]) -> frozenset[str]:
    """The classes that status names: those of the plan, told before anything was written or prepared."""
    groups = (body.get("status") or {}).get("groups") or ()
    return frozenset(str(g.get("className", "")) for g in groups)


async def _journal(world: World, request: Request, record: Record | None) -> _Journalled:
    """Look for it if an attempt is on record whose end is not: only then may the VM be held by us."""
    if record is None or record.foreign:
        return _Journalled()
    if (record.outcome is not None or record.failure is not None) and not record.overlaid:
        return _Journalled()
    try:
        client, ref = await locate(world, request, record)
        journal = await client.read_journal(ref)
        if journal is None or journal.installation != world.installation or journal.owner_uid != request.uid:
            return _Journalled()
        rulings = collapse.judge(journal, await overlays.look(client, ref, journal)) if not journal.holds else ()
    except DomainGoneError as error:
        if error.reason == "HypervisorNotFound" and clock() - world.memory(request.uid).since < EARLY_SECONDS:
            return _Journalled(problem=f"{error.message}, or it was not read yet")
        return _Journalled(vm_gone=error.certain, vm_unseen=not error.certain)
    except HypervisorError as error:
        return _Journalled(problem=error.message)
    return _Journalled(journal=journal, rulings=rulings)


async def _planning(world: World, request: Request, memory: Memory, record: Record | None) -> _Planned:
    live = world.hypervisors.get(request.hypervisor)
    if live is None:
        return _Planned(
            refusal=Refusal(
                reason="HypervisorNotFound",
                message=f'there is no Hypervisor "{request.hypervisor}"; check spec.source.hypervisorName',
            )
        )
    if live.client is None:
        return _Planned(refusal=_unreachable(live, live.problem))
    try:
        return await _plan_on(world, request, memory, record, live, live.client)
    except DomainGoneError:
        return _Planned(refusal=access.not_found(request.domain, request.hypervisor, request.namespace))
    except DomainAmbiguousError as error:
        return _Planned(refusal=Refusal(reason=error.reason, message=error.message))
    except HypervisorError as error:
        return _Planned(refusal=_unreachable(live, error.message))
    except DriverError as error:
        return _Planned(refusal=Refusal(reason=error.reason, message=error.message, patience=Patience.WAIT))
    except RefusedError as error:
        return _Planned(refusal=Refusal(reason=error.reason, message=error.message))


def _unreachable(live: LiveHypervisor, why: str) -> Refusal:
    return Refusal(
        reason="HypervisorUnreachable",
        message=f'hypervisor "{live.name}" does not answer: {why}; trying again until spec.deadlineSeconds is over',
        patience=Patience.WAIT,
    )


async def _plan_on(
    world: World, request: Request, memory: Memory, record: Record | None, live: LiveHypervisor, client: Hypervisor
) -> _Planned:
    labels = await world.cluster.namespace_labels(request.namespace)
    # The rules are asked where the domain is looked up: who may not use it gets what he would get if it were not there.
    ref = await client.find(request.domain, lambda name: access.may_use(live.access, labels, name))
    if request.strategy not in ("Auto", *world.strategies):
        installed = ", ".join(sorted(world.strategies))
        message = f'strategy "{request.strategy}" is not installed; use Auto, or one of {installed}'
        return _Planned(refusal=Refusal(reason="StrategyUnknown", message=message))
    if request.method != Method.AUTO:
        try:
            quiesce.find(request.method)
        except QuiesceError as error:
            return _Planned(refusal=Refusal(reason=error.reason, message=error.message))
    if (busy := _busy(world, ref.uuid, request.uid)) != "":
        return _Planned(in_use_by=busy)
    machine = await client.describe(ref, ask_agent=request.policy is not Policy.NEVER)
    if (busy := _journalled(world, machine, request.uid)) != "":
        return _Planned(in_use_by=busy)
    classes = world.classes.all()
    prepared = memory.prepared is not None and record is not None and memory.prepared.attempt == record.attempt
    fits = _answered(record) if record is not None and prepared else await _fits(world, machine, request, classes)
    slow = any(c.capabilities is not None and c.capabilities.cut.needs_overlay for c in classes)
    room = (
        await overlays.room(client, live.overlay, ref) if slow or request.method == Method.HYPERVISOR_SNAPSHOT else None
    )
    made = planner.make_plan(request, machine, classes, fits, failed_before=memory.agent_failed, room=room)
    if isinstance(made, Refusal):
        return _Planned(refusal=made)
    return _Planned(plan=made, guardian=await _guardian(world) if made.quiesce.holds_vm else None)


def _busy(world: World, domain: str, uid: str) -> str:
    holder = world.claims.get(domain, uid)
    return "" if holder == uid else "another snapshot of this VM is being taken; waiting until it has ended"


def _journalled(world: World, machine: Machine, uid: str) -> str:
    if machine.journal_error:
        return f"the VM's metadata holds a journal that cannot be read, somebody may hold it still: {machine.journal_error}"
    if machine.journal is None:
        return ""
    if machine.journal.installation != world.installation:
        return "another installation of this operator holds this VM; waiting until it has ended"
    return (
        ""
        if machine.journal.owner_uid == uid
        else "another snapshot of this VM is being taken; waiting until it has ended"
    )


async def _guardian(world: World) -> Fit:
    if world.guardian is None:
        return Fit(ok=False, reason="GuardianNotReady", message="no guardian is configured (--guardian-socket)")
    try:
        await world.guardian.ping()
    except SnapshotError as error:
        return Fit(ok=False, reason="GuardianNotReady", message=error.message)
    return Fit(ok=True, reason="Ready")


async def _fits(
    world: World, machine: Machine, request: Request, classes: Sequence[StorageClass]
) -> Mapping[VolumeId, Mapping[str, Fit]]:
    """Ask each matching class's driver about each volume; the classes at once."""
    selected = disks.select(machine, request.exclude)
    if isinstance(selected, Refusal):
        return {}
    wanted: dict[str, list[Volume]] = {}
    for _, volume in selected.volumes:
        for cls in grouping.candidates(classes, volume):
            if cls.ready:
                wanted.setdefault(cls.name, []).append(volume)

    async def ask(class_name: str, volumes: Sequence[Volume]) -> list[Fit]:
        # One after the other: a class has one idle process, and starting another takes longer than asking.
        return [await _fit(world, class_name, v) for v in volumes]

    answers = await asyncio.gather(*(ask(c, v) for c, v in wanted.items()))
    fits: dict[VolumeId, dict[str, Fit]] = {}
    for (class_name, volumes), answer in zip(wanted.items(), answers, strict=True):
        for volume, fit in zip(volumes, answer, strict=True):
            fits.setdefault(volume.id, {})[class_name] = fit
    return fits


def _answered(record: Record) -> Mapping[VolumeId, Mapping[str, Fit]]:
    """What the drivers answered when this attempt was prepared, moments ago.

    Asking again would need a second process of each class while the prepared one is held: with as many snapshots under way as
    a class may have processes, they would all wait for each other.
    """
    fit = Fit(ok=True, reason="Fits", message="prepared")
    return {v.volume.id: {v.class_name: fit} for v in record.plan.volumes}


async def _fit(world: World, class_name: str, volume: Volume) -> Fit:
    host = world.classes.host(class_name)
    if host is None:
        return Fit(ok=False, reason="DriverUnavailable", message="its driver is not running")
    try:
        return await host.can_handle((volume,), timeout=ASK_TIMEOUT)
    except DriverError as error:
        if error.retryable:
            raise  # it may fit: nothing is decided until it has answered
        return Fit(ok=False, reason=error.reason, message=error.message)


async def _held(
    world: World, request: Request, record: Record | None, memory: Memory, *, deleting: bool, told: frozenset[str]
) -> tuple[Mapping[str, frozenset[str]] | None, Mapping[str, str]]:
    """Ask the storage what it holds under this object's names, where that may be more than what is on record.

    Without a record every class is asked, but only those that were `told` must answer: another one's hang is not waited for.
    """
    pending = record is not None and record.outcome is None and record.failure is None and not record.problem
    untried = memory.prepared is not None and record is not None and memory.prepared.attempt == record.attempt
    failed = record is not None and record.failure is not None
    if not deleting and not failed and not (pending and not untried):
        return None, {}
    prefix = names.object_prefix(world.installation, request.uid)
    held: dict[str, frozenset[str]] = {}
    unlisted: dict[str, str] = {}

    async def ask(class_name: str) -> None:
        try:
            if record is not None and not record.problem:
                host = await world.classes.host_of_record(record.groups[class_name])
            else:
                found = world.classes.host(class_name)
                if found is None:
                    raise DriverUnavailableError("its driver is not running")
                host = found
            held[class_name] = frozenset(
                n for n in await host.list(prefix, timeout=ASK_TIMEOUT) if n.startswith(prefix)
            )
        except DriverError as error:
            if record is not None or class_name in told:
                unlisted[class_name] = error.message

    trusted = record is not None and not record.problem
    known = {c.name for c in world.classes.all()}
    asked = tuple(record.groups) if record is not None and trusted else sorted(known | told)
    await asyncio.gather(*(ask(c) for c in asked), _overlays(world, request, record, held, unlisted))
    return held, unlisted


async def _overlays(
    world: World,
    request: Request,
    record: Record | None,
    held: dict[str, frozenset[str]],
    unlisted: dict[str, str],
) -> None:
    """Overlays that were made and never used are listed beside what the storage holds."""
    if record is None or not record.plan.quiesce.overlay_pool:
        return
    try:
        client, ref = await locate(world, request, record)
        prefix = names.overlay_prefix(world.installation, request.uid)
        found = await overlays.held(client, ref, record.plan.quiesce.overlay_pool, prefix)
    except DomainGoneError:
        return
    except HypervisorError as error:
        unlisted[overlays.CLASS] = error.message
    else:
        held[overlays.CLASS] = found
