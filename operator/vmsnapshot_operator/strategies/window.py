"""The window: journal, arm, quiesce, cut all groups in parallel, free the guest, disarm. One effect, never resumed.

Nothing else happens inside: no API-server call, no look-up, no import, no spawn. Whatever fails, the VM is freed first; the
answer says what happened and leaves what follows to the next decision.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from vmsnapshot_operator.core.driver import CutResult, Hold, SnapshotRequest
from vmsnapshot_operator.core.effects import TakeWindow
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, Quiescer, Window, WindowOutcome
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Machine, not_at
from vmsnapshot_operator.core.planning import Plan
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, VolumeId, volume_id
from vmsnapshot_operator.drivers.host import Slot
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DomainGoneError,
    DriverError,
    DriverTimeoutError,
    GuardianError,
    HypervisorError,
    NotPermittedError,
    QuiesceError,
    SnapshotError,
)
from vmsnapshot_operator.hypervisors.domains import DomainWindow, Hypervisor, Ref
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink
from vmsnapshot_operator.kube.lease import Leadership
from vmsnapshot_operator.plan import disks, fingerprints
from vmsnapshot_operator.quiesce.base import Context, clock, find, undisturbed, wall
from vmsnapshot_operator.strategies.world import Prepared, World

log = logging.getLogger(__name__)

LEASE_MARGIN = Seconds(3.0)
"""So long before another one could hold the lease nothing is begun any more, and what was begun is ended: the freeze, the switch, the
cuts. It is for what is on its way: an order that its driver has, a process that is being killed."""

LEASE_AT_BEGIN = Seconds(8.0)
"""So long the lease must last when a window begins: most end within a second. Longer ones are renewed for while they last, and are
given up if that fails: a lease for the whole budget would make everybody wait for it when its holder dies."""

LEASE_LOOK = 0.25
"""How often it is looked, while cuts are under way, whether the lease still lasts."""

BEGIN_SECONDS = Seconds(5.0)
"""So long a copy by the hypervisor may take to begin: it is a fraction of a second, but libvirt waits up to 30 s where somebody else's job
(another copy, a migration) came first, and the VM would be held for that."""

UNHURRIED = Seconds(120.0)
"""So long all cuts may take while the VM runs on overlays."""


class Limit:
    """Until when this attempt may act. It is one moment for all that it does, and asked again right before each deed.

    `until`: a reading of the clock that all processes of this machine share, and that goes on while they are stopped.
    A process may be stopped between any two steps for longer than every deadline, while another one took over.
    """

    def __init__(self, leadership: Leadership, budget: float) -> None:
        self._leadership = leadership
        self.budget = budget
        self.until = Seconds(clock() + budget)
        self._over = False

    def end(self) -> None:
        """Permit nothing any more: the window was left, whatever call of it has not returned yet."""
        self._over = True

    def again(self, budget: float) -> Limit:
        """The same with another budget, from now on."""
        return Limit(self._leadership, budget)

    @property
    def remaining(self) -> Seconds:
        """Seconds that are left; never negative."""
        return Seconds(max(0.0, self.until - clock()))

    def refusal(self) -> str:
        """Why nothing may be done any more, or nothing. May be asked in any thread."""
        if self._over:
            return "the window was over before it was sent"
        if clock() >= self.until:
            return "the budget was over before it was sent"
        return self.lost()

    @property
    def order_until(self) -> Seconds:
        """The moment after which a driver that has an order already must not begin it: it does not know of renewals."""
        return Seconds(min(self.until, self._leadership.until - LEASE_MARGIN))

    def lost(self) -> str:
        """Why what is under way must be ended, whatever is left of the budget; or nothing."""
        lasts = self._leadership.is_leader(LEASE_MARGIN)
        return "" if lasts else "the lease was not renewed: another instance may take over"

    def check(self) -> None:
        """Raise NotPermittedError if nothing may be done any more."""
        if why := self.refusal():
            raise NotPermittedError(f"not cut: {why}")


class _CutFailedError(Exception):
    """One group failed: the others are not waited for."""


@dataclass(slots=True)
class _Progress:
    """What is known of the window so far, kept outside of the nesting so that every way out can tell it."""

    groups: dict[str, GroupOutcome]
    evidence: Evidence
    window: Window | None = None
    free: bool = True
    rest: bool = False
    cut_time: datetime | None = None
    reason: str = ""
    message: str = ""
    interrupted: bool = False
    fallback: bool = False

    def is_free(self) -> bool:
        """Whether the VM is confirmed free: as it was before we touched it, or by the word of who freed it."""
        return self.window.free if self.window is not None else self.free

    def has_rest(self) -> bool:
        """Whether the journal has to stay although the VM is free."""
        return self.window.rest if self.window is not None else self.rest

    def fail(self, reason: str, message: str, *, interrupted: bool = False, fallback: bool = False) -> None:
        """Note why it failed; the first reason is the true one."""
        if not self.reason:
            self.reason, self.message = reason, message
            self.interrupted, self.fallback = interrupted, fallback


async def run(
    world: World,
    effect: TakeWindow,
    uid: str,
    ref: Ref,
    client: Hypervisor,
    prepared: Prepared,
) -> WindowOutcome:
    """Take the window and tell what happened. Raises only when cancelled; the VM is then free or its journal still there."""
    plan, overlays, slots = effect.plan, prepared.overlays, prepared.slots
    # Where no freeze is sent, nothing is ever held: guardians have nothing to free then.
    holds = not overlays or plan.quiesce.expected_filesystems > 0
    progress = _Progress(
        groups={c: GroupOutcome(class_name=c) for c in effect.requests},
        evidence=Evidence(method=plan.quiesce.method),
    )
    journal = Journal(
        installation=world.installation,
        owner_uid=uid,
        nonce=secrets.token_hex(16),
        attempt=effect.attempt,
        method=plan.quiesce.method,
        budget=plan.quiesce.budget,
        members=tuple(v.volume.id for v in plan.volumes),
        overlays={str(v): path for v, path in overlays.items()},
        run_id=plan.run_id if overlays else -1,
        phase=Phase.HOLDING if holds else Phase.OVERLAID,
    )
    factory = find(plan.quiesce.method)
    if dead := [name for name, slot in slots.items() if not slot.alive]:
        progress.fail(
            "DriverCrashed", f"the driver process of class {', '.join(dead)} ended after prepare", interrupted=True
        )
        return await _tell(effect, progress, ref, client, plan)
    try:
        job = await _prepare_job(client, ref, effect.requests, prepared)
        held = plan.quiesce.holds_vm and journal.holds  # else nothing is, however long the VM is looked at
        told = world.metrics.window(lambda: held and not progress.is_free(), hypervisor=client.name)
        async with _held(world, plan, journal, ref, client, progress) as limit:
            quiescer = factory(
                Context(hypervisor=client, ref=ref, plan=plan, permit=limit.refusal, remaining=lambda: limit.remaining)
            )
            with told:
                await _still(quiescer, journal, _Cuts(effect.requests, slots, job), progress, limit)
    except QuiesceError as error:
        progress.fail(error.reason, error.message, fallback=error.fallback, interrupted=not error.fallback)
    except (GuardianError, HypervisorError, NotPermittedError) as error:
        progress.fail(error.reason, error.message, interrupted=True)
    return await _tell(effect, progress, ref, client, plan)


@asynccontextmanager
async def _held(
    world: World, plan: Plan, journal: Journal, ref: Ref, client: Hypervisor, progress: _Progress
) -> AsyncIterator[Limit]:
    """Lease, journal and guardian around the window; the journal goes only when the VM is confirmed free."""
    async with world.leadership.outlasting(LEASE_AT_BEGIN) as leading:
        if not leading:
            raise GuardianError(
                "the lease does not last for a window: another instance may take over", reason="NotLeader"
            )
        # Counted from before the journal: the guardian's own timer starts when it sees it, and ours must not end later.
        limit = Limit(world.leadership, plan.quiesce.budget)
        if not plan.quiesce.holds_vm:
            try:
                yield limit
            finally:
                limit.end()
            return
        guardian = _guardian(world)
        try:
            async with step(Step.WINDOW_JOURNAL, journal.owner_uid):
                await client.write_journal(ref, journal, limit.refusal)
            if journal.holds:
                async with step(Step.WINDOW_ARM, journal.owner_uid):
                    await guardian.arm(client.uri(ref), ref.uuid, journal.nonce, client.uris)
            yield limit
        finally:
            limit.end()
            if progress.is_free():
                client.freed(journal.nonce)
                await undisturbed(_unhold(guardian, journal, ref, client, rest=progress.has_rest()))
            else:
                log.error("domain %s is not confirmed free: its journal and the guardian stay", ref.name)


def _guardian(world: World) -> GuardianLink:
    if world.guardian is None:
        raise GuardianError("no guardian is configured (--guardian-socket): nobody freezes without one")
    return world.guardian


async def _unhold(guardian: GuardianLink, journal: Journal, ref: Ref, client: Hypervisor, *, rest: bool) -> None:
    async with step(Step.WINDOW_DISARM, journal.owner_uid):
        await guardian.disarm(journal.nonce, late=client.order_may_come(ref))
    if rest:
        return  # the journal tells what is left to be done
    try:
        async with step(Step.WINDOW_CLEAR, journal.owner_uid):
            await client.clear_journal(ref, journal.nonce)
    except DomainGoneError:
        pass  # its metadata went with it
    except HypervisorError as error:
        log.warning("the journal of domain %s stays until the next sweep: %s", ref.name, error.message)


@dataclass(frozen=True, slots=True)
class _Job:
    """The one copy that the hypervisor makes for all classes of `targets`, described beforehand."""

    domain: DomainWindow
    described: str
    targets: Mapping[str, Mapping[VolumeId, Layer]]
    told: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What is cut, by class: by its driver in its process, or by the hypervisor."""

    requests: Mapping[str, SnapshotRequest]
    slots: Mapping[str, Slot]
    job: _Job | None


async def _prepare_job(
    client: Hypervisor,
    ref: Ref,
    requests: Mapping[str, SnapshotRequest],
    prepared: Prepared,
) -> _Job | None:
    """Look up and describe what the hypervisor is to copy, before anything is held."""
    targets = prepared.targets
    if not targets:
        return None
    domain = await client.window(ref)
    files = {v.label: targets[c][v.id] for c in targets for v in requests[c].volumes}
    planned = {v.label: v.id for c in targets for v in requests[c].volumes}
    described = await domain.prepare_backup(files, planned, prepared.since)
    return _Job(domain, described, targets, prepared.told)


async def _still(
    quiescer: Quiescer,
    journal: Journal,
    cuts: _Cuts,
    progress: _Progress,
    limit: Limit,
) -> None:
    progress.free = False  # until the quiescer says otherwise
    try:
        async with quiescer.still(journal) as window:
            progress.window = window
            # Disks that stand still while the VM runs need no hurry.
            here = limit.again(UNHURRIED) if window.rest else limit
            await _cut_all(journal, cuts, progress, here)
    except QuiesceError as error:
        progress.free, progress.rest = error.free, error.rest
        if isinstance(error.evidence, Evidence):
            progress.evidence = error.evidence
        raise
    except SnapshotError:
        progress.free = True  # nothing was sent; where a window was opened, that one tells
        raise


async def _cut_all(
    journal: Journal,
    todo: _Cuts,
    progress: _Progress,
    limit: Limit,
) -> None:
    requests = todo.requests
    remaining = limit.remaining
    progress.cut_time = wall()
    try:
        async with asyncio.timeout(remaining):
            try:
                async with asyncio.TaskGroup() as cuts:
                    tasks = [
                        cuts.create_task(_cut(request, name, todo.slots[name], progress, journal.owner_uid, limit))
                        for name, request in requests.items()
                        if todo.job is None or name not in todo.job.targets
                    ]
                    if todo.job is not None:
                        begun = _begin(todo.job, requests, progress, journal.owner_uid, limit)
                        tasks.append(cuts.create_task(begun))
                    await _fence(tasks, progress, limit)
            except* _CutFailedError:
                pass  # each group has told its own failure
    except TimeoutError:
        late = [f'class "{c}", disk {_disks(requests[c])}' for c, g in progress.groups.items() if not g.ok]
        progress.fail(
            "FrozenTooLong",
            f"not cut within the budget of {limit.budget:g} s, so the VM was freed first: {'; '.join(late)}",
        )


async def _fence(tasks: Collection[asyncio.Task[None]], progress: _Progress, limit: Limit) -> None:
    """Wait for the cuts; end them by raising _CutFailedError once another instance may be about to begin."""
    while (await asyncio.wait(tasks, timeout=LEASE_LOOK))[1]:
        if why := limit.lost():
            progress.fail("NotLeader", f"the cuts were ended: {why}", interrupted=True)
            raise _CutFailedError


def _disks(request: SnapshotRequest) -> str:
    return ", ".join(v.label for v in request.volumes)


async def _cut(request: SnapshotRequest, name: str, slot: Slot, progress: _Progress, uid: str, limit: Limit) -> None:
    start = clock()
    try:
        async with step(Step.WINDOW_CUT, uid, name):
            limit.check()
            result = await slot.cut(replace(request, timeout=limit.remaining), until=limit.order_until)
    except NotPermittedError as error:
        progress.groups[name] = GroupOutcome(class_name=name, reason=error.reason, message=error.message)
        progress.fail(error.reason, error.message, interrupted=True)
        raise _CutFailedError from error
    except DriverError as error:
        message = f"disk {_disks(request)}: {error.message}"
        # Its deadline is the window's: which of the two is noticed first must not decide what is told.
        late = isinstance(error, DriverTimeoutError) and limit.remaining <= 0
        reason = "FrozenTooLong" if late else error.reason
        progress.groups[name] = GroupOutcome(class_name=name, reason=reason, message=message)
        progress.fail(reason, message)
        raise _CutFailedError from error
    bracket = Bracket(start=start, end=clock())
    progress.groups[name] = GroupOutcome(class_name=name, bracket=bracket, result=result)


async def _begin(
    job: _Job, requests: Mapping[str, SnapshotRequest], progress: _Progress, uid: str, limit: Limit
) -> None:
    """Have the hypervisor begin its copy: one instant of all disks of all classes that it copies for."""
    start = clock()
    try:
        async with step(Step.WINDOW_BEGIN, uid):
            patience = min(limit.remaining, BEGIN_SECONDS)
            await job.domain.begin_backup(job.described, timeout=patience, permit=limit.refusal)
    except HypervisorError as error:
        # Another program may have been faster; or nobody knows whether it has begun. Either way another attempt may do.
        late = isinstance(error, CallTimeoutError) and limit.remaining <= 0  # as where a driver is late
        reason = "FrozenTooLong" if late else "BackupFailed"
        message = f"disk {', '.join(_disks(requests[c]) for c in job.targets)}: {error.message}"
        for name in job.targets:
            progress.groups[name] = GroupOutcome(class_name=name, reason=reason, message=message)
        progress.fail(reason, message, interrupted=not late)
        raise _CutFailedError from error
    except NotPermittedError as error:
        progress.fail(error.reason, error.message, interrupted=True)
        raise _CutFailedError from error
    bracket = Bracket(start=start, end=clock())
    for name, layers in job.targets.items():
        handles = {v: Handle(layer.source) for v, layer in layers.items()}
        result = CutResult(handles=handles, atomic=True, hold=Hold.JOB)
        said = job.told.get(name, "")
        progress.groups[name] = GroupOutcome(class_name=name, bracket=bracket, result=result, message=said)


async def _tell(effect: TakeWindow, progress: _Progress, ref: Ref, client: Hypervisor, plan: Plan) -> WindowOutcome:
    evidence = progress.window.evidence if progress.window is not None else progress.evidence
    if progress.window is not None:
        after = await _afterwards(ref, client)
        same = after is not None and _same(plan, after, overlaid=progress.has_rest())
        unwritten = fingerprints.unwritten(plan.volumes, after.disks) if after is not None else frozenset()
        evidence = replace(evidence, same_vm=same, unwritten=unwritten)
        if after is not None and (new := disks.unplanned(plan, after.disks)):
            text = f"disk {', '.join(new)} was plugged into the VM meanwhile and is not in what was cut"
            progress.fail("DiskPlugged", text, interrupted=True)
        if (
            after is not None
            and plan.quiesce.overlay_pool
            and progress.has_rest()
            and _committed(after, effect.attempt)
        ):
            text = "the overlays were being committed before all was cut, because the VM could not write to them and stood still"
            progress.fail(
                "OverlayFull", text
            )  # as while it settles: each further attempt might have the VM stand still again
        by_job = [c for c, g in progress.groups.items() if g.result is not None and g.result.hold is Hold.JOB]
        planned = {v.label: v.id for c in by_job for v in effect.requests[c].volumes}
        if after is not None and (wrong := not_at(planned, after.disks)):
            text = f"another disk than planned is at {', '.join(wrong)} by now, or none, so nobody knows which one the hypervisor copies"
            progress.fail("DiskPlugged", text, interrupted=True)
    return WindowOutcome(
        attempt=effect.attempt,
        evidence=evidence,
        groups=dict(progress.groups),
        free=progress.is_free(),
        cut_time=progress.cut_time,
        interrupted=progress.interrupted,
        fallback=progress.fallback,
        reason=progress.reason,
        message=progress.message,
    )


def _committed(after: Machine, attempt: int) -> bool:
    """Whether the bases may have changed since the switch: a commit is written down before it begins, and the journal goes with its end."""
    journal = after.journal
    return journal is None or journal.attempt != attempt or journal.phase is Phase.COLLAPSING


async def _afterwards(ref: Ref, client: Hypervisor) -> Machine | None:
    try:
        return await client.describe(ref, ask_agent=False)
    except SnapshotError as error:
        log.warning("domain %s could not be looked at after the window: %s", ref.name, error.message)
        return None


def _same(plan: Plan, after: Machine, *, overlaid: bool) -> bool:
    """Whether it is the same run on the same host with the same disks as when it was planned."""
    # On overlays, the disks that were cut are the layers beneath.
    present = {volume_id(layer) for d in after.disks for layer in (d.layers if overlaid else d.layers[:1])}
    return (
        after.run_id == plan.run_id
        and after.endpoint == plan.endpoint
        and not after.migrating
        and all(v.volume.id in present for v in plan.volumes)
    )
