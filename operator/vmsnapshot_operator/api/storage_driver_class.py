"""`StorageDriverClass`: how a storage driver is registered."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.base import Count, Milliseconds, Model, Name, Target, rules
from vmsnapshot_operator.api.conditions import Status


class MatchRule(Model):
    """One way to serve a disk: every field that is given must agree with the disk's writable layer."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.type) || has(self.protocol) || has(self.pool) || has(self.sourcePattern) || has(self.format)",
                "an empty match would take every disk: give at least one of type, protocol, pool, sourcePattern, format",
            ),
            ("!has(self.protocol) || !has(self.type) || self.type == 'network'", "protocol goes with type network only"),
        )
    )
    type: Annotated[Literal["file", "block", "network", "volume"] | None, Field(description="libvirt's type of the disk.")] = None
    protocol: Annotated[Target | None, Field(description="Protocol of a network disk, such as rbd.")] = None
    pool: Annotated[Target | None, Field(description="libvirt pool that holds the file, or the pool named by the source.")] = None
    source_pattern: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)] | None, Field(description="Glob on the path or the source's name.")
    ] = None
    format: Annotated[Target | None, Field(description="Image format, such as raw.")] = None


class StorageDriverClassSpec(Model):
    """A driver with its parameters, and the disks that it serves."""

    driver: Annotated[Name, Field(description="Name of an installed driver; `vmsnapshot-operator doctor` lists them.")]
    priority: Annotated[
        int,
        Field(ge=-1_000_000, le=1_000_000, description="Among the classes that fit a disk the highest wins; a tie is refused when planning."),
    ] = 0
    match: Annotated[
        list[MatchRule],
        Field(min_length=1, max_length=64, description="Disks that it serves: any of these.", json_schema_extra={"x-kubernetes-list-type": "atomic"}),
    ]
    parameters: Annotated[
        dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64, description="The driver's own parameters; errors show in Ready.")
    ] = {}
    secret_name: Annotated[Name | None, Field(description="Credentials of the storage system: a Secret in the operator's own namespace.")] = None
    allow_under_freeze: Annotated[
        bool, Field(description="Let a Remote driver cut while the guest is frozen, where no overlay is possible.")
    ] = False
    max_concurrent_cuts: Annotated[int, Field(ge=1, le=64, description="Cuts at once on this storage system.")] = 4


class CapabilitiesShown(Model):
    """What the driver says that it can, for these parameters."""

    cut: Literal["Instant", "Copy", "Remote"]
    atomic: bool
    revert: bool
    revert_newest_only: bool = False
    clone: bool = False


class CutLatency(Model):
    """How long cuts took."""

    p50_milliseconds: Milliseconds = 0
    p95_milliseconds: Milliseconds = 0


class StorageDriverClassStatus(Status):
    """What was seen of it."""

    capabilities: CapabilitiesShown | None = None
    cut_latency: CutLatency | None = None
    snapshots_held: Count = 0
    orphans: Annotated[
        list[Annotated[str, Field(max_length=64)]], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "set"})
    ] = []
