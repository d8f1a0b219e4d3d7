"""The workflow of strategy `Storage`, as one pure function: an observation in, the one next effect and the conditions out.

Not how an effect is performed (`strategies`), and not what a plan or a verdict is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import CutKind, SnapshotRequest
from vmsnapshot_operator.core.effects import (
    Adopt,
    Amend,
    Collapse,
    Decision,
    DropContent,
    Effect,
    Expire,
    Fail,
    Failure,
    Forget,
    Keep,
    Observation,
    Prepare,
    Record,
    Recover,
    RollBack,
    Settle,
    TakeWindow,
    Wait,
)
from vmsnapshot_operator.core.evidence import WindowOutcome
from vmsnapshot_operator.core.planning import Patience, Plan, Policy, Refusal
from vmsnapshot_operator.core.volumes import Consistency, Seconds
from vmsnapshot_operator.plan import collapse, conditions, verdict

SETTLE_SECONDS = Seconds(5.0)
"""Objects applied together arrive in any order: so long a refusal may still be overcome."""

MAX_ATTEMPTS = 5
"""So often a VM is made to stand still in vain. What comes to nothing before that is tried until the deadline."""
PREPARE_TIMEOUT = Seconds(60.0)
_SOON = Seconds(1.0)
_LATER = Seconds(5.0)
_MUCH_LATER = Seconds(30.0)


def decide(seen: Observation, now: datetime, *, installation: str) -> Decision:
    """Return the next effect. Freeing the VM wins over everything; deletion over everything else."""
    if seen.journal is not None and seen.journal.holds:
        return _say(seen, Recover(seen.journal), "Recovering", "freeing the VM after an interrupted window")
    if seen.journal_problem:
        return _say(
            seen, Wait(_SOON), "HypervisorUnreachable", f"cannot see whether the VM is free: {seen.journal_problem}"
        )
    if not seen.leader:
        return _say(seen, Wait(_SOON), "NotLeader", "another instance of the operator holds the lease")
    if seen.retry_in > 0:
        return _say(seen, Wait(max(Seconds(0.05), seen.retry_in)), "Retrying", seen.trouble)
    if (made := _overlays(seen)) is not None:
        return made
    if seen.deleting:
        return _delete(seen)
    if seen.request.dry_run:
        return _dry_run(seen, now)
    record = seen.record
    if record is None:
        return _begin(seen, now, installation)
    if not seen.finalizer and not record.foreign:
        return _say(seen, Adopt(), "Preparing", "our finalizer was removed while something is held: putting it back")
    if record.problem:
        return Decision(
            effect=Wait(),
            conditions=conditions.refused(seen, Failure(reason="ContentNotBound", message=record.problem)),
        )
    if record.failure is not None:
        return _failed(seen, record, record.failure, now)
    if record.taken:
        return _taken(seen, record, now)
    return _attempt(seen, record, now, installation)


def _overlays(seen: Observation) -> Decision | None:
    """Bring the VM back onto its own disks as soon as nobody needs them to stand still, if anything can be done about it now."""
    record = seen.record
    if seen.journal is None or _base_is_needed(seen) or not collapse.actionable(seen.overlays):
        return None
    effect, why = Collapse(seen.journal), seen.trouble or collapse.told(seen.overlays)
    if record is not None and record.failure is not None and not seen.deleting:
        return Decision(effect=effect, conditions=conditions.failed(seen, record, record.failure, "Collapsing", why))
    if record is not None and record.ready and not seen.deleting:
        return Decision(effect=effect, conditions=conditions.ready(seen, record, "Collapsing", why))
    return _say(seen, effect, "Collapsing", why)


def _base_is_needed(seen: Observation) -> bool:
    """Whether the bases have to stand still for longer: what was cut is not on record, or not whole without them yet."""
    record = seen.record
    if record is None or seen.deleting or record.failure is not None:
        return False
    if record.outcome is None:
        outcome = seen.outcome
        return outcome is not None and outcome.attempt == record.attempt and outcome.ok and seen.broken is None
    return record.needs_base and not record.ready and seen.broken is None


def _in_the_way(seen: Observation) -> str:
    """Why the VM is still on overlays, or nothing."""
    return collapse.told(seen.overlays) or "the VM is on overlays of this snapshot" if seen.journal is not None else ""


def deadline(seen: Observation) -> datetime:
    """When the point in time must exist."""
    return seen.request.created + timedelta(seconds=seen.request.deadline_seconds)


def requests_for(plan: Plan, installation: str, uid: str, attempt: int) -> Mapping[str, SnapshotRequest]:
    """Return the drivers' orders of one attempt, by class: deterministic, so that any process finds their results."""
    return {
        g.class_name: SnapshotRequest(
            name=names.request_name(installation, uid, attempt, g.class_name, (v.id for v in g.volumes)),
            volumes=g.volumes,
            timeout=PREPARE_TIMEOUT,
        )
        for g in plan.groups
    }


def _say(seen: Observation, effect: Effect, reason: str, message: str = "") -> Decision:
    return Decision(effect=effect, conditions=conditions.in_progress(seen, reason, message))


def _dry_run(seen: Observation, now: datetime) -> Decision:
    if seen.refused is not None:
        return Decision(effect=_until_expiry(seen, now), conditions=conditions.refused(seen, seen.refused))
    if seen.refusal is not None:
        return _refuse(seen, seen.refusal, now)
    if seen.plan is None and (waiting := _not_now(seen)) is not None:
        return waiting
    return Decision(effect=_until_expiry(seen, now), conditions=conditions.dry_run(seen))


def _begin(seen: Observation, now: datetime, installation: str) -> Decision:
    if seen.refused is not None:
        return Decision(effect=_until_expiry(seen, now), conditions=conditions.refused(seen, seen.refused))
    if seen.lost:
        return Decision(effect=Wait(), conditions=conditions.lost(seen))
    if now > deadline(seen):
        why = f"; last: {seen.refusal.message}" if seen.refusal is not None else ""
        failure = Failure(
            reason="DeadlineExceeded",
            message=f"no snapshot was taken within spec.deadlineSeconds ({seen.request.deadline_seconds} s){why}",
        )
        return Decision(effect=Wait(), conditions=conditions.refused(seen, failure))
    if seen.refusal is not None:
        return _refuse(seen, seen.refusal, now)
    if (waiting := _not_now(seen)) is not None:
        return waiting
    if not seen.finalizer:
        return _say(seen, Adopt(), "Preparing")
    return _prepare(seen, 1, installation)


def _refuse(seen: Observation, refusal: Refusal, now: datetime) -> Decision:
    """Tell a refusal: as final once its patience is over."""
    if refusal.patience is Patience.WAIT and now <= deadline(seen):
        return Decision(effect=Wait(_SOON), conditions=conditions.waiting(seen, refusal))
    if refusal.patience is Patience.SETTLE and seen.known_for < SETTLE_SECONDS:
        return Decision(effect=Wait(_SOON), conditions=conditions.waiting(seen, refusal))
    return Decision(
        effect=Wait(),
        conditions=conditions.refused(seen, Failure(reason=refusal.reason, message=refusal.message)),
    )


def _not_now(seen: Observation) -> Decision | None:
    """Say what has to be waited for before anything may begin."""
    if why := _in_the_way(seen):
        return _say(seen, Wait(_LATER), "OverlayInUse", why)
    if seen.in_use_by:
        return _say(seen, Wait(_SOON), "VMBusy", seen.in_use_by)
    if seen.plan is None:
        return _say(seen, Wait(_SOON), "Planning", seen.trouble)
    if seen.plan.quiesce.holds_vm and seen.guardian is not None and not seen.guardian.ok:
        return _say(seen, Wait(_SOON), seen.guardian.reason, seen.guardian.message)
    return None


def _prepare(seen: Observation, attempt: int, installation: str) -> Decision:
    assert seen.plan is not None, "_not_now waits for a plan"  # noqa: S101 - for the type checker
    requests = requests_for(seen.plan, installation, seen.request.uid, attempt)
    return _say(seen, Prepare(attempt, seen.plan, requests), "Preparing", f"attempt {attempt}")


def _attempt(seen: Observation, record: Record, now: datetime, installation: str) -> Decision:
    """An attempt was written down and has no result on record."""
    outcome = seen.outcome if seen.outcome is not None and seen.outcome.attempt == record.attempt else None
    if outcome is not None and outcome.ok:
        return _keep(seen, record, outcome)
    if outcome is not None and not _try_again(seen, outcome):
        return _fail(seen, outcome.reason or "CutFailed", outcome.message)
    if seen.broken is not None:
        return _fail(seen, seen.broken.reason, seen.broken.message)
    if now > deadline(seen):
        last = (
            outcome.message if outcome is not None else seen.trouble or (seen.refusal.message if seen.refusal else "")
        )
        message = f"no snapshot was taken within spec.deadlineSeconds ({seen.request.deadline_seconds} s)"
        return _fail(seen, "DeadlineExceeded", f"{message}; last: {last}" if last else message)
    if outcome is None and seen.prepared == record.attempt:
        return _window(seen, record, now, installation)
    return _again(seen, record, outcome, now, installation)


def _keep(seen: Observation, record: Record, outcome: WindowOutcome) -> Decision:
    verdicts = verdict.judge(record.plan, outcome)
    least = verdict.overall(verdicts)
    if seen.request.policy is Policy.REQUIRE and least < Consistency.FILESYSTEM:
        worst = next(p for p in record.plan.volumes if verdicts[p.volume.id].consistency == least)
        return _fail(
            seen,
            "PolicyNotMet",
            f"policy Require needs Filesystem, but disk {worst.target} is {least.word}: {verdicts[worst.volume.id].why}",
        )
    return _say(seen, Keep(outcome, verdicts), "Recording")


def _try_again(seen: Observation, outcome: WindowOutcome) -> bool:
    return outcome.interrupted or (outcome.fallback and seen.request.policy is Policy.PREFER)


def _again(
    seen: Observation, record: Record, outcome: WindowOutcome | None, now: datetime, installation: str
) -> Decision:
    """The attempt came to nothing: remove what it left, then try a new one under new names."""
    why = outcome.message if outcome is not None else f"attempt {record.attempt} was interrupted"
    if (left := _roll_back(seen, why, upto=record.attempt)) is not None:
        return left
    if record.attempt >= (names.MAX_ATTEMPT if _untouched(outcome) else MAX_ATTEMPTS):
        reason = outcome.reason if outcome is not None and outcome.reason else "Interrupted"
        return _fail(seen, reason, f"given up after {record.attempt} attempts; last: {why}")
    if seen.refusal is not None:
        return _refuse_later(seen, seen.refusal, now)
    return _not_now(seen) or _prepare(seen, record.attempt + 1, installation)


def _untouched(outcome: WindowOutcome | None) -> bool:
    """Whether the attempt is known to have ended before the VM was asked to stand still."""
    return outcome is not None and outcome.interrupted and outcome.evidence.frozen_time is None


def _refuse_later(seen: Observation, refusal: Refusal, now: datetime) -> Decision:
    """A refusal after the first attempt: it is written down, since objects of ours exist already."""
    told = _refuse(seen, refusal, now)
    if isinstance(told.effect, Wait) and told.effect.seconds is None:
        return _fail(seen, refusal.reason, refusal.message)
    return told


def _window(seen: Observation, record: Record, now: datetime, installation: str) -> Decision:
    if seen.refusal is not None:
        return _refuse_later(seen, seen.refusal, now)
    if (waiting := _not_now(seen)) is not None:
        return waiting
    assert seen.plan is not None, "_not_now waits for a plan"  # noqa: S101 - for the type checker
    if not _same_terms(seen.plan, record.plan):
        # What was prepared is another snapshot than the one that would be judged: it is given up as a whole.
        return _again(seen, record, None, now, installation)
    requests = requests_for(seen.plan, installation, seen.request.uid, record.attempt)
    return _say(seen, TakeWindow(record.attempt, seen.plan, requests), "Taking")


def _same_terms(now: Plan, then: Plan) -> bool:
    """Whether the verdict that was planned for is still the one that can be reached: the same disks, file systems and way."""
    return (
        now.membership == then.membership
        and now.power == then.power
        and now.quiesce.method == then.quiesce.method
        and now.quiesce.expected_filesystems == then.quiesce.expected_filesystems
        and {v.volume.id: v.covered for v in now.volumes} == {v.volume.id: v.covered for v in then.volumes}
    )


def _fail(seen: Observation, reason: str, message: str) -> Decision:
    return _say(seen, Fail(Failure(reason=reason, message=message)), "RollingBack", message)


def _failed(seen: Observation, record: Record, failure: Failure, now: datetime) -> Decision:
    """The failure is on record: remove what is left, then stay so for good."""
    if seen.held and any(seen.held.values()):
        return Decision(effect=_names(seen), conditions=conditions.failed(seen, record, failure, "RollingBack"))
    if (why := _in_the_way(seen)) != "":
        told = conditions.failed(seen, record, failure, "OverlayInUse", why)
        return Decision(effect=Wait(_LATER), conditions=told)
    if record.overlaid:
        return _say(seen, Amend(collapsed=True), "RollingBack")
    if seen.unlisted or seen.held is None:
        return Decision(effect=Wait(_MUCH_LATER), conditions=conditions.failed(seen, record, failure))
    return Decision(effect=_until_expiry(seen, now), conditions=conditions.failed(seen, record, failure))


def _taken(seen: Observation, record: Record, now: datetime) -> Decision:
    if record.retain != seen.request.retain:
        return _say(seen, Amend(), "Recording")
    if record.ready and (why := _in_the_way(seen)) != "":
        return Decision(effect=Wait(_LATER), conditions=conditions.ready(seen, record, "OverlayInUse", why))
    if record.overlaid and seen.journal is None and (record.ready or not record.needs_base):
        return _say(seen, Amend(collapsed=True), "Collapsing")
    if record.ready:
        return Decision(effect=_until_expiry(seen, now), conditions=conditions.ready(seen, record))
    if seen.broken is not None:
        return _fail(seen, seen.broken.reason, seen.broken.message)
    if record.overlaid and record.needs_base and seen.journal is None:
        return _fail(
            seen,
            "OverlayLost",
            "the VM's metadata says no more that it is on overlays: whether the disks stood still while they were copied is not known",
        )
    if now > seen.request.created + timedelta(seconds=seen.request.ready_deadline_seconds):
        return _fail(
            seen,
            "ReadyDeadlineExceeded",
            f"it could not be restored within spec.readyDeadlineSeconds ({seen.request.ready_deadline_seconds} s)",
        )
    at_once = all(g.capabilities.cut is CutKind.INSTANT for g in record.plan.groups)
    return _say(seen, Settle(record.groups, at_once), "Settling")


def _delete(seen: Observation) -> Decision:
    record = seen.record
    if not seen.finalizer:
        return _say(seen, Wait(), "Deleting")
    if seen.restored_by and record is not None and record.ready:
        return _say(
            seen, Wait(_LATER), "InUseByRestore", f"VMRestore {seen.restored_by} restores from it: waiting for its end"
        )
    if record is not None and seen.request.retain and (record.taken or record.problem):
        if not record.retain and not record.problem:
            return _say(seen, Amend(), "Deleting")
        return _say(seen, Forget(), "Deleting", "deletionPolicy Retain: the VMSnapshotContent and the storage keep it")
    if (left := _roll_back(seen, "")) is not None:
        if isinstance(left.effect, RollBack) and record is not None and record.taken:
            # Written down first: once a part of it is gone, a deletionPolicy that is changed now can keep the rest no more.
            return _say(seen, Fail(Failure(reason="Deleting", message="what it holds is being deleted")), "Deleting")
        return left
    if why := _in_the_way(seen):
        return _say(seen, Wait(_LATER), "OverlayInUse", why)
    if record is not None and not record.foreign:
        return _say(seen, DropContent(), "Deleting")
    return _say(seen, Forget(), "Deleting")


def _roll_back(seen: Observation, why: str, upto: int | None = None) -> Decision | None:
    """Remove what the storage systems hold under our names, or None when they confirmed that it is nothing.

    `upto`: of this attempt and earlier ones. Later ones were made by somebody who took over meanwhile.
    """
    word = "Deleting" if seen.deleting else "RollingBack"
    if (found := _names(seen, upto)).names:
        return _say(seen, found, word, seen.trouble or why)
    if seen.unlisted:
        silent = "; ".join(f'class "{c}": {m}' for c, m in sorted(seen.unlisted.items()))
        return _say(
            seen,
            Wait(_LATER),
            "StorageUnavailable",
            f"cannot ask the storage what it still holds, trying again: {silent}",
        )
    if seen.held is None:
        return _say(seen, Wait(_SOON), word, why)
    return None


def _names(seen: Observation, upto: int | None = None) -> RollBack:
    chosen = {
        c: frozenset(n for n in held if upto is None or (names.attempt_of(n) or 0) <= upto)
        for c, held in sorted((seen.held or {}).items())
    }
    return RollBack({c: n for c, n in chosen.items() if n})


def _until_expiry(seen: Observation, now: datetime) -> Effect:
    if seen.request.ttl_seconds is None:
        return Wait()
    record = seen.record
    start = record.outcome.evidence.thawed_time if record is not None and record.outcome is not None else None
    end = (start or seen.request.created) + timedelta(seconds=seen.request.ttl_seconds)
    return Expire() if now >= end else Wait(Seconds((end - now).total_seconds()))
