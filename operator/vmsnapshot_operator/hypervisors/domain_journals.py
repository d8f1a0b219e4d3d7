"""The journals of one Hypervisor object's domains, wherever these are now; and which VMs are free though their journal stayed.

Never blocks the event loop; everything raises HypervisorError or a child of it. Not how a journal stands in one domain's metadata
(`journals`), nor what it says (`core.journal`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.errors import DomainGoneError, HypervisorError
from vmsnapshot_operator.hypervisors import journals, overlays
from vmsnapshot_operator.hypervisors.hosts import SWEEP_TIMEOUT, Host
from vmsnapshot_operator.hypervisors.lookup import Lookup, Ref
from vmsnapshot_operator.hypervisors.window import ACT_TIMEOUT, Permit

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A domain that bears a journal. `journal` is None if it cannot be read: `problem` then says why.

    `stalled`: an I/O error has paused it, as far as its host knows by itself: maybe at an overlay that the journal names.
    """

    ref: Ref
    journal: Journal | None
    problem: str = ""
    stalled: bool = False


class DomainJournals:
    """The journals of all domains of a Hypervisor object. What each method promises, the one of `Hypervisor` says."""

    def __init__(self, hosts: Mapping[str, Host], lookup: Lookup) -> None:
        self._hosts = hosts
        self._lookup = lookup
        self._freed: set[str] = set()

    async def read(self, ref: Ref) -> Journal | None:
        """Return the journal of a domain."""
        try:
            found = [j for j in await self._at_each(ref, journals.read) if j is not None]
            return min(found, key=lambda j: j.holds, default=None)
        except UnreadableJournalError as error:
            raise HypervisorError(f"domain {ref.name}: {error}", reason="JournalUnreadable", retryable=True) from error

    async def write(self, ref: Ref, journal: Journal, permit: Permit) -> None:
        """Write the journal and read it back."""
        here, *_ = await self._places(ref)
        await self._at(here, ref.name, lambda domain: journals.write(domain, journal, permit))

    async def update(self, ref: Ref, journal: Journal, *, held: bool) -> bool:
        """Have the journal with this nonce say something else; False if it is not there any more."""
        return any(await self._at_each(ref, lambda domain: journals.update(domain, journal, held=held)))

    async def clear(self, ref: Ref, nonce: str) -> None:
        """Remove the journal with this nonce: where the VM is, and from a definition that was left on `ref.endpoint`."""
        places = await self._places(ref)
        for place in places:
            await self._at(place, ref.name, lambda domain: journals.clear(domain, nonce))
        self._freed.discard(nonce)
        if ref.endpoint not in {p.endpoint for p in places}:
            await self.clear_left(ref, nonce)

    async def clear_left(self, ref: Ref, nonce: str) -> None:
        """Remove the journal with this nonce from the definition that was left on `ref.endpoint`."""
        if ref.endpoint not in self._hosts:
            return
        try:
            await self._at(ref, ref.name, lambda domain: journals.clear_left(domain, nonce))
        except DomainGoneError:
            return

    def freed(self, nonce: str) -> None:
        """Note that the VM which the journal with this nonce tells of is free."""
        self._freed.add(nonce)

    def was_freed(self, nonce: str) -> bool:
        """Whether that was noted."""
        return nonce in self._freed

    async def _places(self, ref: Ref) -> list[Ref]:
        return [found.ref for found in await self._lookup.locate(ref.uuid)]

    async def _at_each(self, ref: Ref, act: Callable[[Any], T]) -> list[T]:
        """Act on the domain where it runs, else on every definition of it; on the main connections."""
        return [await self._at(place, ref.name, act) for place in await self._places(ref)]

    async def _at(self, place: Ref, name: str, act: Callable[[Any], T]) -> T:
        host = self._hosts[place.endpoint]
        connection = await host.main.get()
        return await host.calls.act(
            f"journal of {name}", lambda: act(connection.lookupByUUIDString(place.uuid)), timeout=ACT_TIMEOUT
        )


async def sweep(host: Host) -> list[Sighting]:
    """Return all domains of an endpoint that bear a journal, also one that cannot be read."""
    return await host.look(f"sweep of {host.endpoint}", _sweep, host.endpoint, timeout=SWEEP_TIMEOUT)


# --- blocking, in a thread of its own ----------------------------------------------------------------------------------


def _sweep(connection: Any, endpoint: str) -> list[Sighting]:
    return [_sighting(domain, journal, problem, endpoint) for domain, journal, problem in journals.sweep(connection)]


def _sighting(domain: Any, journal: Journal | None, problem: str, endpoint: str) -> Sighting:
    ref = Ref(uuid=domain.UUIDString(), name=domain.name(), endpoint=endpoint)
    overlaid = journal.overlays if journal is not None and not journal.holds else {}
    stalled = bool(overlaid) and overlays.seen_stalled(
        lambda: domain, overlaid
    )  # one whose QEMU hangs hides none of the others
    return Sighting(ref=ref, journal=journal, problem=problem, stalled=stalled)
