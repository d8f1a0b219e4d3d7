"""The hypervisor, the guest and its agent misbehave."""

from __future__ import annotations

import contextlib
import os
import signal

import libvirt

from tests.chaos.claims import PLUGGED
from tests.chaos.faults.base import FROZEN, TAKING, Fault, NoEffectError, Scene, kill, send, start
from tests.lab import LabError
from tests.lab.run import run
from tests.stack import until

LATE_SECONDS = 7.0
"""Longer than the operator waits for any answer of an agent but the one to its freeze: the answer comes when nobody waits for it."""


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


def _fail_thaw(scene: Scene) -> None:
    scene.guest.fail_hook(when="thaw")


def _mend_thaw(scene: Scene) -> None:
    scene.guest.fail_hook(fail=False, when="thaw")


def _thaw_inside(scene: Scene) -> None:
    """Somebody in the guest thaws one file system by hand: the agent then thaws fewer than it froze."""
    try:
        scene.guest.control(["fsfreeze", "--unfreeze", "/mnt/vda"])
    except LabError as error:  # one that is not frozen refuses
        raise NoEffectError(str(error)) from error


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


def _two_hosts(scene: Scene) -> None:
    scene.annex.second_host()


def _migrate(scene: Scene) -> None:
    """To the second host, live, frozen or not."""
    second = next(h for h in scene.lab.hosts if h != scene.lab.host)
    try:
        scene.guest.migrate(second)
    except LabError as error:
        raise NoEffectError(str(error)) from error


def _bring_home(scene: Scene) -> None:
    scene.annex.bring_home(scene.guest)


def _one_host(scene: Scene) -> None:
    scene.annex.one_host(scene.guest)


def _hotplug(scene: Scene) -> None:
    path = scene.lab.pool_path("reflink") / "hotplugged.raw"
    path.write_bytes(b"")
    os.truncate(path, 8 << 20)
    run("mkfs.ext4", "-q", "-F", path)  # the judge reads what a snapshot has of it
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='{PLUGGED}' bus='virtio'/></disk>"
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().attachDevice(disk)


def _unplug(scene: Scene) -> None:
    path = scene.lab.pool_path("reflink") / "hotplugged.raw"
    disk = f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/><target dev='{PLUGGED}' bus='virtio'/></disk>"
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().detachDevice(disk)
    until("the disk is unplugged", lambda: PLUGGED not in scene.guest.domain().XMLDesc(), 60)
    path.unlink(missing_ok=True)


FAULTS = (
    Fault(name="libvirtd-killed", strike=kill("libvirtd"), heal=start("libvirtd"), hold=1.0),
    Fault(
        name="libvirtd-hangs",
        strike=send("libvirtd", signal.SIGSTOP),
        heal=send("libvirtd", signal.SIGCONT),
        hold=6.0,
    ),
    Fault(name="agent-hangs", strike=_hang_agent, heal=_unhang_agent, hold=4.0),
    Fault(name="agent-answers-late", strike=_hang_agent, heal=_unhang_agent, hold=LATE_SECONDS),
    Fault(name="agent-ended", strike=_end_agent, heal=_start_agent, hold=2.0),
    Fault(name="agent-hook-fails", strike=_fail_hook, heal=_mend_hook, hold=3.0),
    Fault(name="agent-fails-at-thaw", strike=_fail_thaw, heal=_mend_thaw, hold=3.0),
    Fault(name="thawed-inside-the-guest", strike=_thaw_inside, only=FROZEN),
    Fault(name="guest-reset", strike=_reset, heal=_up),
    Fault(name="guest-destroyed", strike=_destroy, heal=_up, hold=1.0),
    Fault(name="guest-paused", strike=_suspend, heal=_resume, hold=3.0),
    Fault(name="guest-paused-and-resumed", strike=_suspend_and_resume, heal=_resume),
    Fault(name="guest-redefined", strike=_redefine),
    Fault(
        name="guest-migrated",
        prepare=_two_hosts,
        strike=_migrate,
        leave=_one_host,
    ),
    Fault(
        name="guest-migrated-and-back",
        prepare=_two_hosts,
        strike=_migrate,
        heal=_bring_home,
        leave=_one_host,
    ),
    Fault(name="disk-hotplugged", strike=_hotplug, heal=_unplug, hold=2.0, only=TAKING),
)
