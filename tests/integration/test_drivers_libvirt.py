"""What the driver libvirt-volume must do beside what all drivers do, on a real daemon and real file systems."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.drivers_support import LONG, SIZE, LibvirtStorage, order, watch
from tests.lab import Lab
from vmsnapshot_operator.core.driver import CutKind, Hold
from vmsnapshot_operator.core.volumes import Seconds, SourceKind
from vmsnapshot_operator.drivers import probes
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.drivers.libvirt_volume import LibvirtVolumeDriver
from vmsnapshot_operator.errors import DriverError, DriverTimeoutError

BIG = 128 << 20  # bytes: a copy that takes long enough to be met under way


@pytest.fixture
def storage(lab: Lab) -> Iterator[LibvirtStorage]:
    made = LibvirtStorage(lab)
    yield made
    made.clean()


@pytest.fixture
async def host(storage: LibvirtStorage) -> AsyncIterator[DriverHost]:
    host = storage.host()
    yield host
    await host.close()


@pytest.fixture(params=[("plain", "plain"), ("reflink", "plain")])
def copying(request: pytest.FixtureRequest, lab: Lab) -> Iterator[LibvirtStorage]:
    """Storage that cannot share blocks: no reflink at all, or another file system for the clones."""
    pool, destination = request.param
    made = LibvirtStorage(lab, pool=pool, destination=destination)
    yield made
    made.clean()


@pytest.fixture
def plain(lab: Lab) -> Iterator[LibvirtStorage]:
    made = LibvirtStorage(lab, pool="plain", destination="plain")
    yield made
    made.clean()


@pytest.fixture
async def plain_host(plain: LibvirtStorage) -> AsyncIterator[DriverHost]:
    host = plain.host(minFreeBytes="0")
    yield host
    await host.close()


@pytest.fixture
async def copying_host(copying: LibvirtStorage) -> AsyncIterator[DriverHost]:
    host = copying.host()
    yield host
    await host.close()


async def test_a_clone_shares_the_blocks_of_its_volume(storage: LibvirtStorage, host: DriverHost) -> None:
    volume = storage.volume(b"x" * 4_000_000)
    pool = storage.lab.libvirt().storagePoolLookupByName("reflink")
    pool.refresh(0)
    before = pool.info()[3]
    request = order(volume)

    async with host.reserve(request) as slot:
        await slot.cut(request)

    pool.refresh(0)
    assert before - pool.info()[3] < 1_000_000


async def test_a_clone_keeps_size_and_permissions(storage: LibvirtStorage, host: DriverHost) -> None:
    volume = storage.volume(b"1")
    source = Path(volume.writable.source)
    source.chmod(0o640)
    request = order(volume)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)

    for _ in range(2):
        found = Path(cut.handles[volume.id]).stat()
        assert (found.st_mode & 0o777, found.st_size) == (0o640, SIZE)
        await host.revert(cut, [volume], timeout=LONG)
        found = source.stat()
        assert (found.st_mode & 0o777, found.st_size) == (0o640, SIZE)


async def test_why_a_disk_does_not_fit(storage: LibvirtStorage, host: DriverHost) -> None:
    good = storage.volume()
    elsewhere = replace(good, writable=replace(good.writable, source="/var/lib/elsewhere.img"))
    wrong = {
        "FormatNotServed": storage.volume(format="qcow2"),
        "OtherPool": elsewhere,
        "NotAVolume": replace(good, writable=replace(good.writable, kind=SourceKind.NETWORK, source="p/i")),
    }
    for reason, volume in wrong.items():
        fit = await host.can_handle([good, volume], timeout=LONG)
        assert (fit.ok, fit.reason) == (False, reason)
        assert volume.writable.source in fit.message


async def test_a_guest_cannot_have_a_file_of_the_host_read(storage: LibvirtStorage, host: DriverHost) -> None:
    """On its raw disk it writes the header of a qcow2 file whose backing file is a file of the host."""
    good, bad, later = storage.volume(b"1"), storage.volume(), storage.volume(b"1")
    secret = storage.volume(b"secret of the host")
    forge = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", secret.writable.source]

    subprocess.run([*forge, bad.writable.source, "8M"], check=True)
    await host.list("vms-", timeout=LONG)  # the pool is read
    fit = await host.can_handle([good, bad], timeout=LONG)
    with pytest.raises(DriverError, match="for qcow2, not raw"):
        await host.prepare(order(good, bad))

    request = order(good, later)
    async with host.reserve(request) as slot:
        subprocess.run([*forge, later.writable.source, "8M"], check=True)
        await host.list("vms-", timeout=LONG)  # the pool is read between prepare and cut
        with pytest.raises(DriverError, match="cloning"):
            await slot.cut(request)
    with pytest.raises(DriverError, match="for qcow2, not raw"):
        await host.prepare(order(later))
    await host.delete(request.name, timeout=LONG)

    assert (fit.ok, fit.reason) == (False, "FormatNotServed")


async def test_a_disk_named_by_pool_and_volume(storage: LibvirtStorage, host: DriverHost) -> None:
    file = storage.volume(b"1")
    volume = replace(file, writable=replace(file.writable, kind=SourceKind.VOLUME, source=f"reflink/{file.label}"))
    assert (await host.can_handle([volume], timeout=LONG)).ok
    request = order(volume)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    storage.write(file, b"2")
    assert all(f.ok for f in await host.check_revert(cut, [volume], timeout=LONG))
    await host.revert(cut, [volume], timeout=LONG)
    assert storage.read(file) == b"1"


async def test_a_pool_that_is_full_is_refused_before_the_freeze(storage: LibvirtStorage) -> None:
    host = storage.host(minFreeBytes=str(1 << 50))
    with pytest.raises(DriverError, match="minFreeBytes") as caught:
        await host.prepare(order(storage.volume()))
    await host.close()
    assert (caught.value.reason, caught.value.retryable) == ("NoSpace", True)


async def test_by_tcp(storage: LibvirtStorage, lab: Lab) -> None:
    (line,) = [
        x for x in (lab.state / "libvirtd" / "libvirtd.conf").read_text().splitlines() if x.startswith("tcp_port")
    ]
    host = storage.host(uriTransport="tcp", host="127.0.0.1", port=str(json.loads(line.split("=")[1])), socketPath="")
    request = order(storage.volume(b"1"))
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    await host.close()
    assert storage.read_handle(next(iter(cut.handles.values()))) == b"1"


async def test_a_clone_that_libvirt_does_not_know_is_never_written_over(
    storage: LibvirtStorage, host: DriverHost
) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"1"))
    before = storage.held()
    request = order(*volumes)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    await host.delete(request.name, timeout=LONG)
    left = Path(cut.handles[volumes[1].id])
    left.write_bytes(b"of somebody else")

    async with host.reserve(request) as slot:
        with pytest.raises(DriverError, match="exists"):
            await slot.cut(request)

    assert left.read_bytes() == b"of somebody else"
    assert not Path(cut.handles[volumes[0].id]).exists(), "one of two is none"
    await host.delete(request.name, timeout=LONG)
    assert storage.held() == before


async def test_without_reflink_the_cut_only_names_and_the_copy_comes_later(copying: LibvirtStorage) -> None:
    host = copying.host()
    volumes = (copying.volume(b"1"), copying.volume(b"2"))
    before = copying.held()
    request = order(*volumes)

    capabilities = await host.capabilities(timeout=LONG)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    held = copying.held()
    await host.wait_ready(request, cut, timeout=LONG)  # the base stands still until here
    for volume in volumes:
        copying.write(volume, b"3")
    await host.wait_ready(request, cut, timeout=LONG)  # again, and what is whole is not copied again

    assert capabilities.cut is CutKind.COPY
    assert cut.hold is Hold.BASE
    assert held == before
    assert [copying.read_handle(cut.handles[v.id]) for v in volumes] == [b"1", b"2"]
    assert await host.list("vms-aaaaaa-", timeout=LONG) == (request.name,)
    await host.delete(request.name, timeout=LONG)
    assert copying.held() == before
    await host.close()


async def test_a_guest_cannot_have_a_file_of_the_host_copied(copying: LibvirtStorage) -> None:
    host = copying.host()
    volume, secret = copying.volume(b"1"), copying.volume(b"secret of the host")
    request = order(volume)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    forge = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", secret.writable.source]
    subprocess.run([*forge, volume.writable.source, "8M"], check=True)
    connection = copying.lab.libvirt()
    connection.storagePoolLookupByName(copying.pool).refresh(0)
    connection.close()

    with pytest.raises(DriverError, match="for qcow2, not raw"):
        await host.wait_ready(request, cut, timeout=LONG)

    assert not Path(cut.handles[volume.id]).exists()
    await host.close()


async def test_a_copy_that_was_cut_short_is_made_anew(copying: LibvirtStorage) -> None:
    host = copying.host()
    volumes = (copying.volume(b"1"), copying.volume(b"2"))
    request = order(*volumes)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    partial = Path(cut.handles[volumes[0].id])
    partial.write_bytes(b"half")
    connection = copying.lab.libvirt()
    connection.storagePoolLookupByName(copying.destination).refresh(0)
    connection.close()

    await host.wait_ready(request, cut, timeout=LONG)

    assert [copying.read_handle(cut.handles[v.id]) for v in volumes] == [b"1", b"2"]
    await host.delete(request.name, timeout=LONG)
    await host.close()


@contextlib.contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """A file system on which nothing can be written: who writes waits, who asks is answered."""
    subprocess.run(["fsfreeze", "-f", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(folder)], check=True)


async def test_a_killed_copy_goes_on_and_is_not_begun_anew(plain: LibvirtStorage, plain_host: DriverHost) -> None:
    """Libvirt copies on: the next try waits for that, and takes it for whole because it saw it end."""
    storage, host = plain, plain_host
    volume = storage.volume(os.urandom(BIG))
    request = order(volume)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    copy = Path(cut.handles[volume.id])
    copying = asyncio.create_task(host.wait_ready(request, cut, timeout=LONG))
    async with asyncio.timeout(LONG):
        while not copy.exists():  # noqa: ASYNC110 - made by another process
            await asyncio.sleep(0.001)
    with frozen(copy.parent):
        copying.cancel()
        await asyncio.wait([copying])
        made = os.open(copy, os.O_RDONLY)
        assert os.fstat(made).st_blocks * 512 < BIG, "it was whole already: this proves nothing"
        met = asyncio.Event()
        again = asyncio.create_task(host.wait_ready(request, cut, timeout=LONG, on_progress=lambda _: met.set()))
        async with asyncio.timeout(LONG):
            await met.wait()
        await asyncio.sleep(0.5)
    await again
    links = os.fstat(made).st_nlink
    os.close(made)

    assert links == 1, "it was deleted and begun anew"

    assert copy.read_bytes() == storage.whole(volume.writable)
    assert (await host.check_revert(cut, [volume], timeout=LONG))[0].ok
    Path(f"{copy}.whole").unlink()  # as it would be had nobody seen the copy end
    (fit,) = await host.check_revert(cut, [volume], timeout=LONG)
    assert (fit.ok, fit.reason) == (False, "SnapshotIncomplete")
    with pytest.raises(DriverError, match="not copied to the end"):
        await host.clone(cut, order(volume).name, timeout=LONG)
    await host.delete(request.name, timeout=LONG)
    assert storage.held() == set()


async def test_progress_of_a_copy_is_what_the_new_volume_occupies(plain: LibvirtStorage) -> None:
    storage, lab, size = plain, plain.lab, 4 * BIG  # so long that it is met under way for certain
    given = LibvirtVolumeDriver.Parameters(pool_name="plain", min_free_bytes=0, socket_path=str(lab.libvirt_socket))
    driver = LibvirtVolumeDriver(given, LibvirtVolumeDriver.Credentials())
    volumes = storage.volume(os.urandom(size)), storage.volume(b"1")
    request = order(*volumes)
    cut = driver.cut(request)

    seen = await watch(driver, driver.wait_ready, request, cut)

    assert driver.progress() is None
    (total,) = {p.total_bytes for p in seen}
    assert size <= total < size + (1 << 20)
    done = [p.done_bytes for p in seen]
    assert done == sorted(done)
    assert any(0 < d < size for d in done)
    driver.delete(request.name)


async def test_while_a_pool_copies_others_are_served(plain: LibvirtStorage, plain_host: DriverHost) -> None:
    """Libvirt refuses to read a pool again for as long as it copies in it."""
    storage, host = plain, plain_host
    small, big = storage.volume(b"1"), storage.volume(os.urandom(BIG))
    requests = order(small), order(big)
    cuts = []
    for request in requests:
        async with host.reserve(request) as slot:
            cuts.append(await slot.cut(request))
    await host.wait_ready(requests[0], cuts[0], timeout=LONG)
    copying = asyncio.create_task(host.wait_ready(requests[1], cuts[1], timeout=LONG))
    async with asyncio.timeout(LONG):
        while not Path(cuts[1].handles[big.id]).exists():  # noqa: ASYNC110 - made by another process
            await asyncio.sleep(0.001)

    assert (await host.check_revert(cuts[0], [small], timeout=LONG))[0].ok
    assert requests[0].name in await host.list("vms-aaaaaa-", timeout=LONG)
    await host.delete(requests[0].name, timeout=LONG)
    await copying

    assert await host.list("vms-aaaaaa-", timeout=LONG) == (requests[1].name,)
    await host.delete(requests[1].name, timeout=LONG)
    assert storage.held() == set()


async def test_a_disk_that_a_killed_revert_left_missing_is_explained_and_made_again(
    storage: LibvirtStorage, host: DriverHost
) -> None:
    volume = storage.volume(b"1")
    path = Path(volume.writable.source)
    path.chmod(0o640)
    one, two = order(volume), order(volume)
    cuts = []
    for request in (one, two):
        async with host.reserve(request) as slot:
            cuts.append(await slot.cut(request))
        storage.write(volume, b"2")
    held = storage.held()
    path.unlink()
    (missing,) = await host.check_revert(cuts[0], [volume], timeout=LONG)
    mark = path.parent / f"{Path(cuts[0].handles[volume.id]).name}.revert"
    mark.touch()  # as `revert` does before it deletes the old volume
    fits = [(await host.check_revert(cut, [volume], timeout=LONG))[0] for cut in cuts]

    await host.revert(cuts[1], [volume], timeout=LONG)  # the safety snapshot, say, instead of the one that was begun

    assert (missing.ok, missing.reason) == (False, "VolumeMissing")
    assert [f.ok for f in fits] == [True, True]
    assert (storage.read(volume), path.stat().st_size, path.stat().st_mode & 0o777) == (b"2", SIZE, 0o640)
    assert storage.held() == held, "a mark is left"
    path.unlink()
    assert (await host.check_revert(cuts[0], [volume], timeout=LONG))[0].reason == "VolumeMissing"
    await host.delete(one.name, timeout=LONG)
    await host.delete(two.name, timeout=LONG)
    storage.made.remove(path.name)


async def test_half_a_clone_is_never_taken_for_a_whole_one(storage: LibvirtStorage, host: DriverHost) -> None:
    """What a daemon that ended in the middle leaves: the file is there, has its size, and is empty."""
    volume = storage.volume(b"1")
    request, name = order(volume), order(volume).name
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    made = Path((await host.clone(cut, name, timeout=LONG))[volume.id].source)
    Path(f"{made}.whole").unlink()
    made.unlink()
    made.touch()
    os.truncate(made, SIZE)
    await host.list("vms-", timeout=LONG)

    again = await host.clone(cut, name, timeout=LONG)

    assert again[volume.id].source == str(made)
    assert made.read_bytes() == storage.whole(volume.writable)
    await host.delete(name, timeout=LONG)


async def test_a_disk_on_a_copying_pool_is_set_back_and_cloned(
    copying: LibvirtStorage, copying_host: DriverHost
) -> None:
    host = copying_host
    volume = copying.volume(b"1")
    request, name = order(volume), order(volume).name
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    await host.wait_ready(request, cut, timeout=LONG)
    first = copying.whole(volume.writable)
    copying.write(volume, b"2", 1 << 20)
    held = copying.held()

    made = await host.clone(cut, name, timeout=LONG)
    for _ in range(2):
        await host.revert(cut, [volume], timeout=LONG)

    assert copying.whole(volume.writable) == first == copying.whole(made[volume.id])
    await host.delete(name, timeout=LONG)
    assert copying.held() == held
    await host.delete(request.name, timeout=LONG)


async def test_a_disk_is_not_deleted_where_its_content_would_not_fit(
    copying: LibvirtStorage, copying_host: DriverHost
) -> None:
    host, poor = copying_host, copying.host(minFreeBytes=str(1 << 50))
    volume = copying.volume(b"1")
    request = order(volume)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    await host.wait_ready(request, cut, timeout=LONG)
    copying.write(volume, b"2")
    (fit,) = await poor.check_revert(cut, [volume], timeout=LONG)
    assert (fit.ok, fit.reason) == (False, "NoSpace"), "it is known before anything is touched"
    with pytest.raises(DriverError, match="minFreeBytes") as caught:
        await poor.revert(cut, [volume], timeout=LONG)
    with pytest.raises(DriverError, match="minFreeBytes"):
        await poor.clone(cut, order(volume).name, timeout=LONG)
    assert caught.value.reason == "NoSpace"
    assert copying.read(volume) == b"2"
    await poor.close()


async def test_a_pool_that_is_at_work_is_waited_for(storage: LibvirtStorage, host: DriverHost) -> None:
    """Libvirt refuses to read a pool again while it makes a volume in it."""
    volumes = [storage.volume(b"1") for _ in range(4)]
    stop = asyncio.Event()

    async def busy(volume_index: int) -> None:
        while not stop.is_set():
            request = order(volumes[volume_index])
            async with host.reserve(request) as slot:
                await slot.cut(request)
            await host.delete(request.name, timeout=LONG)

    workers = [asyncio.create_task(busy(n)) for n in range(2)]
    for _ in range(20):
        await host.list("vms-", timeout=LONG)
    stop.set()
    await asyncio.gather(*workers)


async def test_probes_of_killed_processes_are_swept_and_those_at_work_are_not(
    storage: LibvirtStorage, host: DriverHost
) -> None:
    folder = storage.lab.pool_path("reflink")
    old, young = folder / "vms-probe-1700000000-abcdefa", folder / f"{probes.new_name()}a"
    for path in (old, young):
        path.touch()
    await host.list("vms-", timeout=LONG)

    await host.capabilities(timeout=LONG)

    assert young.exists()
    assert not old.exists()
    with contextlib.suppress(FileNotFoundError):
        young.unlink()


@pytest.mark.parametrize("count", [1, 4])
async def test_a_clone_that_comes_late_is_deleted_too(storage: LibvirtStorage, host: DriverHost, count: int) -> None:
    """The daemon stands still past the deadline, and afterwards finds the request of a process that is dead."""
    volumes = [storage.volume(b"1") for _ in range(count)]
    before = storage.held()
    daemon = storage.lab.component("libvirtd")
    request = order(*volumes, timeout=0.5)
    async with host.reserve(replace(request, timeout=Seconds(LONG))) as slot:
        daemon.kill(signal.SIGSTOP)
        try:
            with pytest.raises(DriverTimeoutError):
                await slot.cut(request)
            deleting = asyncio.create_task(host.delete(request.name, timeout=LONG))
            await asyncio.sleep(0.3)
        finally:
            daemon.kill(signal.SIGCONT)
        await deleting

    for _ in range(3):
        await host.list("vms-", timeout=LONG)
        assert storage.held() == before
        await asyncio.sleep(0.1)
