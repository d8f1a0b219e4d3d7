"""Measurements of the overlay quiesce and of the way back, against the bare calls on the same guest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import rbd

from tests import proof
from tests.benchmarks.result import Result
from tests.lab import Lab
from tests.lab.guests import Guest
from tests.lab.run import run
from tests.stack import Stack, until

OVERLAY_GOAL = 0.85


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


ALL: dict[str, Callable[[Stack, int], Iterator[Result]]] = {"overlay": overlay, "restore": restore}
