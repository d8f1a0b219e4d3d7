"""The overlays of one snapshot: made before the window, looked at, and committed back into the disks afterwards.

What is done about each overlay is decided by `plan.collapse`; here it is looked, and done. Nothing here needs the lease: a
commit that is done twice is done once, and none begins before the journal in the VM says so. Several may be at one VM, the workflow
and the sweeps of all instances: so the journal is read anew after each look.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import Move, Overlaid, Ruling
from vmsnapshot_operator.core.journal import Journal, Phase, merged
from vmsnapshot_operator.core.planning import OverlayRoom, OverlaySettings, Plan
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.errors import DomainGoneError, HypervisorError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.plan import collapse as plans

log = logging.getLogger(__name__)

CLASS = "(overlays)"
"""What overlays are listed under, among the names that classes of storage hold: no class can be called so."""

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 1.0
MOST_COMMITS = 3
"""So many commits of a disk may fail before that is told, and tried again later."""

Told = Callable[[tuple[Ruling, ...]], None]


async def room(client: Hypervisor, settings: OverlaySettings | None, ref: Ref) -> OverlayRoom | None:
    """Return where overlays of this VM can be made now; None if nowhere."""
    if settings is None:
        return None
    found = OverlayRoom(pool=settings.pool, min_free_bytes=settings.min_free_bytes)
    try:
        return replace(found, free_bytes=await client.overlays(ref).free_bytes(settings.pool))
    except HypervisorError as error:
        return replace(found, problem=error.message)


async def make(
    client: Hypervisor, ref: Ref, plan: Plan, installation: str, uid: str, attempt: int
) -> Mapping[VolumeId, str]:
    """Make an empty overlay over each volume of the plan, and return their paths. Raises HypervisorError."""
    overlays, made = client.overlays(ref), {}
    async with step(Step.PREPARE_OVERLAYS, uid):
        for volume in (v.volume for v in plan.disks):
            name = names.overlay_name(installation, uid, attempt, volume.id)
            made[volume.id] = await overlays.create(plan.quiesce.overlay_pool, name, volume)
    return made


async def held(client: Hypervisor, ref: Ref, pool: str, prefix: str) -> frozenset[str]:
    """Return the overlays with this prefix that nobody ever wrote to and no VM uses: those may be removed without a thought."""
    return frozenset(await client.overlays(ref).pristine(pool, prefix))


async def remove(client: Hypervisor, ref: Ref, pool: str, name: str) -> None:
    """Remove an overlay that nobody ever wrote to. Raises HypervisorError if it is used."""
    await client.overlays(ref).remove(pool, name)


async def look(client: Hypervisor, ref: Ref | None, journal: Journal) -> Overlaid:
    """Look at all overlays that a journal names, and at their bases. Raises HypervisorError when that cannot be done."""
    if ref is None:
        return Overlaid(chains=None)
    try:
        return await client.overlays(ref).look(journal.overlays)
    except DomainGoneError:
        return Overlaid(chains=None)


async def collapse(
    client: Hypervisor, ref: Ref, journal: Journal, settings: OverlaySettings | None, told: Told
) -> tuple[Ruling, ...]:
    """Bring the VM back onto its own disks, as far as that can be done now; return what was ruled last.

    The journal is removed once nothing is left to do. A VM that stood still because its overlays found no room goes on.
    `told` is called with what is under way. Nothing is returned if another one has ended it: the journal is gone. Raises HypervisorError.
    """
    overlays, uid, pause = client.overlays(ref), journal.owner_uid, FIRST_PAUSE
    bandwidth = settings.bandwidth if settings is not None else 0
    commits: Counter[str] = Counter()
    unlimited: set[str] = set()
    while True:
        seen = await look(client, ref, journal)
        # Read after the look: by then whoever began what was seen, which may be another one, has written it down.
        there = await client.read_journal(ref)
        if there is None or there.nonce != journal.nonce:
            log.info(
                "domain %s bears the journal of its overlays no more: another one has ended it, or removed it", ref.name
            )
            return ()
        journal = merged(journal, there)
        rulings = plans.judge(journal, seen)
        told(rulings)
        if plans.may_go_on(seen, rulings):
            log.warning("domain %s was paused by an I/O error on its overlays, and goes on without them", ref.name)
            await overlays.resume()
        if not plans.actionable(rulings):
            return rulings
        moves = {m: [r for r in rulings if r.move is m] for m in Move}
        if fresh := [r.volume for r in moves[Move.COMMIT] if r.volume not in journal.begun]:
            async with step(Step.COLLAPSE_BEGIN, uid):
                journal = replace(journal, phase=Phase.COLLAPSING, begun=(*journal.begun, *fresh))
                await _note(client, ref, journal)
        if seen.chains is not None and seen.chains.io_error:
            bandwidth = 0  # the VM stands still until all is committed, whoever began that
            for target in {r.target for r in moves[Move.WATCH]} - unlimited:
                await overlays.unlimit(target)
                unlimited.add(target)
        for ruling in moves[Move.COMMIT]:
            commits[ruling.target] += 1
            if commits[ruling.target] > MOST_COMMITS:
                raise HypervisorError(
                    f"the commit of disk {ruling.target} of {ref.name} ends again and again with its overlay still in use: its storage"
                    " refuses writes (it may be full), or somebody aborts it; the log of its QEMU says more",
                    reason="CommitFailed",
                    retryable=True,
                )
            async with step(Step.COLLAPSE_COMMIT, uid, ruling.target):
                await overlays.commit(ruling.target, ruling.overlay, bandwidth)
        for ruling in moves[Move.PIVOT]:
            async with step(Step.COLLAPSE_PIVOT, uid, ruling.target):
                await overlays.pivot(ruling.target)
            async with step(Step.COLLAPSE_NOTE, uid, ruling.target):
                journal = replace(journal, pivoted=(*journal.pivoted, ruling.volume))
                await client.update_journal(ref, journal)  # if it is gone, the next look tells
        for ruling in moves[Move.REMOVE]:
            async with step(Step.COLLAPSE_REMOVE, uid, ruling.overlay):
                await overlays.remove_path(ruling.overlay)
        if len(moves[Move.KEEP]) + len(moves[Move.GONE]) == len(rulings):
            async with step(Step.COLLAPSE_CLEAR, uid):
                await client.clear_journal(ref, journal.nonce)
            return rulings
        if not (moves[Move.PIVOT] or moves[Move.REMOVE]):
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 1.5)


async def _note(client: Hypervisor, ref: Ref, journal: Journal) -> None:
    if not await client.update_journal(ref, journal):
        raise HypervisorError(
            f"domain {ref.name} bears the journal of its overlays no more: somebody removed it, and nothing is committed",
            reason="JournalLost",
            retryable=True,
        )
