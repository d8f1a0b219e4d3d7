"""Storage stops, fills up or refuses, and the processes of its drivers die or stop."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.chaos.faults.base import Fault, Scene, send


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
