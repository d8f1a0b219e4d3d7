"""Put the choices together: one plan for one snapshot of one VM, or the first refusal on the way."""

from __future__ import annotations

from collections.abc import Sequence

from vmsnapshot_operator.core.machine import Machine, PowerState
from vmsnapshot_operator.core.planning import (
    Candidates,
    OverlayRoom,
    Patience,
    Plan,
    PlannedVolume,
    Policy,
    Refusal,
    Request,
    StorageClass,
)
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.plan import definition, disks, grouping, nvram, quiescing


def make_plan(
    request: Request,
    machine: Machine,
    classes: Sequence[StorageClass],
    fits: Candidates,
    *,
    strategy: str = "Storage",
    failed_before: str = "",
    room: OverlayRoom | None = None,
) -> Plan | Refusal:
    """Decide everything about one snapshot, as things are now. Pure; never raises for bad input, refuses instead."""
    if machine.migrating:
        return Refusal(
            reason="VMMigrating",
            message="the VM is being migrated: its disks and its agent are between two hosts; waiting until it has arrived",
            patience=Patience.WAIT,
        )
    if machine.copied_into is not None:
        return Refusal(
            reason="BackupRunning",
            message=(
                "the hypervisor is copying disks of the VM already, for another snapshot or another program (into"
                f" {', '.join(machine.copied_into) or 'what its client reads'}), and does one such job at a time; waiting until"
                " it has ended"
            ),
            patience=Patience.WAIT,
        )
    if (gated := _gated(machine)) is not None:
        return gated
    selection = disks.select(machine, request.exclude)
    if isinstance(selection, Refusal):
        return selection
    fits = nvram.limited(selection, machine, classes, fits)
    selection = nvram.placed(selection, classes, fits)
    chosen = grouping.assign(selection.volumes, classes, fits)
    if isinstance(chosen, Refusal):
        return chosen
    groups = grouping.group(selection.volumes, chosen, classes)
    quiesce = quiescing.choose(request, machine, groups, classes, failed_before, room)
    if isinstance(quiesce, Refusal):
        return quiesce
    covered = (
        quiescing.coverage(machine.agent, request.mountpoints).covered if quiesce.expected_filesystems else frozenset()
    )
    volumes = tuple(
        PlannedVolume(
            target=target,
            volume=volume,
            class_name=chosen[target].class_name,
            reason=chosen[target].reason,
            unsafe=target in selection.unsafe,
            covered=target in covered,
        )
        for target, volume in selection.volumes
    )
    if (refusal := _require(request, machine, volumes)) is not None:
        return refusal
    uncovered = [v.target for v in volumes if not v.covered and not v.volume.is_nvram]
    notes = list(selection.notes)
    if quiesce.expected_filesystems and uncovered:
        notes.append(
            f"the agent lists no file system on {', '.join(uncovered)}: no file-system consistency is claimed there"
        )
    return Plan(
        vm_name=machine.name,
        vm_uuid=machine.uuid,
        endpoint=machine.endpoint,
        run_id=machine.run_id,
        power=machine.power,
        strategy=strategy,
        strategy_reason=(
            "asked for by spec.strategyName"
            if request.strategy == strategy
            else "every disk has a storage driver class"
        ),
        quiesce=quiesce,
        volumes=volumes,
        groups=groups,
        excluded=selection.excluded,
        notes=tuple(notes),
        definition=machine.definition,
    )


def _gated(machine: Machine) -> Refusal | None:
    """Why a VM waits whose disks are neither old nor new: its definition does not have them then."""
    try:
        gate = definition.gate_of(machine.definition) if machine.definition else None
    except RefusedError as error:
        return Refusal(reason=error.reason, message=error.message)
    if gate is None:
        return None
    message = f"VMRestore {gate.marker.restore} sets the VM's disks back; waiting until it has ended"
    return Refusal(reason="VMBusy", message=message, patience=Patience.WAIT)


def _require(request: Request, machine: Machine, volumes: Sequence[PlannedVolume]) -> Refusal | None:
    """Refuse now what policy Require could not keep afterwards, before the VM is touched for nothing."""
    if request.policy is not Policy.REQUIRE:
        return None
    unsafe = [v.target for v in volumes if v.unsafe]
    if unsafe:
        return Refusal(
            reason="PolicyNotMet",
            message=f"disk {', '.join(unsafe)} has cache=unsafe and ignores flushes: policy Require cannot be kept; use another cache mode",
        )
    uncovered = [v.target for v in volumes if not v.covered and not v.volume.is_nvram]
    if machine.power is PowerState.RUNNING and uncovered:
        return Refusal(
            reason="PolicyNotMet",
            message=(
                f"disk {', '.join(uncovered)} bears no file system that would be frozen: policy Require cannot be kept for it;"
                " exclude it (spec.volumes.exclude), or use policy Prefer"
            ),
        )
    return None
