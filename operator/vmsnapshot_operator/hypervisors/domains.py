"""The domains of one Hypervisor object: the one class by which everything of them is reached, connected and closed.

What it does is in modules beside this one, each of one subject (`lookup`, `machines`, `domain_journals`, `surveys`, `overlays`, ...).
A Hypervisor may have several endpoints between which VMs migrate: a domain is looked up on all of them at each step.
Never blocks the event loop; every method raises HypervisorError or a child of it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from vmsnapshot_operator.core.backups import Ending
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Machine
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors import credentials, domain_journals, overlays, surveys
from vmsnapshot_operator.hypervisors.backups import Backups
from vmsnapshot_operator.hypervisors.checkpoints import Checkpoints, listed
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint
from vmsnapshot_operator.hypervisors.domain_journals import DomainJournals, Sighting
from vmsnapshot_operator.hypervisors.events import EventHub, EventWatch
from vmsnapshot_operator.hypervisors.hosts import SWEEP_TIMEOUT, Host, ask_each
from vmsnapshot_operator.hypervisors.lookup import Lookup, May, Ref, anyone
from vmsnapshot_operator.hypervisors.machines import Machines
from vmsnapshot_operator.hypervisors.overlays import Overlays
from vmsnapshot_operator.hypervisors.surveys import Gated, OverlayFiles
from vmsnapshot_operator.hypervisors.uri import compose
from vmsnapshot_operator.hypervisors.window import ACT_TIMEOUT, DomainWindow, Handles, Outstanding, Permit, always

__all__ = ["DomainWindow", "EventWatch", "Gated", "Hypervisor", "Ref", "Sighting"]

log = logging.getLogger(__name__)

T = TypeVar("T")


class Hypervisor:
    """The connections of one Hypervisor object. Made by `connect`, ended by `close`.

    `problems` says which endpoints did not answer when all were last asked, and why.
    """

    def __init__(self, name: str, uris: Mapping[str, str], folder: Path | None = None) -> None:
        self.name = name
        self.problems: Mapping[str, str] = {}
        self._hub = EventHub()
        self._hosts = {e: Host(e, u, self._hub) for e, u in uris.items()}
        self._lookup = Lookup(name, self._hosts)
        self._machines = Machines(self._hosts, self._lookup, self._hub)
        self._journals = DomainJournals(self._hosts, self._lookup)
        self._overlay_files = OverlayFiles(self._hosts)
        self._outstanding = Outstanding()
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
        await self._each("connection", Host.reach)

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
    def endpoints(self) -> tuple[str, ...]:
        """The names of all endpoints."""
        return tuple(self._hosts)

    @property
    def uris(self) -> tuple[str, ...]:
        """The URIs of all endpoints: a VM that is held may migrate to any of them."""
        return tuple(host.uri for host in self._hosts.values())

    def uri(self, ref: Ref) -> str:
        """Return the URI of the endpoint on which a domain is."""
        return self._hosts[ref.endpoint].uri

    async def about(self) -> dict[str, Any]:
        """Return versions and the number of domains, for status."""
        return surveys.about(await self._each("look", surveys.count))

    async def find(self, domain: str, may: May = anyone) -> Ref:
        """Look a domain up by UUID or name on all endpoints; the running one if several have it, else the first of them.

        `may` tells by its name whether it may be seen: one that may not is to whoever asks as if it were not there, in the
        answer and in the time it takes. Raises DomainGoneError if none has it, or if several have different ones of that name;
        HypervisorUnreachableError if an endpoint that may have it, or on which it may be running, does not answer.
        """
        found, *_ = await self._lookup.locate(domain, may)
        return found.ref

    async def definitions(self, domain: str) -> tuple[Ref, ...]:
        """Return the one place where a domain runs, else all that define it, in the order of the endpoints; raises as `find`."""
        return tuple(found.ref for found in await self._lookup.locate(domain))

    async def places(self, ref: Ref) -> tuple[Ref, ...]:
        """Return where a domain is: where it runs, then every other definition of it, in the order of the endpoints.

        Raises as `find`, and HypervisorUnreachableError unless all endpoints answer.
        """
        return await self._lookup.places(ref)

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        """Return everything a plan needs to know of a domain. Raises DomainAmbiguousError, and what `find` does."""
        return await self._machines.describe(ref, ask_agent=ask_agent)

    async def window(self, ref: Ref) -> DomainWindow:
        """Look the domain up on two connections of few, so that nothing has to be looked up while it is held."""
        made = DomainWindow(ref.name, ref.uuid, self._outstanding, self._handles)
        await made.open()
        return made

    def order_may_come(self, ref: Ref) -> bool:
        """Whether libvirtd may still carry out an order of ours to hold this VM: the connection broke before it was answered."""
        return self._outstanding.lost(ref.uuid)

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

    def events(self, ref: Ref) -> AbstractContextManager[EventWatch]:
        """Watch what happens to a domain until left, on whatever endpoint; asks nobody, neither when entered nor when left."""
        host = self._hosts.get(ref.endpoint)
        return self._hub.watch(ref.uuid, ref.endpoint, blind=host is None or host.main.live is None)

    def endings(self, ref: Ref, since: Seconds) -> tuple[Ending, ...] | None:
        """Return the ends of backups of a domain that were heard of since then; None if one may have been missed."""
        host = self._hosts.get(ref.endpoint)
        deaf = host is None or host.main.live is None
        return None if deaf else self._hub.endings(ref.uuid, ref.endpoint, since)

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
            lambda h: h.look(f"checkpoints on {h.endpoint}", listed, prefix, timeout=SWEEP_TIMEOUT),
        )
        return tuple(sorted({c for endpoint in found for c in endpoint}))

    async def overlay_files(self, prefix: str, pool: str = "") -> tuple[tuple[OverlayFile, ...], Mapping[str, str]]:
        """Return what all endpoints have under such names (see `overlays.survey`), and which of them could not say it, and why.

        On connections that few use, so that a pool that hangs delays nobody. Never raises HypervisorError.
        """
        return await self._overlay_files.look(prefix, pool)

    async def remove_overlay(self, file: OverlayFile) -> None:
        """Remove an overlay that nobody wrote to and that no VM of its host uses; missing is success."""

        def remove(connection: Any) -> None:
            overlays.remove_pristine(connection, file.path)

        await self.act_on(file.endpoint, f"removal of {file.path}", remove, timeout=overlays.POOL_TIMEOUT)

    async def users(self, names: Collection[str]) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return by name a domain one of whose disks has that name in its source; and which endpoints could not say it, and why.

        Never raises HypervisorError.
        """
        return await surveys.users(self._hosts, names)

    async def gates(self) -> tuple[tuple[Gated, ...], Mapping[str, str]]:
        """Return all domains that bear a restore's gate, whoever's, and which endpoints could not say it, and why.

        Never raises HypervisorError.
        """
        return await surveys.gates(self._hosts)

    async def sweep(self) -> list[Sighting]:
        """Return all domains that bear a journal, also one that cannot be read, on the endpoints that answer."""
        found = await self._each("sweep", domain_journals.sweep)
        return [each for endpoint in found for each in endpoint]

    async def read_journal(self, ref: Ref) -> Journal | None:
        """Return the journal in the domain's metadata. Raises HypervisorError if there is one that cannot be read.

        Of a VM that is off and has several definitions any that bears one: rather one of overlays than one that says that it is held.
        """
        return await self._journals.read(ref)

    async def write_journal(self, ref: Ref, journal: Journal, permit: Permit = always) -> None:
        """Write the journal and read it back.

        Raises ForeignJournalError if another one is there, and NotPermittedError if `permit` says no: then nothing was written.
        """
        await self._journals.write(ref, journal, permit)

    async def update_journal(self, ref: Ref, journal: Journal, *, held: bool = False) -> bool:
        """Have the journal with this nonce say something else; False if it is not there any more. `held`: see `journals.update`."""
        return await self._journals.update(ref, journal, held=held)

    async def clear_journal(self, ref: Ref, nonce: str) -> None:
        """Remove the journal if it is the one with this nonce: where the VM is, and from a definition that was left on `ref.endpoint`."""
        await self._journals.clear(ref, nonce)

    async def clear_left(self, ref: Ref, nonce: str) -> None:
        """Remove the journal with this nonce from the definition on `ref.endpoint`, if it says that the VM is held.

        For who knows that the VM is not held by it any more, wherever that runs: it may have migrated since, and a definition that it left
        keeps what it bore then. Where it runs, nothing is done; nor where it is not any more.
        """
        await self._journals.clear_left(ref, nonce)

    def freed(self, nonce: str) -> None:
        """Note that the VM which the journal with this nonce tells of is free, by the word of who freed it."""
        self._journals.freed(nonce)

    def was_freed(self, nonce: str) -> bool:
        """Whether `freed` was told so by this process: the journal may have stayed because it could not be removed."""
        return self._journals.was_freed(nonce)

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
        here = await (self.find(ref.uuid) if any_definition else self._lookup.true_one(ref))
        return await self.act_on(here.endpoint, what, lambda c: act(c.lookupByUUIDString(ref.uuid)), timeout=timeout)

    async def act_on(self, endpoint: str, what: str, act: Callable[[Any], T], *, timeout: Seconds) -> T:  # noqa: ASYNC109 - as above
        """Call `act(virConnect)`, blocking, in a thread; raises HypervisorUnreachableError if there is no such endpoint.

        On a connection that few use: a start or a shutdown may take minutes, and five of them would stop a connection.
        """
        host = self._hosts.get(endpoint)
        if host is None:
            raise HypervisorUnreachableError(f'hypervisor "{self.name}" has no endpoint "{endpoint}"')
        return await host.act(what, act, timeout=timeout)

    async def _handles(self, window: DomainWindow) -> Handles:
        found, *_ = await self._lookup.locate(window.uuid)
        ref = found.ref
        host = self._hosts[ref.endpoint]
        holding, freeing = await asyncio.gather(host.holding.seat(window), host.freeing.seat(window))
        what = f"look-up of {ref.name}"
        domains = await asyncio.gather(
            *(host.calls.act(what, c.lookupByUUIDString, ref.uuid, timeout=ACT_TIMEOUT) for c in (holding, freeing))
        )
        return Handles(domains[0], domains[1], host.calls, host.freezes, found.active)

    async def _each(self, what: str, ask: Callable[[Host], Awaitable[T]]) -> tuple[T, ...]:
        """Ask every endpoint at once; raises HypervisorUnreachableError if none answers."""
        answers, problems = await ask_each(self._hosts, ask)
        if problems and set(problems) != set(self.problems):
            log.warning("hypervisor %s, %s: %s", self.name, what, "; ".join(problems.values()))
        self.problems = problems
        if not answers:
            raise HypervisorUnreachableError(
                "; ".join(problems.values()) or f'hypervisor "{self.name}" has no endpoint'
            )
        return answers
