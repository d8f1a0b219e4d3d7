"""`VMSnapshot`: the request, and what became of it."""

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

Consistency = Literal["Filesystem", "Crash", "PerVolume", "Unknown", "Application"]
MAX_DEADLINE = 7 * 24 * 3600

_IMMUTABLE = ("source", "quiesce", "strategyName", "volumes", "deadlineSeconds", "readyDeadlineSeconds", "dryRun")


def _unchanged(field: str) -> tuple[str, str]:
    rule = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    return rule, f"spec.{field} is immutable: create a new VMSnapshot instead"


class Source(Model):
    """Which VM."""

    hypervisor_name: Annotated[Name, Field(description="Name of a Hypervisor.")]
    domain: Annotated[
        str, Field(min_length=1, max_length=253, pattern=r"^[^\s/][^/\n]*$", description="The VM's name or UUID in libvirt.")
    ]


class Quiesce(Model):
    """How the VM is made to stand still while its disks are cut."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.policy != 'Never' || self.method == 'Auto'", "policy Never sends nothing to the VM: leave method out"),
            ("self.policy != 'Never' || !has(self.maxFrozenSeconds)", "policy Never freezes nothing: leave maxFrozenSeconds out"),
            ("self.policy != 'Never' || !has(self.mountpoints) || size(self.mountpoints) == 0", "policy Never freezes nothing: leave mountpoints out"),
            ("self.policy != 'Require' || self.method != 'Pause'", "method Pause gives crash consistency at best, which policy Require does not accept"),
            (
                "!has(self.mountpoints) || size(self.mountpoints) == 0 || self.method in ['Auto', 'GuestAgent']",
                "mountpoints go with the guest's agent: use method Auto or GuestAgent",
            ),
        )
    )
    policy: Annotated[
        Literal["Require", "Prefer", "Never"],
        Field(description="Require: no file-system-consistent snapshot, no snapshot. Prefer: fall back, and say so. Never: speed, nothing is sent to the guest."),
    ] = "Prefer"
    method: Annotated[
        Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z][A-Za-z0-9]*$")],
        Field(description="Auto, GuestAgent, HypervisorSnapshot, Pause, or the name of a plug-in."),
    ] = "Auto"
    max_frozen_seconds: Annotated[
        int | None, Field(ge=1, le=300, description="Hard stop: the guest is freed first, then it is decided. 30 by default, 8 for Windows guests.")
    ] = None
    mountpoints: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=255, pattern=r"^(/|[A-Za-z]:\\?).*$")]],
        Field(max_length=64, description="Freeze these only; disks that are not covered do not claim Filesystem.", json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []


class Volumes(Model):
    """Which disks."""

    exclude: Annotated[
        list[Target],
        Field(max_length=MAX_DISKS, description="Targets (vdb) left out on purpose; anything else that bears state needs a class.", json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []


class VMSnapshotSpec(Model):
    """What is asked for; immutable but for deletionPolicy and ttlSeconds."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            *(_unchanged(field) for field in _IMMUTABLE),
            ("self.deadlineSeconds <= self.readyDeadlineSeconds", "readyDeadlineSeconds must not be shorter than deadlineSeconds"),
        )
    )
    source: Source
    quiesce: Quiesce = Quiesce()
    strategy_name: Annotated[
        Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z][A-Za-z0-9]*$")], Field(description="Auto, Storage, or a plug-in's name.")
    ] = "Auto"
    volumes: Volumes = Volumes()
    deadline_seconds: Annotated[int, Field(ge=1, le=MAX_DEADLINE, description="Until the point in time exists.")] = 600
    ready_deadline_seconds: Annotated[int, Field(ge=1, le=4 * MAX_DEADLINE, description="Until it can be restored.")] = 86400
    deletion_policy: Annotated[
        Literal["Delete", "Retain"], Field(description="Retain: the VMSnapshotContent and the storage keep it when this object goes.")
    ] = "Delete"
    ttl_seconds: Annotated[
        int | None, Field(ge=1, le=10 * 365 * 24 * 3600, description="Delete this object so long after the cut. A GitOps tool would create it anew.")
    ] = None
    dry_run: Annotated[bool, Field(description="Plan and report, touch nothing; gets Planned, never Ready.")] = False


class VMShown(Model):
    """The VM as it was found."""

    name: Annotated[str, Field(max_length=253)] = ""
    uuid: Identity = ""
    power_state: Word = ""


class StrategyShown(Model):
    """Which workflow, and why."""

    name: Word = ""
    reason: Text = ""


class QuiesceShown(Model):
    """How it stood still, and for how long."""

    method: Word = ""
    reason: Text = ""
    attempts: Count = 0
    budget_seconds: Count = 0
    frozen_time: Moment | None = None
    thawed_time: Moment | None = None
    frozen_milliseconds: Annotated[Milliseconds | None, Field(description="From the freeze being asked for to the thaw being answered.")] = None
    filesystems_frozen: Count = 0
    filesystems_thawed: Count = 0


class VolumeShown(Model):
    """One disk: which class, why not another, what is claimed and why not more."""

    target: Target
    class_name: Name
    reason: Text = ""
    consistency: Consistency | None = None
    consistency_reason: Text = ""
    size_bytes: Bytes = 0


class GroupShown(Model):
    """The disks that one class cut at once."""

    class_name: Name
    driver: Name
    volumes: Count = 0
    atomic: bool | None = None
    cut_milliseconds: Milliseconds | None = None
    ready_time: Moment | None = None


class ExcludedShown(Model):
    """What was left out, by which rule."""

    name: Annotated[str, Field(max_length=253)]
    rule: Word
    message: Text = ""


class LeftoverShown(Model):
    """Something that is still on storage, or that cannot be asked for."""

    class_name: Name
    name: Annotated[str, Field(max_length=64)] = ""
    message: Text = ""


class ErrorShown(Model):
    """Why there is no snapshot."""

    reason: Reason = ""
    message: Message = ""


_BY_TARGET = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["target"]}
_ATOMIC = {"x-kubernetes-list-type": "atomic"}


class VMSnapshotStatus(Status):
    """What was done, and how consistent the result really is."""

    phase: Annotated[Word, Field(description="One word for people, derived from the conditions.")] = ""
    content_name: Annotated[Name | None, Field(description="The VMSnapshotContent that holds it.")] = None
    consistency: Annotated[Consistency | None, Field(description="The least of its volumes, from evidence.")] = None
    creation_time: Annotated[Moment | None, Field(description="The point in time: when the disks were cut.")] = None
    vm: VMShown | None = None
    strategy: StrategyShown | None = None
    quiesce: QuiesceShown | None = None
    volumes: Annotated[list[VolumeShown], Field(max_length=MAX_DISKS, json_schema_extra=_BY_TARGET)] = []
    groups: Annotated[list[GroupShown], Field(max_length=64, json_schema_extra=_ATOMIC)] = []
    excluded: Annotated[list[ExcludedShown], Field(max_length=MAX_DISKS, json_schema_extra=_ATOMIC)] = []
    leftovers: Annotated[list[LeftoverShown], Field(max_length=MAX_DISKS, json_schema_extra=_ATOMIC)] = []
    error: ErrorShown | None = None
