"""The API server and etcd die, answer wrongly or not at all, and users change the objects in mid-work."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.chaos.apiproxy import Trouble
from tests.chaos.faults.base import RESTORING, TAKING, At, Fault, NoEffectError, Scene, at, kill, start
from tests.chaos.faults.neighbours import is_over
from tests.chaos.rules import is_true
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.stack import until
from vmsnapshot_operator.core.steps import Step
from vmsnapshot_operator.kube.client import REQUEST_TIMEOUT
from vmsnapshot_operator.kube.lease import Durations

AWAY_SECONDS = Durations().lease + 3.0
"""So long nothing of the API server arrives that whoever held the lease holds it no more."""


def _start_etcd(scene: Scene) -> None:
    scene.lab.component("etcd").start()
    until("the API server answers", scene.lab.component("kube-apiserver").healthy, 60)


def _answers(**trouble: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.proxy.begin(Trouble(**trouble))  # type: ignore[arg-type]  # the callers name its fields

    return strike


def _calm(scene: Scene) -> None:
    scene.proxy.calm()


def _met(scene: Scene) -> bool:
    """Whether as many requests as were meant have met the trouble."""
    return scene.proxy.trouble.count <= 0


def _calm_if_met(scene: Scene) -> None:
    """One that nobody asked anything meanwhile did not refuse anything."""
    untouched = scene.proxy.trouble.count >= scene.proxy.wanted
    scene.proxy.calm()
    if untouched:
        raise NoEffectError("nothing was asked of the API server meanwhile")


def _calm_if_withheld(scene: Scene) -> None:
    withheld = scene.proxy.withheld
    scene.proxy.calm()
    if not withheld:
        raise NoEffectError("nothing was to be told by any watch meanwhile")


def _deafen(scene: Scene) -> None:
    """Every connection that a watch has now is dead, and nobody tells; then users delete and make what only a watch can tell of."""
    scene.proxy.deafen()
    scene.deleted, scene.seen = True, int(time.monotonic())
    scene.stack.delete(scene.name, namespace=scene.namespace, wait=False)
    scene.others.append(scene.stack.snapshot(f"{scene.name}-unheard", scene.guest.name, namespace=scene.namespace))


def _is_noticed(scene: Scene) -> bool:
    there = scene.stack.get(scene.others[0], scene.namespace) if scene.others else None
    noticed = there is None or bool((there.get("status") or {}).get("conditions"))
    return noticed and scene.stack.get(scene.name, scene.namespace) is None


def _must_be_noticed(scene: Scene) -> None:
    withheld, noticed = scene.proxy.withheld, _is_noticed(scene)
    scene.proxy.calm()
    if not withheld or (noticed and time.monotonic() - scene.seen < HEARD_SECONDS):
        raise NoEffectError("no watch was deaf to what was to be told")
    if not noticed:
        text = f"a deletion and another VMSnapshot were not noticed within {DEAF_SECONDS:g} s of dead watches"
        scene.findings.append(Finding("stuck", f"VMSnapshot {scene.name}", text))


def _delete(*options: str) -> Callable[[Scene], None]:
    """By the scene's own VMSnapshot, also where a restore uses it."""

    def strike(scene: Scene) -> None:
        there = scene.stack.get(scene.name, scene.namespace)
        if there is None or there["metadata"].get("deletionTimestamp"):
            raise NoEffectError("it is deleted already")
        scene.deleted = True
        _kubectl_delete(scene, "vmsnapshots.vmsnapshot.io", scene.name, *options)

    return strike


def _delete_restore(*options: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        there = scene.stack.get_restore(scene.restores[0], scene.namespace)
        if there is None or there["metadata"].get("deletionTimestamp"):
            raise NoEffectError("it is deleted already")
        _kubectl_delete(scene, "vmrestores.vmsnapshot.io", scene.restores[0], *options)

    return strike


def _tear_away(scene: Scene) -> None:
    """What people do to get rid of an object: `--force` alone takes no finalizer away, and so they take that away, too."""
    if scene.stack.get(scene.name, scene.namespace) is None:
        raise NoEffectError("it is gone already")
    scene.deleted = scene.patient = True
    _kubectl_delete(scene, _SNAPSHOTS, scene.name, "--force", "--grace-period=0")
    _strip(scene, _SNAPSHOTS, scene.name)


def _tear_restore_away(scene: Scene) -> None:
    _delete_restore("--force", "--grace-period=0")(scene)
    scene.patient = True
    _strip(scene, _RESTORES, scene.restores[0])


def _strip(scene: Scene, resource: str, name: str) -> None:
    """Take its finalizers away. Raises LabError if it is gone by itself."""
    bare = json.dumps({"metadata": {"finalizers": None}})
    with contextlib.suppress(LabError):  # it had none, and is gone
        scene.lab.kubectl("-n", scene.namespace, "patch", resource, name, "--type=merge", "-p", bare)


def _strip_finalizer(scene: Scene) -> None:
    there = scene.stack.get(scene.name, scene.namespace)
    if there is None or there["metadata"].get("deletionTimestamp") or not there["metadata"].get("finalizers"):
        raise NoEffectError("it has no finalizer, or is deleted already")
    _strip(scene, _SNAPSHOTS, scene.name)


def _delete_content(scene: Scene) -> None:
    """Somebody deletes the record of what storage holds: whatever is cut then must be found by its name."""
    content = scene.stack.content(scene.name, scene.namespace)
    if content is None:
        raise NoEffectError("there is no content")
    scene.lab.kubectl("delete", "vmsnapshotcontents.vmsnapshot.io", content["metadata"]["name"], "--wait=false")


def _delete_what_lost_its_content(scene: Scene) -> None:
    """One that lost its content rightly keeps what storage has of it until it is deleted: by its user, when it has come to its end. One
    that was taken anew is for the judge to read.
    """

    def ready() -> bool:
        return is_true(scene.stack.get(scene.name, scene.namespace) or {}, "Ready")

    def ended() -> bool:
        there = scene.stack.content(scene.name, scene.namespace) is not None
        return is_over(scene.stack, scene.name) and (there or not ready())

    try:
        until(f"{scene.name} has ended", ended, 240)
    except LabError as error:
        scene.findings.append(Finding("stuck", scene.name, f"its content was deleted: {error}"))
    if not ready() and scene.stack.get(scene.name, scene.namespace) is not None:
        scene.deleted = True
        scene.stack.delete(scene.name, namespace=scene.namespace, wait=False)


_SNAPSHOTS, _RESTORES = "vmsnapshots.vmsnapshot.io", "vmrestores.vmsnapshot.io"


def _kubectl_delete(scene: Scene, resource: str, name: str, *options: str) -> None:
    scene.lab.kubectl("-n", scene.namespace, "delete", resource, name, "--wait=false", "--ignore-not-found", *options)


def _delete_namespace(scene: Scene) -> None:
    scene.deleted = True
    scene.lab.kubectl("delete", "namespace", scene.namespace, "--wait=false")


def _make_namespace(scene: Scene) -> None:
    """A tenant's namespace comes back when it is wholly gone."""
    found = lambda: scene.lab.api.get(f"/api/v1/namespaces/{scene.namespace}")  # noqa: E731
    until("the namespace is gone", lambda: found() is None, 240)
    scene.stack.make_namespace(scene.namespace)


def _another_snapshot(scene: Scene) -> None:
    """Two more of the same VM, and one of them is deleted at once."""
    for number in (1, 2):
        scene.others.append(scene.stack.snapshot(f"{scene.name}-{number}", scene.guest.name, namespace=scene.namespace))
    scene.stack.delete(scene.others[-1], namespace=scene.namespace, wait=False)


def _take_one_before(scene: Scene) -> None:
    """One that is Ready, and is deleted in mid-work."""
    scene.others.append(scene.stack.snapshot(f"{scene.name}-0", scene.guest.name, namespace=scene.namespace))
    scene.stack.wait(scene.others[0], namespace=scene.namespace)


def _two_snapshots_and_a_deletion(scene: Scene) -> None:
    """All three at the same moment, each by a user of its own."""
    together = threading.Barrier(3)
    old, new = scene.others[0], [f"{scene.name}-{number}" for number in (1, 2)]

    def delete() -> None:
        together.wait(30)
        scene.stack.delete(old, namespace=scene.namespace, wait=False)

    def make(name: str) -> None:
        together.wait(30)
        scene.stack.snapshot(name, scene.guest.name, namespace=scene.namespace)

    scene.others += new
    with ThreadPoolExecutor(3) as users:
        done = [users.submit(delete), *(users.submit(make, name) for name in new)]
        for each in done:
            each.result()


def _another_restore(scene: Scene) -> None:
    """One more of the same VM from the same snapshot, in place or as another VM as the first one is."""
    first, name = scene.restores[0], f"{scene.name}-more"
    spec = {}
    if first in scene.new_vms:
        scene.new_vms[name] = f"{scene.new_vms[first]}-more"
        spec = {"mode": "NewVM", "newVM": {"name": scene.new_vms[name]}}
    scene.restores.append(scene.stack.restore(name, scene.name, namespace=scene.namespace, **spec))


def _forge(scene: Scene, resource: str, name: str, status: dict[str, str]) -> None:
    try:
        scene.lab.kubectl(
            "-n",
            scene.namespace,
            "patch",
            resource,
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            json.dumps({"status": status}),
        )
    except LabError as error:
        raise NoEffectError(f"it is gone: {error}") from error
    scene.forged = True


def _forge_status(scene: Scene) -> None:
    _forge(scene, "vmsnapshots.vmsnapshot.io", scene.name, {"consistency": "Filesystem", "phase": "Ready"})


def _forge_restore(scene: Scene) -> None:
    """It says that it is done, and that another snapshot is the one to go back to."""
    status = {"phase": "Ready", "safetySnapshotName": scene.name}
    _forge(scene, "vmrestores.vmsnapshot.io", scene.restores[0], status)


def _refusing(name: str, *, hold: float = 3.0, slow: bool = False, **trouble: int) -> Fault:
    return Fault(name=name, strike=_answers(**trouble), heal=_calm_if_met, over=_met, hold=hold, slow=slow)


TIMED_OUT = REQUEST_TIMEOUT + 1.0
DEAF_SECONDS = 90.0
"""Longer than the operator waits for anything to come of a watch before it watches anew: 70 s."""
HEARD_SECONDS = 10.0
"""What is noticed sooner was told."""
_AT_REST = (Step.SETTLE, At.AFTER)
_HELD = at([Step.KEEP, Step.AMEND, Step.SETTLE, Step.SETTLE_DRIVER, Step.SETTLE_JOB])
"""Where a content tells what storage holds."""
_BEFORE_THE_GATE = at([Step.CLAIM, Step.TAKE_SAFETY, Step.STOP]) | {(Step.CLOSE_GATE, At.BEFORE)}
"""Behind the gate the disks are neither old nor new, and nobody but the VMRestore knows whither: that gate stays, and is told of; and
clones whose VMRestore was torn away are listed, not removed."""
THERE = RESTORING - at([Step.REMOVE_CLONES])
"""Where the VMRestore is not deleted already."""

FAULTS = (
    Fault(name="apiserver-killed", strike=kill("kube-apiserver"), heal=start("kube-apiserver"), hold=1.0),
    Fault(name="etcd-killed", strike=kill("etcd"), heal=_start_etcd, hold=1.0),
    _refusing("api-conflict", status=409, count=2),
    _refusing("api-too-many-requests", status=429, count=3),
    _refusing("api-internal-error", status=500, count=3),
    Fault(name="api-hangs", strike=_answers(hang=1, count=1), heal=_calm_if_met, hold=5.0),
    Fault(name="api-times-out", strike=_answers(hang=1, count=2), heal=_calm_if_met, hold=TIMED_OUT, slow=True),
    _refusing("api-answer-lost", lose=1, count=2),
    _refusing("api-read-conflict", status=409, reads=1, count=2),
    _refusing("api-read-too-many-requests", status=429, reads=1, count=3),
    _refusing("api-read-internal-error", status=500, reads=1, count=3),
    Fault(name="api-read-hangs", strike=_answers(hang=1, reads=1, count=1), heal=_calm_if_met, hold=5.0),
    Fault(
        name="api-read-times-out",
        strike=_answers(hang=1, reads=1, count=2),
        heal=_calm_if_met,
        hold=TIMED_OUT,
        slow=True,
    ),
    _refusing("api-read-answer-lost", lose=1, reads=1, count=2),
    Fault(
        name="api-away-for-longer-than-the-lease",
        strike=_answers(hang=1, all_of_them=1, count=10**6),
        heal=_calm,
        hold=AWAY_SECONDS,
        slow=True,
    ),
    Fault(name="watches-silent", strike=_answers(silent=1), heal=_calm_if_withheld, hold=4.0),
    Fault(
        name="watches-deaf",
        strike=_deafen,
        heal=_must_be_noticed,
        hold=DEAF_SECONDS,
        over=_is_noticed,
        only=frozenset({_AT_REST}),
        sure=_AT_REST,
        slow=True,
    ),
    Fault(name="deleted", strike=_delete()),
    Fault(name="deleted-by-force", strike=_tear_away),
    Fault(name="finalizer-stripped", strike=_strip_finalizer),
    Fault(
        name="content-deleted",
        strike=_delete_content,
        heal=_delete_what_lost_its_content,
        only=TAKING | _HELD,
        sure=(Step.SETTLE, At.AFTER),
    ),
    Fault(name="namespace-deleted", strike=_delete_namespace, heal=_make_namespace),
    Fault(name="more-snapshots-of-the-vm", strike=_another_snapshot),
    Fault(name="two-snapshots-and-a-deletion-at-once", prepare=_take_one_before, strike=_two_snapshots_and_a_deletion),
    Fault(name="status-forged", strike=_forge_status),
    Fault(name="restore-deleted", strike=_delete_restore(), only=THERE, sure=(Step.REVERT_DRIVER, At.BEFORE)),
    Fault(
        name="restore-deleted-by-force",
        strike=_tear_restore_away,
        only=_BEFORE_THE_GATE,
        sure=(Step.TAKE_SAFETY, At.BEFORE),
    ),
    Fault(name="restore-status-forged", strike=_forge_restore, only=THERE, sure=(Step.REVERT_DRIVER, At.BEFORE)),
    Fault(name="another-restore-of-the-vm", strike=_another_restore, only=RESTORING, sure=(Step.CLAIM, At.AFTER)),
)
