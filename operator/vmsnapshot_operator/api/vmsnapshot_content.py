"""`VMSnapshotContent`: what is really held, and the evidence. Written by the operator alone; tenants neither read nor write it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.base import (
    MAX_DISKS,
    Bytes,
    Count,
    Identity,
    Message,
    Milliseconds,
    Model,
    Moment,
    Name,
    Reason,
    Target,
    Text,
    Word,
    rules,
)
from vmsnapshot_operator.api.conditions import Status
from vmsnapshot_operator.api.vmsnapshot import Consistency

_ATOMIC = {"x-kubernetes-list-type": "atomic"}
HandleText = Annotated[str, Field(max_length=1024)]
RequestName = Annotated[str, Field(min_length=1, max_length=40)]


class VMSnapshotRef(Model):
    """The VMSnapshot that this belongs to."""

    namespace: Annotated[str, Field(min_length=1, max_length=63)]
    name: Name
    uid: Identity


class ContentSource(Model):
    """The VM: by its UUID, which is pinned."""

    hypervisor_name: Name
    domain: Annotated[str, Field(max_length=253)]
    uuid: Identity
    endpoint: Text = ""
    run_id: Annotated[int, Field(ge=-1, le=2**31)] = -1
    power_state: Word = ""


class LayerKept(Model):
    """One image of a disk's chain."""

    kind: Word
    source: Text
    format: Word = ""
    protocol: Word = ""
    pool: Annotated[str, Field(max_length=253)] = ""
    hosts: Annotated[list[Annotated[str, Field(max_length=253)]], Field(max_length=64, json_schema_extra=_ATOMIC)] = []
    fingerprint: Annotated[str, Field(max_length=253)] = ""


class VolumeKept(Model):
    """One disk: where it lay, what holds its cut, and what is claimed of it."""

    target: Target
    id: Identity
    class_name: Name
    reason: Text = ""
    size_bytes: Bytes = 0
    unsafe: bool = False
    covered: bool = False
    writable: LayerKept
    backing: Annotated[list[LayerKept], Field(max_length=64, json_schema_extra=_ATOMIC)] = []
    handle: HandleText | None = None
    consistency: Consistency | None = None
    consistency_reason: Text = ""


class CapabilitiesKept(Model):
    """What the driver promised then."""

    cut: Literal["Instant", "Copy", "Remote"]
    atomic: bool
    revert: bool
    revert_newest_only: bool = False
    clone: bool = False


class GroupKept(Model):
    """One class's part: enough to restore and delete without the class, as it was then."""

    class_name: Name
    driver: Name
    parameters: Annotated[dict[str, Annotated[str, Field(max_length=1024)]], Field(max_length=64)] = {}
    secret_name: Annotated[str, Field(max_length=253)] = ""
    capabilities: CapabilitiesKept
    request_name: RequestName
    timeout_seconds: Count = 0
    volumes: Annotated[list[Identity], Field(max_length=MAX_DISKS, description="Ids of its volumes.", json_schema_extra=_ATOMIC)]
    cut: bool = False
    handle: HandleText | None = None
    atomic: bool = False
    hold: Literal["Nothing", "Base"] = "Nothing"
    cut_milliseconds: Milliseconds | None = None
    bracket_start_milliseconds: Annotated[int | None, Field(ge=-(2**31), le=2**31, description="Since the VM stood still.")] = None
    bracket_end_milliseconds: Annotated[int | None, Field(ge=-(2**31), le=2**31)] = None


class QuiesceKept(Model):
    """The plan for making the VM stand still."""

    method: Word
    reason: Text = ""
    budget_milliseconds: Milliseconds
    mountpoints: Annotated[list[Annotated[str, Field(max_length=255)]], Field(max_length=64, json_schema_extra=_ATOMIC)] = []
    expected_filesystems: Count = 0
    holds_vm: bool = False


class EvidenceKept(Model):
    """What was seen of the window."""

    method: Word
    stood_still: bool = False
    still_milliseconds: Milliseconds | None = None
    frozen_time: Moment | None = None
    thawed_time: Moment | None = None
    cut_time: Moment | None = None
    frozen_milliseconds: Milliseconds = 0
    covered: Annotated[list[Identity], Field(max_length=MAX_DISKS, json_schema_extra=_ATOMIC)] = []
    filesystems_frozen: Count = 0
    filesystems_thawed: Count = 0
    freed_by_other: bool = False
    same_vm: bool = False
    shut_down_from_within: bool = False
    free: bool = False
    reason: Reason = ""
    message: Message = ""
    notes: Annotated[list[Text], Field(max_length=16, json_schema_extra=_ATOMIC)] = []


class ExcludedKept(Model):
    """What was left out, by which rule."""

    name: Annotated[str, Field(max_length=253)]
    rule: Word
    message: Text = ""


class FailureKept(Model):
    """Why there is no snapshot, for good."""

    reason: Reason
    message: Message = ""


class VMSnapshotContentSpec(Model):
    """Written before the first cut of an attempt, completed after the window."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.vmSnapshotRef == oldSelf.vmSnapshotRef", "spec.vmSnapshotRef is immutable"),
            ("self.installation == oldSelf.installation", "spec.installation is immutable"),
            ("self.attempt >= oldSelf.attempt", "spec.attempt never goes back"),
        )
    )
    vm_snapshot_ref: VMSnapshotRef
    installation: Annotated[str, Field(min_length=6, max_length=6)]
    source: ContentSource
    deletion_policy: Literal["Delete", "Retain"] = "Delete"
    attempt: Annotated[int, Field(ge=1, le=1295)]
    strategy_name: Word = "Storage"
    strategy_reason: Text = ""
    quiesce: QuiesceKept
    volumes: Annotated[
        list[VolumeKept], Field(min_length=1, max_length=MAX_DISKS, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["target"]})
    ]
    groups: Annotated[
        list[GroupKept], Field(min_length=1, max_length=64, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["className"]})
    ]
    excluded: Annotated[list[ExcludedKept], Field(max_length=MAX_DISKS, json_schema_extra=_ATOMIC)] = []
    notes: Annotated[list[Text], Field(max_length=64, json_schema_extra=_ATOMIC)] = []
    definition: Annotated[str, Field(max_length=262_144, description="The VM's definition, without secrets.")] = ""
    evidence: EvidenceKept | None = None
    consistency: Consistency | None = None
    failure: FailureKept | None = None
    ready: bool = False
    ready_time: Moment | None = None


class VMSnapshotContentStatus(Status):
    """Reserved: what a later look at the storage finds."""
