"""Which VMs are held, until when, and freeing those whose time is over.

It learns of journals by itself: from each libvirt's metadata events, and by looking each second. A timer starts at first
sight, by this process's own clock. An early thaw is always safe: the thaw's count betrays it to the operator.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import libvirt

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.guardian import release
from vmsnapshot_operator.guardian.log import say

POLL_SECONDS = 1.0
RECONNECT_SECONDS = 1.0


class RefusedError(Exception):
    """The guardian does not acknowledge; the text says why."""


def clock() -> float:
    """Seconds that go on while the machine sleeps, and are never set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class Held:
    """One journal that was seen. `done`: it was freed, or its holder said that it is over."""

    uri: str
    domain: str
    journal: Journal
    until: float
    done: bool = False
    releasing: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class Watch:
    """All journals on all libvirts that are followed. Every public method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._followed: dict[str, libvirt.virConnect | None] = {}
        self._wake = threading.Event()
        libvirt.registerErrorHandler(lambda *_: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_events, daemon=True).start()
        threading.Thread(target=self._expire, daemon=True).start()

    def follow(self, uri: str) -> None:
        """Look at this libvirt from now on."""
        with self._lock:
            if uri in self._followed:
                return
            self._followed[uri] = None
        threading.Thread(target=self._follow, args=(uri,), daemon=True).start()

    def arm(self, uri: str, domain: str, nonce: str) -> None:
        """Read the journal in the domain itself and start its timer. Raises RefusedError."""
        self.follow(uri)
        connection = self._connection(uri)
        try:
            found = read(connection, connection.lookupByUUIDString(domain))
        except libvirt.libvirtError as error:
            raise RefusedError(f"domain {domain}: {error.get_error_message()}") from error
        except UnreadableJournalError as error:
            raise RefusedError(f"domain {domain}: {error}") from error
        if found is None or found.nonce != nonce:
            raise RefusedError(f"domain {domain} does not bear the journal {nonce}")
        self._see(uri, domain, found)

    def disarm(self, nonce: str) -> None:
        """The VM is free, says its holder."""
        with self._lock:
            held = self._held.get(nonce)
            if held is not None:
                held.done = True

    def release(self, nonce: str, why: str) -> None:
        """Free a VM now, in a thread of its own: a dead agent delays nobody else."""
        with self._lock:
            held = self._held.get(nonce)
            if held is None or held.done or held.releasing:
                return
            held.releasing = True
        threading.Thread(target=self._release, args=(held, why), daemon=True).start()

    def release_all(self, why: str, seconds: float = 10.0) -> None:
        """Free everything that is armed, and wait for it, but not longer than so many seconds."""
        with self._lock:
            open_ = [h for h in self._held.values() if not h.done]
        for held in open_:
            self.release(held.journal.nonce, why)
        end = clock() + seconds
        for held in open_:
            held.over.wait(max(0.0, end - clock()))

    def status(self) -> dict[str, Any]:
        """What is followed and what is held."""
        with self._lock:
            armed = [h for h in self._held.values() if not h.done]
            return {
                "armed": len(armed),
                "releasing": sum(h.releasing for h in armed),
                "followed": {u: bool(c is not None and c.isAlive()) for u, c in self._followed.items()},
            }

    def _see(self, uri: str, domain: str, journal: Journal) -> None:
        with self._lock:
            if journal.nonce in self._held:
                return
            self._held[journal.nonce] = Held(uri, domain, journal, clock() + journal.budget)
        say("armed", domain=domain, nonce=journal.nonce, method=journal.method, budget=journal.budget)
        self._wake.set()

    def _release(self, held: Held, why: str) -> None:
        say("releasing", domain=held.domain, nonce=held.journal.nonce, method=held.journal.method, why=why)
        release.free(held.uri, held.domain, held.journal.method, held.journal.nonce)
        with self._lock:
            held.done = True
        held.over.set()
        say("released", domain=held.domain, nonce=held.journal.nonce)

    def _expire(self) -> None:
        while True:
            with self._lock:
                waiting = [h for h in self._held.values() if not h.done and not h.releasing]
            now = clock()
            for held in waiting:
                if held.until <= now:
                    self.release(held.journal.nonce, "its budget is over")
            left = [h.until - now for h in waiting if h.until > now]
            self._wake.wait(min(left, default=POLL_SECONDS))
            self._wake.clear()

    def _connection(self, uri: str) -> libvirt.virConnect:
        with self._lock:
            connection = self._followed.get(uri)
        if connection is not None and connection.isAlive():
            return connection
        try:
            connection = libvirt.open(uri)
            if not uri.startswith("test:"):
                connection.setKeepAlive(3, 3)
            connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, self._changed, uri)
        except libvirt.libvirtError as error:
            raise RefusedError(f"libvirt {uri}: {error.get_error_message()}") from error
        with self._lock:
            self._followed[uri] = connection
        return connection

    def _changed(self, _connection: Any, _domain: Any, _kind: int, namespace: str | None, uri: str) -> None:
        """A metadata event: have this libvirt looked at soon; libvirt's event thread must not call back into it."""
        if namespace == journals.NAMESPACE:
            threading.Thread(target=self._look, args=(uri,), daemon=True).start()

    def _follow(self, uri: str) -> None:
        quiet = True
        while True:
            try:
                self._look(uri)
                quiet = True
            except RefusedError as error:
                if quiet:
                    say("libvirt does not answer", uri=uri, why=str(error))
                quiet = False
            time.sleep(POLL_SECONDS)

    def _look(self, uri: str) -> None:
        """Take in all journals of one libvirt; forget those that are gone."""
        connection = self._connection(uri)
        present: set[str] = set()
        try:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                try:
                    found = read(connection, domain)
                except UnreadableJournalError as error:
                    say("journal not understood", domain=domain.UUIDString(), why=str(error))
                    continue
                except libvirt.libvirtError as error:
                    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                        continue
                    raise
                if found is not None:
                    present.add(found.nonce)
                    self._see(uri, domain.UUIDString(), found)
        except libvirt.libvirtError as error:
            raise RefusedError(f"libvirt {uri}: {error.get_error_message()}") from error
        with self._lock:
            for nonce, held in list(self._held.items()):
                if held.uri == uri and held.done and nonce not in present:
                    del self._held[nonce]


def read(connection: libvirt.virConnect, domain: libvirt.virDomain) -> Journal | None:  # noqa: ARG001 - keeps the connection alive
    """Return the journal that a running domain bears, or None."""
    try:
        text = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() in (
            libvirt.VIR_ERR_NO_DOMAIN_METADATA, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_SUPPORT
        ):
            return None
        raise
    return journals.from_xml(text)


def _events() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
