"""What a sweep does about a VM whose metadata bears a journal: free it, or leave it, and why. Pure.

Not how a VM is freed (`quiesce`), nor what becomes of what its attempt cut (`plan.orphans`): freed first, judged later.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.volumes import Seconds

OVERDUE = Seconds(5.0)
"""So long after its budget a journal has no living owner any more, whoever seems to be one."""

SETTLED = Seconds(30.0)
"""So long a VMSnapshot may not have been read yet after a start; overlays have no hurry."""

_NEVER = Seconds(0.0)


class Action(StrEnum):
    """What is done about one journal."""

    FREE = "Free"
    COLLAPSE = "Collapse"
    WAIT = "Wait"
    LEAVE = "Leave"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One domain that bears a journal, as this process sees it.

    `journal` is None if it cannot be read, for the reason in `problem`. `owner`: the VMSnapshot that this process works on
    this VM for until its point in time is taken, or empty: somebody of this process may commit its overlays all the same. `leader`: whether
    this instance holds the lease. `seen_for`: how long this process has seen this very journal (its nonce), by a clock that is never set.
    `known`: its VMSnapshot and its content exist, as far as this process knows. `stalled`: the VM stands still, as far as its host
    knows because it cannot write to its overlays.
    """

    journal: Journal | None
    problem: str = ""
    installation: str
    owner: str = ""
    leader: bool = False
    known: bool = True
    seen_for: Seconds = _NEVER
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Ruling:
    """`action`, and why in one sentence without a subject, for people."""

    action: Action
    why: str


def judge(found: Found) -> Ruling:
    """Return what to do. An early thaw harms a snapshot and no VM: in doubt about the owner's life, our own are freed."""
    journal = found.journal
    if journal is None:
        return Ruling(
            Action.LEAVE,
            f"{found.problem}; whoever wrote it may hold the VM, so it is not touched and no snapshot of it begins",
        )
    if journal.installation != found.installation:
        return Ruling(
            Action.LEAVE, f"held by another installation ({journal.installation}), which frees it itself; not touched"
        )
    if not journal.holds:
        if found.stalled and _nobody_commits(found, journal):
            why = f"standing still on overlays of attempt {journal.attempt} of VMSnapshot {journal.owner_uid}, to which it cannot write"
            return Ruling(Action.COLLAPSE, why)
        if found.known or not found.leader:
            return Ruling(Action.WAIT, "the VM goes on, on overlays of its snapshot, which are committed by and by")
        if found.seen_for < SETTLED:
            return Ruling(Action.WAIT, "the VM is on overlays of a snapshot that is not known (yet)")
        return Ruling(
            Action.COLLAPSE,
            f"on overlays of attempt {journal.attempt} of VMSnapshot {journal.owner_uid}, which is gone, or what was on record of it",
        )
    if found.seen_for > journal.budget + OVERDUE:
        return Ruling(
            Action.FREE, f"held for longer than the {journal.budget:g} s that its attempt {journal.attempt} had"
        )
    if found.owner == journal.owner_uid:
        return Ruling(Action.WAIT, "its snapshot is being taken")
    if found.leader:
        return Ruling(
            Action.FREE, f"held by attempt {journal.attempt} of VMSnapshot {journal.owner_uid}, which is over"
        )
    return Ruling(Action.WAIT, "its snapshot may be being taken by the instance that holds the lease")


def _nobody_commits(found: Found, journal: Journal) -> bool:
    """Whether a VM that stands still has to wait for nobody else. It is worth more than its snapshot, and what is done twice is done once."""
    if not journal.bases:
        return False  # it is being switched right now; or that was not written down, and its own workflow knows
    if not found.leader:
        return found.seen_for > SETTLED
    return journal.phase is not Phase.COLLAPSING or found.owner != journal.owner_uid
