"""StorageDriverClass: how a storage driver is registered, and which disks it serves. Not what a driver does (`drivers`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.conditions import Conditional
from vmsnapshot_operator.api.model import (
    AGE,
    LIST_TYPE,
    PATTERN_MESSAGE,
    Column,
    Count,
    Kind,
    Milliseconds,
    Model,
    Name,
    Object,
    ObjectName,
    Report,
    Trimmed,
    message_column,
    ready_column,
    rule,
    rules,
)
from vmsnapshot_operator.core.driver import CutKind
from vmsnapshot_operator.core.volumes import SourceKind

DriverName = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^[a-z0-9]([-a-z0-9._]*[a-z0-9])?$",
        json_schema_extra={
            PATTERN_MESSAGE: "must be the name of an installed driver, as libvirt-volume or ceph-rbd; `vmsnapshot-operator doctor` lists them"
        },
    ),
]

LowerWord = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^[a-z0-9][a-z0-9+_.-]*$",
        json_schema_extra={PATTERN_MESSAGE: "must be one word in lower case, as libvirt spells it: rbd, qcow2"},
    ),
]

Parameters = Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64)]
"""Settings of a driver, as texts; the driver's own model validates them and makes numbers of them."""


class Match(Model):
    """One description of disks: every part that is given must agree with the layer that the VM writes to."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.type) || has(self.protocol) || has(self.pool) || has(self.sourcePattern) || has(self.format)",
                "an empty match would take every disk: give at least one of type, protocol, pool, sourcePattern and format",
            ),
            rule(
                "!has(self.protocol) || !has(self.type) || self.type == 'network'",
                "protocol goes with type network only: leave it out, or use type network",
                path=".protocol",
            ),
        )
    )

    type: SourceKind | None = None
    """How the disk's source is addressed: file, block, network or volume, as in the domain's XML."""
    protocol: LowerWord | None = None
    """For disks of type network: rbd, nbd, iscsi and so on."""
    pool: Trimmed | None = None
    """The libvirt storage pool that holds it, or the storage system's own pool that the source names."""
    source_pattern: Trimmed | None = None
    """A pattern for the whole source (a path, or pool/image): * is any text, ? any character, [abc] one of these."""
    format: LowerWord | None = None
    """Image format: raw, qcow2 and so on."""


class StorageDriverClassSpec(Model):
    """Which driver, with which settings, for which disks."""

    driver: DriverName
    """Name of an installed storage driver; `vmsnapshot-operator doctor` lists them."""
    priority: Annotated[int, Field(ge=-1_000_000, le=1_000_000)] = 0
    """Among the classes that match a disk and whose driver says that it fits, the highest wins. A tie is refused when planning."""
    match: Annotated[tuple[Match, ...], Field(min_length=1, max_length=64, json_schema_extra={LIST_TYPE: "atomic"})]
    """Which disks it serves: those that at least one entry describes."""
    parameters: Annotated[
        Parameters,
        Field(
            json_schema_extra=rules(
                rule(
                    "self.all(k, k.matches('^[A-Za-z][-A-Za-z0-9._]{0,62}$'))",
                    "the name of each parameter must be a word of at most 63 letters, digits, '-', '.' and '_' that begins"
                    " with a letter",
                ),
                rule(
                    "!self.exists(k, k.matches('(?i)(password|passwd|passphrase|token|secret|private_?key)$'))",
                    "this looks like a credential: put it into the Secret that secretName names, since many can read parameters",
                ),
            )
        ),
    ] = Field(default_factory=dict)
    """Settings of the driver, all as texts. What is wrong with them is shown by the Ready condition."""
    secret_name: ObjectName | None = None
    """Credentials of the storage system: a Secret in the operator's own namespace."""
    allow_under_freeze: bool = False
    """Let a Remote driver cut while the guest is frozen, although that may take seconds and many calls over the network."""
    max_concurrent_cuts: Annotated[int, Field(ge=1, le=256)] | None = None
    """So many cuts at once are asked of the storage system; others wait before their VM is touched. Without it, no limit."""


class CapabilitiesReport(Report):
    """What the driver promises for these parameters."""

    cut: CutKind
    """Instant: cuts at once, under a freeze. Copy: copies, and needs a base that stands still. Remote: cuts by way of another system."""
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
    """Of which format the driver's handles are; it reads those of earlier formats, too."""


class Latency(Report):
    """How long the cuts took that this operator has seen since its start."""

    p50: Milliseconds
    """Half of them took less, in milliseconds."""
    p95: Milliseconds
    """Nineteen of twenty took less, in milliseconds."""
    samples: Count
    """How many were seen."""


class StorageDriverClassStatus(Conditional):
    """What was last seen of the driver and its storage system."""

    capabilities: CapabilitiesReport | None = None
    """What the driver promises for these parameters."""
    cut_milliseconds: Latency | None = None
    """How long its cuts took."""
    snapshots_held: Count | None = None
    """How many cuts of this installation the storage system holds."""
    orphans: Annotated[tuple[Name, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Names of ours that the storage system holds and no VMSnapshot or VMSnapshotContent knows."""
    orphans_found: Count | None = None
    """How many there are, also those that the list has no place for."""


class StorageDriverClass(Object):
    """A storage driver with its settings, and the disks that it serves."""

    spec: StorageDriverClassSpec
    """Which driver, with which settings, for which disks."""
    status: StorageDriverClassStatus = StorageDriverClassStatus()
    """What was last seen of the driver and its storage system."""


KIND = Kind(
    model=StorageDriverClass,
    name="StorageDriverClass",
    plural="storagedriverclasses",
    short_names=("vmsdc",),
    namespaced=False,
    columns=(
        Column(name="Driver", type="string", path=".spec.driver", description="The storage driver."),
        Column(name="Priority", type="integer", path=".spec.priority", description="The highest that fits wins."),
        Column(name="Cut", type="string", path=".status.capabilities.cut", description="How it cuts."),
        Column(
            name="Atomic",
            type="boolean",
            path=".status.capabilities.atomic",
            description="Several disks at one instant.",
        ),
        ready_column(),
        AGE,
        Column(
            name="P95-ms",
            type="integer",
            path=".status.cutMilliseconds.p95",
            description="Slow cuts, in milliseconds.",
            wide=True,
        ),
        message_column(),
    ),
)
