"""What one process saw of one window, and the protocol of making a VM stand still. Not what follows (`plan.verdict`)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Protocol

from vmsnapshot_operator.core.driver import CutResult
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.volumes import Seconds, VolumeId

THAW_SAID = "thaw: "
"""What a note begins with that says why a thaw ended with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """Between these two readings of our monotonic clock a group's cut happened, somewhere."""

    start: Seconds
    end: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one process saw of one window. Clock readings are of that process's monotonic clock.

    `still_from` is when the VM had answered that it stands still, `still_until` when we asked it to go on: a cut whose
    bracket lies between them saw standing volumes, if also nobody freed the VM meanwhile (`freed_by_other`). `covered`
    are the volumes on which every file system that the agent listed was frozen by us. `frozen` and `thawed` are the
    agent's own counts; for other methods they are zero. `unwritten`: the volumes of which their storage says that nobody wrote
    to them from the plan until after the window, whatever held the VM. `asked`: when the VM was asked to stand still, whether or not it did;
    known to this process alone.
    """

    method: str
    asked: Seconds | None = None
    still_from: Seconds | None = None
    still_until: Seconds | None = None
    frozen_time: datetime | None = None
    thawed_time: datetime | None = None
    frozen_milliseconds: int = 0
    covered: frozenset[VolumeId] = frozenset()
    frozen: int = 0
    thawed: int = 0
    freed_by_other: bool = False
    same_vm: bool = False
    shut_down_from_within: bool = False
    unwritten: frozenset[VolumeId] = frozenset()
    notes: tuple[str, ...] = ()

    def freed(self, at: Seconds, time: datetime) -> Evidence:
        """Return the same with the VM known to go on, at `at` by this process's clock."""
        held = round((at - self.asked) * 1000) if self.asked is not None else 0
        return replace(self, thawed_time=time, frozen_milliseconds=held)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOutcome:
    """One group's part in a window: its result, with what is to be said of it, or why there is none."""

    class_name: str
    bracket: Bracket | None = None
    result: CutResult | None = None
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the group was cut."""
        return self.result is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowOutcome:
    """All that a window brought.

    `free` is False while nobody has confirmed that the VM goes on. `cut_time`: wall clock when the cuts began.
    `interrupted`: it came to nothing for a reason that trying again may overcome. `fallback`: the VM could not be made to
    stand still in this way; another way may do.
    """

    attempt: int
    evidence: Evidence
    groups: Mapping[str, GroupOutcome] = field(default_factory=dict)
    free: bool = False
    cut_time: datetime | None = None
    interrupted: bool = False
    fallback: bool = False
    reason: str = ""
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether the point in time exists: every group was cut and nothing went wrong around it."""
        return not self.reason and bool(self.groups) and all(g.ok for g in self.groups.values())


class Window(Protocol):
    """The seconds inside `still`, and afterwards the truth about them."""

    @property
    def evidence(self) -> Evidence:
        """What was seen; complete only after the window was left."""
        ...

    @property
    def free(self) -> bool:
        """Whether the VM is confirmed to go on."""
        ...

    @property
    def rest(self) -> bool:
        """Whether something is left in the VM that its journal has to tell, though it goes on."""
        ...


class Quiescer(Protocol):
    """One way to make volumes stand still: through the agent, by a pause, not at all."""

    def still(self, journal: Journal) -> AbstractAsyncContextManager[Window]:
        """Make the VM stand still; leaving frees it on every path.

        Raises QuiesceError (the VM is then free, or `free` is False), or another error of ours before anything was sent to the VM.
        """
        ...

    async def let_go(self, journal: Journal) -> None:
        """Free what this journal may hold: repeatable, by anyone; returns once the VM is confirmed free."""
        ...

    def left(self, journal: Journal) -> Journal | None:
        """What has to stand in the metadata of a VM that is free instead, since something is left to be done; None: nothing is."""
        ...
