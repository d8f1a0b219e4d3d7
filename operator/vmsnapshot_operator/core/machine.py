"""What a domain is, as far as snapshots care: parsed once from libvirt's XML and state into these types.

Not how it is read (`hypervisors`) and not what follows from it (`plan`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.volumes import Layer, VolumeId, volume_id


class PowerState(StrEnum):
    """A domain's state in the words of the API."""

    RUNNING = "Running"
    PAUSED = "Paused"
    SHUT_OFF = "ShutOff"
    CRASHED = "Crashed"
    SUSPENDED = "Suspended"  # the guest sleeps (pmsuspended)
    UNKNOWN = "Unknown"


class DiskDevice(StrEnum):
    """What the guest sees."""

    DISK = "disk"
    CDROM = "cdrom"
    FLOPPY = "floppy"
    LUN = "lun"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk of the domain, or the file of its firmware's variables (target `NVRAM`).

    `layers` is the backing chain, the writable one first; empty for an empty drive.
    """

    target: str
    device: DiskDevice = DiskDevice.DISK
    layers: tuple[Layer, ...] = ()
    size_bytes: int = 0
    read_only: bool = False
    shareable: bool = False
    transient: bool = False
    encrypted: bool = False
    cache: str = ""
    in_block_job: bool = False


def not_at(planned: Mapping[str, VolumeId], disks: Iterable[Disk]) -> list[str]:
    """Return the targets at which another disk is than the planned one, or none: a target does not say what is plugged in there."""
    found = {d.target: volume_id(d.layers[0]) for d in disks if d.layers}
    return sorted(t for t, volume in planned.items() if found.get(t) != volume)


class DeviceKind(StrEnum):
    """State-bearing things that are no disk."""

    HOSTDEV = "hostdev"  # a passed-through PCI, USB or SCSI device
    FILESYSTEM = "filesystem"  # virtiofs or 9p: a directory of the host
    NVRAM = "nvram"  # the variables of its firmware (UEFI)
    TPM = "tpm"  # an emulated TPM's state
    PMEM = "pmem"  # NVDIMM or virtio-pmem memory backed by a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device that bears state outside any disk. `name` is what a user would recognise it by.

    Its state lies in the `file`, or `where` nothing but the hypervisor reaches it, in words; as far as the definition says it.
    """

    kind: DeviceKind
    name: str
    file: Layer | None = None
    where: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """A mounted file system as the guest's agent tells, with the disk targets that it lies on."""

    mountpoint: str
    device: str
    type: str
    targets: tuple[str, ...]


class AgentState(StrEnum):
    """What the guest's agent answered when it was asked for its freeze state."""

    ABSENT = "Absent"  # no channel in the domain, or it is not connected
    SILENT = "Silent"  # connected and did not answer in time
    UNSUPPORTED = "Unsupported"  # answers, but knows no freeze
    THAWED = "Thawed"
    FROZEN = "Frozen"  # by somebody else: we were not there yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """The guest's agent. `message` is its own (sanitised) text if it said no."""

    state: AgentState
    version: str = ""
    os_id: str = ""
    filesystems: tuple[FileSystem, ...] = ()
    message: str = ""

    @property
    def is_windows(self) -> bool:
        """Windows holds writes for ten seconds at most (VSS), hence another budget."""
        return self.os_id == "mswindows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One domain at one moment. `run_id` is libvirt's id of this run (-1 when shut off): another one is another boot.

    `copied_into`: the files into which the hypervisor is copying its disks, if it is (whoever asked for that), as far as they are known.
    `shut_down_from_within`: it is off, and it was heard that its own system shut it down.
    """

    name: str
    uuid: str
    endpoint: str
    run_id: int
    power: PowerState
    power_reason: str = ""
    shut_down_from_within: bool = False
    persistent: bool = True
    migrating: bool = False
    copied_into: tuple[str, ...] | None = None
    disks: tuple[Disk, ...] = ()
    devices: tuple[Device, ...] = ()
    agent: Agent | None = None
    journal: Journal | None = None
    journal_error: str = ""
    definition: str = ""
