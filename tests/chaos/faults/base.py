"""What a fault is, when it strikes, and the scene that it strikes."""

from __future__ import annotations

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


@dataclass(slots=True)
class Scene:
    """Where an injection takes place. `go` lets the operator go on that was met on the way.

    `restores` are VMRestores that were made of it, `new_vm` the VM that one of them makes. `others` are further VMSnapshots of the same VM, `beside` those of other VMs; all of them are judged, too. `findings` is what a
    fault itself saw that must not be; `planted` what it has to take away again.
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
    forged: bool = False
    restores: list[str] = field(default_factory=list)
    new_vm: str = ""
    others: list[str] = field(default_factory=list)
    beside: dict[str, Guest] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    planted: list[str] = field(default_factory=list)
    seen: int = 0
    go: Callable[[], None] | None = None


def nothing(_: Scene) -> None:
    """Do nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`strike` raises NoEffectError if it hurt nothing. `heal` is called after `hold` seconds, whatever `strike` did.

    `prepare` is called before the snapshot is asked for, and `leave` when all is judged: for what a fault needs in addition.
    `hold`: seconds between letting the operator go on and healing. `ends_operator`: it is gone, nobody goes on. `only`: where it
    can be done at all; None is everywhere. `sure`: where it can always be met. `guest`: the VM that it is about, if not the demo.
    """

    name: str
    strike: Callable[[Scene], None]
    heal: Callable[[Scene], None] = nothing
    prepare: Callable[[Scene], None] = nothing
    leave: Callable[[Scene], None] = nothing
    hold: float = 0.0
    ends_operator: bool = False
    only: frozenset[Place] | None = None
    sure: Place = (Step.WINDOW_CUT, At.BEFORE)
    guest: Callable[[Annex], Guest] | None = None
    slow: bool = False


def at(steps: Iterable[Step], moments: Iterable[At] = At) -> frozenset[Place]:
    """All these moments of all these steps."""
    return frozenset(product(steps, tuple(moments)))


_PREPARING = (Step.PREPARE, Step.PREPARE_INTENT, Step.PREPARE_RESERVE, Step.PREPARE_DRIVER, Step.ADOPT)
WINDOW = at(s for s in Step if s.value.startswith("TakeWindow"))
TAKING = WINDOW | at(_PREPARING)
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
