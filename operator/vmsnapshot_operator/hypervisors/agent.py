"""What the guest's agent says: its freeze state, its version, its file systems. Nothing it says is trusted."""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

from vmsnapshot_operator.core.machine import Agent, AgentState, FileSystem
from vmsnapshot_operator.hypervisors.calls import AGENT_COMMAND_FAILED, AGENT_COMMAND_TIMEOUT, sanitised

STATUS_SECONDS = 2
"""What a healthy agent needs to answer is some milliseconds; a hung one costs a plan no more than this."""

FILESYSTEMS_LIMIT = 1000

_NEEDED = ("guest-fsfreeze-freeze", "guest-fsfreeze-thaw")
_SAID_BY_THE_AGENT = frozenset({libvirt.VIR_ERR_INTERNAL_ERROR, AGENT_COMMAND_FAILED})
_UNKNOWN_COMMAND = (
    "CommandNotFound",
    "has not been found",
    "has been disabled",
    "not supported",
    "not currently supported",
)
_NO_AGENT = frozenset(
    {
        libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED,  # the domain has no channel for it
        libvirt.VIR_ERR_CONFIG_UNSUPPORTED,
        libvirt.VIR_ERR_NO_SUPPORT,  # a driver without agents, as libvirt's built-in double
        libvirt.VIR_ERR_OPERATION_INVALID,  # the domain does not run, or has just stopped
    }
)
_NO_ANSWER = frozenset({AGENT_COMMAND_TIMEOUT, AGENT_COMMAND_FAILED, libvirt.VIR_ERR_AGENT_UNSYNCED})


def ask(domain: Any) -> Agent:
    """Ask the agent of a running domain everything a plan needs. Blocking; each question has its own deadline."""
    domain.agentSetResponseTimeout(STATUS_SECONDS, 0)
    state, message = freeze_state(domain, STATUS_SECONDS)
    if state is not AgentState.THAWED:
        return Agent(state=state, message=message)
    version, missing = _abilities(domain)
    if missing:
        return Agent(
            state=AgentState.UNSUPPORTED, version=version, message=f"{', '.join(missing)} is disabled in the guest"
        )
    return Agent(state=state, version=version, os_id=_os_id(domain), filesystems=_filesystems(domain))


def freeze_state(domain: Any, seconds: int) -> tuple[AgentState, str]:
    """Return the agent's freeze state and its own words if it said no. Blocking; raises libvirtError."""
    try:
        word = _command(domain, "guest-fsfreeze-status", seconds)
    except libvirt.libvirtError as error:
        text = sanitised(str(error.get_error_message()))
        code = error.get_error_code()
        if code in _SAID_BY_THE_AGENT and any(unknown in text for unknown in _UNKNOWN_COMMAND):
            return AgentState.UNSUPPORTED, text
        if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
            return (AgentState.ABSENT if "not connected" in text else AgentState.SILENT), text
        if code in _NO_AGENT:
            return AgentState.ABSENT, text
        if code in _NO_ANSWER:
            return AgentState.SILENT, text
        raise
    if word == "thawed":
        return AgentState.THAWED, ""
    if word == "frozen":
        return AgentState.FROZEN, ""
    return AgentState.SILENT, f"the agent answered {sanitised(str(word))!r}"


def _command(domain: Any, name: str, seconds: int) -> Any:
    """Send one command; None for an answer that cannot be understood."""
    answer = libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": name}), seconds, 0)
    try:
        return json.loads(answer)["return"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _abilities(domain: Any) -> tuple[str, tuple[str, ...]]:
    """Return the agent's version, and which of the commands that we need it has been told to refuse."""
    try:
        info = _command(domain, "guest-info", STATUS_SECONDS)
    except libvirt.libvirtError:
        return "", ()  # the freeze itself will tell
    if not isinstance(info, dict):
        return "", ()
    listed = info.get("supported_commands")
    known = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    refused = {c.get("name") for c in known if c.get("enabled") is False}
    return sanitised(str(info.get("version", ""))), tuple(n for n in _NEEDED if n in refused)


def _filesystems(domain: Any) -> tuple[FileSystem, ...]:
    try:
        listed = domain.fsInfo()
    except (libvirt.libvirtError, ValueError):
        return ()  # an agent that cannot list them cannot show which disks it froze
    if len(listed) > FILESYSTEMS_LIMIT:
        return ()  # a part of the list would claim that disks are covered which are not
    return tuple(
        FileSystem(
            mountpoint=sanitised(str(mount)),
            device=sanitised(str(name)),
            type=sanitised(str(kind)),
            targets=tuple(targets or ()),
        )
        for mount, name, kind, targets in listed
    )


def _os_id(domain: Any) -> str:
    try:
        info = domain.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_OS, 0)
    except (libvirt.libvirtError, ValueError):
        return ""  # older agents do not tell
    return sanitised(str(info.get("os.id", "")))
