"""The way back of what is held in pools: disks set back to what was cut, and new disks made from it. Not how cuts are made.

All functions take open pools: `home` is that of the VM's disks, `held` that of the cuts and clones. They let libvirt's errors
through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import PurePosixPath
from typing import Any

from vmsnapshot_operator.core.driver import CutResult, Fit, Hold
from vmsnapshot_operator.core.volumes import Layer, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import libvirt_copies as copies
from vmsnapshot_operator.drivers import libvirt_names as naming
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

Copying = Callable[[Any, Iterable[Any], int], AbstractContextManager[Callable[[str, Any], None]]]
"""Given a pool, the sources of all copies into it, and their flags: holds a function to be told of each copy before it begins."""

_SERVED = frozenset({SourceKind.FILE, SourceKind.VOLUME})


def check(home: Any, held: Any, cut: CutResult, volume: Volume, room: int | None = None) -> Fit:
    """Say whether a disk's cut is there and whole, and whether the disk is still what was cut. Changes nothing.

    `room`: so many bytes have to be left after the cut was copied into the disk's place; None: it is not copied, or not asked.
    """
    layer, path = volume.writable, PurePosixPath(volume.writable.source)
    place = storage.directory_of(home) if layer.kind is SourceKind.FILE else home.name()
    if layer.kind not in _SERVED or layer.format != "raw" or str(path.parent) != place or volume.id not in cut.handles:
        return _no("OtherVolume", f"{path} is not a raw volume of the pool {home.name()} that was cut")
    if volume.backing:
        return _no("LayersChanged", f"{path} was cut as a raw volume and has {volume.backing[0].source} beneath it now")
    try:
        source = source_of(held, cut, volume.id)
        storage.must_be_raw(source)
    except DriverError as error:
        return _no(error.reason, error.message)
    if _revert_marks(home, volume.id):
        return Fit(ok=True, reason="Fits", message=f"{path} is half reverted")
    now = storage.find(home, path.name)
    if now is None:
        return _no("VolumeMissing", f"{path} does not exist (any more)")
    size, was = now.info()[1], source.info()[1]
    if size != was:
        return _no("SizeChanged", f"{path} has {size} bytes now and had {was} when it was cut")
    if room is not None:
        try:
            copies.must_have_room(home, copies.occupied(source) - copies.occupied(now), room)
        except DriverError as error:
            return _no(error.reason, error.message)
    return Fit(ok=True, reason="Fits")


def source_of(held: Any, cut: CutResult, volume: VolumeId) -> Any:
    """Return the volume that holds a disk's cut. Raises DriverError (SnapshotLost, SnapshotIncomplete)."""
    handle = cut.handles[volume]
    found = storage.find(held, PurePosixPath(handle).name)
    if found is None:
        raise DriverError(f"the clone {handle} does not exist (any more)", reason="SnapshotLost")
    if cut.hold is not Hold.NOTHING and storage.find(held, naming.whole_mark(found.name())) is None:
        raise DriverError(f"{handle} was not copied to the end", reason="SnapshotIncomplete")
    return found


def revert(
    home: Any, held: Any, cut: CutResult, onto: Sequence[Volume], flags: int, min_free: int, copying: Copying
) -> None:
    """Put a clone of the cut in the place of each disk. What was begun is marked, so that a missing disk is explained."""
    sources = {v.id: source_of(held, cut, v.id) for v in onto}
    with copying(home, sources.values(), flags) as begin:
        for volume in onto:
            name, source = PurePosixPath(volume.writable.source).name, sources[volume.id]
            begin(name, source)
            with storage.told(f"reverting {volume.writable.source}"):
                copies.mark_down(home, naming.revert_mark(source.name()))
                copies.replace(home, source, name, flags, min_free)
                for mark in _revert_marks(home, volume.id):  # also of another cut: the disk is whole again
                    mark.delete(0)


def clone(
    held: Any, cut: CutResult, name: str, flags: int, min_free: int, copying: Copying
) -> Mapping[VolumeId, Layer]:
    """Clone each cut to `<name>-<member>.img`, whole or to be completed by the next try. Raises AlreadyCutError if kept."""
    storage.reread(held)
    targets = {v: naming.clone_name(name, v) for v in cut.handles}
    sources = {v: source_of(held, cut, v) for v in cut.handles}
    if storage.find(held, naming.new_mark(name)) is None:
        for target in targets.values():
            if storage.find(held, target) is not None:
                raise AlreadyCutError(f"{target} exists and belongs to a VM: take another name than {name}")
        copies.mark_down(held, naming.new_mark(name))
    missing = [v for v, t in targets.items() if storage.find(held, naming.whole_mark(t)) is None]
    copies.must_have_room(held, 0 if flags else sum(copies.occupied(sources[v]) for v in missing), min_free)
    made = {}
    with copying(held, sources.values(), flags) as begin:
        for volume, target in targets.items():
            source = sources[volume]
            begin(target, source)
            with storage.told(f"cloning {cut.handles[volume]} to {target}"):
                description = storage.describe(target, source.info()[1], source.XMLDesc(0))
                copies.make_whole(held, description, target, source, flags)
                path = str(held.storageVolLookupByName(target).path())
            made[volume] = Layer(kind=SourceKind.FILE, source=path, format="raw", pool=str(held.name()))
    return made


def keep(held: Any, name: str) -> None:
    """Take away the marks that lead from a clone's name to its volumes; first the one that makes them ours."""
    marks = [v for v in held.listAllVolumes(0) if naming.is_clone_mark(v.name(), name)]
    for mark in sorted(marks, key=lambda v: bool(v.name() != naming.new_mark(name))):
        mark.delete(0)


def _revert_marks(home: Any, volume: VolumeId) -> Sequence[Any]:
    return [v for v in home.listAllVolumes(0) if naming.is_revert_mark(v.name(), volume)]


def _no(reason: str, message: str) -> Fit:
    return Fit(ok=False, reason=reason, message=message)
