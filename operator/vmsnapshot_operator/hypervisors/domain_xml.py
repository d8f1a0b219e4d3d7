"""A domain's XML, parsed once into the types of `core.machine`. Pure: text in, facts out."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from vmsnapshot_operator.core.machine import Device, DeviceKind, Disk, DiskDevice
from vmsnapshot_operator.core.volumes import NVRAM, Layer, SourceKind

_SOURCES = {
    "file": SourceKind.FILE,
    "block": SourceKind.BLOCK,
    "network": SourceKind.NETWORK,
    "volume": SourceKind.VOLUME,
}


def parse(text: str) -> tuple[tuple[Disk, ...], tuple[Device, ...]]:
    """Return disks and other state-bearing devices. Raises ValueError for text that is not a domain's XML."""
    root = element(text)
    devices = root.find("devices")
    if root.tag != "domain":
        msg = f"not a domain: <{root.tag}>"
        raise ValueError(msg)
    disks = tuple(_disk(e) for e in devices.findall("disk")) if devices is not None else ()
    return disks, tuple(_devices(root, devices))


def element(text: str) -> ET.Element:
    """Return the root of what libvirt wrote. Raises ValueError."""
    try:
        return ET.fromstring(text)  # noqa: S314 - written by libvirt, entities are not resolved from outside
    except ET.ParseError as error:
        msg = f"what libvirt wrote cannot be read: {error}"
        raise ValueError(msg) from error


def _disk(disk: ET.Element) -> Disk:
    target = disk.find("target")
    driver = disk.find("driver")
    return Disk(
        target=target.get("dev", "?") if target is not None else "?",
        device=_device(disk),
        layers=_chain(disk, driver),
        read_only=disk.find("readonly") is not None,
        shareable=disk.find("shareable") is not None,
        transient=disk.find("transient") is not None,
        encrypted=next(disk.iter("encryption"), None) is not None,
        cache=driver.get("cache", "") if driver is not None else "",
        in_block_job=disk.find("mirror") is not None,
    )


def _device(disk: ET.Element) -> DiskDevice:
    named = disk.get("device", "disk")
    if named not in set(DiskDevice):
        return DiskDevice.LUN  # unknown: refused like all that the hypervisor does not see through
    device = DiskDevice(named)
    if device is DiskDevice.DISK and disk.get("type") not in _SOURCES:
        return DiskDevice.LUN  # nvme, vhostuser, vhostvdpa: the guest talks to the storage past the hypervisor
    return device


def _chain(disk: ET.Element, driver: ET.Element | None) -> tuple[Layer, ...]:
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    first = _layer(disk.get("type", ""), disk.find("source"), image_format)
    if first is None:
        return ()
    layers = [first]
    backing = disk.find("backingStore")
    while backing is not None and backing.get("type"):
        described = backing.find("format")
        layer = _layer(
            backing.get("type", ""), backing.find("source"), described.get("type", "") if described is not None else ""
        )
        if layer is None:
            break
        layers.append(layer)
        backing = backing.find("backingStore")
    return tuple(layers)


def _layer(kind: str, source: ET.Element | None, image_format: str) -> Layer | None:
    if source is None:
        return None
    match _SOURCES.get(kind):
        case SourceKind.FILE:
            path = source.get("file", "")
            return Layer(kind=SourceKind.FILE, source=path, format=image_format) if path else None
        case SourceKind.BLOCK:
            path = source.get("dev", "")
            return Layer(kind=SourceKind.BLOCK, source=path, format=image_format) if path else None
        case SourceKind.VOLUME:
            pool, volume = source.get("pool", ""), source.get("volume", "")
            return Layer(kind=SourceKind.VOLUME, source=f"{pool}/{volume}", format=image_format, pool=pool)
        case SourceKind.NETWORK:
            name = source.get("name", "")
            protocol = source.get("protocol", "")
            pool = name.split("/")[0] if protocol == "rbd" and "/" in name else ""
            return Layer(
                kind=SourceKind.NETWORK,
                source=name or "(default export)",
                format=image_format,
                protocol=protocol,
                pool=pool,
                hosts=tuple(_host(h) for h in source.findall("host")),
            )
        case _:
            # A type that is not known here bears state all the same: it is named, and `_device` has it refused.
            words = " ".join(f"{k}={v}" for k, v in sorted(source.attrib.items()))
            return Layer(kind=SourceKind.BLOCK, source=f"({kind} {words})", format=image_format)


def _host(host: ET.Element) -> str:
    name, port = host.get("name", ""), host.get("port", "")
    if not name:
        return host.get("socket", "")
    shown = f"[{name}]" if ":" in name else name
    return f"{shown}:{port}" if port else shown


def _nvram(root: ET.Element) -> list[Device]:
    """What keeps the firmware's variables, if anything does."""
    element = root.find("os/nvram")
    if element is not None:
        kind, source = element.get("type", "file"), element.find("source")
        path = source.get("file", "") if source is not None else (element.text or "").strip()
        if path:
            layer = Layer(kind=SourceKind.FILE, source=path, format=element.get("format", "raw"))
            return [Device(kind=DeviceKind.NVRAM, name=NVRAM, file=layer)]
        where = f"on storage of type {kind}" if kind != "file" else "in a file that the definition does not name"
    elif root.find("os/varstore") is not None:
        where = "in a file that QEMU writes anew at each change (varstore)"
    elif any(e.get("readonly") == "no" for e in root.findall("os/loader")):
        where = "in the file of the firmware itself, which the VM can write to (loader)"
    else:
        return []
    return [Device(kind=DeviceKind.NVRAM, name=NVRAM, where=where)]


def _devices(root: ET.Element, devices: ET.Element | None) -> list[Device]:
    found: list[Device] = _nvram(root)
    if devices is None:
        return found
    for number, hostdev in enumerate(devices.findall("hostdev")):
        alias = hostdev.find("alias")
        name = alias.get("name", "") if alias is not None else ""
        found.append(Device(kind=DeviceKind.HOSTDEV, name=name or f"hostdev{number}"))
    for number, shared in enumerate(devices.findall("filesystem")):
        target = shared.find("target")
        name = target.get("dir", "") if target is not None else ""
        found.append(Device(kind=DeviceKind.FILESYSTEM, name=name or f"fs{number}"))
    found += [Device(kind=DeviceKind.TPM, name="tpm") for _ in devices.findall("tpm")[:1]]
    for number, memory in enumerate(devices.findall("memory")):
        if memory.get("model") in ("nvdimm", "virtio-pmem"):
            found.append(Device(kind=DeviceKind.PMEM, name=f"{memory.get('model')}{number}"))
    return found
