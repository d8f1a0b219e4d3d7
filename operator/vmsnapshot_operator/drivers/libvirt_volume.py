"""Driver `libvirt-volume`: clones of raw volumes in a directory pool, by libvirt's storage API (virStorage*) alone.

Where the pool's file system has reflink (xfs, btrfs), a clone is a new file that shares the blocks: 3 to 4 ms while QEMU has
the disk open, whatever its size. One clone is one instant, since the file system locks the file for it; several are made at
the same time and still one after the other, so they are not. Elsewhere the cut only names the clones and `wait_ready`
copies them, while something keeps the base still.

libvirt 9 reflinks raw volumes only (a qcow2 volume would be converted, that is copied): others are refused.

Held under a request name N: one volume `N-<member>` per disk in the destination pool; while they are copied, none but
`N.copied` tells that they are whole. A handle is the path of the clone. libvirt goes on with a clone when the process that
asked for it is killed; `delete` therefore reads the directory again, and a clone still being made is an error to be retried.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import libvirt
from pydantic import Field

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Hold, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.drivers import probes
from vmsnapshot_operator.drivers.libvirt_storage import Endpoint, LibvirtCredentials, told
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

_log = logging.getLogger(__name__)

_MEMBER = re.compile(r"(?P<request>.+)-[a-z2-7]{8}")
_COPIED = ".copied"
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


class LibvirtVolumeDriver:
    """See the module. Connections live for one operation, those of `prepare` until the cut."""

    Parameters = LibvirtVolumeParameters
    Credentials = LibvirtCredentials

    def __init__(self, parameters: LibvirtVolumeParameters, credentials: LibvirtCredentials) -> None:
        self._parameters = parameters
        self._credentials = credentials
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
        count = -(-len(request.volumes) // _CALLS_PER_CONNECTION)
        connections: list[Any] = []
        threads = ThreadPoolExecutor(len(request.volumes))
        ready = _Ready(connections=connections, threads=threads, directory="", sources=[], destinations=[])
        self._ready[request.name] = ready
        try:
            connections += [storage.connect(self._parameters, self._credentials) for _ in range(count)]
            with told(f"preparing {request.name} in the pool {self._destination}"):
                self._look_up(ready, request)
        except BaseException:
            self.rest()
            raise
        if self._reflink is None:
            self._reflink = self._probe()

    def cut(self, request: SnapshotRequest) -> CutResult:
        """Clone all volumes, or none; a driver that must copy only names the clones."""
        if request.name not in self._ready:
            self.prepare(request)
        ready = self._ready[request.name]
        handles = {v.id: Handle(f"{ready.directory}/{_clone_name(request.name, v.id)}") for v in request.volumes}
        if not self._reflink:
            return CutResult(handles=handles, atomic=len(handles) == 1, hold=Hold.BASE)

        def clone(index: int) -> Any:
            pool, volume = ready.destinations[index], request.volumes[index]
            flags = libvirt.VIR_STORAGE_VOL_CREATE_REFLINK
            with told(f"cloning {volume.writable.source}"):
                try:
                    return pool.createXMLFrom(ready.descriptions[index], ready.sources[index], flags)
                except libvirt.libvirtError:  # it has no code of its own for a name that is taken
                    if storage.find(pool, _clone_name(request.name, volume.id)) is not None:
                        raise _already_cut(request.name) from None
                    raise

        _all_or_none(ready.threads, clone, len(request.volumes))
        return CutResult(handles=handles, atomic=len(handles) == 1)

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        """See that the clones are there; make them first if they are copies."""
        with self._open() as connection, told(f"completing {request.name} in the pool {self._destination}"):
            pool = connection.storagePoolLookupByName(self._destination)
            if cut.hold is Hold.BASE and storage.find(pool, f"{request.name}{_COPIED}") is None:
                self._copy(connection, pool, request)
            for volume, handle in cut.handles.items():
                if storage.find(pool, _clone_name(request.name, volume)) is None:
                    raise DriverError(f"the clone {handle} does not exist (any more)", reason="SnapshotLost")

    def check_revert(self, cut: CutResult, onto: Sequence[Volume]) -> Sequence[Fit]:
        """Say for each volume whether its clone is there and it lies in our pool."""
        with self._open() as connection, told("looking at the clones"):
            source = storage.directory_of(connection.storagePoolLookupByName(self._parameters.pool_name))
            pool = connection.storagePoolLookupByName(self._destination)
            return [self._revertible(pool, source, cut, volume) for volume in onto]

    def revert(self, cut: CutResult, onto: Sequence[Volume]) -> None:
        """Put a clone of the clone in the place of each volume: same path, same permissions. Nobody may have it open.

        The storage API cannot rename, so the volume is deleted first; after a crash in between it is missing until this
        is repeated. That the clone can be cloned is tried before, where that is quick.
        """
        for fit in self.check_revert(cut, onto):
            if not fit.ok:
                raise DriverError(fit.message, reason=fit.reason)
        if self._reflink is None:
            self._reflink = self._probe()
        flags = libvirt.VIR_STORAGE_VOL_CREATE_REFLINK if self._reflink else 0
        with self._open() as connection:
            pool = connection.storagePoolLookupByName(self._parameters.pool_name)
            held = connection.storagePoolLookupByName(self._destination)
            for volume in onto:
                with told(f"reverting {volume.writable.source}"):
                    clone = held.storageVolLookupByName(PurePosixPath(cut.handles[volume.id]).name)
                    storage.must_be_raw(clone)
                    self._replace(pool, clone, PurePosixPath(volume.writable.source).name, flags)

    def clone(self, cut: CutResult, name: str) -> Mapping[VolumeId, Layer]:
        """Clone each clone to `<name>-<member>`, found and deleted like those of a cut. Repeatable."""
        if self._reflink is None:
            self._reflink = self._probe()
        flags = libvirt.VIR_STORAGE_VOL_CREATE_REFLINK if self._reflink else 0
        made = {}
        with self._open() as connection:
            pool = connection.storagePoolLookupByName(self._destination)
            for volume, handle in cut.handles.items():
                with told(f"cloning {handle}"):
                    clone = pool.storageVolLookupByName(PurePosixPath(handle).name)
                    storage.must_be_raw(clone)
                    target = _clone_name(name, volume)
                    new = storage.find(pool, target)
                    if new is None:
                        description = storage.describe(target, clone.info()[1], clone.XMLDesc(0))
                        new = pool.createXMLFrom(description, clone, flags)
                    path = str(new.path())
                made[volume] = Layer(kind=SourceKind.FILE, source=path, format="raw", pool=self._destination)
        return made

    def delete(self, name: str) -> None:
        """Delete the clones under a name; goes on after an error and then says what is left."""
        self.rest()
        left = []
        with self._open() as connection, told(f"deleting {name} from the pool {self._destination}"):
            pool = connection.storagePoolLookupByName(self._destination)
            storage.refresh(pool)
            found = [v for v in pool.listAllVolumes(0) if _request_of(v.name()) == name]
            for volume in found:
                try:
                    volume.delete(0)
                except libvirt.libvirtError as error:
                    if not storage.is_missing(error):
                        left.append(f"{volume.name()}: {error}")
        if left:
            raise DriverError(f"deleting {name} left {'; '.join(left)}", retryable=True)

    def list(self, prefix: str) -> Sequence[str]:
        """Name the requests by their clones."""
        with self._open() as connection, told(f"listing the pool {self._destination}"):
            pool = connection.storagePoolLookupByName(self._destination)
            storage.refresh(pool)
            requests = {_request_of(v.name()) for v in pool.listAllVolumes(0)}
        return sorted(r for r in requests if r and r.startswith(prefix))

    def rest(self) -> None:
        """Close what `prepare` opened."""
        for ready in self._ready.values():
            ready.close()
        self._ready.clear()

    # ---------------------------------------------------------------- parts

    @property
    def _destination(self) -> str:
        return self._parameters.destination_pool_name or self._parameters.pool_name

    @contextmanager
    def _open(self) -> Iterator[Any]:
        connection = storage.connect(self._parameters, self._credentials)
        try:
            yield connection
        finally:
            with contextlib.suppress(libvirt.libvirtError):  # broken already
                connection.close()

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
            destination = connection.storagePoolLookupByName(self._destination)
            name = _clone_name(request.name, volume.id)
            if storage.find(destination, name) is not None:
                raise _already_cut(request.name)
            ready.sources.append(source)
            ready.destinations.append(destination)
            ready.descriptions.append(storage.describe(name, source.info()[1], source.XMLDesc(0)))
        ready.directory = storage.directory_of(ready.destinations[0])
        wanted, free = self._parameters.min_free_bytes, ready.destinations[0].info()[3]
        if (
            free < wanted
        ):  # libvirt counts the blocks of clones as if they were not shared, until it reads the pool again
            storage.refresh(ready.destinations[0])
            free = ready.destinations[0].info()[3]
        if free < wanted:
            text = f"the pool {self._destination} has {free} bytes left, less than {wanted} (minFreeBytes)"
            raise DriverError(text, reason="NoSpace", retryable=True)
        # The threads of the cut are started now.
        list(ready.threads.map(lambda _: time.sleep(0.001), request.volumes))

    def _copy(self, connection: Any, pool: Any, request: SnapshotRequest) -> None:
        """Copy all volumes. Copies that an earlier try left may be partial, and are made anew."""
        source = connection.storagePoolLookupByName(self._parameters.pool_name)
        for volume in request.volumes:
            base = storage.find_source(source, volume.writable)
            if base is None:
                raise DriverError(f"{volume.writable.source} is gone", reason="VolumeNotFound")
            name = _clone_name(request.name, volume.id)
            partial = storage.find(pool, name)
            if partial is not None:
                partial.delete(0)
            storage.must_be_raw(base)
            pool.createXMLFrom(storage.describe(name, base.info()[1], base.XMLDesc(0)), base, 0)
            storage.must_be_raw(base)  # again: the pool may have been read in between
        pool.createXML(storage.describe(f"{request.name}{_COPIED}", 0), 0)

    def _revertible(self, pool: Any, source: str, cut: CutResult, volume: Volume) -> Fit:
        handle = cut.handles.get(volume.id)
        path, layer = PurePosixPath(volume.writable.source), volume.writable
        home = source if layer.kind is SourceKind.FILE else self._parameters.pool_name
        if layer.kind not in _SERVED or layer.format != "raw" or str(path.parent) != home:
            text = f"{path} is not a raw file of the pool {self._parameters.pool_name}"
            return Fit(ok=False, reason="OtherVolume", message=text)
        if handle is None or storage.find(pool, PurePosixPath(handle).name) is None:
            return Fit(
                ok=False, reason="SnapshotLost", message=f"the clone {handle or 'of ' + path.name} does not exist"
            )
        return Fit(ok=True, reason="Fits")

    def _replace(self, pool: Any, clone: Any, name: str, flags: int) -> None:
        old = storage.find(pool, name)
        like = (clone if old is None else old).XMLDesc(0)
        if flags:
            pool.createXMLFrom(storage.describe(probes.new_name(), clone.info()[1], like), clone, flags).delete(0)
        if old is not None:
            old.delete(0)
        pool.createXMLFrom(storage.describe(name, clone.info()[1], like), clone, flags)

    def _probe(self) -> bool:
        """Tell whether the destination can share blocks with the pool. Leaves nothing behind; see `_sweep_probes`."""
        name = probes.new_name()
        with self._open() as connection, told(f"probing the pools {self._parameters.pool_name}, {self._destination}"):
            pool = connection.storagePoolLookupByName(self._parameters.pool_name)
            destination = connection.storagePoolLookupByName(self._destination)
            _sweep_probes(pool, destination)
            made = [pool.createXML(storage.describe(f"{name}a", 1 << 20), 0)]
            try:
                description = storage.describe(f"{name}b", 1 << 20)
                try:
                    flags = libvirt.VIR_STORAGE_VOL_CREATE_REFLINK
                    made.append(destination.createXMLFrom(description, made[0], flags))
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_SYSTEM_ERROR:
                        raise
                    _log.info("no reflink from pool %s to %s: %s", pool.name(), destination.name(), error)
                    return False
                return True
            finally:
                for volume in made:
                    volume.delete(0)


def _sweep_probes(*pools: Any) -> None:
    """Delete the probes of processes that were killed while they probed."""
    for pool in pools:
        for volume in pool.listAllVolumes(0):
            if probes.is_stale(volume.name()):
                with contextlib.suppress(libvirt.libvirtError):  # another process is at it
                    volume.delete(0)


def _clone_name(request: str, volume: VolumeId) -> str:
    return f"{request}-{names.member(volume)}"


def _request_of(volume_name: str) -> str | None:
    if volume_name.endswith(_COPIED):
        return volume_name.removesuffix(_COPIED)
    found = _MEMBER.fullmatch(volume_name)
    return found["request"] if found else None


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
