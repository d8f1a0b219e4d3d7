"""How a snapshot is brought to a step: what has to be so before, and what then makes the operator walk there.

Not which way leads to which step (`cases`), nor what happens there (`faults`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tests.chaos.cases import Way
from tests.chaos.faults import Scene
from tests.lab import LabError
from tests.stack import TENANT
from vmsnapshot_operator.core.steps import Moment, Step

REACH_SECONDS = 60.0
"""So long a snapshot may need to reach its step; one that does not is no injection."""
HASTY_SHARE = 0.5


def _create(scene: Scene, **spec: Any) -> None:
    """Apply the scene's VMSnapshot; every other one with a budget that many faults outlast."""
    if scene.random.random() < HASTY_SHARE:
        spec["quiesce"] = {"maxFrozenSeconds": 5, **spec.get("quiesce", {})}
    scene.stack.snapshot(scene.name, scene.guest.name, namespace=TENANT, **spec)


@contextlib.contextmanager
def _plain(_scene: Scene) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _taken(scene: Scene) -> Iterator[None]:
    _create(scene)
    scene.stack.wait(scene.name, namespace=TENANT)
    yield


@contextlib.contextmanager
def _adopted(scene: Scene) -> Iterator[None]:
    with scene.injector.trap(Step.ADOPT, Moment.AFTER) as trap:
        _create(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("it was not adopted")
        scene.go = trap.go
        yield


@contextlib.contextmanager
def _taken_and_given_back(scene: Scene) -> Iterator[None]:
    with _taken(scene):
        yield
    with contextlib.suppress(LabError):  # it may be gone
        scene.stack.patch(scene.name, {"spec": {"deletionPolicy": "Delete"}})


@contextlib.contextmanager
def _killed_in_the_window(scene: Scene) -> Iterator[None]:
    with scene.injector.trap(Step.WINDOW_CUT, Moment.BEFORE) as trap:
        _create(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("the window was not reached")
        scene.stack.programs["operator"].kill()
    yield


@contextlib.contextmanager
def _hook_fails(scene: Scene) -> Iterator[None]:
    scene.guest.fail_hook()
    try:
        yield
    finally:
        with contextlib.suppress(LabError):
            scene.guest.fail_hook(fail=False)


def _take(scene: Scene) -> None:
    _create(scene)


def _delete(scene: Scene) -> None:
    scene.deleted = True
    scene.stack.delete(scene.name, namespace=TENANT, wait=False)


def _delete_early(scene: Scene) -> None:
    _delete(scene)
    if scene.go is not None:
        scene.go()


def _recover(scene: Scene) -> None:
    scene.stack.start_operator()


def _fail(scene: Scene) -> None:
    _create(scene, quiesce={"policy": "Require"})


def _expire(scene: Scene) -> None:
    scene.deleted = True
    _create(scene, ttlSeconds=1)


def _amend(scene: Scene) -> None:
    scene.stack.patch(scene.name, {"spec": {"deletionPolicy": "Retain"}})


PREPARE: dict[Way, Callable[[Scene], contextlib.AbstractContextManager[None]]] = {
    Way.TAKE: _plain,
    Way.DELETE: _taken,
    Way.DELETE_EARLY: _adopted,
    Way.RECOVER: _killed_in_the_window,
    Way.FAIL: _hook_fails,
    Way.EXPIRE: _plain,
    Way.AMEND: _taken_and_given_back,
}
DRIVE: dict[Way, Callable[[Scene], None]] = {
    Way.TAKE: _take,
    Way.DELETE: _delete,
    Way.DELETE_EARLY: _delete_early,
    Way.RECOVER: _recover,
    Way.FAIL: _fail,
    Way.EXPIRE: _expire,
    Way.AMEND: _amend,
}
