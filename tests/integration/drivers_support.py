"""Real storage for the drivers' tests: volumes of our own, what they hold, what the storage holds. No guest is needed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import libvirt

from tests.lab import Lab
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.drivers import probes
from vmsnapshot_operator.drivers.ceph_cluster import binding
from vmsnapshot_operator.drivers.ceph_snapshots import snapshot_id
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import DriverError

LONG = 60.0  # seconds: a guard, never reached
SIZE = 12 << 20  # bytes: three objects of an RBD image
INSTALLATION = "aaaaaa"
_NUMBERS = itertools.count(1)
ROOT = Path(__file__).parents[2]


def order(
    *volumes: Volume, uid: str = "", attempt: int = 1, installation: str = INSTALLATION, timeout: float = LONG
) -> SnapshotRequest:
    """A request with a name that no other test has."""
    name = names.request_name(
        installation, uid or f"{os.getpid()}-{next(_NUMBERS)}", attempt, "class", [v.id for v in volumes]
    )
    return SnapshotRequest(name=name, volumes=volumes, timeout=Seconds(timeout))


async def watch(driver: Any, call: Callable[..., Any], *arguments: Any) -> list[Progress]:
    """Let a driver in this process work, and ask it all the time how far it is."""
    seen = []
    work = asyncio.create_task(asyncio.to_thread(call, *arguments))
    while not work.done():
        found = driver.progress()
        if found is not None:
            seen.append(found)
        await asyncio.sleep(0.002)
    await work
    return seen


async def delete(host: DriverHost, name: str) -> None:
    """Delete as the workflow does: again for as long as it is worth it."""
    async with asyncio.timeout(LONG):
        while True:
            try:
                return await host.delete(name, timeout=LONG)
            except DriverError as error:
                assert error.retryable, error  # noqa: PT017 - something is still being made


class Storage(Protocol):
    """One storage system with a driver, and a way around the driver to make and look at things."""

    group_is_atomic: bool

    def host(self, **parameters: str) -> DriverHost: ...
    def volume(self, content: bytes = b"") -> Volume: ...
    def write(self, volume: Volume, content: bytes, offset: int = 0) -> None: ...
    def resize(self, volume: Volume, size: int) -> None: ...
    def read(self, volume: Volume) -> bytes: ...
    def read_handle(self, handle: Handle) -> bytes: ...
    def read_layer(self, layer: Layer) -> bytes: ...
    def whole(self, layer: Layer) -> bytes:
        """Each byte of a volume."""
        ...

    def everything(self) -> set[str]:
        """What the storage has beside the tests' volumes themselves."""
        ...

    def held(self) -> set[str]:
        """All of that but probes: the operator beside the tests makes some now and then."""
        return {name for name in self.everything() if probes.PREFIX not in name}

    def remove(self, volume: Volume) -> None: ...
    def remove_held(self, name: str) -> None: ...


@dataclass
class CephStorage(Storage):
    """Images in the laboratory's pool; `namespace` may be empty."""

    lab: Lab
    namespace: str = ""
    group_is_atomic: bool = True
    made: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"{self.lab.ceph.pool}/{self.namespace}" if self.namespace else self.lab.ceph.pool

    def host(self, **parameters: str) -> DriverHost:
        given = {
            "monHosts": self.lab.ceph.mon_host,
            "pool": self.lab.ceph.pool,
            "namespace": self.namespace,
            "clientName": "vmsnapshot",
        }
        return DriverHost("ceph", "ceph-rbd", given | parameters, {"key": self.lab.ceph.key("vmsnapshot")})

    @contextlib.contextmanager
    def pool(self) -> Iterator[tuple[Any, Any]]:
        binding("rados")  # wherever the distribution keeps it
        rbd = binding("rbd")
        with self.lab.ceph.connect() as (_, io):
            io.set_namespace(self.namespace)
            yield rbd, io

    def volume(self, content: bytes = b"", features: int = 61, size: int = SIZE) -> Volume:
        image = f"drv-{os.getpid()}-{next(_NUMBERS)}"
        with self.pool() as (rbd, io):
            rbd.RBD().create(io, image, size, features=features, old_format=False)
        self.made.append(image)
        volume = self.of(image)
        if content:
            self.write(volume, content)
        return volume

    def of(self, image: str) -> Volume:
        layer = Layer(
            kind=SourceKind.NETWORK,
            protocol="rbd",
            source=f"{self.place}/{image}",
            format="raw",
            pool=self.lab.ceph.pool,
            hosts=(self.lab.ceph.mon_host,),
        )
        return Volume(id=volume_id(layer), label=image, size_bytes=SIZE, writable=layer)

    def write(self, volume: Volume, content: bytes, offset: int = 0) -> None:
        with self.pool() as (rbd, io), rbd.Image(io, volume.label) as image:
            image.write(content, offset)
            image.flush()

    def resize(self, volume: Volume, size: int) -> None:
        with self.pool() as (rbd, io), rbd.Image(io, volume.label) as image:
            image.resize(size)

    def whole(self, layer: Layer) -> bytes:
        with self.pool() as (rbd, io), rbd.Image(io, layer.source.rpartition("/")[2], read_only=True) as image:
            return bytes(image.read(0, image.size()))

    def read(self, volume: Volume) -> bytes:
        return self.read_layer(volume.writable)

    def read_layer(self, layer: Layer) -> bytes:
        with self.pool() as (rbd, io), rbd.Image(io, layer.source.rpartition("/")[2], read_only=True) as image:
            return bytes(image.read(0, 64).rstrip(b"\0"))

    def read_handle(self, handle: Handle) -> bytes:
        source, _, name = handle.rpartition("@")
        with self.pool() as (rbd, io), rbd.Image(io, source.rpartition("/")[2], read_only=True) as image:
            found = snapshot_id(image, name)
            assert found is not None, handle
            image.set_snap_by_id(found)
            return bytes(image.read(0, 64).rstrip(b"\0"))

    def everything(self) -> set[str]:
        """Groups, and snapshots of the tests' images, and images that are not of the tests."""
        found = set()
        with self.pool() as (rbd, io):
            found |= {f"group {g}" for g in rbd.RBD().group_list(io)}
            for name in rbd.RBD().list(io):
                if name not in self.made:
                    found.add(f"image {name}")
                    continue
                with rbd.Image(io, name, read_only=True) as image:
                    found |= {f"{name}@{s['name']}" for s in image.list_snaps()}
        return found

    def remove(self, volume: Volume) -> None:
        self.made.remove(volume.label)
        with self.pool() as (rbd, io):
            rbd.RBD().remove(io, volume.label)

    def remove_held(self, name: str) -> None:
        with self.pool() as (rbd, io):
            rbd.RBD().remove(io, name.rpartition("/")[2])

    def clean(self) -> None:
        """Remove the tests' images with whatever a failed test left on them."""
        with self.pool() as (rbd, io):
            for group in rbd.RBD().group_list(io):
                if group.startswith(("vms-aaaaaa-", "vms-bbbbbb-", "foreign")):
                    rbd.RBD().group_remove(io, group)
            for name in [*[n for n in rbd.RBD().list(io) if n.startswith("vms-aaaaaa-")], *self.made]:
                with contextlib.suppress(rbd.ImageNotFound):
                    with rbd.Image(io, name) as image:
                        for snapshot in list(image.list_snaps()):
                            image.remove_snap(snapshot["name"])
                    rbd.RBD().remove(io, name)

    @contextlib.contextmanager
    def writer(self, *volumes: Volume) -> Iterator[subprocess.Popen[str]]:
        """A client that writes 1, 2, 3, … to the first image, then the second, …: as a guest's QEMU it owns the locks.

        It prints each stall of more than half a second.
        """
        arguments = [str(self.lab.ceph.conf), self.lab.ceph.pool, self.namespace, *[v.label for v in volumes]]
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "operator")},
        ) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "writes\n"
                yield process
            finally:
                process.kill()


_WRITER = """
import sys, time
from vmsnapshot_operator.drivers.ceph_cluster import binding
rados, rbd = binding("rados"), binding("rbd")
conf, pool, namespace, *names = sys.argv[1:]
cluster = rados.Rados(conffile=conf)
cluster.connect()
io = cluster.open_ioctx(pool)
io.set_namespace(namespace)
images = [rbd.Image(io, n) for n in names]
n = 0
while True:
    n += 1
    began = time.monotonic()
    for image in images:
        image.write(str(n).encode().ljust(64, b"\\0"), 0)
        image.flush()
    if time.monotonic() - began > 0.5 and n > 1:
        print(f"stalled {time.monotonic() - began:.2f}", flush=True)
    if n == 1:
        print("writes", flush=True)
    time.sleep(0.001)
"""


@dataclass
class LibvirtStorage(Storage):
    """Files in one of the laboratory's pools; `destination` is the pool of the clones."""

    lab: Lab
    pool: str = "reflink"
    destination: str = "reflink"
    group_is_atomic: bool = False
    made: list[str] = field(default_factory=list)

    def host(self, **parameters: str) -> DriverHost:
        given = {
            "poolName": self.pool,
            "destinationPoolName": self.destination,
            "uriTransport": "unix",
            "socketPath": str(self.lab.libvirt_socket),
        }
        return DriverHost("files", "libvirt-volume", given | parameters, {})

    def volume(self, content: bytes = b"", format: str = "raw") -> Volume:  # noqa: A002 - the field's name
        path = self.lab.pool_path(self.pool) / f"drv-{os.getpid()}-{next(_NUMBERS)}.img"
        with path.open("xb") as file:  # behind libvirt's back: it finds it by reading its pool again
            file.truncate(SIZE)
            file.write(content)
        self.made.append(path.name)
        layer = Layer(kind=SourceKind.FILE, source=str(path), format=format, pool=self.pool)
        return Volume(id=volume_id(layer), label=path.name, size_bytes=SIZE, writable=layer)

    def write(self, volume: Volume, content: bytes, offset: int = 0) -> None:
        with Path(volume.writable.source).open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def resize(self, volume: Volume, size: int) -> None:
        os.truncate(volume.writable.source, size)

    def whole(self, layer: Layer) -> bytes:
        return Path(layer.source).read_bytes()

    def read(self, volume: Volume) -> bytes:
        return self.read_layer(volume.writable)

    def read_layer(self, layer: Layer) -> bytes:
        return self.read_handle(Handle(layer.source))

    def read_handle(self, handle: Handle) -> bytes:
        with Path(handle).open("rb") as file:
            return file.read(64).rstrip(b"\0")

    def everything(self) -> set[str]:
        files = {p.name for pool in {self.pool, self.destination} for p in self.lab.pool_path(pool).iterdir()}
        connection, known = self.lab.libvirt(), set()
        try:
            for pool in map(connection.storagePoolLookupByName, {self.pool, self.destination}):
                with contextlib.suppress(libvirt.libvirtError):  # while something is copied it cannot be read again
                    pool.refresh(0)  # the laboratory deletes a guest's files without a word to libvirt
                known |= {v.name() for v in pool.listAllVolumes(0)}
        finally:
            connection.close()
        return (files | known) - set(self.made) - {"lost+found"}

    def remove(self, volume: Volume) -> None:
        self.made.remove(volume.label)
        Path(volume.writable.source).unlink()

    def remove_held(self, name: str) -> None:
        Path(name).unlink()

    def clean(self) -> None:
        """Remove the tests' files with whatever a failed test left."""
        for pool in {self.pool, self.destination}:
            for path in self.lab.pool_path(pool).iterdir():
                if path.name in self.made or path.name.startswith(("vms-aaaaaa-", "vms-bbbbbb-", "vms-probe-")):
                    path.unlink()
        connection = self.lab.libvirt()
        try:
            for pool in {self.pool, self.destination}:
                connection.storagePoolLookupByName(pool).refresh(0)
        finally:
            connection.close()
