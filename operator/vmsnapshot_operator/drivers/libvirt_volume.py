"""Driver `libvirt-volume`: clones of raw volumes in a directory pool, by libvirt's storage API (virStorage*) alone.

Where the pool's file system has reflink (xfs, btrfs), a clone is a new file that shares the blocks: 3 to 4 ms while QEMU has
the disk open, whatever its size. One clone is one instant, since the file system locks the file for it; several are made at
the same time and still one after the other, so they are not. Elsewhere the cut only names the clones and `wait_ready`
copies them, while something keeps the base still.

libvirt 9 reflinks raw volumes only (a qcow2 volume would be converted, that is copied): others are refused.

What is held under which name is said in `libvirt_names`; a handle is the path of the cut. libvirt goes on with a clone when the
process that asked for it is killed; `delete` therefore reads the directory again, and a clone still being made is an error
to be retried (`libvirt_copies`).
What comes after the cut is `libvirt_held`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import libvirt
from pydantic import Field

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Hold, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, SourceKind, Volume
from vmsnapshot_operator.drivers import libvirt_copies as copies
from vmsnapshot_operator.drivers import libvirt_names as naming
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.drivers.libvirt_held import HeldInPools
from vmsnapshot_operator.drivers.libvirt_storage import Endpoint, LibvirtCredentials, told
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

_log = logging.getLogger(__name__)

_SERVED = frozenset({SourceKind.FILE, SourceKind.VOLUME})
_CALLS_PER_CONNECTION = 4  # libvirtd serves five requests of one connection at a time by default


class LibvirtVolumeParameters(Endpoint):
    """Which pools, on which daemon."""

    pool_name: str = Field(min_length=1)
    destination_pool_name: str = Field(default="", description="pool of the clones; reflink needs the same file system")
    min_free_bytes: int = Field(default=256 << 20, ge=0, description="refuse to clone when the pool has less left")


@dataclass(slots=True)
class _Ready:
    """What `prepare` found and opened for one request."""

    connections: list[Any]
    threads: ThreadPoolExecutor
    directory: str
    sources: list[Any]
    destinations: list[Any]
    descriptions: list[str] = field(default_factory=list)

    def close(self) -> None:
        self.threads.shutdown(wait=False)
        for connection in self.connections:
            with contextlib.suppress(libvirt.libvirtError):  # broken already
                connection.close()


class LibvirtVolumeDriver(HeldInPools):
    """See the module. The connections of `prepare` live until the cut."""

    Parameters = LibvirtVolumeParameters
    Credentials = LibvirtCredentials

    def __init__(self, parameters: LibvirtVolumeParameters, credentials: LibvirtCredentials) -> None:
        destination = parameters.destination_pool_name or parameters.pool_name
        super().__init__(parameters, credentials, destination, parameters.min_free_bytes)
        self._parameters = parameters
        self._reflink: bool | None = None
        self._ready: dict[str, _Ready] = {}

    # ---------------------------------------------------------------- the contract

    def capabilities(self) -> Capabilities:
        """Clone a tiny volume of our own in the pool, and see whether the file system shares the blocks."""
        self._reflink = self._probe()
        kind = CutKind.INSTANT if self._reflink else CutKind.COPY
        return Capabilities(cut=kind, atomic=False, revert=True, clone=True)

    def can_handle(self, volumes: Sequence[Volume]) -> Fit:
        """Look whether each disk is a raw volume of our pool."""
        with self._open() as connection, told(f"looking into the pool {self._parameters.pool_name}"):
            pool = connection.storagePoolLookupByName(self._parameters.pool_name)
            for volume in volumes:
                refusal = self._unfit(pool, volume)
                if refusal is not None:
                    return refusal
        return Fit(ok=True, reason="Fits", message=f"raw volumes of the pool {self._parameters.pool_name}")

    def prepare(self, request: SnapshotRequest) -> None:
        """Connect, find the volumes, see that there is room and that no clone has its name yet."""
        self.rest()
        self._flags()
        count = -(-len(request.volumes) // _CALLS_PER_CONNECTION)
        connections: list[Any] = []
        threads = ThreadPoolExecutor(len(request.volumes))
        ready = _Ready(connections=connections, threads=threads, directory="", sources=[], destinations=[])
        self._ready[request.name] = ready
        try:
            connections += [storage.connect(self._parameters, self._credentials) for _ in range(count)]
            with told(f"preparing {request.name} in the pool {self._held}"):
                self._look_up(ready, request)
        except BaseException:
            self.rest()
            raise

    def cut(self, request: SnapshotRequest) -> CutResult:
        """Clone all volumes, or none; a driver that must copy only names the clones."""
        if request.name not in self._ready:
            self.prepare(request)
        ready = self._ready[request.name]
        handles = {v.id: Handle(f"{ready.directory}/{naming.cut_name(request.name, v.id)}") for v in request.volumes}
        if not self._reflink:
            return CutResult(handles=handles, atomic=len(handles) == 1, hold=Hold.BASE)

        def clone(index: int) -> Any:
            pool, volume = ready.destinations[index], request.volumes[index]
            flags = libvirt.VIR_STORAGE_VOL_CREATE_REFLINK
            with told(f"cloning {volume.writable.source}"):
                try:
                    return pool.createXMLFrom(ready.descriptions[index], ready.sources[index], flags)
                except libvirt.libvirtError:  # it has no code of its own for a name that is taken
                    if storage.find(pool, naming.cut_name(request.name, volume.id)) is not None:
                        raise _already_cut(request.name) from None
                    raise

        _all_or_none(ready.threads, clone, len(request.volumes))
        return CutResult(handles=handles, atomic=len(handles) == 1)

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        """See that the cuts are there; copy them first where blocks cannot be shared. Copies that are whole stay."""
        with self._open() as connection, told(f"completing {request.name} in the pool {self._held}"):
            pool = connection.storagePoolLookupByName(self._held)
            if cut.hold is Hold.BASE:
                self._copy(connection, pool, request)
            for volume, handle in cut.handles.items():
                if storage.find(pool, naming.cut_name(request.name, volume)) is None:
                    raise DriverError(f"the clone {handle} does not exist (any more)", reason="SnapshotLost")

    def rest(self) -> None:
        """Close what `prepare` opened."""
        for ready in self._ready.values():
            ready.close()
        self._ready.clear()

    # ---------------------------------------------------------------- parts

    def _unfit(self, pool: Any, volume: Volume) -> Fit | None:
        layer = volume.writable
        if layer.kind not in _SERVED:
            return Fit(ok=False, reason="NotAVolume", message=f"{layer.source} is neither a file nor a libvirt volume")
        if layer.format != "raw":
            text = f"{layer.source} is {layer.format or 'of an unknown format'}; libvirt can reflink raw volumes only"
            return Fit(ok=False, reason="FormatNotServed", message=text)
        source = storage.find_source(pool, layer)
        if source is None:
            text = f"{layer.source} is not in the pool {self._parameters.pool_name}"
            return Fit(ok=False, reason="OtherPool", message=text)
        try:
            storage.must_be_raw(source)
        except DriverError as error:
            return Fit(ok=False, reason=error.reason, message=error.message)
        return None

    def _look_up(self, ready: _Ready, request: SnapshotRequest) -> None:
        for index, volume in enumerate(request.volumes):
            connection = ready.connections[index // _CALLS_PER_CONNECTION]
            source = storage.find_source(
                connection.storagePoolLookupByName(self._parameters.pool_name), volume.writable
            )
            if source is None:
                text = f"{volume.writable.source} is not in the pool {self._parameters.pool_name} (any more)"
                raise DriverError(text, reason="VolumeNotFound")
            storage.must_be_raw(source)
            destination = connection.storagePoolLookupByName(self._held)
            name = naming.cut_name(request.name, volume.id)
            if storage.find(destination, name) is not None:
                raise _already_cut(request.name)
            ready.sources.append(source)
            ready.destinations.append(destination)
            ready.descriptions.append(storage.describe(name, source.info()[1], source.XMLDesc(0)))
        ready.directory = storage.directory_of(ready.destinations[0])
        copied = 0 if self._reflink else sum(map(copies.occupied, ready.sources))
        copies.must_have_room(ready.destinations[0], copied, self._parameters.min_free_bytes)
        # The threads of the cut are started now.
        list(ready.threads.map(lambda _: time.sleep(0.001), request.volumes))

    def _home(self, connection: Any, volume: Volume) -> Any:  # noqa: ARG002 - it serves one pool
        return connection.storagePoolLookupByName(self._parameters.pool_name)

    def _homes(self, connection: Any) -> Sequence[Any]:
        return (connection.storagePoolLookupByName(self._parameters.pool_name),)

    def _flags(self) -> int:
        """Return the flag that shares blocks, or 0 where they cannot be shared; probed once."""
        if self._reflink is None:
            self._reflink = self._probe()
        return int(libvirt.VIR_STORAGE_VOL_CREATE_REFLINK) if self._reflink else 0

    def _probe(self) -> bool:
        """Tell whether the destination can share blocks with the pool. Leaves nothing behind."""
        with self._open() as connection, told(f"probing the pools {self._parameters.pool_name}, {self._held}"):
            pool = connection.storagePoolLookupByName(self._parameters.pool_name)
            return copies.shares_blocks(pool, connection.storagePoolLookupByName(self._held))


def _already_cut(name: str) -> AlreadyCutError:
    return AlreadyCutError(f"{name} was cut before: delete it and take another name")


def _all_or_none(threads: ThreadPoolExecutor, clone: Callable[[int], Any], count: int) -> None:
    """Run the clones side by side; if one fails, delete the others and raise its error."""
    futures = [threads.submit(clone, index) for index in range(count)]
    made, failed = [], []
    for future in futures:
        error = future.exception()
        if error is None:
            made.append(future.result())
        else:
            failed.append(error)
    if not failed:
        return
    for volume in made:
        with contextlib.suppress(libvirt.libvirtError):  # what is left is deleted by its name
            volume.delete(0)
    raise failed[0]
