"""Which earlier copy of a disk its next one may begin with, and which checkpoints nobody needs any more. Pure.

A copy may begin with an earlier one only if everything that differs between the two is known to be in the disk's bitmap. So
an earlier copy is a candidate only if it is on record as restorable, and of the very same disk upon the very same images.
Whether its bitmap is unbroken the hypervisor says, and whether the copy itself is whole the driver. Any doubt: all is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, Hold
from vmsnapshot_operator.core.effects import Record, RecordedGroup
from vmsnapshot_operator.core.planning import PlannedGroup
from vmsnapshot_operator.core.volumes import Handle, Volume, VolumeId
from vmsnapshot_operator.plan.orphans import Kept

FORMAT = "qcow2"
"""The one format whose files keep a bitmap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The copy of a disk that its next one may begin with. `checkpoint`: since when the disk's writes are remembered."""

    handle: Handle
    checkpoint: str
    time: datetime


def is_able(capabilities: Capabilities) -> bool:
    """Whether of what a class's disks hold only what changed need be copied."""
    return capabilities.incremental and capabilities.cut is CutKind.HYPERVISOR


def remembers(volume: Volume) -> bool:
    """Whether a disk can remember what is written to it."""
    return volume.writable.format == FORMAT


def choose(
    group: PlannedGroup, attempt: int, records: Iterable[Record]
) -> tuple[Mapping[VolumeId, Earlier], Mapping[VolumeId, str]]:
    """Return, by disk, the copy to begin with, or why there is none. `records`: of all snapshots of this VM, in any order."""
    found: dict[VolumeId, Earlier] = {}
    why: dict[VolumeId, str] = {}
    newest = _newest_first(records)
    for volume in group.volumes:
        answer = _choose(group, volume, attempt, newest)
        if isinstance(answer, Earlier):
            found[volume.id] = answer
        else:
            why[volume.id] = answer
    return found, why


def _choose(
    group: PlannedGroup, volume: Volume, attempt: int, newest: Sequence[tuple[datetime, Record]]
) -> Earlier | str:
    if not remembers(volume):
        return f"{volume.writable.format or 'its format'} keeps no bitmap of what was written"
    if attempt > 1:
        return f"it is attempt {attempt}"
    for time, record in newest:
        kept = record.groups.get(group.class_name)
        if kept is None or not _same_class(group, kept):
            continue
        then = next((v for v in kept.request.volumes if v.id == volume.id), None)
        if (
            then is None
            or kept.result is None
            or kept.result.hold is not Hold.JOB
            or then.id not in kept.result.handles
        ):
            continue
        if difference := _difference(then, volume):
            return difference
        checkpoint = names.checkpoint_name(kept.request.name, volume.id)
        return Earlier(handle=kept.result.handles[volume.id], checkpoint=checkpoint, time=time)
    return "there is no earlier copy of it by this class"


def _same_class(group: PlannedGroup, kept: RecordedGroup) -> bool:
    return kept.driver == group.driver and dict(kept.parameters) == dict(group.parameters)


def _difference(then: Volume, now: Volume) -> str:
    """Why what changed cannot be told by the bitmap of the writable layer alone, or nothing."""
    if then.writable.format != now.writable.format or then.size_bytes != now.size_bytes:
        return "it has another format or size than at its last copy"
    if then.backing != now.backing:
        return "the images beneath it are not as they were at its last copy"
    if blind := [b.source for b in now.backing if not b.fingerprint]:
        return f"nobody can say whether {blind[0]} beneath it was written to since its last copy"
    return ""


def _newest_first(records: Iterable[Record]) -> Sequence[tuple[datetime, Record]]:
    restorable = [
        (r.outcome.cut_time, r) for r in records if r.ready and r.taken and not r.problem and r.outcome is not None
    ]
    return sorted(((t, r) for t, r in restorable if t is not None), key=lambda p: (p[0], p[1].name), reverse=True)


def of_record(record: Record, requests: Mapping[str, Collection[str]] | None = None) -> Mapping[str, str]:
    """Return the checkpoints that a snapshot may have made, with the targets of their disks.

    `requests`: by class, those under whose names it may have; None: that on record.
    """
    able = {g.class_name for g in record.plan.groups if is_able(g.capabilities)}
    return {
        names.checkpoint_name(request, volume.id): volume.label
        for class_name, group in record.groups.items()
        if class_name in able
        for request in ((group.request.name,) if requests is None else requests.get(class_name, ()))
        for volume in group.request.volumes
        if remembers(volume)
    }


def superseded(record: Record, records: Iterable[Record]) -> Sequence[Mapping[str, str]]:
    """Return the checkpoints of snapshots of this VM that are older than one that is whole, by snapshot, the newest first."""
    mine = record.outcome.cut_time if record.outcome is not None else None
    classes = {c for c, g in record.groups.items() if g.result is not None and g.result.hold is Hold.JOB}
    if mine is None:
        return ()
    older = [r for t, r in _newest_first(records) if t < mine and r.name != record.name and classes & r.groups.keys()]
    return [found for r in older if (found := of_record(r))]


def left(
    installation: str, listed: Iterable[str], contents: Sequence[Kept], snapshots: Collection[str]
) -> frozenset[str]:
    """Return the checkpoints that no snapshot needs: a checkpoint holds no data, so that to remove it costs one whole copy at most.

    `contents` and `snapshots` (UIDs) are those that exist after the checkpoints were listed.
    """
    return frozenset(n for n in listed if _is_left(installation, n, contents, snapshots))


def _is_left(installation: str, name: str, contents: Sequence[Kept], snapshots: Collection[str]) -> bool:
    request = names.request_of(name)
    if request is None or not names.is_ours(request, installation):
        return False

    def is_of(uid: str) -> bool:
        return request.startswith(names.object_prefix(installation, uid))

    kept = next((k for k in contents if is_of(k.uid)), None)
    if kept is None:
        return not any(map(is_of, snapshots))
    return not kept.problem and request not in kept.names and (names.attempt_of(request) or 0) < kept.attempt
