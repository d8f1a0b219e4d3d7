"""Volumes: what a storage driver learns of a disk. Not how disks are found in a domain (`hypervisors`) or grouped (`plan`)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NewType

VolumeId = NewType("VolumeId", str)
"""Hash of the writable layer's identity: after a hotplug the target "vdb" may be another disk, its id is another too."""

Handle = NewType("Handle", str)
"""The storage system's own name of one cut volume."""

NVRAM = "nvram"
"""Label of the volume that holds the variables of a VM's firmware: libvirt takes it for no disk's target."""

Seconds = NewType("Seconds", float)
"""A duration, or a reading of this process's own monotonic clock; such a reading is never sent to another process."""


class Consistency(IntEnum):
    """How consistent a volume's content is; ordered, so that a snapshot is the `min()` of its volumes."""

    UNKNOWN = 0
    PER_VOLUME = 1
    CRASH = 2
    FILESYSTEM = 3
    APPLICATION = 4  # reserved: the guest agent gives no evidence for it

    @property
    def word(self) -> str:
        """The spelling used on the API."""
        return {0: "Unknown", 1: "PerVolume", 2: "Crash", 3: "Filesystem", 4: "Application"}[int(self)]

    @classmethod
    def from_word(cls, word: str) -> Consistency:
        """Inverse of `word`; raises ValueError for another word."""
        for each in cls:
            if each.word == word:
                return each
        msg = f"not a consistency: {word!r}"
        raise ValueError(msg)


class SourceKind(StrEnum):
    """How a layer is addressed: libvirt's own words for a disk's type."""

    FILE = "file"
    BLOCK = "block"
    NETWORK = "network"
    VOLUME = "volume"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One image of a backing chain, with a fingerprint that betrays a later change.

    `source` is a path for files and block devices, `pool/image` (or `pool/namespace/image`) for RBD, `pool/volume`
    for a libvirt volume. `pool` is the libvirt pool that holds a file, or the storage pool named by the source; empty
    if none is known. `hosts` are the storage addresses written in the domain, as `host:port`.
    """

    kind: SourceKind
    source: str
    format: str
    protocol: str = ""
    pool: str = ""
    hosts: tuple[str, ...] = ()
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """All a driver learns of a disk: its writable layer and the read-only layers beneath, outermost first."""

    id: VolumeId
    label: str
    writable: Layer
    backing: tuple[Layer, ...] = ()
    size_bytes: int

    @property
    def is_nvram(self) -> bool:
        """Whether it is no disk but the variables of the VM's firmware: nothing freezes it, and no overlay is put over it."""
        return self.label == NVRAM


def volume_id(writable: Layer) -> VolumeId:
    """Return the id of the volume whose writable layer this is: the same layer, whatever target it is plugged at."""
    identity = "\0".join((writable.kind, writable.protocol, ",".join(sorted(writable.hosts)), writable.source))
    return VolumeId(hashlib.sha256(identity.encode()).hexdigest()[:16])
