"""Whether the variables of a VM's firmware are captured beside its disks: where a class can, else left out by name. Pure.

A guest writes to them while its file systems are frozen, and no overlay is put over them. So of a VM that runs only a driver
takes them that cuts a file in an instant; of one that is off any driver that serves the file. Other than a disk, they are left out
where no class takes them: firmware can begin anew with variables of its own, and a VM cannot without a disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vmsnapshot_operator.core.driver import CutKind, Fit
from vmsnapshot_operator.core.machine import DeviceKind, Machine, PowerState
from vmsnapshot_operator.core.planning import Candidates, Excluded, StorageClass
from vmsnapshot_operator.core.volumes import NVRAM, Volume
from vmsnapshot_operator.plan import grouping
from vmsnapshot_operator.plan.disks import Selection
from vmsnapshot_operator.plan.quiescing import is_raw_in_a_pool

_RULE = DeviceKind.NVRAM.upper()


def limited(selection: Selection, machine: Machine, classes: Sequence[StorageClass], fits: Candidates) -> Candidates:
    """Return what the drivers answered, without the classes that would cut the variables otherwise than they can be cut now."""
    found = _of(selection)
    if found is None:
        return fits
    answers: dict[str, Fit] = dict(fits.get(found.id, {}))
    for cls in classes:
        if cls.capabilities is not None and (no := _unable(cls.capabilities.cut, found, machine.power)) is not None:
            answers[cls.name] = no
    return {**fits, found.id: answers}


def placed(selection: Selection, classes: Sequence[StorageClass], fits: Candidates) -> Selection:
    """Return the selection without the variables, and with a word on why, if no class takes them."""
    found = _of(selection)
    if found is None or not (why := grouping.unserved(found, classes, fits.get(found.id, {}))):
        return selection
    said = "the variables of the firmware are not captured"
    message = (
        f"{said}: {found.writable.source}: {why}. To have them captured while the VM runs, make the folder of this file a"
        " libvirt storage pool on a file system with reflink, and add a StorageDriverClass that matches it"
    )
    return replace(
        selection,
        volumes=tuple((t, v) for t, v in selection.volumes if not v.is_nvram),
        excluded=(*selection.excluded, Excluded(name=NVRAM, rule=_RULE, message=message)),
        notes=(*selection.notes, f"{said} ({NVRAM})"),
    )


def _of(selection: Selection) -> Volume | None:
    return next((v for _, v in selection.volumes if v.is_nvram), None)


def _unable(cut: CutKind, volume: Volume, power: PowerState) -> Fit | None:
    if power is not PowerState.SHUT_OFF:
        slow = (
            "it cannot cut in an instant, and the VM, which is not off, may write to them: no overlay is put over them"
        )
        return None if cut is CutKind.INSTANT else Fit(ok=False, reason="OverlayNotAvailable", message=slow)
    if cut is CutKind.HYPERVISOR and not is_raw_in_a_pool(volume.writable):
        other = "they are no raw volume of a libvirt pool, which could be copied without the hypervisor"
        return Fit(ok=False, reason="BackupNeedsRunningVM", message=other)
    return None
