"""Which way to make the VM stand still, why, and for how long at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vmsnapshot_operator.core.driver import CutKind
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.core.planning import (
    Method,
    Patience,
    PlannedGroup,
    Policy,
    QuiesceChoice,
    Refusal,
    Request,
    StorageClass,
)
from vmsnapshot_operator.core.volumes import Seconds

DEFAULT_BUDGET = Seconds(30.0)
WINDOWS_BUDGET = Seconds(
    8.0
)  # VSS holds writes for 10 s at most (Microsoft, "Overview of processing a backup under VSS")


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


def _copying(groups: Sequence[PlannedGroup], classes: Sequence[StorageClass]) -> Refusal | None:
    allowed = {c.name for c in classes if c.allow_under_freeze}
    slow = [
        g
        for g in groups
        if g.capabilities.cut is CutKind.COPY or (g.capabilities.cut is CutKind.REMOTE and g.class_name not in allowed)
    ]
    if not slow:
        return None
    names = ", ".join(f'"{g.class_name}" ({g.capabilities.cut})' for g in slow)
    return Refusal(
        reason="OverlayNotAvailable",
        message=(
            f"class {names} cannot cut in an instant: it needs the quiesce method HypervisorSnapshot, which this version does"
            " not have; use storage with reflink or native snapshots for these disks, or exclude them"
        ),
    )


def choose(
    request: Request,
    machine: Machine,
    groups: Sequence[PlannedGroup],
    classes: Sequence[StorageClass],
    failed_before: str = "",
) -> QuiesceChoice | Refusal:
    """Choose the quiesce method, or refuse.

    `failed_before`: what went wrong when the agent was used in an earlier attempt of the same snapshot.
    """
    if request.method == Method.HYPERVISOR_SNAPSHOT:
        return Refusal(
            reason="OverlayNotAvailable",
            message="quiesce method HypervisorSnapshot is not in this version; use Auto, GuestAgent or Pause",
        )
    if (refusal := _copying(groups, classes)) is not None:
        return refusal
    budget = _budget(request, machine.agent)
    if machine.power is PowerState.SHUT_OFF:
        return _shut_off(request, machine, budget)
    if machine.power is PowerState.PAUSED:
        if request.policy is Policy.REQUIRE:
            return Refusal(
                reason="VMPaused",
                message="the VM is paused: its file systems cannot be frozen, and policy Require accepts nothing less; resume it",
            )
        return QuiesceChoice(
            method=Method.NONE, reason="the VM is paused already: it stands still as it is", budget=budget
        )
    if machine.power is not PowerState.RUNNING:
        return Refusal(
            reason="VMStateUnsupported",
            message=f"the VM is {machine.power} ({machine.power_reason or 'no reason given'}); it must run, be paused or be shut off",
        )
    if request.policy is Policy.NEVER:
        return QuiesceChoice(method=Method.NONE, reason="policy Never: nothing is sent to the guest", budget=budget)
    return _running(request, machine, budget, failed_before)


def _shut_off(request: Request, machine: Machine, budget: Seconds) -> QuiesceChoice | Refusal:
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


def _running(request: Request, machine: Machine, budget: Seconds, failed_before: str) -> QuiesceChoice | Refusal:
    agent = machine.agent
    if request.method == Method.PAUSE:
        if request.policy is Policy.REQUIRE:
            return Refusal(
                reason="PolicyNotMet",
                message="quiesce method Pause gives crash consistency at best, and policy Require accepts nothing less than Filesystem",
            )
        return QuiesceChoice(
            method=Method.PAUSE, reason="asked for by spec.quiesce.method", budget=budget, holds_vm=True
        )
    if request.method not in (Method.AUTO, Method.GUEST_AGENT):
        return QuiesceChoice(
            method=request.method, reason="asked for by spec.quiesce.method", budget=budget, holds_vm=True
        )
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
    usable = coverage(agent, request.mountpoints)
    if not problem and request.mountpoints:
        known = {f.mountpoint for f in agent.filesystems} if agent is not None else set()
        if missing := [m for m in request.mountpoints if m not in known]:
            return Refusal(
                reason="MountpointNotFound",
                message=f"the guest has no file system mounted at {', '.join(missing)}; it has {', '.join(sorted(known)) or 'none'}",
            )
    if not problem and not usable.covered:
        reason, problem = (
            "NoFileSystems",
            "the guest's agent lists no file system on any disk: there is nothing to freeze",
        )
    if not problem:
        return QuiesceChoice(
            method=Method.GUEST_AGENT,
            reason=(
                "asked for by spec.quiesce.method"
                if request.method == Method.GUEST_AGENT
                else "every class cuts in an instant and the guest's agent answers"
            ),
            budget=budget,
            mountpoints=request.mountpoints,
            expected_filesystems=usable.filesystems,
            holds_vm=True,
        )
    if request.policy is Policy.REQUIRE:
        return Refusal(
            reason=reason,
            message=f"{problem}; policy Require accepts nothing less than frozen file systems (use Prefer to fall back to a pause)",
        )
    return QuiesceChoice(
        method=Method.PAUSE, reason=f"{problem}; policy Prefer falls back to a pause", budget=budget, holds_vm=True
    )
