"""Where a domain is: looked up on all endpoints of its Hypervisor object at each step, because VMs migrate between them.

Never blocks the event loop; everything raises HypervisorError or a child of it. Not what is done there.
"""

from __future__ import annotations

import asyncio
import logging
import uuid as uuid_module
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import libvirt

from vmsnapshot_operator.errors import (
    DomainAmbiguousError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
)
from vmsnapshot_operator.hypervisors import description
from vmsnapshot_operator.hypervisors.hosts import Host

log = logging.getLogger(__name__)

May = Callable[[str], bool]
"""Whether a domain of this name may be seen: one that may not is as if it were not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """Where a domain is now."""

    uuid: str
    name: str
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A domain on one endpoint; `essence` of one that is off there: see `description.essence`."""

    ref: Ref
    active: bool
    essence: tuple[object, ...] = ()


def anyone(_name: str) -> bool:
    """Let every domain be seen."""
    return True


class Lookup:
    """Looks domains up on the endpoints of the Hypervisor object of this name."""

    def __init__(self, name: str, hosts: Mapping[str, Host]) -> None:
        self._name = name
        self._hosts = hosts

    async def locate(self, domain: str, may: May = anyone) -> list[Found]:
        """Return the one place where a domain runs, else all that define it, in the order of the endpoints.

        Raises DomainGoneError if none has it, or if several have different ones of that name; HypervisorUnreachableError if an
        endpoint that may have it, or on which it may be running, does not answer.
        """
        found, problems = await self._ask_all(domain, may, hurry=_is_uuid(domain))
        if len({f.ref.uuid for f in found}) > 1:
            refs = [f.ref for f in found]
            log.warning("hypervisor %s has several domains %r; name one by its UUID: %s", self._name, domain, refs)
            raise DomainGoneError(
                f'hypervisor "{self._name}" has several domains "{domain}": name it by its UUID', ambiguous=True
            )
        running = [f for f in found if f.active]
        if problems and not running:
            raise HypervisorUnreachableError("; ".join(problems))
        if not found:
            raise self._gone(domain)
        return running[:1] or found

    async def places(self, ref: Ref) -> tuple[Ref, ...]:
        """Return where a domain runs, then every other definition of it; raises also unless all endpoints answer."""
        found, problems = await self._ask_all(ref.uuid, anyone, hurry=False)
        if problems:
            raise HypervisorUnreachableError("; ".join(problems))
        if not found:
            raise self._gone(ref.uuid)
        return tuple(f.ref for f in found)

    async def true_one(self, ref: Ref) -> Ref:
        """Return where the domain is now; raises DomainAmbiguousError if nobody can tell."""
        found = await self.locate(ref.uuid)
        if any(f.essence != found[0].essence for f in found):
            where = [f.ref.endpoint for f in found]
            raise DomainAmbiguousError(
                found[0].ref.name,
                where,
                "runs on none of them, and the disks or devices differ: which one is true is unknown",
            )
        return found[0].ref

    def _gone(self, domain: str) -> DomainGoneError:
        return DomainGoneError(f'hypervisor "{self._name}" has no domain "{domain}"')

    async def _ask_all(self, domain: str, may: May, *, hurry: bool) -> tuple[list[Found], list[str]]:
        """Return what all endpoints have of this UUID or name, those that run first, and which did not answer, and why.

        In a `hurry` whoever says that it runs there is the last who is heard: one that hangs delays nobody whose VM runs elsewhere.
        """
        answers: dict[str, Found] = {}
        problems: list[str] = []

        async def ask(endpoint: str) -> bool:
            try:
                found = await _look_for(self._hosts[endpoint], domain, may)
            except HypervisorError as error:
                problems.append(error.message)
                return False
            if found is not None:
                answers[endpoint] = found
            return found is not None and found.active

        asked = [asyncio.create_task(ask(e)) for e in self._hosts]
        try:
            for answer in asyncio.as_completed(asked):
                if await answer and hurry:
                    break
        finally:
            for task in asked:
                task.cancel()
        in_order = [answers[e] for e in self._hosts if e in answers]
        return sorted(in_order, key=lambda f: not f.active), problems


async def _look_for(host: Host, domain: str, may: May) -> Found | None:
    try:
        name, uuid, active, essence = await host.look(f"look-up of {domain} on {host.endpoint}", _find, domain)
    except DomainGoneError:
        host.main.answered()
        return None
    if not may(name):
        return None
    return Found(ref=Ref(uuid=uuid, name=name, endpoint=host.endpoint), active=active, essence=essence)


def _is_uuid(text: str) -> bool:
    try:
        uuid_module.UUID(text)
    except ValueError:
        return False
    return True


# --- blocking, in a thread of its own ----------------------------------------------------------------------------------


def _find(connection: Any, domain: str) -> tuple[str, str, bool, tuple[object, ...]]:
    found = None
    if _is_uuid(domain):
        try:
            found = connection.lookupByUUIDString(str(uuid_module.UUID(domain)))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    if found is None:
        found = connection.lookupByName(domain)  # a name may look like a UUID
    name, active = found.name(), bool(found.isActive())
    try:
        return name, found.UUIDString(), active, () if active else description.essence(found)
    except ValueError as error:
        raise HypervisorError(f"domain {name}: {error}") from error
