"""The judge's eye on storage: the pools' folders and Ceph's own listings, past every driver."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.chaos.seen import Group, Image, Lock, Snap, Storage
from tests.lab import Lab, LabError, pools
from tests.lab.ceph import bindings

_COMPLETE = 1  # RBD_GROUP_SNAP_STATE_COMPLETE of librbd.h
_SECONDS = 20


def look(lab: Lab) -> Storage:
    """List everything. Raises LabError, or an error of Ceph's bindings, where storage does not answer."""
    files = frozenset(str(p) for pool in pools.NAMES for p in lab.pool_path(pool).iterdir())
    rbd = bindings("rbd")
    images: dict[str, Image] = {}
    groups: dict[str, Group] = {}
    trash: list[str] = []
    with lab.ceph.connect() as (cluster, ioctx):
        users = _users(cluster)
        for namespace in ("", *rbd.RBD().namespace_list(ioctx)):
            ioctx.set_namespace(namespace)
            place = f"{lab.ceph.pool}/{namespace}/" if namespace else f"{lab.ceph.pool}/"
            images.update((place + name, image) for name, image in _images(rbd, ioctx, users))
            groups.update((place + name, group) for name, group in _groups(rbd, ioctx))
            trash += [place + entry["name"] for entry in rbd.RBD().trash_list(ioctx)]
    return Storage(files=files, images=images, groups=groups, trash=tuple(trash))


def _images(rbd: Any, ioctx: Any, users: Mapping[str, str]) -> Iterator[tuple[str, Image]]:
    for name in rbd.RBD().list(ioctx):
        try:
            with rbd.Image(ioctx, name, read_only=True) as opened:
                snaps = tuple(_snap(s) for s in opened.list_snaps())
                lockers = (opened.list_lockers() or {}).get("lockers", ())
                locks = tuple(Lock(str(client), users.get(str(client), "")) for client, _, _ in lockers)
                yield name, Image(id=str(opened.id()), snaps=snaps, locks=locks)
        except rbd.ImageNotFound:
            continue  # gone since it was listed


def _snap(listed: Mapping[str, Any]) -> Snap:
    """An image's part of a group's snapshot has a name of its own, and tells to which it belongs."""
    group = listed.get("group") or {}
    return Snap(str(group["snap_name"]), str(group["name"])) if group else Snap(str(listed["name"]))


def _groups(rbd: Any, ioctx: Any) -> Iterator[tuple[str, Group]]:
    for name in rbd.RBD().group_list(ioctx):
        group = rbd.Group(ioctx, name)
        try:
            members = tuple(str(m["name"]) for m in group.list_images())
            snaps = {str(s["name"]): s["state"] == _COMPLETE for s in group.list_snaps()}
        except rbd.ObjectNotFound:
            continue  # gone since it was listed
        yield name, Group(members=members, snaps=snaps)


def _users(cluster: Any) -> dict[str, str]:
    """The cephx user of each client that is connected, by the name that it has in locks."""
    return {f"client.{s['global_id']}": str(s["entity_name"]) for s in ask(cluster, "sessions", target="a")}


def ask(cluster: Any, command: str, *, target: str | None = None, **arguments: object) -> Any:
    """Give a monitor a command and return its answer; raises LabError if it refuses."""
    question = json.dumps({"prefix": command, "format": "json", **arguments})
    status, out, said = cluster.mon_command(question, b"", _SECONDS, target=target)
    if status:
        raise LabError(f"Ceph's monitor was told `{command}`: {said} ({status})")
    return json.loads(out) if out.strip() else None
