"""The overlay quiesce on real parts: one instant, the way back onto the VM's own disks, and what must never be lost."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest
import pytest_asyncio

from tests import proof
from tests.integration.hypervisor_support import connect, eventually, journal, small_guest
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.lab.run import run
from tests.stack import NAMESPACE, Stack, conditions, until
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core import names, qcow2
from vmsnapshot_operator.core.chains import Move, Ruling
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.volumes import Layer, SourceKind, Volume, VolumeId, volume_id
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.handlers.sweep import sweep
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.plan import collapse
from vmsnapshot_operator.strategies import overlays

POOL = "reflink"
MIXED = {
    "vda": GuestDisk(kind="file"),
    "vdb": GuestDisk(kind="file", pool="plain"),
    "vdc": GuestDisk(kind="rbd"),
}


# --- the whole way --------------------------------------------------------------------------------------------------------


def test_one_instant_by_overlays_and_back(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("over", quiesce={"policy": "Require", "method": "HypervisorSnapshot"})
    body = stack.wait(name)
    assert body["status"]["consistency"] == "Filesystem"
    assert conditions(body)["Quiesced"]["reason"] == "Switched"
    content = stack.content(name)
    assert content is not None
    held = proof.read(lab, content, tmp_path)
    assert held.one_instant, held.records
    assert held.clean, held.fsck
    until("the VM is on its own disks", lambda: not on_overlays(lab, "demo"))
    assert not [f for f in proof.files(lab) if "ovl-" in f]


@pytest.fixture(scope="module")
def mixed(lab: Lab) -> Iterator[Guest]:
    """A guest with disks on storage that cuts in an instant and on storage that must copy."""
    made = lab.guest("demo-mixed", MIXED, memory_mib=96)
    yield made
    made.remove()


def test_storage_that_copies_and_storage_that_does_not_are_of_one_instant(
    lab: Lab, stack: Stack, mixed: Guest, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("mixed", domain=mixed.name, quiesce={"policy": "Require"})
    status = stack.wait(name)["status"]
    assert status["consistency"] == "Filesystem"
    assert status["quiesce"]["method"] == "HypervisorSnapshot"
    assert '"plain-files" (Copy) cannot cut in an instant' in status["quiesce"]["reason"]
    content = stack.content(name)
    assert content is not None
    held = proof.read(lab, content, tmp_path)
    assert held.one_instant, held.records
    assert held.clean, held.fsck
    until("the VM is on its own disks", lambda: not on_overlays(lab, mixed.name))


def test_a_deletion_in_between_brings_the_vm_back(
    lab: Lab, stack: Stack, mixed: Guest, fresh: Callable[[str], str]
) -> None:
    name = stack.snapshot(fresh("gone"), mixed.name)
    until("it is on overlays", lambda: on_overlays(lab, mixed.name) or stack.get(name) is None)
    stack.delete(name)
    assert not on_overlays(lab, mixed.name)
    assert not [f for f in proof.files(lab) if "ovl-" in f]


def on_overlays(lab: Lab, domain: str) -> bool:
    """Whether the running VM writes to an overlay of ours."""
    connection = lab.libvirt()
    try:
        return "/ovl-" in connection.lookupByName(domain).XMLDesc().partition("<devices>")[2]
    finally:
        connection.close()


# --- step by step, and what may happen in between -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    made = small_guest(lab, "overlaid", {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="rbd")})
    yield made
    made.remove()


@pytest_asyncio.fixture
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    made = await connect(lab)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def switched(lab: Lab, hypervisor: Hypervisor, guest: Guest) -> AsyncIterator[tuple[Ref, Journal]]:
    """The guest on overlays of both disks, with a journal that says so."""
    async with on_overlays_of(lab, hypervisor, guest, journal("HypervisorSnapshot")) as (ref, told):
        yield ref, told


@asynccontextmanager
async def on_overlays_of(
    lab: Lab,
    hypervisor: Hypervisor,
    guest: Guest,
    whose: Journal,
    name: Callable[[str, VolumeId], str] | None = None,
    pool: str = POOL,
) -> AsyncIterator[tuple[Ref, Journal]]:
    """The guest on overlays of both disks, named by target and volume, with this journal that says so; on its disks afterwards."""
    guest.up()
    before = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    ref = await hypervisor.find(guest.name)
    machine = await hypervisor.describe(ref, ask_agent=False)
    made, layers = {}, {}
    for disk in machine.disks:
        volume = Volume(
            id=volume_id(disk.layers[0]), label=disk.target, writable=disk.layers[0], size_bytes=disk.size_bytes
        )
        called = name(disk.target, volume.id) if name is not None else f"ovl-test-{disk.target}"
        made[disk.target] = (volume.id, await hypervisor.overlays(ref).create(pool, called, volume))
        layers[str(volume.id)] = volume.writable
    held = replace(
        whose,
        overlays={str(v): path for v, path in made.values()},
        run_id=machine.run_id,
        phase=Phase.OVERLAID,
    )
    await hypervisor.write_journal(ref, held)
    window = await hypervisor.window(ref)
    await window.switch(await window.prepare_switch({t: path for t, (_, path) in made.items()}), timeout=20)  # type: ignore[arg-type]
    told = replace(held, bases=await hypervisor.overlays(ref).fingerprints(layers))
    assert await hypervisor.update_journal(ref, told)
    try:
        yield ref, told
    finally:
        guest.destroy()
        domain = guest.domain()
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, journals.NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG
        )
        domain.connect().defineXML(before)
        for _, path in made.values():
            Path(path).unlink(missing_ok=True)


async def moves(hypervisor: Hypervisor, ref: Ref) -> set[Move]:
    """What is to be done about the overlays, by what the VM's own journal says."""
    held = await hypervisor.read_journal(ref)
    assert held is not None
    return {r.move for r in collapse.judge(held, await overlays.look(hypervisor, ref, held))}


async def bring_back(hypervisor: Hypervisor, ref: Ref) -> tuple[Ruling, ...]:
    """Collapse, as far as it can be done now."""
    held = await hypervisor.read_journal(ref)
    assert held is not None
    return await overlays.collapse(hypervisor, ref, held, None, lambda _: None)


Switched = tuple[Ref, Journal]


async def test_bases_stand_and_the_commit_brings_all_writes_back(
    hypervisor: Hypervisor, guest: Guest, switched: Switched
) -> None:
    ref, told = switched
    seen = await overlays.look(hypervisor, ref, told)
    assert collapse.stands(told, seen) == ""
    assert not seen.missing
    rulings = await bring_back(hypervisor, ref)
    assert {r.move for r in rulings} == {Move.GONE}
    assert await hypervisor.read_journal(ref) is None
    machine = await hypervisor.describe(ref, ask_agent=False)
    assert {volume_id(d.layers[0]) for d in machine.disks} == set(told.overlays), "on its own disks again"
    assert guest.agent_answers()


async def test_an_overlay_that_is_used_is_not_removed(hypervisor: Hypervisor, switched: Switched) -> None:
    ref, told = switched
    with pytest.raises(HypervisorError, match="is used by a VM"):
        await hypervisor.overlays(ref).remove_path(next(iter(told.overlays.values())))


async def test_after_any_of_the_disks(hypervisor: Hypervisor, switched: Switched) -> None:
    ref, told = switched
    layer = hypervisor.overlays(ref)
    first = told.overlays[min(told.overlays)]
    collapsing = replace(told, phase=Phase.COLLAPSING)
    assert await hypervisor.update_journal(ref, collapsing)
    await layer.commit(target_of(first), first, 0)

    async def ready() -> bool:
        seen = await layer.look(collapsing.overlays)
        disk = seen.chains.with_image(first) if seen.chains is not None else None
        return disk is not None and disk.job is not None and disk.job.ready

    await eventually("its commit is ready", ready)
    await layer.pivot(target_of(first))  # and nobody came to write it down
    assert await moves(hypervisor, ref) == {Move.REMOVE, Move.COMMIT}
    assert {r.move for r in await bring_back(hypervisor, ref)} == {Move.GONE}


def target_of(path: str) -> str:
    """The disk for which an overlay of these tests was made."""
    return path.rpartition("-")[2]


async def test_a_vm_that_stops_starts_again_on_its_overlays(
    hypervisor: Hypervisor, guest: Guest, switched: Switched
) -> None:
    ref, _ = switched
    guest.destroy()
    assert await moves(hypervisor, ref) == {Move.WAIT}
    assert {r.move for r in await bring_back(hypervisor, ref)} == {Move.WAIT}, "nothing is done while it is off"
    guest.domain().create()
    guest.wait()
    assert on_its_overlays(guest)
    assert await moves(hypervisor, ref) == {Move.COMMIT}
    assert {r.move for r in await bring_back(hypervisor, ref)} == {Move.GONE}


def on_its_overlays(guest: Guest) -> bool:
    """Whether the running guest has overlays."""
    return "ovl-test-" in guest.domain().XMLDesc().partition("<devices>")[2]


async def test_a_base_that_changed_is_never_committed_onto(
    lab: Lab, hypervisor: Hypervisor, guest: Guest, switched: Switched
) -> None:
    ref, told = switched
    base = guest.disks["vda"].path
    scribble(Path(base))
    content = Path(base).read_bytes()
    rulings = {target_of(r.overlay): r.move for r in await bring_back(hypervisor, ref)}
    assert rulings["vda"] is Move.KEEP
    assert Path(base).read_bytes() == content
    assert Path(told.overlays[str(volume_id(file_layer(base)))]).exists(), "both are kept"


async def test_one_that_is_kept_while_the_vm_runs_on_it_stays_visible(
    lab: Lab, stack: Stack, hypervisor: Hypervisor, guest: Guest
) -> None:
    ours, nobody = stack.installation(), "0b6f7d1e-0000-4000-8000-00000000dead"
    held = replace(journal("HypervisorSnapshot"), installation=ours, owner_uid=nobody)

    def called(_: str, volume: VolumeId) -> str:
        return names.overlay_name(ours, nobody, 1, volume)

    async with on_overlays_of(lab, hypervisor, guest, held, called) as (ref, told):
        base = guest.disks["vda"].path
        overlay = told.overlays[str(volume_id(file_layer(base)))]
        scribble(Path(base))

        def kept() -> list[dict[str, Any]]:
            (body,) = stack.all("hypervisors.vmsnapshot.io")
            return list(body["status"].get("keptOverlays") or ())

        # Nobody knows this VMSnapshot: the sweep brings the VM back onto its disks, as far as it may.
        until("it is told", lambda: bool(kept()))
        (entry,) = kept()
        assert (entry["path"], entry["domain"]) == (overlay, guest.name)
        assert "its base has changed since the switch" in entry["message"]
        assert await hypervisor.read_journal(ref) is None, "snapshots of it may be taken again"
        assert 'vmsnapshot_kept_overlays{hypervisor="lab"} 1.0' in stack.http("/metrics")[1]
        assert overlay in guest.domain().XMLDesc(), "the VM goes on on it"
        lines, ok = await sweep(lab.kubeconfig, NAMESPACE, ["lab"], "", dry_run=True)
        assert ok, "no VM is held"
        assert any(f"overlay {overlay}" in line and f"VM {guest.name} has it" in line for line in lines), lines
        stack.programs.pop("operator").stop()
        stack.start_operator()
        until("it is told again", lambda: 'vmsnapshot_kept_overlays{hypervisor="lab"} 1.0' in stack.http("/metrics")[1])
        assert kept() == [entry], "since when and why, as before"
        assert any(overlay in e["note"] for e in stack.events("lab", "OverlayKept", "default"))
    stack.programs.pop("operator").stop()
    stack.start_operator()
    until("it is forgotten", lambda: not kept())


def scribble(path: Path) -> None:
    """Write into an image as somebody else."""
    with path.open("r+b") as disk:
        disk.seek(40 << 20)
        disk.write(b"somebody")


def file_layer(path: str) -> Layer:
    """A raw file as a layer."""
    return Layer(kind=SourceKind.FILE, source=path, format="raw")


async def test_a_vm_that_goes_on_without_its_overlays_loses_none(
    lab: Lab, hypervisor: Hypervisor, guest: Guest, switched: Switched
) -> None:
    ref, told = switched
    text = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    guest.control(["sh", "-c", "echo precious > /mnt/vda/precious && sync"])
    guest.destroy()
    overlay = told.overlays[str(volume_id(file_layer(guest.disks["vda"].path)))]
    guest.domain().connect().defineXML(
        text.replace(overlay, guest.disks["vda"].path).replace('type="qcow2"', 'type="raw"')
    )
    ruled = {target_of(r.overlay): r.move for r in collapse.judge(told, await overlays.look(hypervisor, ref, told))}
    assert ruled["vda"] is Move.KEEP
    assert Path(overlay).exists()


@pytest.fixture
def tiny(lab: Lab) -> Iterator[str]:
    """A pool of a few MiB, on a file system of its own that the laboratory's libvirt has mounted."""
    image, folder = lab.state / "tiny.img", lab.state / "tiny"
    with image.open("wb") as made:
        made.truncate(4 << 20)
    run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-O", "^has_journal", image)
    folder.mkdir(exist_ok=True)
    device = run("losetup", "--find", "--show", image).strip()
    connection = lab.libvirt()
    try:
        pool = connection.storagePoolCreateXML(
            f"<pool type='fs'><name>tiny</name><source><device path='{device}'/><format type='ext4'/></source>"
            f"<target><path>{folder}</path></target></pool>"
        )
    finally:
        run("losetup", "--detach", device)  # as soon as it is mounted no more
    yield "tiny"
    pool.destroy()
    connection.close()
    image.unlink()


async def test_a_vm_that_stands_still_because_its_overlays_have_no_room_goes_on_by_itself(
    lab: Lab, hypervisor: Hypervisor, guest: Guest, tiny: str
) -> None:
    async with on_overlays_of(lab, hypervisor, guest, journal("HypervisorSnapshot"), pool=tiny) as (ref, told):
        domain = guest.domain()

        async def stalled() -> bool:
            return any(s.stalled for s in await hypervisor.sweep() if s.ref.uuid == ref.uuid)

        domain.suspend()
        assert not await stalled()
        assert await moves(hypervisor, ref) == {Move.WAIT}, "a person has paused it"
        domain.resume()
        much = "yes precious | head -c 6291456 > /mnt/vda/much; sync; echo 3 > /proc/sys/vm/drop_caches; touch /run/written"
        guest.control(["sh", "-c", f"({much}) > /dev/null 2>&1 < /dev/null &"])
        await eventually("it stands still", stalled)
        assert domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]
        assert await moves(hypervisor, ref) == {Move.COMMIT}
        assert {r.move for r in await bring_back(hypervisor, ref)} == {Move.GONE}
        assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
        assert await hypervisor.read_journal(ref) is None
        machine = await hypervisor.describe(ref, ask_agent=False)
        assert {volume_id(d.layers[0]) for d in machine.disks} == set(told.overlays), "on its own disks again"
        until("all is written", lambda: guest.control(["sh", "-c", "ls /run"]).find("written") >= 0)
        wanted = hashlib.sha256((b"precious\n" * 699_051)[:6_291_456]).hexdigest()
        assert guest.control(["sha256sum", "/mnt/vda/much"]).split()[0] == wanted, "nothing of it is lost"


@pytest.mark.parametrize("size", [1 << 20, 64 << 20, 10 << 40])
def test_a_header_that_qemu_takes(tmp_path: Path, size: int) -> None:
    base = tmp_path / "base.raw"
    with base.open("wb") as made:
        made.truncate(size if size < 1 << 40 else 1 << 20)
    image = tmp_path / "over.qcow2"
    image.write_bytes(qcow2.overlay(size, str(base), "raw"))
    assert image.stat().st_size == qcow2.empty_length(size)
    found = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    about = subprocess.run(["qemu-img", "info", str(image)], capture_output=True, text=True, check=True).stdout
    assert f"({size} bytes)" in about
    assert f"backing file: {base}" in about
    assert "backing file format: raw" in about
