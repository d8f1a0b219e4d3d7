"""One observation in, one next effect out: the vocabulary between gathering, deciding and applying."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from vmsnapshot_operator.core.chains import Ruling
from vmsnapshot_operator.core.driver import CutResult, Fit, Hold, SnapshotRequest
from vmsnapshot_operator.core.evidence import WindowOutcome
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.planning import Method, Plan, Refusal, Request
from vmsnapshot_operator.core.volumes import Consistency, Seconds, VolumeId

_NO_TIME = Seconds(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """One group as the VMSnapshotContent holds it: enough to restore and delete without the class object."""

    class_name: str
    driver: str
    parameters: Mapping[str, str]
    secret_name: str
    request: SnapshotRequest
    result: CutResult | None = None
    cut_milliseconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why there will be no snapshot, for good."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is claimed of one volume, and why not more."""

    consistency: Consistency
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The VMSnapshotContent, distilled: the memory of one snapshot outside this process.

    It is written before the first cut of an attempt (`groups` without results), completed after the window, marked
    `ready` when it can be restored, or given a `failure`. `retain`: what it says is done with the data when the VMSnapshot is
    deleted, of which the request may say otherwise since. `problem` says why its handles must not be used; `foreign` that
    it belongs to somebody else altogether. `collapsed`: nothing is left to do about overlays. `version` is what was read: who
    writes over a newer one is told so.
    """

    name: str
    attempt: int
    plan: Plan
    groups: Mapping[str, RecordedGroup]
    outcome: WindowOutcome | None = None
    verdicts: Mapping[VolumeId, Verdict] = field(default_factory=dict)
    failure: Failure | None = None
    ready: bool = False
    ready_time: datetime | None = None
    retain: bool = False
    collapsed: bool = False
    problem: str = ""
    foreign: bool = False
    version: str = ""

    @property
    def taken(self) -> bool:
        """Whether the point in time exists and was recorded."""
        return self.outcome is not None and self.failure is None

    @property
    def overlaid(self) -> bool:
        """Whether the VM may still be on overlays of this snapshot, as far as the record says."""
        return self.plan.quiesce.method == Method.HYPERVISOR_SNAPSHOT and not self.collapsed

    @property
    def needs_base(self) -> bool:
        """Whether what was cut is whole only if the bases have stood still until it is ready."""
        return any(g.result is not None and g.result.hold is Hold.BASE for g in self.groups.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The world at one moment; what is not in here cannot influence a decision.

    `plan` and `refusal`: what planning says now (None, None when it was not needed). `held`: names of ours that drivers
    listed, by class, or None when nobody was asked; `unlisted`: classes that could not be asked, with the reason.
    `prepared`: the attempt that this very process has prepared and not yet tried. `outcome`: a window that this process
    ran and has not recorded. `overlays`: what is to be done about each overlay of the journal. `broken`: what this process found that no retry can mend. `lost`: what status says of a content
    that was on record and is no more. `trouble`, `retry_in`: the last effect failed, and in how many seconds to try again.
    `known_for`: how long this process has known the object, in seconds. `in_use_by`: who else works on this VM. `restored_by`: the VMRestore
    that is under way with this very snapshot. `vm_gone`: the VM on record was looked for and exists no more, so nothing holds it;
    `vm_unseen`: it could not be looked for, and never will be as things are.
    """

    request: Request
    deleting: bool = False
    finalizer: bool = False
    refused: Failure | None = None
    known_for: Seconds = _NO_TIME
    plan: Plan | None = None
    refusal: Refusal | None = None
    record: Record | None = None
    journal: Journal | None = None
    journal_problem: str = ""
    overlays: tuple[Ruling, ...] = ()
    vm_gone: bool = False
    vm_unseen: bool = False
    held: Mapping[str, frozenset[str]] | None = None
    unlisted: Mapping[str, str] = field(default_factory=dict)
    prepared: int | None = None
    outcome: WindowOutcome | None = None
    leader: bool = True
    guardian: Fit | None = None
    in_use_by: str = ""
    restored_by: str = ""
    broken: Failure | None = None
    lost: Mapping[str, Any] = field(default_factory=dict)
    degraded: str = ""
    copied: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trouble: str = ""
    retry_in: Seconds = _NO_TIME


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A condition as decided; the writer adds times, and only on a flip. `status` None is Unknown."""

    type: str
    status: bool | None
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Recover:
    """Free the VM first, judge later: wins over every other effect."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class Collapse:
    """Commit the overlays into their bases, let the VM go on there, remove them: resumable after any of its steps."""

    journal: Journal


@dataclass(frozen=True, slots=True)
class Adopt:
    """Put our finalizer on the object: from here on it leaves no trace behind, whatever happens."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Write down what will be cut, then let the drivers do what is slow; the VM is untouched."""

    attempt: int
    plan: Plan
    requests: Mapping[str, SnapshotRequest]


@dataclass(frozen=True, slots=True)
class TakeWindow:
    """Journal, arm, quiesce, cut all, free the guest: seconds, one effect, never resumed."""

    attempt: int
    plan: Plan
    requests: Mapping[str, SnapshotRequest]


@dataclass(frozen=True, slots=True)
class Keep:
    """Write results, evidence and verdicts into the VMSnapshotContent."""

    outcome: WindowOutcome
    verdicts: Mapping[VolumeId, Verdict]


@dataclass(frozen=True, slots=True)
class Amend:
    """Write what changed since into the VMSnapshotContent.

    That is the deletion policy, which it must say when the VMSnapshot is gone, or that the VM is on its own disks again.
    """

    collapsed: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """Wait until it can be restored while the VM runs: resumable. `at_once`: every class cuts in an instant, so nothing is copied."""

    groups: Mapping[str, RecordedGroup]
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class RollBack:
    """Delete what our names hold, by class; go on after errors; report the rest."""

    names: Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Fail:
    """Write the failure into the VMSnapshotContent: it is final."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class DropContent:
    """Delete the VMSnapshotContent: storage has confirmed that it holds nothing."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the finalizer."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Delete the VMSnapshot: its time to live is over."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing until then, or (None) until an event."""

    seconds: Seconds | None = None


Effect = (
    Recover
    | Collapse
    | Adopt
    | Prepare
    | TakeWindow
    | Keep
    | Amend
    | Settle
    | RollBack
    | Fail
    | DropContent
    | Forget
    | Expire
    | Wait
)


QUIET = (Adopt, TakeWindow, Keep, Amend, Fail, DropContent, Forget)
"""Effects that are short and followed by another decision: their conditions are not worth a write of their own."""


def is_quiet(effect: Effect) -> bool:
    """Whether what was decided is not worth telling before it is done."""
    return isinstance(effect, QUIET) or (isinstance(effect, Settle) and effect.at_once)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The one next effect, and the truth to report before it."""

    effect: Effect
    conditions: tuple[Condition, ...]


class SnapshotStrategy(Protocol):
    """Owns taking and deleting snapshots as a whole; found by entry point group `vmsnapshot_operator.strategies`."""

    name: str

    def can_take(self, seen: Observation) -> Fit:
        """Say whether this strategy can serve the request."""
        ...

    def decide(self, seen: Observation, now: datetime) -> Decision:
        """Pure: the next effect."""
        ...

    async def apply(self, effect: Effect, seen: Observation, body: Mapping[str, Any]) -> None:
        """Perform one effect on the VMSnapshot with this body; the next gather sees its outcome. Raises SnapshotError."""
        ...
