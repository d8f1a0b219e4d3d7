"""What the storage and the hypervisor really hold: read from them, past the operator and its drivers.

The content of a snapshot is fetched to a plain file and read there: `tests.lab.truth` counts the guest's records and checks
the file system. `leftovers` lists everything of ours in the world.
"""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests.lab import Lab, truth
from tests.lab.run import run
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import NVRAM

OURS = ("vms-", "ovl-")
JOURNAL = "https://vmsnapshot.io/journal/1"
CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Truth:
    """What the disks of one snapshot hold, by target."""

    records: Mapping[str, int]
    fsck: Mapping[str, str]

    @property
    def one_instant(self) -> bool:
        """All disks hold the same number of records: only a quiesced guest leaves them so."""
        return len(set(self.records.values())) == 1 and min(self.records.values(), default=0) > 0

    @property
    def clean(self) -> bool:
        """Every file system is clean."""
        return bool(self.fsck) and all(v == CLEAN for v in self.fsck.values())

    @property
    def in_order(self) -> bool:
        """What one atomic crash-consistent instant holds: no later disk is ahead, none lags by more than one record."""
        counts = [self.records[t] for t in sorted(self.records)]
        return all(a >= b for a, b in pairwise(counts)) and counts[0] - counts[-1] <= 1


def read(lab: Lab, content: Mapping[str, Any], into: Path) -> Truth:
    """Fetch what a VMSnapshotContent says is held, and read it: the disks, not the variables of the firmware."""
    into.mkdir(parents=True, exist_ok=True)
    drivers = {g["className"]: g["driver"] for g in content["spec"]["groups"]}
    records: dict[str, int] = {}
    fsck: dict[str, str] = {}
    for volume in content["spec"]["volumes"]:
        target, handle = volume["target"], volume["handle"]
        if target == NVRAM:
            continue
        raw = into / f"{content['metadata']['name']}-{target}.raw"
        if drivers[volume["className"]] == "ceph-rbd":
            image, snap = handle.rsplit("@", 1)
            truth.fetch_rbd_snapshot(lab.ceph, image.split("/")[-1], snap, raw)
        else:
            truth.fetch_file(Path(handle), raw)
        records[target] = truth.records(raw)
        fsck[target] = truth.fsck(raw)
        raw.unlink()
    return Truth(records, fsck)


def of_domain(lab: Lab, domain: Any, into: Path) -> Truth:
    """Read the disks of a domain that is off, as they are now."""
    into.mkdir(parents=True, exist_ok=True)
    records: dict[str, int] = {}
    fsck: dict[str, str] = {}
    for disk in ET.fromstring(domain.XMLDesc()).findall("devices/disk"):  # noqa: S314 - libvirt's own
        target, source = disk.find("target"), disk.find("source")
        if target is None or source is None:
            continue
        raw = into / f"disk-{target.attrib['dev']}.raw"
        if source.get("file"):
            truth.fetch_file(Path(source.attrib["file"]), raw)
        else:
            run("rbd", "-c", lab.ceph.conf, "export", "--no-progress", source.attrib["name"], raw)
        records[target.attrib["dev"]] = truth.records(raw)
        fsck[target.attrib["dev"]] = truth.fsck(raw)
        raw.unlink()
    return Truth(records, fsck)


def remove_vm(lab: Lab, name: str) -> None:
    """Remove a VM that a restore has made, with its disks; nothing happens if there is none."""
    connection = lab.libvirt()
    try:
        domain = connection.lookupByName(name)
        if domain.isActive():
            domain.destroy()
        sources = ET.fromstring(domain.XMLDesc()).findall("devices/disk/source")  # noqa: S314 - libvirt's own
        domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_NVRAM)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return
    finally:
        connection.close()
    for source in sources:
        if source.get("file"):
            Path(source.attrib["file"]).unlink(missing_ok=True)
        else:
            lab.ceph.remove_image(source.attrib["name"].rpartition("/")[2])


def leftovers(lab: Lab) -> list[str]:
    """Name everything that storage, hypervisor or API server still hold of any snapshot.

    A driver's probe of its storage (`vms-probe-…`) is none: it may be under way, and stale ones are removed by a later probe.
    """
    return [x for x in (*files(lab), *ceph(lab), *_domains(lab), *_objects(lab)) if "vms-probe-" not in x]


def held_of(lab: Lab, installation: str, uid: str) -> list[str]:
    """Name what of that is of one VMSnapshot of an installation."""
    names_of_it = names.object_prefix(installation, uid).removeprefix(OURS[0])
    return [x for x in leftovers(lab) if names_of_it in x or uid in x]


def files(lab: Lab) -> list[str]:
    """Files of ours in the pools."""
    return [
        f"file {p}"
        for pool in ("reflink", "plain")
        for p in sorted(lab.pool_path(pool).iterdir())
        if p.name.startswith(OURS)
    ]


def ceph(lab: Lab) -> list[str]:
    """Groups, images, snapshots and what is in the trash of the Ceph pool; the laboratory itself has none but images."""
    import rbd  # Debian's bindings; only where the laboratory is

    found = []
    with lab.ceph.connect() as (_, ioctx):
        found += [f"rbd group {n}" for n in rbd.RBD().group_list(ioctx)]
        for name in rbd.RBD().list(ioctx):
            if name.startswith("vms-"):
                found.append(f"rbd image {name}")
            try:
                with rbd.Image(ioctx, name, read_only=True) as image:
                    found += [f"rbd snapshot {name}@{s['name']}" for s in image.list_snaps()]
            except rbd.ImageNotFound:
                continue  # gone since it was listed
        found += [f"rbd trash {e['name']}" for e in rbd.RBD().trash_list(ioctx)]
    return found


def _domains(lab: Lab) -> list[str]:
    found = []
    connection = lab.libvirt()
    try:
        for domain in connection.listAllDomains():
            for flag in (libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG):
                try:
                    domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, JOURNAL, flag)
                except libvirt.libvirtError:
                    continue
                found.append(f"journal in the metadata of domain {domain.name()}")
            with contextlib.suppress(libvirt.libvirtError):  # the test driver knows none
                found += [f"checkpoint {c.getName()} of {domain.name()}" for c in domain.listAllCheckpoints()]
            found += [f"bitmap {name} in a disk of {domain.name()}" for name in bitmaps(domain)]
            found += [f"libvirt snapshot {s.getName()} of {domain.name()}" for s in domain.listAllSnapshots()]
            with contextlib.suppress(libvirt.libvirtError):  # it has no job
                found.append(f"a copy of domain {domain.name()} is under way: {domain.backupGetXMLDesc()}")
            for which, flag in (("running", 0), ("saved", libvirt.VIR_DOMAIN_XML_INACTIVE)):
                layers = ET.fromstring(domain.XMLDesc(flag)).findall("devices/disk//source")  # noqa: S314 - libvirt's own
                ours = {
                    Path(v).name for layer in layers for v in layer.attrib.values() if Path(v).name.startswith(OURS)
                }
                found += [f"layer {name} in the {which} definition of {domain.name()}" for name in sorted(ours)]
    finally:
        connection.close()
    return found


def bitmaps(domain: Any) -> list[str]:
    """Bitmaps of ours in the disks of a domain, by the word of its QEMU, or of their files while it is off: libvirt does not list them."""
    names_of: set[str] = set()
    if domain.isActive():
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "query-named-block-nodes"}', 0))
        for node in answer["return"]:
            names_of |= {b["name"] for b in node.get("dirty-bitmaps", ()) if "name" in b}
    else:
        for source in ET.fromstring(domain.XMLDesc()).findall("devices/disk/source"):  # noqa: S314 - libvirt's own
            if source.get("file") and Path(source.attrib["file"]).exists():
                about = json.loads(run("qemu-img", "info", "-U", "--output=json", source.attrib["file"]))
                kept = about.get("format-specific", {}).get("data", {}).get("bitmaps", ())
                names_of |= {b["name"] for b in kept}
    return sorted(n for n in names_of if n.startswith(OURS))


def _objects(lab: Lab) -> list[str]:
    kinds = "vmsnapshots.vmsnapshot.io,vmsnapshotcontents.vmsnapshot.io"
    return [f"object {n}" for n in lab.kubectl("get", kinds, "-A", "-o", "name").split()]
