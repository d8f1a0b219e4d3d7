"""One look at one VMSnapshot: gather, decide, tell, apply; again until there is nothing to do but wait.

Effects that may take long run as tasks, one per object, so that a long copy holds no worker of the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmsnapshot_operator.core.effects import (
    Collapse,
    Condition,
    Decision,
    Effect,
    Failure,
    Observation,
    Prepare,
    Recover,
    RollBack,
    Settle,
    TakeWindow,
    Wait,
    is_quiet,
)
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, RefusedError, SnapshotError
from vmsnapshot_operator.kube import conditions
from vmsnapshot_operator.plan import report
from vmsnapshot_operator.plan.conditions import RECONCILING, STALLED
from vmsnapshot_operator.strategies.gather import gather
from vmsnapshot_operator.strategies.registry import choose
from vmsnapshot_operator.strategies.window import LEASE_MARGIN
from vmsnapshot_operator.strategies.world import World, clock

log = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
TELL_EVERY = 3.0
"""How often the progress of what takes long is told."""
MAX_STEPS = 50
"""More effects in a row than any snapshot needs: a loop that does not end by itself is ended, and said so."""

_LONG = (Prepare, TakeWindow, Settle, RollBack, Recover, Collapse)
_CANCELLABLE = (Prepare, Settle)


@dataclass(frozen=True, slots=True)
class _Running:
    """An effect under way."""

    effect: Effect
    task: asyncio.Task[None]


class Reconciler:
    """Drives all VMSnapshots of this process; `wake(namespace, name, uid)` puts one back into the queue."""

    def __init__(self, world: World, wake: Callable[[str, str, str], None]) -> None:
        self._world = world
        self._wake = wake
        self._running: dict[str, _Running] = {}

    async def reconcile(self, namespace: str, name: str, uid: str) -> float | None:
        """Do what can be done now; return seconds until the next look, or None for the next event."""
        if not self._world.leadership.is_leader(LEASE_MARGIN):
            return STANDBY_SECONDS
        for _ in range(MAX_STEPS):
            body: Mapping[str, Any] | None = await self._world.cluster.snapshot(namespace, name)
            if body is None or body["metadata"]["uid"] != uid:
                await self._gone(uid)
                return None
            if uid in self._running:
                self._hurry(uid, body)
                return None  # the end of the effect wakes us
            try:
                seen = await gather(self._world, body)
            except RefusedError as error:
                log.warning("VMSnapshot %s/%s cannot be understood: %s", namespace, name, error.message)
                return None
            if not seen.leader:
                return STANDBY_SECONDS
            decision = choose(self._world.strategies, seen.request, seen.record).decide(seen, self._world.now())
            if not is_quiet(decision.effect):
                body = await self._tell(seen, decision, body)
            if isinstance(decision.effect, Wait):
                # Whoever waits holds no driver process that others need, and freezes nobody for one that went cold.
                await self._world.memory(uid).drop_prepared()
                return decision.effect.seconds
            if not self._world.leadership.is_leader(LEASE_MARGIN):
                return STANDBY_SECONDS
            log.info("VMSnapshot %s/%s: %s", namespace, name, type(decision.effect).__name__)
            if isinstance(decision.effect, _LONG):
                self._start(decision, seen, body)
                return None
            await self._apply(decision.effect, seen, body)
        log.error("VMSnapshot %s/%s did not come to rest after %d effects", namespace, name, MAX_STEPS)
        return MAX_BACKOFF_SECONDS

    def fence(self) -> None:
        """End what must not go on beside another instance; windows see to themselves, and freeing needs no lease."""
        for running in self._running.values():
            if isinstance(running.effect, _CANCELLABLE) and not running.task.cancelling():
                running.task.cancel()

    async def close(self) -> None:
        """End all effects; a window frees its guest before it ends."""
        tasks = [r.task for r in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for uid in list(self._world.memories):
            await self._world.forget(uid)

    def _start(self, decision: Decision, seen: Observation, body: Mapping[str, Any]) -> None:
        request, effect = seen.request, decision.effect

        async def run() -> None:
            teller = asyncio.create_task(self._keep_telling(decision, seen, body))
            try:
                await self._apply(effect, seen, body)
            finally:
                teller.cancel()
                await asyncio.wait({teller})

        task = asyncio.create_task(run(), name=f"{type(effect).__name__} {request.uid}")
        self._running[request.uid] = _Running(effect, task)

        def done(_: asyncio.Task[None]) -> None:
            self._running.pop(request.uid, None)
            self._wake(request.namespace, request.name, request.uid)

        task.add_done_callback(done)

    async def _keep_telling(self, decision: Decision, seen: Observation, body: Mapping[str, Any]) -> None:
        """Tell how far copies and commits are, and what was to end at once and does not, until cancelled."""
        memory = self._world.memory(seen.request.uid)
        late = isinstance(decision.effect, Settle) and decision.effect.at_once
        while True:
            await asyncio.sleep(TELL_EVERY)
            told = report.under_way(memory.copied, memory.committed)
            if not told and not late:
                continue
            now = tuple(replace(c, message=told) if c.type == RECONCILING else c for c in decision.conditions)
            try:
                body = await self._tell(
                    replace(seen, copied=dict(memory.copied)), replace(decision, conditions=now), body
                )
                late = False
            except SnapshotError as error:
                log.info("progress of %s is not told: %s", seen.request.uid, error.message)

    def _hurry(self, uid: str, body: Mapping[str, Any]) -> None:
        """A deletion does not wait for a copy; it waits for a window."""
        running = self._running[uid]
        if body["metadata"].get("deletionTimestamp") and isinstance(running.effect, _CANCELLABLE):
            running.task.cancel()

    async def _gone(self, uid: str) -> None:
        """What is under way may take long: its end wakes us, no worker waits for it."""
        running = self._running.get(uid)
        if running is not None:
            if isinstance(running.effect, _CANCELLABLE):
                running.task.cancel()
            return
        await self._world.forget(uid)

    async def _tell(self, seen: Observation, decision: Decision, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write status if there is news."""
        old = body.get("status") or {}
        generation = seen.request.generation
        status = report.status(seen, decision.conditions)
        status["observedGeneration"] = generation
        status["conditions"] = conditions.merge(
            old.get("conditions") or (), decision.conditions, generation, self._world.now()
        )
        if not conditions.changed(old, status):
            return body
        written = await self._world.cluster.write_snapshot_status(body, status)
        if (refusal := _newly_refused(seen, old, decision)) is not None:
            await self._world.events.emit(body, "Warning", refusal.reason, refusal.message)
        return written

    async def _apply(self, effect: Effect, seen: Observation, body: Mapping[str, Any]) -> None:
        memory = self._world.memory(seen.request.uid)
        try:
            async with step(Step(type(effect).__name__), seen.request.uid):
                await choose(self._world.strategies, seen.request, seen.record).apply(effect, seen, body)
        except ConflictError as error:
            log.info("%s: %s", seen.request.uid, error.message)
        except SnapshotError as error:
            log.warning(
                "%s of %s/%s: %s", type(effect).__name__, seen.request.namespace, seen.request.name, error.message
            )
            if _is_final(effect, error):
                memory.broken = Failure(reason=error.reason, message=error.message)
            self._retry_later(seen, error.message)
        except Exception as error:
            log.exception("%s of %s/%s", type(effect).__name__, seen.request.namespace, seen.request.name)
            self._retry_later(seen, f"internal error: {type(error).__name__}; see the operator's log")
        else:
            memory.failures, memory.trouble, memory.retry_at = 0, "", None

    def _retry_later(self, seen: Observation, message: str) -> None:
        memory = self._world.memory(seen.request.uid)
        memory.failures += 1
        memory.trouble = message
        memory.retry_at = Seconds(clock() + min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** min(memory.failures, 10)))


def _newly_refused(seen: Observation, old: Mapping[str, Any], decision: Decision) -> Condition | None:
    """The end of what never began, if it was not told before. What ends later has its event from whoever ends it."""
    if seen.record is not None and not seen.record.problem:
        return None
    known = any(c.get("type") == STALLED and c.get("status") == "True" for c in old.get("conditions") or ())
    return None if known else next((c for c in decision.conditions if c.type == STALLED and c.status), None)


def _is_final(effect: Effect, error: SnapshotError) -> bool:
    """Whether no retry can help. What was taken is given up only when the storage says that it is gone."""
    if isinstance(effect, Settle):
        return error.reason in ("SnapshotLost", "OverlayFull")
    return isinstance(effect, Prepare) and not error.retryable
