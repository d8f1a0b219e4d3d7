"""What a fault is, and the scene that it strikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.chaos.apiproxy import ApiProxy
from tests.chaos.injector import Injector
from tests.lab import Lab
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack
from vmsnapshot_operator.core.steps import Step


@dataclass(slots=True)
class Scene:
    """Where an injection takes place. `go` lets the operator go on that was met on the way."""

    lab: Lab
    stack: Stack
    proxy: ApiProxy
    injector: Injector
    guest: Guest
    random: Random
    namespace: str = TENANT
    name: str = ""
    uid: str = ""
    deleted: bool = False
    forged: bool = False
    others: list[str] = field(default_factory=list)
    go: Callable[[], None] | None = None


def _nothing(_: Scene) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`hold`: seconds between letting the operator go on and healing. `ends_operator`: it is gone, nobody goes on.

    `only`: the steps at which it can be done at all; None is all of them.
    """

    name: str
    strike: Callable[[Scene], None]
    heal: Callable[[Scene], None] = _nothing
    hold: float = 0.0
    ends_operator: bool = False
    only: frozenset[Step] | None = None
    slow: bool = False


WINDOW = frozenset(s for s in Step if s.value.startswith("TakeWindow"))
TAKING = WINDOW | {Step.PREPARE, Step.PREPARE_INTENT, Step.PREPARE_RESERVE, Step.PREPARE_DRIVER, Step.ADOPT}


def kill(component: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.lab.component(component).kill()

    return strike


def start(component: str) -> Callable[[Scene], None]:
    def heal(scene: Scene) -> None:
        scene.lab.component(component).start()

    return heal


def send(component: str, number: int) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        scene.lab.component(component).kill(number)

    return act
