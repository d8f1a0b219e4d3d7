"""VMSnapshot: what a user asks for, and what is told of it. Not what is really held (`vmsnapshot_content`)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.conditions import Conditional, Reasoned
from vmsnapshot_operator.api.model import (
    AGE,
    LIST_MAP_KEYS,
    LIST_TYPE,
    PATTERN_MESSAGE,
    Bytes,
    Column,
    ConsistencyWord,
    Count,
    Kind,
    Message,
    Milliseconds,
    Model,
    Name,
    Object,
    ObjectName,
    PluginName,
    Report,
    Time,
    Trimmed,
    Word,
    message_column,
    ready_column,
    rule,
    rules,
)
from vmsnapshot_operator.core.planning import Policy


class DeletionPolicy(StrEnum):
    """What happens to the snapshot's data when the VMSnapshot is deleted."""

    DELETE = "Delete"
    RETAIN = "Retain"


DomainName = Annotated[
    str,
    Field(
        max_length=255,
        pattern=r"^[^\s/\x00-\x1f]([^/\x00-\x1f]*[^\s/\x00-\x1f])?$",
        json_schema_extra={
            PATTERN_MESSAGE: "must be the VM's name or UUID as libvirt knows it: not empty, without a space at either end, without '/'"
        },
    ),
]


class Source(Model):
    """Which VM."""

    hypervisor_name: ObjectName
    """Name of the Hypervisor object where the VM lives."""
    domain: DomainName
    """The VM: its name or its UUID, as libvirt knows it."""


Mountpoint = Annotated[
    str,
    Field(
        max_length=1024,
        pattern=r"^(/|[A-Za-z]:[\\/])[^\x00-\x1f]*$",
        json_schema_extra={PATTERN_MESSAGE: "must be an absolute path in the guest, as /data or C:\\"},
    ),
]


class Quiesce(Model):
    """Whether and how the VM is made to stand still for the moment of the snapshot."""

    policy: Policy = Policy.PREFER
    """Require: no snapshot unless file systems were frozen (or the VM was shut down cleanly). Prefer: falls back to less and says so. Never: nothing is sent to the VM."""
    method: PluginName = "Auto"
    """Auto chooses by what the VM and the storage can. GuestAgent freezes the file systems through the guest's agent. HypervisorSnapshot lets the VM write to overlays meanwhile. Pause stops the VM for the moment. Plug-ins may add others."""
    max_frozen_seconds: Annotated[int, Field(ge=1, le=600)] | None = None
    """Hard limit: so long may the VM stand still, then it is freed whatever comes of the snapshot. Without it 30, for Windows guests 8."""
    mountpoints: Annotated[tuple[Mountpoint, ...], Field(max_length=64, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Freeze only the file systems mounted at these paths in the guest. Disks that are not covered do not claim Filesystem. Empty: all."""


class Volumes(Model):
    """Which of the VM's disks."""

    exclude: Annotated[tuple[Trimmed, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Targets of disks (as vdb), or names of other devices (as nvram, the variables of the firmware), that are left out on purpose. Whatever else bears state and cannot be snapshotted fails the plan."""


def _immutable(field: str) -> dict[str, str]:
    message = f"{field} is immutable: create a VMSnapshot of another name instead"
    return rule(f"self.{field} == oldSelf.{field}", message, path=f".{field}")


_IMMUTABLE = tuple(
    _immutable(field)
    for field in ("source", "quiesce", "strategyName", "volumes", "deadlineSeconds", "readyDeadlineSeconds", "dryRun")
)

# They stand at the parent of `quiesce`: the API server holds a default, here {}, against the rules of its own place before
# the defaults within have come true.
_QUIESCE_RULES = (
    rule(
        "self.quiesce.method != 'None'",
        "to leave the VM alone use policy Never, and leave method out",
        path=".quiesce.method",
    ),
    rule(
        "self.quiesce.policy != 'Never' || self.quiesce.method == 'Auto'",
        "policy Never sends nothing to the VM: leave method out, or use policy Prefer or Require",
        path=".quiesce.method",
    ),
    rule(
        "self.quiesce.policy != 'Require' || self.quiesce.method != 'Pause'",
        "method Pause is crash-consistent at best, which policy Require does not accept: use policy Prefer, or method Auto"
        " or GuestAgent",
        path=".quiesce.method",
    ),
    rule(
        "self.quiesce.policy != 'Never' || !has(self.quiesce.maxFrozenSeconds)",
        "policy Never freezes nothing: leave maxFrozenSeconds out, or use policy Prefer or Require",
        path=".quiesce.maxFrozenSeconds",
    ),
    rule(
        "self.quiesce.policy != 'Never' || !has(self.quiesce.mountpoints) || self.quiesce.mountpoints.size() == 0",
        "policy Never freezes nothing: leave mountpoints out, or use policy Prefer or Require",
        path=".quiesce.mountpoints",
    ),
    rule(
        "self.quiesce.method != 'Pause' || !has(self.quiesce.mountpoints) || self.quiesce.mountpoints.size() == 0",
        "method Pause stops the whole VM and freezes no file system: leave mountpoints out, or use method Auto or GuestAgent",
        path=".quiesce.mountpoints",
    ),
    rule(
        "!has(self.quiesce.maxFrozenSeconds) || self.quiesce.maxFrozenSeconds <= self.deadlineSeconds",
        "quiesce.maxFrozenSeconds must not be greater than deadlineSeconds: the snapshot would be given up first",
        path=".quiesce.maxFrozenSeconds",
    ),
)


class VMSnapshotSpec(Model):
    """What is asked for. Only deletionPolicy and ttlSeconds can be changed afterwards."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *_IMMUTABLE,
            *_QUIESCE_RULES,
            rule(
                "self.deadlineSeconds <= self.readyDeadlineSeconds",
                "deadlineSeconds must not be greater than readyDeadlineSeconds: a snapshot is taken before it is ready",
                path=".deadlineSeconds",
            ),
        )
    )

    source: Source
    """Which VM."""
    quiesce: Quiesce = Quiesce()
    """Whether and how the VM is made to stand still for the moment of the snapshot."""
    strategy_name: PluginName = "Auto"
    """Who takes the snapshot. Auto chooses; Storage lets each disk's storage system cut its disks. Plug-ins may add others."""
    volumes: Volumes = Volumes()
    """Which of the VM's disks; all that bear state, if nothing is said."""
    deadline_seconds: Annotated[int, Field(ge=1, le=86_400)] = 600
    """So long after its creation the point in time must exist; else the VMSnapshot fails."""
    ready_deadline_seconds: Annotated[int, Field(ge=1, le=2_592_000)] = 86_400
    """So long after its creation it must be possible to restore it; else the VMSnapshot fails."""
    deletion_policy: DeletionPolicy = DeletionPolicy.DELETE
    """What happens to the data when the VMSnapshot is deleted. Delete: it is deleted too. Retain: it stays on the storage, and its VMSnapshotContent stays too."""
    ttl_seconds: Annotated[int, Field(ge=1, le=315_360_000)] | None = None
    """So long after it was taken the VMSnapshot is deleted. Without it, never. Beware where a GitOps tool would create it anew."""
    dry_run: bool = False
    """Plan and report only: nothing is changed anywhere. Such a VMSnapshot becomes Planned and never Ready."""


class VM(Report):
    """The VM as it was found when planning."""

    name: Name = ""
    """Name of the domain."""
    uuid: Word = ""
    """UUID of the domain: from here on the VM is known by it."""
    power_state: Word = ""
    """Running, Paused, ShutOff, Crashed, Suspended or Unknown."""


class StrategyChoice(Report):
    """Who takes the snapshot, and why."""

    name: Word = ""
    """Name of the strategy."""
    reason: Message = ""
    """Why this one."""


class QuiesceReport(Report):
    """How the VM was made to stand still, and for how long."""

    method: Word = ""
    """The chosen method; None if nothing had to be held, or nothing was to be."""
    reason: Message = ""
    """Why this one."""
    budget_seconds: Count | None = None
    """So long the VM may stand still."""
    attempts: Count | None = None
    """How many times it was tried."""
    frozen_time: Time | None = None
    """When we asked the VM to stand still."""
    thawed_time: Time | None = None
    """When it was confirmed to go on."""
    frozen_milliseconds: Milliseconds | None = None
    """How long it stood still, at most."""
    filesystems_frozen: Count | None = None
    """How many file systems the guest's agent said that it froze."""
    filesystems_thawed: Count | None = None
    """How many it said that our thaw thawed. Fewer than were frozen: somebody freed them early, and nothing is claimed."""


class VolumeReport(Report):
    """One disk."""

    target: Name
    """The disk, as the VM names it."""
    class_name: Name = ""
    """The StorageDriverClass that serves it."""
    reason: Message = ""
    """Why this class, and why not the others."""
    size_bytes: Bytes | None = None
    """Its size, as the VM sees it."""
    consistency: ConsistencyWord | None = None
    """What is claimed of it."""
    consistency_reason: Message | None = None
    """From what this follows, and why not more."""


class GroupReport(Report):
    """The disks that one class serves: cut by one call."""

    class_name: Name
    """The StorageDriverClass."""
    driver: Name = ""
    """Its driver."""
    volumes: Count | None = None
    """How many disks."""
    atomic: bool | None = None
    """Whether all of them are of one instant by the storage system's own word."""
    cut_milliseconds: Milliseconds | None = None
    """How long the cut took."""
    ready_time: Time | None = None
    """When it could be restored."""
    copied_bytes: Bytes | None = None
    """Where it has to be copied: how much of it is. It may stand still or jump."""
    bytes_to_copy: Bytes | None = None
    """Where it has to be copied: how much there is."""
    message: Message = ""
    """Of which disks only what changed was copied, and why all of the others, where the class could do either."""


class Excluded(Report):
    """A disk or device that is not in the snapshot."""

    name: Name
    """The disk's target, or the device."""
    rule: Word = ""
    """By which rule: ByRequest (it was asked for), RemovableMedia, ReadOnly, NVRAM or TPM."""
    message: Message = ""
    """Why."""


class Leftover(Report):
    """Something that a storage system still holds although it should not, or a system that cannot be asked."""

    class_name: Name
    """The StorageDriverClass that it was cut by."""
    name: Name = ""
    """The name under which it is held; empty if the storage cannot be asked."""
    message: Message = ""
    """Why it is still there."""


class VMSnapshotStatus(Conditional):
    """What was done, and what may be claimed of it."""

    phase: Word | None = None
    """One word for people, derived from the conditions. Programs read the conditions."""
    content_name: Name | None = None
    """The VMSnapshotContent that holds what was snapshotted."""
    consistency: ConsistencyWord | None = None
    """What is claimed of the whole: the least of all volumes. Filesystem: all file systems were frozen at one instant. Crash: one instant, as after a power cut. PerVolume: each disk is whole, but they are of different moments. Unknown: the evidence is missing."""
    vm: VM | None = None
    """The VM as it was found when planning."""
    strategy: StrategyChoice | None = None
    """Who takes the snapshot, and why."""
    quiesce: QuiesceReport | None = None
    """How the VM was made to stand still, and for how long."""
    volumes: Annotated[
        tuple[VolumeReport, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["target"]})
    ] = ()
    """The disks, each with its class and what is claimed of it."""
    groups: Annotated[
        tuple[GroupReport, ...],
        Field(max_length=64, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["className"]}),
    ] = ()
    """The disks by class."""
    excluded: Annotated[tuple[Excluded, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """What is not in the snapshot, and by which rule."""
    leftovers: Annotated[tuple[Leftover, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """What is still to be removed from storage systems."""
    creation_time: Time | None = None
    """The point in time that the snapshot is of."""
    error: Reasoned | None = None
    """Why it failed."""


class VMSnapshot(Object):
    """One consistent snapshot of one virtual machine over all storage systems that its disks lie on."""

    spec: VMSnapshotSpec
    """What is asked for. Only deletionPolicy and ttlSeconds can be changed afterwards."""
    status: VMSnapshotStatus = VMSnapshotStatus()
    """What was done, and what may be claimed of it."""


KIND = Kind(
    model=VMSnapshot,
    name="VMSnapshot",
    plural="vmsnapshots",
    short_names=("vmsnap",),
    namespaced=True,
    columns=(
        Column(name="Domain", type="string", path=".spec.source.domain", description="The VM."),
        Column(name="Phase", type="string", path=".status.phase", description="Where it stands."),
        Column(name="Consistency", type="string", path=".status.consistency", description="What is claimed of it."),
        Column(
            name="Frozen-ms",
            type="integer",
            path=".status.quiesce.frozenMilliseconds",
            description="How long the VM stood still, in milliseconds.",
        ),
        ready_column(),
        AGE,
        Column(
            name="Method", type="string", path=".status.quiesce.method", description="How the VM was held.", wide=True
        ),
        Column(
            name="Content",
            type="string",
            path=".status.contentName",
            description="The VMSnapshotContent that holds it.",
            wide=True,
        ),
        message_column(),
    ),
)
