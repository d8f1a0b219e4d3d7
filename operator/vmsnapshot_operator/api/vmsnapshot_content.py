"""VMSnapshotContent: what is really held, with all that restoring and deleting need. Not what is told to users (`vmsnapshot`).

Written by the operator alone, in two stages: as an intent before the first cut of an attempt (groups with the names that
will be given to the storage systems, no handles), then completed with handles and evidence. Everything that is needed
without the VMSnapshot and without the classes stands in `spec`, so that one write stores it and a backup holds it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.conditions import Conditional, Reasoned
from vmsnapshot_operator.api.model import (
    AGE,
    LIST_MAP_KEYS,
    LIST_TYPE,
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
    Path,
    Time,
    Trimmed,
    Word,
    rule,
    rules,
)
from vmsnapshot_operator.api.storage_driver_class import DriverName, Parameters
from vmsnapshot_operator.api.vmsnapshot import DeletionPolicy
from vmsnapshot_operator.core.driver import CutKind, Hold
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.names import MAX_ATTEMPT
from vmsnapshot_operator.core.volumes import SourceKind

Reading = Annotated[int, Field(ge=0, le=86_400_000)]
"""A reading of the clock of one window, in milliseconds since the first reading of that window."""


class SnapshotRef(Model):
    """The VMSnapshot that this content belongs to; another object of the same name has another UID."""

    namespace: ObjectName
    """Its namespace."""
    name: ObjectName
    """Its name."""
    uid: Annotated[str, Field(min_length=1, max_length=63)]
    """Its UID."""


class ContentSource(Model):
    """The VM, pinned by its UUID."""

    hypervisor_name: ObjectName
    """Name of the Hypervisor object."""
    domain_name: Trimmed
    """Name of the domain when it was planned."""
    domain_uuid: Annotated[str, Field(alias="domainUUID", min_length=1, max_length=63)]
    """UUID of the domain."""
    endpoint: Name = ""
    """The endpoint on which it was found."""
    run_id: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    """libvirt's number of that run; -1 if it was shut off."""
    power_state: PowerState
    """Its power state when it was planned."""


class ContentStrategy(Model):
    """Who took the snapshot."""

    name: Word
    """Name of the strategy."""
    reason: Message = ""
    """Why this one."""


class ContentQuiesce(Model):
    """How the VM was to be made to stand still."""

    method: Word
    """The chosen method."""
    reason: Message = ""
    """Why this one."""
    budget_seconds: Annotated[int, Field(ge=0, le=600)]
    """So long it could stand still at most."""
    mountpoints: Annotated[tuple[Path, ...], Field(max_length=64, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """Only these file systems were to be frozen; empty: all."""
    expected_filesystems: Count
    """So many file systems the agent had to freeze."""
    holds_vm: bool = Field(alias="holdsVM")
    """Whether the method makes the VM stand still at all."""
    overlay_pool_name: Trimmed | None = None
    """The libvirt storage pool of the overlays, if the VM was to be switched to some."""
    collapsed: bool = False
    """Whether the VM is known to be on its own disks again."""


class ContentCapabilities(Model):
    """What the driver promised."""

    cut: CutKind
    """How it cuts."""
    atomic: bool
    """Whether the cut of several disks is of one instant."""
    revert: bool
    """Whether disks can be set back in place."""
    revert_newest_only: bool
    """Whether only the newest snapshot can be set back to."""
    clone: bool
    """Whether new disks can be made from a snapshot."""
    incremental: bool = False
    """Whether of a copy by the hypervisor only what changed since the last one need be copied."""
    handle_format: Annotated[int, Field(ge=1, le=1000)] = 1
    """Of which format the driver's handles are: an older driver may not read them."""


class ContentGroup(Model):
    """The disks that one class served, with everything needed to reach them after the class is gone."""

    class_name: ObjectName
    """Name of the StorageDriverClass."""
    driver: DriverName
    """Its driver."""
    parameters: Parameters = Field(default_factory=dict)
    """The class's parameters as they were."""
    secret_name: ObjectName | None = None
    """The Secret in the operator's namespace that the class named."""
    capabilities: ContentCapabilities
    """What the driver promised."""
    request_name: Annotated[
        str, Field(max_length=40, pattern=r"^vms-[a-z0-9]{6}-[a-z2-7]{10}-[0-9a-z]{2}-[a-z2-7]{6}$")
    ]
    """The name under which the storage system holds the cut: known before it was made."""
    atomic: bool | None = None
    """Whether all disks of the group are of one instant; absent until it was cut."""
    hold: Hold | None = None
    """What the cut needed until it was ready; absent until it was cut."""
    group_handle: Path | None = None
    """The storage system's own name of the whole cut, if it has one."""
    cut_milliseconds: Milliseconds | None = None
    """How long the cut took."""
    cut_start_milliseconds: Reading | None = None
    """Not before this reading the cut happened."""
    cut_end_milliseconds: Reading | None = None
    """Not after this reading the cut happened."""
    reason: Annotated[str, Field(max_length=255)] = ""
    """Why it was not cut, in one word; empty if it was."""
    message: Message = ""
    """Why it was not cut, in a sentence; empty if it was."""


class ContentLayer(Model):
    """One image of a disk's chain, with a fingerprint that betrays a later change."""

    kind: SourceKind
    """How it is addressed."""
    source: Path
    """Path, or pool and image."""
    format: Word
    """Image format."""
    protocol: Word = ""
    """For network sources: the protocol."""
    pool: Name = ""
    """The pool that holds it, if it is known."""
    hosts: Annotated[tuple[Name, ...], Field(max_length=32, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """Storage addresses written in the domain."""
    fingerprint: Name = ""
    """What betrays a later change."""


class ContentVolume(Model):
    """One disk."""

    target: Name
    """The disk, as the VM names it."""
    id: Annotated[str, Field(min_length=1, max_length=63)]
    """Who it is, whatever target it is plugged at."""
    class_name: ObjectName
    """The group that it belongs to."""
    reason: Message = ""
    """Why this class."""
    size_bytes: Bytes
    """Its size, as the VM sees it."""
    writable: ContentLayer
    """The layer that the VM wrote to: this is what was cut."""
    backing: Annotated[tuple[ContentLayer, ...], Field(max_length=64, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """The layers beneath, outermost first: a restore verifies them."""
    unsafe: bool
    """Whether its cache ignored flushes."""
    covered: bool
    """Whether all of its file systems were to be frozen."""
    handle: Path | None = None
    """The storage system's own name of the cut; absent until it was cut."""
    consistency: ConsistencyWord | None = None
    """What is claimed of it."""
    consistency_reason: Message | None = None
    """From what this follows."""


class ContentExcluded(Model):
    """A disk or device that is not in it."""

    name: Name
    """The disk's target, or the device."""
    rule: Word
    """By which rule."""
    message: Message = ""
    """Why."""


class ContentEvidence(Model):
    """What was seen of the window in which the cuts happened.

    Readings are milliseconds since the first reading of the window. They are rounded so that nothing looks better than it
    was: the VM stood still from a rounded up to a rounded down reading, cuts lie between a rounded down and a rounded up one.
    """

    method: Word
    """How the VM was made to stand still."""
    still_from_milliseconds: Reading | None = None
    """Reading when the VM had answered that it stands still; absent if it never did."""
    still_until_milliseconds: Reading | None = None
    """Reading when it was asked to go on."""
    frozen_time: Time | None = None
    """When the VM was asked to stand still."""
    thawed_time: Time | None = None
    """When it was confirmed to go on."""
    frozen_milliseconds: Milliseconds
    """How long it stood still, at most."""
    covered_volumes: Annotated[tuple[Name, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Ids of the volumes of which every file system was frozen by us."""
    unwritten_volumes: Annotated[tuple[Name, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Ids of the volumes of which their storage says that nobody wrote to them from the plan until after the window."""
    filesystems_frozen: Count
    """How many file systems the agent said that it froze."""
    filesystems_thawed: Count
    """How many it said that our thaw thawed."""
    freed_by_other: bool
    """Whether somebody else freed the VM before we did."""
    same_vm: bool = Field(alias="sameVM")
    """Whether run, host and disks were the same before and after."""
    shut_down_from_within: bool
    """For a VM that was off: whether it is known to have been shut down by its own system."""
    notes: Annotated[tuple[Message, ...], Field(max_length=32, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """What else was noticed."""


class ContentOutcome(Model):
    """How the window ended."""

    cut_time: Time | None = None
    """The point in time of the snapshot; absent if nothing was cut."""
    free: bool
    """Whether the VM was confirmed to go on."""
    interrupted: bool
    """Whether it came to nothing for a reason that another attempt may overcome."""
    fallback: bool
    """Whether another way to make the VM stand still may do."""
    reason: Annotated[str, Field(max_length=255)] = ""
    """Why it came to nothing, in one word; empty if it did not."""
    message: Message = ""
    """Why it came to nothing, in a sentence; empty if it did not."""


class VMSnapshotContentSpec(Model):
    """What is held, and everything needed to restore or delete it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.vmSnapshotRef == oldSelf.vmSnapshotRef",
                "vmSnapshotRef is immutable: a content belongs to one VMSnapshot for ever",
                path=".vmSnapshotRef",
            ),
            rule(
                "self.installation == oldSelf.installation",
                "installation is immutable: the storage systems know the names of the one that wrote it",
                path=".installation",
            ),
            rule(
                "self.attempt >= oldSelf.attempt",
                "attempt never goes back: the cut of an earlier attempt must not be adopted",
                path=".attempt",
            ),
            rule(
                "self.volumes.all(v, self.groups.exists(g, g.className == v.className))",
                "each volume must belong to one of groups (by className)",
                path=".volumes",
            ),
            rule(
                "!has(self.consistency) || (has(self.evidence) && has(self.outcome) && has(self.outcome.cutTime) && self.volumes.all(v, has(v.handle) && has(v.consistency)))",
                "a consistency can only be claimed with evidence, a time of the cut, and a handle and consistency of each volume",
                path=".consistency",
            ),
            rule(
                "!has(self.readyTime) || has(self.consistency)",
                "only what was cut can be ready: readyTime needs consistency",
                path=".readyTime",
            ),
            rule(
                "has(self.evidence) == has(self.outcome)",
                "evidence and outcome are of one window: give both or none",
                path=".outcome",
            ),
        )
    )

    vm_snapshot_ref: SnapshotRef
    """The VMSnapshot that this content belongs to."""
    installation: Annotated[str, Field(pattern=r"^[a-z0-9]{6}$", max_length=6)]
    """The installation of the operator whose names the storage systems hold."""
    attempt: Annotated[int, Field(ge=1, le=MAX_ATTEMPT)]
    """Which attempt this is; each has names of its own."""
    deletion_policy: DeletionPolicy
    """What happens to the data when the VMSnapshot is deleted."""
    source: ContentSource
    """The VM."""
    strategy: ContentStrategy
    """Who took the snapshot."""
    quiesce: ContentQuiesce
    """How the VM was to be made to stand still."""
    groups: Annotated[
        tuple[ContentGroup, ...],
        Field(min_length=1, max_length=64, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["className"]}),
    ]
    """The disks by class: who cut them, with which parameters, under which name."""
    volumes: Annotated[
        tuple[ContentVolume, ...],
        Field(min_length=1, max_length=256, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["target"]}),
    ]
    """The disks, with their layers and handles."""
    excluded: Annotated[
        tuple[ContentExcluded, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "atomic"})
    ] = ()
    """What is not in it, and by which rule."""
    notes: Annotated[tuple[Message, ...], Field(max_length=64, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """What else the plan said."""
    domain_xml: Annotated[str, Field(alias="domainXML", max_length=262_144)] = ""
    """The domain's definition without secrets."""
    evidence: ContentEvidence | None = None
    """What was seen of the window; absent until there was one."""
    outcome: ContentOutcome | None = None
    """How the window ended; absent until there was one."""
    consistency: ConsistencyWord | None = None
    """What is claimed of the whole: the least of all volumes; absent until it was cut."""
    ready_time: Time | None = None
    """When it could be restored; absent until then."""
    failure: Reasoned | None = None
    """Why there will be no snapshot, for good."""


class VMSnapshotContentStatus(Conditional):
    """What is told of it."""

    ready: bool | None = None
    """Whether it can be restored."""


class VMSnapshotContent(Object):
    """What a VMSnapshot really holds on storage systems. Written by the operator alone."""

    spec: VMSnapshotContentSpec
    """What is held, and everything needed to restore or delete it."""
    status: VMSnapshotContentStatus = VMSnapshotContentStatus()
    """What is told of it."""


KIND = Kind(
    model=VMSnapshotContent,
    name="VMSnapshotContent",
    plural="vmsnapshotcontents",
    short_names=("vmsnapcontent",),
    namespaced=False,
    columns=(
        Column(name="Namespace", type="string", path=".spec.vmSnapshotRef.namespace", description="Of its VMSnapshot."),
        Column(name="VMSnapshot", type="string", path=".spec.vmSnapshotRef.name", description="Its VMSnapshot."),
        Column(name="Domain", type="string", path=".spec.source.domainName", description="The VM."),
        Column(name="Consistency", type="string", path=".spec.consistency", description="What is claimed of it."),
        Column(name="Taken", type="date", path=".spec.outcome.cutTime", description="Since its point in time."),
        AGE,
        Column(name="Policy", type="string", path=".spec.deletionPolicy", description="Deletion policy.", wide=True),
        Column(name="Attempt", type="integer", path=".spec.attempt", description="Which attempt.", wide=True),
        Column(
            name="ReadyTime", type="string", path=".spec.readyTime", description="When it could be restored.", wide=True
        ),
    ),
)
