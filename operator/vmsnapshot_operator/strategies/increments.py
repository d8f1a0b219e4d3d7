"""Copies by the hypervisor that begin with an earlier one: made ready before the window, and checkpoints that are left removed.

What may begin with what is decided by `plan.increments`. A checkpoint is made before the copy that bears its name begins, with the VM
untouched: what is written between the two is then copied twice, and nothing is missed. Made by the begin itself it would cost
that much time of the window. Nothing of this is written down: the names follow from what is on record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Fit, SnapshotRequest
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.planning import PlannedGroup, Request
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.drivers.host import Slot
from vmsnapshot_operator.errors import DomainGoneError, HypervisorError, KubeError, SnapshotError
from vmsnapshot_operator.hypervisors.checkpoints import Checkpoints, Seen
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import increments, report
from vmsnapshot_operator.plan.increments import Earlier
from vmsnapshot_operator.strategies.gather import locate
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Since:
    """`checkpoints`: of which disks, by target, only what changed is copied, since when; `told`: by class, what is to be said of it."""

    checkpoints: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)


async def prepare(
    world: World, request: Request, record: Record, slots: Mapping[str, Slot], requests: Mapping[str, SnapshotRequest]
) -> Since:
    """Fill prepared volumes with earlier copies, and have the disks remember what is written from now on, where a class asks for it.

    Whatever is in doubt is copied as a whole, and said. Raises DriverError, and HypervisorError where it is not certain which
    checkpoints are there: then this attempt must come to nothing, or one that is made later would be believed.
    """
    groups = [g for g in record.plan.groups if increments.is_able(g.capabilities)]
    if not groups:
        return Since()
    client, ref = await locate(world, request, record)
    checkpoints = client.checkpoints(ref)
    since: dict[str, str] = {}
    told: dict[str, str] = {}
    for group in groups:
        able, why = await _able(world, record, group, checkpoints)
        order = requests[group.class_name]
        async with step(Step.PREPARE_INHERIT, request.uid, group.class_name):
            fits = await slots[group.class_name].inherit(order, {v: e.handle for v, e in able.items()}) if able else {}
        async with step(Step.PREPARE_CHECKPOINT, request.uid, group.class_name):
            refused = await _remember(world, checkpoints, order)
        since |= {v.label: able[v.id].checkpoint for v in group.volumes if v.id in fits and fits[v.id].ok}
        told[group.class_name] = _told(group, able, fits, why, refused)
    return Since(checkpoints=since, told=told)


async def _able(
    world: World, record: Record, group: PlannedGroup, checkpoints: Checkpoints
) -> tuple[Mapping[VolumeId, Earlier], Mapping[VolumeId, str]]:
    """Return the copies to begin with whose bitmap is whole, and why the other disks have none. Who cannot be asked proves nothing."""
    try:
        found, why = increments.choose(group, record.attempt, await _of_vm(world, record))
        whole = await checkpoints.whole({e.checkpoint: v.label for v in group.volumes if (e := found.get(v.id))})
    except (KubeError, HypervisorError) as error:
        return {}, {v.id: f"what was copied before cannot be looked at: {error.message}" for v in group.volumes}
    lost = {v: f"the bitmap of its last copy ({_at(e)}) is lost" for v, e in found.items() if e.checkpoint not in whole}
    return {v: e for v, e in found.items() if v not in lost}, {**why, **lost}


async def _of_vm(world: World, record: Record) -> tuple[Record, ...]:
    """The records of all other snapshots of the VM that can be trusted."""
    found = []
    async for body in world.cluster.contents():
        each = contents.from_body(body, contents.owner(body), world.installation)
        if not each.problem and each.plan.vm_uuid == record.plan.vm_uuid and each.name != record.name:
            found.append(each)
    return tuple(found)


async def _remember(world: World, checkpoints: Checkpoints, order: SnapshotRequest) -> Mapping[VolumeId, str]:
    """Make the checkpoints of a request; return, by disk, why one has none."""
    asked = {names.checkpoint_name(order.name, v.id): v for v in order.volumes if increments.remembers(v)}
    refused = await checkpoints.make({n: v.label for n, v in asked.items()}, lambda: _permit(world))
    return {asked[n].id: why for n, why in refused.items()}


def _permit(world: World) -> str:
    return "" if world.leadership.is_leader() else "another instance may have taken over"


def _told(
    group: PlannedGroup,
    able: Mapping[VolumeId, Earlier],
    fits: Mapping[VolumeId, Fit],
    why: Mapping[VolumeId, str],
    refused: Mapping[VolumeId, str],
) -> str:
    parts = []
    for volume in group.volumes:
        fit = fits.get(volume.id)
        if fit is not None and fit.ok:
            text = f"disk {volume.label}: what was written since its copy of {_at(able[volume.id])}"
        else:
            text = f"disk {volume.label}: all of it, since {fit.message if fit is not None else why[volume.id]}"
        if volume.id in refused:
            text += f" (and so will be the next: {refused[volume.id]})"
        parts.append(text)
    return "; ".join(parts)


def _at(earlier: Earlier) -> str:
    return report.stamp(earlier.time) or ""


async def retire(world: World, request: Request, record: Record) -> None:
    """Remove the checkpoints of earlier snapshots of the VM, now that the copies of this one are whole. What is left comes next time."""
    if not any(increments.is_able(g.capabilities) for g in record.plan.groups):
        return
    async with step(Step.SETTLE_CHECKPOINT, request.uid):
        try:
            older = increments.superseded(record, await _of_vm(world, record))
            client, ref = await locate(world, request, record)
            checkpoints = client.checkpoints(ref)
            there = await checkpoints.names()
            # The newest also if libvirt lists it no more: the VM may have migrated since, and the bitmap with it.
            asked = {n: t for i, each in enumerate(older) for n, t in each.items() if i == 0 or n in there}
            await checkpoints.remove(asked)
        except SnapshotError as error:
            log.warning(
                "checkpoints of earlier snapshots of VM %s stay for now: %s", record.plan.vm_name, error.message
            )


async def remove(world: World, request: Request, record: Record, held: Mapping[str, frozenset[str]]) -> None:
    """Remove the checkpoints of what is `held` (request names by class) and about to be deleted.

    What cannot be removed now, since the VM is off or nobody answers, the periodic look removes (`sweep`).
    """
    if not any(increments.is_able(g.capabilities) and held.get(g.class_name) for g in record.plan.groups):
        return
    asked = increments.of_record(record, held)
    async with step(Step.ROLL_BACK_CHECKPOINT, request.uid):
        try:
            client, ref = await locate(world, request, record)
            if left := await client.checkpoints(ref).remove(asked):
                log.info("VM %s is off: its checkpoints %s stay until it runs", ref.name, ", ".join(sorted(left)))
        except DomainGoneError:
            return
        except HypervisorError as error:
            log.warning("the checkpoints of snapshot %s stay for now: %s", request.uid, error.message)


async def sweep(world: World, client: Hypervisor, told: Callable[[Seen], None]) -> None:
    """Remove the checkpoints that no snapshot needs; `told` is called with each that is gone. Raises SnapshotError."""
    seen = await client.all_checkpoints(names.installation_prefix(world.installation))
    known = world.uids() | frozenset(world.claims.values())
    if not increments.left(world.installation, {c.name for c in seen}, (), known):
        return  # as the watches know; nothing is removed by what they say
    kept = tuple([contents.kept(body, world.installation) async for body in world.cluster.contents()])
    uids = await world.cluster.snapshot_uids()
    left = increments.left(world.installation, {c.name for c in seen}, kept, uids | frozenset(world.claims.values()))
    for each in seen:
        if each.name in left and world.leadership.is_leader():
            ref: Ref = await client.find(each.domain)
            if not await client.checkpoints(ref).remove({each.name: ""}):
                told(each)
