"""The driver libvirt-backup on a real daemon: it prepares, holds and gives back, and calls nothing whole that nobody proved so.

The hypervisor's part is played by a file that is written to: what the real one does is `test_backup`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.drivers_support import LONG, SIZE, LibvirtStorage, order
from tests.lab import Lab
from vmsnapshot_operator.core.driver import CutKind, CutResult, Fit, Hold, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Volume
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import AlreadyCutError, DriverError


@pytest.fixture
def storage(lab: Lab) -> Iterator[LibvirtStorage]:
    made = LibvirtStorage(lab, pool="reflink", destination="plain")
    yield made
    made.clean()


@pytest.fixture
async def host(storage: LibvirtStorage) -> AsyncIterator[DriverHost]:
    parameters = {"poolName": "plain", "socketPath": str(storage.lab.libvirt_socket)}
    host = DriverHost("copies", "libvirt-backup", parameters, {})
    yield host
    await host.close()


def under(storage: LibvirtStorage, request: SnapshotRequest) -> list[str]:
    """What is held under a request's name."""
    return [n for n in storage.held() if n.startswith(request.name)]


def write(path: Path, content: bytes) -> None:
    """Write to the beginning of a file that is there."""
    with path.open("r+b") as file:
        file.write(content)


async def copy(host: DriverHost, request: SnapshotRequest, content: bytes) -> CutResult:
    """Have all volumes of a request copied as by the hypervisor."""
    async with host.reserve() as slot:
        await slot.prepare(request)
        targets = await slot.targets(request)
    for layer in targets.values():
        write(Path(layer.source), content)
    handles = {v: Handle(layer.source) for v, layer in targets.items()}
    return CutResult(handles=handles, atomic=True, hold=Hold.JOB)


async def test_what_is_prepared_is_half_a_copy_until_it_is_proved_whole(
    storage: LibvirtStorage, host: DriverHost
) -> None:
    volumes = (storage.volume(b"now"), storage.volume(b"now"))
    request = order(*volumes)
    assert (await host.capabilities(timeout=LONG)).cut is CutKind.HYPERVISOR

    cut = await copy(host, request, b"then")

    assert all(Path(h).stat().st_size == SIZE for h in cut.handles.values())
    assert await host.missing([cut], timeout=LONG) == set(cut.handles.values())
    assert {f.reason for f in await host.check_revert(cut, volumes, timeout=LONG)} == {"SnapshotIncomplete"}
    with pytest.raises(DriverError, match="not copied to the end"):
        await host.clone(cut, "vms-aaaaaa-clone", timeout=LONG)
    with pytest.raises(AlreadyCutError):
        await host.prepare(request)

    for _ in range(2):
        await host.wait_ready(request, cut, timeout=LONG)
        assert await host.missing([cut], timeout=LONG) == frozenset()

    assert await host.list("vms-aaaaaa-", timeout=LONG) == (request.name,)
    await host.delete(request.name, timeout=LONG)
    assert not under(storage, request)
    with pytest.raises(DriverError, match="does not exist") as caught:
        await host.wait_ready(request, cut, timeout=LONG)
    assert caught.value.reason == "SnapshotLost"


async def test_the_way_back(storage: LibvirtStorage, host: DriverHost) -> None:
    volume = storage.volume(b"now")
    request = order(volume)
    cut = await copy(host, request, b"then")
    await host.wait_ready(request, cut, timeout=LONG)

    made = await host.clone(cut, clone := order(volume).name, timeout=LONG)
    assert storage.read_layer(made[volume.id]) == b"then"
    assert storage.read(volume) == b"now"
    await host.keep(clone, timeout=LONG)
    await host.revert(cut, [volume], timeout=LONG)
    assert storage.read(volume) == b"then"
    await host.delete(request.name, timeout=LONG)
    await host.delete(clone, timeout=LONG)
    assert storage.read_layer(made[volume.id]) == b"then"
    Path(made[volume.id].source).unlink()


async def test_what_is_on_other_storage_is_not_set_back(storage: LibvirtStorage, host: DriverHost) -> None:
    good = storage.volume(b"now")
    layer = replace(good.writable, source="/nowhere/at/all.img", pool="")
    bad = Volume(id=good.id, label="bad", writable=layer, size_bytes=SIZE)
    cut = await copy(host, order(good), b"then")
    (fit,) = await host.check_revert(cut, [bad], timeout=LONG)
    assert (fit.ok, fit.reason) == (False, "OtherVolume")


async def test_a_vm_that_is_off_is_copied_by_the_driver(storage: LibvirtStorage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"2"))
    request = order(*volumes)
    async with host.reserve() as slot:
        await slot.prepare(request)
        cut = await slot.cut(request)
    assert cut.hold is Hold.BASE
    assert await host.missing([cut], timeout=LONG) == set(cut.handles.values())
    await host.wait_ready(request, cut, timeout=LONG)
    assert [storage.read_handle(cut.handles[v.id]) for v in volumes] == [b"1", b"2"]
    assert await host.missing([cut], timeout=LONG) == frozenset()

    other = order(storage.volume(format="qcow2"))
    async with host.reserve() as slot:
        await slot.prepare(other)
        with pytest.raises(DriverError, match="only a VM that runs"):
            await slot.cut(other)


async def test_there_must_be_room_for_the_whole_disks(storage: LibvirtStorage, host: DriverHost) -> None:
    volume = replace(storage.volume(), size_bytes=1 << 40)
    request = order(volume)
    with pytest.raises(DriverError) as caught:
        await host.prepare(request)
    assert caught.value.reason == "NoSpace"
    assert not under(storage, request)
    fit = await host.can_handle([replace(volume, size_bytes=0)], timeout=LONG)
    assert (fit.ok, fit.reason) == (False, "SizeUnknown")


@pytest.fixture
async def sharing(storage: LibvirtStorage) -> AsyncIterator[DriverHost]:
    """The driver that begins with earlier copies, in a pool that can share blocks."""
    parameters = {"poolName": "reflink", "incremental": "true", "socketPath": str(storage.lab.libvirt_socket)}
    host = DriverHost("changes", "libvirt-backup", parameters, {})
    yield host
    await host.close()


async def begun_with(host: DriverHost, volume: Volume, earlier: Handle) -> tuple[Fit, SnapshotRequest, Path]:
    """Prepare a volume, and let it begin with an earlier cut."""
    request = order(volume)
    async with host.reserve() as slot:
        await slot.prepare(request)
        fits = await slot.inherit(request, {volume.id: earlier})
        targets = await slot.targets(request)
    return fits[volume.id], request, Path(targets[volume.id].source)


async def test_a_copy_begins_with_an_earlier_one_and_does_not_need_it(
    storage: LibvirtStorage, sharing: DriverHost
) -> None:
    assert (await sharing.capabilities(timeout=LONG)).incremental
    volume = storage.volume(b"now")
    first = order(volume)
    cut = await copy(sharing, first, b"then")
    await sharing.wait_ready(first, cut, timeout=LONG)
    handle = cut.handles[volume.id]

    fit, second, path = await begun_with(sharing, volume, handle)
    assert (fit.ok, fit.reason) == (True, "Inherited")
    assert path.stat().st_size == SIZE
    assert storage.read_handle(Handle(str(path))) == b"then"
    later = CutResult(handles={volume.id: Handle(str(path))}, atomic=True, hold=Hold.JOB)
    assert await sharing.missing([later], timeout=LONG) == {str(path)}, "it is half a copy all the same"
    write(path, b"more")
    await sharing.delete(first.name, timeout=LONG)
    await sharing.wait_ready(second, later, timeout=LONG)
    assert storage.read_handle(Handle(str(path))) == b"more"
    assert await sharing.missing([later], timeout=LONG) == frozenset()
    await sharing.delete(second.name, timeout=LONG)


async def test_nothing_begins_with_what_is_not_proved(storage: LibvirtStorage, sharing: DriverHost) -> None:
    volume = storage.volume(b"now")
    first = order(volume)
    cut = await copy(sharing, first, b"then")
    handle = cut.handles[volume.id]

    async def refused(earlier: Handle = handle) -> str:
        fit, request, path = await begun_with(sharing, volume, earlier)
        assert not fit.ok
        assert not path.read_bytes().strip(b"\0"), "it is empty, and of the right size"
        assert path.stat().st_size == SIZE
        await sharing.delete(request.name, timeout=LONG)
        return fit.reason

    assert await refused() == "SnapshotIncomplete"
    await sharing.wait_ready(first, cut, timeout=LONG)
    assert await refused(Handle(f"{handle}x")) == "SnapshotLost"
    write(Path(handle), b"else")
    assert await refused() == "SnapshotChanged"
    Path(handle).unlink()
    assert await refused() == "SnapshotLost"
    await sharing.delete(first.name, timeout=LONG)


async def test_a_pool_that_cannot_share_blocks_is_refused(storage: LibvirtStorage) -> None:
    parameters = {"poolName": "plain", "incremental": "true", "socketPath": str(storage.lab.libvirt_socket)}
    host = DriverHost("changes", "libvirt-backup", parameters, {})
    try:
        with pytest.raises(DriverError, match="cannot share blocks") as caught:
            await host.capabilities(timeout=LONG)
        assert caught.value.reason == "PoolNotServed"
    finally:
        await host.close()
