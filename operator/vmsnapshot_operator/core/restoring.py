"""A restore: what was asked for, what was seen of the world, and the effects between looking and doing. Pure data.

Not what follows from what (`plan.next_restore`) nor how it is done (`strategies.restore`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from vmsnapshot_operator.core.driver import CutResult
from vmsnapshot_operator.core.effects import Condition, Failure, Record
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Refusal
from vmsnapshot_operator.core.volumes import Seconds, Volume

_NO_TIME = Seconds(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreRequest:
    """What the user asked for in a VMRestore. Durations in seconds. `new_name` is empty for a restore in place."""

    uid: str
    namespace: str
    name: str
    generation: int
    created: datetime
    snapshot: str
    snapshot_uid: str = ""
    new_name: str = ""
    include: tuple[str, ...] = ()
    stop_running: bool = False
    start_after: bool = False
    safety: bool = True
    deadline_seconds: int = 3600

    @property
    def in_place(self) -> bool:
        """Whether the VM itself goes back."""
        return not self.new_name


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreGroup:
    """What one class has to restore: the cut, and the volumes of it that are wanted, with the disks that bear them now."""

    class_name: str
    cut: CutResult
    onto: tuple[Volume, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RestorePlan:
    """All that is restored, by class; `targets` are what is restored, as the snapshot names it.

    `gate`: the disks that are taken from the VM meanwhile, so that nobody starts it; also where only the variables of its firmware
    are set back.
    """

    groups: tuple[RestoreGroup, ...]
    targets: tuple[str, ...]
    gate: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Safety(StrEnum):
    """How far the safety snapshot is."""

    NONE = "None"
    TAKING = "Taking"
    READY = "Ready"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreSeen:
    """The world at one moment, as far as one VMRestore is concerned.

    `ended`: what status says of an end that was told before: nothing is begun anew then, whatever else is seen. `begun`: status says
    that the first change was about to be made, which is told before it is made; `told_half_done`: that the gate was seen closed, which is
    told before a disk is touched, and neither of its two ends; `since`: when `begun` was said, or, where that is not told, when the
    object was created. `plan`, `refusal`: what planning says now.
    `record`: None also where it cannot be trusted, or is of another snapshot than the one that this restore began with. `marker`:
    what this restore writes into the VM, as it stands there if it does. `gate`, `done`: what stands in the VM that is set back
    (or in the new one, of which only `done` matters); of several done-markers the one that is this restore's; `went_back`: for what reason this
    restore brought all disks to the safety snapshot, as stands there; `overtaken_by`: which other VMRestore's gate stands there, or ended there after
    `since`. `power` is None where the VM does not exist, or may not be looked at any more. `held`: request names of
    clones that storage holds; None if it was not asked, or did not answer. `broken`: no retry can bring the disks to the snapshot.
    `stopped`: this process has shut the VM down for it.
    `agent_answers` is None if it has no agent's channel. `problem`: why nobody can look where the VM is, or may be, or why nothing can be done there, and its
    reason; `no_hypervisor`: because the Hypervisor object is gone.
    """

    request: RestoreRequest
    deleting: bool = False
    finalizer: bool = False
    ended: tuple[Condition, ...] = ()
    begun: bool = False
    told_half_done: bool = False
    since: datetime | None = None
    refusal: Refusal | None = None
    plan: RestorePlan | None = None
    record: Record | None = None
    marker: Marker | None = None
    gate: Gate | None = None
    done: Marker | None = None
    went_back: str = ""
    overtaken_by: str = ""
    power: PowerState | None = None
    agent_answers: bool | None = None
    vm_name: str = ""
    vm_uuid: str = ""
    hypervisor: str = ""
    stopped: bool = False
    started: bool = False
    safety: Safety = Safety.NONE
    safety_name: str = ""
    safety_message: str = ""
    safety_record: Record | None = None
    held: frozenset[str] | None = None
    broken: Failure | None = None
    leader: bool = True
    known_for: Seconds = _NO_TIME
    in_use_by: str = ""
    problem: str = ""
    problem_reason: str = "HypervisorUnreachable"
    no_hypervisor: bool = False
    trouble: str = ""
    retry_in: Seconds = _NO_TIME
    progress: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether this very restore has closed the gate: the disks may be neither old nor new."""
        return self.gate is not None and self.marker is not None and self.gate.marker == self.marker

    @property
    def half_done(self) -> bool:
        """Whether disks may be neither old nor new behind no gate: somebody defined the VM anew, and whoever likes can start it."""
        return self.told_half_done and not (self.gated or self.is_done or self.went_back)

    @property
    def is_done(self) -> bool:
        """Whether this restore is done in the VM: this very object, or the same one before it was created anew."""
        if self.done is None or self.marker is None:
            return False
        if self.done == self.marker:
            return True
        return bool(self.request.snapshot_uid) and self.done.same_order(self.marker)


@dataclass(frozen=True, slots=True)
class Claim:
    """Put our finalizer on the object: from here on it leaves nothing half done."""


@dataclass(frozen=True, slots=True)
class TakeSafety:
    """Create the safety snapshot, of the disks as they are."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Shut the VM down, and switch it off if it does not go down in time."""


@dataclass(frozen=True, slots=True)
class CloseGate:
    """Take the disks from the VM's definition, so that nobody starts it meanwhile."""

    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Revert:
    """Set all disks back, then open the gate: repeatable as a whole."""

    groups: tuple[RestoreGroup, ...]


@dataclass(frozen=True, slots=True)
class GoBack:
    """Set all disks back to the safety snapshot, then open the gate as if nothing had been done. `why`: how the restore will end."""

    why: Failure


@dataclass(frozen=True, slots=True)
class Clone:
    """Make new volumes from the snapshot, and define the new VM on them: repeatable as a whole."""

    groups: tuple[RestoreGroup, ...]


@dataclass(frozen=True, slots=True)
class HandOver:
    """Have the storage forget that the new VM's volumes were ours: nobody deletes them by our names any more."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class RemoveClones:
    """Delete the new volumes of a VM that will not be."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True)
class Start:
    """Start the VM."""


@dataclass(frozen=True, slots=True)
class LetGo:
    """Drop the finalizer: nothing is half done."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Nothing until then, or (None) until an event."""

    seconds: Seconds | None = None


RestoreEffect = (
    Claim | TakeSafety | Stop | CloseGate | Revert | GoBack | Clone | HandOver | RemoveClones | Start | LetGo | Rest
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreDecision:
    """The one next effect, and the truth to report before it."""

    effect: RestoreEffect
    conditions: tuple[Condition, ...]
