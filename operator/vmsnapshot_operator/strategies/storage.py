"""Strategy `Storage`: each storage driver cuts the volumes that it serves, all under one short quiesce.

Deciding is `plan.next_effect`, looking is `gather`; here each effect is performed, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime
from typing import Any

from vmsnapshot_operator.core.chains import Move, Ruling
from vmsnapshot_operator.core.driver import CutKind, Fit, SnapshotRequest
from vmsnapshot_operator.core.effects import (
    Adopt,
    Amend,
    Collapse,
    Decision,
    DropContent,
    Effect,
    Expire,
    Fail,
    Forget,
    Keep,
    Observation,
    Prepare,
    Record,
    RecordedGroup,
    Recover,
    RollBack,
    Settle,
    TakeWindow,
)
from vmsnapshot_operator.core.evidence import Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Request
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds, VolumeId
from vmsnapshot_operator.drivers.host import DriverHost, Slot
from vmsnapshot_operator.errors import (
    ConflictError,
    DomainGoneError,
    DriverError,
    DriverUnavailableError,
    HypervisorError,
    NotPermittedError,
    SnapshotError,
)
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import next_effect, verdict
from vmsnapshot_operator.quiesce.base import release, undisturbed
from vmsnapshot_operator.strategies import backups, increments, overlays, settling, window
from vmsnapshot_operator.strategies.gather import locate
from vmsnapshot_operator.strategies.world import Listening, Memory, Prepared, World, clock, now

log = logging.getLogger(__name__)

RESERVE_TIMEOUT = Seconds(120.0)
"""Back-pressure: so long a snapshot waits for a free process of each class, with its VM untouched."""
DELETE_TIMEOUT = Seconds(60.0)
RECOVER_PAUSE = Seconds(1.0)


class StorageStrategy:
    """Take and delete by storage drivers."""

    name = "Storage"

    def __init__(self, world: World) -> None:
        self._world = world

    def can_take(self, seen: Observation) -> Fit:
        """It serves every VM whose disks all have a class."""
        if seen.refusal is not None:
            return Fit(ok=False, reason=seen.refusal.reason, message=seen.refusal.message)
        return Fit(ok=True, reason="EveryDiskHasAClass")

    def decide(self, seen: Observation, now: datetime) -> Decision:
        """Return the next effect; pure."""
        return next_effect.decide(seen, now, installation=self._world.installation)

    async def apply(self, effect: Effect, seen: Observation, body: Mapping[str, Any]) -> None:
        """Perform one effect. Raises SnapshotError; the next look sees what was done."""
        match effect:
            case Recover(journal):
                await self._recover(journal, seen)
            case Collapse(journal):
                await self._collapse(journal, seen, body)
            case Adopt():
                await self._world.cluster.add_finalizer(body)
            case Prepare():
                await self._prepare(effect, seen, body)
            case TakeWindow():
                await self._window(effect, seen)
            case Keep():
                await self._keep(effect, seen, body)
            case Amend(collapsed):
                assert seen.record is not None, "only what is on record is amended"  # noqa: S101 - invariant of decide
                amended = replace(seen.record, collapsed=seen.record.collapsed or collapsed)
                await self._write(amended, seen, create=False)
            case Settle(groups):
                await self._settle(groups, seen)
            case RollBack(held):
                await self._roll_back(held, seen)
            case Fail():
                await self._fail(effect, seen, body)
            case DropContent():
                await self._drop(seen, body)
            case Forget():
                await self._world.cluster.remove_finalizer(body)
            case Expire():
                await self._world.cluster.delete_snapshot(body)
            case _:
                raise AssertionError(f"no way to apply {effect!r}")

    def _memory(self, seen: Observation) -> Memory:
        return self._world.memory(seen.request.uid)

    async def _recover(self, journal: Journal, seen: Observation) -> None:
        memory, late = self._memory(seen), False
        await memory.drop_prepared()
        try:
            client, ref = await locate(self._world, seen.request, seen.record)
            await release(client, ref, journal)
            late = client.order_may_come(ref)
        except DomainGoneError:
            log.info("domain of snapshot %s is gone: nothing is left to free", seen.request.uid)
        except SnapshotError:
            await asyncio.sleep(RECOVER_PAUSE)  # what fails at once is tried again without end, but not without rest
            raise
        if self._world.guardian is not None:
            await self._world.guardian.disarm(journal.nonce, late=late)
        if memory.outcome is not None and not memory.outcome.free:
            memory.outcome = _freed(memory.outcome)
            self._measure_hold(memory.outcome.evidence, seen)

    async def _prepare(self, effect: Prepare, seen: Observation, body: Mapping[str, Any]) -> None:
        """Write the intent first: from then on every name that may appear on storage is known."""
        world, request, memory = self._world, seen.request, self._memory(seen)
        await memory.drop_prepared()
        before, memory.outcome = memory.outcome, None
        if before is not None and before.fallback:
            # Not earlier: until here the VM might still have had to be freed, and nothing comes before that.
            text = f"{before.message}; policy Prefer goes on with {effect.plan.quiesce.method}"
            await world.events.emit(body, "Warning", before.reason, text)
        if not world.claim(effect.plan.vm_uuid, request.uid):
            return  # somebody was faster; the next look says who
        record = Record(
            name=contents.name_for(request.uid),
            version=seen.record.version if seen.record is not None else "",
            attempt=effect.attempt,
            plan=effect.plan,
            groups={
                g.class_name: RecordedGroup(
                    class_name=g.class_name,
                    driver=g.driver,
                    parameters=g.parameters,
                    secret_name=g.secret_name,
                    request=effect.requests[g.class_name],
                )
                for g in effect.plan.groups
            },
        )
        async with step(Step.PREPARE_INTENT, request.uid):
            await self._write(record, seen, create=seen.record is None)
        try:
            made = await self._make_overlays(effect, seen, record)
            async with step(Step.PREPARE_RESERVE, request.uid):
                memory.prepared = replace(await self._reserve(effect, record, request), overlays=made)
        except (DriverError, HypervisorError) as error:
            memory.outcome = WindowOutcome(
                attempt=effect.attempt,
                evidence=Evidence(method=effect.plan.quiesce.method),
                groups={c: GroupOutcome(class_name=c) for c in effect.requests},
                free=True,
                interrupted=error.retryable,
                reason=error.reason,
                message=error.message,
            )
            if error.retryable:
                memory.failures = max(memory.failures, effect.attempt)  # each try waits longer than the one before
                raise

    async def _make_overlays(self, effect: Prepare, seen: Observation, record: Record) -> Mapping[VolumeId, str]:
        if not effect.plan.quiesce.overlay_pool:
            return {}
        client, ref = await locate(self._world, seen.request, record)
        return await overlays.make(client, ref, effect.plan, self._world.installation, seen.request.uid, effect.attempt)

    async def _collapse(self, journal: Journal, seen: Observation, body: Mapping[str, Any]) -> None:
        """Commit the overlays; what can never be committed is kept, told once, and written down."""
        memory, live = self._memory(seen), self._world.hypervisors.get(seen.request.hypervisor)
        client, ref = await locate(self._world, seen.request, seen.record)

        def told(rulings: tuple[Ruling, ...]) -> None:
            memory.committed = {r.target: (r.done, r.total) for r in rulings if r.total}

        try:
            rulings = await overlays.collapse(client, ref, journal, live.overlay if live is not None else None, told)
        finally:
            memory.committed = {}
        for ruling in rulings:
            if ruling.move is Move.KEEP:
                message = f"overlay {ruling.overlay} is kept, and so is its base: {ruling.why}"
                log.error("VMSnapshot %s: %s", seen.request.uid, message)
                self._world.kept[ruling.overlay] = ruling.why
                await self._world.events.emit(body, "Warning", "OverlayKept", message)

    async def _reserve(self, effect: Prepare, record: Record, order: Request) -> Prepared:
        """Take a driver process for each group and let it do what is slow.

        The classes come in the order of their names: two snapshots that each held what the other needs would wait for ever.
        """
        stack = AsyncExitStack()
        slots: dict[str, Slot] = {}
        try:
            for name in sorted(effect.requests):
                # As recorded: a class that was edited since would cut elsewhere than where it is looked for.
                host = await self._world.classes.host_of_record(record.groups[name])
                slots[name] = await stack.enter_async_context(host.reserve(timeout=RESERVE_TIMEOUT))
            async with asyncio.TaskGroup() as tasks:
                for name, request in effect.requests.items():
                    tasks.create_task(self._let_prepare(slots[name], request, name, order.uid))
            # Of a VM that is off the driver itself copies.
            by_hypervisor = effect.plan.power != PowerState.SHUT_OFF
            since = increments.Since()
            if by_hypervisor:
                since = await increments.prepare(self._world, order, record, slots, effect.requests)
            targets = {
                g.class_name: await slots[g.class_name].targets(effect.requests[g.class_name])
                for g in effect.plan.groups
                if by_hypervisor and g.capabilities.cut is CutKind.HYPERVISOR
            }
        except BaseException as error:
            await undisturbed(stack.aclose())
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from error
            raise
        return Prepared(
            attempt=effect.attempt,
            slots=slots,
            stack=stack,
            targets=targets,
            since=since.checkpoints,
            told=since.told,
        )

    async def _let_prepare(self, slot: Slot, request: SnapshotRequest, class_name: str, uid: str) -> None:
        try:
            async with step(Step.PREPARE_DRIVER, uid, class_name):
                if not self._world.leadership.is_leader():
                    # It may have been waited for a process for long: a successor's attempt must not lose its volumes to this one.
                    raise NotPermittedError("not prepared: another instance may have taken over")
                await slot.prepare(request)
        except DriverError as error:
            disks = ", ".join(v.label for v in request.volumes)
            raise DriverError(
                f"disk {disks}: {error.message}", reason=error.reason, retryable=error.retryable
            ) from error

    def _host(self, name: str) -> DriverHost:
        host = self._world.classes.host(name)
        if host is None:
            raise DriverUnavailableError(f'class "{name}": its driver is not running')
        return host

    async def _window(self, effect: TakeWindow, seen: Observation) -> None:
        memory = self._memory(seen)
        prepared = memory.prepared
        if prepared is None:
            return
        memory.prepared = None  # whatever happens now, this attempt is never tried again
        async with prepared.stack:
            client, ref = await locate(self._world, seen.request, seen.record)
            outcome = await window.run(self._world, effect, seen.request.uid, ref, client, prepared)
        memory.outcome = outcome
        begun = [g.bracket.start for c, g in outcome.groups.items() if c in prepared.targets and g.bracket is not None]
        memory.listening = Listening(effect.attempt, min(begun), ref.endpoint) if begun else None
        if outcome.fallback:
            memory.agent_failed = outcome.message
        self._measure(outcome, seen)

    def _measure(self, outcome: WindowOutcome, seen: Observation) -> None:
        metrics = self._world.metrics
        if outcome.free:
            self._measure_hold(outcome.evidence, seen)
        else:
            metrics.thaw_failed(hypervisor=seen.request.hypervisor)
        drivers = {g.class_name: g.driver for g in seen.plan.groups} if seen.plan is not None else {}
        for group in outcome.groups.values():
            if group.ok and group.bracket is not None:
                took = group.bracket.end - group.bracket.start
                metrics.cut(seconds=took, driver=drivers.get(group.class_name, "unknown"))
                self._world.classes.note_cut(group.class_name, took)

    def _measure_hold(self, evidence: Evidence, seen: Observation) -> None:
        """Of a VM that is known to go on; one of which nobody can say that yet is measured when it can be said."""
        if evidence.frozen_time is not None:
            self._world.metrics.frozen(
                seconds=evidence.frozen_milliseconds / 1000,
                method=evidence.method,
                hypervisor=seen.request.hypervisor,
            )

    async def _keep(self, effect: Keep, seen: Observation, body: Mapping[str, Any]) -> None:
        assert seen.record is not None, "an attempt is kept only where its intent is on record"  # noqa: S101 - invariant of decide
        outcome = effect.outcome
        groups = {c: _with_result(g, outcome.groups[c]) for c, g in seen.record.groups.items()}
        record = replace(seen.record, groups=groups, outcome=outcome, verdicts=effect.verdicts)
        await self._write(record, seen, create=False)
        self._memory(seen).outcome = None
        word = verdict.overall(effect.verdicts).word
        self._world.metrics.snapshot(consistency=word, outcome="taken")
        held = (
            f", VM held for {outcome.evidence.frozen_milliseconds} ms" if outcome.evidence.frozen_milliseconds else ""
        )
        await self._world.events.emit(
            body,
            "Normal",
            "SnapshotTaken",
            f"{len(record.plan.volumes)} disks cut by {len(groups)} classes{held}; consistency {word}",
        )

    async def _settle(self, groups: Mapping[str, RecordedGroup], seen: Observation) -> None:
        record = seen.record
        assert record is not None, "only what is on record settles"  # noqa: S101 - invariant of decide
        await settling.settle(self._world, record, groups, seen.request)
        await increments.retire(self._world, seen.request, record)
        await self._write(replace(record, ready=True, ready_time=self._world.now()), seen, create=False)

    async def _roll_back(self, held: Mapping[str, frozenset[str]], seen: Observation) -> None:
        """Delete every name, go on after errors, and report what is left.

        Raises ConflictError if the content is not what it was decided on: somebody who took over meanwhile may have made what
        would be deleted.
        """
        await self._memory(seen).drop_prepared()
        record = seen.record
        if record is not None:
            found = await self._world.cluster.content(record.name)
            if found is None or found["metadata"]["resourceVersion"] != record.version:
                raise ConflictError(f"VMSnapshotContent {record.name} was changed since it was decided to roll back")

        if record is None or not record.foreign:
            await backups.clear_way(self._world, record, seen.request, held)
        if record is not None and not record.foreign and not record.problem:
            await increments.remove(self._world, seen.request, record, held)

        async def delete(class_name: str, name: str) -> None:
            if class_name == overlays.CLASS:
                client, ref = await locate(self._world, seen.request, record)
                pool = record.plan.quiesce.overlay_pool if record is not None else ""
                await overlays.remove(client, ref, pool, name)
                return
            trusted = record is not None and not record.problem and class_name in record.groups
            if record is not None and trusted:
                host = await self._world.classes.host_of_record(record.groups[class_name])
            else:
                host = self._host(class_name)
            async with step(Step.ROLL_BACK_DRIVER, seen.request.uid, class_name):
                await host.delete(name, timeout=DELETE_TIMEOUT)

        pairs = [(c, n) for c, group in held.items() for n in sorted(group)]
        results = await asyncio.gather(*(delete(c, n) for c, n in pairs), return_exceptions=True)
        problems = []
        for (class_name, name), result in zip(pairs, results, strict=True):
            if isinstance(result, SnapshotError):
                problems.append(f'class "{class_name}": {name}: {result.message}')
            elif isinstance(result, BaseException):
                raise result
        if problems:
            raise DriverError(
                f"still on storage, trying again: {'; '.join(problems)}", reason="StorageUnavailable", retryable=True
            )

    async def _fail(self, effect: Fail, seen: Observation, body: Mapping[str, Any]) -> None:
        assert seen.record is not None, "a failure is written where an intent is on record"  # noqa: S101 - invariant of decide
        memory = self._memory(seen)
        await memory.drop_prepared()
        outcome = memory.outcome or seen.record.outcome
        if outcome is not None and not outcome.free and seen.vm_gone:
            outcome = _freed(outcome)
        if outcome is None and seen.vm_unseen and seen.prepared != seen.record.attempt:
            # Another process may have held the VM in this attempt, and nobody can look whether it still is.
            outcome = WindowOutcome(
                attempt=seen.record.attempt,
                evidence=Evidence(method=seen.record.plan.quiesce.method),
                reason=effect.failure.reason,
                message=effect.failure.message,
            )
        record = replace(seen.record, outcome=outcome, failure=effect.failure, ready=False, ready_time=None)
        await self._write(record, seen, create=False)
        memory.outcome = memory.broken = None
        if seen.deleting:
            return  # nothing failed: what was taken is given up on request
        self._world.metrics.snapshot(consistency="Unknown", outcome="failed")
        await self._world.events.emit(body, "Warning", effect.failure.reason, effect.failure.message)

    async def _drop(self, seen: Observation, body: Mapping[str, Any]) -> None:
        """The content, and with it at once the finalizer: without a content nobody could say any more that nothing is held."""
        if seen.record is not None:
            await self._world.cluster.delete_content(seen.record.name, None)
            await self._world.cluster.remove_finalizer(body)

    async def _write(self, record: Record, seen: Observation, *, create: bool) -> None:
        body = contents.to_body(record, seen.request, self._world.installation)
        if create:
            await self._world.cluster.create_content(body)
        else:
            await self._world.cluster.replace_content(body)


def _freed(outcome: WindowOutcome) -> WindowOutcome:
    """The outcome of a window whose VM was freed later, by whoever it was: held until now, at most."""
    return replace(outcome, free=True, evidence=outcome.evidence.freed(clock(), now()))


def _with_result(group: RecordedGroup, outcome: GroupOutcome) -> RecordedGroup:
    took = round((outcome.bracket.end - outcome.bracket.start) * 1000) if outcome.bracket is not None else None
    return replace(group, result=outcome.result, cut_milliseconds=took)
