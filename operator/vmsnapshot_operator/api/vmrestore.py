"""VMRestore: the way back to a VMSnapshot, as a user asks for it, and what is told of it. Not what is really held (`vmsnapshot_content`)."""

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
    Column,
    Kind,
    Message,
    Model,
    Name,
    Object,
    ObjectName,
    Report,
    Time,
    Trimmed,
    Word,
    message_column,
    ready_column,
    rule,
    rules,
)


class Mode(StrEnum):
    """Whether the VM itself goes back, or another one is made beside it."""

    IN_PLACE = "InPlace"
    NEW_VM = "NewVM"


class RunningVM(StrEnum):
    """What is done with a VM that runs although its disks are to be set back."""

    REFUSE = "Refuse"
    STOP = "Stop"


class Result(StrEnum):
    """How far one disk is."""

    PENDING = "Pending"  # not begun: it is as it was
    RESTORING = "Restoring"  # under way: its content is neither the old nor that of the snapshot
    RESTORED = "Restored"  # InPlace: it holds what it held at the snapshot
    CLONED = "Cloned"  # NewVM: a new disk holds that
    FAILED = "Failed"


_UUID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

SnapshotUID = Annotated[
    str,
    Field(
        max_length=36,
        pattern=_UUID,
        json_schema_extra={
            PATTERN_MESSAGE: "must be the metadata.uid of the VMSnapshot: a UUID in lower case, as kubectl -o yaml shows it"
        },
    ),
]

NewName = Annotated[
    str,
    Field(
        # Files are called by it, with a suffix, and no name of a file is longer than 255.
        max_length=128,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        json_schema_extra={
            PATTERN_MESSAGE: "must be a VM's name of letters, digits, '.', '_' and '-', with a letter or digit at both ends"
        },
    ),
]


class NewVM(Model):
    """The VM that mode NewVM makes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!self.name.matches('^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$')",
                "must not look like a UUID: VMs are looked up by both",
                path=".name",
            )
        )
    )

    name: NewName
    """Its name, which no VM of the Hypervisor may have yet. Its UUID, its network addresses (MAC) and its generation id are new, too: they follow from this VMRestore, so that a repeated attempt makes the same VM."""


class RestoredVolumes(Model):
    """Which of the snapshot's disks."""

    include: Annotated[tuple[Trimmed, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Targets of disks (as vda), and nvram for the variables of the firmware, as the snapshot names them. InPlace leaves the other disks as they are, which are then of another moment; a new VM does not get them. Empty: all that the snapshot holds."""


def _immutable(field: str, *, optional: bool = False) -> dict[str, str]:
    same = f"self.{field} == oldSelf.{field}"
    if optional:
        same = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || {same})"
    message = f"{field} is immutable: create a VMRestore of another name instead"
    return rule(same, message, path=f".{field}")


_IMMUTABLE = (
    *(_immutable(f) for f in ("snapshotName", "mode", "volumes", "runningVM", "startAfter", "deadlineSeconds")),
    *(_immutable(f, optional=True) for f in ("snapshotUID", "newVM", "safetySnapshot")),
)

_MODE_RULES = (
    rule(
        "self.mode != 'NewVM' || has(self.newVM)",
        "mode NewVM needs newVM.name: the name of the VM to be made",
        path=".newVM",
    ),
    rule(
        "self.mode != 'InPlace' || !has(self.newVM)",
        "mode InPlace makes no VM: leave newVM out, or use mode NewVM",
        path=".newVM",
    ),
    rule(
        "self.mode != 'NewVM' || self.runningVM != 'Stop'",
        "mode NewVM does not touch the VM, which may run on: leave runningVM out",
        path=".runningVM",
    ),
    rule(
        "self.mode != 'NewVM' || !has(self.safetySnapshot) || !self.safetySnapshot",
        "mode NewVM changes nothing that a safety snapshot could bring back: leave safetySnapshot out",
        path=".safetySnapshot",
    ),
)


class VMRestoreSpec(Model):
    """What is asked for. Nothing of it can be changed afterwards."""

    model_config = ConfigDict(json_schema_extra=rules(*_IMMUTABLE, *_MODE_RULES))

    snapshot_name: ObjectName
    """Name of the VMSnapshot to go back to, in the namespace of this VMRestore. It must be Ready."""
    snapshot_uid: SnapshotUID | None = Field(default=None, alias="snapshotUID")
    """The metadata.uid of that VMSnapshot. With it another VMSnapshot of the same name is refused, and a VMRestore that is created anew from git after it was done once does nothing; a VM remembers its last 16 restores. Recommended wherever manifests are applied again by a tool."""
    mode: Mode
    """InPlace sets the disks of the VM itself back: what was written since is gone from them. NewVM makes another VM from copies of the disks, and touches neither the VM nor the snapshot."""
    new_vm: NewVM | None = Field(default=None, alias="newVM")
    """The VM to be made; for mode NewVM only."""
    volumes: RestoredVolumes = RestoredVolumes()
    """Which of the snapshot's disks; all, if nothing is said."""
    running_vm: RunningVM = Field(default=RunningVM.REFUSE, alias="runningVM")
    """For mode InPlace, whose disks can only be set back while the VM is off. Refuse: a VM that runs is left alone, and the VMRestore fails. Stop: it is shut down, and switched off if it does not go down in time."""
    start_after: bool = False
    """Start the VM in the end. It is Ready when the guest's agent answers, where the VM has one."""
    safety_snapshot: bool | None = None
    """For mode InPlace: take a snapshot of the disks first, as they are now, to go back to if the restore cannot be completed. It is a VMSnapshot beside this VMRestore and stays. True, if nothing is said; with false a restore that fails half way can only be completed."""
    deadline_seconds: Annotated[int, Field(ge=1, le=2_592_000)] = 3600
    """So long after its creation it must be done; else the VMRestore fails, and says how far it came."""

    @property
    def takes_safety_snapshot(self) -> bool:
        """Whether a safety snapshot is to be taken: of what InPlace changes, unless it was declined."""
        return self.mode is Mode.IN_PLACE and self.safety_snapshot is not False


class RestoredVM(Report):
    """The VM that was set back, or made."""

    name: Name = ""
    """Name of the domain."""
    uuid: Word = ""
    """UUID of the domain."""


class RestoredVolume(Report):
    """One disk."""

    target: Name
    """The disk, as the VM names it."""
    class_name: Name = ""
    """The StorageDriverClass that snapshotted it, and now restores it."""
    result: Result | None = None
    """Pending: as it was. Restoring: under way, neither old nor new. Restored: set back. Cloned: a new disk holds the snapshot's content. Failed: see message."""
    message: Message = ""
    """What was done, or what is in the way."""


class VMRestoreStatus(Conditional):
    """How far it is, and what was done."""

    phase: Word | None = None
    """One word for people, derived from the conditions. Programs read the conditions."""
    hypervisor_name: Name | None = None
    """The Hypervisor that has the VM, or is to have the new one."""
    vm: RestoredVM | None = None
    """The VM that is set back, or was made."""
    volumes: Annotated[
        tuple[RestoredVolume, ...],
        Field(max_length=256, json_schema_extra={LIST_TYPE: "map", LIST_MAP_KEYS: ["target"]}),
    ] = ()
    """The disks, each with what was done to it."""
    safety_snapshot_name: Name | None = None
    """The VMSnapshot that holds the disks as they were before."""
    start_time: Time | None = None
    """When it began to change the VM's disks, or to make new ones; without it neither was touched."""
    completion_time: Time | None = None
    """When it was done, or failed."""
    error: Reasoned | None = None
    """Why it failed."""


class VMRestore(Object):
    """The way back to a VMSnapshot: in place, or into a new VM beside the old one."""

    spec: VMRestoreSpec
    """What is asked for. Nothing of it can be changed afterwards."""
    status: VMRestoreStatus = VMRestoreStatus()
    """How far it is, and what was done."""


KIND = Kind(
    model=VMRestore,
    name="VMRestore",
    plural="vmrestores",
    short_names=("vmrest",),
    namespaced=True,
    columns=(
        Column(name="Snapshot", type="string", path=".spec.snapshotName", description="The VMSnapshot to go back to."),
        Column(name="Mode", type="string", path=".spec.mode", description="In place, or into a new VM."),
        Column(name="VM", type="string", path=".status.vm.name", description="The VM that is set back, or was made."),
        Column(name="Phase", type="string", path=".status.phase", description="Where it stands."),
        ready_column(),
        AGE,
        Column(
            name="Safety",
            type="string",
            path=".status.safetySnapshotName",
            description="The VMSnapshot that holds the disks as they were before.",
            wide=True,
        ),
        message_column(),
    ),
)
