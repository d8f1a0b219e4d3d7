"""The API server and etcd die, answer wrongly or not at all, and users change the objects in mid-work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from tests.chaos.apiproxy import Trouble
from tests.chaos.faults.base import Fault, Scene, kill, start
from tests.lab import LabError
from tests.stack import until


def _start_etcd(scene: Scene) -> None:
    scene.lab.component("etcd").start()
    until("the API server answers", scene.lab.component("kube-apiserver").healthy, 60)


def _answers(**trouble: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.proxy.begin(Trouble(**trouble))  # type: ignore[arg-type]  # the callers name its fields

    return strike


def _calm(scene: Scene) -> None:
    scene.proxy.calm()


def _delete(*options: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.deleted = True
        scene.lab.kubectl(
            "-n",
            scene.namespace,
            "delete",
            "vmsnapshots.vmsnapshot.io",
            scene.name,
            "--wait=false",
            "--ignore-not-found",
            *options,
        )

    return strike


def _delete_namespace(scene: Scene) -> None:
    scene.deleted = True
    scene.lab.kubectl("delete", "namespace", scene.namespace, "--wait=false")


def _make_namespace(scene: Scene) -> None:
    """A tenant's namespace comes back when it is wholly gone."""
    found = lambda: scene.lab.kubectl("get", "namespace", scene.namespace, "-o", "name", "--ignore-not-found").strip()  # noqa: E731
    until("the namespace is gone", lambda: not found(), 120)
    scene.stack.make_namespace(scene.namespace)


def _another_snapshot(scene: Scene) -> None:
    """Two more of the same VM, and one of them is deleted at once."""
    for number in (1, 2):
        scene.others.append(scene.stack.snapshot(f"{scene.name}-{number}", scene.guest.name, namespace=scene.namespace))
    scene.stack.delete(scene.others[-1], namespace=scene.namespace, wait=False)


def _forge_status(scene: Scene) -> None:
    scene.forged = True
    forged = '{"status":{"consistency":"Filesystem","phase":"Ready"}}'
    with contextlib.suppress(LabError):  # it may be gone
        scene.lab.kubectl(
            "-n",
            scene.namespace,
            "patch",
            "vmsnapshots.vmsnapshot.io",
            scene.name,
            "--subresource=status",
            "--type=merge",
            "-p",
            forged,
        )


FAULTS = (
    Fault(name="apiserver-killed", strike=kill("kube-apiserver"), heal=start("kube-apiserver"), hold=1.0),
    Fault(name="etcd-killed", strike=kill("etcd"), heal=_start_etcd, hold=1.0),
    Fault(name="api-conflict", strike=_answers(status=409, count=2), heal=_calm, hold=3.0),
    Fault(name="api-too-many-requests", strike=_answers(status=429, count=3), heal=_calm, hold=3.0),
    Fault(name="api-internal-error", strike=_answers(status=500, count=3), heal=_calm, hold=3.0),
    Fault(name="api-hangs", strike=_answers(hang=1, count=1), heal=_calm, hold=5.0),
    Fault(name="api-answer-lost", strike=_answers(lose=1, count=2), heal=_calm, hold=3.0),
    Fault(name="watches-silent", strike=_answers(silent=1), heal=_calm, hold=4.0),
    Fault(name="deleted", strike=_delete()),
    Fault(name="deleted-by-force", strike=_delete("--force", "--grace-period=0")),
    Fault(name="namespace-deleted", strike=_delete_namespace, heal=_make_namespace),
    Fault(name="more-snapshots-of-the-vm", strike=_another_snapshot),
    Fault(name="status-forged", strike=_forge_status),
)
