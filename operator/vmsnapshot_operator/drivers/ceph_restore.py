"""The way back of `ceph-rbd`: images set back to a snapshot, and new images made from it. Not how snapshots are made.

Facts it rests on, seen on Ceph 16.2:

- A rollback of an image in use returns success, and one of an image that was resized sets the size back as well.
- A clone (format 2) of a plain snapshot takes 0.05 s. The snapshot can be deleted all the same: Ceph keeps it in its trash
  until the last clone is gone or flattened; until then the image itself cannot be removed, only moved to the trash.
- The part of a group snapshot cannot be cloned, nor one image of it be rolled back alone: its content is copied. Newer bindings
  take the id of a part for a clone; they are asked first.
- An image is made and renamed in steps: an object `rbd_id.<name>` leads to it, then the name is listed, then it can be opened.
  Who is killed in between leaves a listed name that every `open` says does not exist, which `remove` takes away; or the object
  of a name that is not listed, which neither `create` nor `rename` pass, and which `remove` would follow to the image. Should
  an image that was not even listed be deleted instead of completed, that object (16 bytes) stays: nothing tells its name.
- The watch of a client that was killed stays for the OSDs' watch timeout (30 s by default). Hence the record `N.c-<address>`:
  who is recorded and is not us is dead, and is fenced off instead of being taken for a user of the image.

Held under a clone's name N until it is kept: the empty group `N.new`, and the images `N-<member>`; before they are whole
`N-<member>.partial` (a copy, to be completed) or `N-<member>.cloning` (to be made anew). Once `N.new` is gone, no name of ours leads to the images.

All functions take the module `rbd` and an open pool, and let the errors of the bindings through.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vmsnapshot_operator.drivers import ceph_copies, ceph_snapshots
from vmsnapshot_operator.drivers.ceph_cluster import binding
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

_NEW, _PARTIAL, _CLONING = ".new", ".partial", ".cloning"
_FEATURES = 0x3D  # layering, exclusive-lock, object-map, fast-diff, deep-flatten: what images of today have


@dataclass(frozen=True, slots=True)
class Source:
    """One image's part in a request: the snapshot `name` of `image`."""

    image: str
    name: str


@contextmanager
def opened_at(rbd: Any, io: Any, source: Source) -> Iterator[Any]:
    """Open an image at a request's snapshot, to be read. Raises DriverError (SnapshotLost)."""
    with rbd.Image(io, source.image, read_only=True) as image:
        found = ceph_snapshots.snapshot_id(image, source.name)
        if found is None:
            text = f"the snapshot {source.name} of the image {source.image} does not exist (any more)"
            raise DriverError(text, reason="SnapshotLost")
        image.set_snap_by_id(found)
        yield image


def refusal(rbd: Any, io: Any, source: Source, ours: frozenset[str]) -> tuple[str, str] | None:
    """Return reason and message why an image cannot be set back; `ours` are the addresses of our own clients."""
    try:
        with rbd.Image(io, source.image, read_only=True) as image:
            size = image.size()
            users = sorted({w["addr"] for w in image.watchers_list()} - ours)
        with opened_at(rbd, io, source) as snapshot:
            was = snapshot.size()
    except rbd.ImageNotFound:
        return "VolumeMissing", f"the image {source.image} does not exist (any more)"
    except DriverError as error:
        return error.reason, error.message
    if size != was:
        return "SizeChanged", f"the image {source.image} has {size} bytes now and had {was} when it was cut"
    if users:
        return "InUse", f"the image {source.image} is in use by {', '.join(users)}"
    return None


def roll_back(rbd: Any, io: Any, sources: Sequence[Source], *, is_group: bool, is_whole: bool, work: Work) -> None:
    """Set images back; a group snapshot all at once, some images of one by copying."""
    if is_group and is_whole:
        name = sources[0].name
        rbd.Group(io, name).rollback_to_snap(name)
        return
    if is_group:
        work.total = _bytes_in(rbd, io, sources)
    for source in sources:
        with rbd.Image(io, source.image) as image:
            if not is_group:
                image.rollback_to_snap(source.name)
                continue
            with opened_at(rbd, io, source) as snapshot:
                ceph_copies.overwrite(snapshot, image, work.step)


@dataclass(slots=True)
class Work:
    """How far copying is, for who asks from another thread. Bytes."""

    total: int = 0
    done: int = 0
    told: int = -1

    def step(self, count: int) -> None:
        """Say that so many bytes are done."""
        self.done += count


def begin_clone(rbd: Any, io: Any, name: str, targets: Sequence[str]) -> None:
    """Note that these images will be made. Raises AlreadyCutError if one of that name was kept (or is somebody else's)."""
    if f"{name}{_NEW}" in rbd.RBD().group_list(io):
        return
    for taken in set(rbd.RBD().list(io)).intersection(targets):
        raise AlreadyCutError(f"the image {taken} exists and belongs to a VM: take another name than {name}")
    ceph_snapshots.make_record(rbd, io, f"{name}{_NEW}")


def clone(rbd: Any, io: Any, targets: Mapping[str, Source], fence: Callable[[Any], None], work: Work) -> None:
    """Make new images: clones where the cluster can, else copies. An image has its name only when it is whole."""
    existing = set(rbd.RBD().list(io))
    copied = {}
    for target, source in targets.items():
        cloning = f"{target}{_CLONING}"
        _forget(io, target, existing)
        if cloning in existing:  # who was at it was killed: it may have no parent yet, and so no content
            _remove(rbd, io, cloning, fence)
        if target in existing:
            continue
        if f"{target}{_PARTIAL}" in existing or not _cloned(rbd, io, source, cloning):
            copied[target] = source
        else:
            rbd.RBD().rename(io, cloning, target)
    work.total = _bytes_in(rbd, io, list(copied.values()))
    for target, source in copied.items():
        partial = f"{target}{_PARTIAL}"
        with opened_at(rbd, io, source) as snapshot:
            if partial in existing and not _is_made(rbd, io, partial):
                _remove(rbd, io, partial, fence)
                existing.remove(partial)
            if partial not in existing:
                features, order = snapshot.features() & _FEATURES, snapshot.stat()["order"]
                rbd.RBD().create(io, partial, snapshot.size(), order=order, features=features, old_format=False)
            with rbd.Image(io, partial) as image:
                fence(image)
                ceph_copies.complete(snapshot, image, work.step)
        rbd.RBD().rename(io, partial, target)


def _is_made(rbd: Any, io: Any, image: str) -> bool:
    """Return False for an image that is listed and no more: who made it was killed."""
    try:
        with rbd.Image(io, image, read_only=True):
            return True
    except rbd.ImageNotFound:
        return False


def _remove(rbd: Any, io: Any, image: str, fence: Callable[[Any], None]) -> None:
    """Remove a listed image, also one that was only begun; no error if it is gone."""
    with contextlib.suppress(rbd.ImageNotFound), rbd.Image(io, image, read_only=True) as opened:
        fence(opened)
    with contextlib.suppress(rbd.ImageNotFound):
        rbd.RBD().remove(io, image)


def _forget(io: Any, target: str, listed: Iterable[str]) -> None:
    """Take away what leads from the names of a clone to images, where a name is not listed; no image is touched."""
    for name in {target, f"{target}{_CLONING}", f"{target}{_PARTIAL}"}.difference(listed):
        with contextlib.suppress(binding("rados").ObjectNotFound):
            io.remove_object(f"rbd_id.{name}")


def _bytes_in(rbd: Any, io: Any, sources: Sequence[Source]) -> int:
    total = 0
    for source in sources:
        with opened_at(rbd, io, source) as snapshot:
            total += ceph_copies.bytes_in(snapshot)
    return total


def _cloned(rbd: Any, io: Any, source: Source, target: str) -> bool:
    with opened_at(rbd, io, source) as snapshot:
        features = snapshot.features() & _FEATURES | rbd.RBD_FEATURE_LAYERING
        plain = any(s["name"] == source.name for s in snapshot.list_snaps())
        which = source.name if plain else ceph_snapshots.snapshot_id(snapshot, source.name)
    try:
        rbd.RBD().clone(io, source.image, which, io, target, features=features)
    except (rbd.InvalidArgument, rbd.FunctionNotSupported, TypeError):
        return False  # the part of a group, an image without layering, a cluster that wants snapshots protected
    return True


def keep(rbd: Any, io: Any, name: str) -> None:
    """Take away what leads from a clone's name to its images; first what makes them ours."""
    with contextlib.suppress(rbd.ObjectNotFound):
        rbd.RBD().group_remove(io, f"{name}{_NEW}")


def delete_clones(rbd: Any, io: Any, name: str, fence: Callable[[Any], None]) -> None:
    """Remove the images of a clone that was not kept. Raises DriverError, to be retried, while somebody has one open."""
    if f"{name}{_NEW}" not in rbd.RBD().group_list(io):
        return
    ours = re.compile(rf"{re.escape(name)}-[a-z2-7]{{8}}({re.escape(_PARTIAL)}|{re.escape(_CLONING)})?")
    left, listed = [], rbd.RBD().list(io)
    for image in filter(ours.fullmatch, listed):
        _forget(io, image.removesuffix(_PARTIAL).removesuffix(_CLONING), listed)
        try:
            _remove(rbd, io, image, fence)
        except rbd.Error as error:  # told below; the other images go all the same
            left.append(f"{image}: {error}")
    if left:
        raise DriverError(f"deleting the clones {name} left {'; '.join(left)}", reason="InUse", retryable=True)
    keep(rbd, io, name)
