"""One look at one VMRestore: gather, decide, tell, apply; again until there is nothing to do but wait.

What takes long runs as a task, one per object, and tells how far it is while it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmsnapshot_operator.core.effects import Failure
from vmsnapshot_operator.core.restoring import (
    Clone,
    GoBack,
    RemoveClones,
    Rest,
    RestoreDecision,
    RestoreEffect,
    RestoreSeen,
    Revert,
    Start,
    Stop,
)
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, DriverError, RefusedError, SnapshotError
from vmsnapshot_operator.kube import conditions
from vmsnapshot_operator.plan import restore_report
from vmsnapshot_operator.plan.next_restore import decide
from vmsnapshot_operator.strategies import restore_apply, restore_gather
from vmsnapshot_operator.strategies.restore_gather import Memory
from vmsnapshot_operator.strategies.window import LEASE_MARGIN
from vmsnapshot_operator.strategies.world import World, clock

log = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
MAX_STEPS = 50
TELL_EVERY = 5.0
"""How often the progress of what takes long is told."""

_LONG = (Revert, GoBack, Clone, RemoveClones, Stop, Start)
_CANCELLABLE = (Clone, Stop, Start)
"""What nobody wants any more once the object is gone. The others bring to its end what is half done."""


@dataclass(frozen=True, slots=True)
class _Running:
    """An effect under way."""

    effect: RestoreEffect
    task: asyncio.Task[None]


class Restores:
    """Drives all VMRestores of this process; `wake(namespace, name, uid)` puts one back into the queue."""

    def __init__(self, world: World, wake: Callable[[str, str, str], None]) -> None:
        self._world = world
        self._wake = wake
        self._running: dict[str, _Running] = {}
        self._memories: dict[str, Memory] = {}

    async def reconcile(self, namespace: str, name: str, uid: str) -> float | None:
        """Do what can be done now; return seconds until the next look, or None for the next event."""
        if not self._world.leadership.is_leader(LEASE_MARGIN):
            return STANDBY_SECONDS
        for _ in range(MAX_STEPS):
            body: Mapping[str, Any] | None = await self._world.cluster.restore(namespace, name)
            if body is None or body["metadata"]["uid"] != uid:
                self._gone(uid)
                return None
            if uid in self._running:
                return None  # the end of the effect wakes us
            memory = self._memories.setdefault(uid, Memory(since=clock()))
            try:
                seen = await restore_gather.gather(self._world, body, memory)
            except RefusedError as error:
                log.warning("VMRestore %s/%s cannot be understood: %s", namespace, name, error.message)
                return None
            decision = decide(seen, self._world.now())
            body = await self._tell(seen, decision, body)
            if isinstance(decision.effect, Rest):
                return decision.effect.seconds
            if not self._world.leadership.is_leader(LEASE_MARGIN):
                return STANDBY_SECONDS
            log.info("VMRestore %s/%s: %s", namespace, name, type(decision.effect).__name__)
            if isinstance(decision.effect, _LONG):
                self._start(decision, seen, body, memory)
                return None
            await self._apply(decision.effect, seen, body, memory)
        log.error("VMRestore %s/%s did not come to rest after %d effects", namespace, name, MAX_STEPS)
        return MAX_BACKOFF_SECONDS

    def fence(self) -> None:
        """End all effects: another instance goes on with them, and may start the VM while this one still writes to its disks."""
        for running in self._running.values():
            if not running.task.cancelling():
                running.task.cancel()

    async def close(self) -> None:
        """End all effects; each may be repeated."""
        tasks = [r.task for r in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, decision: RestoreDecision, seen: RestoreSeen, body: Mapping[str, Any], memory: Memory) -> None:
        request = seen.request

        async def run() -> None:
            teller = asyncio.create_task(self._keep_telling(decision, seen, body, memory))
            try:
                await self._apply(decision.effect, seen, body, memory)
            finally:
                teller.cancel()
                await asyncio.gather(teller, return_exceptions=True)
                memory.progress.clear()

        task = asyncio.create_task(run(), name=f"{type(decision.effect).__name__} {request.uid}")
        self._running[request.uid] = _Running(decision.effect, task)

        def done(_: asyncio.Task[None]) -> None:
            self._running.pop(request.uid, None)
            self._wake(request.namespace, request.name, request.uid)

        task.add_done_callback(done)

    async def _keep_telling(
        self, decision: RestoreDecision, seen: RestoreSeen, body: Mapping[str, Any], memory: Memory
    ) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY)
            if not memory.progress:
                continue
            told = "; ".join(f'class "{c}": {d} of {t} bytes' for c, (d, t) in sorted(memory.progress.items()))
            now = tuple(
                type(c)(type=c.type, status=c.status, reason=c.reason, message=told) if c.type == "Reconciling" else c
                for c in decision.conditions
            )
            try:
                body = await self._tell(seen, RestoreDecision(effect=decision.effect, conditions=now), body)
            except SnapshotError as error:
                log.info("progress of VMRestore %s is not told: %s", seen.request.uid, error.message)

    def _gone(self, uid: str) -> None:
        """Somebody took the object away by force. What is under way may take a day: its end wakes us, no worker waits for it."""
        running = self._running.get(uid)
        if running is not None:
            if isinstance(running.effect, _CANCELLABLE):
                running.task.cancel()
            return
        self._memories.pop(uid, None)
        self._world.release(uid)

    async def _tell(self, seen: RestoreSeen, decision: RestoreDecision, body: Mapping[str, Any]) -> Mapping[str, Any]:
        old = dict(body.get("status") or {})
        generation = seen.request.generation
        now = self._world.now()
        status = restore_report.status(seen, decision, old, now)
        status["observedGeneration"] = generation
        status["conditions"] = conditions.merge(old.get("conditions") or (), decision.conditions, generation, now)
        if not conditions.changed(old, status):
            return body
        return await self._world.cluster.write_restore_status(body, status)

    async def _apply(self, effect: RestoreEffect, seen: RestoreSeen, body: Mapping[str, Any], memory: Memory) -> None:
        try:
            async with step(Step(type(effect).__name__), seen.request.uid):
                await restore_apply.apply(self._world, effect, seen, body, memory)
        except ConflictError as error:
            log.info("%s: %s", seen.request.uid, error.message)
        except SnapshotError as error:
            log.warning(
                "%s of %s/%s: %s", type(effect).__name__, seen.request.namespace, seen.request.name, error.message
            )
            if _is_final(effect, error):
                memory.broken = Failure(reason=error.reason, message=error.message)
            _retry_later(memory, error.message)
        except Exception as error:
            log.exception("%s of %s/%s", type(effect).__name__, seen.request.namespace, seen.request.name)
            _retry_later(memory, f"internal error: {type(error).__name__}; see the operator's log")
        else:
            memory.failures, memory.trouble, memory.retry_at = 0, "", None


def _is_final(effect: RestoreEffect, error: SnapshotError) -> bool:
    """Whether no retry of this effect can help: it ends the restore, or sends it back."""
    if error.retryable:
        return False
    if isinstance(effect, Revert | Clone) and isinstance(error, DriverError):
        return True
    # A gate that is refused is refused by the next look; one that cannot be opened a person can mend, and going back would not help.
    return isinstance(effect, Clone) and (isinstance(error, RefusedError) or error.reason == "NameTaken")


def _retry_later(memory: Memory, message: str) -> None:
    memory.failures += 1
    memory.trouble = message
    memory.retry_at = Seconds(clock() + min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** min(memory.failures, 10)))
