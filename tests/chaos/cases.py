"""Which faults are injected where: every fault at every step that it can meet, in an order that a seed decides.

The steps are those that the code names; how a snapshot comes to reach each of them is said here, and a step without an entry is
an error at import: no new step escapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from tests.chaos.faults import FAULTS, At, Fault
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


WAYS: dict[Step, Way] = {
    Step.RECOVER: Way.RECOVER,
    Step.RECOVER_SWEEP: Way.RECOVER,
    Step.ADOPT: Way.TAKE,
    Step.PREPARE: Way.TAKE,
    Step.PREPARE_INTENT: Way.TAKE,
    Step.PREPARE_RESERVE: Way.TAKE,
    Step.PREPARE_DRIVER: Way.TAKE,
    Step.TAKE_WINDOW: Way.TAKE,
    Step.WINDOW_JOURNAL: Way.TAKE,
    Step.WINDOW_ARM: Way.TAKE,
    Step.WINDOW_QUIESCE: Way.TAKE,
    Step.WINDOW_CUT: Way.TAKE,
    Step.WINDOW_FREE: Way.TAKE,
    Step.WINDOW_DISARM: Way.TAKE,
    Step.WINDOW_CLEAR: Way.TAKE,
    Step.KEEP: Way.TAKE,
    Step.AMEND: Way.AMEND,
    Step.SETTLE: Way.TAKE,
    Step.SETTLE_DRIVER: Way.TAKE,
    Step.ROLL_BACK: Way.DELETE,
    Step.ROLL_BACK_DRIVER: Way.DELETE,
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


def every() -> list[Case]:
    """All cases that make sense."""
    return [
        Case(fault, step, at)
        for fault in FAULTS
        for step in Step
        for at in At
        if (fault.only is None or (step, at) in fault.only)
        and not (fault.ends_operator and step is Step.RECOVER and at is At.AFTER)
    ]


def instead(case: Case) -> Case:
    """The same fault where it can always be met, for a case whose step was not reached: no kind of fault is left out."""
    return Case(case.fault, *case.fault.sure)


def parse(name: str) -> Case:
    """The case of this name; raises ValueError if there is none."""
    for case in every():
        if case.name == name:
            return case
    raise ValueError(f'no case "{name}"; names are fault@step:when, with when one of {", ".join(At)}')


def walk(number: int, seed: int, *, slow: bool = True) -> list[Case]:
    """`number` cases: every fault once before any twice, at steps that the seed chooses, no case twice before all were."""
    random = Random(seed)  # noqa: S311 - nothing secret
    left: dict[str, list[Case]] = {}
    chosen: list[Case] = []
    while len(chosen) < number:
        faults = [f for f in FAULTS if slow or not f.slow]
        random.shuffle(faults)
        for fault in faults:
            if not left.get(fault.name):
                left[fault.name] = [c for c in every() if c.fault is fault]
                random.shuffle(left[fault.name])
            chosen.append(left[fault.name].pop())
    return chosen[:number]
