"""What drivers hold in pools of libvirt: listed, deleted, given back, made into new disks. Not how it was cut.

A driver beneath says where the VM's disks are and whether blocks can be shared. Only virStorage* is used.

Which domains use a volume the storage API does not know. `revert` replaces the volume by a new file of the same path: a QEMU
that had the old one open would go on with that, and lose it. The caller sees to it that no domain uses the volume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import libvirt

from vmsnapshot_operator.core.driver import CutResult, Fit, Hold, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Volume, VolumeId
from vmsnapshot_operator.drivers import libvirt_copies as copies
from vmsnapshot_operator.drivers import libvirt_names as naming
from vmsnapshot_operator.drivers import libvirt_restore as restore
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.drivers.libvirt_storage import Endpoint, LibvirtCredentials, told
from vmsnapshot_operator.errors import DriverError


class HeldInPools:
    """The part of a driver that begins when a disk was cut. `held`: the pool of the cuts and clones.

    Connections live for one operation.
    """

    def __init__(self, endpoint: Endpoint, credentials: LibvirtCredentials, held: str, min_free_bytes: int) -> None:
        self._endpoint = endpoint
        self._credentials = credentials
        self._held = held
        self._min_free = min_free_bytes
        self._work: copies.Work | None = None

    # ---------------------------------------------------------------- what a driver beneath says

    def _home(self, connection: Any, volume: Volume) -> Any | None:
        """Return the pool of a disk, or None if it lies in none of those that are served."""
        raise NotImplementedError

    def _homes(self, connection: Any) -> Sequence[Any]:
        """Return the pools in which disks may lie, which hold the marks of reverts."""
        raise NotImplementedError

    def _reread(self, pool: Any) -> None:
        """Read a pool's directory again, before all that is held is listed."""
        storage.reread(pool)

    def _flags(self) -> int:
        """Return the flag that shares blocks, or 0 where everything is copied."""
        return 0

    def rest(self) -> None:
        """Close what `prepare` opened."""

    # ---------------------------------------------------------------- the contract

    def check_revert(self, cut: CutResult, onto: Sequence[Volume]) -> Sequence[Fit]:
        """Say for each volume whether its cut is there and whole, whether the volume is still what was cut, and whether there is room."""
        return self._checked(cut, onto, None if self._flags() else self._min_free)

    def revert(self, cut: CutResult, onto: Sequence[Volume]) -> None:
        """Put a clone of the cut in the place of each volume; see `libvirt_copies.replace`, and the module on who uses it."""
        for fit in self._checked(
            cut, onto, room=None
        ):  # that there is no room now may be mended, and is no reason to give up
            if not fit.ok:
                raise DriverError(fit.message, reason=fit.reason)
        flags = self._flags()
        with self._open() as connection, told("reverting"):
            held = connection.storagePoolLookupByName(self._held)
            homes = [self._home(connection, volume) for volume in onto]
            for name in dict.fromkeys(h.name() for h in homes if h is not None):
                home = held if name == self._held else connection.storagePoolLookupByName(name)
                mine = [v for v, h in zip(onto, homes, strict=True) if h is not None and h.name() == name]
                restore.revert(home, held, cut, mine, flags, self._min_free, self._copying)

    def clone(self, cut: CutResult, name: str) -> Mapping[VolumeId, Layer]:
        """Clone each cut to `<name>-<member>.img` in the pool of the cuts; see `libvirt_names` on whose they are."""
        flags = self._flags()
        with self._open() as connection, told(f"cloning to {name} in the pool {self._held}"):
            held = connection.storagePoolLookupByName(self._held)
            return restore.clone(held, cut, name, flags, self._min_free, self._copying)

    def keep(self, name: str) -> None:
        """Take away what leads from a clone's name to its volumes."""
        with self._open() as connection, told(f"handing over {name} in the pool {self._held}"):
            restore.keep(connection.storagePoolLookupByName(self._held), name)

    def progress(self) -> Progress | None:
        """Ask libvirt how far the copy under way is. None while nothing is copied: blocks are shared in milliseconds."""
        work = self._work
        if work is None:
            return None
        with told("looking at a copy"):
            return work.progress()

    def delete(self, name: str) -> None:
        """Delete what is held under a name; goes on after an error and then says what is left."""
        self.rest()
        left = []
        with self._open() as connection, told(f"deleting {name} from the pool {self._held}"):
            for pool in self._places(connection):
                self._reread(pool)
                volumes = {v.name(): v for v in pool.listAllVolumes(0)}
                last = naming.new_mark(name)
                found = [n for n in volumes if naming.holder(n) == name and n != last]
                if last in volumes:
                    found = [n for n in volumes if naming.is_clone_of(n, name)] + found
                for each in found:
                    try:
                        volumes[each].delete(0)
                    except libvirt.libvirtError as error:
                        if not storage.is_missing(error):
                            left.append(f"{each}: {error}")
                if last in volumes and not left:
                    volumes[last].delete(0)
        if left:
            raise DriverError(f"deleting {name} left {'; '.join(left)}", retryable=True)

    def list(self, prefix: str) -> Sequence[str]:
        """Name requests and clones by what is held for them.

        Where only the disks lie that is a mark at most: the cuts there are of classes whose pool it is.
        """
        found: set[str | None] = set()
        with self._open() as connection, told(f"listing the pool {self._held}"):
            for pool in self._places(connection):
                self._reread(pool)
                there = [v.name() for v in pool.listAllVolumes(0)]
                ours = there if pool.name() == self._held else filter(naming.says_revert, there)
                found |= set(map(naming.holder, ours))
        return sorted(n for n in found if n and n.startswith(prefix))

    def missing(self, cuts: Sequence[CutResult]) -> Sequence[Handle]:
        """Look for each clone, and for the mark of each copy that it is whole."""
        with self._open() as connection, told(f"listing the pool {self._held}"):
            held = connection.storagePoolLookupByName(self._held)
            storage.reread(held)
            there = frozenset(v.name() for v in held.listAllVolumes(0))

        def is_whole(handle: Handle, cut: CutResult) -> bool:
            return naming.whole(PurePosixPath(handle).name, copied=cut.hold is not Hold.NOTHING) <= there

        return [h for cut in cuts for h in cut.handles.values() if not is_whole(h, cut)]

    # ---------------------------------------------------------------- parts

    @contextmanager
    def _open(self) -> Iterator[Any]:
        connection = storage.connect(self._endpoint, self._credentials)
        try:
            yield connection
        finally:
            with contextlib.suppress(libvirt.libvirtError):  # broken already
                connection.close()

    def _places(self, connection: Any) -> Sequence[Any]:
        """Return all pools in which anything of ours may lie, each once."""
        held = connection.storagePoolLookupByName(self._held)
        return (*(p for p in self._homes(connection) if p.name() != self._held), held)

    def _checked(self, cut: CutResult, onto: Sequence[Volume], room: int | None) -> Sequence[Fit]:
        with self._open() as connection, told("looking at the clones"):
            held = connection.storagePoolLookupByName(self._held)
            homes = [self._home(connection, volume) for volume in onto]
            for pool in {p.name(): p for p in (held, *homes) if p is not None}.values():
                storage.reread(pool)
            return [
                restore.check(home, held, cut, volume, room)
                if home is not None
                else Fit(ok=False, reason="OtherVolume", message=f"{volume.writable.source} is in no pool of libvirt")
                for volume, home in zip(onto, homes, strict=True)
            ]

    def _copy(self, connection: Any, pool: Any, request: SnapshotRequest) -> None:
        """Copy all volumes of a request that are not copied yet, from disks that stand still."""
        bases = {v.id: self._source(connection, v) for v in request.volumes}
        with self._copying(pool, [b for b in bases.values() if b is not None], 0) as begin:
            for volume in request.volumes:
                name, base = naming.cut_name(request.name, volume.id), bases[volume.id]
                if base is None:
                    raise DriverError(f"{volume.writable.source} is gone", reason="VolumeNotFound")
                begin(name, base)
                with told(f"copying {volume.writable.source}"):
                    copies.make_whole(pool, storage.describe(name, base.info()[1], base.XMLDesc(0)), name, base, 0)

    def _source(self, connection: Any, volume: Volume) -> Any | None:
        home = self._home(connection, volume)
        return None if home is None else storage.find_source(home, volume.writable)

    @contextmanager
    def _copying(self, pool: Any, sources: Iterable[Any], flags: int) -> Iterator[Callable[[str, Any], None]]:
        """Let others ask how far copies into a pool are, over a connection of its own; the caller says what comes next.

        `flags`: those that the copies are made with.
        """
        if flags:  # nothing is copied
            yield lambda _name, _source: None
            return
        before = 0
        with self._open() as connection:
            work = copies.Work(connection=connection, pool=pool.name(), total=sum(map(copies.occupied, sources)))

            def begin(name: str, source: Any) -> None:
                nonlocal before
                work.step(name, before)
                before += copies.occupied(source)

            self._work = work
            try:
                yield begin
            finally:
                self._work = None
