"""Measurements of the overlay quiesce and of the way back, against the bare calls on the same guest."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libvirt
import rbd

from tests import proof
from tests.benchmarks.result import Result
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.lab.run import run
from tests.stack import Stack, until

OVERLAY_GOAL = 0.85
COPY_GOAL = 1.1
BIG_MIB = 4096


def overlay(stack: Stack, pairs: int) -> Iterator[Result]:
    """How long the guest was frozen, by its own clock: our switch to overlays against `virsh snapshot-create-as --quiesce`."""
    guest = stack.lab.guest("demo")
    frozen: dict[str, list[float]] = {"ours": [], "against": []}
    whole: dict[str, list[float]] = {"ours": [], "against": []}
    for number in range(pairs + 1):  # the first pair warms caches and is not counted
        _forget_freezes(guest)
        begun = time.monotonic()
        name = stack.snapshot(f"bench-overlay-{number}", quiesce={"method": "HypervisorSnapshot"})
        stack.wait(name)
        until("the VM is on its own disks", lambda: not _on_overlays(stack.lab, guest))
        ours = (_frozen(guest), (time.monotonic() - begun) * 1000)
        stack.delete(name)
        _forget_freezes(guest)
        begun = time.monotonic()
        _virsh(stack.lab, guest, number)
        against = (_frozen(guest), (time.monotonic() - begun) * 1000)
        if number:
            for kept, seen in (("ours", ours), ("against", against)):
                frozen[kept].append(seen[0])
                whole[kept].append(seen[1])
    yield Result(
        name="overlay",
        unit="ms frozen",
        ours=frozen["ours"],
        against=frozen["against"],
        ours_is="in the guest, by its freeze hook",
        against_is="virsh snapshot-create-as --disk-only --atomic --quiesce",
        goal=f"median ratio at most {OVERLAY_GOAL:.2f}",
    ).judged(OVERLAY_GOAL)
    yield Result(
        name="overlay-whole",
        unit="ms",
        ours=whole["ours"],
        against=whole["against"],
        ours_is="from apply to Ready, and the VM on its own disks again",
        against_is="the same by virsh, with blockcommit --pivot",
    )


def _virsh(lab: Lab, guest: Guest, number: int) -> None:
    virsh = ["virsh", "-c", guest.host.uri]
    folder = lab.pool_path("reflink")
    made = {t: folder / f"bench-{number}-{t}.qcow2" for t in guest.disks}
    specs = [word for t, p in made.items() for word in ("--diskspec", f"{t},snapshot=external,file={p}")]
    run(*virsh, "snapshot-create-as", guest.name, "--disk-only", "--atomic", "--quiesce", "--no-metadata", *specs)
    for target in made:
        run(*virsh, "blockcommit", guest.name, target, "--active", "--pivot", "--wait")
    for path in made.values():
        path.unlink()


def _on_overlays(lab: Lab, guest: Guest) -> bool:
    connection = lab.libvirt()
    try:
        return "/ovl-" in connection.lookupByName(guest.name).XMLDesc()
    finally:
        connection.close()


def _forget_freezes(guest: Guest) -> None:
    guest.control(["sh", "-c", ": > /run/fsfreeze-hook.log"])


def _frozen(guest: Guest) -> float:
    """Milliseconds between the calls of the guest's hook: to a hundredth of a second."""
    lines = [line.split() for line in guest.control(["cat", "/run/fsfreeze-hook.log"]).splitlines()]
    times = {word: float(moment) for word, moment in lines}
    return max(10.0, (times["thaw"] - times["freeze"]) * 1000)


def restore(stack: Stack, pairs: int) -> Iterator[Result]:
    """A restore in place, and to a new VM, of three disks: from apply to Ready against the bare calls of storage and libvirt."""
    guest = stack.lab.guest("demo")
    snapshot = stack.snapshot("bench-restore", quiesce={"policy": "Require"})
    stack.wait(snapshot)
    content = stack.content(snapshot)
    assert content is not None
    handles = {v["target"]: v["handle"] for v in content["spec"]["volumes"]}
    number = max(3, pairs // 3)
    try:
        ours, against = [], []
        for n in range(number):
            begun = time.monotonic()
            name = stack.restore(f"bench-new-{n}", snapshot, mode="NewVM", newVM={"name": f"demo-bench-{n}"})
            stack.wait_restore(name)
            ours.append((time.monotonic() - begun) * 1000)
            stack.delete_restore(name)
            proof.remove_vm(stack.lab, f"demo-bench-{n}")
            against.append(_bare_clones(stack.lab, guest, handles, n))
        yield _restored("restore-new-vm", ours, against, "a reflink copy of each file, an RBD copy, a definition")
        guest.shutdown()
        ours, against = [], []
        for n in range(number):
            begun = time.monotonic()
            name = stack.restore(f"bench-back-{n}", snapshot, safetySnapshot=False)
            stack.wait_restore(name)
            ours.append((time.monotonic() - begun) * 1000)
            stack.delete_restore(name)
            against.append(_bare_revert(stack.lab, guest, handles))
        yield _restored(
            "restore-in-place", ours, against, "each file replaced by a reflink copy, the image rolled back"
        )
    finally:
        stack.delete(snapshot)
        guest.up()


def _restored(name: str, ours: list[float], against: list[float], what: str) -> Result:
    return Result(
        name=name,
        unit="ms",
        ours=ours,
        against=against,
        ours_is="from apply to Ready",
        against_is=what,
        details={
            "what the checks, the gate and the API take (median ms)": round(
                statistics.median(ours) - statistics.median(against)
            )
        },
    )


def _bare_clones(lab: Lab, guest: Guest, handles: dict[str, str], number: int) -> float:
    connection = lab.libvirt()
    pool = connection.storagePoolLookupByName("reflink")
    pool.refresh()
    begun = time.monotonic()
    made = []
    for target, disk in guest.disks.items():
        if disk.kind == "file":
            source = connection.storageVolLookupByPath(handles[target])
            made.append(_copy(pool, source, f"bench-{number}-{target}"))
    place, _, snap = next(h for t, h in handles.items() if guest.disks[t].kind == "rbd").rpartition("@")
    with lab.ceph.connect() as (_, ioctx), rbd.Image(ioctx, place.rpartition("/")[2], snapshot=snap) as image:
        image.copy(ioctx, f"bench-{number}")
    xml = f"<domain type='qemu'><name>bench-{number}</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    domain = connection.defineXML(xml)
    seconds = time.monotonic() - begun
    domain.undefine()
    for volume in made:
        volume.delete()
    with lab.ceph.connect() as (_, ioctx):
        rbd.RBD().remove(ioctx, f"bench-{number}")
    connection.close()
    return seconds * 1000


def _bare_revert(lab: Lab, guest: Guest, handles: dict[str, str]) -> float:
    connection = lab.libvirt()
    pool = connection.storagePoolLookupByName("reflink")
    pool.refresh()
    begun = time.monotonic()
    for target, disk in guest.disks.items():
        if disk.kind == "file":
            connection.storageVolLookupByPath(disk.path).delete()
            _copy(pool, connection.storageVolLookupByPath(handles[target]), Path(disk.path).name)
    place, _, snap = next(h for t, h in handles.items() if guest.disks[t].kind == "rbd").rpartition("@")
    with lab.ceph.connect() as (_, ioctx), rbd.Image(ioctx, place.rpartition("/")[2]) as image:
        image.rollback_to_snap(snap)
    seconds = time.monotonic() - begun
    connection.close()
    return seconds * 1000


def _copy(pool: libvirt.virStoragePool, source: libvirt.virStorageVol, name: str) -> libvirt.virStorageVol:
    xml = f"<volume><name>{name}</name><capacity>{source.info()[1]}</capacity><target><format type='raw'/></target></volume>"
    return pool.createXMLFrom(xml, source, libvirt.VIR_STORAGE_VOL_CREATE_REFLINK)


def writer(stack: Stack, pairs: int) -> Iterator[Result]:
    """What the guest's writer sees from apply to Ready, and back on its own disks, against an undisturbed run of the same length."""
    guest = stack.lab.guest("demo")
    for name, spec in (("writer", {"method": "GuestAgent"}), ("writer-overlay", {"method": "HypervisorSnapshot"})):
        ours, against, lost, seconds = [], [], [], []
        for number in range(max(3, pairs // 3)):
            first, begun = guest.records(), time.monotonic()
            taken = stack.snapshot(f"bench-{name}-{number}", quiesce=spec)
            stack.wait(taken)
            until("the VM is on its own disks", lambda: not _on_overlays(stack.lab, guest))
            seconds.append(time.monotonic() - begun)
            busy = _Rounds.read(guest, first)
            stack.delete(taken)
            first = guest.records()
            time.sleep(seconds[-1])
            calm = _Rounds.read(guest, first)
            ours.append(busy.longest)
            against.append(calm.longest)
            lost.append(100 * (1 - busy.per_second / calm.per_second))
        yield Result(
            name=name,
            unit="ms longest stall",
            ours=ours,
            against=against,
            ours_is=f"while a snapshot is taken by {spec['method']}",
            against_is="undisturbed, for the same time",
            details={
                "lost throughput meanwhile (median %)": round(statistics.median(lost), 1),
                "from apply to Ready, on its own disks (median s)": round(statistics.median(seconds), 2),
            },
        )


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The writer's rounds between two moments: milliseconds of the longest one, and how many in a second."""

    longest: float
    per_second: float

    @classmethod
    def read(cls, guest: Guest, first: int) -> _Rounds:
        """Read the records from this one on, each with the time at which its round began, as the guest's clock says."""
        last = guest.records()
        skip = first % _SLOTS
        count = min(last - first, _SLOTS - skip)  # no further than to the end of the ring
        script = f"dd if=/mnt/vda/log bs=64 skip={skip} count={count} 2>/dev/null | cut -c20-48"
        times = [float(line) for line in guest.control(["sh", "-c", script]).split()]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return cls(longest=max(gaps) * 1000, per_second=len(gaps) / (times[-1] - times[0]))


_SLOTS = 131_072
"""Records in the ring that the guest's writer fills (writer.c)."""


def copy(stack: Stack, pairs: int) -> Result:
    """How long a guest is frozen for a driver that copies, with 4 GiB of data against 64 MiB."""
    big = stack.lab.guest("demo-big", {"vda": GuestDisk(kind="file", pool="plain", size_mib=BIG_MIB)}, memory_mib=96)
    small = stack.lab.guest("demo-small", {"vda": GuestDisk(kind="file", pool="plain", size_mib=64)}, memory_mib=96)
    frozen: dict[str, list[float]] = {"demo-big": [], "demo-small": []}
    whole: dict[str, list[float]] = {"demo-big": [], "demo-small": []}
    try:
        _fill(big)
        for number in range(max(5, pairs // 3) + 1):  # the first pair warms caches and is not counted
            for guest in (big, small):
                begun = time.monotonic()
                name = stack.snapshot(f"bench-copy-{number}-{guest.name}", guest.name, readyDeadlineSeconds=3600)
                body = stack.wait(name, timeout=600)
                if number:
                    frozen[guest.name].append(float(body["status"]["quiesce"]["frozenMilliseconds"]))
                    whole[guest.name].append(time.monotonic() - begun)
                stack.delete(name)
    finally:
        big.remove()
        small.remove()
    return Result(
        name="copy",
        unit="ms frozen",
        ours=frozen["demo-big"],
        against=frozen["demo-small"],
        ours_is=f"{BIG_MIB >> 10} GiB to copy",
        against_is="64 MiB to copy",
        goal=f"median ratio at most {COPY_GOAL}",
        details={f"{n}: from apply to Ready (median s)": round(statistics.median(v), 1) for n, v in whole.items()},
    ).judged(COPY_GOAL)


def _fill(guest: Guest) -> None:
    """Fill the guest's disk with data that is not sparse."""
    guest.shutdown()
    folder = Path(guest.disks["vda"].path).with_suffix(".mnt")
    folder.mkdir()
    try:
        run("mount", "-o", "loop", guest.disks["vda"].path, folder)
        try:
            chunk = os.urandom(1 << 20)
            room = shutil.disk_usage(folder).free - (64 << 20)
            with (folder / "filler").open("wb") as file:
                for _ in range(room >> 20):
                    file.write(chunk)
        finally:
            run("umount", folder, timeout=300)
    finally:
        folder.rmdir()
    guest.up()


ALL: dict[str, Callable[[Stack, int], Result | Iterator[Result]]] = {
    "overlay": overlay,
    "restore": restore,
    "writer": writer,
    "copy": copy,
}
