"""Which faults are injected where: every fault at every step that it can meet, in an order that a seed decides.

The steps are those that the code names; how a snapshot comes to reach each of them is said here, and a step without an entry is
an error at import: no new step escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from random import Random

from tests.chaos.faults import FAULTS, At, Fault
from tests.chaos.faults.base import OFF, Place, at
from vmsnapshot_operator.core.steps import Step


class Way(StrEnum):
    """What is done so that a step is reached."""

    TAKE = "take"
    DELETE = "delete"
    DELETE_EARLY = "delete early"
    RECOVER = "recover"
    FAIL = "fail"
    EXPIRE = "expire"
    AMEND = "amend"
    OVERLAY = "overlay"
    BACKUP = "backup"
    DELETE_BACKUP = "delete a backup"
    RESTORE = "restore"
    GO_BACK = "go back"
    CLONE = "clone"
    UNDO_CLONE = "undo a clone"


RESTORING = frozenset({Way.RESTORE, Way.GO_BACK, Way.CLONE, Way.UNDO_CLONE})


WAYS: dict[Step, Way] = {
    Step.RECOVER: Way.RECOVER,
    Step.RECOVER_SWEEP: Way.RECOVER,
    Step.ADOPT: Way.TAKE,
    Step.PREPARE: Way.TAKE,
    Step.PREPARE_INTENT: Way.TAKE,
    Step.PREPARE_OVERLAYS: Way.OVERLAY,
    Step.PREPARE_RESERVE: Way.TAKE,
    Step.PREPARE_DRIVER: Way.TAKE,
    Step.PREPARE_INHERIT: Way.BACKUP,
    Step.PREPARE_CHECKPOINT: Way.BACKUP,
    Step.TAKE_WINDOW: Way.TAKE,
    Step.WINDOW_JOURNAL: Way.TAKE,
    Step.WINDOW_ARM: Way.TAKE,
    Step.WINDOW_QUIESCE: Way.TAKE,
    Step.WINDOW_SWITCH: Way.OVERLAY,
    Step.WINDOW_OVERLAID: Way.OVERLAY,
    Step.WINDOW_CUT: Way.TAKE,
    Step.WINDOW_BEGIN: Way.BACKUP,
    Step.WINDOW_FREE: Way.TAKE,
    Step.WINDOW_DISARM: Way.TAKE,
    Step.WINDOW_CLEAR: Way.TAKE,
    Step.KEEP: Way.TAKE,
    Step.AMEND: Way.AMEND,
    Step.SETTLE: Way.TAKE,
    Step.SETTLE_JOB: Way.BACKUP,
    Step.SETTLE_DRIVER: Way.TAKE,
    Step.SETTLE_CHECKPOINT: Way.BACKUP,
    Step.COLLAPSE: Way.OVERLAY,
    Step.COLLAPSE_BEGIN: Way.OVERLAY,
    Step.COLLAPSE_COMMIT: Way.OVERLAY,
    Step.COLLAPSE_PIVOT: Way.OVERLAY,
    Step.COLLAPSE_NOTE: Way.OVERLAY,
    Step.COLLAPSE_REMOVE: Way.OVERLAY,
    Step.COLLAPSE_CLEAR: Way.OVERLAY,
    Step.ROLL_BACK: Way.DELETE,
    Step.ROLL_BACK_JOB: Way.DELETE_BACKUP,
    Step.ROLL_BACK_CHECKPOINT: Way.DELETE_BACKUP,
    Step.ROLL_BACK_DRIVER: Way.DELETE,
    Step.CLAIM: Way.RESTORE,
    Step.TAKE_SAFETY: Way.RESTORE,
    Step.STOP: Way.RESTORE,
    Step.CLOSE_GATE: Way.RESTORE,
    Step.GATE_CLOSE: Way.RESTORE,
    Step.REVERT: Way.RESTORE,
    Step.REVERT_DRIVER: Way.RESTORE,
    Step.GATE_OPEN: Way.RESTORE,
    Step.LET_GO: Way.RESTORE,
    Step.GO_BACK: Way.GO_BACK,
    Step.CLONE: Way.CLONE,
    Step.CLONE_DRIVER: Way.CLONE,
    Step.CLONE_DEFINE: Way.CLONE,
    Step.HAND_OVER: Way.CLONE,
    Step.CLONE_KEEP: Way.CLONE,
    Step.START: Way.CLONE,
    Step.REMOVE_CLONES: Way.UNDO_CLONE,
    Step.FAIL: Way.FAIL,
    Step.DROP_CONTENT: Way.DELETE,
    Step.FORGET: Way.DELETE_EARLY,
    Step.EXPIRE: Way.EXPIRE,
}
if set(WAYS) != set(Step):
    raise AssertionError(f"steps that no way leads to: {set(Step) - set(WAYS)}")


@dataclass(frozen=True, slots=True)
class Case:
    """One fault at one step."""

    fault: Fault
    step: Step
    at: At

    @property
    def name(self) -> str:
        """By which it is replayed: `fault@step:when`."""
        return f"{self.fault.name}@{self.step}:{self.at}"

    @property
    def way(self) -> Way:
        """What leads to its step."""
        return WAYS[self.step]


_OF_ONE_THAT_RUNS = frozenset(
    {
        "guest-reset",
        "guest-destroyed",
        "guest-paused",
        "guest-paused-and-resumed",
        "guest-migrated",
        "guest-migrated-and-back",
    }
)
_DEAD = at([Step.RECOVER], [At.AFTER])
LEFT_OUT: tuple[tuple[Callable[[Fault], bool], frozenset[Place], str], ...] = (
    (
        lambda f: f.ends_operator,
        _DEAD,
        "the VM has just been freed after a death of the operator: the way there is that very fault",
    ),
    (
        lambda f: f.name in ("deleted", "finalizer-stripped"),
        at(s for s, way in WAYS.items() if way in (Way.DELETE, Way.DELETE_EARLY, Way.DELETE_BACKUP)),
        "it is deleted already: to do so again changes nothing, and without its finalizer it is `deleted-by-force`",
    ),
    (
        lambda f: f.name == "finalizer-stripped",
        at([Step.ADOPT], [At.BEFORE, At.DURING]),
        "it bears none yet: there is nothing to take away",
    ),
    (
        lambda f: f.name.startswith("agent-"),
        OFF,
        "a VM that is off has no agent; its safety snapshot asks nobody",
    ),
    (
        lambda f: f.name in _OF_ONE_THAT_RUNS,
        OFF,
        "a VM that is off cannot be reset, destroyed, paused or migrated; that somebody starts it is `guest-started`",
    ),
)
"""What is really impossible, with its reason. What a fault itself says by `only` is beside it."""


def _is_possible(fault: Fault, place: Place) -> bool:
    if fault.only is not None and place not in fault.only:
        return False
    return not any(concerns(fault) and place in places for concerns, places, _ in LEFT_OUT)


def every() -> list[Case]:
    """All cases that make sense."""
    return [Case(f, step, at_) for f in FAULTS for step in Step for at_ in At if _is_possible(f, (step, at_))]


def instead(case: Case) -> Case:
    """The same fault where it can always be met, for a case whose step was not reached: no kind of fault is left out."""
    return Case(case.fault, *case.fault.sure)


def parse(name: str) -> Case:
    """The case of this name; raises ValueError if there is none."""
    for case in every():
        if case.name == name:
            return case
    raise ValueError(f'no case "{name}"; names are fault@step:when, with when one of {", ".join(At)}')


def walk(number: int, seed: int, *, slow: bool = True, ways: Collection[Way] = ()) -> list[Case]:
    """`number` cases: every fault once before any twice, at steps that the seed chooses, none of its cases twice before all were.

    `ways`: none but cases of these, and none but faults that have some.
    """
    random = Random(seed)  # noqa: S311 - nothing secret
    left: dict[str, list[Case]] = {}
    chosen: list[Case] = []
    cases = [c for c in every() if not ways or c.way in ways]
    met = [c.fault for c in cases]
    while len(chosen) < number:
        faults = [f for f in FAULTS if (slow or not f.slow) and f in met]
        random.shuffle(faults)
        for fault in faults:
            if not left.get(fault.name):
                left[fault.name] = [c for c in cases if c.fault is fault]
                random.shuffle(left[fault.name])
            chosen.append(left[fault.name].pop())
    return chosen[:number]
