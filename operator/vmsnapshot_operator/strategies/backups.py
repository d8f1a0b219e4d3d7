"""The copies that the hypervisor makes for one snapshot: waited for until proved whole, and stopped when nobody wants them.

What is known of a copy is decided by `plan.copying`; its begin is a part of the window. Nothing of this is written down: the job's own
description says by the names of its files whose it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, Hold, Progress
from vmsnapshot_operator.core.effects import Record, RecordedGroup
from vmsnapshot_operator.core.planning import Request
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import DomainGoneError, DriverError, HypervisorError
from vmsnapshot_operator.plan import copying
from vmsnapshot_operator.plan.copying import Copy
from vmsnapshot_operator.strategies.gather import EARLY_SECONDS, find, locate
from vmsnapshot_operator.strategies.world import Listening, Memory, World, clock

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
HEAR_SECONDS = 5.0
"""So long after a copy is over its end may still be on its way to us."""


ASK_TIMEOUT = Seconds(30.0)
"""So long a storage has to say whether copies are marked as whole."""


async def may_run(world: World, record: Record) -> bool:
    """Whether the hypervisor may still copy for this snapshot: not where all that it copied is marked as whole, or a driver copied."""
    by_hypervisor = {g.class_name for g in record.plan.groups if _is_by_hypervisor(g.capabilities)}
    groups = [g for c, g in record.groups.items() if c in by_hypervisor]
    if any(g.result is None for g in groups):
        return True
    try:
        return not await are_marked(world, by_job(record.groups))
    except DriverError as error:
        log.info("whether copies are marked as whole is not known: %s", error.message)
        return True


async def are_marked(world: World, groups: Iterable[RecordedGroup]) -> bool:
    """Whether all of these copies are marked as whole, so that nothing need be known of the job. Raises DriverError."""
    for group in groups:
        host = await world.classes.host_of_record(group)
        if group.result is not None and await host.missing((group.result,), timeout=ASK_TIMEOUT):
            return False
    return True


def by_job(groups: Mapping[str, RecordedGroup]) -> tuple[RecordedGroup, ...]:
    """Return the groups that the one job of the hypervisor copies."""
    return tuple(g for g in groups.values() if g.result is not None and g.result.hold is Hold.JOB)


async def listen(world: World, record: Record, request: Request) -> None:
    """Listen for the end of this snapshot's copy from now on, if it runs: before anything else that may take long or fail."""
    memory = world.memory(request.uid)
    if not by_job(record.groups) or _listening(memory, record) is not None:
        return
    try:
        client, ref = await locate(world, request, record)
        since = clock()  # not earlier: to locate the VM may be what opens the connection on which its end is told
        seen = await client.backups(ref).look(since)
    except HypervisorError as error:
        log.info("the copy of snapshot %s cannot be looked at yet: %s", request.uid, error.message)
        return
    if copying.judge(_targets(record), seen, listened=False).copy is Copy.RUNNING:
        memory.listening = Listening(record.attempt, since, ref.endpoint)


def _listening(memory: Memory, record: Record) -> Listening | None:
    found = memory.listening
    return found if found is not None and found.attempt == record.attempt else None


def _targets(record: Record) -> frozenset[str]:
    """The files of all groups that the one job copies into."""
    return frozenset(str(h) for g in by_job(record.groups) if g.result is not None for h in g.result.handles.values())


async def finish(
    world: World, record: Record, request: Request, patience: Seconds, told: Callable[[Progress], None]
) -> None:
    """Wait until the copies of all disks are proved whole.

    Raises DriverError: `SnapshotLost` if that will never be, another reason after `patience`, in seconds. `told` is called with how
    far they are.
    """
    memory, targets = world.memory(request.uid), _targets(record)
    if memory.whole == record.attempt:
        return  # proved before, and not all of it could be marked then: what is heard since says nothing of it
    end, quiet, heard = clock() + patience, 0.0, False
    while True:
        listened = _listening(memory, record)
        try:
            client, ref = await locate(world, request, record)
            asked = clock()
            # Where it was begun it ends: the VM migrates only afterwards, and what ends where it is then is another one.
            where = replace(ref, endpoint=listened.endpoint) if listened is not None else ref
            seen = await client.backups(where).look(listened.since if listened is not None else asked)
        except HypervisorError as error:
            if isinstance(error, DomainGoneError) and error.certain:
                text = f"{error.message}, and with it the copy of its disks"
                raise DriverError(text, reason="SnapshotLost") from error
            log.info("the copy of snapshot %s cannot be looked at: %s", request.uid, error.message)
        else:
            found = copying.judge(targets, seen, listened=listened is not None)
            proved = heard
            heard = found.copy is Copy.WHOLE or (heard and seen.endings is None and found.copy is not Copy.RUNNING)
            if heard and proved:
                memory.whole = record.attempt
                return  # it was looked again after its end was heard of: by now its files are closed (`hypervisors.backups.running`)
            quiet = quiet + LOOK_SECONDS if found.copy is Copy.UNHEARD else 0.0
            if not heard and (found.copy is Copy.LOST or quiet > HEAR_SECONDS):
                raise DriverError(f"it is not whole: {found.why}", reason="SnapshotLost")
            if found.copy is Copy.RUNNING and seen.running is not None:
                # It ran after it was asked, so its end comes later: a connection that broke before has cost nothing.
                memory.listening = Listening(record.attempt, asked, ref.endpoint)
                told(Progress(done_bytes=seen.running.done_bytes, total_bytes=seen.running.total_bytes))
        if clock() > end:
            raise DriverError("the hypervisor copies for too long", retryable=True)
        await asyncio.sleep(LOOK_SECONDS)


def may_be_used(world: World) -> bool:
    """Whether the hypervisor copies for any class, as far as is known: one that has not answered yet may be such."""
    return any(c.capabilities is None or _is_by_hypervisor(c.capabilities) for c in world.classes.all())


async def clear_way(world: World, record: Record | None, request: Request, held: Mapping[str, frozenset[str]]) -> None:
    """Before what is `held` (names by class) of a snapshot is deleted: have the hypervisor stop copying into it.

    Raises HypervisorError while it may go on. A content that is lost, or of which nothing can be used, says nothing of a job.
    """
    if record is None or record.problem:
        if any(held.get(c.name) for c in world.classes.all() if _is_by_hypervisor(c.capabilities)):
            await stop(world, request.hypervisor, request.domain, request.uid)
    elif await may_run(world, record):
        await stop(world, request.hypervisor, record.plan.vm_uuid, request.uid, record.attempt)


async def stop(world: World, hypervisor: str, domain: str, uid: str, upto: int = names.MAX_ATTEMPT) -> None:
    """Have the hypervisor stop copying for the snapshot of this UID, in an attempt `upto` this one: a later one is a successor's.

    Raises HypervisorError while it may go on.
    """
    prefix, memory = names.object_prefix(world.installation, uid), world.memories.get(uid)

    def is_ours(path: str) -> bool:
        name = PurePosixPath(path).name
        attempt = names.attempt_of(name[: names.LENGTH])
        return name.startswith(prefix) and attempt is not None and attempt <= upto

    async with step(Step.ROLL_BACK_JOB, uid):
        try:
            client, ref = await find(world, hypervisor, domain)
            await client.backups(ref).stop(is_ours)
        except DomainGoneError as error:
            if not error.certain and memory is not None and clock() - memory.since < EARLY_SECONDS:
                raise  # the Hypervisor object may not have been read yet
            log.info("nothing copies the disks of snapshot %s, or nobody can be asked: %s", uid, error.message)


def _is_by_hypervisor(capabilities: Capabilities | None) -> bool:
    return capabilities is not None and capabilities.cut is CutKind.HYPERVISOR
