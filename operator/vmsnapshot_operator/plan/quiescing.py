"""Which way to make the VM stand still, why, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmsnapshot_operator.core.driver import CutKind
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.core.planning import (
    Method,
    OverlayRoom,
    Patience,
    PlannedGroup,
    Policy,
    QuiesceChoice,
    Refusal,
    Request,
    StorageClass,
)
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind

DEFAULT_BUDGET = Seconds(30.0)
WINDOWS_BUDGET = Seconds(
    8.0
)  # VSS holds writes for 10 s at most (Microsoft, "Overview of processing a backup under VSS")
WINDOWS_THAW = Seconds(60.0)
"""Windows lets the writes go at once and then ends its shadow copy, for more than 20 s at times (kubevirt#19166): only the
answer at the end tells whether the writes were held until then."""

FREEZABLE = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "gfs2", "jfs", "nilfs2", "ocfs2", "reiserfs", "bcachefs", "zonefs"}
)
"""Linux file systems that know how to be frozen; the agent passes over the others without a word (FIFREEZE: EOPNOTSUPP)."""

STILL = frozenset({"iso9660", "udf", "squashfs", "erofs", "cramfs", "romfs"})
"""Those that are only ever read: there is nothing to freeze."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """What the agent offers: the targets whose file systems it can freeze all, and how many it would freeze."""

    covered: frozenset[str]
    filesystems: int


def coverage(agent: Agent | None, mountpoints: Sequence[str]) -> Usable:
    """Return the disk targets of which every mounted file system would be frozen."""
    if agent is None:
        return Usable(covered=frozenset(), filesystems=0)
    mounted = [f for f in agent.filesystems if agent.is_windows or f.type not in STILL]
    wanted = [
        f
        for f in mounted
        if (not mountpoints or f.mountpoint in mountpoints) and (agent.is_windows or f.type in FREEZABLE)
    ]
    passed_over = [f for f in mounted if f not in wanted]
    if mountpoints and any(not f.targets for f in passed_over):
        return Usable(covered=frozenset(), filesystems=len({f.device for f in wanted}))  # it may lie on any disk
    missed = {t for f in passed_over for t in f.targets}
    covered = {t for f in wanted for t in f.targets} - missed
    # All that it freezes is counted, also what lies on no disk of the VM: else such a one could stand in for one that was missed.
    return Usable(covered=frozenset(covered), filesystems=len({f.device for f in wanted}))


def _agent_problem(agent: Agent | None, failed_before: str) -> tuple[str, str]:
    if failed_before:
        return "FreezeFailed", f"the guest could not be frozen: {failed_before}"
    if agent is None or agent.state is AgentState.ABSENT:
        return "AgentAbsent", "the guest has no agent that is connected (channel org.qemu.guest_agent.0)"
    if agent.state is AgentState.SILENT:
        return "AgentSilent", "the guest's agent is connected but does not answer"
    if agent.state is AgentState.UNSUPPORTED:
        return (
            "AgentTooOld",
            f"the guest's agent cannot freeze file systems: {agent.message or 'command not supported'}",
        )
    return "", ""


def _budget(request: Request, agent: Agent | None) -> Seconds:
    if request.max_frozen_seconds is not None:
        return Seconds(float(request.max_frozen_seconds))
    return WINDOWS_BUDGET if agent is not None and agent.is_windows else DEFAULT_BUDGET


MAX_CHAIN = 16
"""Layers of a disk, with the overlay: QEMU reads through each, and each is a file that must not be lost."""


def overlay_problem(machine: Machine, groups: Sequence[PlannedGroup], room: OverlayRoom | None) -> str:
    """Why no overlay can be put over these volumes now; empty if it can. In words for the user."""
    if room is None:
        return "its Hypervisor names no pool for overlays (spec.overlay.poolName)"
    if room.free_bytes is None:
        return f'the pool "{room.pool}" for overlays cannot be used: {room.problem}'
    if room.free_bytes < room.min_free_bytes:
        return (
            f'the pool "{room.pool}" for overlays has {room.free_bytes} bytes free, and spec.overlay.minFreeBytes asks for'
            f" {room.min_free_bytes}"
        )
    if not machine.persistent:
        return "the domain is transient: its definition would forget the overlays when it stops"
    for volume in (v for g in groups for v in g.volumes):
        layer = volume.writable
        if layer.kind is SourceKind.NETWORK and layer.protocol != "rbd":
            return f"disk {volume.label} is reached by {layer.protocol}, over which no overlay is made"
        if len(volume.backing) + 2 > MAX_CHAIN:
            return f"disk {volume.label} has {len(volume.backing) + 1} layers already, of {MAX_CHAIN} that it may have"
    return ""


def choose(
    request: Request,
    machine: Machine,
    groups: Sequence[PlannedGroup],
    classes: Sequence[StorageClass],
    failed_before: str = "",
    room: OverlayRoom | None = None,
) -> QuiesceChoice | Refusal:
    """Choose the quiesce method, or refuse.

    `failed_before`: what went wrong when the agent was used in an earlier attempt of the same snapshot. `room`: where overlays
    could be made.
    """
    budget = _budget(request, machine.agent)
    if machine.power is PowerState.SHUT_OFF:
        return _shut_off(request, machine, groups, budget)
    if machine.power is PowerState.PAUSED:
        return _paused(request, groups, classes, budget)
    if machine.power is not PowerState.RUNNING:
        return Refusal(
            reason="VMStateUnsupported",
            message=f"the VM is {machine.power} ({machine.power_reason or 'no reason given'}); it must run, be paused or be shut off",
        )
    over = _overlay(request, machine, groups, classes, room)
    if isinstance(over, Refusal):
        return over
    if request.policy is Policy.NEVER and over is None:
        return QuiesceChoice(method=Method.NONE, reason="policy Never: nothing is sent to the guest", budget=budget)
    return _running(request, machine, budget, failed_before, over)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Over:
    """That overlays are to be used, where, and why."""

    pool: str
    why: str


def _slow(groups: Sequence[PlannedGroup]) -> list[PlannedGroup]:
    """The groups whose cut takes longer than a guest should stand still."""
    return [g for g in groups if g.capabilities.cut.needs_overlay]


def _by_hypervisor(groups: Sequence[PlannedGroup]) -> list[PlannedGroup]:
    """The groups whose disks the hypervisor itself copies."""
    return [g for g in groups if g.capabilities.cut is CutKind.HYPERVISOR]


def _told(groups: Sequence[PlannedGroup]) -> str:
    return ", ".join(f'"{g.class_name}" ({g.capabilities.cut})' for g in groups)


def _overlay(
    request: Request,
    machine: Machine,
    groups: Sequence[PlannedGroup],
    classes: Sequence[StorageClass],
    room: OverlayRoom | None,
) -> _Over | Refusal | None:
    """Whether overlays are to be used: because they were asked for, or because a class cannot cut in an instant."""
    slow = _slow(groups)
    asked = request.method == Method.HYPERVISOR_SNAPSHOT
    if not slow and not asked:
        return None
    problem = (
        f"class {_told(by)} has the hypervisor copy its disks, of another moment than the switch to overlays"
        if (by := _by_hypervisor(groups))
        else overlay_problem(machine, groups, room)
    )
    if not problem and (asked or request.method == Method.AUTO):
        why = "asked for by spec.quiesce.method" if asked else f"class {_told(slow)} cannot cut in an instant"
        return _Over(pool=room.pool if room is not None else "", why=why)
    allowed = {c.name for c in classes if c.allow_under_freeze}
    if not asked and all(g.capabilities.cut is CutKind.REMOTE and g.class_name in allowed for g in slow):
        return None
    if asked:
        return Refusal(
            reason="OverlayNotAvailable", message=f"quiesce method HypervisorSnapshot cannot be used: {problem}"
        )
    what = f"class {_told(slow)} cannot cut in an instant, so the VM has to write to overlays meanwhile"
    if not problem:
        return Refusal(
            reason="OverlayNotAvailable",
            message=f"{what}; spec.quiesce.method is {request.method}: use Auto or HypervisorSnapshot, or exclude these disks",
        )
    return Refusal(
        reason="OverlayNotAvailable",
        message=f"{what}, but {problem}; mend that, use storage with reflink or native snapshots for these disks, or exclude them",
    )


def _paused(
    request: Request, groups: Sequence[PlannedGroup], classes: Sequence[StorageClass], budget: Seconds
) -> QuiesceChoice | Refusal:
    allowed = {c.name for c in classes if c.allow_under_freeze}
    slow = [g for g in _slow(groups) if not (g.capabilities.cut is CutKind.REMOTE and g.class_name in allowed)]
    if slow or request.method == Method.HYPERVISOR_SNAPSHOT:
        why = f"class {_told(slow)} cannot cut in an instant" if slow else "HypervisorSnapshot was asked for"
        return Refusal(
            reason="VMPaused",
            message=f"the VM is paused, and {why}: no overlay is put under a VM that may go on at any moment; resume it, or shut it down",
            patience=Patience.WAIT,
        )
    if request.policy is Policy.REQUIRE:
        return Refusal(
            reason="VMPaused",
            message="the VM is paused: its file systems cannot be frozen, and policy Require accepts nothing less; resume it",
        )
    return QuiesceChoice(method=Method.NONE, reason="the VM is paused already: it stands still as it is", budget=budget)


def is_raw_in_a_pool(layer: Layer) -> bool:
    """Whether libvirt's storage API can copy an image."""
    return layer.kind in (SourceKind.FILE, SourceKind.VOLUME) and layer.format == "raw" and bool(layer.pool)


def _shut_off(
    request: Request, machine: Machine, groups: Sequence[PlannedGroup], budget: Seconds
) -> QuiesceChoice | Refusal:
    by = _by_hypervisor(groups)
    if unable := [v.label for g in by for v in g.volumes if not is_raw_in_a_pool(v.writable)]:
        return Refusal(
            reason="BackupNeedsRunningVM",
            message=(
                f"the VM is shut off, and class {_told(by)} has the hypervisor copy its disks, which it does of a VM that runs;"
                f" disk {', '.join(unable)} is no raw volume of a libvirt pool, which could be copied without it; start the VM,"
                " or use another class"
            ),
        )
    if request.policy is Policy.REQUIRE and not machine.shut_down_from_within:
        return Refusal(
            reason="VMNotCleanlyShutDown",
            message=(
                f"the VM is shut off, but not known to have been shut down from within ({machine.power_reason or 'unknown'}): its"
                " file systems may be dirty, and policy Require accepts nothing less than clean ones; start it and shut it"
                " down, or use policy Prefer"
            ),
        )
    return QuiesceChoice(
        method=Method.NONE, reason="the VM is shut off: its disks stand still as they are", budget=budget
    )


def _running(
    request: Request, machine: Machine, budget: Seconds, failed_before: str, over: _Over | None
) -> QuiesceChoice | Refusal:
    if over is None and request.method == Method.PAUSE:
        if request.policy is Policy.REQUIRE:
            return Refusal(
                reason="PolicyNotMet",
                message="quiesce method Pause gives crash consistency at best, and policy Require accepts nothing less than Filesystem",
            )
        return QuiesceChoice(
            method=Method.PAUSE, reason="asked for by spec.quiesce.method", budget=budget, holds_vm=True
        )
    if over is None and request.method not in (Method.AUTO, Method.GUEST_AGENT):
        return QuiesceChoice(
            method=request.method, reason="asked for by spec.quiesce.method", budget=budget, holds_vm=True
        )
    if over is not None and request.policy is Policy.NEVER:
        return _overlaid(over, f"{over.why}; policy Never: nothing is sent to the guest", budget)
    used = _by_agent(request, machine, failed_before)
    if isinstance(used, Refusal):
        return used
    if isinstance(used, Usable):
        chosen = _frozen(request, budget, used, over)
        is_windows = machine.agent is not None and machine.agent.is_windows
        return replace(chosen, thaw_timeout=WINDOWS_THAW) if is_windows else chosen
    if request.policy is Policy.REQUIRE:
        return Refusal(
            reason=used.reason,
            message=f"{used.message}; policy Require accepts nothing less than frozen file systems (use Prefer to fall back)",
        )
    if over is not None:
        return _overlaid(over, f"{over.why}; {used.message}; policy Prefer goes without a freeze", budget)
    return QuiesceChoice(
        method=Method.PAUSE, reason=f"{used.message}; policy Prefer falls back to a pause", budget=budget, holds_vm=True
    )


def _frozen(request: Request, budget: Seconds, used: Usable, over: _Over | None) -> QuiesceChoice:
    """By the agent, and nothing else or around a switch to overlays."""
    if over is not None:
        why = f"{over.why}; the guest's agent freezes its file systems around the switch"
        return _overlaid(over, why, budget, used, request.mountpoints)
    asked = request.method == Method.GUEST_AGENT
    return QuiesceChoice(
        method=Method.GUEST_AGENT,
        reason="asked for by spec.quiesce.method"
        if asked
        else "every class cuts in an instant and the guest's agent answers",
        budget=budget,
        mountpoints=request.mountpoints,
        expected_filesystems=used.filesystems,
        holds_vm=True,
    )


def _overlaid(
    over: _Over, reason: str, budget: Seconds, used: Usable | None = None, mountpoints: tuple[str, ...] = ()
) -> QuiesceChoice:
    return QuiesceChoice(
        method=Method.HYPERVISOR_SNAPSHOT,
        reason=reason,
        budget=budget,
        mountpoints=mountpoints,
        expected_filesystems=used.filesystems if used is not None else 0,
        holds_vm=True,
        overlay_pool=over.pool,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Useless:
    """Why the agent is of no use; another way to make the VM stand still may do."""

    reason: str
    message: str


def _by_agent(request: Request, machine: Machine, failed_before: str) -> Usable | _Useless | Refusal:
    """What can be frozen through the agent; or why nothing; or a refusal, where no other way would do either."""
    agent = machine.agent
    if agent is not None and agent.state is AgentState.FROZEN and not failed_before:
        return Refusal(
            reason="AlreadyFrozen",
            message=(
                "the guest's file systems are frozen already, by somebody else: nothing was sent to the guest; thaw it"
                " (virsh domfsthaw) if no other backup is running"
            ),
            patience=Patience.WAIT,
        )
    reason, problem = _agent_problem(agent, failed_before)
    if problem:
        return _Useless(reason=reason, message=problem)
    if request.mountpoints:
        known = {f.mountpoint for f in agent.filesystems} if agent is not None else set()
        if missing := [m for m in request.mountpoints if m not in known]:
            return Refusal(
                reason="MountpointNotFound",
                message=f"the guest has no file system mounted at {', '.join(missing)}; it has {', '.join(sorted(known)) or 'none'}",
            )
    usable = coverage(agent, request.mountpoints)
    if not usable.covered:
        return _Useless(
            reason="NoFileSystems",
            message="the guest's agent lists no file system on any disk: there is nothing to freeze",
        )
    return usable
