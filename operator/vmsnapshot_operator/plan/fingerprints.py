"""Whether images were written to since they were looked at, as far as their storage can tell. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vmsnapshot_operator.core.machine import Disk
from vmsnapshot_operator.core.planning import PlannedVolume
from vmsnapshot_operator.core.volumes import Layer, VolumeId, volume_id


def changed(then: Sequence[Layer], now: Sequence[Layer]) -> list[str]:
    """Return the sources of those images of one chain whose fingerprint is another one now; both have as many layers."""
    pairs = zip(then, now, strict=True)
    return [n.source for t, n in pairs if t.fingerprint and n.fingerprint and not _same(t.fingerprint, n.fingerprint)]


def missing(volumes: Sequence[PlannedVolume], disks: Sequence[Disk]) -> list[str]:
    """Return the targets of disks that are the VM's no more, at whatever target: whoever has them now may write to them."""
    now = _now(disks)
    return [v.target for v in volumes if v.volume.id not in now]


def written_to(volumes: Sequence[PlannedVolume], disks: Sequence[Disk]) -> list[str]:
    """Return the targets of disks, of a VM that is off now and was when it was planned, that were written to since.

    Not of those that are `missing`, nor of those that are `unseen`.
    """
    now = _now(disks)
    pairs = [(v, now.get(v.volume.id)) for v in volumes]
    return [v.target for v, layer in pairs if layer is not None and changed([v.volume.writable], [layer])]


def unwritten(volumes: Sequence[PlannedVolume], disks: Sequence[Disk]) -> frozenset[VolumeId]:
    """Return the volumes of which their storage says that nobody has written to them since they were planned."""
    now = {v: layer.fingerprint for v, layer in _now(disks).items()}
    then = {v.volume.id: v.volume.writable.fingerprint for v in volumes}
    return frozenset(v for v, fingerprint in then.items() if fingerprint and _same(now.get(v, ""), fingerprint))


def unseen(volumes: Sequence[PlannedVolume], disks: Sequence[Disk]) -> list[str]:
    """Return the targets of disks whose storage said when it was planned what betrays a write, and does not say it now."""
    now = _now(disks)
    pairs = [(v, now.get(v.volume.id)) for v in volumes]
    return [
        v.target for v, layer in pairs if layer is not None and v.volume.writable.fingerprint and not layer.fingerprint
    ]


def _same(one: str, other: str) -> bool:
    """Whether both tell the same time of the last write, which stands behind their slash.

    The allocation before it changes by itself: a file system gives back what it had set aside for a file that has just been closed,
    and XFS, some minutes later, what it had set aside for writes to blocks that are shared.
    """
    return one.rpartition("/")[2] == other.rpartition("/")[2]


def _now(disks: Sequence[Disk]) -> Mapping[VolumeId, Layer]:
    return {volume_id(d.layers[0]): d.layers[0] for d in disks if d.layers}
