"""What the guest's agent says: its freeze state, its file systems, its operating system. Text from it is never trusted."""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

from vmsnapshot_operator.core.machine import Agent, AgentState, FileSystem
from vmsnapshot_operator.hypervisors.calls import AGENT_COMMAND_FAILED, AGENT_COMMAND_TIMEOUT, sanitised

STATUS_SECONDS = 2
"""What a healthy agent needs to answer is some milliseconds; a hung one costs a plan no more than this."""

_UNKNOWN_COMMAND = ("CommandNotFound", "not found", "has been disabled", "not supported")


def ask(domain: Any) -> Agent:
    """Ask the agent of a running domain everything a plan needs. Blocking; each question has its own deadline."""
    state, message = freeze_state(domain, STATUS_SECONDS)
    if state is not AgentState.THAWED:
        return Agent(state=state, message=message)
    return Agent(state=state, os_id=_os_id(domain), filesystems=_filesystems(domain))


def freeze_state(domain: Any, seconds: int) -> tuple[AgentState, str]:
    """Return the agent's freeze state and its own words if it said no."""
    try:
        answer = libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-fsfreeze-status"}', seconds, 0)
    except libvirt.libvirtError as error:
        text = sanitised(str(error.get_error_message()))
        code = error.get_error_code()
        if any(word in text for word in _UNKNOWN_COMMAND):
            return AgentState.UNSUPPORTED, text
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE and "not connected" not in text:
            return AgentState.SILENT, text
        if code in (libvirt.VIR_ERR_AGENT_UNRESPONSIVE, libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
            return AgentState.ABSENT, text
        if code in (AGENT_COMMAND_TIMEOUT, libvirt.VIR_ERR_AGENT_UNSYNCED, AGENT_COMMAND_FAILED):
            return AgentState.SILENT, text
        if code == libvirt.VIR_ERR_OPERATION_INVALID:
            return AgentState.ABSENT, text  # the domain does not run, or has just stopped
        raise
    word = json.loads(answer).get("return")
    if word == "thawed":
        return AgentState.THAWED, ""
    if word == "frozen":
        return AgentState.FROZEN, ""
    return AgentState.SILENT, f"the agent answered {sanitised(str(word))!r}"


def _filesystems(domain: Any) -> tuple[FileSystem, ...]:
    try:
        listed = domain.fsInfo()
    except libvirt.libvirtError:
        return ()  # an agent that cannot list them cannot show which disks it froze
    return tuple(
        FileSystem(
            mountpoint=sanitised(str(mount)), device=sanitised(str(name)), type=sanitised(str(kind)), targets=tuple(targets or ())
        )
        for mount, name, kind, targets in listed
    )


def _os_id(domain: Any) -> str:
    try:
        info = domain.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_OS, 0)
    except libvirt.libvirtError:
        return ""  # older agents do not tell
    return sanitised(str(info.get("os.id", "")))
