"""An empty qcow2 overlay as bytes, and the name by which QEMU opens its backing image. Pure.

Why not by `qemu-img`: the operator does not see the hypervisor's files, and libvirt's storage API makes no overlay over an RBD
image (libvirt 9.0: "inaccessible backing store volume"). Format: QEMU's docs/interop/qcow2.txt, version 3.
"""

from __future__ import annotations

import json
import struct

from vmsnapshot_operator.core.volumes import Layer, SourceKind

CLUSTER = 65_536
MAX_BYTES = 64 << 40
_MAX_NAME = 1023
_BACKING_FORMAT = 0xE2792ACA
_HEADER = ">4sIQIIQIIQQIIQQQQII"
_HEADER_LENGTH = 104


def overlay(size_bytes: int, backing: str, backing_format: str) -> bytes:
    """Return a whole, empty image of this virtual size over a backing image, which is not looked at.

    Raises ValueError for a size that is not positive, larger than 64 TiB or no multiple of 512, and for a name that is too long.
    """
    if not 0 < size_bytes <= MAX_BYTES or size_bytes % 512:
        msg = f"no overlay can have {size_bytes} bytes"
        raise ValueError(msg)
    name, form = backing.encode(), backing_format.encode()
    if not 0 < len(name) <= _MAX_NAME:
        msg = f"the name of a backing image has 1 to {_MAX_NAME} bytes, not {len(name)}"
        raise ValueError(msg)
    extensions = struct.pack(">II", _BACKING_FORMAT, len(form)) + form.ljust(-(-len(form) // 8) * 8, b"\0") + bytes(8)
    entries = _entries(size_bytes)
    tables = -(-entries * 8 // CLUSTER)
    # Clusters: header, refcount table, refcount block, then the L1 table, whose entries are all empty.
    header = struct.pack(
        _HEADER,
        b"QFI\xfb",
        3,
        _HEADER_LENGTH + len(extensions),
        len(name),
        16,
        size_bytes,
        0,
        entries,
        3 * CLUSTER,
        CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        _HEADER_LENGTH,
    )
    counts = struct.pack(">H", 1) * (3 + tables)
    clusters = (header + extensions + name, struct.pack(">Q", 2 * CLUSTER), counts)
    return b"".join(c.ljust(CLUSTER, b"\0") for c in clusters) + bytes(tables * CLUSTER)


def empty_length(size_bytes: int) -> int:
    """Return how many bytes an overlay of this virtual size has as long as nobody wrote to it."""
    return (3 + -(-_entries(size_bytes) * 8 // CLUSTER)) * CLUSTER


def is_new_overlay(content: bytes) -> bool:
    """Whether this is what `overlay` returns for some size and backing image: other programs lay out their images otherwise."""
    if len(content) < CLUSTER:
        return False
    _, _, length, name_length, _, size_bytes, *_ = struct.unpack_from(_HEADER, content)
    if not _HEADER_LENGTH < length <= length + name_length <= CLUSTER:
        return False
    kind, form_length = struct.unpack_from(">II", content, _HEADER_LENGTH)
    start = _HEADER_LENGTH + 8
    try:
        form = content[start : start + form_length].decode()
        name = content[length : length + name_length].decode()
        return kind == _BACKING_FORMAT and content == overlay(size_bytes, name, form)
    except ValueError:
        return False


def _entries(size_bytes: int) -> int:
    """Entries of the L1 table: each stands for a table of as many clusters as fit into one."""
    return -(-size_bytes // (CLUSTER * (CLUSTER // 8)))


def backing_name(layer: Layer) -> str:
    """Return the name by which QEMU finds an image: a path, or its own description of an RBD image.

    Without secrets: libvirt hands those to QEMU for the disks of a definition, but not for what a header names. A VM whose
    Ceph asks for a key can therefore not be started from its overlay. Raises ValueError for what cannot be named.
    """
    if layer.kind in (SourceKind.FILE, SourceKind.BLOCK):
        return layer.source
    if layer.kind is not SourceKind.NETWORK or layer.protocol != "rbd":
        msg = f"an image of type {layer.kind} {layer.protocol} cannot be named in an overlay"
        raise ValueError(msg)
    *place, image = layer.source.split("/")
    described: dict[str, object] = {"driver": "rbd", "pool": place[0] if place else "rbd", "image": image}
    if len(place) > 1:
        described["namespace"] = place[1]
    servers = [_server(h) for h in layer.hosts]
    if servers:
        described["server"] = servers
    return "json:" + json.dumps({"driver": layer.format or "raw", "file": described}, separators=(",", ":"))


def _server(host: str) -> dict[str, str]:
    name, colon, port = host.rpartition(":")
    if not colon or name.endswith(":") or (name.startswith("[") != name.endswith("]")):
        name, port = host, "6789"
    return {"host": name.strip("[]"), "port": port}
