"""A domain's XML, parsed once into the types of `core.machine`. Pure: text in, facts out."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from vmsnapshot_operator.core.machine import Device, DeviceKind, Disk, DiskDevice
from vmsnapshot_operator.core.volumes import Layer, SourceKind

_SOURCES = {
    "file": SourceKind.FILE,
    "block": SourceKind.BLOCK,
    "network": SourceKind.NETWORK,
    "volume": SourceKind.VOLUME,
}


def parse(text: str) -> tuple[tuple[Disk, ...], tuple[Device, ...]]:
    """Return disks and other state-bearing devices. Raises ValueError for text that is not a domain's XML."""
    try:
        root = ET.fromstring(text)  # noqa: S314 - written by libvirt, entities are not resolved from outside
    except ET.ParseError as error:
        msg = f"libvirt's definition of the domain cannot be read: {error}"
        raise ValueError(msg) from error
    devices = root.find("devices")
    if root.tag != "domain":
        msg = f"not a domain: <{root.tag}>"
        raise ValueError(msg)
    disks = tuple(_disk(e) for e in devices.findall("disk")) if devices is not None else ()
    return disks, tuple(_devices(root, devices))


def _disk(element: ET.Element) -> Disk:
    target = element.find("target")
    driver = element.find("driver")
    device = element.get("device", "disk")
    return Disk(
        target=target.get("dev", "?") if target is not None else "?",
        device=DiskDevice(device) if device in set(DiskDevice) else DiskDevice.LUN,
        layers=_chain(element, driver),
        read_only=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find("encryption") is not None or element.find("source/encryption") is not None,
        cache=driver.get("cache", "") if driver is not None else "",
        in_block_job=element.find("mirror") is not None,
    )


def _chain(disk: ET.Element, driver: ET.Element | None) -> tuple[Layer, ...]:
    kind = disk.get("type", "")
    image_format = driver.get("type", "raw") if driver is not None else "raw"
    first = _layer(kind, disk.find("source"), image_format)
    if first is None:
        return ()
    layers = [first]
    backing = disk.find("backingStore")
    while backing is not None and backing.get("type"):
        described = backing.find("format")
        layer = _layer(backing.get("type", ""), backing.find("source"), described.get("type", "") if described is not None else "")
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
            hosts = tuple(f"{h.get('name', '')}:{h.get('port', '')}".rstrip(":") for h in source.findall("host"))
            protocol = source.get("protocol", "")
            pool = name.split("/")[0] if protocol == "rbd" and "/" in name else ""
            return Layer(kind=SourceKind.NETWORK, source=name, format=image_format, protocol=protocol, pool=pool, hosts=hosts)
        case _:
            # A type that is not known here bears state all the same: named, so that the planner refuses it.
            return Layer(kind=SourceKind.VOLUME, source=f"{kind}:{source.attrib}", format=image_format)


def _devices(root: ET.Element, devices: ET.Element | None) -> list[Device]:
    found: list[Device] = []
    nvram = root.find("os/nvram")
    if nvram is not None:
        found.append(Device(kind=DeviceKind.NVRAM, name="nvram"))
    if devices is None:
        return found
    for number, element in enumerate(devices.findall("hostdev")):
        alias = element.find("alias")
        found.append(Device(kind=DeviceKind.HOSTDEV, name=alias.get("name", "") if alias is not None else f"hostdev{number}"))
    for number, element in enumerate(devices.findall("filesystem")):
        target = element.find("target")
        found.append(Device(kind=DeviceKind.FILESYSTEM, name=target.get("dir", "") if target is not None else f"fs{number}"))
    found += [Device(kind=DeviceKind.TPM, name="tpm") for _ in devices.findall("tpm")[:1]]
    for number, element in enumerate(devices.findall("memory")):
        if element.get("model") in ("nvdimm", "virtio-pmem"):
            found.append(Device(kind=DeviceKind.PMEM, name=f"{element.get('model')}{number}"))
    return found
