"""Domains as they are defined, started and stopped: what a restore does to them. Not what their definitions say (`plan`).

Nothing here blocks the event loop; everything raises HypervisorError or a child of it, and what is said besides. Each of
these can be repeated: what is so already is left so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import libvirt

from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DomainGoneError,
    HypervisorError,
    NotPermittedError,
)
from vmsnapshot_operator.hypervisors import agent as agents
from vmsnapshot_operator.hypervisors.description import power_of
from vmsnapshot_operator.hypervisors.domain_xml import element
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.hypervisors.window import ACT_TIMEOUT, Permit, always

DEFINE_TIMEOUT = Seconds(30.0)
START_TIMEOUT = Seconds(120.0)
"""A start waits for the host's devices, networks and storage."""

_POLL = Seconds(0.5)
_ASK_AGAIN = Seconds(15.0)
"""A guest that is still booting takes no notice of the first request."""

_AGENT_SECONDS = 2
_AGENT_CHANNEL = "org.qemu.guest_agent.0"
_INACTIVE, _SECURE = libvirt.VIR_DOMAIN_XML_INACTIVE, libvirt.VIR_DOMAIN_XML_SECURE


@dataclass(frozen=True, slots=True, kw_only=True)
class Defined:
    """A domain as libvirt keeps it. `xml` is the definition that the next start takes, without secrets.

    `managed_save`: its memory is saved, and a start would go on from there instead of booting from its disks.
    """

    ref: Ref
    xml: str
    power: PowerState
    persistent: bool
    autostart: bool
    managed_save: bool
    agent_channel: bool


async def look(hypervisor: Hypervisor, domain: str) -> tuple[Defined, ...]:
    """Look a domain up by UUID or name: the one that runs, else all definitions of it, in the order of the endpoints; none if none has it.

    Raises as `Hypervisor.find`.
    """
    try:
        places = await hypervisor.definitions(domain)
    except DomainGoneError as error:
        if error.ambiguous:
            raise
        return ()
    return await _look_at(hypervisor, places)


async def look_everywhere(hypervisor: Hypervisor, uuid: str) -> tuple[Defined, ...]:
    """Look at every definition of a domain, also where another one of it runs: that which runs first; none if none has it.

    Raises as `Hypervisor.places`: unless all endpoints answer there may be another one.
    """
    try:
        places = await hypervisor.places(Ref(uuid=uuid, name=uuid, endpoint=""))
    except DomainGoneError:
        return ()
    return await _look_at(hypervisor, places)


async def _look_at(hypervisor: Hypervisor, places: Sequence[Ref]) -> tuple[Defined, ...]:
    seen = [await look_on(hypervisor, ref) for ref in places]
    return tuple(d for d in seen if d is not None)


async def look_on(hypervisor: Hypervisor, ref: Ref) -> Defined | None:
    """Look at the definition on this very endpoint, whether the domain runs there or elsewhere; None if it is not there any more."""

    def look(connection: Any) -> Defined:
        return _look(connection.lookupByUUIDString(ref.uuid), ref)

    try:
        return await hypervisor.act_on(ref.endpoint, f"look at {ref.name}", look, timeout=ACT_TIMEOUT)
    except DomainGoneError:
        return None  # it went away meanwhile


async def redefine(
    hypervisor: Hypervisor,
    ref: Ref,
    change: Callable[[str], str],
    *,
    take_back: bool = False,
    permit: Permit = always,
) -> None:
    """Change the definition of a domain that is off: `change` gets it with its secrets, and returns what is defined.

    Raises HypervisorError with reason VMRunning if the domain runs, before or after: then nobody can say with which
    definition it was started, unless (`take_back`) with the changed one it cannot be: the one before is put back then. VMSaved
    if its memory is saved: a start would take the definition saved with that. NotPermittedError if `permit`, asked right before
    the deed, says no. What `change` raises is passed on. With the last three nothing was changed.
    """

    def act(domain: Any) -> None:
        _redefine(domain, change, permit, take_back=take_back)

    await hypervisor.act(ref, f"definition of {ref.name}", act, timeout=DEFINE_TIMEOUT)


async def define(hypervisor: Hypervisor, endpoint: str, xml: str) -> Ref:
    """Define a new domain on one endpoint, unless it is defined already, on whatever endpoint.

    Raises HypervisorError with reason NameTaken if another one is of that name, or of that UUID: it is left as it is.
    """
    root = element(xml)
    name, uuid = root.findtext("name") or "", (root.findtext("uuid") or "").lower()
    try:
        there = await hypervisor.find(name)
    except DomainGoneError as error:
        if error.ambiguous:
            raise _taken(name, error.message) from error
    else:
        if there.uuid == uuid:
            return there
        raise _taken(name, f"it has the UUID {there.uuid}")
    return await hypervisor.act_on(
        endpoint, f"define {name}", lambda c: _define(c, xml, endpoint), timeout=DEFINE_TIMEOUT
    )


async def undefine(hypervisor: Hypervisor, ref: Ref, *, nvram: bool) -> None:
    """Forget a domain that is off, by its UUID; one that is not there is no error.

    `nvram`: delete its firmware's variables, too (of a VM that we made); else they stay. Its disks stay in any case. Raises
    HypervisorError with reason VMRunning if it runs, and if it has snapshots or checkpoints of libvirt's: somebody uses it.
    """
    try:
        await hypervisor.act(ref, f"undefine {ref.name}", lambda d: _undefine(d, nvram=nvram), timeout=DEFINE_TIMEOUT)
    except DomainGoneError:
        return


async def set_autostart(hypervisor: Hypervisor, ref: Ref, *, on: bool) -> None:
    """Say whether a domain starts with its host."""
    await hypervisor.act(ref, f"autostart of {ref.name}", lambda d: d.setAutostart(int(on)))


async def start(hypervisor: Hypervisor, ref: Ref) -> None:
    """Boot a domain from its disks; one that runs is left running. Memory saved from before is thrown away.

    Raises HypervisorError, with libvirt's words, if it cannot be started: those of a gate name the VMRestore.
    """
    await hypervisor.act(ref, f"start of {ref.name}", _start, timeout=START_TIMEOUT)


async def stop(
    hypervisor: Hypervisor, ref: Ref, limit: Seconds, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> bool:
    """Shut a domain down from within; switch it off if it does not go down within `limit` seconds, or cannot.

    Returns whether it went down by itself: its file systems are clean then. Raises HypervisorError with reason
    VMNotStopped if it is not off in the end, VMTransient for a domain of which nothing would be left.
    """
    await hypervisor.act(ref, f"look at {ref.name}", _must_stay)
    end, again = time.monotonic() + limit, time.monotonic()
    by_itself = True
    while (power := await hypervisor.act(ref, f"state of {ref.name}", _power)) is not PowerState.SHUT_OFF:
        now = time.monotonic()
        if now >= end + START_TIMEOUT:
            raise HypervisorError(
                f"domain {ref.name} does not stay off: something starts it again", reason="VMNotStopped"
            )
        if now >= end or power in (PowerState.PAUSED, PowerState.CRASHED, PowerState.SUSPENDED):
            by_itself = False
            await hypervisor.act(ref, f"switch {ref.name} off", _destroy, timeout=START_TIMEOUT)
            continue
        if now >= again:
            again = now + _ASK_AGAIN
            await _ask_to_shut_down(hypervisor, ref, Seconds(max(end - now, 1.0)))
        await sleep(_POLL)
    return by_itself and await hypervisor.act(ref, f"state of {ref.name}", _was_shut_down)


async def wait_for_agent(
    hypervisor: Hypervisor, ref: Ref, limit: Seconds, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
) -> tuple[AgentState, str]:
    """Wait until a domain's agent answers, at most `limit` seconds; return what it said last, with words.

    Raises HypervisorError with reason VMStopped if the domain does not run (any more).
    """
    end = time.monotonic() + limit
    while True:
        power, state, text = await hypervisor.act(ref, f"agent of {ref.name}", _agent)
        if power is not PowerState.RUNNING:
            raise HypervisorError(f"domain {ref.name} does not run: it is {power}", reason="VMStopped")
        # One that cannot freeze, or is frozen, answers all the same: the guest is up.
        if state not in (AgentState.ABSENT, AgentState.SILENT) or time.monotonic() >= end:
            return state, text
        await sleep(_POLL)


async def _ask_to_shut_down(hypervisor: Hypervisor, ref: Ref, limit: Seconds) -> None:
    try:
        await hypervisor.act(ref, f"shutdown of {ref.name}", _shut_down, timeout=limit)
    except CallTimeoutError:
        return  # the agent may hang; what comes of it is seen in the domain's state


def _taken(name: str, why: str) -> HypervisorError:
    return HypervisorError(f'there is a VM of the name "{name}" already: {why}', reason="NameTaken")


# --- blocking, in a thread of their own --------------------------------------------------------------------------------


def _look(domain: Any, ref: Ref) -> Defined:
    xml = domain.XMLDesc(_INACTIVE)
    persistent = bool(domain.isPersistent())
    return Defined(
        ref=ref,
        xml=xml,
        power=_power(domain),
        persistent=persistent,
        autostart=persistent and bool(domain.autostart()),
        managed_save=persistent and bool(domain.hasManagedSaveImage()),
        agent_channel=any(
            target.get("name") == _AGENT_CHANNEL for target in element(xml).findall("devices/channel/target")
        ),
    )


def _redefine(domain: Any, change: Callable[[str], str], permit: Permit, *, take_back: bool) -> None:
    _must_be_off(domain)
    if domain.hasManagedSaveImage():
        raise HypervisorError(
            f"domain {domain.name()} was saved with its memory, which goes with its disks as they are now: start it and shut it"
            " down, or throw its memory away (virsh managedsave-remove)",
            reason="VMSaved",
        )
    before = domain.XMLDesc(_INACTIVE | _SECURE)
    after = change(before)
    if after == before:
        _must_be_off(domain)
        return
    if why := permit():
        raise NotPermittedError(f"domain {domain.name()} was not defined anew: {why}")
    domain.connect().defineXML(after)
    try:
        _must_be_off(domain)
    except HypervisorError:
        if take_back:
            domain.connect().defineXML(before)
        raise


def _define(connection: Any, xml: str, endpoint: str) -> Ref:
    try:
        made = connection.defineXML(xml)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_FAILED:
            # It came up since it was looked for, or its UUID is another one's.
            raise _taken((element(xml).findtext("name") or ""), str(error.get_error_message())) from error
        raise
    return Ref(uuid=made.UUIDString(), name=made.name(), endpoint=endpoint)


def _undefine(domain: Any, *, nvram: bool) -> None:
    _must_be_off(domain)
    keep = libvirt.VIR_DOMAIN_UNDEFINE_NVRAM if nvram else libvirt.VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
    domain.undefineFlags(keep | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)


def _start(domain: Any) -> None:
    if domain.isActive():
        return
    try:
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_FORCE_BOOT)
    except libvirt.libvirtError:
        if not domain.isActive():  # else somebody else was faster
            raise


def _must_be_off(domain: Any) -> None:
    if domain.isActive():
        raise HypervisorError(f"domain {domain.name()} runs: its disks are in use", reason="VMRunning")


def _must_stay(domain: Any) -> None:
    if not domain.isPersistent():
        raise HypervisorError(
            f"domain {domain.name()} is transient: nothing would be left of it if it were stopped", reason="VMTransient"
        )


def _power(domain: Any) -> PowerState:
    # A domain that is shut down is reported so before its process has ended, while its disks are still in use.
    return PowerState.SHUT_OFF if not domain.isActive() else power_of(domain)[0]


def _was_shut_down(domain: Any) -> bool:
    return bool(power_of(domain)[1] == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN)


def _shut_down(domain: Any) -> None:
    try:
        domain.shutdown()
    except libvirt.libvirtError:
        # It went down meanwhile, or cannot be asked: its state tells, and the time limit decides.
        return


def _destroy(domain: Any) -> None:
    try:
        domain.destroy()
    except libvirt.libvirtError:
        if domain.isActive():
            raise


def _agent(domain: Any) -> tuple[PowerState, AgentState, str]:
    power = _power(domain)
    if power is not PowerState.RUNNING:
        return power, AgentState.ABSENT, ""
    state, text = agents.freeze_state(domain, _AGENT_SECONDS)
    return power, state, text
