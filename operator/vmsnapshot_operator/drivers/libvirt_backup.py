"""Driver `libvirt-backup`: copies of disks that the hypervisor itself makes, into raw volumes of a directory pool.

What is copied is what the disks held at the moment of the cut, while the VM goes on writing (virDomainBackupBegin, which the
workflow calls: see `core.driver.CutKind.HYPERVISOR`). The disks may be on whatever storage QEMU can read, in whatever format.
This driver makes the volumes to copy into, and keeps them; it never learns of a domain. A volume is half a copy until its
mark is there (`libvirt_names`), which is made when the workflow has proved that the copy came to its good end.

Of a VM that is off nobody but libvirt's storage API can copy, and only disks that are raw volumes of its pools.

QEMU writes the zeros of a raw volume out: each takes its full size (seen with QEMU 7.2), and that much room is asked for.

With `incremental` a volume shares its blocks with an earlier copy of the disk, and only what changed since is copied into it. So each
copy is whole in itself, and none needs another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import libvirt
from pydantic import Field

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Hold, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import libvirt_copies as copies
from vmsnapshot_operator.drivers import libvirt_names as naming
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.drivers.libvirt_held import HeldInPools
from vmsnapshot_operator.drivers.libvirt_storage import Endpoint, LibvirtCredentials, told
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

_FOLDERS = libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_DIR | libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_FS
_POOLS = libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE | _FOLDERS | libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_NETFS


class LibvirtBackupParameters(Endpoint):
    """Into which pool, on which daemon."""

    pool_name: str = Field(min_length=1, description="directory pool of the copies, on the hosts that run the VMs")
    min_free_bytes: int = Field(
        default=256 << 20, ge=0, description="refuse to copy when the pool would have less left"
    )
    incremental: bool = Field(
        default=False,
        description="of a qcow2 disk copy only what changed since its last copy; the pool's file system must share blocks (reflink)",
    )


class LibvirtBackupDriver(HeldInPools):
    """See the module."""

    Parameters = LibvirtBackupParameters
    Credentials = LibvirtCredentials

    def __init__(self, parameters: LibvirtBackupParameters, credentials: LibvirtCredentials) -> None:
        super().__init__(parameters, credentials, parameters.pool_name, parameters.min_free_bytes)
        self._incremental = parameters.incremental

    def capabilities(self) -> Capabilities:
        """Look whether the pool is there, and is one of files: a handle is a path that QEMU can write to. Leaves nothing behind."""
        with self._open() as connection, told(f"looking at the pool {self._held}"):
            pool = connection.storagePoolLookupByName(self._held)
            if not pool.isActive():
                raise DriverError(f"the pool {self._held} is not active", reason="PoolInactive", retryable=True)
            if not storage.directory_of(pool).startswith("/"):
                raise DriverError(f"the pool {self._held} is no directory of files", reason="PoolNotServed")
            if self._incremental and not copies.shares_blocks(pool, pool):
                text = f'the file system of the pool {self._held} cannot share blocks (reflink), which incremental: "true" needs'
                raise DriverError(text, reason="PoolNotServed")
        return Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True, clone=True, incremental=self._incremental)

    def can_handle(self, volumes: Sequence[Volume]) -> Fit:
        """Any disk whose size is known."""
        if unknown := [v.label for v in volumes if not v.size_bytes]:
            return Fit(ok=False, reason="SizeUnknown", message=f"nobody can say how big {', '.join(unknown)} is")
        return Fit(ok=True, reason="Fits", message=f"copied by the hypervisor into the pool {self._held}")

    def prepare(self, request: SnapshotRequest) -> None:
        """Make an empty volume for each disk; refuse names that are taken, and where there is not enough room."""
        with self._open() as connection, told(f"preparing {request.name} in the pool {self._held}"):
            pool = connection.storagePoolLookupByName(self._held)
            storage.reread(pool)
            if any(naming.holder(v.name()) == request.name for v in pool.listAllVolumes(0)):
                raise AlreadyCutError(f"{request.name} was prepared before: delete it and take another name")
            copies.must_have_room(pool, sum(v.size_bytes for v in request.volumes), self._min_free)
            for volume in request.volumes:
                pool.createXML(storage.describe(naming.cut_name(request.name, volume.id), volume.size_bytes), 0)

    def inherit(self, request: SnapshotRequest, since: Mapping[VolumeId, Handle]) -> Mapping[VolumeId, Fit]:
        """Make volumes anew that share the blocks of earlier copies. Where that fails, the volume is made empty again."""
        with self._open() as connection, told(f"preparing {request.name} in the pool {self._held}"):
            pool = connection.storagePoolLookupByName(self._held)
            storage.reread(pool)
            return {v.id: self._inherit(pool, request, v, since[v.id]) for v in request.volumes if v.id in since}

    def targets(self, request: SnapshotRequest) -> Mapping[VolumeId, Layer]:
        """Name the volumes that `prepare` made."""
        with self._open() as connection, told(f"looking at {request.name} in the pool {self._held}"):
            folder = storage.directory_of(connection.storagePoolLookupByName(self._held))
        return {
            v.id: Layer(
                kind=SourceKind.FILE,
                source=f"{folder}/{naming.cut_name(request.name, v.id)}",
                format="raw",
                pool=self._held,
            )
            for v in request.volumes
        }

    def cut(self, request: SnapshotRequest) -> CutResult:
        """Name what is copied of a VM that is off; refuse disks that the storage API cannot copy."""
        with self._open() as connection, told(f"looking at the disks of {request.name}"):
            for volume in request.volumes:
                source = self._source(connection, volume) if volume.writable.format == "raw" else None
                if source is None:
                    text = (
                        f"{volume.writable.source} is no raw volume of a pool: only a VM that runs can have it copied"
                    )
                    raise DriverError(text, reason="FormatNotServed")
                storage.must_be_raw(source)
        handles = {v: Handle(layer.source) for v, layer in self.targets(request).items()}
        return CutResult(handles=handles, atomic=len(handles) == 1, hold=Hold.BASE)

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        """Mark the copies as whole, which the workflow has proved; or make them, of a VM that is off. Repeatable."""
        with self._open() as connection, told(f"completing {request.name} in the pool {self._held}"):
            pool = connection.storagePoolLookupByName(self._held)
            if cut.hold is Hold.BASE:
                self._copy(connection, pool, request)
                return
            storage.reread(pool)  # what QEMU wrote, and what a person did to it, libvirt does not know of itself
            for volume in request.volumes:
                _must_be_a_copy(pool, volume, naming.cut_name(request.name, volume.id))
            for volume in request.volumes:
                copies.mark_down(pool, naming.whole_mark(naming.cut_name(request.name, volume.id)))

    # ---------------------------------------------------------------- parts

    def _inherit(self, pool: Any, request: SnapshotRequest, volume: Volume, earlier: Handle) -> Fit:
        name = naming.cut_name(request.name, volume.id)
        try:
            source = _untouched(pool, volume, earlier)
        except DriverError as error:
            return Fit(ok=False, reason=error.reason, message=error.message)
        description = storage.describe(name, volume.size_bytes)
        pool.storageVolLookupByName(name).delete(0)  # the storage API can fill a new volume only
        try:
            pool.createXMLFrom(description, source, libvirt.VIR_STORAGE_VOL_CREATE_REFLINK)
            storage.must_be_raw(source)  # again: the pool may have been read in between
        except (libvirt.libvirtError, DriverError) as error:
            if (remains := storage.find(pool, name)) is not None:
                remains.delete(0)
            pool.createXML(description, 0)
            return Fit(ok=False, reason="PoolNotServed", message=f"the blocks of {earlier} cannot be shared: {error}")
        return Fit(ok=True, reason="Inherited", message=f"on {PurePosixPath(earlier).name}")

    def _home(self, connection: Any, volume: Volume) -> Any | None:
        layer = volume.writable
        try:
            if layer.kind is SourceKind.VOLUME:
                return connection.storagePoolLookupByName(layer.source.partition("/")[0])
            if layer.kind is SourceKind.FILE:
                return connection.storagePoolLookupByTargetPath(str(PurePosixPath(layer.source).parent))
        except libvirt.libvirtError as error:
            if not storage.is_missing(error):
                raise
        return None

    def _reread(self, pool: Any) -> None:
        # Any pool may be the home of a disk, and one that is at work would be waited for: what libvirt itself made there it knows.
        if pool.name() == self._held:
            super()._reread(pool)

    def _homes(self, connection: Any) -> Sequence[Any]:
        return tuple(connection.listAllStoragePools(_POOLS))


def _untouched(pool: Any, volume: Volume, earlier: Handle) -> Any:
    """Return the volume of an earlier copy of this disk. Raises DriverError unless it is whole, and was not written to since."""
    name = PurePosixPath(earlier).name
    _must_be_a_copy(pool, volume, name)
    mark = storage.find(pool, naming.whole_mark(name))
    if mark is None:
        raise DriverError(f"{earlier} was not copied to the end", reason="SnapshotIncomplete")
    found = pool.storageVolLookupByName(name)
    if storage.written_time(found) > storage.written_time(mark):
        raise DriverError(f"{earlier} was written to since it was copied", reason="SnapshotChanged")
    return found


def _must_be_a_copy(pool: Any, volume: Volume, name: str) -> None:
    """Raise DriverError (SnapshotLost) if what is there cannot be the copy of this disk, or nobody could ever restore it."""
    found = storage.find(pool, name)
    if found is None:
        raise DriverError(f"{name} does not exist (any more)", reason="SnapshotLost")
    try:
        storage.must_be_raw(found)
    except DriverError as error:
        raise DriverError(error.message, reason="SnapshotLost") from error
    if (size := found.info()[1]) != volume.size_bytes:
        text = f"{name} has {size} bytes, and disk {volume.label} has {volume.size_bytes}"
        raise DriverError(text, reason="SnapshotLost")
