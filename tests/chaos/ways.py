"""How a snapshot is brought to a step: what has to be so before, and what then makes the operator walk there.

Not which way leads to which step (`cases`), nor what happens there (`faults`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests import proof
from tests.chaos.cases import Way
from tests.chaos.faults import Scene
from tests.chaos.faults.base import HASTY_SECONDS
from tests.lab import LabError
from tests.stack import TENANT
from vmsnapshot_operator.core.steps import Moment, Step

REACH_SECONDS = 60.0
"""So long a snapshot may need to reach its step; one that does not is no injection."""
HASTY_SHARE = START_SHARE = 0.5


def _create(scene: Scene, **spec: Any) -> None:
    """Apply the scene's VMSnapshot; every other one with a budget that many faults outlast."""
    hasty = scene.random.random() < HASTY_SHARE
    if hasty if scene.hasty is None else scene.hasty:
        scene.budget = HASTY_SECONDS
        spec["quiesce"] = {"maxFrozenSeconds": round(HASTY_SECONDS), **spec.get("quiesce", {})}
    if scene.method:
        spec["quiesce"] = {"method": scene.method, **spec.get("quiesce", {})}
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
def _copied_by_hypervisor(scene: Scene) -> Iterator[None]:
    """A class for the guest's files whose disks the hypervisor copies; it is gone again before what is hurt has ended."""
    (document,) = scene.stack.example("storage-class-backup.yaml")
    name = f"storagedriverclasses.vmsnapshot.io/{document['metadata']['name']}"
    document["spec"] |= {"match": [{"type": "file", "sourcePattern": f"*/{scene.guest.name}-vd?.raw"}], "priority": 10}
    document["spec"]["parameters"] |= {"poolName": "reflink", "incremental": "true"}
    scene.stack.apply(scene.stack.fitted(document))
    try:
        scene.lab.kubectl("wait", "--for=condition=Ready", "--timeout=60s", name)
        yield
    finally:
        scene.lab.kubectl("delete", name, "--ignore-not-found")


@contextlib.contextmanager
def _copied_and_taken(scene: Scene) -> Iterator[None]:
    with _copied_by_hypervisor(scene), _taken(scene):
        yield


@contextlib.contextmanager
def _read(scene: Scene) -> Iterator[None]:
    """Taken, and read: what a restore of it has to bring back, also where the snapshot itself is deleted meanwhile."""
    with _taken(scene), tempfile.TemporaryDirectory(dir=scene.lab.state, prefix="judge-") as folder:
        content = scene.stack.content(scene.name, TENANT)
        if content is not None:
            scene.held = proof.read(scene.lab, content, Path(folder))
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


@contextlib.contextmanager
def _killed_before_the_new_vm(scene: Scene) -> Iterator[None]:
    """The clones are there, and the VM that they are for is not; then nobody wants it any more."""
    with _read(scene), scene.injector.trap(Step.CLONE_DEFINE, Moment.BEFORE) as trap:
        _clone(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("nothing was cloned")
        scene.stack.programs["operator"].kill()
    scene.stack.delete_restore(scene.restores[0], namespace=TENANT, wait=False)
    yield


@contextlib.contextmanager
def _refused(scene: Scene) -> Iterator[None]:
    """A restore that has begun, and one of whose drivers is about to say that it cannot set its disks back."""
    with _read(scene), scene.injector.trap(Step.REVERT_DRIVER, Moment.BEFORE) as trap:
        _restore(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("nothing was about to be set back")
        scene.injector.orders[trap.detail] = "refuse"
        scene.go = trap.go
        try:
            yield
        finally:
            scene.injector.orders.clear()


def _take(scene: Scene) -> None:
    _create(scene)


def _overlay(scene: Scene) -> None:
    _create(scene, quiesce={"method": "HypervisorSnapshot"})


def _restore(scene: Scene) -> None:
    scene.restores.append(scene.stack.restore(f"{scene.name}-back", scene.name, namespace=TENANT))


def _clone(scene: Scene) -> None:
    """Started by the restore itself where that is what it is about, else every other time: one that never ran holds exactly the cut."""
    name, start = f"{scene.name}-new", scene.step is Step.START or scene.random.random() < START_SHARE
    scene.new_vms[name] = f"{scene.guest.name}-{scene.name}"
    spec: dict[str, Any] = {"mode": "NewVM", "newVM": {"name": scene.new_vms[name]}, "startAfter": start}
    scene.restores.append(scene.stack.restore(name, scene.name, namespace=TENANT, **spec))


def _go_on(scene: Scene) -> None:
    if scene.go is not None:
        scene.go()


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
    Way.OVERLAY: _plain,
    Way.BACKUP: _copied_by_hypervisor,
    Way.DELETE_BACKUP: _copied_and_taken,
    Way.RESTORE: _read,
    Way.GO_BACK: _refused,
    Way.CLONE: _read,
    Way.UNDO_CLONE: _killed_before_the_new_vm,
}
DRIVE: dict[Way, Callable[[Scene], None]] = {
    Way.TAKE: _take,
    Way.DELETE: _delete,
    Way.DELETE_EARLY: _delete_early,
    Way.RECOVER: _recover,
    Way.FAIL: _fail,
    Way.EXPIRE: _expire,
    Way.AMEND: _amend,
    Way.OVERLAY: _overlay,
    Way.BACKUP: _take,
    Way.DELETE_BACKUP: _delete,
    Way.RESTORE: _restore,
    Way.GO_BACK: _go_on,
    Way.CLONE: _clone,
    Way.UNDO_CLONE: _recover,
}
