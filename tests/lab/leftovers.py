"""Find and end whatever belongs to a laboratory without asking its supervisor: it may be gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.errors import LabError
from tests.lab.run import run
from tests.lab.supervisor import MARKER

_PROGRAMS = {"etcd", "kube-apiserver", "kube-controller", "ceph-mon", "ceph-osd", "libvirtd", "qemu-system-x86"}
"""Names as the kernel keeps them, cut to 15 characters. QEMU gets a fresh environment from libvirtd, hence without the marker."""


def found(state: Path) -> list[str]:
    """Processes, mounts and loop devices that belong to the laboratory at `state`, in words."""
    return [
        *(f"process {pid}: {words[:100]}" for pid, words in sorted(processes(state).items())),
        *(f"mount {path}" for path in mounts(state)),
        *(f"loop device {name}" for name in _loops(state)),
    ]


def processes(state: Path) -> dict[int, str]:
    """Processes of this laboratory, with their command lines; this process and its ancestors left out."""
    mine = set(_ancestors())
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {pid: words for pid in pids if pid not in mine and (words := _words_of_ours(pid, state)) is not None}


def mounts(state: Path, pid: str = "self") -> list[Path]:
    """File systems below the state folder, the last one first, as a process sees them."""
    try:
        lines = Path(f"/proc/{pid}/mounts").read_text().splitlines()
    except OSError:  # it ended meanwhile
        return []
    targets = [Path(line.split()[1].encode().decode("unicode_escape")) for line in lines]
    return [t for t in reversed(targets) if t.is_relative_to(state)]


def clear(state: Path, seconds: float = 20) -> None:
    """End all processes, then mounts (loop devices go with them). What resists is what `found` says afterwards."""
    end = time.monotonic() + seconds
    while (left := processes(state)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    while (mounts(state) or _loops(state)) and time.monotonic() < end:
        for namespace in _namespaces(state):
            for target in mounts(state, namespace):
                enter = ["nsenter", "--mount", f"--target={namespace}"]
                # Right after the end of a process its own namespace may still hold the file system: tried again.
                subprocess.run([*enter, "umount", str(target)], capture_output=True, check=False, timeout=60)
        time.sleep(0.02)


def _namespaces(state: Path) -> Iterator[str]:
    """One process of each mount namespace in which something of ours is mounted.

    Whoever makes a namespace while a laboratory runs (another laboratory does) takes copies of its mounts along, and would keep its
    loop devices.
    """
    seen = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            namespace = (entry / "ns" / "mnt").readlink()
        except OSError:  # a thread of the kernel, or it ended meanwhile
            continue
        if namespace not in seen and mounts(state, entry.name):
            yield entry.name
        seen.add(namespace)


def _words_of_ours(pid: int, state: Path) -> str | None:
    """Command line of a process if it belongs to this laboratory."""
    entry = Path(f"/proc/{pid}")
    try:
        words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        marked = f"{MARKER}={state}".encode() in (entry / "environ").read_bytes().split(b"\0")
        if marked or ((entry / "comm").read_text().strip() in _PROGRAMS and f"{state}/" in words):
            return words
    except OSError:  # it ended meanwhile
        return None
    return None


def _ancestors() -> Iterator[int]:
    pid = os.getpid()
    while pid > 1:
        yield pid
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _loops(state: Path) -> list[str]:
    try:
        listed = json.loads(run("losetup", "--list", "--json") or "{}").get("loopdevices", [])
    except LabError:  # no loop devices on this machine at all
        return []
    return [str(loop["name"]) for loop in listed if str(loop["back-file"] or "").startswith(f"{state}/")]
