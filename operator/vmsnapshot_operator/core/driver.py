"""The contract between the workflow and a storage driver. Not how drivers are found or hosted (`drivers`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, Volume, VolumeId

_REASON = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}")


def is_reason(text: str) -> bool:
    """Whether this can be a condition's reason, as a driver may give it: one CamelCase word."""
    return _REASON.fullmatch(text) is not None


class CutKind(StrEnum):
    """INSTANT may run under a freeze; COPY (copies in `wait_ready`) and REMOTE (as CSI) need an overlay.

    HYPERVISOR: the hypervisor itself copies what the disks held at the cut, into volumes that the driver has prepared. Its cut may
    run under a freeze. Of a VM that is off, the driver copies as for COPY.
    """

    INSTANT = "Instant"
    COPY = "Copy"
    REMOTE = "Remote"
    HYPERVISOR = "Hypervisor"

    @property
    def needs_overlay(self) -> bool:
        """Whether the cut takes longer than a guest should stand still."""
        return self in (CutKind.COPY, CutKind.REMOTE)


class Hold(StrEnum):
    """What a cut needs until it can be restored: nothing, a base that stays still, or the hypervisor's copy to come to its end.

    The guest runs in all cases. `wait_ready` is called after a JOB whose good end is proved, and never else.
    """

    NOTHING = "Nothing"
    BASE = "Base"
    JOB = "Job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a driver promises for its parameters; shown in the class's status.

    `incremental`: of a cut by the HYPERVISOR only what changed since an earlier one need be copied (the method `inherit`).
    `handle_format`: counted up by a driver whose handles get another meaning; it has to read those of all earlier formats.
    """

    cut: CutKind
    atomic: bool
    revert: bool
    revert_newest_only: bool = False
    clone: bool = False
    incremental: bool = False
    handle_format: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A yes or no with its reason (a stable CamelCase word), shown for every candidate, chosen or not."""

    ok: bool
    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a call is, in bytes. It may stand still or jump; that all is done, the call's return says alone."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """An idempotent order; `name` holds installation, object and attempt, so no older cut can answer it.

    `timeout` is what the caller gives the whole call, in seconds; the host of the driver enforces it.
    """

    name: str
    volumes: tuple[Volume, ...]
    timeout: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class CutResult:
    """What was cut; handles keyed by volume, never by position. `atomic`: all handles are of one instant."""

    handles: Mapping[VolumeId, Handle]
    atomic: bool
    hold: Hold = Hold.NOTHING
    group: Handle | None = None


@runtime_checkable
class StorageDriver(Protocol):
    """A storage system: plain blocking code in its own process, killed by its host at the deadline.

    An implementation is a class registered under the entry point group `vmsnapshot_operator.drivers`. It has the class
    attributes `Parameters` and `Credentials` (pydantic models of the class's parameters and of its Secret) and is made
    by calling it with one instance of each. Every method may raise `errors.DriverError`; any other exception is
    reported by its type and text as a failure of the driver. All methods may be called from several threads or
    processes at once for different names.

    What `prepare` opens for the cut may be kept; the cut usually comes to the same process, but not always, and must then
    look up again. A method `rest()`, if there is one, is called when the cut has been answered, and when none came for two
    minutes: whatever was kept open is closed there. A process is killed without notice: what a method made must be found
    by `list` and `delete` whenever that happens, by its name alone.

    A method `progress() -> Progress | None`, if there is one, is called each second by another thread of the process while
    `wait_ready`, `revert` or `clone` is at work there. It is asked in that process, since only who copies knows how far it
    is, and asked instead of told, so that a driver holds no channel and sets no pace. An answer is evidence that the
    storage still works on it, so it must be asked of the storage there and then, or be None: a call that says nothing for
    long is taken to hang, and its process is killed. A driver without it has to be done within that time.

    A driver whose cut is HYPERVISOR has a method `targets(request) -> Mapping[VolumeId, Layer]`, asked after `prepare`: the volumes
    made there, one for each disk and of its size, that the hypervisor is told to copy into: files whose names begin with that of the
    request, by which it is seen whose copy it is. The handle of each is the source of its layer. Its `cut` is called for a VM that is off only. It never learns of a domain. A volume of which `wait_ready` was not
    called is half a copy, which `missing` names.

    One that is `incremental` has a method `inherit(request, since: Mapping[VolumeId, Handle]) -> Mapping[VolumeId, Fit]`, asked between
    `prepare` and `targets`: fill the volume of each of these disks with what an earlier, finished cut of it holds, by sharing its blocks.
    The answer is `ok` only where the earlier cut is whole and nobody has written to it since, and the volume holds all of it
    and is its own: what happens to the earlier cut later does not concern it. Everywhere else the volume is as `prepare` made it,
    and the answer says why. Into one that is filled the hypervisor copies only what the disk was written since the earlier cut.

    The volumes of a clone have an owner at any time: until `keep` they are held under the clone's name, `list` names it and
    `delete` deletes them, half made or whole. From then on they are the VM's, and neither can find them any more. So a
    clone whose maker was killed is cleared away, and no disk of a VM is ever taken for such a leftover. Snapshots and
    clones have different names.
    """

    def capabilities(self) -> Capabilities:
        """Probe the storage system and say what it can; raises when it does not answer."""
        ...

    def can_handle(self, volumes: Sequence[Volume]) -> Fit:
        """Say whether all these volumes can be cut by this driver, and why not. Changes nothing."""
        ...

    def prepare(self, request: SnapshotRequest) -> None:
        """Do what is slow or may fail while the VM runs untouched; refuse a name already cut."""
        ...

    def cut(self, request: SnapshotRequest) -> CutResult:
        """Make one point in time of all volumes, or of none."""
        ...

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        """Return once it can be restored. Repeatable."""
        ...

    def check_revert(self, cut: CutResult, onto: Sequence[Volume]) -> Sequence[Fit]:
        """Only look: one answer per volume, in order.

        Reasons, where they apply: `OtherVolume`, `VolumeMissing`, `SizeChanged`, `InUse`, `LayersChanged` (beneath it),
        `SnapshotLost`, `SnapshotIncomplete`, and `NewerSnapshots` (in the way of `revert_newest_only`). A volume that a killed
        `revert` left missing or half done fits: `revert` repeated puts it right.
        """
        ...

    def revert(self, cut: CutResult, onto: Sequence[Volume]) -> None:
        """Set the volumes back to the cut. Repeatable: twice equals once, and a repeated one ends what a killed one began."""
        ...

    def clone(self, cut: CutResult, name: str) -> Mapping[VolumeId, Layer]:
        """Make new volumes from the cut, held under `name` until `keep`; the originals stay untouched.

        Repeatable: what is whole stays, what is half made is completed or made anew. Raises AlreadyCutError if volumes of
        that name were kept.
        """
        ...

    def keep(self, name: str) -> None:
        """Hand a clone's volumes over: `list` and `delete` do not find them any more. Repeatable; never touches a volume."""
        ...

    def delete(self, name: str) -> None:
        """Delete everything held under a name (of a request, or of a clone not kept), complete or not. Missing is success."""
        ...

    def list(self, prefix: str) -> Sequence[str]:
        """Name the requests and clones (not their members) whose names start so and of which anything is held."""
        ...

    def missing(self, cuts: Sequence[CutResult]) -> Sequence[Handle]:
        """Name those handles of these cuts, all of them ready, of which the storage does not hold everything (any more). Only look."""
        ...
