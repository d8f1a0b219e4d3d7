"""What every driver must do, on real storage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine, Iterator

import pytest

from tests.integration.drivers_support import LONG, CephStorage, LibvirtStorage, Storage, delete, order
from tests.lab import Lab
from tests.stack import until
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import CutKind, CutResult, Hold, SnapshotRequest
from vmsnapshot_operator.core.volumes import Volume
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import AlreadyCutError, DriverError, DriverUnavailableError

MIB = 1 << 20


@pytest.fixture(params=["ceph", "ceph-namespace", "files"])
def storage(request: pytest.FixtureRequest, lab: Lab) -> Iterator[Storage]:
    made: CephStorage | LibvirtStorage
    if request.param == "files":
        made = LibvirtStorage(lab)
    else:
        made = CephStorage(lab, namespace="drivers" if request.param == "ceph-namespace" else "")
        if made.namespace:
            with made.pool() as (rbd, io):
                io.set_namespace("")
                if not rbd.RBD().namespace_exists(io, made.namespace):
                    rbd.RBD().namespace_create(io, made.namespace)
    yield made
    made.clean()


@pytest.fixture
async def host(storage: Storage) -> AsyncIterator[DriverHost]:
    host = storage.host()
    yield host
    await host.close()


async def take(host: DriverHost, request: SnapshotRequest) -> CutResult:
    """Take a snapshot as the workflow does."""
    await host.prepare(request)
    async with host.reserve(request) as slot:
        cut = await slot.cut(request)
    await host.wait_ready(request, cut, timeout=LONG)
    return cut


async def test_capabilities_are_probed_and_the_probe_leaves_nothing(storage: Storage, host: DriverHost) -> None:
    before = storage.held()

    found = await host.capabilities(timeout=LONG)

    assert found.cut is CutKind.INSTANT
    assert found.atomic is storage.group_is_atomic
    assert (found.revert, found.clone) == (True, True)
    assert storage.held() == before
    until("no probe is left, ours or the operator's beside us", lambda: storage.everything() == before)


async def test_a_cut_holds_what_was_there_and_nothing_later(storage: Storage, host: DriverHost) -> None:
    a, b = storage.volume(b"a1"), storage.volume(b"b1")
    before = storage.held()
    assert (await host.can_handle([a, b], timeout=LONG)).ok
    request = order(a, b)

    cut = await take(host, request)
    storage.write(a, b"a2")
    storage.write(b, b"b2")

    assert [storage.read_handle(cut.handles[v.id]) for v in (a, b)] == [b"a1", b"b1"]
    assert cut.atomic is storage.group_is_atomic
    assert cut.hold is Hold.NOTHING
    await host.wait_ready(request, cut, timeout=LONG)  # again
    await host.delete(request.name, timeout=LONG)
    assert storage.held() == before
    assert [storage.read(v) for v in (a, b)] == [b"a2", b"b2"]


async def test_one_volume_is_always_one_instant(storage: Storage, host: DriverHost) -> None:
    cut = await take(host, order(storage.volume(b"a1")))
    assert cut.atomic


@pytest.mark.parametrize("count", [1, 2])
async def test_a_name_is_cut_once(storage: Storage, host: DriverHost, count: int) -> None:
    volumes = [storage.volume(b"one") for _ in range(count)]
    request = order(*volumes)
    async with host.reserve(request) as slot, host.reserve(request) as late:
        cut = await slot.cut(request)
        for volume in volumes:
            storage.write(volume, b"two")

        with pytest.raises(AlreadyCutError):
            await late.cut(request)
    with pytest.raises(AlreadyCutError):
        await host.prepare(request)

    assert [storage.read_handle(cut.handles[v.id]) for v in volumes] == [b"one"] * count
    await host.delete(request.name, timeout=LONG)
    await take(host, request)  # after a delete the name is free


async def test_preparing_twice_is_as_good_as_once(storage: Storage, host: DriverHost) -> None:
    a, b = storage.volume(b"1"), storage.volume(b"1")
    request = order(a, b)
    await host.prepare(request)
    await host.prepare(request)
    async with host.reserve():  # the process that prepared is busy
        cut = await take(host, request)
    assert set(cut.handles) == {a.id, b.id}


async def test_deleting_what_is_not_there_is_success(storage: Storage, host: DriverHost) -> None:
    request = order(storage.volume())
    await host.delete(request.name, timeout=LONG)
    await host.delete(request.name, timeout=LONG)


@pytest.mark.parametrize("count", [1, 2])
async def test_what_was_prepared_and_never_cut_is_deleted(storage: Storage, host: DriverHost, count: int) -> None:
    request = order(*[storage.volume(b"x") for _ in range(count)])
    before = storage.held()
    await host.prepare(request)

    await host.delete(request.name, timeout=LONG)

    assert storage.held() == before
    assert await host.list(request.name, timeout=LONG) == ()


async def test_snapshots_of_different_sets_stand_side_by_side(storage: Storage, host: DriverHost) -> None:
    a, b, c = (storage.volume(b"1") for _ in range(3))
    before = storage.held()
    requests = [order(*volumes) for volumes in ((a, b), (a,), (b, c), (a, b, c), (c,))]
    cuts = []
    for number, request in enumerate(requests):
        for volume in (a, b, c):
            storage.write(volume, str(number).encode())
        cuts.append(await take(host, request))

    for number in (2, 0, 4, 3, 1):  # deleted in another order than made
        for other, cut in enumerate(cuts):
            if requests[other].name in await host.list("vms-", timeout=LONG):
                assert {storage.read_handle(h) for h in cut.handles.values()} == {str(other).encode()}
        await host.delete(requests[number].name, timeout=LONG)

    assert storage.held() == before


async def test_a_second_attempt_does_not_need_the_first_to_be_deleted(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"1"))
    before = storage.held()
    first, second = order(*volumes, uid="same"), order(*volumes, uid="same", attempt=2)
    await host.prepare(first)
    async with host.reserve(first) as slot:
        old = await slot.cut(first)  # never made ready, and its delete hangs
    for volume in volumes:
        storage.write(volume, b"2")

    new = await take(host, second)

    assert {storage.read_handle(h) for h in new.handles.values()} == {b"2"}
    assert {storage.read_handle(h) for h in old.handles.values()} == {b"1"}
    prefix = names.object_prefix("aaaaaa", "same")
    assert set(await host.list(prefix, timeout=LONG)) == {first.name, second.name}
    await host.delete(first.name, timeout=LONG)
    assert {storage.read_handle(h) for h in new.handles.values()} == {b"2"}
    await host.delete(second.name, timeout=LONG)
    assert storage.held() == before


async def test_neighbours_are_neither_listed_nor_touched(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"1"))
    mine, theirs = order(*volumes, uid="x"), order(*volumes, uid="x", installation="bbbbbb")
    my_cut, their_cut = await take(host, mine), await take(host, theirs)

    assert await host.list("vms-aaaaaa-", timeout=LONG) == (mine.name,)
    assert await host.list("vms-bbbbbb-", timeout=LONG) == (theirs.name,)
    await host.delete(mine.name, timeout=LONG)

    assert await host.list("vms-", timeout=LONG) == (theirs.name,)
    assert {storage.read_handle(h) for h in their_cut.handles.values()} == {b"1"}
    assert my_cut.handles.keys() == their_cut.handles.keys()
    assert [storage.read(v) for v in volumes] == [b"1", b"1"]


async def test_many_at_once(storage: Storage, host: DriverHost) -> None:
    volumes = [storage.volume(str(n).encode()) for n in range(8)]
    before = storage.held()
    requests = [order(*volumes[n : n + 2]) for n in range(0, 8, 2)]

    cuts = await asyncio.gather(*[take(host, r) for r in requests])
    for volume in volumes:
        storage.write(volume, b"later")

    got = [storage.read_handle(cut.handles[v.id]) for cut, r in zip(cuts, requests, strict=True) for v in r.volumes]
    assert got == [str(n).encode() for n in range(8)]
    await asyncio.gather(*[host.delete(r.name, timeout=LONG) for r in requests])
    assert storage.held() == before


@pytest.mark.parametrize("count", [1, 3])
async def test_what_a_killed_cut_left_is_found_and_deleted_by_name(
    storage: Storage, host: DriverHost, count: int
) -> None:
    volumes = tuple(storage.volume(b"x") for _ in range(count))
    before = storage.held()
    for attempt, milliseconds in enumerate((0, 1, 2, 4, 8, 15, 25, 40), start=1):
        request = order(*volumes, uid="killed", attempt=attempt)
        async with host.reserve(request) as slot:
            task = asyncio.create_task(slot.cut(request))
            await asyncio.sleep(milliseconds / 1000)
            task.cancel()
            await asyncio.wait([task])

        await delete(host, request.name)
        assert await host.list(request.name, timeout=LONG) == ()
        assert storage.held() == before, f"killed after {milliseconds} ms"
    assert await take(host, order(*volumes))


async def test_a_cut_in_which_one_volume_is_gone_leaves_nothing(storage: Storage, host: DriverHost) -> None:
    a, b = storage.volume(b"1"), storage.volume(b"1")
    before = storage.held()
    request = order(a, b)
    async with host.reserve(request) as slot:
        await host.delete(request.name, timeout=LONG)  # so that even an image in a group can be removed
        storage.remove(b)
        with pytest.raises(DriverError):
            await slot.cut(request)
    await host.delete(request.name, timeout=LONG)

    assert storage.held() == before


async def test_revert_sets_back_and_can_be_repeated(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"1"))
    cut = await take(host, order(*volumes))
    for _ in range(2):
        for volume in volumes:
            storage.write(volume, b"2")
        assert all(f.ok for f in await host.check_revert(cut, volumes, timeout=LONG))
        await host.revert(cut, volumes, timeout=LONG)
        await host.revert(cut, volumes, timeout=LONG)
        assert [storage.read(v) for v in volumes] == [b"1", b"1"]
    assert {storage.read_handle(h) for h in cut.handles.values()} == {b"1"}


async def test_a_lost_snapshot_is_not_reverted_to(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"),)
    request = order(*volumes)
    cut = await take(host, request)
    assert await host.missing([cut], timeout=LONG) == frozenset()
    await host.delete(request.name, timeout=LONG)

    assert await host.missing([cut], timeout=LONG) == set(cut.handles.values())
    (fit,) = await host.check_revert(cut, volumes, timeout=LONG)
    assert (fit.ok, fit.reason) == (False, "SnapshotLost")
    with pytest.raises(DriverError, match="does not exist"):
        await host.revert(cut, volumes, timeout=LONG)
    with pytest.raises(DriverError, match="does not exist"):
        await host.wait_ready(request, cut, timeout=LONG)
    assert storage.read(volumes[0]) == b"1"


async def test_clones_are_new_volumes(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"2"))
    cut = await take(host, order(*volumes))
    for volume in volumes:
        storage.write(volume, b"x")
    name = order(*volumes).name

    made = await host.clone(cut, name, timeout=LONG)
    again = await host.clone(cut, name, timeout=LONG)

    assert made == again
    assert [storage.read_layer(made[v.id]) for v in volumes] == [b"1", b"2"]
    assert [storage.read(v) for v in volumes] == [b"x", b"x"]
    await host.keep(name, timeout=LONG)
    for layer in made.values():
        storage.remove_held(layer.source)


async def test_a_clone_is_deleted_by_its_name_until_it_is_kept_and_never_after(
    storage: Storage, host: DriverHost
) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"2"))
    request = order(*volumes)
    cut = await take(host, request)
    before = storage.held()
    name = order(*volumes).name

    await host.clone(cut, name, timeout=LONG)
    assert name in await host.list("vms-aaaaaa-", timeout=LONG)
    await host.delete(name, timeout=LONG)
    assert storage.held() == before
    assert await host.list(name, timeout=LONG) == ()

    made = await host.clone(cut, name, timeout=LONG)
    for _ in range(2):
        await host.keep(name, timeout=LONG)
    assert await host.list(name, timeout=LONG) == ()
    await host.delete(name, timeout=LONG)
    with pytest.raises(AlreadyCutError, match="belongs to a VM"):
        await host.clone(cut, name, timeout=LONG)
    await host.delete(request.name, timeout=LONG)

    assert [storage.read_layer(made[v.id]) for v in volumes] == [b"1", b"2"], "the disks of a VM are gone"
    assert await host.list("vms-aaaaaa-", timeout=LONG) == ()
    for layer in made.values():
        storage.remove_held(layer.source)


def written(storage: Storage, *volumes: Volume) -> list[bytes]:
    """Write in several places, across 4 MiB, and return what the volumes hold."""
    for number, volume in enumerate(volumes):
        storage.write(volume, os.urandom(100_000) + bytes([number]), 4 * MIB - 50_000)
        storage.write(volume, os.urandom(512), 8 * MIB - 512)
    return [storage.whole(v.writable) for v in volumes]


async def test_a_volume_set_back_holds_exactly_what_was_cut(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume())
    first = written(storage, *volumes)
    one = await take(host, order(*volumes))
    second = written(storage, *volumes)
    storage.write(volumes[0], b"later", 9 * MIB)  # where there was nothing
    second[0] = storage.whole(volumes[0].writable)
    two = await take(host, order(*volumes))
    written(storage, *volumes)

    for cut, held in ((one, first), (two, second), (one, first)):  # back and forth: no cut is lost by going back
        await host.revert(cut, volumes, timeout=LONG)
        assert [storage.whole(v.writable) == h for v, h in zip(volumes, held, strict=True)] == [True, True]
    made = await host.clone(two, order(*volumes).name, timeout=LONG)
    assert [storage.whole(made[v.id]) == h for v, h in zip(volumes, second, strict=True)] == [True, True]


async def test_only_some_volumes_are_set_back(storage: Storage, host: DriverHost) -> None:
    volumes = (storage.volume(b"1"), storage.volume(b"1"), storage.volume(b"1"))
    first = written(storage, *volumes)
    cut = await take(host, order(*volumes))
    second = written(storage, *volumes)
    storage.write(volumes[1], b"later", 9 * MIB)  # where there was nothing

    (fit,) = await host.check_revert(cut, volumes[1:2], timeout=LONG)
    for _ in range(2):
        await host.revert(cut, volumes[1:2], timeout=LONG)

    assert fit.ok
    expected = (second[0], first[1], second[2])
    assert [storage.whole(v.writable) == h for v, h in zip(volumes, expected, strict=True)] == [True] * 3


async def test_why_a_volume_is_not_set_back(storage: Storage, host: DriverHost) -> None:
    good, grown, gone, other = (storage.volume(b"1") for _ in range(4))
    request = order(good, grown, gone)
    cut = await take(host, request)
    before = [storage.whole(v.writable) for v in (good, other)]
    storage.resize(grown, 16 * MIB)
    if isinstance(storage, CephStorage):
        with storage.pool() as (rbd, io):
            rbd.RBD().rename(io, gone.label, f"{gone.label}-away")
        storage.made.append(f"{gone.label}-away")
    else:
        storage.remove(gone)

    volumes = (good, grown, gone, other)
    fits = await host.check_revert(cut, volumes, timeout=LONG)
    assert [f.reason for f in fits] == ["Fits", "SizeChanged", "VolumeMissing", "OtherVolume"]
    assert all(f.ok or volume.label in f.message for f, volume in zip(fits, volumes, strict=True))
    for bad in (grown, gone, other):
        with pytest.raises(DriverError) as caught:
            await host.revert(cut, (good, bad), timeout=LONG)
        assert not caught.value.retryable
    assert [storage.whole(v.writable) for v in (good, other)] == before
    assert len(storage.whole(grown.writable)) == 16 * MIB


@pytest.mark.parametrize("count", [1, 3])
async def test_a_killed_revert_is_ended_by_the_next_one(storage: Storage, host: DriverHost, count: int) -> None:
    volumes = tuple(storage.volume(b"1") for _ in range(count))
    first = written(storage, *volumes)
    cut = await take(host, order(*volumes))
    held = storage.held()
    for milliseconds in (1, 10, 20, 40, 80, 160):
        written(storage, *volumes)
        await kill_after(host.revert(cut, volumes, timeout=LONG), milliseconds)

        fits = await host.check_revert(cut, volumes, timeout=LONG)
        assert [f.reason for f in fits] == ["Fits"] * count, milliseconds
        await host.revert(cut, volumes, timeout=LONG)
        assert [storage.whole(v.writable) == h for v, h in zip(volumes, first, strict=True)] == [True] * count
        assert {n for n in storage.held() if "probe" not in n} == held, f"killed after {milliseconds} ms"


@pytest.mark.parametrize("count", [1, 2])
async def test_a_killed_clone_is_completed_or_deleted_by_its_name(
    storage: Storage, host: DriverHost, count: int
) -> None:
    volumes = tuple(storage.volume(b"1") for _ in range(count))
    first = written(storage, *volumes)
    cut = await take(host, order(*volumes))
    before = storage.held()
    for number, milliseconds in enumerate((1, 10, 20, 40, 80, 160)):
        name = order(*volumes).name
        await kill_after(host.clone(cut, name, timeout=LONG), milliseconds)
        if number % 2:
            made = await host.clone(cut, name, timeout=LONG)
            assert [storage.whole(made[v.id]) == h for v, h in zip(volumes, first, strict=True)] == [True] * count
        await delete(host, name)
        assert storage.held() == before, f"killed after {milliseconds} ms"
        assert await host.list(name, timeout=LONG) == ()


async def kill_after(call: Coroutine[object, object, object], milliseconds: int) -> None:
    """Start a call and kill its process in the middle."""
    task = asyncio.create_task(call)
    await asyncio.sleep(milliseconds / 1000)
    task.cancel()
    await asyncio.wait([task])


async def test_an_unknown_volume_does_not_fit(storage: Storage, host: DriverHost) -> None:
    gone: Volume = storage.volume()
    storage.remove(gone)
    fit = await host.can_handle([gone], timeout=LONG)
    assert not fit.ok
    assert gone.label in fit.message
    with pytest.raises(DriverError, match=gone.label):
        await host.prepare(order(gone))


async def test_storage_that_does_not_answer_is_unavailable_and_worth_a_retry(storage: Storage) -> None:
    if isinstance(storage, CephStorage):
        host = storage.host(monHosts="127.0.0.1:1", connectTimeoutSeconds="1")
    else:
        host = storage.host(socketPath="/nonexistent/socket")
    await host.start()  # it is the storage that is away, not the driver

    with pytest.raises(DriverUnavailableError) as caught:
        await host.delete(order(storage.volume()).name, timeout=LONG)
    await host.close()

    assert caught.value.retryable
