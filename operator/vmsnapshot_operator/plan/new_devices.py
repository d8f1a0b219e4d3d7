"""The devices of a VM's definition, made a new VM's own: what two VMs cannot both have is renamed, freed or taken out.

Not its disks' sources, nor who the new VM is (`new_definition`).
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import PurePosixPath

from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.domain_tree import refusal

_SOCKET_LIMIT = 107
"""Bytes in the path of a Unix socket (unix(7): 108 with the end)."""

_GENERATED = re.compile(r"/qemu/channel/")
"""In the folders where libvirt makes a guest's channels, with the number of the run or the VM's name."""

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_NO_PASSWORD, _EXPIRED = "locked", "1970-01-01T00:00:01"
"""libvirt lets nobody in by a password that is no longer valid."""

_ALIAS_OF_USERS = "ua-"
_CHARACTER_DEVICES = ("serial", "parallel", "console", "channel", "redirdev", "smartcard")
_HOSTS_OWN = {
    "hostdev": "a device of the host",
    "shmem": "memory shared between VMs",
    "lease": "a lock that the old VM holds",
}
_INTERFACES_OF_THE_HOST = ("hostdev", "vdpa", "vhostuser")
_SHARED_BY_NATURE = re.compile(
    r"^(emulator|rng/backend|interface/(script|downscript|backend)|video/.*|graphics/gl|smartcard/database|.*/rom|disk/source/.*)$"
)
"""Elements whose paths are only read, are of devices made to be opened by many, or say how to reach a storage system."""


def separate(root: ET.Element, name: str, mac: Callable[[int], str]) -> list[str]:
    """Change the devices in place and return what users have to know; raises RefusedError."""
    devices = tree.devices(root)
    notes = [*_take_out(devices), *_character_devices(devices, name), *_interfaces(devices, mac), *_graphics(devices)]
    for cid in devices.findall("vsock/cid"):
        # A number is one VM's alone on its host.
        cid.attrib.pop("address", None)
        cid.set("auto", "yes")
    if devices.find("tpm") is not None:
        notes.append(
            "its TPM is a new one: what was sealed in the old one (as the key of a disk) cannot be opened by it"
        )
    for element in devices.iter():
        tree.discard(element, "seclabel")
        for alias in element.findall("alias"):
            if not alias.get("name", "").startswith(_ALIAS_OF_USERS):
                element.remove(alias)
    return notes


def belongings(root: ET.Element) -> set[str]:
    """Return what the devices name of the host and of storage, but for what any number of VMs may use."""
    found: set[str] = set()
    for device in tree.devices(root):
        if device.tag in ("disk", "filesystem") and is_read_only(device):
            continue
        for where, element in _within(device, device.tag):
            if _SHARED_BY_NATURE.match(where):
                continue
            values = [*element.attrib.values(), (element.text or "").strip()]
            found |= {v for v in values if v.startswith("/")}
            if where == "disk/source":
                found |= {" ".join(v) for v in (_image(element),) if v}
    return found


def _image(source: ET.Element) -> tuple[str, ...]:
    if source.get("protocol"):
        return (source.get("protocol", ""), source.get("name", ""))
    return ("volume", source.get("pool", ""), source.get("volume", "")) if source.get("pool") else ()


def is_read_only(device: ET.Element) -> bool:
    """Whether a VM cannot write to a disk or shared directory."""
    return device.find("readonly") is not None or device.get("device") == "cdrom"


def is_removable(disk: ET.Element) -> bool:
    """Whether a disk is a drive, which may be empty."""
    return disk.get("device") in ("cdrom", "floppy")


def _has_socket(source: ET.Element | None) -> bool:
    """Whether a server of the host's serves it, which takes one client."""
    return source is not None and source.get("socket") is not None


def _within(element: ET.Element, where: str) -> list[tuple[str, ET.Element]]:
    found = [(where, element)]
    for child in element:
        found += _within(child, f"{where}/{child.tag}")
    return found


def _take_out(devices: ET.Element) -> list[str]:
    notes = []
    for device in list(devices):
        what = _HOSTS_OWN.get(device.tag, "")
        source = device.find("source")
        if device.tag == "filesystem" and (not is_read_only(device) or _has_socket(source)):
            what = "a shared directory"
        elif device.tag == "memory" and device.get("model") in ("nvdimm", "virtio-pmem"):
            what = "persistent memory"
        elif device.tag == "interface" and device.get("type") in _INTERFACES_OF_THE_HOST:
            what = "a network device of the host"
        elif device.tag == "input" and device.get("type") in ("passthrough", "evdev") and source is not None:
            what = "an input device of the host"
        elif device.tag == "tpm" and device.find("backend[@type='emulator']") is None:
            what = "a TPM that is not emulated"
        if what:
            devices.remove(device)
            notes.append(f"{what} (<{device.tag}>) is not in it: it was not snapshotted")
    for tpm in devices.findall("tpm/backend"):
        # Where its state is kept: without it libvirt goes by the VM's UUID.
        tree.discard(tpm, "source")
    return notes


def _character_devices(devices: ET.Element, name: str) -> list[str]:
    notes = []
    for device in list(devices.iter()):
        if device.tag not in _CHARACTER_DEVICES and not (device.tag == "backend" and device.get("type") is not None):
            continue
        for log in device.findall("log"):
            log.set("file", _own(log.get("file", ""), name))
        device.attrib.pop("tty", None)
        kind = device.get("type")
        for source in device.findall("source"):
            path = source.get("path", "")
            if kind == "pty" or (device.tag == "channel" and (not path or _GENERATED.search(path))):
                device.remove(source)  # libvirt finds one itself
            elif kind == "unix" and path and source.get("mode", "bind") == "bind":
                source.set("path", _socket(path, name))
            elif kind in ("file", "pipe") and path:
                source.set("path", _own(path, name))
            elif (kind in ("tcp", "udp") and source.get("mode") == "bind") or kind == "dev":
                device.set("type", "pty")
                tree.discard(device, "source", "protocol")
                where = path or f"port {source.get('service', '')}"
                notes.append(f"its {device.tag} that was at {where} is a pseudo-terminal: that place is the old VM's")
                break
    return notes


def _own(path: str, name: str) -> str:
    """A path beside another one, with the VM's name in it."""
    old = PurePosixPath(path)
    return str(old.with_name(f"{old.stem}-{name}{old.suffix}")) if old.name else path


def _socket(path: str, name: str) -> str:
    made = _own(path, name)
    if len(made.encode()) > _SOCKET_LIMIT:
        raise refusal(
            f"the new VM's socket {made} would be longer than the {_SOCKET_LIMIT} bytes that a socket's path may have"
        )
    return made


def _interfaces(devices: ET.Element, mac: Callable[[int], str]) -> list[str]:
    notes = []
    taken = {m.get("address", "").lower() for m in devices.findall("interface/mac")}
    number = 0
    for interface in devices.findall("interface"):
        while (made := mac(number)) in taken:
            number += 1
        number += 1
        found = interface.find("mac")
        if found is None:
            found = ET.Element("mac")
            interface.insert(0, found)
        old = found.get("address", "")
        found.attrib.clear()
        found.set("address", made)
        if old:
            notes.append(f"the interface that was {old} is {made}")
        # The host's end has a name of its own, and so has the port of a switch.
        tree.discard(interface, "target")
        for source in interface.findall("source"):
            source.attrib.pop("portid", None)
        for backend in interface.findall("backend[@logFile]"):
            backend.attrib.pop("logFile")
        for parameters in interface.findall("virtualport/parameters"):
            for key in ("interfaceid", "instanceid"):
                parameters.attrib.pop(key, None)
    return notes


def _graphics(devices: ET.Element) -> list[str]:
    notes = []
    for display in devices.findall("graphics"):
        if display.get("port") is not None or display.get("tlsPort") is not None:
            for key in ("port", "tlsPort", "websocket"):
                display.attrib.pop(key, None)
            display.set("autoport", "yes")
        display.attrib.pop("socket", None)
        for listen in display.findall("listen[@type='socket']"):
            listen.attrib.pop("socket", None)
        if display.get("passwd") is None and any(not _is_local(e) for e in (display, *display.findall("listen"))):
            # Whether the old one had a password cannot be told from a definition that was read without secrets.
            display.set("passwd", _NO_PASSWORD)
            display.set("passwdValidTo", _EXPIRED)
            notes.append(f"its {display.get('type', '')} display is locked until an administrator sets a password")
    return notes


def _is_local(display: ET.Element) -> bool:
    """Whether a display, or one place where it listens, is not to be reached over the network."""
    if display.tag == "listen":
        return display.get("type") in ("none", "socket") or display.get("address", "") in _LOOPBACK
    return display.get("type") not in ("vnc", "spice", "rdp") or display.get("listen", "127.0.0.1") in _LOOPBACK
