"""What all endpoints of one Hypervisor object have, whosever domain it is of: overlays, disks in use, gates of restores, versions.

Never blocks the event loop. Not what is concluded from it (`handlers`, `plan`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import libvirt

from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.markers import GATE_NAMESPACE
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import overlays
from vmsnapshot_operator.hypervisors.hosts import SWEEP_TIMEOUT, Host, ask_each
from vmsnapshot_operator.hypervisors.lookup import Ref

_NO_GATE = frozenset({libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_NO_DOMAIN})
"""There is none; or the domain went away meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A domain that bears a restore's gate, with the definition in which it stands; `problem` if that cannot be read."""

    ref: Ref
    definition: str
    problem: str = ""


class OverlayFiles:
    """The overlays on all endpoints, looked for on connections that few use, so that a pool that hangs delays nobody."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts
        self._surveyed: set[str] = set()

    async def look(self, prefix: str, pool: str) -> tuple[tuple[OverlayFile, ...], Mapping[str, str]]:
        """Return those under such names (see `overlays.survey`), and which endpoints could not say it, and why."""
        found, problems = await ask_each(self._hosts, lambda host: self._survey(host, prefix, pool))
        return tuple(sorted((f for part in found for f in part), key=lambda f: (f.endpoint, f.path))), problems

    async def _survey(self, host: Host, prefix: str, pool: str) -> tuple[OverlayFile, ...]:
        def look(connection: Any) -> tuple[OverlayFile, ...]:
            self._surveyed.add(host.endpoint)
            try:
                return overlays.survey(connection, host.endpoint, prefix, pool)
            finally:
                self._surveyed.discard(host.endpoint)

        if host.endpoint in self._surveyed:
            # Each look that hangs keeps one of libvirtd's few workers: never a second one beside it.
            raise HypervisorError(f"{host.endpoint}: an earlier look at its pools has not returned")
        return await host.act(f"overlays on {host.endpoint}", look, timeout=overlays.POOL_TIMEOUT)


async def users(hosts: Mapping[str, Host], names: Collection[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return by name a domain one of whose disks has that name in its source; and which endpoints could not say it, and why."""
    found, problems = await ask_each(
        hosts, lambda h: h.look(f"disks on {h.endpoint}", overlays.users, timeout=SWEEP_TIMEOUT)
    )
    return {n: d for part in found for n in names for value, d in part.items() if n in value}, problems


async def gates(hosts: Mapping[str, Host]) -> tuple[tuple[Gated, ...], Mapping[str, str]]:
    """Return all domains that bear a restore's gate, and which endpoints could not say it, and why."""
    found, problems = await ask_each(hosts, lambda h: h.look(f"gates on {h.endpoint}", _gates, h.endpoint))
    return tuple(sorted((g for part in found for g in part), key=lambda g: (g.ref.name, g.ref.endpoint))), problems


async def count(host: Host) -> tuple[int, int, int]:
    """Return the number of domains of an endpoint, and the versions of libvirt and of the hypervisor. Raises HypervisorError."""
    return await host.look(f"look at {host.endpoint}", _count)


def about(counts: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return what status says of endpoints that were counted."""
    _, lib, hyper = counts[0]
    return {
        "libvirtVersion": _version(lib),
        "hypervisorVersion": _version(hyper),
        "domains": sum(count for count, _, _ in counts),
    }


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


# --- blocking, in a thread of their own --------------------------------------------------------------------------------


def _count(connection: Any) -> tuple[int, int, int]:
    return (
        connection.numOfDomains() + connection.numOfDefinedDomains(),
        connection.getLibVersion(),
        connection.getVersion(),
    )


def _gates(connection: Any, endpoint: str) -> list[Gated]:
    """All that bear a gate. It stands in the stored definition alone: one that is transient has none."""
    found = []
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_PERSISTENT):
        ref = Ref(uuid=domain.UUIDString(), name=domain.name(), endpoint=endpoint)
        try:
            domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, GATE_NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
            found.append(Gated(ref=ref, definition=domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
        except libvirt.libvirtError as error:
            if error.get_error_code() in _NO_GATE:
                continue
            if not connection.isAlive():
                raise
            why = f"whether the domain bears a gate cannot be seen: {error}"
            found.append(Gated(ref=ref, definition="", problem=why))
    return found
