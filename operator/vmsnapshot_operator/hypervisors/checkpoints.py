"""Checkpoints of one domain: which of its disks remember what was written since when. Made, looked at, removed, by their names.

A checkpoint of ours is of one disk and has the name of the copy that it belongs to. It is two things: a bitmap of that name in the
disk's qcow2 file, which QEMU keeps, and libvirt's description of it. Blocking calls off the event loop, each with a deadline;
everything raises HypervisorError or a child of it. Not which are made or removed (`strategies.increments`).

Seen with libvirt 9.0 and QEMU 7.2: the bitmap goes with the file (a shutdown, a migration, an overlay that is committed), is marked as
broken, or is not there, after QEMU was killed, and can be looked at and removed only while the VM is active. The description
stays behind when the VM migrates, and can be written anew where the bitmap is. A VM that has one cannot be undefined without a flag.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from xml.sax.saxutils import escape, quoteattr

import libvirt

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
    NotPermittedError,
)
from vmsnapshot_operator.hypervisors import domain_xml

if TYPE_CHECKING:
    from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
    from vmsnapshot_operator.hypervisors.window import Permit

TIMEOUT = Seconds(30.0)

T = TypeVar("T")

_AS_IT_IS = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
_SIZES = libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | libvirt.VIR_DOMAIN_CHECKPOINT_XML_SIZE
_UNKNOWN = (CallTimeoutError, HypervisorUnreachableError, DomainGoneError)


class Seen(NamedTuple):
    """A checkpoint as libvirt lists it: its domain's UUID, and its own name."""

    domain: str
    name: str


class Checkpoints:
    """The checkpoints of the domain `ref`, wherever it is now. Those asked for are given as their names with the disks' targets."""

    def __init__(self, hypervisor: Hypervisor, ref: Ref) -> None:
        self._hypervisor = hypervisor
        self._ref = ref

    async def names(self) -> frozenset[str]:
        """Return the names of all, whoever's they are."""
        return await self._act("checkpoints", _names)

    async def whole(self, asked: Mapping[str, str]) -> frozenset[str]:
        """Return those whose disk has remembered every write since they were made. A description that is missing is written anew."""
        return await self._act("checkpoints", lambda d: frozenset(n for n, t in asked.items() if _is_whole(d, n, t)))

    async def make(self, asked: Mapping[str, str], permit: Permit) -> Mapping[str, str]:
        """Have disks remember what is written to them from now on; return, by name, why one cannot.

        When this has returned, those that are not in the answer are there, and the others will never come: a copy that
        begins later holds at least all that was written before. Raises HypervisorError where that is not certain, and NotPermittedError
        if `permit` says no.
        """
        refused: dict[str, str] = {}
        for name, target in asked.items():

            def run(domain: Any, name: str = name, target: str = target) -> None:
                if why := permit():
                    raise NotPermittedError(f"checkpoint {name} was not made: {why}")
                domain.checkpointCreateXML(_described(name, target), 0)

            try:
                await self._act(f"checkpoint of disk {target}", run)
            except _UNKNOWN:
                raise
            except HypervisorError as error:
                if name in await self.names():
                    raise HypervisorError(error.message, reason=error.reason, retryable=True) from error
                refused[name] = error.message
        return refused

    async def remove(self, asked: Mapping[str, str]) -> frozenset[str]:
        """Remove them, bitmap and all; missing is success. Return those that are left because the VM is off."""
        return await self._act("checkpoints", lambda d: frozenset(n for n, t in asked.items() if not _remove(d, n, t)))

    async def _act(self, what: str, act: Callable[[Any], T]) -> T:
        return await self._hypervisor.act(self._ref, f"{what} of {self._ref.name}", act, timeout=TIMEOUT)


# --- blocking, in a thread of their own ----------------------------------------------------------------------------------


def listed(connection: Any, prefix: str) -> tuple[Seen, ...]:
    """Return all checkpoints of a host whose names begin so. Blocking; raises libvirtError."""
    found = []
    for domain in connection.listAllDomains():
        with contextlib.suppress(libvirt.libvirtError):  # it was undefined meanwhile
            found += [Seen(domain.UUIDString(), n) for n in _names(domain) if n.startswith(prefix)]
    return tuple(found)


def _names(domain: Any) -> frozenset[str]:
    try:
        return frozenset(c.getName() for c in domain.listAllCheckpoints(0))
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_SUPPORT:  # a hypervisor that knows none
            return frozenset()
        raise


def _find(domain: Any, name: str, target: str) -> Any | None:
    """Return a checkpoint, described anew if its disk has the bitmap, or None."""
    try:
        return domain.checkpointLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
            raise
    if not target or not domain.isActive():
        return None
    try:
        return domain.checkpointCreateXML(_described(name, target, domain.XMLDesc(0)), _AS_IT_IS)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT, libvirt.VIR_ERR_CONFIG_UNSUPPORTED):
            return None  # no such bitmap, or another kind of disk is at that target
        raise


def _is_whole(domain: Any, name: str, target: str) -> bool:
    if not domain.isActive() or (found := _find(domain, name, target)) is None:
        return False
    return target in _remembering(found)


def _remembering(checkpoint: Any) -> frozenset[str]:
    """Return the targets of the disks whose bitmap is there and unbroken: libvirt says no size of others."""
    disks = domain_xml.element(checkpoint.getXMLDesc(_SIZES)).iter("disk")
    return frozenset(d.get("name", "") for d in disks if d.get("size") is not None)


def _remove(domain: Any, name: str, target: str) -> bool:
    found = _find(domain, name, target)
    if found is None:
        return True
    if not domain.isActive():
        return False
    try:
        found.delete(0)
    except libvirt.libvirtError as error:
        # It is said so of a bitmap that is not there, which has no code of its own; one that is broken is removed.
        if error.get_error_code() != libvirt.VIR_ERR_INTERNAL_ERROR or not domain.isActive() or _remembering(found):
            raise
        found.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)
    return True


def _described(name: str, target: str, domain: str = "") -> str:
    """Return the description of a checkpoint of one disk; `domain`: the VM's, which libvirt wants of one that is there already."""
    disk = f"<disk name={quoteattr(target)} checkpoint='bitmap'"
    known = f"<creationTime>0</creationTime><disks>{disk} bitmap={quoteattr(name)}/></disks>{domain}"
    return (
        f"<domaincheckpoint><name>{escape(name)}</name>{known if domain else f'<disks>{disk}/></disks>'}"
        "</domaincheckpoint>"
    )
