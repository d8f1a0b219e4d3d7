"""The hypervisor, the guest and its agent misbehave, and somebody else works on the VM."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import xml.etree.ElementTree as ET
from collections.abc import Callable

import libvirt

from tests.chaos.claims import PLUGGED
from tests.chaos.faults.base import (
    FROZEN,
    IN_PLACE,
    OFF,
    TAKING,
    At,
    Fault,
    NoEffectError,
    Scene,
    at,
    kill,
    send,
    start,
    unhurried,
)
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.lab.run import run
from tests.stack import until
from vmsnapshot_operator.core.markers import GATE_NAMESPACE
from vmsnapshot_operator.core.steps import Step

LATE_SECONDS = 7.0
"""Longer than the operator waits for any answer of an agent but the one to its freeze: the answer comes when nobody waits for it."""
SAVED_SECONDS = 10.0
"""So long a VM that was saved while it was frozen may be frozen when it comes back: the guardian sees its journal, and frees it at once."""
_INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE


def _while_it_runs(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """A restore stops the VM: there is nothing to be done to a guest that is off."""

    @functools.wraps(act)
    def strike(scene: Scene) -> None:
        if not scene.guest.domain().isActive():
            raise NoEffectError("the VM is off")
        try:
            act(scene)
        except (LabError, libvirt.libvirtError) as error:
            if scene.guest.domain().isActive():
                raise
            raise NoEffectError(f"the VM went off meanwhile: {error}") from error

    return strike


def _mended(act: Callable[[Scene], None]) -> Callable[[Scene], None]:
    """What was done inside of a guest is gone with it: one that is off, or was started anew, needs no mending."""

    @functools.wraps(act)
    def heal(scene: Scene) -> None:
        try:
            act(scene)
        except (LabError, libvirt.libvirtError):
            if not scene.restores:
                raise

    return heal


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


def _fail_freeze(scene: Scene) -> None:
    scene.guest.fail_hook(when="freeze")


def _mend_freeze(scene: Scene) -> None:
    scene.guest.fail_hook(fail=False, when="freeze")


def _fail_thaw(scene: Scene) -> None:
    scene.guest.fail_hook(when="thaw")


def _mend_thaw(scene: Scene) -> None:
    scene.guest.fail_hook(fail=False, when="thaw")


def _thaw_inside(*targets: str) -> Callable[[Scene], None]:
    """Somebody in the guest thaws file systems by hand: the agent then thaws fewer than it froze, or none."""

    def strike(scene: Scene) -> None:
        try:
            for target in targets:
                scene.guest.control(["fsfreeze", "--unfreeze", f"/mnt/{target}"])
        except LabError as error:  # one that is not frozen refuses
            raise NoEffectError(str(error)) from error

    return strike


def _reset(scene: Scene) -> None:
    scene.guest.domain().reset()


def _destroy(scene: Scene) -> None:
    scene.guest.destroy()


def _up(scene: Scene) -> None:
    """A VM that is being restored is not started by whoever mends: that is a fault of its own."""
    if not scene.restores:
        scene.guest.up()


def _suspend(scene: Scene) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        scene.guest.domain().suspend()


def _save(scene: Scene) -> None:
    """A host shuts down as many do: it saves its VMs, with the memory of a guest that is frozen."""
    if scene.guest.freeze_status() != "frozen":
        raise NoEffectError("the guest is not frozen")
    scene.patient = True  # a sweep frees it, and the next one sees that nobody accounts for its overlays
    scene.guest.domain().managedSave()


def _start_with_its_memory(scene: Scene) -> None:
    """The host is up again and starts it: its memory comes back as it was, frozen."""
    domain = scene.guest.domain()
    if not domain.hasManagedSaveImage():
        return
    domain.create()
    try:
        until("the guest is thawed", lambda: scene.guest.freeze_status() == "thawed", SAVED_SECONDS)
    except LabError as error:
        scene.findings.append(Finding("frozen", f"guest {scene.guest.name}", f"it was saved while frozen: {error}"))


def _resume(scene: Scene) -> None:
    domain = scene.guest.domain()
    with contextlib.suppress(libvirt.libvirtError):  # a restore may just have stopped it
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()


def _suspend_and_resume(scene: Scene) -> None:
    _suspend(scene)
    _resume(scene)


def _note_definition(scene: Scene) -> None:
    scene.definition = scene.guest.domain().XMLDesc(_INACTIVE)


def _redefine(scene: Scene) -> None:
    """Somebody edits the definition, and what he had opened is from before anything began: our marks are gone from it, and where
    disks were taken away they are there again. Overlays stay: whoever throws those away destroys his VM himself.
    """
    xml = scene.definition if scene.restores else scene.guest.domain().XMLDesc(_INACTIVE)
    root = ET.fromstring(xml)  # noqa: S314 - libvirt's own
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    scene.guest.connection().defineXML(ET.tostring(root, encoding="unicode"))
    scene.redefined = True


def _start_meanwhile(scene: Scene) -> None:
    """Somebody starts the VM that is being set back: while its disks are neither old nor new, that must not be possible."""
    domain = scene.guest.domain()
    if domain.isActive():
        raise NoEffectError("it runs")
    gated = GATE_NAMESPACE in domain.XMLDesc(_INACTIVE)
    try:
        domain.create()
    except libvirt.libvirtError:
        return  # the gate held, or it is just being defined
    if gated and GATE_NAMESPACE in domain.XMLDesc(_INACTIVE):
        text = "it could be started while its disks were neither old nor new"
        scene.findings.append(Finding("lied", f"domain {scene.guest.name}", text))


def _hurt_new_vm(act: Callable[[libvirt.virDomain], object]) -> Callable[[Scene], None]:
    """Somebody does this to the VM that a restore has made."""

    def strike(scene: Scene) -> None:
        name = scene.new_vms[scene.restores[0]]
        connection = scene.lab.libvirt()
        try:
            scene.started = True
            act(connection.lookupByName(name))
        except libvirt.libvirtError as error:
            raise NoEffectError(f"{name}: {error}") from error
        finally:
            connection.close()

    return strike


def _start_new_vm_again(scene: Scene) -> None:
    """A VM that a restore has started, and that does not run, is waited for: somebody starts it."""
    with contextlib.suppress(NoEffectError):  # it runs
        _hurt_new_vm(_start_domain)(scene)


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


def _plugged(scene: Scene) -> tuple[str, str]:
    path = str(scene.lab.pool_path("reflink") / "hotplugged.raw")
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{path}'/>"
        f"<target dev='{PLUGGED}' bus='virtio'/></disk>"
    )
    return path, disk


def _hotplug(scene: Scene) -> None:
    """Into the VM that runs; into the definition of one that is off."""
    path, disk = _plugged(scene)
    with open(path, "wb"):  # noqa: PTH123 - made empty
        pass
    os.truncate(path, 8 << 20)
    run("mkfs.ext4", "-q", "-F", path)  # the judge reads what a snapshot has of it
    try:
        scene.guest.domain().attachDevice(disk)
    except libvirt.libvirtError as error:
        raise NoEffectError(str(error)) from error


def _unplug(scene: Scene) -> None:
    path, disk = _plugged(scene)

    both = ((0, libvirt.VIR_DOMAIN_AFFECT_LIVE), (libvirt.VIR_DOMAIN_XML_INACTIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG))

    def gone() -> bool:
        domain = scene.guest.domain()
        there = [affect for shown, affect in both if PLUGGED in domain.XMLDesc(shown)]
        for affect in there:
            # Again and again: whoever is defining the VM just now may put it back.
            with contextlib.suppress(libvirt.libvirtError):
                domain.detachDeviceFlags(disk, affect)
        return not there

    until("the disk is unplugged", gone, 60)
    os.unlink(path)  # noqa: PTH108 - a path as a text


def _destroy_domain(domain: libvirt.virDomain) -> None:
    domain.destroy()


def _start_domain(domain: libvirt.virDomain) -> None:
    domain.create()


def _reset_domain(domain: libvirt.virDomain) -> None:
    domain.reset()


_BEFORE_THE_FREEZE = at(
    [
        Step.ADOPT,
        Step.PREPARE,
        Step.PREPARE_INTENT,
        Step.PREPARE_OVERLAYS,
        Step.PREPARE_RESERVE,
        Step.PREPARE_DRIVER,
        Step.WINDOW_JOURNAL,
        Step.WINDOW_ARM,
    ]
) | at([Step.TAKE_WINDOW, Step.WINDOW_QUIESCE], [At.BEFORE])
_MADE = at([Step.HAND_OVER, Step.CLONE_KEEP, Step.START]) | {(Step.CLONE_DEFINE, At.AFTER), (Step.CLONE, At.AFTER)}
"""Where the new VM is defined. Nobody undefines it here: its disks would be his to delete then."""
_STARTED = at([Step.START], [At.AFTER])
"""Where it runs."""

FAULTS = (
    Fault(
        name="libvirtd-hangs-for-long",
        strike=send("libvirtd", signal.SIGSTOP),
        heal=send("libvirtd", signal.SIGCONT),
        hold=40.0,
        slow=True,
    ),
    Fault(name="libvirtd-killed", strike=kill("libvirtd"), heal=start("libvirtd"), hold=1.0),
    Fault(
        name="libvirtd-hangs",
        strike=send("libvirtd", signal.SIGSTOP),
        heal=send("libvirtd", signal.SIGCONT),
        hold=6.0,
    ),
    Fault(name="agent-hangs", strike=_while_it_runs(_hang_agent), heal=_unhang_agent, hold=4.0),
    Fault(
        name="agent-answers-late", strike=_while_it_runs(_hang_agent), heal=_unhang_agent, hold=LATE_SECONDS, hasty=True
    ),
    Fault(name="agent-ended", strike=_while_it_runs(_end_agent), heal=_mended(_start_agent), hold=2.0),
    Fault(name="agent-hook-fails", strike=_while_it_runs(_fail_hook), heal=_mended(_mend_hook), hold=3.0),
    Fault(
        name="agent-fails-at-freeze",
        strike=_while_it_runs(_fail_freeze),
        heal=_mended(_mend_freeze),
        hold=3.0,
        only=_BEFORE_THE_FREEZE,
        sure=(Step.WINDOW_ARM, At.AFTER),
    ),
    Fault(name="agent-fails-at-thaw", strike=_while_it_runs(_fail_thaw), heal=_mended(_mend_thaw), hold=3.0),
    Fault(name="thawed-inside-the-guest", strike=_thaw_inside("vda"), only=FROZEN),
    Fault(name="all-thawed-inside-the-guest", strike=_thaw_inside("vdc", "vdb", "vda"), only=FROZEN),
    Fault(name="guest-reset", strike=_while_it_runs(_reset), heal=_up),
    Fault(name="guest-destroyed", strike=_while_it_runs(_destroy), heal=_up, hold=1.0),
    Fault(name="guest-paused", strike=_while_it_runs(_suspend), heal=_resume, hold=3.0),
    Fault(name="guest-paused-and-resumed", strike=_while_it_runs(_suspend_and_resume), heal=_resume),
    Fault(
        name="guest-saved",
        prepare=unhurried,
        strike=_while_it_runs(_save),
        heal=_start_with_its_memory,
        hold=3.0,
        only=FROZEN | {(Step.WINDOW_SWITCH, At.BEFORE), (Step.WINDOW_BEGIN, At.BEFORE)},
    ),
    Fault(name="guest-redefined", prepare=_note_definition, strike=_redefine),
    Fault(name="guest-started", strike=_start_meanwhile, only=OFF, sure=(Step.REVERT_DRIVER, At.BEFORE)),
    Fault(
        name="guest-migrated",
        prepare=_two_hosts,
        strike=_while_it_runs(_migrate),
        leave=_one_host,
    ),
    Fault(
        name="guest-migrated-and-back",
        prepare=_two_hosts,
        strike=_while_it_runs(_migrate),
        heal=_mended(_bring_home),
        leave=_one_host,
    ),
    Fault(name="disk-hotplugged", strike=_hotplug, heal=_unplug, hold=2.0, only=TAKING | IN_PLACE),
    Fault(
        name="new-vm-destroyed",
        strike=_hurt_new_vm(_destroy_domain),
        heal=_start_new_vm_again,
        hold=3.0,
        only=_STARTED,
        sure=(Step.START, At.AFTER),
    ),
    Fault(
        name="new-vm-started",
        strike=_hurt_new_vm(_start_domain),
        only=_MADE - _STARTED,
        sure=(Step.HAND_OVER, At.BEFORE),
    ),
    Fault(name="new-vm-reset", strike=_hurt_new_vm(_reset_domain), only=_STARTED, sure=(Step.START, At.AFTER)),
)
