"""The named steps of an operation on a VMSnapshot: where a tracer can look, and where a fault can be injected.

Every effect is a step, and so is every part of one that leaves something behind. A process has at most one observer; without
one a step costs nothing. Not: what a step does (`strategies`, `quiesce`), nor what an observer does with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Protocol


class Step(StrEnum):
    """All steps. Those without a slash are the effects, by the names of their classes."""

    RECOVER = "Recover"
    RECOVER_SWEEP = "Recover/Sweep"
    ADOPT = "Adopt"
    PREPARE = "Prepare"
    PREPARE_INTENT = "Prepare/Intent"
    PREPARE_OVERLAYS = "Prepare/Overlays"
    PREPARE_RESERVE = "Prepare/Reserve"
    PREPARE_DRIVER = "Prepare/Driver"
    PREPARE_INHERIT = "Prepare/Inherit"
    PREPARE_CHECKPOINT = "Prepare/Checkpoint"
    TAKE_WINDOW = "TakeWindow"
    WINDOW_JOURNAL = "TakeWindow/Journal"
    WINDOW_ARM = "TakeWindow/Arm"
    WINDOW_QUIESCE = "TakeWindow/Quiesce"
    WINDOW_SWITCH = "TakeWindow/Switch"
    WINDOW_OVERLAID = "TakeWindow/Overlaid"
    WINDOW_CUT = "TakeWindow/Cut"
    WINDOW_BEGIN = "TakeWindow/Begin"
    WINDOW_FREE = "TakeWindow/Free"
    WINDOW_DISARM = "TakeWindow/Disarm"
    WINDOW_CLEAR = "TakeWindow/Clear"
    KEEP = "Keep"
    AMEND = "Amend"
    SETTLE = "Settle"
    SETTLE_JOB = "Settle/Job"
    SETTLE_DRIVER = "Settle/Driver"
    SETTLE_CHECKPOINT = "Settle/Checkpoint"
    COLLAPSE = "Collapse"
    COLLAPSE_BEGIN = "Collapse/Begin"
    COLLAPSE_COMMIT = "Collapse/Commit"
    COLLAPSE_PIVOT = "Collapse/Pivot"
    COLLAPSE_NOTE = "Collapse/Note"
    COLLAPSE_REMOVE = "Collapse/Remove"
    COLLAPSE_CLEAR = "Collapse/Clear"
    ROLL_BACK = "RollBack"
    ROLL_BACK_JOB = "RollBack/Job"
    ROLL_BACK_CHECKPOINT = "RollBack/Checkpoint"
    ROLL_BACK_DRIVER = "RollBack/Driver"
    CLAIM = "Claim"
    TAKE_SAFETY = "TakeSafety"
    STOP = "Stop"
    CLOSE_GATE = "CloseGate"
    GATE_CLOSE = "CloseGate/Define"
    REVERT = "Revert"
    REVERT_DRIVER = "Revert/Driver"
    GATE_OPEN = "Revert/Open"
    GO_BACK = "GoBack"
    CLONE = "Clone"
    CLONE_DRIVER = "Clone/Driver"
    CLONE_DEFINE = "Clone/Define"
    HAND_OVER = "HandOver"
    CLONE_KEEP = "HandOver/Driver"
    REMOVE_CLONES = "RemoveClones"
    START = "Start"
    LET_GO = "LetGo"
    FAIL = "Fail"
    DROP_CONTENT = "DropContent"
    FORGET = "Forget"
    EXPIRE = "Expire"


class Moment(StrEnum):
    """Which side of a step."""

    BEFORE = "before"
    AFTER = "after"


class Observer(Protocol):
    """Told of every step of every VMSnapshot; the step waits for it to return."""

    async def reached(self, step: Step, moment: Moment, uid: str, detail: str) -> None:
        """`uid` is the VMSnapshot's; `detail` the class or handle that it is about, or empty."""
        ...


class _Process:
    observer: Observer | None = None


def observe(observer: Observer | None) -> None:
    """Make this the observer of the process."""
    _Process.observer = observer


@asynccontextmanager
async def step(name: Step, uid: str, detail: str = "") -> AsyncIterator[None]:
    """Bracket a step. The side after it is reached only by a step that succeeded."""
    observer = _Process.observer
    if observer is None:
        yield
        return
    await observer.reached(name, Moment.BEFORE, uid, detail)
    yield
    await observer.reached(name, Moment.AFTER, uid, detail)
