"""Free one VM, again and again until it is free: thaw until the agent says so, or resume."""

from __future__ import annotations

import json
import time

import libvirt
import libvirt_qemu

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import UnreadableJournalError
from vmsnapshot_operator.guardian.log import say

AGENT_SECONDS = 3
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


def free(uri: str, domain: str, method: str, nonce: str) -> None:
    """Return once the VM is free, on a connection of its own; never gives up before.

    A domain that is gone or does not run is free. So is one that bears no journal, or another one: somebody confirmed that
    ours is over, and what holds it now is not ours to end.
    """
    pause = _FIRST_PAUSE
    while True:
        try:
            if _once(uri, domain, method, nonce):
                return
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            say("not free yet", domain=domain, why=error.get_error_message())
        time.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 2)


def _once(uri: str, domain: str, method: str, nonce: str) -> bool:
    connection = libvirt.open(uri)
    try:
        found = connection.lookupByUUIDString(domain)
        if not found.isActive() or not _still_ours(found, nonce):
            return True
        if method == "Pause":
            return _resume(found)
        if method == "GuestAgent":
            return _thaw(found)
        return True
    finally:
        connection.close()


def _still_ours(domain: libvirt.virDomain, nonce: str) -> bool:
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        return journals.from_xml(text).nonce == nonce
    except UnreadableJournalError:
        return True  # it cannot be told apart from ours: freeing is always safe
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return False
        raise


def _resume(domain: libvirt.virDomain) -> bool:
    state, reason = domain.state()
    if state != libvirt.VIR_DOMAIN_PAUSED:
        return True
    if reason == libvirt.VIR_DOMAIN_PAUSED_USER:
        domain.resume()
    return True


def _thaw(domain: libvirt.virDomain) -> bool:
    domain.agentSetResponseTimeout(AGENT_SECONDS, 0)
    try:
        domain.fsThaw(None, 0)
    except libvirt.libvirtError as error:
        # A hook that fails at thaw makes the thaw raise though it thawed: only the state tells.
        say("thaw raised", domain=domain.UUIDString(), why=error.get_error_message())
    answer = libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-fsfreeze-status"}', AGENT_SECONDS, 0)
    return bool(json.loads(answer).get("return") == "thawed")
