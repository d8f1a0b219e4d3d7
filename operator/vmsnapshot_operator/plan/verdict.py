"""What may be claimed of each volume, from evidence alone. Never better than the evidence."""

from __future__ import annotations

from collections.abc import Mapping

from vmsnapshot_operator.core.driver import Hold
from vmsnapshot_operator.core.effects import Verdict
from vmsnapshot_operator.core.evidence import THAW_SAID, Bracket, Evidence, WindowOutcome
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Method, Plan
from vmsnapshot_operator.core.volumes import Consistency, VolumeId


def _inside(bracket: Bracket | None, evidence: Evidence) -> bool:
    return (
        bracket is not None
        and evidence.still_from is not None
        and evidence.still_until is not None
        and evidence.still_from <= bracket.start <= bracket.end <= evidence.still_until
    )


def _broken(plan: Plan, evidence: Evidence) -> str:
    """Why the VM cannot be said to have stood still; empty if it can."""
    if evidence.still_from is None or evidence.still_until is None:
        return "nothing held the VM still"
    if evidence.freed_by_other:
        return "somebody else freed the VM before we did"
    if evidence.method == Method.GUEST_AGENT:
        return _not_frozen(plan, evidence)
    return ""


def _not_frozen(plan: Plan, evidence: Evidence) -> str:
    """Why the guest's file systems cannot be said to have been frozen all the time; empty if they can."""
    if evidence.frozen <= 0:
        return "the agent froze no file system"
    if evidence.frozen < plan.quiesce.expected_filesystems:
        return f"the agent froze {evidence.frozen} file systems of {plan.quiesce.expected_filesystems}"
    said = next((n.removeprefix(THAW_SAID) for n in evidence.notes if n.startswith(THAW_SAID)), "")
    if said and evidence.thawed != evidence.frozen:
        return f"the thaw ended with an error, so nothing shows that the file systems were frozen until then: {said}"
    if evidence.thawed != evidence.frozen:
        return f"the agent froze {evidence.frozen} file systems and our thaw found {evidence.thawed}: some were thawed early"
    return ""


def judge(plan: Plan, outcome: WindowOutcome) -> Mapping[VolumeId, Verdict]:
    """Return what is claimed of each volume of the plan, and why not more."""
    evidence = outcome.evidence
    brackets = {
        v.id: outcome.groups[g.class_name].bracket
        for g in plan.groups
        for v in g.volumes
        if g.class_name in outcome.groups
    }
    of_disks = [g for g in plan.groups if not all(v.is_nvram for v in g.volumes)]
    results = [outcome.groups[g.class_name].result for g in of_disks if g.class_name in outcome.groups]
    one_group = len(of_disks) == 1 and len(results) == 1 and results[0] is not None and results[0].atomic
    one_job = bool(results) and all(r is not None and r.hold is Hold.JOB for r in results)
    one_instant = one_group or one_job
    broken = _broken(plan, evidence)
    verdicts: dict[VolumeId, Verdict] = {}
    for planned in plan.disks:
        vid = planned.volume.id
        if planned.unsafe:
            verdicts[vid] = Verdict(consistency=Consistency.UNKNOWN, why="cache=unsafe ignores flushes")
        elif not outcome.ok or not any(r is not None and vid in r.handles for r in results):
            verdicts[vid] = Verdict(consistency=Consistency.UNKNOWN, why="it was not cut")
        elif not evidence.same_vm:
            verdicts[vid] = Verdict(consistency=Consistency.UNKNOWN, why="the VM was not the same before and after")
        elif broken or not _inside(brackets.get(vid), evidence):
            why = broken or "the cut does not lie within the time in which the VM stood still"
            verdicts[vid] = (
                Verdict(consistency=Consistency.CRASH, why=f"one atomic group; {why}")
                if one_instant
                else Verdict(consistency=Consistency.PER_VOLUME, why=why)
            )
        else:
            verdicts[vid] = _still(plan, evidence, planned.covered and vid in evidence.covered, one_instant)
    least = overall(verdicts)
    for vid in (v.volume.id for v in plan.volumes if v.volume.is_nvram):
        was_cut = any(g.result is not None and vid in g.result.handles for g in outcome.groups.values())
        inside = not broken and _inside(brackets.get(vid), evidence)
        verdicts[vid] = _of_nvram(plan, evidence, vid, least, whole=outcome.ok and was_cut, inside=inside)
    return {**verdicts, **_unproved(plan, outcome)}


def _unproved(plan: Plan, outcome: WindowOutcome) -> Mapping[VolumeId, Verdict]:
    """What of a VM that is off is copied after the window, though nothing will betray whether somebody wrote to it meanwhile."""
    if plan.power != PowerState.SHUT_OFF:
        return {}
    results = [g.result for g in outcome.groups.values() if g.result is not None]
    copied = {vid for r in results if r.hold is Hold.BASE for vid in r.handles}
    why = "it is copied after the window, and its storage does not tell whether somebody writes to it meanwhile"
    volumes = [v.volume for v in plan.volumes if v.volume.id in copied and not v.volume.writable.fingerprint]
    return {v.id: Verdict(consistency=Consistency.UNKNOWN, why=why) for v in volumes}


def _of_nvram(
    plan: Plan, evidence: Evidence, vid: VolumeId, least: Consistency, *, whole: bool, inside: bool
) -> Verdict:
    """What may be claimed of the firmware's variables beside disks of which `least` is claimed.

    A freeze of file systems keeps no guest from writing to them, nor does an overlay; nothing of them waits in the guest's memory.
    """
    if not whole:
        return Verdict(consistency=Consistency.UNKNOWN, why="it was not cut")
    if not evidence.same_vm:
        return Verdict(consistency=Consistency.UNKNOWN, why="the VM was not the same before and after")
    if inside and evidence.method not in (Method.GUEST_AGENT, Method.HYPERVISOR_SNAPSHOT):
        return _still(plan, evidence, covered=False, one_instant=False)
    if vid in evidence.unwritten:
        why = "nobody wrote to it from before the window until after it, so it is of the moment of the disks"
        return Verdict(consistency=max(least, Consistency.PER_VOLUME), why=why)
    why = "the VM may have written to it meanwhile, whose file systems alone were held: it is of a moment of its own"
    return Verdict(consistency=Consistency.PER_VOLUME, why=why)


def _still(plan: Plan, evidence: Evidence, covered: bool, one_instant: bool) -> Verdict:
    if evidence.method == Method.HYPERVISOR_SNAPSHOT:
        why = _not_frozen(plan, evidence)
        if covered and not why:
            return Verdict(
                consistency=Consistency.FILESYSTEM,
                why="its file systems were frozen while all disks were switched to overlays at once",
            )
        return Verdict(
            consistency=Consistency.CRASH,
            why=f"all disks were switched to overlays at once; {why or 'no file system of it was frozen'}",
        )
    if evidence.method == Method.GUEST_AGENT:
        if covered:
            return Verdict(consistency=Consistency.FILESYSTEM, why="its file systems were frozen during the cut")
        if one_instant:
            return Verdict(consistency=Consistency.CRASH, why="one atomic group; no file system of it was frozen")
        return Verdict(consistency=Consistency.PER_VOLUME, why="no file system of it was frozen")
    if evidence.method == Method.NONE and plan.power == PowerState.SHUT_OFF and evidence.shut_down_from_within:
        return Verdict(consistency=Consistency.FILESYSTEM, why="the VM was shut down from within and stayed off")
    if plan.power == PowerState.SHUT_OFF:
        return Verdict(consistency=Consistency.CRASH, why="the VM was off, but not known to be shut down from within")
    return Verdict(consistency=Consistency.CRASH, why="the VM stood still during all cuts")


def overall(verdicts: Mapping[VolumeId, Verdict]) -> Consistency:
    """Return the least of all volumes; Unknown for none."""
    return min((v.consistency for v in verdicts.values()), default=Consistency.UNKNOWN)
