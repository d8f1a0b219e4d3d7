"""What the driver ceph-rbd must do beside what all drivers do, on a real cluster with a client that writes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from tests.integration.drivers_support import LONG, CephStorage, delete, order, watch
from tests.lab import Lab
from tests.stack import until
from vmsnapshot_operator.core.driver import CutResult, SnapshotRequest
from vmsnapshot_operator.core.volumes import Volume
from vmsnapshot_operator.drivers import probes
from vmsnapshot_operator.drivers.ceph_rbd import CephRbdDriver
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import DriverError, DriverTimeoutError, DriverUnavailableError

MIB = 1 << 20
WITHOUT_LOCK = 1  # features: layering alone
WATCH_TIMEOUT = 15.0  # seconds: of the laboratory's OSD; 30 by default


@pytest.fixture
def storage(lab: Lab) -> Iterator[CephStorage]:
    made = CephStorage(lab)
    yield made
    made.clean()


@pytest.fixture
async def host(storage: CephStorage) -> AsyncIterator[DriverHost]:
    host = storage.host()
    yield host
    await host.close()


async def take(host: DriverHost, request: SnapshotRequest) -> CutResult:
    async with host.reserve(request) as slot:
        return await slot.cut(request)


async def test_a_group_is_one_instant_of_images_that_are_written(storage: CephStorage, host: DriverHost) -> None:
    """The writer goes from image to image: in one instant each holds what the one before it holds, or one less."""
    images = [storage.volume() for _ in range(3)]
    with storage.writer(*images):
        seen = []
        for _ in range(10):
            request = order(*images)
            cut = await take(host, request)
            await host.wait_ready(request, cut, timeout=LONG)
            seen.append([int(storage.read_handle(cut.handles[i.id])) for i in images])
            await host.delete(request.name, timeout=LONG)

    for a, b, c in seen:
        assert a >= b >= c >= a - 1, seen
    assert len({a for a, _, _ in seen}) > 5, "the writer stood still: this proves nothing"


async def test_a_single_image_is_cut_by_its_own_client(storage: CephStorage, host: DriverHost) -> None:
    image = storage.volume()
    with storage.writer(image), storage.pool() as (rbd, io), rbd.Image(io, image.label, read_only=True) as opened:
        owner = opened.list_lockers()["lockers"]
        cut = await take(host, order(image))
        assert opened.list_lockers()["lockers"] == owner != []
    assert cut.group is None


async def test_images_are_free_again_once_the_snapshot_is_ready(storage: CephStorage, host: DriverHost) -> None:
    images = [storage.volume(b"1"), storage.volume(b"1")]
    request = order(*images)
    cut = await take(host, request)
    await host.wait_ready(request, cut, timeout=LONG)

    with storage.pool() as (rbd, io):
        for image in images:
            with rbd.Image(io, image.label, read_only=True) as opened:
                assert opened.group()["name"] == ""
                assert list(opened.watchers_list()) == []


async def test_why_an_image_does_not_fit(storage: CephStorage, host: DriverHost) -> None:
    good, lockless = storage.volume(), storage.volume(features=WITHOUT_LOCK)
    grouped = storage.volume()
    with storage.pool() as (rbd, io):
        rbd.RBD().group_create(io, "foreign")
        rbd.Group(io, "foreign").add_image(io, grouped.label)

    def moved(**changes: object) -> object:
        return replace(good, writable=replace(good.writable, **changes))

    wrong = {
        "NoExclusiveLock": lockless,
        "InGroup": grouped,
        "OtherCluster": moved(hosts=("192.0.2.1:6789", "192.0.2.2:6789")),
        "UnknownCluster": moved(hosts=()),
        "OtherPool": moved(source=f"elsewhere/{good.label}"),
        "NotRbd": moved(protocol="iscsi"),
        "ImageNotFound": moved(source=f"{storage.place}/none"),
    }
    for reason, volume in wrong.items():
        fit = await host.can_handle([good, volume], timeout=LONG)  # type: ignore[list-item]
        assert (fit.ok, fit.reason) == (False, reason)
        assert fit.message
    assert '"foreign"' in (await host.can_handle([grouped], timeout=LONG)).message
    with pytest.raises(DriverError, match='in the group "foreign"') as caught:
        await host.prepare(order(good, grouped))
    assert caught.value.reason == "InGroup"
    assert (await host.can_handle([moved(hosts=("localhost",))], timeout=LONG)).ok, "a name of the same monitor"  # type: ignore[list-item]


async def test_disks_without_monitors_are_served_when_an_administrator_says_so(storage: CephStorage) -> None:
    volume = storage.volume()
    host = storage.host(allowDisksWithoutHosts="true")
    fit = await host.can_handle([replace(volume, writable=replace(volume.writable, hosts=()))], timeout=LONG)
    await host.close()
    assert fit.ok


async def test_monitors_are_compared_with_those_that_the_cluster_names(storage: CephStorage) -> None:
    """A class may be given one name of the monitors, and the domains another."""
    port = storage.lab.ceph.mon_host.rpartition(":")[2]
    host = storage.host(monHosts=f"localhost:{port}")
    fit = await host.can_handle([storage.volume()], timeout=LONG)
    await host.close()
    assert fit.ok


async def test_a_wrong_key_is_refused_and_not_told(storage: CephStorage, lab: Lab) -> None:
    key = lab.ceph.key("libvirt")
    host = DriverHost(
        "ceph",
        "ceph-rbd",
        {
            "monHosts": lab.ceph.mon_host,
            "pool": lab.ceph.pool,
            "clientName": "vmsnapshot",
            "connectTimeoutSeconds": "2",
        },
        {"key": key},
    )
    with pytest.raises(DriverUnavailableError, match=r"as client\.vmsnapshot") as caught:
        await host.capabilities(timeout=LONG)
    await host.close()
    assert key not in caught.value.message


@pytest.mark.parametrize("milliseconds", [20, 30, 40, 50])
async def test_a_killed_group_cut_does_not_hold_the_guests_locks(
    storage: CephStorage, host: DriverHost, milliseconds: int
) -> None:
    images = [storage.volume() for _ in range(3)]
    before = storage.held()
    with storage.writer(*images) as writer:
        request = order(*images)
        async with host.reserve(request) as slot:
            task = asyncio.create_task(slot.cut(request))
            await asyncio.sleep(milliseconds / 1000)
            task.cancel()
            await asyncio.wait([task])
        await host.delete(request.name, timeout=LONG)
        assert storage.held() == before
        counted = int(storage.read(images[0]) or b"0")
        began = time.monotonic()
        async with asyncio.timeout(LONG):
            while int(storage.read(images[0]) or b"0") <= counted:  # noqa: ASYNC110 - another process's progress
                await asyncio.sleep(0.05)
        stalled = time.monotonic() - began
        assert writer.poll() is None, "the guest got an I/O error"

    assert stalled < WATCH_TIMEOUT - 1


async def test_a_plain_snapshot_that_comes_late_is_deleted_too(storage: CephStorage, host: DriverHost) -> None:
    """The guest's client makes it, and does so even after whoever asked for it was killed."""
    image = storage.volume()
    before = storage.held()
    with storage.writer(image) as writer:
        request = order(image, timeout=1.0)
        async with host.reserve(request) as slot:
            writer.send_signal(signal.SIGSTOP)
            with pytest.raises(DriverTimeoutError):
                await slot.cut(request)
        deleting = asyncio.create_task(host.delete(request.name, timeout=LONG))
        await asyncio.sleep(0.2)
        writer.send_signal(signal.SIGCONT)
        await deleting
        assert storage.held() == before
        other = order(image)
        await take(host, other)  # by then the guest's client has done all that it was asked for before
        await host.delete(other.name, timeout=LONG)
        assert storage.held() == before
        assert writer.poll() is None


async def test_half_made_groups_are_listed_and_deleted(storage: CephStorage, host: DriverHost) -> None:
    images = [storage.volume(b"1"), storage.volume(b"1")]
    before = storage.held()
    request = order(*images)
    with storage.pool() as (rbd, io):  # as if the process had ended after the first image
        rbd.RBD().group_create(io, request.name)
        rbd.Group(io, request.name).add_image(io, images[0].label)

    assert await host.list(request.name, timeout=LONG) == (request.name,)
    cut = await take(host, request)  # it is completed
    assert set(cut.handles) == {i.id for i in images}
    await host.delete(request.name, timeout=LONG)
    assert storage.held() == before


async def test_an_image_that_left_the_group_in_the_meantime_fails_the_cut(
    storage: CephStorage, host: DriverHost
) -> None:
    images = [storage.volume(b"1"), storage.volume(b"1")]
    before = storage.held()
    request = order(*images)
    async with host.reserve(request) as slot:
        with storage.pool() as (rbd, io):
            rbd.Group(io, request.name).remove_image(io, images[1].label)
        with pytest.raises(DriverError, match=f"has the images {images[0].label}, not"):
            await slot.cut(request)
    await host.delete(request.name, timeout=LONG)
    assert storage.held() == before


async def test_an_image_in_the_trash_does_not_hinder_its_deletion(storage: CephStorage, host: DriverHost) -> None:
    """A VM's disk may be deleted while snapshots of it exist: Ceph keeps it in the trash for them."""
    volumes = [storage.volume(b"1"), storage.volume(b"1")]
    single, group = order(volumes[0]), order(*volumes)
    before = storage.held()
    for request in (single, group):
        cut = await take(host, request)
        await host.wait_ready(request, cut, timeout=LONG)
    with storage.pool() as (rbd, io):
        rbd.RBD().trash_move(io, volumes[0].label, 0)
        (entry,) = [t for t in rbd.RBD().trash_list(io) if t["name"] == volumes[0].label]

        await host.delete(single.name, timeout=LONG)
        await host.delete(group.name, timeout=LONG)

        assert await host.list("vms-aaaaaa-", timeout=LONG) == ()
        rbd.RBD().trash_restore(io, entry["id"], entry["name"])
    assert storage.held() == before


async def test_an_image_that_is_gone_for_good_does_not_hinder_the_rest(storage: CephStorage, host: DriverHost) -> None:
    image = storage.volume(b"1")
    request = order(image)
    await take(host, request)
    with storage.pool() as (rbd, io):
        with rbd.Image(io, image.label) as opened:
            opened.remove_snap(request.name)
        rbd.RBD().remove(io, image.label)
    storage.made.remove(image.label)

    await host.delete(request.name, timeout=LONG)

    assert await host.list("vms-aaaaaa-", timeout=LONG) == ()


async def test_an_image_in_use_is_not_rolled_back(storage: CephStorage, host: DriverHost) -> None:
    images = [storage.volume(b"0"), storage.volume(b"0")]
    request = order(*images)
    cut = await take(host, request)
    await host.wait_ready(request, cut, timeout=LONG)
    with storage.writer(images[1]):
        fits = await host.check_revert(cut, images, timeout=LONG)
        with pytest.raises(DriverError, match="is in use by") as caught:
            await host.revert(cut, images, timeout=LONG)
    assert caught.value.retryable, "who uses it may go away"
    assert [f.reason for f in fits] == ["Fits", "InUse"]
    assert int(storage.read(images[1])) > 0


async def test_who_was_killed_while_it_reverted_is_no_user_and_is_fenced(
    storage: CephStorage, host: DriverHost
) -> None:
    """Its watch and its locks outlive it; here it lives on, which the next one cannot tell from that."""
    images = [storage.volume(b"0"), storage.volume(b"0")]
    request = order(*images)
    cut = await take(host, request)
    await host.wait_ready(request, cut, timeout=LONG)
    with storage.writer(*images) as earlier:
        with storage.pool() as (rbd, io):
            with rbd.Image(io, images[0].label, read_only=True) as opened:
                (client,) = {w["addr"] for w in opened.watchers_list()}
            rbd.RBD().group_create(io, f"{request.name}.c-{client.encode().hex()}")

        fits = await host.check_revert(cut, images, timeout=LONG)
        await host.revert(cut, images, timeout=LONG)

        assert [f.reason for f in fits] == ["Fits", "Fits"]
        async with asyncio.timeout(LONG):
            while earlier.poll() is None:  # noqa: ASYNC110 - it ends when it is refused
                await asyncio.sleep(0.05)
    assert [storage.read(i) for i in images] == [b"0", b"0"]
    with storage.pool() as (rbd, io):
        assert not [g for g in rbd.RBD().group_list(io) if ".c-" in g]


async def test_a_clone_of_a_single_image_is_instant_and_outlives_its_snapshot(
    storage: CephStorage, host: DriverHost
) -> None:
    image = storage.volume(b"1")
    before = storage.held()
    request = order(image)
    cut = await take(host, request)
    await host.wait_ready(request, cut, timeout=LONG)
    storage.write(image, b"2")
    name = order(image).name

    made = (await host.clone(cut, name, timeout=LONG))[image.id]
    await host.delete(request.name, timeout=LONG)

    assert await host.list("vms-aaaaaa-", timeout=LONG) == (name,), "the snapshot is held by the clone alone"
    with storage.pool() as (rbd, io), rbd.Image(io, made.source.rpartition("/")[2], read_only=True) as opened:
        assert opened.parent_info()[1] == image.label
    assert storage.read_layer(made) == b"1"
    await host.delete(name, timeout=LONG)
    assert storage.held() == before, "Ceph keeps the snapshot only until the clone is gone"


async def test_a_clone_of_a_group_is_a_copy_that_goes_on_after_a_kill(storage: CephStorage, host: DriverHost) -> None:
    images = [storage.volume(b"1", size=256 * MIB), storage.volume(b"1")]
    content = os.urandom(MIB)
    with storage.pool() as (rbd, io), rbd.Image(io, images[0].label) as opened:
        for number in range(0, 256, 4):
            opened.write(content, number * MIB)
    request = order(*images)
    cut = await take(host, request)
    await host.wait_ready(request, cut, timeout=LONG)
    before = storage.held()
    name = order(*images).name

    async def partial() -> str:
        task = asyncio.create_task(host.clone(cut, name, timeout=LONG))
        async with asyncio.timeout(LONG):
            while True:
                await asyncio.sleep(0)
                with storage.pool() as (rbd, io):
                    found = [n for n in rbd.RBD().list(io) if n.endswith(".partial")]
                    if found and _objects(rbd, io, found[0]) >= 4:
                        break
        task.cancel()
        await asyncio.wait([task])
        return found[0]

    copy = await partial()
    assert await host.list("vms-aaaaaa-", timeout=LONG) == tuple(sorted((request.name, name)))
    with storage.pool() as (rbd, io):
        assert copy.removesuffix(".partial") not in rbd.RBD().list(io), "a half copy has the name of a whole one"
        # What is there is not copied again: so a mark in it stays.
        with rbd.Image(io, copy, read_only=True) as opened:
            (offset, *_), *_ = _extents(opened)
            dead = {w["addr"] for w in opened.watchers_list()}
        with storage.lab.ceph.connect() as (cluster, _), rbd.Image(io, copy) as opened:
            for client in dead:  # else this write waits for its lock
                cluster.blocklist_add(client, 60)
            opened.write(b"mark", offset)
    made = await host.clone(cut, name, timeout=LONG)
    with storage.pool() as (rbd, io), rbd.Image(io, made[images[0].id].source.rpartition("/")[2]) as opened:
        assert opened.read(offset, 4) == b"mark"
        opened.write(storage.whole(images[0].writable)[offset : offset + 4], offset)
    assert [storage.whole(made[i.id]) == storage.whole(i.writable) for i in images] == [True, True]

    await host.delete(name, timeout=LONG)
    await partial()
    await host.delete(name, timeout=LONG)  # at once, though the dead client's watch is still there
    assert storage.held() == before


def _extents(image: Any) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    image.diff_iterate(0, image.size(), None, lambda offset, length, exists: exists and found.append((offset, length)))
    return found


def _objects(rbd: Any, io: Any, name: str) -> int:
    try:
        with rbd.Image(io, name, read_only=True) as image:
            return len(_extents(image))
    except rbd.ImageNotFound:
        return 0


async def test_progress_of_a_copy_counts_up_to_the_whole(storage: CephStorage) -> None:
    images = [storage.volume(b"1", size=64 * MIB), storage.volume(b"1")]
    with storage.pool() as (rbd, io), rbd.Image(io, images[0].label) as opened:
        for number in range(0, 64, 4):
            opened.write(b"x" * MIB, number * MIB)
    given = CephRbdDriver.Parameters(mon_hosts=storage.lab.ceph.mon_host, pool=storage.place, client_name="vmsnapshot")
    driver = CephRbdDriver(given, CephRbdDriver.Credentials(key=SecretStr(storage.lab.ceph.key("vmsnapshot"))))
    request, name = order(*images), order(*images).name
    cut = driver.cut(request)
    driver.wait_ready(request, cut)

    seen = await watch(driver, driver.clone, cut, name)

    assert driver.progress() is None
    assert seen == sorted(set(seen), key=lambda p: p.done_bytes), "the same is not told twice"
    assert {p.total_bytes for p in seen} == {68 * MIB}
    assert len(seen) > 2
    driver.delete(name)
    driver.delete(request.name)


async def test_a_clone_that_somebody_uses_is_not_deleted(storage: CephStorage, host: DriverHost) -> None:
    image = storage.volume(b"1")
    cut = await take(host, order(image))
    name = order(image).name
    made = (await host.clone(cut, name, timeout=LONG))[image.id]
    with storage.writer(storage.of(made.source.rpartition("/")[2])):
        with pytest.raises(DriverError, match="deleting the clones") as caught:
            await host.delete(name, timeout=LONG)
        assert (caught.value.reason, caught.value.retryable) == ("InUse", True)
        assert int(storage.read_layer(made)) > 0
    async with asyncio.timeout(LONG):
        while True:  # until the cluster notices that its user is gone
            try:
                await host.delete(name, timeout=LONG)
                break
            except DriverError as error:
                assert error.reason == "InUse"  # noqa: PT017


async def test_a_process_whose_client_was_fenced_connects_again(storage: CephStorage, host: DriverHost) -> None:
    image = storage.volume(b"1")
    await host.list("vms-", timeout=LONG)
    with storage.lab.ceph.connect() as (cluster, io):
        rbd = __import__("rbd")
        with rbd.Image(io, image.label) as opened:  # a client that can be seen is a client with an open image
            await host.prepare(order(image))
            mine = cluster.get_addrs()
            (other,) = {w["addr"] for w in opened.watchers_list()} - {mine}
        cluster.blocklist_add(other, 60)
        cluster.wait_for_latest_osdmap()

    async def list_until_shut_out() -> None:
        while True:  # the OSD learns of it in its own time
            await host.list("vms-", timeout=LONG)

    with pytest.raises(DriverUnavailableError) as caught:
        await asyncio.wait_for(list_until_shut_out(), LONG)
    assert caught.value.retryable
    assert await host.list("vms-", timeout=LONG)


async def test_probes_of_killed_processes_are_swept_and_those_at_work_are_not(
    storage: CephStorage, host: DriverHost
) -> None:
    old, young = "vms-probe-1700000000-abcdef", probes.new_name()
    with storage.pool() as (rbd, io):
        for name in (old, young):
            rbd.RBD().create(io, name, 1 << 22, features=5, old_format=False)
            rbd.RBD().group_create(io, name)
            rbd.Group(io, name).add_image(io, name)
        await host.capabilities(timeout=LONG)

        left = set(rbd.RBD().list(io)) - set(storage.made)
        assert young in left
        assert old not in left
        assert old not in rbd.RBD().group_list(io)
        rbd.RBD().group_remove(io, young)
        rbd.RBD().remove(io, young)


async def test_a_client_that_is_out_of_sight_is_not_shut_out_of_its_disk(
    storage: CephStorage, host: DriverHost
) -> None:
    """Ceph puts the owner of a lock on the blocklist if somebody takes the lock while the owner is not seen.

    A VM whose host lost its way to Ceph for a while must find its disk again. A client that is gone for good hinders nothing for long.
    """
    alone, group = storage.volume(), [storage.volume(), storage.volume()]
    images = [alone, *group]
    with storage.writer(*images) as client:
        before = order(alone)
        await take(host, before)
        shut_out = blocked(storage)
        client.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(until, "nobody sees it", lambda: not any(in_sight(storage, i) for i in images))
        with pytest.raises(DriverError, match="out of the OSDs' sight") as single:
            await take(host, order(alone))
        with pytest.raises(DriverError) as several:
            await take(host, order(*group))
        with pytest.raises(DriverError) as deleting:
            await host.delete(before.name, timeout=LONG)
        assert {e.value.reason for e in (single, several, deleting)} == {"LockNotGiven"}
        assert single.value.retryable
        assert blocked(storage) <= shut_out, "nobody more was shut out"
        client.send_signal(signal.SIGCONT)
        written = int(storage.read(alone))
        await asyncio.to_thread(until, "it writes on", lambda: int(storage.read(alone)) > written + 100)
        cut = await take(host, order(*group))
        assert int(storage.read_handle(cut.handles[group[0].id])) > written
    end = time.monotonic() + 2 * LONG
    while (refused := await refusal(host.delete(before.name, timeout=LONG))) is not None:
        assert refused.retryable
        assert time.monotonic() < end
        await asyncio.sleep(1)
    assert await host.list(before.name, timeout=LONG) == ()


async def refusal(done: Awaitable[object]) -> DriverError | None:
    try:
        await done
    except DriverError as error:
        return error
    return None


def in_sight(storage: CephStorage, volume: Volume) -> bool:
    """Whether the OSDs see the one that holds the image's lock."""
    with storage.pool() as (rbd, io), rbd.Image(io, volume.label, read_only=True) as image:
        owners = {address for _, _, address in (image.list_lockers() or {}).get("lockers", ())}
        return bool(owners & {w["addr"] for w in image.watchers_list()})


def blocked(storage: CephStorage) -> set[str]:
    with storage.lab.ceph.connect() as (cluster, _):
        return {*cluster.mon_command('{"prefix": "osd blocklist ls"}', b"")[1].decode().splitlines()}


@pytest.mark.parametrize("how", ["listed alone", "not listed yet", "renamed by half"])
async def test_names_that_a_killed_clone_left_are_completed_and_deleted(
    storage: CephStorage, host: DriverHost, how: str
) -> None:
    """An image is made and renamed in steps; here its maker was killed between two of them."""
    images = [storage.volume(b"1"), storage.volume(b"2")]
    cut = await take(host, order(*images))
    before = storage.held()
    for is_completed in (True, False):
        if how == "not listed yet" and not is_completed:
            continue  # nothing says its name any more: an object of 16 bytes stays
        name = order(*images).name
        made = await host.clone(cut, name, timeout=LONG)
        with storage.pool() as (rbd, io):
            target = made[images[0].id].source.rpartition("/")[2]
            partial = f"{target}.partial"
            rbd.RBD().rename(io, target, partial)
            leads = io.read(f"rbd_id.{partial}")
            if how == "renamed by half":
                io.write_full(f"rbd_id.{target}", leads)
            else:
                image = leads[4:].decode()
                if how == "not listed yet":
                    rbd.RBD().remove(io, partial)
                    io.write_full(f"rbd_id.{partial}", leads)
                else:
                    for part in ("rbd_header", "rbd_object_map"):
                        io.remove_object(f"{part}.{image}")
        if is_completed:
            made = await host.clone(cut, name, timeout=LONG)
            assert [storage.whole(made[i.id])[:1] for i in images] == [b"1", b"2"]
        await delete(host, name)
        assert storage.held() == before
        with storage.pool() as (_, io):
            assert [o.key for o in io.list_objects() if target in o.key] == []
