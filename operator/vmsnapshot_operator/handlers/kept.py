"""Keep an eye on what no journal tells of: overlays that are kept are told of, and those that nobody needs removed, as are checkpoints.

What is what is decided by `plan.kept`. Each hypervisor is looked at in a task of its own: a pool that hangs delays no sweep.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError, SnapshotError
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.plan import kept
from vmsnapshot_operator.plan.kept import Kept, Seen
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.strategies import increments
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)

LOOK_EVERY = Seconds(300.0)
"""So often it is looked; and at once when an overlay was kept."""

MOST = 256


class KeptOverlays:
    """What was found last, by hypervisor."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._cause: dict[str, frozenset[str]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._found: dict[str, tuple[Kept, ...]] = {}
        self._told: dict[str, frozenset[str]] = {}

    def look(self, body: Mapping[str, Any], client: Hypervisor, pool: str, world: World) -> tuple[Kept, ...] | None:
        """Begin to look if it is time to; return what was found last, None before the first time."""
        name, moment = str(body["metadata"]["name"]), asyncio.get_running_loop().time()
        cause = frozenset(world.kept)
        due = moment >= self._due.get(name, 0.0) or cause != self._cause.get(name, frozenset())
        if due and name not in self._running and world.leadership.is_leader():
            self._due[name], self._cause[name] = moment + LOOK_EVERY, cause
            task = asyncio.create_task(self._both(body, client, pool, world), name=f"overlays of {name}")
            self._running[name] = task
            task.add_done_callback(lambda ended: self._ended(name, ended))
        return self._found.get(name)

    def stalled(self, name: str) -> frozenset[str]:
        """The VMs that stood still on such overlays when they were looked at last."""
        return frozenset(k.file.domain for k in self._found.get(name, ()) if k.file.stalled)

    async def remove(self, name: str) -> None:
        """Forget a hypervisor."""
        if (task := self._running.get(name)) is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for each in (self._due, self._cause, self._found, self._told):
            each.pop(name, None)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._running.pop(name, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        log.warning("hypervisor %s: its overlays could not be looked at: %s", name, error, exc_info=error)

    async def _both(self, body: Mapping[str, Any], client: Hypervisor, pool: str, world: World) -> None:
        await asyncio.gather(self._look(body, client, pool, world), self._checkpoints(body, client, world))

    async def _look(self, body: Mapping[str, Any], client: Hypervisor, pool: str, world: World) -> None:
        name = body["metadata"]["name"]
        try:
            seen = await self._see(client, pool, world)
            found = kept.judge(seen)
            if any(k.removable for k in found):
                # Nothing is removed by what a watch said.
                fresh = await world.cluster.snapshot_uids()
                found = kept.judge(replace(seen, owners=seen.owners | fresh | frozenset(world.claims.values())))
        except SnapshotError as error:
            log.warning("hypervisor %s: its overlays could not be looked at: %s", name, error.message)
            return
        left = [await self._remove(body, client, k, world) if k.removable else k for k in found]
        # What stands on a host that does not answer is still there.
        unseen = [k for k in self._found.get(name, ()) if k.file.endpoint in seen.silent]
        self._found[name] = tuple([k for k in left if k is not None] + unseen)
        await self._tell(body, world)

    async def _checkpoints(self, body: Mapping[str, Any], client: Hypervisor, world: World) -> None:
        """Remove those that no snapshot needs: of VMs that were off, or could not be asked, when theirs was deleted."""
        name = body["metadata"]["name"]

        def told(gone: Checkpoint) -> None:
            log.warning(
                "hypervisor %s: checkpoint %s of VM %s removed: no snapshot needs it", name, gone.name, gone.domain
            )

        try:
            await increments.sweep(world, client, told)
        except SnapshotError as error:
            log.warning("hypervisor %s: the checkpoints of its VMs could not be looked at: %s", name, error.message)

    async def _see(self, client: Hypervisor, pool: str, world: World) -> Seen:
        """Journals are read before and after: an overlay whose journal comes or goes meanwhile is somebody's business."""
        before = await client.sweep()
        files, silent = await client.overlay_files(names.overlays_prefix(world.installation), pool)
        journals = [s.journal for s in (*before, *await client.sweep()) if s.journal is not None]
        return Seen(
            installation=world.installation,
            files=files,
            journaled=frozenset(path for j in journals for path in j.overlays.values()),
            owners=world.uids() | frozenset(world.claims.values()),
            silent={**client.problems, **silent},
        )

    async def _remove(self, body: Mapping[str, Any], client: Hypervisor, found: Kept, world: World) -> Kept | None:
        """Remove one; return it if it is still there."""
        try:
            if not world.leadership.is_leader():
                return None
            await client.remove_overlay(found.file)
        except HypervisorError as error:
            return replace(found, why=f"{found.why}; it could not be removed yet: {error.message}", removable=False)
        log.warning("overlay %s on %s removed: %s", found.file.path, found.file.endpoint, found.why)
        await world.events.emit(body, "Normal", "OrphanRemoved", f"overlay {found.file.path} removed: {found.why}")
        return None

    async def _tell(self, body: Mapping[str, Any], world: World) -> None:
        """Tell of kept overlays when they are other ones than last time."""
        name = body["metadata"]["name"]
        found = self._found[name]
        world.metrics.kept_overlays(len(found), hypervisor=name)
        there = frozenset(k.file.path for k in found)
        if there and there != self._told.get(name):
            said = "; ".join(f"overlay {k.file.path} on {k.file.endpoint}: {why(k, world)}" for k in found)
            log.warning("hypervisor %s: %d overlays are kept: %s", name, len(found), said)
            await world.events.emit(body, "Warning", "OverlayKept", said)
        self._told[name] = there


def why(found: Kept, world: World) -> str:
    """Why it is kept: what was ruled about it at that time, if this process was there, and how it is now."""
    ruled = world.kept.get(found.file.path, "")
    return f"{found.why} ({ruled})" if ruled else found.why


def status(old: Mapping[str, Any], found: tuple[Kept, ...] | None, world: World, moment: datetime) -> Any:
    """Return `keptOverlays` of a Hypervisor's status. Since when, and why, stays as it was first told, for the same overlay and VM."""
    told = old.get("keptOverlays")
    if found is None:
        return told
    before = {(e.get("endpoint"), e.get("path"), e.get("domain")): e for e in told or ()}
    entries = []
    for k in found[:MOST]:
        last = before.get((k.file.endpoint, k.file.path, k.file.domain or None), {})
        entry = {
            "path": k.file.path,
            "endpoint": k.file.endpoint,
            "domain": k.file.domain or None,
            "sinceTime": last.get("sinceTime") or moment.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "message": clip(why(k, world) if k.file.path in world.kept or not last else str(last.get("message"))),
        }
        entries.append({key: value for key, value in entry.items() if value is not None})
    return entries or None
