"""Making what was cut restorable while the VM runs: the drivers copy, and what they copy from has to stand still and fit.

Not when that is due (`plan.next_effect`), nor what is written down of it (`storage`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from vmsnapshot_operator.core.driver import Hold, Progress
from vmsnapshot_operator.core.effects import Record, RecordedGroup
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Machine, PowerState
from vmsnapshot_operator.core.planning import Request
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import DriverError, SnapshotError
from vmsnapshot_operator.plan import collapse, fingerprints
from vmsnapshot_operator.strategies import backups, overlays
from vmsnapshot_operator.strategies.gather import locate
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)

STALL_TIMEOUT = Seconds(300.0)
"""A driver that says nothing of its progress for so long is called again, until the ready deadline: so a lost connection does not hold a
process until then.
"""
ROOM_SECONDS = 2.0
"""How often it is looked how much room is left to overlays."""


async def settle(world: World, record: Record, groups: Mapping[str, RecordedGroup], request: Request) -> None:
    """Wait until every group can be restored. Raises DriverError; `SnapshotLost` and `OverlayFull`: no retry helps."""
    memory = world.memory(request.uid)
    left = Seconds(max(1.0, (request.created - world.now()).total_seconds() + request.ready_deadline_seconds))

    await backups.listen(world, record, request)

    async def wait(group: RecordedGroup) -> None:
        if group.result is None:
            return
        host = await world.classes.host_of_record(group)
        if group.result.hold is Hold.JOB:
            await job
        async with step(Step.SETTLE_DRIVER, request.uid, group.class_name):
            await host.wait_ready(
                group.request,
                group.result,
                timeout=left,
                stall=STALL_TIMEOUT,
                on_progress=note(group.class_name),
            )

    async def finish_job() -> None:
        """The one job of all groups that the hypervisor copies; nothing is asked of it where all its copies are marked as whole."""
        mine = backups.by_job(groups)
        if await backups.are_marked(world, mine):
            return
        async with step(Step.SETTLE_JOB, request.uid):
            await backups.finish(world, record, request, left, note(mine[0].class_name))

    def note(class_name: str) -> Callable[[Progress], None]:
        def told(progress: Progress) -> None:
            before, _ = memory.copied.get(class_name, (0, 0))
            memory.copied[class_name] = (progress.done_bytes, progress.total_bytes)
            world.metrics.copied(class_name, max(0, progress.done_bytes - before))

        return told

    job = asyncio.ensure_future(finish_job())
    try:
        results = await _while_there_is_room(world, record, request, [wait(g) for g in groups.values()])
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)
        memory.copied.clear()
    if failed := [r for r in results if isinstance(r, BaseException)]:
        raise min(failed, key=lambda e: getattr(e, "reason", "") != "SnapshotLost")
    if record.needs_base:
        await _stood_still(world, record, request)


async def _while_there_is_room(
    world: World, record: Record, request: Request, work: Sequence[Coroutine[Any, Any, None]]
) -> list[BaseException | None]:
    """Do all of the work to its end, and end all of it before the VM's writes find no room for their overlays.

    One that was left to itself would hold a process, and might copy what is deleted meanwhile.
    """
    working: asyncio.Future[Any] = asyncio.gather(*work, return_exceptions=True)
    if not record.overlaid:
        return list(await working)
    watch: asyncio.Future[Any] = asyncio.create_task(_watch_room(world, record, request), name=f"room {request.uid}")
    try:
        await asyncio.wait({working, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            await watch
        return list(await working)
    finally:
        working.cancel()
        watch.cancel()
        await asyncio.gather(working, watch, return_exceptions=True)


async def _watch_room(world: World, record: Record, request: Request) -> None:
    """Return only by raising DriverError (`OverlayFull`): the overlays' pool is about to be full, or was."""
    live, pool = world.hypervisors.get(request.hypervisor), record.plan.quiesce.overlay_pool
    least = live.overlay.min_free_bytes // 2 if live is not None and live.overlay is not None else 0
    while True:
        await asyncio.sleep(ROOM_SECONDS)
        try:
            client, ref = await locate(world, request, record)
            free = await client.overlays(ref).free_bytes(pool)
            journal = await client.read_journal(ref)
            over = _committed(journal, request.uid)
            stalled = journal is not None and not over and await client.overlays(ref).stalled(journal.overlays)
        except SnapshotError as error:
            log.info("room for the overlays of snapshot %s is not known: %s", request.uid, error.message)
            continue
        if over:
            raise DriverError(f"the copy was given up: {over}", reason="OverlayFull")
        if stalled:
            text = f"the copy was given up: the VM stands still, because it cannot write to its overlays in the pool {pool}"
            raise DriverError(text, reason="OverlayFull")
        if free < least:
            text = (
                f"the copy was given up: what the VM wrote meanwhile has left {free >> 20} MiB in the pool {pool} of its overlays, "
                f"and with none the VM would stand still (limit: {least >> 20} MiB)"
            )
            raise DriverError(text, reason="OverlayFull")


def _committed(journal: Journal | None, uid: str) -> str:
    """Why nothing stands still any more; empty if it may. A sweep brings a VM back that cannot write to its overlays, and asks nobody."""
    if journal is None or journal.owner_uid != uid:
        return "the VM's metadata says no more that it is on overlays, as where they were committed because it could not write to them and stood still"
    if journal.phase is Phase.COLLAPSING:
        return "the overlays are being committed already, as where the VM cannot write to them and stands still"
    return ""


async def _stood_still(world: World, record: Record, request: Request) -> None:
    """Raise DriverError unless what was copied has stood still until now: `SnapshotLost` or `OverlayFull` if it has not."""
    client, ref = await locate(world, request, record)
    if record.overlaid:
        journal = await client.read_journal(ref)
        if over := _committed(journal, request.uid):
            raise DriverError(f"the disks did not stand still while they were copied: {over}", reason="OverlayFull")
        assert journal is not None, "else it is over"  # noqa: S101 - for the type checker
        why = collapse.stands(journal, await overlays.look(client, ref, journal))
    else:
        why = _stayed_off(record, await client.describe(ref, ask_agent=False))
    if why:
        raise DriverError(f"the disks did not stand still while they were copied: {why}", reason="SnapshotLost")


def _stayed_off(record: Record, machine: Machine) -> str:
    """Why the disks of a VM that was off did not stand still; empty if they did. Raises DriverError while that cannot be seen."""
    volumes = record.plan.volumes
    if machine.power is not PowerState.SHUT_OFF or machine.run_id != record.plan.run_id:
        return f"the VM is {machine.power}, and was off when the copy began"
    if gone := fingerprints.missing(volumes, machine.disks):
        return f"disk {', '.join(gone)} is none of the VM's any more: whoever has it may have written to it"
    if changed := fingerprints.written_to(volumes, machine.disks):
        return f"disk {', '.join(changed)} was written to: the VM ran meanwhile, or somebody else has it"
    if unseen := fingerprints.unseen(volumes, machine.disks):
        text = (
            f"whether disk {', '.join(unseen)} stood still while it was copied cannot be seen: libvirt's pool does not know it now;"
            " see that the pool is active and has the disk (`virsh pool-refresh`)"
        )
        raise DriverError(text, retryable=True)
    return ""
