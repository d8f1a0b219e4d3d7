"""Look at one domain and write down what a plan needs to know. Blocking, on a given virConnect; raises libvirtError, ValueError.

Not its agent (`agent`) nor what follows from what is seen (`plan`). `shut_down_from_within` is only what libvirt's state does not rule
out: a QEMU that was ended by a signal looks the same (`events` tells them apart).
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import libvirt

from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.core.machine import DeviceKind, Disk, Machine, PowerState
from vmsnapshot_operator.core.volumes import NVRAM, Layer, SourceKind
from vmsnapshot_operator.hypervisors import backups, domain_xml, journals

_CHAIN_LIMIT = 64

_POWER = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.SHUT_OFF,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.SUSPENDED,
}
_REASONS = {
    PowerState.PAUSED: {
        libvirt.VIR_DOMAIN_PAUSED_USER: "by a user",
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION: "for a migration",
        libvirt.VIR_DOMAIN_PAUSED_SAVE: "while it is saved",
        libvirt.VIR_DOMAIN_PAUSED_DUMP: "while it is dumped",
        libvirt.VIR_DOMAIN_PAUSED_IOERROR: "by an I/O error",
        libvirt.VIR_DOMAIN_PAUSED_WATCHDOG: "by its watchdog",
        libvirt.VIR_DOMAIN_PAUSED_FROM_SNAPSHOT: "restored from a snapshot",
        libvirt.VIR_DOMAIN_PAUSED_SHUTTING_DOWN: "while it shuts down",
        libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT: "while a snapshot is made",
        libvirt.VIR_DOMAIN_PAUSED_CRASHED: "its system crashed",
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP: "while it starts",
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY: "for a migration",
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED: "by a failed migration",
    },
    PowerState.SHUT_OFF: {
        libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "shut down",
        libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "destroyed",
        libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
        libvirt.VIR_DOMAIN_SHUTOFF_MIGRATED: "migrated to another host",
        libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved with its memory",
        libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "failed to start",
        libvirt.VIR_DOMAIN_SHUTOFF_FROM_SNAPSHOT: "restored from a snapshot",
        libvirt.VIR_DOMAIN_SHUTOFF_DAEMON: "its hypervisor daemon was restarted",
    },
}
_MIGRATION_JOBS = (libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN, libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


def describe(connection: Any, uuid: str, endpoint: str) -> Machine:
    """Return everything about a domain but its agent."""
    domain = connection.lookupByUUIDString(uuid)
    power, reason = power_of(domain)
    disks, devices = domain_xml.parse(domain.XMLDesc())
    journal, journal_error = _journal(domain)
    job = _job(domain, power)
    return Machine(
        name=domain.name(),
        uuid=domain.UUIDString(),
        endpoint=endpoint,
        run_id=domain.ID(),
        power=power,
        power_reason=_REASONS.get(power, {}).get(
            reason, "" if power is PowerState.RUNNING else f"libvirt's reason {reason}"
        ),
        shut_down_from_within=power is PowerState.SHUT_OFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
        persistent=bool(domain.isPersistent()),
        migrating=job in _MIGRATION_JOBS,
        copied_into=_copied_into(domain, job),
        disks=(
            *(_completed(connection, domain, d, power) for d in disks),
            *(_nvram(connection, d.file) for d in devices if d.kind is DeviceKind.NVRAM and d.file is not None),
        ),
        devices=tuple(d for d in devices if d.kind is not DeviceKind.NVRAM or d.file is None),
        journal=journal,
        journal_error=journal_error,
        # Without VIR_DOMAIN_XML_SECURE: passwords are left out by libvirt itself.
        definition=domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE),
    )


def essence(domain: Any) -> tuple[object, ...]:
    """Return what a snapshot depends on in the definition of a domain that is off: two that differ in it are two VMs to it."""
    disks, devices = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    # Not what lies beneath the first layer: a host may have noted it, or not.
    return (*(replace(d, layers=d.layers[:1]) for d in disks), *devices)


def power_of(domain: Any) -> tuple[PowerState, int]:
    """Return a domain's power state and libvirt's reason for it."""
    state, reason = domain.state()
    return _POWER.get(state, PowerState.UNKNOWN), reason


def _journal(domain: Any) -> tuple[Journal | None, str]:
    try:
        return journals.read(domain), ""
    except UnreadableJournalError as error:
        return None, str(error)


def _job(domain: Any, power: PowerState) -> int | None:
    """What libvirt is at with the domain as a whole."""
    if power is PowerState.SHUT_OFF:
        return None
    try:
        job = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_INVALID):
            return None
        raise
    return int(job["operation"]) if "operation" in job else None


def _copied_into(domain: Any, job: int | None) -> tuple[str, ...] | None:
    if job != libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
        return None
    found = backups.running(domain)
    return (
        tuple(sorted(found.targets)) if found is not None else ()
    )  # one that is only beginning has no description yet


def _completed(connection: Any, domain: Any, disk: Disk, power: PowerState) -> Disk:
    """Add what the XML does not say: size, the chain of a domain that is off, pools, fingerprints, a block job."""
    if not disk.layers:
        return disk
    layers = disk.layers
    if power is PowerState.SHUT_OFF and len(layers) == 1:
        layers = _chain(connection, layers[0])
    still = power is PowerState.SHUT_OFF  # else the first layer changes all the time
    return replace(
        disk,
        layers=tuple(_placed(connection, layer, fingerprint=still or i > 0) for i, layer in enumerate(layers)),
        size_bytes=_size(domain, disk),
        in_block_job=disk.in_block_job or _has_block_job(domain, disk, power),
    )


def _nvram(connection: Any, layer: Layer) -> Disk:
    """The file of the firmware's variables. It is seldom written to: its fingerprint betrays that also while the VM runs."""
    placed, size = _placed(connection, layer, fingerprint=False), 0
    # The pool may be at work, and the file gone that it knows, or not made yet: then nothing is claimed by it.
    with contextlib.suppress(libvirt.libvirtError):
        if placed.pool and volume_of(connection, placed) is None:
            # Made when the VM was started first, by libvirt itself but past its pools.
            connection.storagePoolLookupByName(placed.pool).refresh(0)
        if (volume := volume_of(connection, placed)) is not None:
            size = int(volume.info()[1])
            placed = replace(placed, fingerprint=_fingerprint(connection, placed))
    return Disk(target=NVRAM, layers=(placed,), size_bytes=size)


def _size(domain: Any, disk: Disk) -> int:
    """Virtual size in bytes; 0 if libvirt cannot tell, as for a network disk of a domain that is off."""
    try:
        return int(domain.blockInfo(disk.target)[0])
    except libvirt.libvirtError:
        return 0


def _has_block_job(domain: Any, disk: Disk, power: PowerState) -> bool:
    """Whether a job is under way that the XML does not show, as a pull of the chain."""
    if power not in (PowerState.RUNNING, PowerState.PAUSED):
        return False
    try:
        return bool(domain.blockJobInfo(disk.target, 0))
    except libvirt.libvirtError:
        return False  # an empty drive, or a driver that knows no such jobs


def _chain(connection: Any, top: Layer) -> tuple[Layer, ...]:
    """Find the layers beneath by the storage pools: the definition of a domain that is off names the writable one only."""
    layers = [top]
    while layers[-1].format != "raw" and len(layers) < _CHAIN_LIMIT:
        volume = volume_of(connection, layers[-1])
        backing = domain_xml.element(volume.XMLDesc()).find("backingStore") if volume is not None else None
        path = backing.findtext("path", "") if backing is not None else ""
        if backing is None or not path.startswith("/") or any(path == known.source for known in layers):
            break
        described = backing.find("format")
        image_format = described.get("type", "") if described is not None else ""
        layers.append(Layer(kind=SourceKind.FILE, source=path, format=image_format))
    return tuple(layers)


def _placed(connection: Any, layer: Layer, *, fingerprint: bool) -> Layer:
    """Add the libvirt pool that holds a layer, and to one that nobody writes to what betrays a later change."""
    if layer.kind is SourceKind.VOLUME:  # it names its pool itself
        return replace(layer, fingerprint=_fingerprint(connection, layer) if fingerprint else "")
    if layer.kind is SourceKind.NETWORK:
        return layer
    try:
        # By its folder: a volume made since the pool was last refreshed is not known to the pool yet.
        pool = connection.storagePoolLookupByTargetPath(str(PurePosixPath(layer.source).parent)).name()
    except libvirt.libvirtError:
        return layer  # it lies in no pool
    return replace(layer, pool=pool, fingerprint=_fingerprint(connection, layer) if fingerprint else "")


def _fingerprint(connection: Any, layer: Layer) -> str:
    """What betrays a later change; empty if the pool does not know the layer, or no time of a write: nothing can be verified then."""
    volume = volume_of(connection, layer)
    if volume is None:
        return ""
    root = domain_xml.element(volume.XMLDesc())
    mtime = root.findtext("target/timestamps/mtime")
    return f"{root.findtext('allocation')}/{mtime}" if mtime else ""


def volume_of(connection: Any, layer: Layer) -> Any | None:
    """Return the volume of a pool that a layer is, or None if no pool knows it."""
    try:
        if layer.kind is SourceKind.VOLUME:
            pool, _, name = layer.source.partition("/")
            return connection.storagePoolLookupByName(pool).storageVolLookupByName(name)
        return connection.storageVolLookupByPath(layer.source)
    except libvirt.libvirtError:
        return None  # it lies in no pool, or in one that does not know it
