"""The definition of a new VM made from that of another, beside which it may run. Pure: one text of libvirt's in, another out.

What was snapshotted it has a copy of; what was not it does not get: neither the disk, nor the host's device, nor the shared
directory. What must be one's own (UUID, MACs, sockets, log files, firmware variables) becomes so. A device that is not known
here and names a path of the old VM is refused rather than shared. Not the gate of a restore in place (`definition`).
"""

from __future__ import annotations

import hashlib
import uuid as uuids
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from vmsnapshot_operator.core.journal import NAMESPACE as JOURNAL_NAMESPACE
from vmsnapshot_operator.core.markers import GATE_NAMESPACE, RESTORED_NAMESPACE, WENT_BACK_NAMESPACE, Marker
from vmsnapshot_operator.core.volumes import NVRAM, Layer, SourceKind
from vmsnapshot_operator.plan import definition, new_devices
from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.domain_tree import refusal

_IDENTITIES = uuids.UUID("0a7d9d1e-6f5b-5c43-9a0b-6c9f2f0f6b0e")
"""Ours: the UUIDs of new VMs are derived within it."""

_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_OF_THE_IMAGE = ("snapshot", "seclabel", "privateData", "reservations")
_ATTRIBUTES_OF_THE_IMAGE = (
    "file",
    "dev",
    "name",
    "pool",
    "volume",
    "protocol",
    "index",
    "startupPolicy",
    "mode",
    "query",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a new VM is. `seed` is the UID of its VMRestore: whatever must be unique follows from it, always the same."""

    name: str
    seed: str

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return str(uuids.uuid5(_IDENTITIES, f"{self.seed} uuid"))

    @property
    def genid(self) -> str:
        """The generation id, which tells a guest that it is a copy."""
        return genid(self.seed)

    def mac(self, number: int) -> str:
        """Return the MAC of one interface: locally administered, and in the range that QEMU's own begin with."""
        return ":".join(f"{b:02x}" for b in (0x52, *hashlib.sha256(f"{self.seed} mac {number}".encode()).digest()[:5]))


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDefinition:
    """A definition that can be defined, and what users have to know of how it differs."""

    xml: str
    notes: tuple[str, ...]


def genid(seed: str) -> str:
    """Return a generation id that follows from the UID of a VMRestore."""
    return str(uuids.uuid5(_IDENTITIES, f"{seed} genid"))


def as_new_vm(text: str, identity: Identity, sources: Mapping[str, Layer], marker: Marker) -> NewDefinition:
    """Return the definition of a new VM that has copies of the disks `sources` (by target), and no other that it could write.

    `text` is the old VM's definition, with or without secrets. Without a copy of its firmware's variables (target `NVRAM`) among the
    sources they begin anew from the firmware's own. The marker of its VMRestore stands in it from the start. Same input,
    same output. Raises RefusedError for a definition that cannot be worked with, a disk that the VM does not have, and
    devices or arguments of which nobody can tell whether two VMs may have them.
    """
    root = tree.parse(text)
    _refuse_arguments(root)
    before = new_devices.belongings(root)
    notes = [
        *_disks(root, {t: layer for t, layer in sources.items() if t != NVRAM}),
        *new_devices.separate(root, identity.name, identity.mac),
        *_firmware(root, identity, sources.get(NVRAM)),
    ]
    _identify(root, identity)
    tree.discard(root, "seclabel")
    tree.drop_own(root, JOURNAL_NAMESPACE, GATE_NAMESPACE, RESTORED_NAMESPACE, WENT_BACK_NAMESPACE)
    definition.add_done(root, marker)
    if shared := sorted(before & new_devices.belongings(root)):
        raise refusal(
            f"nobody can tell whether a second VM may use what the VM's devices name: {', '.join(shared[:5])}"
        )
    return NewDefinition(xml=tree.text_of(root), notes=tuple(notes))


def _identify(root: ET.Element, identity: Identity) -> None:
    root.attrib.pop("id", None)
    tree.required(root, "name").text = identity.name
    tree.discard(root, "hwuuid")
    tree.set_child(root, "uuid", identity.uuid)
    # libvirt refuses a UUID in the firmware's tables that is not the domain's.
    for entry in root.findall("sysinfo/system/entry"):
        if entry.get("name") == "uuid":
            entry.text = identity.uuid
    # Only where there was one: for old machine types it cannot be added.
    if root.find("genid") is not None:
        tree.set_child(root, "genid", identity.genid)


def _refuse_arguments(root: ET.Element) -> None:
    """Refuse what goes to QEMU past libvirt: it may open what the old VM has open."""
    for child in root:
        prefix, _, name = child.tag.rpartition(":")
        namespace = child.get(f"xmlns:{prefix}") or root.get(f"xmlns:{prefix}") if prefix else child.get("xmlns")
        if namespace == _QEMU and name == "commandline" and len(child):
            raise refusal(
                "the VM's definition passes arguments to QEMU past libvirt (qemu:commandline): nobody can tell what a second VM"
                " would share with it; define the new VM by hand, from clones"
            )


# --- disks ---------------------------------------------------------------------------------------------------------------


def _disks(root: ET.Element, sources: Mapping[str, Layer]) -> list[str]:
    found = tree.disks(root)
    if missing := sorted(sources.keys() - found.keys()):
        raise refusal(f"the VM has no disk {', '.join(missing)}, but {', '.join(found) or 'none'}")
    if not sources:
        raise refusal("a new VM without any of the disks would be empty")
    if len({tuple(_address(layer).items()) for layer in sources.values()}) < len(sources):
        raise refusal("two disks of a new VM cannot be the same copy")
    notes = []
    for target, disk in found.items():
        tree.discard(disk, "backingStore", "mirror")
        if target in sources:
            _point(disk, target, sources[target])
        elif new_devices.is_removable(disk) and not new_devices.is_read_only(disk):
            tree.discard(disk, "source")
            notes.append(f"drive {target} is empty: its medium is the old VM's, which could be written to")
        elif not new_devices.is_read_only(disk):
            tree.devices(root).remove(disk)
            notes.append(f"disk {target} is not in it")
    return notes


def _point(disk: ET.Element, target: str, layer: Layer) -> None:
    old = tree.required(disk, "source")
    if next(disk.iter("slices"), None) is not None:
        raise refusal(f"disk {target} is a slice of a larger image: what is a copy of that cannot be told")
    same = disk.get("type") == layer.kind.value and old.get("protocol", "") == layer.protocol
    kept = {k: v for k, v in old.attrib.items() if k not in _ATTRIBUTES_OF_THE_IMAGE} if same else {}
    made = ET.Element("source", {**_address(layer), **kept})
    for child in old:
        # How to reach and open it (hosts, log-in, TLS, keys) is the same for a copy on the same storage.
        if (same or child.tag == "encryption") and child.tag not in _OF_THE_IMAGE:
            made.append(tree.copy_of(child))
    if layer.hosts:
        tree.discard(made, "host")
        for number, host in enumerate(layer.hosts):
            made.insert(number, _host(host))
    if not same:
        tree.discard(disk, "auth")
    tree.replace(disk, old, made)
    disk.set("type", layer.kind.value)
    _set_format(disk, layer.format)


def _set_format(disk: ET.Element, image_format: str) -> None:
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    if driver.get("type", "raw") != image_format:
        tree.discard(driver, "metadata_cache")
    driver.set("type", image_format)


def _address(layer: Layer) -> dict[str, str]:
    match layer.kind:
        case SourceKind.FILE:
            return {"file": layer.source}
        case SourceKind.BLOCK:
            return {"dev": layer.source}
        case SourceKind.VOLUME:
            pool, _, volume = layer.source.partition("/")
            return {"pool": pool, "volume": volume}
        case SourceKind.NETWORK:
            return {"protocol": layer.protocol, "name": layer.source}


def _host(address: str) -> ET.Element:
    if address.startswith("/"):
        return ET.Element("host", {"transport": "unix", "socket": address})
    if address.startswith("["):
        name, _, port = address[1:].partition("]")
    else:
        name, _, port = address.partition(":")
    port = port.removeprefix(":")
    return ET.Element("host", {"name": name, **({"port": port} if port else {})})


# --- firmware --------------------------------------------------------------------------------------------------------------


def _firmware(root: ET.Element, identity: Identity, given: Layer | None) -> list[str]:
    notes = []
    if given is not None and given.kind is not SourceKind.FILE:
        raise refusal(
            f"the copy of the firmware's variables is {given.source}, which is no file that the VM could be given"
        )
    if any(loader.get("readonly") == "no" for loader in root.findall("os/loader")):
        raise refusal("the VM's firmware is a file that it can write to itself: that file is not copied")
    for element in (root.find("os/nvram"), root.find("os/varstore")):
        if element is None:
            continue
        source = element.find("source")
        kind = element.get("type", "file")
        if kind != "file":
            raise refusal(f"the firmware's variables of the VM are kept on storage of type {kind}, which is not copied")
        old = source.get("file", "") if source is not None else ""
        old = old or element.get("path", "") or (element.text or "").strip()
        path = given.source if given is not None else _beside(old, identity) if old else ""
        tree.discard(element, "source")
        element.attrib.pop("type", None)
        element.text = None
        if element.tag == "varstore":
            element.set("path", path) if path else element.attrib.pop("path", None)
        else:
            element.text = path or None
        if given is None:
            notes.append("its firmware's variables (boot entries, keys) begin anew")
    return notes


def _beside(old: str, identity: Identity) -> str:
    """A path that nothing left by another VM of this name can have: libvirt would take such a file for this VM's."""
    path = PurePosixPath(old)
    return str(path.with_name(f"{identity.name}-{identity.uuid[:8]}_VARS{path.suffix or '.fd'}"))
