"""What must hold of the world at rest. Pure: facts in, findings out; the facts come from `hosts`, `storage` and `objects`.

Not what a single snapshot claims of its content (`claims`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from tests.chaos.seen import Allowed, Domain, Finding, GuestSeen, Image, Storage, World
from tests.stack import conditions

OURS = ("vms-", "ovl-")
PROBE = re.compile(r"vms-probe-(\d+)-")
PROBE_SECONDS = 7200
"""A driver's look at its storage may be under way, and a later one removes what is left of one; not for so long."""
FINALIZER = "vmsnapshot.io/"
LEASE = "vmsnapshot-operator"
_REQUEST = re.compile(r"vms-[0-9a-z]{6}-([0-9a-z]{10})-[0-9a-z]{2}-[0-9a-z]{6}")
"""What everything on storage is named after: installation, hash of the VMSnapshot's UID, attempt, group."""


def findings(world: World, allowed: Allowed) -> list[Finding]:
    """Everything that must not be, in an order that depends on nothing but the world."""
    found = [
        *_guests(world, allowed),
        *_domains(world, allowed),
        *_snapshots(world, allowed),
        *_restores(world, allowed),
        *_contents(world),
        *_finalizers(world),
        *_storage(world, allowed),
        *_locks(world),
        *_lease(world, allowed),
        *_drivers(world),
    ]
    return sorted(set(found))


# --- VMSnapshots and what they are bound to --------------------------------------------------------------------------------------


def name_of(body: Mapping[str, Any]) -> str:
    """An object as `namespace/name`, or its name."""
    meta = body["metadata"]
    return f"{meta['namespace']}/{meta['name']}" if meta.get("namespace") else str(meta["name"])


def is_true(body: Mapping[str, Any], kind: str) -> bool:
    """Whether a condition says True."""
    return bool(conditions(body).get(kind, {}).get("status") == "True")


def not_ended(body: Mapping[str, Any]) -> str:
    """Why a VMSnapshot or a VMRestore has not come to its end; empty if it has: Ready, Stalled, or planned if it is a dry run."""
    if is_true(body, "Ready") and is_true(body, "Stalled"):
        return "it is Ready and Stalled at once"
    if is_true(body, "Reconciling"):
        return f"it is still at work: {conditions(body)['Reconciling'].get('reason')}"
    ended = is_true(body, "Ready") or is_true(body, "Stalled")
    if ended or (body["spec"].get("dryRun") and is_true(body, "Planned")):
        return ""
    said = ", ".join(f"{t}={c.get('status')} ({c.get('reason')})" for t, c in sorted(conditions(body).items()))
    return f"neither Ready nor Stalled: {said or 'it has no conditions'}"


def _behind(body: Mapping[str, Any]) -> str:
    """Why a status is not of this object as it is; it may become so at any time, and is followed a moment later."""
    seen, wanted = (body.get("status") or {}).get("observedGeneration", -1), body["metadata"].get("generation")
    return "" if seen == wanted else f"its status is of generation {seen}, the object of {wanted}"


def _snapshots(world: World, allowed: Allowed) -> Iterator[Finding]:
    held = {c["spec"]["vmSnapshotRef"]["uid"] for c in world.of_kind("VMSnapshotContent")}
    for body in world.of_kind("VMSnapshot"):
        name = name_of(body)
        if name in allowed.under_way or body["metadata"].get("deletionTimestamp"):
            continue
        if why := not_ended(body) or _behind(body):
            yield Finding("stuck", f"VMSnapshot {name}", why)
        if is_true(body, "Ready") and body["metadata"]["uid"] not in held:
            yield Finding("lied", f"VMSnapshot {name}", "it is Ready, and no VMSnapshotContent holds anything of it")


def _restores(world: World, allowed: Allowed) -> Iterator[Finding]:
    for body in world.of_kind("VMRestore"):
        name = name_of(body)
        if name in allowed.under_way or body["metadata"].get("deletionTimestamp"):
            continue
        if why := not_ended(body):
            yield Finding("stuck", f"VMRestore {name}", why)


def _contents(world: World) -> Iterator[Finding]:
    there = {b["metadata"]["uid"] for b in world.of_kind("VMSnapshot")}
    for content in world.of_kind("VMSnapshotContent"):
        ref = content["spec"]["vmSnapshotRef"]
        if content["spec"].get("deletionPolicy") != "Retain" and ref["uid"] not in there:
            text = f"its VMSnapshot {ref['namespace']}/{ref['name']} (uid {ref['uid']}) does not exist"
            yield Finding("leaked", f"VMSnapshotContent {name_of(content)}", text)


def _finalizers(world: World) -> Iterator[Finding]:
    for body in world.objects:
        meta = body["metadata"]
        ours = [f for f in meta.get("finalizers") or () if f.startswith(FINALIZER)]
        if meta.get("deletionTimestamp") and ours:
            text = f"deleted at {meta['deletionTimestamp']}, and {', '.join(ours)} is still on it"
            yield Finding("leaked", f"{body['kind']} {name_of(body)}", text)


# --- guests and domains ----------------------------------------------------------------------------------------------------------


def _busy(world: World, allowed: Allowed) -> frozenset[str]:
    """Domains of VMSnapshots that are under way, by name or UUID."""
    return frozenset(
        b["spec"]["source"]["domain"] for b in world.of_kind("VMSnapshot") if name_of(b) in allowed.under_way
    )


def _guests(world: World, allowed: Allowed) -> Iterator[Finding]:
    # One that migrated may still be defined where it was: it is what it is where it runs.
    states = {d.name: d.state for d in sorted(world.domains, key=lambda d: d.state == "running")}
    busy = _busy(world, allowed)
    for guest in world.guests:
        if guest.name not in busy:
            subject = f"guest {guest.name}"
            yield from (Finding("frozen", subject, what) for what in _held(guest, states.get(guest.name), allowed))


def _held(guest: GuestSeen, state: str | None, allowed: Allowed) -> Iterator[str]:
    if state is None:
        yield "no hypervisor has such a domain"
    elif state == "off" and guest.name in allowed.off:
        return
    elif state == "paused":
        if not guest.stub and guest.name not in allowed.paused:
            yield "libvirt says that it is paused"
    elif state != "running":
        yield f"libvirt says that it is {state}, and it shall run"
    elif guest.trouble:
        yield f"whether it is frozen cannot be told, its agent does not say: {guest.trouble}"
    elif guest.agent not in ("", "thawed"):
        yield f"its agent says {guest.agent}"
    elif guest.silent:
        yield f"its agent says thawed, but QEMU counts no write to {', '.join(guest.silent)}, to which its writer writes"


def _domains(world: World, allowed: Allowed) -> Iterator[Finding]:
    busy = _busy(world, allowed)
    sources = {g.name: g.sources for g in world.guests}
    for domain in world.domains:
        if domain.name not in busy:
            subject = f"domain {domain.name}"
            yield from (Finding("leaked", subject, what) for what in _left_in(domain, sources.get(domain.name, {})))
            for name in domain.remembering:
                request = _REQUEST.search(name)
                if name.startswith(OURS) and (request is None or request[1] not in _snapshots_there(world)):
                    yield Finding("leaked", subject, f"its disks remember what was written since {name}")


def _snapshots_there(world: World) -> set[str]:
    """What stands for each VMSnapshot that exists, or of which a content does, in names."""
    contents = (c["spec"]["vmSnapshotRef"]["uid"] for c in world.of_kind("VMSnapshotContent"))
    return {digest(uid) for uid in (*contents, *(b["metadata"]["uid"] for b in world.of_kind("VMSnapshot")))}


def _left_in(domain: Domain, sources: Mapping[str, str]) -> Iterator[str]:
    if domain.journals:
        yield f"a journal of ours in the metadata of its {' and its '.join(domain.journals)} definition"
    for name in domain.snapshots:
        yield f"a snapshot {name} of libvirt's own"
    for target in sorted({d.target for d in domain.disks}):
        yield from _left_on(domain, target, sources)
    known = {PurePath(d.source).name for d in domain.disks}
    for name in domain.opened:
        if name.startswith(OURS) and name not in known:
            yield f"QEMU has {name} open, and no disk of it is that"
    for device in domain.jobs:
        yield f"a block job runs on {device}"


def _left_on(domain: Domain, target: str, sources: Mapping[str, str]) -> Iterator[str]:
    """At most one finding for a disk: all that an overlay shows of itself is one leak."""
    for disk in (d for d in domain.disks if d.target == target):
        where = f"disk {target} of its {disk.place} definition"
        if PurePath(disk.source).name.startswith(OURS):
            yield f"{where} is {disk.source}, an overlay of ours"
        elif target in sources and disk.source != sources[target]:
            yield f"{where} is {disk.source}, and was made as {sources[target]}"
        elif disk.mirrored:
            yield f"{where} is being mirrored"
        elif target in sources and disk.chained:
            yield f"{where} has a backing chain, and was made without"
        else:
            continue
        return


# --- storage ---------------------------------------------------------------------------------------------------------------------


def missing(content: Mapping[str, Any], storage: Storage) -> Iterator[str]:
    """What a content says that storage holds, and storage does not list, or not whole."""
    groups = {g["className"]: g for g in content["spec"]["groups"]}
    for volume in content["spec"]["volumes"]:
        handle, group = volume.get("handle"), groups[volume["className"]]
        if not handle:
            yield f"disk {volume['target']} has no handle"
        elif group["driver"] != "ceph-rbd":
            if handle not in storage.files:
                yield f"{handle} (disk {volume['target']}) is not in its pool"
        elif not _is_listed(handle, storage):
            yield f"{handle} (disk {volume['target']}) is not among the snapshots of its image"
    for group in groups.values():
        handle = group.get("groupHandle")
        if handle:
            place, _, snap = handle.rpartition("@")
            complete = storage.groups[place].snaps.get(snap) if place in storage.groups else None
            if not complete:
                yield f"the group snapshot {handle} {'is gone' if complete is None else 'is incomplete'}"


def _is_listed(handle: str, storage: Storage) -> bool:
    image, _, snap = handle.rpartition("@")
    return image in storage.images and any(s.name == snap for s in storage.images[image].snaps)


def _storage(world: World, allowed: Allowed) -> Iterator[Finding]:
    owners = {b["metadata"]["uid"]: b for b in world.of_kind("VMSnapshot")}
    accounted: set[str] = set()
    for content in world.of_kind("VMSnapshotContent"):
        if not content["spec"].get("readyTime") or content["spec"].get("failure"):
            continue
        accounted |= _accounted(content, world.storage)
        owner = owners.get(content["spec"]["vmSnapshotRef"]["uid"])
        ready = (
            is_true(owner, "Ready") if owner is not None else (content.get("status") or {}).get("ready") is not False
        )
        if ready:
            subject = f"VMSnapshotContent {name_of(content)}"
            yield from (Finding("lied", subject, f"it is Ready, and {m}") for m in missing(content, world.storage))
    moving = {digest(uid) for uid, body in owners.items() if _is_moving(body, allowed)}
    for label, name in _listed(world.storage):
        if label in accounted or name.startswith(allowed.foreign) or _is_fresh_probe(name, world.now):
            continue
        request = _REQUEST.search(name)
        if request is None or request[1] not in moving:
            yield Finding("leaked", label, _whose(request, owners))


def digest(uid: str) -> str:
    """The part of a name on storage that stands for a VMSnapshot."""
    return base64.b32encode(hashlib.sha256(uid.encode()).digest()).decode().lower()[:10]


def _is_moving(body: Mapping[str, Any], allowed: Allowed) -> bool:
    """Whether storage may hold anything of a VMSnapshot: one that has not ended is a finding by itself, unless it is allowed."""
    return name_of(body) in allowed.under_way or bool(body["metadata"].get("deletionTimestamp") or not_ended(body))


def _whose(request: re.Match[str] | None, owners: Mapping[str, Mapping[str, Any]]) -> str:
    owner = next((b for uid, b in owners.items() if request is not None and digest(uid) == request[1]), None)
    if owner is None:
        return "no VMSnapshotContent accounts for it"
    return f"it is named after VMSnapshot {name_of(owner)}, and its VMSnapshotContent does not account for it"


def _listed(storage: Storage) -> Iterator[tuple[str, str]]:
    """Everything that is, or could be, of a snapshot: where it is in words, and its name."""
    for path in storage.files:
        if PurePath(path).name.startswith(OURS):
            yield f"file {path}", PurePath(path).name
    for place, group in storage.groups.items():
        name = PurePath(place).name
        yield f"rbd group {place}", name
        yield from ((f"rbd group snapshot {place}@{s}", name) for s in group.snaps)
        yield from ((f"rbd image {m} in the group {place}", name) for m in group.members)
    for place, image in storage.images.items():
        if PurePath(place).name.startswith(OURS):
            yield f"rbd image {place}", PurePath(place).name
        yield from ((_label(place, s.name, s.group), s.group or s.name) for s in image.snaps)
    yield from ((f"in rbd's trash: {t}", PurePath(t).name) for t in storage.trash)


def _label(image: str, snap: str, group: str) -> str:
    return f"rbd snapshot {image}@{snap}" + (f" of the group {group}" if group else "")


def _accounted(content: Mapping[str, Any], storage: Storage) -> set[str]:
    """What a content that is ready stands for, in the words of `_listed`: its handles and the records beside them, nothing else."""
    labels: set[str] = set()
    groups = {g["className"]: g for g in content["spec"]["groups"]}
    for volume in content["spec"]["volumes"]:
        handle, group = volume.get("handle") or "", groups[volume["className"]]
        name = group["requestName"]
        if group["driver"] != "ceph-rbd":
            labels |= {f"file {handle}", f"file {handle}.whole"}  # the mark of a copy
            continue
        image, _, snap = handle.rpartition("@")
        place = f"{PurePath(image).parent}/{name}"
        if group.get("groupHandle"):
            labels |= {_label(image, snap, name), f"rbd group {place}", f"rbd group snapshot {place}@{snap}"}
        else:
            labels |= {_label(image, snap, ""), f"rbd group {place}.i-{storage.images.get(image, Image(id='')).id}"}
    return labels


def _is_fresh_probe(name: str, now: float) -> bool:
    made = PROBE.match(name)
    return made is not None and now - int(made[1]) < PROBE_SECONDS


def _locks(world: World) -> Iterator[Finding]:
    """QEMU's client takes the lock of an image for its guest's writes; it takes it from one that is dead with the next of them.

    A dead client's lock on an image that no running domain has is no finding: QEMU leaves one when it is killed, and it holds nobody up.
    """
    running = {d.source for domain in world.domains if domain.state == "running" for d in domain.disks}
    for place, image in world.storage.images.items():
        if PROBE.match(PurePath(place).name):
            continue
        for lock in image.locks:
            whose = f"{lock.client}, {lock.user}" if lock.user else f"{lock.client}, which is gone"
            if lock.user not in ("client.libvirt", "") or (not lock.user and place in running):
                yield Finding(
                    "leaked", f"rbd image {place}", f"its lock is held by {whose}, not by the QEMU of its guest"
                )
            elif lock.user and not any(d.source == place for domain in world.domains for d in domain.disks):
                yield Finding(
                    "leaked", f"rbd image {place}", f"its lock is held by {whose}, and no domain has this image"
                )


# --- lease and processes ---------------------------------------------------------------------------------------------------------


def _lease(world: World, allowed: Allowed) -> Iterator[Finding]:
    for name in sorted(set(world.holders) - {LEASE}):
        yield Finding("leaked", f"lease {name}", f"there is one lease of the operator, {LEASE}")
    holder = world.holders.get(LEASE, "")
    if allowed.operator_down:
        return
    if not holder:
        yield Finding("stuck", f"lease {LEASE}", "nobody holds it: nothing would be done")
    elif holder not in world.instances:
        alive = ", ".join(sorted(world.instances)) or "none"
        yield Finding(
            "stuck", f"lease {LEASE}", f"it is held by {holder}, which does not run; instances that do: {alive}"
        )


def _drivers(world: World) -> Iterator[Finding]:
    for driver in world.drivers:
        if driver.parent != driver.operator:
            text = f"a driver's process whose operator (process {driver.operator}) is gone"
            yield Finding("leaked", f"process {driver.pid}", text)
