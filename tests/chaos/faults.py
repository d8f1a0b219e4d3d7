"""What can go wrong, as data: how it is done to the real parts, and how it is mended.

A fault strikes while the operator stands before or after a step, or a moment after it was let go on. `heal` is always called, and
leaves the laboratory as a new fault expects it; the operator runs again afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import libvirt

from tests.chaos.apiproxy import ApiProxy, Trouble
from tests.chaos.injector import Injector
from tests.lab import Lab, LabError
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack, until
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


# --- the operator and its guardian -----------------------------------------------------------------------------------------


def _kill_operator(scene: Scene) -> None:
    scene.stack.programs["operator"].kill()


def _kill_group(scene: Scene) -> None:
    program = scene.stack.programs["operator"]
    os.killpg(program.pid, signal.SIGKILL)
    program.process.wait(30)


def _end_operator(scene: Scene) -> None:
    scene.stack.programs["operator"].process.terminate()


def _start_operator(scene: Scene) -> None:
    program = scene.stack.programs["operator"]
    if program.process.poll() is None:
        program.stop()
    scene.stack.start_operator()


def _start_and_kill_again(scene: Scene) -> None:
    scene.stack.start_operator(wait=False)
    time.sleep(scene.random.uniform(0.5, 4.0))
    scene.stack.programs["operator"].kill()
    scene.stack.start_operator()


def _stop_until_another_took_over(scene: Scene) -> None:
    """SIGSTOP; another instance takes the lease over; what was stopped then goes on beside it."""
    scene.stack.programs["operator"].kill(signal.SIGSTOP)
    scene.stack.start_operator("standby", wait=False)


def _go_on_beside_another(scene: Scene) -> None:
    with contextlib.suppress(LabError):
        until("another instance took over", lambda: _leader(scene) == "standby", 60)
    scene.stack.programs["operator"].kill(signal.SIGCONT)
    time.sleep(2)
    scene.stack.programs.pop("standby").stop()


def _leader(scene: Scene) -> str:
    return scene.lab.kubectl(
        "-n", "vmsnapshot-system", "get", "lease", "vmsnapshot-operator", "-o", "jsonpath={.spec.holderIdentity}"
    ).strip()


def _second_operator(scene: Scene) -> None:
    scene.stack.start_operator("second", wait=False)


def _end_second_operator(scene: Scene) -> None:
    scene.stack.programs.pop("second").stop()


def _kill_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill()


def _start_guardian(scene: Scene) -> None:
    if scene.stack.programs["guardian"].process.poll() is not None:
        scene.stack.start_guardian()


def _kill_both(scene: Scene) -> None:
    _kill_guardian(scene)
    _kill_operator(scene)


def _start_both(scene: Scene) -> None:
    _start_guardian(scene)
    _start_operator(scene)


def _step_clock(seconds: int) -> Callable[[Scene], None]:
    """The operator's wall clock is wrong from its next step on."""

    def strike(scene: Scene) -> None:
        scene.injector.clock_seconds = seconds

    return strike


def _stop_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill(signal.SIGSTOP)


def _continue_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill(signal.SIGCONT)


# --- the API server ----------------------------------------------------------------------------------------------------------


def _kill(component: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.lab.component(component).kill()

    return strike


def _start(component: str) -> Callable[[Scene], None]:
    def heal(scene: Scene) -> None:
        scene.lab.component(component).start()

    return heal


def _signal(component: str, number: int) -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        scene.lab.component(component).kill(number)

    return act


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


# --- the hypervisor and the guest ------------------------------------------------------------------------------------------------


def _hang_agent(scene: Scene) -> None:
    scene.guest.hang_agent()


def _unhang_agent(scene: Scene) -> None:
    with contextlib.suppress(LabError):  # it may have been ended and started again
        scene.guest.hang_agent(hang=False)


def _end_agent(scene: Scene) -> None:
    scene.guest.end_agent()


def _start_agent(scene: Scene) -> None:
    scene.guest.end_agent(end=False)


def _fail_hook(scene: Scene) -> None:
    scene.guest.fail_hook()


def _mend_hook(scene: Scene) -> None:
    scene.guest.fail_hook(fail=False)


def _thaw_inside(scene: Scene) -> None:
    """Somebody in the guest thaws one file system by hand."""
    with contextlib.suppress(LabError):  # one that is not frozen refuses
        scene.guest.control(["fsfreeze", "--unfreeze", "/mnt/vda"])


def _reset(scene: Scene) -> None:
    scene.guest.domain().reset()


def _destroy(scene: Scene) -> None:
    scene.guest.destroy()


def _up(scene: Scene) -> None:
    scene.guest.up()


def _suspend(scene: Scene) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().suspend()


def _resume(scene: Scene) -> None:
    domain = scene.guest.domain()
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()


def _suspend_and_resume(scene: Scene) -> None:
    _suspend(scene)
    _resume(scene)


def _redefine(scene: Scene) -> None:
    """Somebody edits the definition: our journal may be gone from it."""
    connection = scene.guest.connection()
    xml = scene.guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    start, end = xml.find("<metadata>"), xml.find("</metadata>")
    if start >= 0:
        xml = xml[:start] + xml[end + len("</metadata>") :]
    connection.defineXML(xml)


def _hotplug(scene: Scene) -> None:
    path = scene.lab.pool_path("reflink") / "hotplugged.raw"
    path.write_bytes(b"")
    os.truncate(path, 2**20)
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='vdx' bus='virtio'/></disk>"
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().attachDevice(disk)


def _unplug(scene: Scene) -> None:
    path = scene.lab.pool_path("reflink") / "hotplugged.raw"
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='vdx' bus='virtio'/></disk>"
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().detachDevice(disk)
    until("the disk is unplugged", lambda: "vdx" not in scene.guest.domain().XMLDesc(), 60)
    path.unlink(missing_ok=True)


# --- the storage and its drivers ----------------------------------------------------------------------------------------------------


def workers(scene: Scene, class_name: str = "") -> list[int]:
    """Numbers of the driver processes (of one class) of this suite's operators: a process names the operator that started it."""
    operators = {str(p.pid).encode() for p in scene.stack.programs.values()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            ours = b"vmsnapshot_operator.drivers.worker" in words and operators & set(words)
            if ours and (not class_name or class_name.encode() in words):
                found.append(int(entry.name))
    return found


def _signal_workers(number: int, class_name: str = "") -> Callable[[Scene], None]:
    def act(scene: Scene) -> None:
        for pid in workers(scene, class_name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return act


def _fill(scene: Scene) -> None:
    """No block is left in the pool of files. Its guests have all of theirs."""
    path = scene.lab.pool_path("reflink") / "filler"
    with path.open("wb") as out, contextlib.suppress(OSError):
        free = os.statvfs(path)
        os.posix_fallocate(out.fileno(), 0, max(1, free.f_bavail * free.f_frsize - 4 * 2**20))


def _empty(scene: Scene) -> None:
    (scene.lab.pool_path("reflink") / "filler").unlink(missing_ok=True)


FAULTS: tuple[Fault, ...] = (
    Fault(name="operator-killed", strike=_kill_operator, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-with-its-group", strike=_kill_group, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-twice", strike=_kill_operator, heal=_start_and_kill_again, ends_operator=True),
    Fault(name="operator-ended", strike=_end_operator, heal=_start_operator),
    Fault(
        name="operator-stopped-while-another-takes-over",
        strike=_stop_until_another_took_over,
        heal=_go_on_beside_another,
        slow=True,
    ),
    Fault(name="second-operator", strike=_second_operator, heal=_end_second_operator, hold=4.0),
    Fault(name="clock-an-hour-ahead", strike=_step_clock(3600), heal=_step_clock(0), hold=2.0),
    Fault(name="clock-an-hour-behind", strike=_step_clock(-3600), heal=_step_clock(0), hold=2.0),
    Fault(name="guardian-killed", strike=_kill_guardian, heal=_start_guardian, hold=1.0),
    Fault(name="guardian-stopped", strike=_stop_guardian, heal=_continue_guardian, hold=3.0),
    Fault(name="guardian-and-operator-killed", strike=_kill_both, heal=_start_both, ends_operator=True),
    Fault(name="apiserver-killed", strike=_kill("kube-apiserver"), heal=_start("kube-apiserver"), hold=1.0),
    Fault(name="etcd-killed", strike=_kill("etcd"), heal=_start_etcd, hold=1.0),
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
    Fault(name="libvirtd-killed", strike=_kill("libvirtd"), heal=_start("libvirtd"), hold=1.0),
    Fault(
        name="libvirtd-hangs",
        strike=_signal("libvirtd", signal.SIGSTOP),
        heal=_signal("libvirtd", signal.SIGCONT),
        hold=6.0,
    ),
    Fault(name="agent-hangs", strike=_hang_agent, heal=_unhang_agent, hold=4.0),
    Fault(name="agent-ended", strike=_end_agent, heal=_start_agent, hold=2.0),
    Fault(name="agent-hook-fails", strike=_fail_hook, heal=_mend_hook, hold=3.0),
    Fault(name="thawed-inside-the-guest", strike=_thaw_inside, only=WINDOW),
    Fault(name="guest-reset", strike=_reset, heal=_up),
    Fault(name="guest-destroyed", strike=_destroy, heal=_up, hold=1.0),
    Fault(name="guest-paused", strike=_suspend, heal=_resume, hold=3.0),
    Fault(name="guest-paused-and-resumed", strike=_suspend_and_resume, heal=_resume),
    Fault(name="guest-redefined", strike=_redefine),
    Fault(name="disk-hotplugged", strike=_hotplug, heal=_unplug, hold=2.0, only=TAKING),
    Fault(
        name="ceph-osd-stopped",
        strike=_signal("ceph-osd", signal.SIGSTOP),
        heal=_signal("ceph-osd", signal.SIGCONT),
        hold=12.0,
    ),
    Fault(
        name="ceph-mon-stopped",
        strike=_signal("ceph-mon", signal.SIGSTOP),
        heal=_signal("ceph-mon", signal.SIGCONT),
        hold=8.0,
    ),
    Fault(name="pool-full", strike=_fill, heal=_empty, hold=3.0),
    Fault(name="drivers-killed", strike=_signal_workers(signal.SIGKILL)),
    Fault(name="ceph-driver-crashed", strike=_signal_workers(signal.SIGSEGV, "ceph-vms")),
    Fault(
        name="file-driver-stopped",
        strike=_signal_workers(signal.SIGSTOP, "reflink-files"),
        heal=_signal_workers(signal.SIGCONT),
        hold=20.0,
        slow=True,
    ),
    Fault(
        name="ceph-driver-stopped",
        strike=_signal_workers(signal.SIGSTOP, "ceph-vms"),
        heal=_signal_workers(signal.SIGCONT),
        hold=20.0,
        slow=True,
    ),
)
"""Every kind of fault. Where a fault is met, the step says."""
