"""Look after every VMSnapshotContent: tell its status, and clean up after one whose VMSnapshot is gone.

What is to be done is decided by `plan.unbound`. While its VMSnapshot is there, nothing but the status is touched here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, DriverError, HypervisorError, SnapshotError
from vmsnapshot_operator.kube import conditions, contents
from vmsnapshot_operator.kube.contents import Owner
from vmsnapshot_operator.plan import unbound
from vmsnapshot_operator.plan.orphans import Kept
from vmsnapshot_operator.plan.unbound import Ask, Decision, Drop, Nothing, Remove, Seen, Told
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import World, now

log = logging.getLogger(__name__)

TELL_AFTER = Seconds(10.0)
"""A status is written so long after the content was finished: the VMSnapshot's own comes first."""

VERIFY_EVERY = Seconds(600.0)
"""How often the API server is asked whether a VMSnapshot that the watch knows is still there: a watch may miss its end."""

STANDBY_SECONDS, RETRY_SECONDS = Seconds(30.0), Seconds(60.0)
LIST_TIMEOUT, DELETE_TIMEOUT = Seconds(15.0), Seconds(60.0)


@dataclass(slots=True)
class _Known:
    """What the watch said of one content, and since when (readings of the loop's clock) what is so."""

    owner: Owner
    kept: Kept
    finished: bool
    told: bool
    finished_at: float = 0.0
    verified_at: float | None = None
    missing_at: float | None = None


class Contents:
    """All contents of this process. `exists` asks the watch for a VMSnapshot; `wake` puts a content back into the queue."""

    def __init__(self, world: World, *, exists: Callable[[Owner], bool], wake: Callable[[str], None]) -> None:
        self._world = world
        self._exists = exists
        self._wake = wake
        self._known: dict[str, _Known] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._turns: dict[tuple[str, ...], asyncio.Semaphore] = {}

    def seen(self, body: Mapping[str, Any]) -> None:
        """Take one content out of the watch."""
        meta, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
        owner = contents.owner(body)
        before = self._known.get(meta["name"])
        found = _Known(
            owner=owner,
            kept=Kept(
                name=meta["name"],
                uid=owner.uid,
                attempt=int(spec.get("attempt") or 1),
                names=frozenset(str(g.get("requestName", "")) for g in spec.get("groups") or ()),
            ),
            finished=bool(spec.get("readyTime") or spec.get("failure")),
            told=status.get("observedGeneration") == meta.get("generation"),
        )
        if before is not None and before.owner == owner:
            found.verified_at, found.missing_at = before.verified_at, before.missing_at
        found.finished_at = before.finished_at if before is not None and before.finished else _clock()
        self._known[meta["name"]] = found

    def gone(self, name: str) -> None:
        """A content was deleted."""
        self._known.pop(name, None)

    def names(self) -> tuple[str, ...]:
        """The names of all contents that are known."""
        return tuple(self._known)

    def kept(self) -> tuple[Kept, ...]:
        """What all contents say that storage holds, unchecked: enough to know whose a name may be, never to remove it."""
        return tuple(k.kept for k in self._known.values())

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reconcile(self, name: str) -> float | None:
        """Look at one content; return seconds until the next look, or None for the next event."""
        known = self._known.get(name)
        if known is None or name in self._running:
            return None
        if not self._world.leadership.is_leader():
            return STANDBY_SECONDS
        moment = _clock()
        if known.missing_at is None and self._exists(known.owner):
            if known.finished and not known.told and moment < known.finished_at + TELL_AFTER:
                return known.finished_at + TELL_AFTER - moment
            verified = known.verified_at is not None and moment < known.verified_at + VERIFY_EVERY
            if verified and (known.told or not known.finished):
                return None
        elif known.missing_at is None:
            known.missing_at = moment
            return unbound.GRACE + 1.0
        body, seen = await self._look(name, known)
        if body is None or seen is None:
            self.gone(name)
            return None
        if seen.owner_exists:
            known.missing_at, known.verified_at = None, moment
        elif known.missing_at is None:
            known.missing_at = moment
            return unbound.GRACE + 1.0
        decision = unbound.decide(seen)
        if isinstance(decision.effect, Nothing):
            await self._tell(body, decision)
            return decision.effect.seconds
        self._start(name, body, seen)
        return None

    async def _look(self, name: str, known: _Known) -> tuple[dict[str, Any] | None, Seen | None]:
        """Read the content and its VMSnapshot now: nothing is removed by what a watch said."""
        world = self._world
        body = await world.cluster.content(name)
        if body is None:
            return None, None
        owner = contents.owner(body)
        named = owner.namespace and owner.name
        there = await world.cluster.snapshot(owner.namespace, owner.name) if named else None
        uid = str(there["metadata"]["uid"]) if there is not None else ""
        record = contents.from_body(body, owner, world.installation)
        return body, Seen(
            record=record,
            uid=owner.uid,
            owner=str(owner),
            owner_exists=bool(uid) and uid == owner.uid,
            namesake=uid if uid != owner.uid else "",
            whole=record.outcome is not None and body["metadata"].get("generation") == 1,
            busy=owner.uid in world.claims.values(),
            leader=world.leadership.is_leader(),
            missing_for=Seconds(_clock() - known.missing_at) if known.missing_at is not None else Seconds(0.0),
            installation=world.installation,
        )

    def _start(self, name: str, body: Mapping[str, Any], seen: Seen) -> None:
        """Clean up in a task of its own: a storage system that hangs holds no worker of the queue."""
        task = asyncio.create_task(self._clean_up(name, body, seen), name=f"clean up {name}")
        self._running[name] = task

        def done(ended: asyncio.Task[None]) -> None:
            self._running.pop(name, None)
            if not ended.cancelled() and (error := ended.exception()) is not None:
                log.error("VMSnapshotContent %s is not cleaned up yet: %s", name, error, exc_info=error)

        task.add_done_callback(done)

    async def _clean_up(self, name: str, body: Mapping[str, Any], seen: Seen) -> None:
        turn = self._turns.setdefault(tuple(sorted(seen.record.groups)), asyncio.Semaphore(1))
        try:
            async with turn:
                # The wait for its turn may have been long: another one's storage hung, and a person may have chosen otherwise.
                known = self._known.get(name)
                again, fresh = await self._look(name, known) if known is not None else (None, None)
                if again is None or fresh is None:
                    return
                body, seen = again, fresh
                while self._world.leadership.is_leader():
                    decision = unbound.decide(seen)
                    await self._tell(body, decision)
                    match decision.effect:
                        case Ask():
                            seen = await self._ask(seen)
                        case Remove(held):
                            trouble = await self._stop(body, seen) or await self._remove(held, seen.record)
                            seen = replace(seen, held=None, trouble=trouble)
                            if seen.trouble:
                                seen = replace(seen, held=held)
                        case Drop():
                            await self._drop(body, seen)
                            return
                        case Nothing():
                            break
        except SnapshotError as error:
            log.warning("VMSnapshotContent %s is not cleaned up yet: %s", name, error.message)
        asyncio.get_running_loop().call_later(RETRY_SECONDS, self._wake, name)

    async def _ask(self, seen: Seen) -> Seen:
        prefix = names.object_prefix(self._world.installation, seen.uid)
        held: dict[str, frozenset[str]] = {}
        unlisted: dict[str, str] = {}

        async def ask(class_name: str) -> None:
            try:
                host = await self._world.classes.host_of_record(seen.record.groups[class_name])
                held[class_name] = frozenset(await host.list(prefix, timeout=LIST_TIMEOUT))
            except DriverError as error:
                unlisted[class_name] = error.message

        await asyncio.gather(*(ask(c) for c in seen.record.groups))
        return replace(seen, held=held, unlisted=unlisted)

    async def _stop(self, body: Mapping[str, Any], seen: Seen) -> str:
        """Have the hypervisor stop copying for it; return why it may go on, into what would be deleted, or nothing."""
        if not await backups.may_run(self._world, seen.record):
            return ""
        try:
            record = seen.record
            await backups.stop(self._world, contents.hypervisor(body), record.plan.vm_uuid, seen.uid, record.attempt)
        except HypervisorError as error:
            return f"the hypervisor may still copy into it: {error.message}"
        return ""

    async def _remove(self, held: Mapping[str, frozenset[str]], record: Record) -> str:
        """Delete every name, go on after errors; return what could not be deleted, or nothing."""
        troubles = []
        for class_name, found in sorted(held.items()):
            for name in sorted(found):
                try:
                    host = await self._world.classes.host_of_record(record.groups[class_name])
                    await host.delete(name, timeout=DELETE_TIMEOUT)
                    log.warning("class %s: %s removed: its VMSnapshot is gone", class_name, name)
                except DriverError as error:
                    troubles.append(f'class "{class_name}": {name}: {error.message}')
        return "; ".join(troubles)

    async def _drop(self, body: Mapping[str, Any], seen: Seen) -> None:
        await self._world.cluster.delete_content(body["metadata"]["name"], body["metadata"]["uid"])
        said = (
            f"VMSnapshot {seen.owner} is gone; the storage systems have confirmed that nothing is held of it any more"
        )
        log.warning("VMSnapshotContent %s removed: %s", body["metadata"]["name"], said)
        await self._world.events.emit(body, "Normal", "ContentRemoved", said)

    async def _tell(self, body: Mapping[str, Any], decision: Decision) -> None:
        """Write status if there is news."""
        told = decision.told
        if told is None:
            return
        old = body.get("status") or {}
        status = _status(old, told, int(body["metadata"].get("generation", 0)))
        if not conditions.changed(old, status):
            return
        try:
            await self._world.cluster.write_content_status(body, status)
        except ConflictError as error:
            log.info("%s", error.message)
            return
        ready = told.conditions[0]
        if ready.reason != "Ready":
            kind = "Warning" if ready.status is not True else "Normal"
            await self._world.events.emit(body, kind, ready.reason, ready.message)


def _status(old: Mapping[str, Any], told: Told, generation: int) -> dict[str, Any]:
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": conditions.merge(old.get("conditions") or (), told.conditions, generation, now()),
    }
    return status if told.ready is None else {**status, "ready": told.ready}


def _clock() -> float:
    return asyncio.get_running_loop().time()
