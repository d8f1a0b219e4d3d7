"""From a domain's disks and devices to the volumes to cut, the things left out by rule, and the things refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmsnapshot_operator.core.machine import DeviceKind, Disk, DiskDevice, Machine
from vmsnapshot_operator.core.planning import Excluded, Plan, Refusal
from vmsnapshot_operator.core.volumes import Volume, volume_id

UNSAFE_CACHE = "unsafe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be cut, and what is not, by which rule. `unsafe` are targets whose cache ignores flushes."""

    volumes: tuple[tuple[str, Volume], ...] = ()
    excluded: tuple[Excluded, ...] = ()
    unsafe: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


_DEVICES = {
    DeviceKind.HOSTDEV: "a passed-through device keeps state that no snapshot can hold",
    DeviceKind.FILESYSTEM: "a shared directory of the host is not part of the VM's disks",
    DeviceKind.PMEM: "persistent memory is not part of the VM's disks",
}
_LESSER_DEVICES = {
    DeviceKind.NVRAM: "the variables of the firmware are not captured",
    DeviceKind.TPM: "the TPM's state is not captured",
}


def _left_out(disk: Disk) -> Excluded | None:
    if disk.device in (DiskDevice.CDROM, DiskDevice.FLOPPY):
        return Excluded(name=disk.target, rule="RemovableMedia", message=f"a {disk.device} holds no state of the VM")
    if disk.read_only:
        return Excluded(name=disk.target, rule="ReadOnly", message="the VM cannot write to it")
    return None


def _objection(disk: Disk) -> str:
    if disk.device is DiskDevice.LUN:
        return "is a passed-through LUN: the VM talks to the storage past the hypervisor"
    if not disk.layers or not disk.layers[0].source:
        return "has no source"
    if disk.shareable:
        return "is shareable: other VMs may write to it, so no point in time of this VM is one of the disk"
    if disk.transient:
        return "is transient: its writes are thrown away when the VM stops"
    if disk.encrypted:
        return "is encrypted by the hypervisor: a snapshot could not be verified or restored without its secret"
    if disk.in_block_job:
        return "has a block job running: wait until it has ended"
    return ""


def unplanned(plan: Plan, disks: Sequence[Disk]) -> list[str]:
    """Return the targets of disks that bear state and are neither cut nor left out by the plan: they came after it was made."""
    known = {v.target for v in plan.volumes} | {e.name for e in plan.excluded}
    return [d.target for d in disks if d.target not in known and _left_out(d) is None]


def select(machine: Machine, exclude: Sequence[str]) -> Selection | Refusal:
    """Return the volumes to cut, or why they cannot be.

    Nothing that bears state is left out silently: it is cut, listed in `excluded` by a rule or by the user's wish, or
    the whole request is refused naming all that stands in its way.
    """
    targets = {d.target for d in machine.disks}
    devices = {d.name for d in machine.devices}
    unknown = [t for t in exclude if t not in targets and t not in devices]
    if unknown:
        return Refusal(
            reason="ExcludedTargetNotFound",
            message=(
                f"spec.volumes.exclude names {', '.join(unknown)}, which the domain does not have; its disks are "
                f"{', '.join(sorted(targets)) or 'none'}{'; its other devices are ' + ', '.join(sorted(devices)) if devices else ''}"
            ),
        )
    volumes: list[tuple[str, Volume]] = []
    excluded: list[Excluded] = []
    unsafe: set[str] = set()
    notes: list[str] = []
    objections: list[str] = []
    for disk in machine.disks:
        if disk.target in exclude:
            excluded.append(Excluded(name=disk.target, rule="ByRequest", message="named in spec.volumes.exclude"))
        elif (rule := _left_out(disk)) is not None:
            excluded.append(rule)
        elif objection := _objection(disk):
            objections.append(f"disk {disk.target} {objection}")
        else:
            writable, *backing = disk.layers
            volume = Volume(
                id=volume_id(writable),
                label=disk.target,
                writable=writable,
                backing=tuple(backing),
                size_bytes=disk.size_bytes,
            )
            volumes.append((disk.target, volume))
            if disk.cache == UNSAFE_CACHE:
                unsafe.add(disk.target)
                notes.append(f"disk {disk.target} has cache=unsafe and ignores flushes: nothing is claimed of it")
    for device in machine.devices:
        if device.name in exclude:
            excluded.append(Excluded(name=device.name, rule="ByRequest", message="named in spec.volumes.exclude"))
        elif device.kind in _LESSER_DEVICES:
            said = _LESSER_DEVICES[device.kind]
            why = f": they are kept {device.where}" if device.where else ""
            excluded.append(Excluded(name=device.name, rule=device.kind.upper(), message=f"{said}{why}"))
            notes.append(f"{said} ({device.name})")
        else:
            objections.append(f"device {device.name}: {_DEVICES[device.kind]}")
    if objections:
        return Refusal(
            reason="UnsupportedDisk",
            message="; ".join(objections)
            + "; detach it, or name it in spec.volumes.exclude to leave it out on purpose",
        )
    twice = [t for t, v in volumes if sum(1 for _, o in volumes if o.id == v.id) > 1]
    if twice:
        return Refusal(reason="UnsupportedDisk", message=f"disks {', '.join(twice)} share one source")
    if all(v.is_nvram for _, v in volumes):
        return Refusal(
            reason="NoVolumes", message="nothing is left to cut: the domain has no writable disk that is not excluded"
        )
    return Selection(volumes=tuple(volumes), excluded=tuple(excluded), unsafe=frozenset(unsafe), notes=tuple(notes))
