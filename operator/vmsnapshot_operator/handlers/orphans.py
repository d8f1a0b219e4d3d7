"""Scan what each class's storage holds under our names: report what nobody knows, remove what is proved to be ours.

What is an orphan is decided by `plan.orphans`. Each class is scanned in a task of its own, so that a storage system that
hangs delays no other. Not what a VMSnapshot or its content still knows (`handlers.reconcile`, `handlers.contents`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import cast

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import DriverError, HypervisorError, SnapshotError
from vmsnapshot_operator.handlers.classes import Classes
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import orphans
from vmsnapshot_operator.plan.orphans import Findings, Kept, Listing, Orphan, Proof
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)

SCAN_EVERY = Seconds(600.0)
"""At least so long between two listings of one storage system; up to a tenth more, so that classes do not go in step."""

LOOK_AGAIN, CONNECT_SECONDS = Seconds(60.0), Seconds(10.0)
"""When hypervisors that did not answer are asked again; and how long they are waited for at most."""

LIST_TIMEOUT, DELETE_TIMEOUT = Seconds(30.0), Seconds(60.0)
_TICK = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known to exist: contents, VMSnapshots by UID, and VMRestores that have not come to their end, by UID."""

    contents: tuple[Kept, ...] = ()
    snapshots: frozenset[str] = frozenset()
    restores: frozenset[str] = frozenset()

    @property
    def uids(self) -> frozenset[str]:
        """All VMSnapshots that exist or of which a content exists, and the VMRestores."""
        return self.snapshots | self.restores | {k.uid for k in self.contents}


class OrphanScan:
    """Scans all classes for as long as `run` runs.

    `known` asks the watches; `proven` says what journals have proved; `told` is called with a class when there is news of it, `lost` with
    the UIDs of VMSnapshots when something of them is missing on storage, or is there again.
    """

    def __init__(
        self,
        world: World,
        classes: Classes,
        *,
        known: Callable[[], Known],
        proven: Callable[[], Mapping[str, Proof]],
        told: Callable[[str], None],
        lost: Callable[[AbstractSet[str]], None] = lambda _: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._world = world
        self._classes = classes
        self._known = known
        self._proven = proven
        self._told = told
        self._lost = lost
        self._jitter = jitter
        self._due: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._reported: dict[str, frozenset[str]] = {}
        self._vanished: dict[str, frozenset[str]] = {}

    async def run(self) -> None:
        """Scan each class at once, then again and again, until cancelled; only while this instance holds the lease."""
        try:
            while True:
                hosts = self._classes.hosts()
                for gone in self._due.keys() - hosts.keys() - self._running.keys():
                    self._forget(gone)
                if self._world.leadership.is_leader():
                    for name, host in hosts.items():
                        self._start_if_due(name, host)
                await asyncio.sleep(_TICK)
        finally:
            tasks = list(self._running.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, name: str) -> None:
        for kept in (self._due, self._reported, self._vanished, self._world.lost):
            cast("dict[str, object]", kept).pop(name, None)
        self._world.metrics.forget_class(name)

    def _start_if_due(self, name: str, host: DriverHost) -> None:
        moment = asyncio.get_running_loop().time()
        if name in self._running or moment < self._due.get(name, 0.0):
            return
        self._due[name] = moment + SCAN_EVERY * (1 + self._jitter() / 10)
        task = asyncio.create_task(self._scan(name, host), name=f"scan {name}")
        self._running[name] = task

        def done(ended: asyncio.Task[None]) -> None:
            self._running.pop(name, None)
            if not ended.cancelled() and (error := ended.exception()) is not None:
                log.error("class %s: the scan for orphans failed: %s", name, error, exc_info=error)

        task.add_done_callback(done)

    async def _scan(self, name: str, host: DriverHost) -> None:
        try:
            found = await self._spare(name, await self._find(name, host))
            found = await self._remove(name, host, found)
        except SnapshotError as error:
            self._world.metrics.orphan_scan_failed(class_name=name)
            log.warning("class %s: what its storage holds could not be compared: %s", name, error.message)
            return
        self._world.metrics.orphans(len(found.listed), class_name=name)
        self._classes.note_findings(name, found)
        await self._report(name, found)
        self._told(name)

    async def _find(self, name: str, host: DriverHost) -> Findings:
        """List, and compare with what was known before and is known after: what comes or goes meanwhile is no orphan."""
        world, before = self._world, self._known()
        listed = await host.list(names.installation_prefix(world.installation), timeout=LIST_TIMEOUT)
        seen = Listing(
            installation=world.installation,
            listed=listed,
            contents=before.contents,
            snapshots=before.snapshots,
            busy=frozenset(world.claims.values()) | before.restores,
            journals=dict(self._proven()),
        )
        # At first, too: right after the start the watches may know of snapshots, and of their contents not yet.
        if name in world.lost and not orphans.unexplained(seen):
            self._vanished.pop(name, None)
            await self._note_lost(name, host, before)
            return orphans.judge(seen)
        fresh = Known(
            contents=tuple([contents.kept(body, world.installation) async for body in world.cluster.contents()]),
            snapshots=await world.cluster.snapshot_uids(),
            restores=await world.cluster.restores_under_way(),
        )
        await self._note_lost(name, host, fresh)
        gone = before.uids - fresh.uids
        # A watch that fell silent must not hide for ever what is gone: one scan's grace is enough for a deletion.
        going, self._vanished[name] = gone - self._vanished.get(name, frozenset()), gone
        busy = frozenset(world.claims.values()) | fresh.restores | going
        return orphans.judge(replace(seen, contents=fresh.contents, snapshots=fresh.snapshots, busy=busy))

    async def _spare(self, name: str, found: Findings) -> Findings:
        """Look whether VMs have any of it among their disks, as they have clones of a restore that did not come to its end."""
        wanted = frozenset(o.name for o in found.orphans)
        if not wanted:
            return found
        users: dict[str, str] = {}
        problems = []
        for hypervisor in await self._world.cluster.hypervisor_names():
            client = await self._client(hypervisor)
            if client is None:
                problems.append(f'hypervisor "{hypervisor}" cannot be asked')
                continue
            used, silent = await client.users(wanted)
            users |= used
            problems += silent.values()
        if problems:
            # What is not known now is known soon, mostly: a hypervisor is being connected to.
            self._due[name] = min(self._due[name], asyncio.get_running_loop().time() + LOOK_AGAIN)
        return orphans.spare(found, users, "; ".join(problems))

    async def _client(self, hypervisor: str) -> Hypervisor | None:
        """The connections of a hypervisor; a moment is waited for them, for right after a start there are none."""
        end = asyncio.get_running_loop().time() + CONNECT_SECONDS
        while True:
            live = self._world.hypervisors.get(hypervisor)
            if live is not None and live.client is not None:
                return live.client
            if asyncio.get_running_loop().time() >= end:
                return None
            await asyncio.sleep(_TICK)

    async def _note_lost(self, name: str, host: DriverHost, known: Known) -> None:
        """`known`: before the storage is asked. What was deleted since is missing, too; nobody asks for it any more."""
        groups = [
            (k.uid, g) for k in known.contents for g in k.ready if g.class_name == name and self._classes.serves(g)
        ]
        cuts = [g.result for _, g in groups if g.result is not None]
        missing = await host.missing(cuts, timeout=LIST_TIMEOUT) if cuts else frozenset()
        found = orphans.lost(groups, missing)
        last, self._world.lost[name] = self._world.lost.get(name, {}), found
        if changed := found.keys() ^ last.keys():
            log.warning("class %s: of %d VMSnapshots something is missing, or is there again", name, len(changed))
            self._lost(changed)

    async def _remove(self, name: str, host: DriverHost, found: Findings) -> Findings:
        """Remove what is proved to be ours; return what is left, with what could not be removed among the reported."""
        left: list[Orphan] = list(found.reported)
        removed = 0
        for orphan in found.removable:
            try:
                await self._stop(orphan)
                if not self._world.leadership.is_leader():
                    left.append(replace(orphan, removable=False))
                    continue
                await host.delete(orphan.name, timeout=DELETE_TIMEOUT)
            except (DriverError, HypervisorError) as error:
                why = f"{orphan.why}; it could not be removed yet: {error.message}"
                left.append(replace(orphan, why=why, removable=False))
                continue
            removed += 1
            log.warning("class %s: %s removed: %s", name, orphan.name, orphan.why)
            self._world.metrics.orphan_removed(class_name=name)
            await self._emit(name, "Normal", "OrphanRemoved", f"{orphan.name} removed: {orphan.why}")
        return Findings(held=found.held - removed, orphans=tuple(sorted(left, key=lambda o: o.name)))

    async def _stop(self, orphan: Orphan) -> None:
        """Have the hypervisor stop copying into what is to be deleted. Raises HypervisorError while it may go on.

        Whatever class listed it: two classes may show the same storage.
        """
        world = self._world
        if not world.leadership.is_leader() or not backups.may_be_used(world):
            return
        if world.hypervisors.get(orphan.vm.hypervisor) is None:
            text = f'there is no Hypervisor "{orphan.vm.hypervisor}" (yet), so nobody can say whether its VM is still being copied'
            raise HypervisorError(text, reason="HypervisorNotFound", retryable=True)
        upto = names.attempt_of(orphan.name)
        assert upto is not None, "what is no name of ours is not removable"  # noqa: S101 - for the type checker
        await backups.stop(world, orphan.vm.hypervisor, orphan.vm.domain, orphan.uid, upto)

    async def _report(self, name: str, found: Findings) -> None:
        """Tell of orphans when they are other ones than last time."""
        there = frozenset(o.name + (" (needed)" if o.needed else "") for o in found.reported)
        if there and there != self._reported.get(name):
            said = "; ".join(f"{o.name}: {o.why}" for o in found.reported)
            log.warning("class %s: %d orphans on its storage: %s", name, len(there), said)
            await self._emit(name, "Warning", "OrphansFound", f"{len(there)} on its storage, not touched: {said}")
        self._reported[name] = there

    async def _emit(self, name: str, kind: str, reason: str, message: str) -> None:
        if (body := self._classes.body(name)) is not None:
            await self._world.events.emit(body, kind, reason, message)
