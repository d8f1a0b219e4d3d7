"""The domains of one Hypervisor object: find, describe, hold, free, and the journal in their metadata.

A Hypervisor may have several endpoints between which VMs migrate: a domain is looked up on all of them at each step.
Never blocks the event loop; every method raises HypervisorError or a child of it.
"""

from __future__ import annotations

import asyncio
import uuid as uuid_module
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import libvirt

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.core.machine import AgentState, Disk, Machine, PowerState
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind
from vmsnapshot_operator.errors import (
    DomainGoneError,
    ForeignJournalError,
    HypervisorError,
    HypervisorUnreachableError,
)
from vmsnapshot_operator.hypervisors import agent as agents
from vmsnapshot_operator.hypervisors import domain_xml
from vmsnapshot_operator.hypervisors.calls import call
from vmsnapshot_operator.hypervisors.connection import Connection
from vmsnapshot_operator.hypervisors.events import EventWatch
from vmsnapshot_operator.hypervisors.uri import compose

LOOK_TIMEOUT = Seconds(15.0)
ACT_TIMEOUT = Seconds(10.0)
GRACE = Seconds(2.0)
"""What a call may take longer than the deadline given to libvirt itself."""

AGENT_QUERIES = 3
"""Agent questions of plans at once, per endpoint: libvirtd has few workers, and a hung agent holds one."""

DEFINITION_LIMIT = 200_000

_POWER = {
    libvirt.VIR_DOMAIN_RUNNING: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: PowerState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: PowerState.RUNNING,
    libvirt.VIR_DOMAIN_SHUTOFF: PowerState.SHUT_OFF,
    libvirt.VIR_DOMAIN_CRASHED: PowerState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: PowerState.SUSPENDED,
}
_MIGRATION_JOBS = (libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN, libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """Where a domain is now."""

    uuid: str
    name: str
    endpoint: str


class DomainWindow:
    """One domain looked up beforehand on two connections: what is called while it is held costs no more than libvirt."""

    def __init__(self, name: str, domain: Any, releaser: Any) -> None:
        self._name = name
        self._domain = domain
        self._releaser = releaser

    async def freeze(self, mountpoints: Sequence[str], timeout: Seconds) -> int:  # noqa: ASYNC109 - given to libvirt
        """Freeze; return how many file systems. After any error it may still happen later."""

        def run() -> int:
            self._domain.agentSetResponseTimeout(max(1, int(timeout)), 0)
            return int(self._domain.fsFreeze(list(mountpoints) or None, 0))

        return await call(f"freeze of {self._name}", run, timeout=Seconds(timeout + GRACE))

    async def thaw(self, timeout: Seconds) -> int:  # noqa: ASYNC109 - given to libvirt
        """Thaw everything; return how many file systems."""

        def run() -> int:
            return int(self._releaser.fsThaw(None, 0))

        return await call(f"thaw of {self._name}", run, timeout=Seconds(timeout + GRACE))

    async def status(self, timeout: Seconds) -> AgentState:  # noqa: ASYNC109 - given to libvirt
        """Ask the agent for its freeze state."""
        state, _ = await call(
            f"freeze state of {self._name}", agents.freeze_state, self._releaser, max(1, int(timeout)), timeout=Seconds(timeout + GRACE)
        )
        return state

    async def pause(self) -> None:
        """Pause the VM."""
        await call(f"pause of {self._name}", self._domain.suspend, timeout=ACT_TIMEOUT)

    async def resume(self) -> None:
        """Resume the VM."""
        await call(f"resume of {self._name}", self._releaser.resume, timeout=ACT_TIMEOUT)

    async def state(self) -> PowerState:
        """Return the VM's power state."""
        state, _ = await call(f"state of {self._name}", self._releaser.state, timeout=ACT_TIMEOUT)
        return _POWER.get(state, PowerState.UNKNOWN)


class Hypervisor:
    """The connections of one Hypervisor object. Made by `connect`, ended by `close`."""

    def __init__(self, name: str, uris: Mapping[str, str]) -> None:
        self.name = name
        self._uris = dict(uris)
        self._main = {e: Connection(u, e) for e, u in uris.items()}
        self._release = {e: Connection(u, f"{e} (thaw)") for e, u in uris.items()}
        self._queries = {e: asyncio.Semaphore(AGENT_QUERIES) for e in uris}

    @classmethod
    async def connect(cls, name: str, endpoints: Sequence[Endpoint], credentials: Mapping[str, str]) -> Hypervisor:
        """Connect to all endpoints; raises HypervisorUnreachableError unless at least one answers."""
        folder = None  # files for tls and ssh are written by the caller that has them
        user = credentials.get("username", "")
        found = cls(name, {e.name: compose(e, user=user, credentials=folder) for e in endpoints})
        try:
            await found._each()
        except HypervisorError:
            await found.close()
            raise
        return found

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(c.close() for c in (*self._main.values(), *self._release.values())))

    @property
    def last_answer(self) -> float:
        """When the endpoint that has been silent longest last answered (monotonic seconds)."""
        return min(c.last_answer for c in self._main.values())

    def uri(self, ref: Ref) -> str:
        """Return the URI of the endpoint on which a domain is."""
        return self._uris[ref.endpoint]

    async def about(self) -> dict[str, Any]:
        """Return versions and the number of domains, for status."""
        domains, versions = 0, {"libvirtVersion": "", "hypervisorVersion": ""}
        for endpoint, connection in await self._each():
            count, lib, hyper = await call(f"look at {endpoint}", _about, connection, timeout=LOOK_TIMEOUT)
            self._main[endpoint].answered()
            domains += count
            versions = {"libvirtVersion": _version(lib), "hypervisorVersion": _version(hyper)}
        return {**versions, "domains": domains}

    async def find(self, domain: str) -> Ref:
        """Look a domain up by UUID or name on all endpoints; the running one if several have it.

        Raises DomainGoneError if none has it, HypervisorUnreachableError if one that may have it does not answer.
        """
        found: list[tuple[bool, Ref]] = []
        silent: list[str] = []
        for endpoint, connection in self._main.items():
            try:
                live = await connection.get()
                name, uuid, active = await call(f"look-up of {domain}", _find, live, domain, timeout=LOOK_TIMEOUT)
            except DomainGoneError:
                connection.answered()
                continue
            except HypervisorUnreachableError as error:
                silent.append(error.message)
                continue
            connection.answered()
            found.append((active, Ref(uuid=uuid, name=name, endpoint=endpoint)))
        if found:
            return max(found, key=lambda f: f[0])[1]
        if silent:
            raise HypervisorUnreachableError("; ".join(silent))
        raise DomainGoneError(f'hypervisor "{self.name}" has no domain "{domain}"')

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        """Return everything a plan needs to know of a domain."""
        connection = await self._main[ref.endpoint].get()
        machine: Machine = await call(f"look at {ref.name}", _describe, connection, ref, timeout=LOOK_TIMEOUT)
        self._main[ref.endpoint].answered()
        if ask_agent and machine.power is PowerState.RUNNING:
            async with self._queries[ref.endpoint]:
                domain = await call(f"look-up of {ref.name}", connection.lookupByUUIDString, ref.uuid, timeout=LOOK_TIMEOUT)
                agent = await call(f"agent of {ref.name}", _ask, domain, timeout=LOOK_TIMEOUT)
            machine = replace(machine, agent=agent)
        return machine

    async def window(self, ref: Ref) -> DomainWindow:
        """Look the domain up on both connections, so that nothing has to be looked up while it is held."""
        here = ref if await self._has(ref) else await self.find(ref.uuid)
        main, release = await self._main[here.endpoint].get(), await self._release[here.endpoint].get()
        domain = await call(f"look-up of {ref.name}", main.lookupByUUIDString, ref.uuid, timeout=LOOK_TIMEOUT)
        releaser = await call(f"look-up of {ref.name}", release.lookupByUUIDString, ref.uuid, timeout=LOOK_TIMEOUT)
        return DomainWindow(ref.name, domain, releaser)

    async def read_journal(self, ref: Ref) -> Journal | None:
        """Return the journal in the domain's metadata. Raises HypervisorError if there is one that cannot be read."""
        connection = await self._main[ref.endpoint].get()
        try:
            return await call(f"journal of {ref.name}", _journal, connection, ref.uuid, timeout=LOOK_TIMEOUT)
        except UnreadableJournalError as error:
            raise HypervisorError(f"domain {ref.name}: {error}", reason="JournalUnreadable", retryable=True) from error

    async def write_journal(self, ref: Ref, journal: Journal) -> None:
        """Write the journal and read it back. Raises ForeignJournalError if another one is there."""
        connection = await self._main[ref.endpoint].get()
        await call(f"journal of {ref.name}", _write_journal, connection, ref.uuid, journal, timeout=ACT_TIMEOUT)

    async def clear_journal(self, ref: Ref, nonce: str) -> None:
        """Remove the journal if it is the one with this nonce."""
        here = ref if await self._has(ref) else await self.find(ref.uuid)
        connection = await self._main[here.endpoint].get()
        await call(f"journal of {ref.name}", _clear_journal, connection, ref.uuid, nonce, timeout=ACT_TIMEOUT)

    async def sweep(self) -> list[tuple[Ref, Journal]]:
        """Return all domains that bear a journal."""
        found: list[tuple[Ref, Journal]] = []
        for endpoint, connection in await self._each():
            marked = await call(f"sweep of {endpoint}", _sweep, connection, endpoint, timeout=Seconds(60.0))
            self._main[endpoint].answered()
            found += marked
        return found

    @contextmanager
    def events(self, ref: Ref) -> Iterator[EventWatch]:
        """Watch the lifecycle of a domain for a while; on the connection that `window` or `describe` opened."""
        watch = EventWatch()
        connection = self._main[ref.endpoint]._connection  # noqa: SLF001 - one module's two classes
        wanted = uuid_module.UUID(ref.uuid)
        number = None
        if connection is not None:

            def heard(_: Any, domain: Any, event: int, detail: int, __: Any) -> None:
                if uuid_module.UUID(domain.UUIDString()) == wanted:
                    watch.lifecycle(event, detail)

            number = connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, heard, None)
        try:
            yield watch
        finally:
            if connection is not None and number is not None:
                try:
                    connection.domainEventDeregisterAny(number)
                except libvirt.libvirtError:
                    # The connection broke: what was heard until then is all there is, so nothing may rest on it.
                    watch.resumed = watch.started = True

    async def _each(self) -> list[tuple[str, Any]]:
        live = []
        problems = []
        for endpoint, connection in self._main.items():
            try:
                live.append((endpoint, await connection.get()))
            except HypervisorUnreachableError as error:
                problems.append(error.message)
        if not live:
            raise HypervisorUnreachableError("; ".join(problems) or f'hypervisor "{self.name}" has no endpoint')
        return live

    async def _has(self, ref: Ref) -> bool:
        try:
            live = await self._main[ref.endpoint].get()
            _, _, active = await call(f"look-up of {ref.name}", _find, live, ref.uuid, timeout=LOOK_TIMEOUT)
        except DomainGoneError:
            return False
        return bool(active)


# --- blocking, in a thread of their own --------------------------------------------------------------------------------


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _about(connection: Any) -> tuple[int, int, int]:
    return connection.numOfDomains() + connection.numOfDefinedDomains(), connection.getLibVersion(), connection.getVersion()


def _find(connection: Any, domain: str) -> tuple[str, str, bool]:
    try:
        found = connection.lookupByUUIDString(str(uuid_module.UUID(domain)))
    except ValueError:
        found = connection.lookupByName(domain)
    return found.name(), found.UUIDString(), bool(found.isActive())


def _ask(domain: Any) -> Any:
    domain.agentSetResponseTimeout(agents.STATUS_SECONDS, 0)
    return agents.ask(domain)


def _describe(connection: Any, ref: Ref) -> Machine:
    domain = connection.lookupByUUIDString(ref.uuid)
    state, reason = domain.state()
    power = _POWER.get(state, PowerState.UNKNOWN)
    text = domain.XMLDesc()
    try:
        disks, devices = domain_xml.parse(text)
    except ValueError as error:
        raise HypervisorError(f"domain {ref.name}: {error}") from error
    journal, journal_error = None, ""
    try:
        journal = _journal(connection, ref.uuid)
    except UnreadableJournalError as error:
        journal_error = str(error)
    return Machine(
        name=domain.name(),
        uuid=domain.UUIDString(),
        endpoint=ref.endpoint,
        run_id=domain.ID(),
        power=power,
        power_reason=_reason(power, reason),
        shut_down_from_within=power is PowerState.SHUT_OFF and reason == libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN,
        persistent=bool(domain.isPersistent()),
        migrating=_migrating(domain, power),
        disks=tuple(_sized(connection, domain, d, power) for d in disks),
        devices=devices,
        journal=journal,
        journal_error=journal_error,
        definition=domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)[:DEFINITION_LIMIT],
    )


def _reason(power: PowerState, reason: int) -> str:
    shut_off = {
        libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN: "shut down",
        libvirt.VIR_DOMAIN_SHUTOFF_DESTROYED: "destroyed",
        libvirt.VIR_DOMAIN_SHUTOFF_CRASHED: "crashed",
        libvirt.VIR_DOMAIN_SHUTOFF_SAVED: "saved",
        libvirt.VIR_DOMAIN_SHUTOFF_FAILED: "failed to start",
    }
    return shut_off.get(reason, f"reason {reason}") if power is PowerState.SHUT_OFF else f"reason {reason}"


def _migrating(domain: Any, power: PowerState) -> bool:
    if power is PowerState.SHUT_OFF:
        return False
    try:
        job = domain.jobStats()
    except libvirt.libvirtError as error:
        if error.get_error_code() in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_INVALID):
            return False
        raise
    return job.get("operation") in _MIGRATION_JOBS


def _sized(connection: Any, domain: Any, disk: Disk, power: PowerState) -> Disk:
    if not disk.layers:
        return disk
    size = 0
    if power is not PowerState.SHUT_OFF:
        try:
            size = int(domain.blockInfo(disk.target)[0])
        except libvirt.libvirtError:
            size = 0  # an empty drive, or one that libvirt cannot look into
    layers = tuple(_placed(connection, layer, i > 0) for i, layer in enumerate(disk.layers))
    return replace(disk, layers=layers, size_bytes=size)


def _placed(connection: Any, layer: Layer, fingerprint: bool) -> Layer:
    """Add the libvirt pool that holds a file, and to a read-only layer what betrays a later change."""
    if layer.kind is not SourceKind.FILE:
        return layer
    try:
        # By its folder: a volume made since the pool was last refreshed is not known to the pool yet.
        pool = connection.storagePoolLookupByTargetPath(str(PurePosixPath(layer.source).parent)).name()
    except libvirt.libvirtError:
        return layer  # it lies in no pool
    stamp = ""
    if fingerprint:
        try:
            root = ET.fromstring(connection.storageVolLookupByPath(layer.source).XMLDesc())  # noqa: S314 - libvirt's own
            stamp = f"{root.findtext('allocation')}/{root.findtext('target/timestamps/mtime')}"
        except libvirt.libvirtError:
            stamp = ""  # nothing is known that a later change would betray: restore says so
    return replace(layer, pool=pool, fingerprint=stamp)


def _flags(domain: Any) -> int:
    flags = 0
    if domain.isActive():
        flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
    if domain.isPersistent():
        flags |= libvirt.VIR_DOMAIN_AFFECT_CONFIG
    return flags


def _journal(connection: Any, uuid: str) -> Journal | None:
    domain = connection.lookupByUUIDString(uuid)
    for flag in (libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG):
        if not _flags(domain) & flag:
            continue
        try:
            text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, flag)
        except libvirt.libvirtError as error:
            if error.get_error_code() in (libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_SUPPORT):
                continue
            raise
        return journals.from_xml(text)
    return None


def _write_journal(connection: Any, uuid: str, journal: Journal) -> None:
    domain = connection.lookupByUUIDString(uuid)
    try:
        there = _journal(connection, uuid)
    except UnreadableJournalError as error:
        raise ForeignJournalError(f"domain {domain.name()}: {error}") from error
    if there is not None and there.nonce != journal.nonce:
        raise ForeignJournalError(f"domain {domain.name()} is held by installation {there.installation}, object {there.owner_uid}")
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    domain.setMetadata(kind, journals.to_xml(journal), journals.PREFIX, journals.NAMESPACE, _flags(domain))
    if _journal(connection, uuid) != journal:
        raise ForeignJournalError(f"domain {domain.name()}: somebody else wrote a journal at the same moment")


def _clear_journal(connection: Any, uuid: str, nonce: str) -> None:
    domain = connection.lookupByUUIDString(uuid)
    there = _journal(connection, uuid)
    if there is not None and there.nonce == nonce:
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, journals.NAMESPACE, _flags(domain))


def _sweep(connection: Any, endpoint: str) -> list[tuple[Ref, Journal]]:
    found = []
    for domain in connection.listAllDomains():
        try:
            journal = _journal(connection, domain.UUIDString())
        except UnreadableJournalError:
            continue  # said when somebody plans a snapshot of it
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue
            raise
        if journal is not None:
            found.append((Ref(uuid=domain.UUIDString(), name=domain.name(), endpoint=endpoint), journal))
    return found
