"""The judge: looks at the world, and believes nothing that the operator says.

Guests are asked through their own agents, domains through libvirt, storage by its own listings, contents of snapshots by reading
them. Nothing of the operator's code is used. A claim of status or content is only ever compared with what was seen.
"""

from __future__ import annotations

import contextlib
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import libvirt

from tests import proof
from tests.lab import Lab, LabError
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack, conditions

Kind = Literal["frozen", "leaked", "lied", "stuck"]

REQUEST = re.compile(r"vms-[0-9a-z]{6}-[0-9a-z]{10}-[0-9a-z]{2}-[0-9a-z]{6}")
"""What everything on storage is named after: installation, snapshot, attempt, group."""
FINALIZER = "vmsnapshot.io/"
_JOURNALS = "vmsnapshot.io"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that must not be. `subject` is where it was seen, `what` says it in plain words."""

    kind: Kind
    subject: str
    what: str


# --- the world at rest -----------------------------------------------------------------------------------------------------


def judge_now(lab: Lab, stack: Stack, guests: Sequence[Guest]) -> list[Finding]:
    """What is wrong while nothing is under way: every VM runs and is thawed, and all that is held is accounted for."""
    contents = stack.all("vmsnapshotcontents.vmsnapshot.io")
    snapshots = stack.all("vmsnapshots.vmsnapshot.io")
    return [
        *(f for g in guests for f in _guest(g)),
        *_domains(lab, guests),
        *_storage(lab, contents),
        *_objects(contents, snapshots),
        *_lease(lab),
        *_processes(),
    ]


def _guest(guest: Guest) -> Iterator[Finding]:
    try:
        state = guest.domain().state()[0]
        if state == libvirt.VIR_DOMAIN_PAUSED:
            yield Finding("frozen", guest.name, "it is paused")
        elif state != libvirt.VIR_DOMAIN_RUNNING:
            yield Finding("frozen", guest.name, f"it does not run (state {state})")
        elif (status := guest.freeze_status()) != "thawed":
            yield Finding("frozen", guest.name, f"its agent says {status}")
    except (LabError, libvirt.libvirtError) as error:
        yield Finding("frozen", guest.name, f"whether it is frozen cannot be told: {error}")


def _domains(lab: Lab, guests: Sequence[Guest]) -> Iterator[Finding]:
    """Journals, overlays and snapshots of libvirt's own, in the running and in the stored definition."""
    sources = {g.name: {t: d.path or d.image for t, d in g.disks.items()} for g in guests}
    connection = lab.libvirt()
    try:
        for domain in connection.listAllDomains():
            name = domain.name()
            flags = [libvirt.VIR_DOMAIN_XML_INACTIVE, *([0] if domain.isActive() else [])]
            for flag in flags:
                root = ET.fromstring(domain.XMLDesc(flag))  # noqa: S314 - libvirt's own
                where = "stored" if flag else "running"
                for element in root.findall("metadata/*"):
                    if _JOURNALS in element.tag:
                        yield Finding("leaked", name, f"a journal in its {where} definition")
                yield from _disks(name, where, root, sources.get(name, {}))
            for snapshot in domain.listAllSnapshots():
                yield Finding("leaked", name, f"a snapshot {snapshot.getName()} of libvirt's")
    finally:
        connection.close()


def _disks(name: str, where: str, root: ET.Element, sources: dict[str, str]) -> Iterator[Finding]:
    for disk in root.findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is None or source is None:
            continue
        label, used = target.get("dev", ""), " ".join(source.attrib.values())
        if any(Path(v).name.startswith("vms-") for v in source.attrib.values()):
            yield Finding("leaked", name, f"disk {label} of its {where} definition is an overlay: {used}")
        elif label in sources and not used.endswith(sources[label]) and sources[label] not in used:
            yield Finding("leaked", name, f"disk {label} of its {where} definition is {used}, not {sources[label]}")
        if disk.find("backingStore/source") is not None and disk.find("mirror") is None:
            yield Finding("leaked", name, f"disk {label} of its {where} definition has a chain")
        if disk.find("mirror") is not None:
            yield Finding("leaked", name, f"disk {label} is being mirrored")


def _storage(lab: Lab, contents: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Everything on storage that bears a name of ours belongs to a content."""
    known = {n for c in contents for n in REQUEST.findall(json.dumps(c["spec"]))}
    for held in (*proof.files(lab), *proof.ceph(lab)):
        if "vms-probe-" in held:
            continue  # a driver's look at its storage: it may be under way, and a later one removes a stale one
        named = REQUEST.search(held)
        if named is None or named.group(0) not in known:
            yield Finding("leaked", held, "no VMSnapshotContent accounts for it")


def _objects(contents: Sequence[dict[str, Any]], snapshots: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    there = {s["metadata"]["uid"] for s in snapshots}
    for content in contents:
        meta, spec = content["metadata"], content["spec"]
        if spec.get("deletionPolicy") != "Retain" and spec["vmSnapshotRef"]["uid"] not in there:
            yield Finding("leaked", meta["name"], "its VMSnapshot does not exist")
    for body in (*contents, *snapshots):
        meta = body["metadata"]
        if meta.get("deletionTimestamp") and any(f.startswith(FINALIZER) for f in meta.get("finalizers") or ()):
            yield Finding(
                "stuck", meta["name"], f"deleted at {meta['deletionTimestamp']}, and our finalizer is still on it"
            )


def _lease(lab: Lab) -> Iterator[Finding]:
    text = lab.kubectl("-n", "vmsnapshot-system", "get", "leases", "-o", "json")
    holders = {x["metadata"]["name"]: x["spec"].get("holderIdentity") for x in json.loads(text)["items"]}
    if list(holders) != ["vmsnapshot-operator"]:
        yield Finding("leaked", "leases", f"there are {sorted(holders)}")
    if not any(holders.values()):
        yield Finding("stuck", "lease", "nobody holds it: nothing would be done")


def _processes() -> Iterator[Finding]:
    """A driver's process, whose words name the operator that started it, ends with that."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "vmsnapshot_operator.drivers.worker" not in words:
                continue
            operator = words[words.index("vmsnapshot_operator.drivers.worker") + 2]
            if not Path(f"/proc/{operator}").exists():
                yield Finding(
                    "leaked", f"process {entry.name}", f"a driver whose operator (process {operator}) is gone"
                )


# --- one snapshot -----------------------------------------------------------------------------------------------------------


def judge_snapshot(lab: Lab, stack: Stack, name: str, namespace: str = TENANT) -> list[Finding]:
    """What is wrong about a VMSnapshot that is said to have come to its end: not at its end, or better than what it holds."""
    body = stack.get(name, namespace)
    if body is None:
        return []
    found = conditions(body)
    ready = found.get("Ready", {}).get("status") == "True"
    if not ready and found.get("Stalled", {}).get("status") != "True":
        return [Finding("stuck", name, f"neither Ready nor Stalled: {json.dumps(body.get('status'))}")]
    if not ready:
        return []
    content = stack.content(name, namespace)
    if content is None:
        return [Finding("lied", name, "it says Ready, and there is no VMSnapshotContent")]
    return [Finding("lied", name, what) for what in _lies(lab, body, content)]


def _lies(lab: Lab, body: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    status = body.get("status") or {}
    claimed = str(status.get("consistency", ""))
    disks = {d["target"] for d in status.get("volumes") or ()}
    held = {v["target"]: v for v in content["spec"].get("volumes") or ()}
    if disks - set(held):
        yield f"it says Ready, and the content has nothing of {', '.join(sorted(disks - set(held)))}"
        return
    try:
        truth = proof.read(lab, content, lab.state / "judge")
    except Exception as error:  # noqa: BLE001 - whatever keeps it from being read is the finding
        yield f"it says Ready, and what it holds cannot be read: {error}"
        return
    seen = f"records {dict(truth.records)}, file systems {dict(truth.fsck)}"
    match claimed:
        case "Filesystem" if not (truth.one_instant and truth.clean):
            yield f"it claims Filesystem, but holds {seen}"
        case "Crash" if not truth.in_order:
            yield f"it claims Crash, one instant, but holds {seen}"
        case "Filesystem" | "Crash" | "PerVolume" | "Unknown":
            pass
        case other:
            yield f'it claims "{other}", of which nothing is known'
    best = max((str(v.get("consistency", "")) for v in status.get("volumes") or ()), key=_rank, default="")
    worst = min((str(v.get("consistency", "")) for v in status.get("volumes") or ()), key=_rank, default="")
    if worst and _rank(claimed) > _rank(worst):
        yield f"it claims {claimed} as a whole, and {worst} of one of its disks (the best is {best})"


def _rank(claim: str) -> int:
    order = ("", "Unknown", "PerVolume", "Crash", "Filesystem", "Application")
    return order.index(claim) if claim in order else 0
