"""The domains of one Hypervisor object: find, describe, hold, free, and the journal in their metadata.

A Hypervisor may have several endpoints between which VMs migrate: a domain is looked up on all of them at each step.
Never blocks the event loop; every method raises HypervisorError or a child of it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import uuid as uuid_module
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import libvirt

from vmsnapshot_operator.core.backups import Ending
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.core.markers import GATE_NAMESPACE
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DomainAmbiguousError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
)
from vmsnapshot_operator.hypervisors import agent as agents
from vmsnapshot_operator.hypervisors import credentials, description, journals, overlays
from vmsnapshot_operator.hypervisors.backups import Backups
from vmsnapshot_operator.hypervisors.calls import Calls
from vmsnapshot_operator.hypervisors.checkpoints import Checkpoints, listed
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint
from vmsnapshot_operator.hypervisors.connection import Connection, Lane
from vmsnapshot_operator.hypervisors.events import EventHub, EventWatch
from vmsnapshot_operator.hypervisors.overlays import Overlays
from vmsnapshot_operator.hypervisors.uri import compose
from vmsnapshot_operator.hypervisors.window import ACT_TIMEOUT, DomainWindow, Handles, Outstanding, Permit, always

__all__ = ["DomainWindow", "EventWatch", "Gated", "Hypervisor", "Ref", "Sighting"]

log = logging.getLogger(__name__)

LOOK_TIMEOUT = Seconds(15.0)
SWEEP_TIMEOUT = Seconds(60.0)

AGENT_QUERIES, SUSPECT_QUERIES = 2, 1
"""Agent questions of plans at once, per endpoint: libvirtd has 20 workers, and each hung agent holds one. Those that were
silent the last time take turns among themselves, so that they delay nobody else's plan."""

FREEZES = 10
"""Freezes at once, per endpoint: the workers that are left must suffice for the thaws."""

_NO_GATE = frozenset({libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_NO_DOMAIN})
"""There is none; or the domain went away meanwhile."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """Where a domain is now."""

    uuid: str
    name: str
    endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A domain that bears a journal. `journal` is None if it cannot be read: `problem` then says why."""

    ref: Ref
    journal: Journal | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """A domain that bears a restore's gate, with the definition in which it stands; `problem` if that cannot be read."""

    ref: Ref
    definition: str
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A domain on one endpoint; `essence` of one that is off there: see `description.essence`."""

    ref: Ref
    active: bool
    essence: tuple[object, ...] = ()


class _Host:
    """One endpoint: its connections, its calls, and what bounds them."""

    def __init__(self, endpoint: str, uri: str, hub: EventHub) -> None:
        self.uri = uri
        self.calls = Calls(endpoint)
        self.main = Connection(uri, endpoint, self.calls, lambda c: hub.register(c, endpoint))
        self.holding = Lane(uri, f"{endpoint} (freeze)", self.calls)
        self.freeing = Lane(uri, f"{endpoint} (thaw)", self.calls)
        self.changing = Lane(uri, f"{endpoint} (change)", self.calls)
        self.queries = asyncio.Semaphore(AGENT_QUERIES)
        self.suspects = asyncio.Semaphore(SUSPECT_QUERIES)
        self.freezes = asyncio.Semaphore(FREEZES)

    async def look(self, what: str, function: Callable[..., T], *arguments: Any, timeout: Seconds = LOOK_TIMEOUT) -> T:  # noqa: ASYNC109 - handed on
        """Call `function(virConnect, *arguments)` on the main connection."""
        connection = await self.main.get()
        result = await self.calls.look(what, function, connection, *arguments, timeout=timeout)
        self.main.answered()
        return result

    async def close(self) -> None:
        await asyncio.gather(*(c.close() for c in (self.main, self.holding, self.freeing, self.changing)))


class Hypervisor:
    """The connections of one Hypervisor object. Made by `connect`, ended by `close`.

    `problems` says which endpoints did not answer when all were last asked, and why.
    """

    def __init__(self, name: str, uris: Mapping[str, str], folder: Path | None = None) -> None:
        self.name = name
        self.problems: Mapping[str, str] = {}
        self._hub = EventHub()
        self._hosts = {e: _Host(e, u, self._hub) for e, u in uris.items()}
        self._outstanding = Outstanding()
        self._silent: set[str] = set()
        self._freed: set[str] = set()
        self._surveyed: set[str] = set()
        self._folder = folder

    @classmethod
    async def at(cls, uri: str) -> Hypervisor:
        """Connect to one libvirt daemon by an administrator's own URI: for what must work without the API server.

        Never for a URI out of an object: one can name commands and switch verification off. Raises
        HypervisorUnreachableError.
        """
        found = cls(uri, {uri: uri})
        try:
            await found.reach()
        except BaseException:
            await found.close()
            raise
        return found

    @classmethod
    async def connect(
        cls, name: str, endpoints: Sequence[Endpoint], secret: Mapping[str, str], folder: Path | None = None
    ) -> Hypervisor:
        """Connect to all endpoints. Raises what `to` raises, and HypervisorUnreachableError unless one at least answers."""
        found = cls.to(name, endpoints, secret, folder)
        try:
            await found.reach()
        except BaseException:
            await found.close()
            raise
        return found

    @classmethod
    def to(
        cls, name: str, endpoints: Sequence[Endpoint], secret: Mapping[str, str], folder: Path | None = None
    ) -> Hypervisor:
        """Make the connections without asking anybody yet.

        `secret` is what the Hypervisor's Secret holds; its files are written into `folder`, which the guardian must see as
        well, or (None) into one that nobody else knows and that ends with `close`. Raises RefusedError for an endpoint or
        credentials that cannot be used.
        """
        own = Path(tempfile.mkdtemp(prefix="vmsnapshot-")) if folder is None else None
        try:
            files = credentials.write(own or folder or Path(), name, secret)
            user = secret.get("username", "")
            return cls(name, {e.name: compose(e, user=user, credentials=files) for e in endpoints}, own)
        except BaseException:
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)
            raise

    async def reach(self) -> None:
        """Ask all endpoints; raises HypervisorUnreachableError unless one at least answers. Can be repeated."""
        await self._each("connection", self._prepare)

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(host.close() for host in self._hosts.values()))
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def last_answer(self) -> float:
        """When the endpoint that has been silent longest last answered (`time.monotonic`); 0 if one never did."""
        return min(host.main.last_answer for host in self._hosts.values())

    @property
    def uris(self) -> tuple[str, ...]:
        """The URIs of all endpoints: a VM that is held may migrate to any of them."""
        return tuple(host.uri for host in self._hosts.values())

    def uri(self, ref: Ref) -> str:
        """Return the URI of the endpoint on which a domain is."""
        return self._hosts[ref.endpoint].uri

    async def about(self) -> dict[str, Any]:
        """Return versions and the number of domains, for status."""
        answers = await self._each("look", lambda e: self._hosts[e].look(f"look at {e}", _about))
        _, lib, hyper = answers[0]
        return {
            "libvirtVersion": _version(lib),
            "hypervisorVersion": _version(hyper),
            "domains": sum(count for count, _, _ in answers),
        }

    async def find(self, domain: str, may: Callable[[str], bool] = lambda _name: True) -> Ref:
        """Look a domain up by UUID or name on all endpoints; the running one if several have it, else the first of them.

        `may` tells by its name whether it may be seen: one that may not is to whoever asks as if it were not there, in the
        answer and in the time it takes. Raises DomainGoneError if none has it, or if several have different ones of that name;
        HypervisorUnreachableError if an endpoint that may have it, or on which it may be running, does not answer.
        """
        found, *_ = await self._locate(domain, may)
        return found.ref

    async def definitions(self, domain: str) -> tuple[Ref, ...]:
        """Return the one place where a domain runs, else all that define it, in the order of the endpoints; raises as `find`."""
        return tuple(found.ref for found in await self._locate(domain))

    async def places(self, ref: Ref) -> tuple[Ref, ...]:
        """Return where a domain is: where it runs, then every other definition of it, in the order of the endpoints.

        Raises as `find`, and HypervisorUnreachableError unless all endpoints answer.
        """
        found, problems = await self._ask_all(ref.uuid, lambda _name: True, hurry=False)
        if problems:
            raise HypervisorUnreachableError("; ".join(problems))
        if not found:
            raise self._gone(ref.uuid)
        return tuple(f.ref for f in found)

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        """Return everything a plan needs to know of a domain. Raises DomainAmbiguousError, and what `find` does."""
        here = await self._true_one(ref)
        host = self._hosts[here.endpoint]
        machine = await host.look(f"look at {ref.name}", _describe, here)
        if ask_agent and machine.power is PowerState.RUNNING:
            machine = replace(machine, agent=await self._ask(host, here))
        if machine.shut_down_from_within and not self._hub.shut_down_from_within(here.uuid, here.endpoint):
            why = f"{machine.power_reason}; it was not heard that its own system did that"
            machine = replace(machine, shut_down_from_within=False, power_reason=why)
        return machine

    async def window(self, ref: Ref) -> DomainWindow:
        """Look the domain up on two connections of few, so that nothing has to be looked up while it is held."""
        made = DomainWindow(ref.name, ref.uuid, self._outstanding, self._handles)
        await made.open()
        return made

    def order_may_come(self, ref: Ref) -> bool:
        """Whether libvirtd may still carry out an order of ours to hold this VM: the connection broke before it was answered."""
        return self._outstanding.lost(ref.uuid)

    def overlays(self, ref: Ref) -> Overlays:
        """The overlays of a domain."""
        return Overlays(self, ref)

    def backups(self, ref: Ref) -> Backups:
        """The backup job of a domain."""
        return Backups(self, ref)

    def checkpoints(self, ref: Ref) -> Checkpoints:
        """The checkpoints of a domain."""
        return Checkpoints(self, ref)

    async def all_checkpoints(self, prefix: str) -> tuple[Checkpoint, ...]:
        """Return the checkpoints of all domains whose names begin so, on the endpoints that answer."""
        found = await self._each(
            "checkpoints",
            lambda e: self._hosts[e].look(f"checkpoints on {e}", listed, prefix, timeout=SWEEP_TIMEOUT),
        )
        return tuple(sorted({c for endpoint in found for c in endpoint}))

    def endings(self, ref: Ref, since: Seconds) -> tuple[Ending, ...] | None:
        """Return the ends of backups of a domain that were heard of since then; None if one may have been missed."""
        host = self._hosts.get(ref.endpoint)
        deaf = host is None or host.main.live is None
        return None if deaf else self._hub.endings(ref.uuid, ref.endpoint, since)

    async def overlay_files(self, prefix: str, pool: str = "") -> tuple[tuple[OverlayFile, ...], Mapping[str, str]]:
        """Return what all endpoints have under such names (see `overlays.survey`), and which of them could not say it, and why.

        On connections that few use, so that a pool that hangs delays nobody. Never raises HypervisorError.
        """
        found: list[OverlayFile] = []
        problems: dict[str, str] = {}

        async def one(endpoint: str) -> None:
            def look(connection: Any) -> tuple[OverlayFile, ...]:
                self._surveyed.add(endpoint)
                try:
                    return overlays.survey(connection, endpoint, prefix, pool)
                finally:
                    self._surveyed.discard(endpoint)

            if endpoint in self._surveyed:
                # Each look that hangs keeps one of libvirtd's few workers: never a second one beside it.
                problems[endpoint] = f"{endpoint}: an earlier look at its pools has not returned"
                return
            try:
                found.extend(
                    await self.act_on(endpoint, f"overlays on {endpoint}", look, timeout=overlays.POOL_TIMEOUT)
                )
            except HypervisorError as error:
                problems[endpoint] = error.message

        await asyncio.gather(*(one(e) for e in self._hosts))
        return tuple(sorted(found, key=lambda f: (f.endpoint, f.path))), problems

    async def users(self, names: Collection[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return by name a domain one of whose disks has that name in its source; and which endpoints could not say it, and why.

        Never raises HypervisorError.
        """
        users: dict[str, str] = {}
        problems: dict[str, str] = {}

        async def one(endpoint: str) -> None:
            try:
                found = await self._hosts[endpoint].look(f"disks on {endpoint}", overlays.users, timeout=SWEEP_TIMEOUT)
            except HypervisorError as error:
                problems[endpoint] = error.message
            else:
                users.update({n: d for n in names for value, d in found.items() if n in value})

        await asyncio.gather(*(one(e) for e in self._hosts))
        return users, problems

    async def remove_overlay(self, file: OverlayFile) -> None:
        """Remove an overlay that nobody wrote to and that no VM of its host uses; missing is success."""

        def remove(connection: Any) -> None:
            overlays.remove_pristine(connection, file.path)

        await self.act_on(file.endpoint, f"removal of {file.path}", remove, timeout=overlays.POOL_TIMEOUT)

    def wait_for_switch(self, ref: Ref) -> None:
        """Raise HypervisorError while a switch of ours to overlays has not returned: it may still come."""
        self._wait_for(ref, "switch", "switch of ours to overlays")

    def wait_for_backup(self, ref: Ref) -> None:
        """Raise HypervisorError while a begin of a backup of ours has not returned: it may still come."""
        self._wait_for(ref, "backup", "begin of a copy of ours")

    def _wait_for(self, ref: Ref, key: str, what: str) -> None:
        if self._outstanding.any(f"{key} {ref.uuid}"):
            text = f"domain {ref.name}: a {what} has not returned, so it may still come"
            raise HypervisorError(text, retryable=True)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The names of all endpoints."""
        return tuple(self._hosts)

    async def read_journal(self, ref: Ref) -> Journal | None:
        """Return the journal in the domain's metadata. Raises HypervisorError if there is one that cannot be read.

        Of a VM that is off and has several definitions any that bears one: rather one of overlays than one that says that it is held.
        """
        try:
            found = [j for j in await self._at_each(ref, f"journal of {ref.name}", journals.read) if j is not None]
            return min(found, key=lambda j: j.holds, default=None)
        except UnreadableJournalError as error:
            raise HypervisorError(f"domain {ref.name}: {error}", reason="JournalUnreadable", retryable=True) from error

    async def write_journal(self, ref: Ref, journal: Journal, permit: Permit = always) -> None:
        """Write the journal and read it back.

        Raises ForeignJournalError if another one is there, and NotPermittedError if `permit` says no: then nothing was written.
        """
        here = await self.find(ref.uuid)
        await self._at(here, f"journal of {ref.name}", lambda domain: journals.write(domain, journal, permit))

    async def update_journal(self, ref: Ref, journal: Journal, *, held: bool = False) -> bool:
        """Have the journal with this nonce say something else; False if it is not there any more. `held`: see `journals.update`."""
        what = f"journal of {ref.name}"
        return any(await self._at_each(ref, what, lambda domain: journals.update(domain, journal, held=held)))

    async def clear_journal(self, ref: Ref, nonce: str) -> None:
        """Remove the journal if it is the one with this nonce: where the VM is, and from a definition that was left on `ref.endpoint`."""
        places = [found.ref for found in await self._locate(ref.uuid)]
        for place in places:
            await self._at(place, f"journal of {ref.name}", lambda domain: journals.clear(domain, nonce))
        self._freed.discard(nonce)
        if ref.endpoint not in {p.endpoint for p in places}:
            await self.clear_left(ref, nonce)

    async def clear_left(self, ref: Ref, nonce: str) -> None:
        """Remove the journal with this nonce from the definition on `ref.endpoint`, if it says that the VM is held.

        For who knows that the VM is not held by it any more, wherever that runs: it may have migrated since, and a definition that it left
        keeps what it bore then. Where it runs, nothing is done; nor where it is not any more.
        """
        if ref.endpoint not in self._hosts:
            return
        try:
            await self._at(ref, f"journal of {ref.name}", lambda domain: journals.clear_left(domain, nonce))
        except DomainGoneError:
            return

    def freed(self, nonce: str) -> None:
        """Note that the VM which the journal with this nonce tells of is free, by the word of who freed it."""
        self._freed.add(nonce)

    def was_freed(self, nonce: str) -> bool:
        """Whether `freed` was told so by this process: the journal may have stayed because it could not be removed."""
        return nonce in self._freed

    async def sweep(self) -> list[Sighting]:
        """Return all domains that bear a journal, also one that cannot be read, on the endpoints that answer."""
        found = await self._each(
            "sweep", lambda e: self._hosts[e].look(f"sweep of {e}", _sweep, e, timeout=SWEEP_TIMEOUT)
        )
        return [each for endpoint in found for each in endpoint]

    async def gates(self) -> tuple[tuple[Gated, ...], Mapping[str, str]]:
        """Return all domains that bear a restore's gate, whoever's, and which endpoints could not say it, and why.

        Never raises HypervisorError.
        """
        found: list[Gated] = []
        problems: dict[str, str] = {}

        async def one(endpoint: str) -> None:
            try:
                found.extend(await self._hosts[endpoint].look(f"gates on {endpoint}", _gates, endpoint))
            except HypervisorError as error:
                problems[endpoint] = error.message

        await asyncio.gather(*(one(e) for e in self._hosts))
        return tuple(sorted(found, key=lambda g: (g.ref.name, g.ref.endpoint))), problems

    def events(self, ref: Ref) -> AbstractContextManager[EventWatch]:
        """Watch what happens to a domain until left, on whatever endpoint; asks nobody, neither when entered nor when left."""
        host = self._hosts.get(ref.endpoint)
        return self._hub.watch(ref.uuid, ref.endpoint, blind=host is None or host.main.live is None)

    async def act(
        self,
        ref: Ref,
        what: str,
        act: Callable[[Any], T],
        *,
        timeout: Seconds = ACT_TIMEOUT,  # noqa: ASYNC109 - the call is left behind at the deadline
        any_definition: bool = False,
    ) -> T:
        """Call `act(virDomain)`, blocking, in a thread, where the domain is now. Raises what `find` does, and CallTimeoutError.

        Raises DomainAmbiguousError if it is off and has definitions that differ; not with `any_definition`, for what concerns only one
        that runs.
        """
        here = await (self.find(ref.uuid) if any_definition else self._true_one(ref))
        return await self.act_on(here.endpoint, what, lambda c: act(c.lookupByUUIDString(ref.uuid)), timeout=timeout)

    async def act_on(self, endpoint: str, what: str, act: Callable[[Any], T], *, timeout: Seconds) -> T:  # noqa: ASYNC109 - as above
        """Call `act(virConnect)`, blocking, in a thread; raises HypervisorUnreachableError if there is no such endpoint.

        On a connection that few use: a start or a shutdown may take minutes, and five of them would stop a connection.
        """
        host = self._hosts.get(endpoint)
        if host is None:
            raise HypervisorUnreachableError(f'hypervisor "{self.name}" has no endpoint "{endpoint}"')
        connection = await host.changing.seat(asyncio.current_task())
        return await host.calls.act(what, act, connection, timeout=timeout)

    async def _prepare(self, endpoint: str) -> None:
        host = self._hosts[endpoint]
        await host.main.get()
        await asyncio.gather(host.holding.open(), host.freeing.open())

    async def _ask(self, host: _Host, ref: Ref) -> Agent:
        turn = host.suspects if ref.uuid in self._silent else host.queries
        async with turn:
            try:
                found = await host.look(f"agent of {ref.name}", _ask, ref.uuid)
            except CallTimeoutError:
                self._silent.add(ref.uuid)  # somebody else's question hangs in the agent, and ours behind it
                raise
        (self._silent.add if found.state is AgentState.SILENT else self._silent.discard)(ref.uuid)
        return found

    async def _handles(self, window: DomainWindow) -> Handles:
        found, *_ = await self._locate(window.uuid)
        ref = found.ref
        host = self._hosts[ref.endpoint]
        holding, freeing = await asyncio.gather(host.holding.seat(window), host.freeing.seat(window))
        what = f"look-up of {ref.name}"
        domains = await asyncio.gather(
            *(host.calls.act(what, c.lookupByUUIDString, ref.uuid, timeout=ACT_TIMEOUT) for c in (holding, freeing))
        )
        return Handles(domains[0], domains[1], host.calls, host.freezes, found.active)

    async def _at_each(self, ref: Ref, what: str, act: Callable[[Any], T]) -> list[T]:
        """Act on the domain where it runs, else on every definition of it; on the main connections."""
        return [await self._at(found.ref, what, act) for found in await self._locate(ref.uuid)]

    async def _at(self, place: Ref, what: str, act: Callable[[Any], T]) -> T:
        host = self._hosts[place.endpoint]
        connection = await host.main.get()
        return await host.calls.act(what, lambda: act(connection.lookupByUUIDString(place.uuid)), timeout=ACT_TIMEOUT)

    async def _true_one(self, ref: Ref) -> Ref:
        """Return where the domain is now; raises DomainAmbiguousError if nobody can tell."""
        found = await self._locate(ref.uuid)
        if any(f.essence != found[0].essence for f in found):
            where = [f.ref.endpoint for f in found]
            raise DomainAmbiguousError(
                found[0].ref.name,
                where,
                "runs on none of them, and the disks or devices differ: which one is true is unknown",
            )
        return found[0].ref

    async def _locate(self, domain: str, may: Callable[[str], bool] = lambda _name: True) -> list[_Found]:
        """Return the one place where a domain runs, else all that define it, in the order of the endpoints; raises as `find`."""
        found, problems = await self._ask_all(domain, may, hurry=_is_uuid(domain))
        if len({f.ref.uuid for f in found}) > 1:
            refs = [f.ref for f in found]
            log.warning("hypervisor %s has several domains %r; name one by its UUID: %s", self.name, domain, refs)
            raise DomainGoneError(
                f'hypervisor "{self.name}" has several domains "{domain}": name it by its UUID', ambiguous=True
            )
        running = [f for f in found if f.active]
        if problems and not running:
            raise HypervisorUnreachableError("; ".join(problems))
        if not found:
            raise self._gone(domain)
        return running[:1] or found

    def _gone(self, domain: str) -> DomainGoneError:
        return DomainGoneError(f'hypervisor "{self.name}" has no domain "{domain}"')

    async def _ask_all(self, domain: str, may: Callable[[str], bool], *, hurry: bool) -> tuple[list[_Found], list[str]]:
        """Return what all endpoints have of this UUID or name, those that run first, and which did not answer, and why.

        In a `hurry` whoever says that it runs there is the last who is heard: one that hangs delays nobody whose VM runs elsewhere.
        """
        answers: dict[str, _Found] = {}
        problems: list[str] = []

        async def ask(endpoint: str) -> bool:
            try:
                found = await self._look_for(endpoint, domain, may)
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

    async def _look_for(self, endpoint: str, domain: str, may: Callable[[str], bool]) -> _Found | None:
        try:
            name, uuid, active, essence = await self._hosts[endpoint].look(
                f"look-up of {domain} on {endpoint}", _find, domain
            )
        except DomainGoneError:
            self._hosts[endpoint].main.answered()
            return None
        if not may(name):
            return None
        return _Found(ref=Ref(uuid=uuid, name=name, endpoint=endpoint), active=active, essence=essence)

    async def _each(self, what: str, act: Callable[[str], Awaitable[T]]) -> list[T]:
        """Do something with every endpoint at once; raises HypervisorUnreachableError if none answers."""
        answers: list[T] = []
        problems: dict[str, str] = {}

        async def one(endpoint: str) -> None:
            try:
                answers.append(await act(endpoint))
            except HypervisorError as error:
                problems[endpoint] = error.message

        await asyncio.gather(*(one(e) for e in self._hosts))
        if problems and set(problems) != set(self.problems):
            log.warning("hypervisor %s, %s: %s", self.name, what, "; ".join(problems.values()))
        self.problems = problems
        if not answers:
            raise HypervisorUnreachableError(
                "; ".join(problems.values()) or f'hypervisor "{self.name}" has no endpoint'
            )
        return answers


# --- blocking, in a thread of their own --------------------------------------------------------------------------------


def _is_uuid(text: str) -> bool:
    try:
        uuid_module.UUID(text)
    except ValueError:
        return False
    return True


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _about(connection: Any) -> tuple[int, int, int]:
    return (
        connection.numOfDomains() + connection.numOfDefinedDomains(),
        connection.getLibVersion(),
        connection.getVersion(),
    )


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


def _ask(connection: Any, uuid: str) -> Agent:
    return agents.ask(connection.lookupByUUIDString(uuid))


def _describe(connection: Any, ref: Ref) -> Machine:
    try:
        return description.describe(connection, ref.uuid, ref.endpoint)
    except ValueError as error:
        raise HypervisorError(f"domain {ref.name}: {error}") from error


def _sweep(connection: Any, endpoint: str) -> list[Sighting]:
    return [
        Sighting(
            ref=Ref(uuid=domain.UUIDString(), name=domain.name(), endpoint=endpoint), journal=journal, problem=problem
        )
        for domain, journal, problem in journals.sweep(connection)
    ]


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
