"""What a fault is, when it strikes, and the scene that it strikes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from random import Random

from tests.chaos.annex import Annex
from tests.chaos.apiproxy import ApiProxy
from tests.chaos.injector import Injector
from tests.chaos.seen import Finding
from tests.lab import Lab
from tests.lab.guests import Guest
from tests.proof import Truth
from tests.stack import TENANT, Stack
from vmsnapshot_operator.core.steps import Moment, Step


class NoEffectError(Exception):
    """The fault did nothing to the parts: what follows would prove nothing."""


class At(StrEnum):
    """When a fault strikes: `DURING` is a moment after the operator was let go on into the step."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"

    @property
    def moment(self) -> Moment:
        """The side of the step at which the operator is met."""
        return Moment.AFTER if self is At.AFTER else Moment.BEFORE


Place = tuple[Step, At]

HASTY_SECONDS = 5.0
"""A budget (`maxFrozenSeconds`) that many faults outlast."""

BUDGET_SECONDS = 30.0
"""The budget of a VMSnapshot that does not say any."""


@dataclass(slots=True)
class Scene:
    """Where an injection takes place. `go` lets the operator go on that was met on the way.

    `restores` are VMRestores that were made of it, `new_vms` the VMs that some of them make, by the restore; `held` is what the
    snapshot that they use holds, if that was read. `others` are further VMSnapshots of the same VM, `beside` those of other VMs; all of
    them are judged, too. `redefined`: somebody else defined the VM, as it was by `definition`: our marks may be gone from it.

    `patient`: nobody is told of what is left, so it is found by one of the looks that the operator takes by itself.

    `late`: the step comes only when the snapshot has long been at rest. `started`: somebody has had the new VM run.

    `step` and `detail` are where the operator was met, `before` how often it had been at each step when the trap was set.
    `hasty`: the budget is one that the fault outlasts; None: by chance. `budget`: the longest of all that hold its guest. `method`: how the VM is to be held; empty: as is best. `findings` is what a fault itself saw that must not be;
    `planted` what it has to take away again.
    """

    lab: Lab
    stack: Stack
    proxy: ApiProxy
    injector: Injector
    annex: Annex
    guest: Guest
    random: Random
    namespace: str = TENANT
    name: str = ""
    uid: str = ""
    deleted: bool = False
    patient: bool = False
    forged: bool = False
    late: bool = False
    started: bool = False
    redefined: bool = False
    definition: str = ""
    hasty: bool | None = None
    budget: float = BUDGET_SECONDS
    method: str = ""
    restores: list[str] = field(default_factory=list)
    new_vms: dict[str, str] = field(default_factory=dict)
    held: Truth | None = None
    step: Step | None = None
    detail: str = ""
    before: Counter[tuple[str, str]] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)
    beside: dict[str, Guest] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)
    seen: int = 0
    go: Callable[[], None] | None = None

    def times(self, step: Step, moment: Moment) -> int:
        """How often the operator was there since the trap was set."""
        return self.injector.reached[step, moment] - self.before[step, moment]


def nothing(_: Scene) -> None:
    """Do nothing."""


def unhurried(scene: Scene) -> None:
    """Ask for a budget that is not over while it is waited for a thaw that comes sooner."""
    scene.hasty = False


def never(_: Scene) -> bool:
    """Say no."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`strike` raises NoEffectError if it hurt nothing. `heal` is called after `hold` seconds, whatever `strike` did.

    `prepare` is called before the snapshot is asked for, and `leave` when all is judged: for what a fault needs in addition.
    `hold`: seconds between letting the operator go on and healing; less if `over` says that it has done all that it can, or if
    everything has come to its end meanwhile. `ends_operator`: it is gone, nobody goes on. `only`: where it can be done at all; None
    is everywhere that `cases` does not leave out. `sure`: where it can always be met. `guest`: the VM that it is about, if not the
    demo. `about`: the class that the step has to be about. `hasty`: the budget is one that it outlasts.
    """

    name: str
    strike: Callable[[Scene], None]
    heal: Callable[[Scene], None] = nothing
    prepare: Callable[[Scene], None] = nothing
    leave: Callable[[Scene], None] = nothing
    hold: float = 0.0
    over: Callable[[Scene], bool] = never
    ends_operator: bool = False
    only: frozenset[Place] | None = None
    sure: Place = (Step.WINDOW_CUT, At.BEFORE)
    guest: Callable[[Annex], Guest] | None = None
    about: str = ""
    hasty: bool = False
    slow: bool = False


def at(steps: Iterable[Step], moments: Iterable[At] = At) -> frozenset[Place]:
    """All these moments of all these steps."""
    return frozenset(product(steps, tuple(moments)))


_PREPARING = (
    Step.PREPARE,
    Step.PREPARE_INTENT,
    Step.PREPARE_RESERVE,
    Step.PREPARE_DRIVER,
    Step.PREPARE_INHERIT,
    Step.PREPARE_CHECKPOINT,
    Step.ADOPT,
)
WINDOW = at(s for s in Step if s.value.startswith("TakeWindow"))
TAKING = WINDOW | at(_PREPARING)
_IN_PLACE = (
    Step.CLAIM,
    Step.TAKE_SAFETY,
    Step.STOP,
    Step.CLOSE_GATE,
    Step.GATE_CLOSE,
    Step.REVERT,
    Step.REVERT_DRIVER,
    Step.GATE_OPEN,
    Step.LET_GO,
    Step.GO_BACK,
)
_NEW_VM = (
    Step.CLONE,
    Step.CLONE_DRIVER,
    Step.CLONE_DEFINE,
    Step.HAND_OVER,
    Step.CLONE_KEEP,
    Step.START,
    Step.REMOVE_CLONES,
)
IN_PLACE, NEW_VM = at(_IN_PLACE), at(_NEW_VM)
RESTORING = IN_PLACE | NEW_VM
OFF = IN_PLACE - at([Step.CLAIM]) - {(Step.STOP, At.BEFORE), (Step.STOP, At.DURING)}
"""Where the VM that is set back is off, or just going off."""
DRIVERS = (
    Step.PREPARE_DRIVER,
    Step.WINDOW_CUT,
    Step.SETTLE_DRIVER,
    Step.ROLL_BACK_DRIVER,
    Step.REVERT_DRIVER,
    Step.CLONE_DRIVER,
    Step.CLONE_KEEP,
)
"""Steps in each of which one class's driver does something."""
FROZEN = at([Step.WINDOW_CUT], [At.BEFORE, At.AFTER]) | {(Step.WINDOW_QUIESCE, At.AFTER), (Step.WINDOW_FREE, At.BEFORE)}
"""Where the guest's file systems are frozen while the operator stands there; once it goes on they are not for long."""


def kill(component: str) -> Callable[[Scene], None]:
    """SIGKILL for a program of the laboratory."""

    def strike(scene: Scene) -> None:
        scene.lab.component(component).kill()

    return strike


def start(component: str) -> Callable[[Scene], None]:
    """Start a program of the laboratory as it was."""

    def heal(scene: Scene) -> None:
        scene.lab.component(component).start()

    return heal


def send(component: str, number: int) -> Callable[[Scene], None]:
    """Send a program of the laboratory a signal."""

    def act(scene: Scene) -> None:
        scene.lab.component(component).kill(number)

    return act
