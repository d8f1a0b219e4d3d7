"""The conditions that objects bear: their types and their form. Not when they hold (`plan`), nor who writes them (`kube`)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from vmsnapshot_operator.api.model import LIST_MAP_KEYS, LIST_TYPE, Generation, ReasonWord, Report, Time


class ConditionType(StrEnum):
    """What a condition is about. The first five are a VMSnapshot's alone, in the order in which they come true."""

    PLANNED = "Planned"  # every choice is made, and the VM was not touched
    QUIESCED = "Quiesced"  # the VM was made to stand still
    VOLUMES_SNAPSHOTTED = "VolumesSnapshotted"  # the point in time exists
    UNQUIESCED = "Unquiesced"  # the VM is confirmed to go on; Unknown until then
    READY = "Ready"  # it can be used: a snapshot restored, a class or hypervisor chosen
    RECONCILING = "Reconciling"  # something is under way (kstatus)
    STALLED = "Stalled"  # it failed, and will not go on by itself (kstatus)


class RestoreConditionType(StrEnum):
    """What a condition of a VMRestore is about, in the order in which they come true."""

    PLANNED = "Planned"  # every disk was checked, and nothing was touched
    SAFETY_SNAPSHOT_TAKEN = (
        "SafetySnapshotTaken"  # what is there now can be brought back; False with a reason if not asked for
    )
    VOLUMES_RESTORED = "VolumesRestored"  # every disk holds what it held at the snapshot
    VM_DEFINED = "VMDefined"  # the VM can be started: it has its true definition (again)
    READY = "Ready"  # all is done that was asked for
    RECONCILING = "Reconciling"  # something is under way (kstatus)
    STALLED = "Stalled"  # it failed, and will not go on by itself (kstatus)


class Condition(Report):
    """One aspect of an object's state, as all of Kubernetes tells it."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """What it is about."""
    status: Literal["True", "False", "Unknown"]
    """Whether it holds; Unknown: not yet known."""
    observed_generation: Annotated[int, Field(ge=0, le=2**62)] | None = None
    """The generation of the object that this was said of."""
    last_transition_time: Time
    """When `status` last changed."""
    reason: Annotated[ReasonWord, Field(max_length=1024)]
    """Why, in one stable word for programs."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why, in a sentence for people."""


Conditions = Annotated[
    tuple[Condition, ...], Field(max_length=16, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["type"]})
]
"""At most one condition of each type."""


class Conditional(Report):
    """A status with conditions. A fresh object shows generation -1, so that tools take it for being in progress."""

    observed_generation: Generation = -1
    """The generation of the object that this status is about; -1 until it was looked at."""
    conditions: Conditions = ()
    """What holds, what does not, and why."""


class Reasoned(Report):
    """A stable reason with a text for people."""

    reason: ReasonWord
    """Why, in one stable word for programs."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """Why, in a sentence for people."""
