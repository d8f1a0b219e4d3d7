"""What a request holds in a Ceph pool, and the steps that make and remove it. Not the driver's contract (`ceph_rbd`).

All functions take the module `rbd` and an open pool, and let the errors of the bindings through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from vmsnapshot_operator.core import names
from vmsnapshot_operator.errors import AlreadyCutError, DriverError

_COMPLETE = 1  # RBD_GROUP_SNAP_STATE_COMPLETE of librbd.h; the bindings have no name for it
_USER, _GROUP = 0, 1  # RBD_SNAP_NAMESPACE_TYPE_*
FENCE_SECONDS = 600
"""How long a client of ours that was killed stays on the blocklist. The permissions of our user say the same number."""
_IMAGE, _CLIENT = ".i-", ".c-"

Fence = Callable[[Collection[str]], tuple[Any, Collection[str]]]
"""Puts addresses on the blocklist, but for our own; returns the pool, opened so that their locks may be broken, and who was shut out."""


def already_cut(name: str) -> AlreadyCutError:
    """Return the error for a name under which something was cut before."""
    return AlreadyCutError(f"{name} was cut before: delete it and take another name")


def _ids(image: Any) -> dict[str, int]:
    """Return the ids of an open image's snapshots by the request that each would belong to."""
    found = {}
    for snapshot in image.list_snaps():
        group = snapshot.get("group") or {}
        if snapshot["namespace"] == _USER:
            found[str(snapshot["name"])] = int(snapshot["id"])
        elif snapshot["namespace"] == _GROUP and group.get("name") == group.get("snap_name"):
            found[str(group.get("name"))] = int(snapshot["id"])
    return found


def snapshot_id(image: Any, name: str) -> int | None:
    """Return the id of the snapshot of an open image that belongs to a request: for `set_snap_by_id`."""
    return _ids(image).get(name)


def requests_of(rbd: Any, io: Any, image: str) -> frozenset[str]:
    """Return the names of which an image has a snapshot; none if there is no such image."""
    try:
        with rbd.Image(io, image, read_only=True) as opened:
            return frozenset(_ids(opened))
    except rbd.ImageNotFound:
        return frozenset()


def holder_of(image: Any, io: Any) -> str | None:
    """Return the name of the group that an open image is a member of (`<pool id>/name` if it is in another pool)."""
    group = image.group()
    if not group["name"]:
        return None
    return str(group["name"]) if group["pool"] == io.get_pool_id() else f"{group['pool']}/{group['name']}"


def held(rbd: Any, io: Any, prefix: str) -> list[str]:
    """Return the requests, by their names, of which anything is held."""
    return sorted({g.partition(".")[0] for g in rbd.RBD().group_list(io) if g.startswith(prefix)})


def prepare_single(rbd: Any, io: Any, name: str, image: Any, client: str) -> None:
    """Record that an open image will get the plain snapshot `name`, and by whom."""
    if snapshot_id(image, name) is not None:
        raise already_cut(name)
    make_record(rbd, io, f"{name}{_IMAGE}{image.id()}")
    record_client(rbd, io, name, client)


def cut_single(rbd: Any, name: str, image: Any) -> None:
    """Make the plain snapshot. Other clients' quiesce hooks are not waited for: the guest stands still already."""
    try:
        image.create_snap(name, rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
    except rbd.ImageExists:
        raise already_cut(name) from None


def prepare_group(rbd: Any, io: Any, name: str, images: Sequence[str], client: str) -> None:
    """Make the group with exactly these images as members; `client` is the address of who is going to cut.

    An image that is still a member of another group of this installation is taken over: that cut is finished, or given up
    and not deleted yet. Were it not, it would find the image missing and fail, never claim it.
    """
    make_record(rbd, io, name)
    group = rbd.Group(io, name)
    if list(group.list_snaps()):
        raise already_cut(name)
    record_client(rbd, io, name, client)
    for image in images:
        with rbd.Image(io, image, read_only=True) as opened:
            holder = holder_of(opened, io)
        if holder == name:
            continue
        if holder is not None:
            if not same_installation(name, holder):
                text = f'the image {image} is in the group "{holder}"; an image can be in one group only'
                raise DriverError(text, reason="InGroup", retryable=holder.startswith("vms-"))
            with contextlib.suppress(rbd.ObjectNotFound):
                rbd.Group(io, holder).remove_image(io, image)
        group.add_image(io, image)
    _same_members(group, name, images)


def same_installation(name: str, other: str) -> bool:
    """Tell whether two request names are of one installation."""
    return names.attempt_of(name) is not None and names.is_ours(other, name.split("-")[1])


def cut_group(rbd: Any, io: Any, name: str, images: Sequence[str]) -> None:
    """Make the group snapshot, and look whether it is complete and of exactly these images."""
    group = rbd.Group(io, name)
    try:
        group.create_snap(name, rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
    except rbd.ObjectExists:
        raise already_cut(name) from None
    except rbd.Error:
        with contextlib.suppress(rbd.Error):  # what is left is deleted by its name
            group.remove_snap(name)
        raise
    if not _is_complete(group, name):
        group.remove_snap(name)
        raise DriverError(f"the group snapshot {name} was left incomplete by the cluster and has been removed")
    _same_members(group, name, images)


def _same_members(group: Any, name: str, images: Sequence[str]) -> None:
    members = sorted(m["name"] for m in group.list_images())
    if members != sorted(images):
        wanted = ", ".join(sorted(images))
        raise DriverError(f"the group {name} has the images {', '.join(members) or 'none'}, not {wanted}")


def _is_complete(group: Any, name: str) -> bool:
    return any(s["name"] == name and s["state"] == _COMPLETE for s in group.list_snaps())


def finish(rbd: Any, io: Any, name: str, *, is_group: bool) -> None:
    """Let the images go, so that others can group them. Repeatable. The group snapshot stays whole."""
    if is_group:
        group = rbd.Group(io, name)
        if not _is_complete(group, name):
            text = f"the group snapshot {name} does not exist (any more), or is incomplete"
            raise DriverError(text, reason="SnapshotLost")
        for member in list(group.list_images()):
            group.remove_image(io, member["name"])
    _remove_records(rbd, io, name, _CLIENT)


def record_client(rbd: Any, io: Any, name: str, client: str) -> None:
    """Record the address of who is going to open images for a request: should it be killed, it is known for ours."""
    make_record(rbd, io, f"{name}{_CLIENT}{client.encode().hex()}")


def forget_clients(rbd: Any, io: Any, name: str) -> None:
    """Remove what `record_client` made."""
    _remove_records(rbd, io, name, _CLIENT)


def recorded(rbd: Any, io: Any, name: str) -> set[str]:
    """Return the addresses of the clients that `record_client` recorded, of which some may live."""
    groups = rbd.RBD().group_list(io)
    return {bytes.fromhex(r.partition(_CLIENT)[2]).decode() for r in groups if r.startswith(name + _CLIENT)}


def delete(rbd: Any, io: Any, name: str, fence: Fence, *, stale: bool) -> None:
    """Remove what a request holds: snapshots first, records last, so that the rest is found after any failure.

    `stale`: locks whose owners the OSDs do not see are taken from them.
    """
    groups = rbd.RBD().group_list(io)
    ours = recorded(rbd, io, name)
    if name in groups:
        _delete_group(rbd, io, name, ours, fence, stale=stale)
    for record in groups:
        if record.startswith(name + _IMAGE):
            _delete_single(rbd, io, name, record.removeprefix(name + _IMAGE), ours, fence, stale=stale)
    _remove_records(rbd, io, name, _IMAGE)
    forget_clients(rbd, io, name)


def _delete_group(rbd: Any, io: Any, name: str, ours: set[str], fence: Fence, *, stale: bool) -> None:
    group = rbd.Group(io, name)
    snapshots = list(group.list_snaps())
    if ours and any(s["state"] != _COMPLETE for s in snapshots):
        fence(ours)  # whoever made it was killed on the way and may be about to get locks
    images = [m["name"] for m in group.list_images()] if ours else []
    if stale:  # the group of a snapshot that was Ready has no members any more
        images = list(rbd.RBD().list(io))
    for image in images:
        with contextlib.suppress(rbd.ImageNotFound), rbd.Image(io, image, read_only=True) as opened:
            if not stale or snapshot_id(opened, name) is not None:
                take_from_dead(rbd, opened, ours, fence, stale=stale)
    for snapshot in snapshots:
        with contextlib.suppress(rbd.ObjectNotFound):
            group.remove_snap(snapshot["name"])
    for member in list(group.list_images()):
        with contextlib.suppress(rbd.ObjectNotFound):
            group.remove_image(io, member["name"])
    with contextlib.suppress(rbd.ObjectNotFound):
        rbd.RBD().group_remove(io, name)


def _delete_single(rbd: Any, io: Any, name: str, image_id: str, ours: set[str], fence: Fence, *, stale: bool) -> None:
    try:
        image = rbd.Image(io, image_id=image_id)  # by its id: it may have been renamed or moved to the trash
    except rbd.ImageNotFound:
        return
    with image:
        # Where no guest used the image, whoever cut had to take the lock itself.
        take_from_dead(rbd, image, ours, fence, stale=stale)
        if snapshot_id(image, name) is None:
            # The guest's client may still be at it, asked by a process that was killed. It does one after the other:
            # once it has made this one, or says that it exists, none will come later.
            with contextlib.suppress(rbd.ImageExists, rbd.DiskQuotaExceeded):
                image.create_snap(name, rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
        with contextlib.suppress(rbd.ImageNotFound):
            image.remove_snap(name)


def take_from_dead(rbd: Any, image: Any, ours: set[str], fence: Fence, *, stale: bool) -> None:
    """Free an open image of what clients hold that are dead, instead of waiting until their watch timeout, as a guest would.

    `ours`: clients of ours, of which those that are not of this process were killed. `stale`: also whoever has the lock and is not
    seen by the OSDs; only where no VM may be using the image.
    """
    seen = {w["addr"] for w in image.watchers_list()}
    lockers = (image.list_lockers() or {}).get("lockers", ())
    held = [(c, k, a) for c, k, a in lockers if a in ours or (stale and a not in seen)]
    pool, dead = fence((seen & ours) | {address for _, _, address in held})
    held = [h for h in held if h[2] in dead]
    if not held:
        return
    with rbd.Image(pool, image_id=image.id()) as opened:
        for client, cookie, _ in held:
            with contextlib.suppress(rbd.ImageNotFound):  # a guest's client was faster
                opened.break_lock(client, cookie)


def make_record(rbd: Any, io: Any, name: str) -> None:
    """Make the empty group that says something by its name. Repeatable."""
    with contextlib.suppress(rbd.ObjectExists):
        rbd.RBD().group_create(io, name)


def _remove_records(rbd: Any, io: Any, name: str, kind: str) -> None:
    for record in rbd.RBD().group_list(io):
        if record.startswith(name + kind):
            with contextlib.suppress(rbd.ObjectNotFound):
                rbd.RBD().group_remove(io, record)
