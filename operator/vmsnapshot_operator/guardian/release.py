"""One attempt to free one VM on one libvirt: thaw until the agent says so, or resume. Who tries, and how often: `watch`."""

from __future__ import annotations

import enum
import json
import socket
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit

import libvirt
import libvirt_qemu

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.guardian.log import say

AGENT_SECONDS = 3
_KEEPALIVE = (3, 3)
_REACH_SECONDS = 2.0
_PORTS = {"tcp": 16509, "tls": 16514, "ssh": 22, "libssh": 22, "libssh2": 22}
_NOTHING_THERE = frozenset(
    {libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_SUPPORT}
)
_PAUSED_BY_US = frozenset({libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN})
"""A libvirtd that was restarted may have forgotten why; our journal says that it was us."""


class Outcome(enum.Enum):
    """How an attempt ended."""

    FREE = "the VM goes on"
    HELD = "it does not yet"
    OVER = "its journal is gone or no longer ours: somebody has confirmed that it is free"
    ELSEWHERE = "it does not run on this host"


def connect(uri: str) -> libvirt.virConnect:
    """Open a connection that notices when the other end is gone. Raises libvirtError."""
    connection = libvirt.open(uri)
    if not uri.startswith("test:"):
        connection.setKeepAlive(*_KEEPALIVE)
    return connection


def reach(uri: str) -> None:
    """Raise OSError soon if a remote host takes no connection.

    libvirt itself would wait for minutes, and through a network that is whole again by then.
    """
    parts = urlsplit(uri)
    port = parts.port or _PORTS.get(parts.scheme.partition("+")[2])
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), _REACH_SECONDS).close()


def read(domain: libvirt.virDomain) -> Journal | None:
    """Return the journal of a running domain that may be held, or None. Raises UnreadableJournalError, libvirtError.

    One that goes on, on overlays, is held no more: what is left to do there has no hurry, and is not a guardian's business.
    """
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NOTHING_THERE:
            return None
        raise
    journal = journals.from_xml(text)
    return journal if journal.holds else None


def attempt(uri: str, domain: str, method: str, nonce: str, *, again: bool, armed: bool, gone: bool) -> Outcome:
    """Free the VM once, on a connection of its own. Raises libvirtError, OSError.

    `again`: it was free already, look whether it still is. `armed`: its holder asked for it, so it is freed also if its journal
    cannot be read any more; a VM whose journal was only seen is not touched then. `gone`: also if it is there no more, as long as
    an order of its holder may come; one that was paused only `again`: whoever removed the journal before saw it run.
    """
    reach(uri)
    connection = connect(uri)
    try:
        try:
            found = connection.lookupByUUIDString(domain)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return Outcome.ELSEWHERE
            raise
        if not found.isActive():
            return Outcome.ELSEWHERE
        ours = partial(_ours, found, nonce, unreadable=armed, gone=gone and (again or method != "Pause"))
        if not ours():
            return Outcome.OVER
        if method == "Pause":
            return _resume(found)
        # Any other method may have frozen the guest; thawing one that is not frozen does nothing.
        return _thaw(found, ours if again else None)
    finally:
        connection.close()


def _ours(domain: libvirt.virDomain, nonce: str, *, unreadable: bool, gone: bool) -> bool:
    """Whether it is for us to free it; `unreadable` and `gone`: the answer if its journal is that."""
    try:
        journal = read(domain)
    except UnreadableJournalError:
        return unreadable
    return gone if journal is None else journal.nonce == nonce


def _resume(domain: libvirt.virDomain) -> Outcome:
    state, reason = domain.state()
    if state == libvirt.VIR_DOMAIN_PAUSED and reason in _PAUSED_BY_US:
        domain.resume()
    return Outcome.FREE


def _thaw(domain: libvirt.virDomain, ours: Callable[[], bool] | None) -> Outcome:
    """`ours`: given if it was free already: whether it is for us to free one that is frozen now; another one may hold it by then."""
    domain.agentSetResponseTimeout(AGENT_SECONDS, 0)
    if ours is not None and (_status(domain) == "thawed" or not ours()):
        return Outcome.FREE
    try:
        domain.fsThaw(None, 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
            return Outcome.FREE  # the domain has no agent's channel, so nobody can have frozen it through one
        # A hook that fails at thaw makes the thaw raise though it thawed: only the state tells.
        say("thaw raised", domain=domain.UUIDString(), why=error.get_error_message())
    return Outcome.FREE if _status(domain) == "thawed" else Outcome.HELD


def _status(domain: libvirt.virDomain) -> object:
    answer = json.loads(libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-fsfreeze-status"}', AGENT_SECONDS, 0))
    return answer.get("return") if isinstance(answer, dict) else None
