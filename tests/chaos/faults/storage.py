"""Storage stops, fills up or refuses, and the processes of its drivers die or stop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import libvirt

from tests.chaos.annex import Annex
from tests.chaos.faults.base import DRIVERS, HASTY_SECONDS, At, Fault, NoEffectError, Scene, at, send
from tests.chaos.rules import OURS
from tests.chaos.seen import Finding
from tests.chaos.storage import ask, look
from tests.lab import LabError
from tests.lab.ceph import bindings
from tests.lab.run import run
from tests.stack import until
from vmsnapshot_operator.core.steps import Moment, Step


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
        found = workers(scene, class_name)
        if not found and number != signal.SIGCONT:
            raise NoEffectError("no process of a driver runs")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    return act


def _fill(scene: Scene) -> None:
    """No block is left in the pool of files. Its guests have all of theirs."""
    path = scene.lab.pool_path("reflink") / "filler"
    with path.open("wb") as out, contextlib.suppress(OSError):
        free = os.statvfs(path)
        os.posix_fallocate(out.fileno(), 0, max(1, free.f_bavail * free.f_frsize - 4 * 2**20))


def _fill_wholly(scene: Scene) -> None:
    """Not a block is left: not even those that a guest needs to write anew what a snapshot shares with it."""
    _fill(scene)
    path = scene.lab.pool_path("reflink") / "filler"
    with path.open("ab", buffering=0) as out:
        for size in (64 << 10, 4 << 10):
            with contextlib.suppress(OSError):
                while out.write(bytes(size)) == size:
                    os.fsync(out.fileno())
    probe = path.with_name("filler-probe")
    try:
        with probe.open("wb", buffering=0) as out:
            out.write(bytes(4 << 10))
            os.fsync(out.fileno())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    else:
        raise NoEffectError("the pool has room")
    finally:
        probe.unlink(missing_ok=True)
    end = time.monotonic() + 3.0
    while time.monotonic() < end and not _stands_for_room(scene):
        time.sleep(0.1)


def _stands_for_room(scene: Scene) -> bool:
    """Whether QEMU has paused the VM since it could not write."""
    return list(scene.guest.domain().state()) == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]


def _empty(scene: Scene) -> None:
    (scene.lab.pool_path("reflink") / "filler").unlink(missing_ok=True)


def _empty_and_resume(scene: Scene) -> None:
    """What an administrator does: he makes room, and lets the VM go on that QEMU paused when it could not write."""
    _empty(scene)
    if _stands_for_room(scene):
        scene.guest.domain().resume()


def _lock_pool(scene: Scene) -> None:
    """Nothing can be made or removed in the pool of files; what is in it can still be written."""
    run("chattr", "+i", scene.lab.pool_path("reflink"))


def _unlock_pool(scene: Scene) -> None:
    run("chattr", "-i", scene.lab.pool_path("reflink"))


def _fence_driver(scene: Scene) -> None:
    """Ceph shuts out the drivers' clients, as it does with a node that is taken for dead."""
    with scene.lab.ceph.connect() as (cluster, _):
        for session in ask(cluster, "sessions", target="a"):
            if session["entity_name"] == "client.vmsnapshot":
                where = session["addrs"]["addrvec"][0]
                scene.planted.append(f"{where['addr']}/{where['nonce']}")
        for address in scene.planted:
            ask(cluster, "osd blocklist", blocklistop="add", addr=address, expire=120.0)
    if not scene.planted:
        raise NoEffectError("no driver is connected to Ceph")


def _readmit_driver(scene: Scene) -> None:
    with scene.lab.ceph.connect() as (cluster, _):
        for address in scene.planted:
            ask(cluster, "osd blocklist", blocklistop="rm", addr=address)


# --- answers that are lost or come late, and a part that succeeds ------------------------------------------------------------------


def _order(what: str, scene: Scene) -> None:
    """Of the driver that is about to act (`Injector.orders`)."""
    scene.seen = scene.injector.obeyed
    scene.injector.orders[scene.detail] = what


def _lose_answer(scene: Scene) -> None:
    """The driver that is about to act does so, and dies before it says so."""
    _order("lose", scene)


def _one_fails_after_another(scene: Scene) -> None:
    """Another group has done it all, and then the driver of this one dies before it does anything."""
    assert scene.step is not None, "struck at a step"
    step = scene.step
    try:
        until("another group is done", lambda: scene.times(step, Moment.AFTER) > 0, 10)
    except LabError as error:
        raise NoEffectError(str(error)) from error
    _order("fail", scene)


def _must_have_obeyed(scene: Scene) -> None:
    scene.injector.orders.clear()
    if not _has_obeyed(scene):
        raise NoEffectError("no driver did anything meanwhile")


def _has_obeyed(scene: Scene) -> bool:
    return scene.injector.obeyed > scene.seen


def _stop_osd(scene: Scene) -> None:
    send("ceph-osd", signal.SIGSTOP)(scene)


def _cut_late(scene: Scene) -> None:
    """The storage does what it was asked for when nobody waits for it any more."""
    try:
        late = scene.times(Step.WINDOW_FREE, Moment.BEFORE) > 0
    finally:
        send("ceph-osd", signal.SIGCONT)(scene)
    if not late:
        raise NoEffectError("the window was not over yet")


# --- a group's snapshot cut short, and deletions that fail -------------------------------------------------------------------------


def _stop_qemu(scene: Scene) -> None:
    """The guest's client does not give the images' locks away: a group's snapshot begins, and does not come to its end."""
    scene.guest.kill(signal.SIGSTOP)


def _kill_driver_and_continue_qemu(scene: Scene) -> None:
    """Whoever makes the group's snapshot dies on the way; its record stays, incomplete."""
    try:
        incomplete = [g for g, group in look(scene.lab).groups.items() if not all(group.snaps.values())]
        _signal_workers(signal.SIGKILL, "ceph-vms")(scene)
    finally:
        scene.guest.kill(signal.SIGCONT)
    if not incomplete:
        raise NoEffectError("no group's snapshot was left incomplete")


def _let_deletion_fail(scene: Scene) -> None:
    """What the storages hold of the snapshot cannot be removed; it is then deleted, unless it is already."""
    held = look(scene.lab)
    files = [f for f in held.files if PurePath(f).name.startswith(OURS)]
    scene.planted += [
        f"{place}@{s.name}"
        for place, image in held.images.items()
        for s in image.snaps
        if s.name.startswith(OURS) and not s.group
    ]
    if not files and not scene.planted:
        raise NoEffectError("nothing is on storage that could be deleted")
    _lock_pool(scene)
    for handle in scene.planted:
        with _image(scene, handle) as (image, name):
            image.protect_snap(name)
    if not scene.deleted:
        scene.deleted = True
        scene.stack.delete(scene.name, namespace=scene.namespace, wait=False)
    scene.seen = scene.injector.reached[Step.ROLL_BACK, Moment.BEFORE]


def _let_deletion_succeed(scene: Scene) -> None:
    """Two tries have failed and the snapshot is still there, with what accounts for it: now it can be deleted."""
    gone = lambda: scene.stack.get(scene.name, scene.namespace) is None  # noqa: E731
    tries = lambda: scene.injector.reached[Step.ROLL_BACK, Moment.BEFORE] - scene.seen  # noqa: E731
    try:
        until("the deletion was tried twice more", lambda: tries() >= 2 or gone(), 90)
        if tries() < 2:  # whatever is left then on storage, the judge finds
            raise NoEffectError("it was deleted before storage refused")
        if gone():
            text = "it is gone, and storage let nobody delete what it held"
            scene.findings.append(Finding("leaked", f"VMSnapshot {scene.name}", text))
    except LabError as error:
        raise NoEffectError(str(error)) from error
    finally:
        _unlock_pool(scene)
        for handle in scene.planted:
            with _image(scene, handle) as (image, name), contextlib.suppress(bindings("rbd").Error):
                image.unprotect_snap(name)


def _let_removal_fail(scene: Scene) -> None:
    """Clones of a VM that will not be cannot be removed."""
    if not any(PurePath(f).name.startswith(OURS) for f in look(scene.lab).files):
        raise NoEffectError("there are no clones")
    _lock_pool(scene)
    scene.seen = scene.injector.reached[Step.REMOVE_CLONES, Moment.BEFORE]


def _let_removal_succeed(scene: Scene) -> None:
    tries = lambda: scene.injector.reached[Step.REMOVE_CLONES, Moment.BEFORE] - scene.seen  # noqa: E731
    gone = lambda: scene.stack.get_restore(scene.restores[0], scene.namespace) is None  # noqa: E731
    try:
        until("the removal was tried twice more", lambda: tries() >= 2 or gone(), 90)
        if gone():
            text = "it is gone, and storage let nobody remove its clones"
            scene.findings.append(Finding("leaked", f"VMRestore {scene.restores[0]}", text))
    except LabError as error:
        raise NoEffectError(str(error)) from error
    finally:
        _unlock_pool(scene)


@contextlib.contextmanager
def _image(scene: Scene, handle: str) -> Iterator[tuple[Any, str]]:
    place, _, name = handle.rpartition("@")
    rbd = bindings("rbd")
    with scene.lab.ceph.connect() as (_, ioctx), rbd.Image(ioctx, PurePath(place).name) as image:
        yield image, name


# A moment later it is done.
_DELETING = at([Step.ROLL_BACK, Step.ROLL_BACK_DRIVER, Step.EXPIRE], [At.BEFORE])
_TAKEN = at([Step.WINDOW_DISARM, Step.WINDOW_CLEAR, Step.KEEP, Step.SETTLE, Step.SETTLE_DRIVER])
_CUT = at(
    [
        Step.WINDOW_CUT,
        Step.WINDOW_BEGIN,
        Step.WINDOW_FREE,
        Step.KEEP,
        Step.AMEND,
        Step.SETTLE_JOB,
        Step.SETTLE_CHECKPOINT,
    ]
) | (_TAKEN | _DELETING)
"""From the cut on, where the VM writes to its own disks: before, a pool that is full is refused in time (`pool-full`)."""
_BEFORE_CUT = (Step.WINDOW_QUIESCE, At.AFTER)

FAULTS = (
    Fault(
        name="ceph-osd-stopped",
        strike=send("ceph-osd", signal.SIGSTOP),
        heal=send("ceph-osd", signal.SIGCONT),
        hold=12.0,
    ),
    Fault(
        name="ceph-mon-stopped",
        strike=send("ceph-mon", signal.SIGSTOP),
        heal=send("ceph-mon", signal.SIGCONT),
        hold=8.0,
    ),
    Fault(name="pool-full", strike=_fill, heal=_empty, hold=3.0),
    Fault(
        name="pool-wholly-full",
        strike=_fill_wholly,
        heal=_empty_and_resume,
        hold=5.0,
        only=_CUT,
        sure=(Step.SETTLE_DRIVER, At.BEFORE),
    ),
    Fault(name="pool-refuses", strike=_lock_pool, heal=_unlock_pool, hold=3.0, sure=_BEFORE_CUT),
    Fault(name="ceph-fences-its-driver", strike=_fence_driver, heal=_readmit_driver, hold=3.0, sure=_BEFORE_CUT),
    Fault(
        name="ceph-group-left-incomplete",
        guest=Annex.pair,
        strike=_stop_qemu,
        heal=_kill_driver_and_continue_qemu,
        hold=2.5,
        only=frozenset({_BEFORE_CUT, (Step.WINDOW_CUT, At.BEFORE)}),
        sure=_BEFORE_CUT,
    ),
    Fault(
        name="deletion-fails-twice",
        strike=_let_deletion_fail,
        heal=_let_deletion_succeed,
        only=_DELETING | _TAKEN,
        sure=(Step.ROLL_BACK, At.BEFORE),
    ),
    Fault(
        name="removal-of-clones-fails-twice",
        strike=_let_removal_fail,
        heal=_let_removal_succeed,
        only=at([Step.REMOVE_CLONES], [At.BEFORE]),
        sure=(Step.REMOVE_CLONES, At.BEFORE),
    ),
    Fault(
        name="driver-answer-lost",
        strike=_lose_answer,
        heal=_must_have_obeyed,
        over=_has_obeyed,
        hold=10.0,
        only=at(DRIVERS, [At.BEFORE]),
    ),
    Fault(
        name="one-group-fails-after-another",
        strike=_one_fails_after_another,
        heal=_must_have_obeyed,
        over=_has_obeyed,
        hold=10.0,
        only=at([Step.PREPARE_DRIVER, Step.WINDOW_CUT, Step.REVERT_DRIVER, Step.CLONE_DRIVER], [At.BEFORE]),
    ),
    Fault(
        name="cut-comes-after-the-window",
        strike=_stop_osd,
        heal=_cut_late,
        hold=HASTY_SECONDS + 3.0,
        hasty=True,
        about="ceph-vms",
        only=at([Step.WINDOW_CUT], [At.BEFORE]),
    ),
    Fault(name="drivers-killed", strike=_signal_workers(signal.SIGKILL)),
    Fault(name="ceph-driver-crashed", strike=_signal_workers(signal.SIGSEGV, "ceph-vms")),
    Fault(name="file-driver-crashed", strike=_signal_workers(signal.SIGSEGV, "reflink-files")),
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
