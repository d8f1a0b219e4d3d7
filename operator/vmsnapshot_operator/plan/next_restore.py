"""The workflow of a restore, as one pure function: what was seen in, the one next effect and the conditions out.

The world is its memory: the gate in the VM's definition says that disks may be neither old nor new, the done-marker that they
are new, another mark that they went back; status says only that it ended, and that the gate was closed, in case somebody defines
the VM without it. Where the gate is closed there are three ways out: all disks set back (again, after a crash), all of them
brought to the safety snapshot, or, where none was touched, none; and while the VM runs all the same, none of them.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from vmsnapshot_operator.core.effects import Condition, Failure
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Patience
from vmsnapshot_operator.core.restoring import (
    Claim,
    Clone,
    CloseGate,
    GoBack,
    HandOver,
    LetGo,
    RemoveClones,
    Rest,
    RestoreDecision,
    RestoreEffect,
    RestoreSeen,
    Revert,
    Safety,
    Start,
    Stop,
    TakeSafety,
)
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan import restore_conditions as told

SETTLE_SECONDS = Seconds(5.0)
_SOON, _LATER = Seconds(1.0), Seconds(5.0)


def decide(seen: RestoreSeen, now: datetime) -> RestoreDecision:
    """Return the next effect. A closed gate is opened before anything else is thought of."""
    if (waiting := _not_now(seen)) is not None:
        return waiting
    if seen.problem:
        return _unseen(seen, now)
    if seen.gated:
        return _through_the_gate(seen, now)
    if seen.ended:
        return RestoreDecision(effect=_to_the_end(seen), conditions=seen.ended)
    if seen.half_done:
        return _without_its_gate(seen, now)
    if seen.deleting:
        return _delete(seen)
    if seen.is_done:
        return _after(seen, now)
    if seen.went_back:
        message = f'it was not completed; all disks are what they were at the safety snapshot "{seen.safety_name}"'
        return _fail(seen, seen.broken or Failure(reason=seen.went_back, message=message))
    if seen.broken is not None:
        return _give_up(seen, seen.broken)
    if now > deadline(seen):
        return _late(seen)
    return _begin(seen)


def _not_now(seen: RestoreSeen) -> RestoreDecision | None:
    """What has to be waited for, whatever is to be done."""
    if not seen.leader:
        return _wait(seen, _SOON, "NotLeader", "another instance of the operator holds the lease")
    if seen.retry_in > 0:
        return _wait(seen, max(Seconds(0.05), seen.retry_in), "Retrying", seen.trouble)
    return None


def _wait(seen: RestoreSeen, seconds: Seconds, reason: str, message: str) -> RestoreDecision:
    """An end that was told stays told, whatever is waited for: what has ended would be begun anew otherwise."""
    if seen.ended:
        return RestoreDecision(effect=Rest(seconds if seen.finalizer else None), conditions=seen.ended)
    return _say(seen, Rest(seconds), reason, message)


def _unseen(seen: RestoreSeen, now: datetime) -> RestoreDecision:
    """Nobody can look where the VM is. What may be half done there is waited for; what was never begun comes to its end."""
    reason = "HypervisorNotFound" if seen.no_hypervisor else seen.problem_reason
    if not _is_untouched(seen):
        message = f"{seen.problem}; this restore may have begun there, and goes on once that is mended"
        if seen.no_hypervisor:
            message = f"{seen.problem}; this restore may have begun there: create the Hypervisor again, so that it can come to its end"
        return _wait(seen, _SOON, reason, message)
    if seen.ended:
        return RestoreDecision(effect=LetGo() if seen.finalizer else Rest(), conditions=seen.ended)
    if seen.deleting:
        return _say(seen, LetGo() if seen.finalizer else Rest(), "Deleting")
    if now > deadline(seen) and not seen.begun:
        message = f"not done within spec.deadlineSeconds ({seen.request.deadline_seconds} s); last: {seen.problem}"
        return _fail(seen, Failure(reason="DeadlineExceeded", message=message))
    return _say(seen, Rest(_SOON), reason, seen.problem)


def _is_untouched(seen: RestoreSeen) -> bool:
    """Whether nothing was changed for certain, though the VM cannot be looked at.

    Only for a Hypervisor that is gone status is believed: all others are worth waiting for.
    """
    if seen.gated or seen.half_done:
        return False
    if not seen.request.in_place and seen.finalizer:
        return seen.held is not None and not seen.held
    return not seen.begun and (seen.no_hypervisor or not seen.finalizer)


def _to_the_end(seen: RestoreSeen) -> RestoreEffect:
    """An end that we told leaves nothing to do; one that somebody else wrote into the status may, and leaves nothing behind."""
    if not seen.finalizer:
        return Rest()
    if seen.request.in_place:
        return LetGo()
    if seen.held is None:
        return Rest(_LATER)  # a storage that does not answer has not said that there are none
    if not seen.held:
        return LetGo()
    return HandOver(seen.held) if seen.is_done else RemoveClones(seen.held)


def _begin(seen: RestoreSeen) -> RestoreDecision:
    """Nothing of the VM was changed yet."""
    if seen.refusal is not None:
        return _refuse(seen)
    if seen.in_use_by:
        return _say(seen, Rest(_SOON), "VMBusy", seen.in_use_by)
    if seen.plan is None:
        return _say(seen, Rest(_SOON), "Planning", seen.trouble)
    if not seen.finalizer:
        return _say(seen, Claim(), "Preparing")
    if seen.request.in_place:
        return _in_place(seen)
    return _say(seen, Clone(seen.plan.groups), "Cloning")


def deadline(seen: RestoreSeen) -> datetime:
    """When it must be done."""
    return seen.request.created + timedelta(seconds=seen.request.deadline_seconds)


def _say(seen: RestoreSeen, effect: RestoreEffect, reason: str, message: str = "") -> RestoreDecision:
    return RestoreDecision(effect=effect, conditions=told.in_progress(seen, reason, message))


def _fail(seen: RestoreSeen, failure: Failure) -> RestoreDecision:
    may_be_stopped = seen.finalizer and seen.request.in_place and seen.request.stop_running and not seen.is_done
    if may_be_stopped and seen.power is PowerState.SHUT_OFF:
        # Another process may have done it.
        was = "was shut down for this" if seen.stopped else "was shut down for this if it ran"
        text = f"{failure.message}; the VM {was} (spec.runningVM is Stop) and is off"
        failure = Failure(reason=failure.reason, message=text)
    conditions = told.failed(seen, failure)
    return RestoreDecision(effect=LetGo() if seen.finalizer else Rest(), conditions=conditions)


def _in_place(seen: RestoreSeen) -> RestoreDecision:
    """Nothing was changed yet: safety snapshot, off, gate."""
    assert seen.plan is not None, "asked before"  # noqa: S101 - for the type checker
    if seen.power is not PowerState.SHUT_OFF:
        if seen.request.safety and seen.safety is not Safety.NONE:
            # It was begun while the VM was off. Going back to it would lose what the VM has written since.
            message = (
                "the VM was started after its safety snapshot was begun, which lacks what it wrote since; nothing was changed:"
                " create another VMRestore"
            )
            return _fail(seen, Failure(reason="SafetySnapshotFailed", message=message))
        return _say(seen, Stop(), "Stopping", "spec.runningVM is Stop")
    if seen.request.safety:
        if seen.safety is Safety.NONE:
            return _say(seen, TakeSafety(), "TakingSafetySnapshot")
        if seen.safety is Safety.TAKING:
            return _say(seen, Rest(_LATER), "TakingSafetySnapshot", seen.safety_message)
        if seen.safety is Safety.FAILED:
            message = f"the safety snapshot failed, so no disk was changed: {seen.safety_message}"
            return _fail(seen, Failure(reason="SafetySnapshotFailed", message=message))
    return _say(seen, CloseGate(seen.plan.gate), "ClosingGate")


def _through_the_gate(seen: RestoreSeen, now: datetime) -> RestoreDecision:
    """The disks may be neither old nor new: forwards as long as that can help, else back; never away."""
    if not seen.finalizer and not seen.deleting:
        return _say(seen, Claim(), "Restoring", "somebody took the finalizer away; it is put on again")
    if seen.power not in (None, PowerState.SHUT_OFF):
        # Started from another definition than libvirt's own. QEMU would write on into what is replaced beneath it.
        message = (
            f"the VM is {seen.power} although its disks were taken from its definition, so none of them is touched: shut it down, then"
            " this goes on, and what it has written to them is lost; to keep that, copy it away first"
        )
        return _say(seen, Rest(_SOON), "VMRunning", message)
    back = seen.safety is Safety.READY
    if seen.broken is not None or now > deadline(seen) or (seen.plan is None and seen.refusal is not None):
        if back:
            return _say(seen, GoBack(_why(seen)), "GoingBack", _why(seen).message)
        if seen.plan is None:
            return _say(seen, Rest(_LATER), "Blocked", _what_to_do(seen))
    if seen.plan is None:
        return _say(seen, Rest(_SOON), "Planning", seen.trouble)
    return _say(seen, Revert(seen.plan.groups), "Restoring", seen.trouble)


def _without_its_gate(seen: RestoreSeen, now: datetime) -> RestoreDecision:
    """Somebody defined the VM anew while its disks were set back. Off, it is gated again and goes on; one that runs is not stopped.

    Nor is it gated again once another VMRestore's gate is there, or its end since this one began: all that was done would be undone,
    and so would what the VM wrote after it. Before it is let go, what may pass is waited for, also where the object is deleted.
    """
    off = seen.power is PowerState.SHUT_OFF
    if seen.overtaken_by:
        return _delete(seen) if seen.deleting else _fail(seen, _overtaken(seen))
    if off and seen.plan is not None:
        if not seen.finalizer and not seen.deleting:
            return _say(seen, Claim(), "Restoring", "somebody took the finalizer away; it is put on again")
        # Nothing is saved of what is half done: the safety snapshot, if one was asked for, is from before.
        return _say(seen, CloseGate(seen.plan.gate), "ClosingGate", "somebody defined the VM anew meanwhile")
    settling = seen.known_for < SETTLE_SECONDS
    # On record, and not to be seen: perhaps it is being defined anew at this moment, or its namespace gets access again.
    missing = seen.power is None and seen.record is not None
    passing = missing or settling or seen.refusal is None or seen.refusal.patience is Patience.WAIT
    if (off or missing) and passing and (settling or now <= deadline(seen)):
        if seen.refusal is None:
            return _begin(seen)
        return RestoreDecision(effect=Rest(_SOON), conditions=told.waiting(seen, seen.refusal))
    if seen.deleting:
        return _delete(seen)
    return _fail(seen, Failure(reason="HalfDone", message=_told_without_its_gate(seen)))


def _overtaken(seen: RestoreSeen) -> Failure:
    message = (
        f"somebody defined the VM anew while its disks were being set back, and VMRestore {seen.overtaken_by} has had them since: see"
        " that one for what they are; those that it leaves out may be neither old nor new"
    )
    return Failure(reason="HalfDone", message=message)


def _told_without_its_gate(seen: RestoreSeen) -> str:
    name = seen.safety_name if seen.safety is Safety.READY else seen.request.snapshot
    state = f" (it is {seen.power})" if seen.power is not None else ""
    why = f"; {seen.refusal.message}" if seen.refusal is not None else ""
    off = "leave it off" if seen.power is PowerState.SHUT_OFF else "shut it down"
    return (
        f"somebody defined the VM anew{state} while its disks were being set back, so that they may be neither old nor new: {off},"
        f' and create a VMRestore of VMSnapshot "{name}" with spec.safetySnapshot: false{why}'
    )


def _what_to_do(seen: RestoreSeen) -> str:
    """For whom the restore can neither go on nor back without a person."""
    safety = "there is no safety snapshot to go back to"
    if seen.safety is not Safety.NONE:
        safety = f'its safety snapshot "{seen.safety_name}" is not Ready: {seen.safety_message}'
    mend = "Bring the VMSnapshot and its VMSnapshotContent back from a backup of the cluster"
    if seen.record is not None and seen.refusal is not None and seen.refusal.reason == "DomainNotFound":
        mend = "Let the restore's namespace use the VM again (spec.access of the Hypervisor)"
    return (
        f"{_why(seen).message}; {safety}; the VM cannot be started meanwhile. {mend}, or give the VM its disks back by hand (chapter"
        " VMSnapshotGateLeft of docs/operations.md)"
    )


def _why(seen: RestoreSeen) -> Failure:
    if seen.broken is not None:
        return seen.broken
    if seen.refusal is not None:
        return Failure(reason=seen.refusal.reason, message=seen.refusal.message)
    why = f": {seen.trouble}" if seen.trouble else ""
    message = f"spec.deadlineSeconds ({seen.request.deadline_seconds} s) is over{why}"
    return Failure(reason="DeadlineExceeded", message=message)


def _after(seen: RestoreSeen, now: datetime) -> RestoreDecision:
    """The disks are what they were at the snapshot; the VM is defined."""
    request = seen.request
    if (own := _hand_over(seen)) is not None:
        return own
    if seen.done != seen.marker or not request.start_after:
        # Done before this object was created: nothing is done again, not even a start.
        return RestoreDecision(effect=LetGo() if seen.finalizer else Rest(), conditions=told.ready(seen))
    if not seen.started and seen.power is not PowerState.RUNNING:
        if seen.broken is not None or now > deadline(seen):
            return _fail(seen, _why(seen))
        return _say(seen, Start(), "Starting", seen.trouble)
    if seen.power is not PowerState.RUNNING:
        message = f"the disks are restored and the VM was started, but it does not run: it is {seen.power}"
        if now <= deadline(seen):
            return _say(seen, Rest(_SOON), "VMStopped", message)
        return _fail(seen, Failure(reason="VMStopped", message=message))
    if seen.agent_answers is False and now <= deadline(seen):
        return _say(seen, Rest(_SOON), "WaitingForAgent", "the VM runs; its guest's agent does not answer yet")
    if seen.agent_answers is False:
        message = "the disks are restored and the VM was started, but its guest's agent does not answer"
        return _fail(seen, Failure(reason="AgentSilent", message=message))
    return RestoreDecision(effect=LetGo() if seen.finalizer else Rest(), conditions=told.ready(seen))


def _hand_over(seen: RestoreSeen) -> RestoreDecision | None:
    """The volumes of a VM that is defined are its own, and nobody's who deletes by our names."""
    if seen.request.in_place or not seen.finalizer:
        return None
    if seen.held is None:
        return _say(seen, Rest(_LATER), "StorageUnavailable", seen.trouble or "cannot ask the storage what it holds")
    return _say(seen, HandOver(seen.held), "HandingOver", seen.trouble) if seen.held else None


def _refuse(seen: RestoreSeen) -> RestoreDecision:
    refusal = seen.refusal
    assert refusal is not None, "asked before"  # noqa: S101 - for the type checker
    if refusal.patience is Patience.WAIT or seen.known_for < SETTLE_SECONDS:
        return RestoreDecision(effect=Rest(_SOON), conditions=told.waiting(seen, refusal))
    return _give_up(seen, Failure(reason=refusal.reason, message=refusal.message))


def _late(seen: RestoreSeen) -> RestoreDecision:
    why = f"; last: {seen.refusal.message}" if seen.refusal is not None else ""
    message = f"not done within spec.deadlineSeconds ({seen.request.deadline_seconds} s){why or _last(seen)}"
    return _give_up(seen, Failure(reason="DeadlineExceeded", message=message))


def _last(seen: RestoreSeen) -> str:
    return f"; last: {seen.trouble}" if seen.trouble else ""


def _give_up(seen: RestoreSeen, failure: Failure) -> RestoreDecision:
    """Nothing of the VM was changed: remove what was made for it, then say so."""
    if (left := _clones(seen)) is not None:
        return left
    return _fail(seen, failure)


def _clones(seen: RestoreSeen) -> RestoreDecision | None:
    """Remove the volumes of a new VM that will not be, or None once the storage confirmed that there are none."""
    if seen.request.in_place or not seen.finalizer:
        return None
    if seen.held is None:
        return _say(seen, Rest(_LATER), "StorageUnavailable", seen.trouble or "cannot ask the storage what it holds")
    if seen.held:
        return _say(seen, RemoveClones(seen.held), "RollingBack", seen.trouble)
    return None


def _delete(seen: RestoreSeen) -> RestoreDecision:
    """What was done stays done: a restored disk, a new VM. What was not is taken away."""
    if not seen.finalizer:
        return _say(seen, Rest(), "Deleting")
    left = _hand_over(seen) if seen.is_done else _clones(seen)
    if left is not None:
        return left
    return _say(seen, LetGo(), "Deleting")


def conditions_of_end(conditions: tuple[Condition, ...]) -> bool:
    """Whether these conditions tell an end: Ready, or Stalled."""
    found = {c.type: c.status for c in conditions}
    return found.get(told.READY) is True or found.get(told.STALLED) is True
