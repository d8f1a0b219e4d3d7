"""Which VMs are held, until when, and freeing those whose time is over, or whose holder is gone.

It learns of journals by itself (`host`) and from the operator (`server`). A timer starts at first sight, by this process's
own clock. An early thaw is always safe: the thaw's count betrays it to the operator. The journal is never removed here: the
operator needs to see it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import libvirt

from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.guardian import release
from vmsnapshot_operator.guardian.attempts import Attempts
from vmsnapshot_operator.guardian.host import Host
from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.release import Outcome

TURN_SECONDS = 1.0
ATTEMPT_SECONDS = 20.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
SETTLE_SECONDS = 35.0
"""How long a VM that was freed is looked at again, its journal gone or not: libvirtd keeps the order of a holder that died in line
for up to 30 s (`QEMU_JOB_WAIT_TIME` of libvirt 9.0), and carries it out then."""

WATCHFUL_SECONDS = 10.0
"""How often it is looked at after that, as long as its journal is there: whoever wrote it may have been stopped, not dead."""

LOST_SECONDS = 600.0
"""How long a held VM that was found nowhere is remembered: one that migrated to a host not yet followed comes to be seen there."""

ENDED_KEPT = 4096
"""Journals whose holders have said that it is over, of which it is remembered: they come back with a VM that was saved while it was held."""

HOPELESS_TRIES, HOPELESS_AT_ONCE = 5, 6
"""VMs that could not be freed in so many tries take turns, so many at a time: each dead agent holds one of libvirtd's 20
workers, and the others must find one. Those that were free once take as many turns of their own: nobody who is held waits for them."""


class RefusedError(Exception):
    """The guardian does not acknowledge; the text says why."""


def clock() -> float:
    """Seconds that go on while the machine sleeps, and are never set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(slots=True)
class Held:
    """One journal that was seen. `armed`: its holder asked for it, and will say when it is over.

    `over`: it was freed, or its holder says so, or the journal is gone; whoever frees it goes on to look at it. `lost`: since when it was due and found on no host; it
    is freed as soon as it is seen on one. `said`: the last failure at each URI, which is said once.
    """

    uri: str
    domain: str
    journal: Journal
    until: float
    armed: bool = False
    releasing: bool = False
    lost: float | None = None
    over: threading.Event = field(default_factory=threading.Event)
    said: dict[str, str] = field(default_factory=dict)


class Watch:
    """All journals on all libvirts that are followed. Every public method may be called from any thread.

    `grace`: seconds that are added to each budget, for a guardian that comes after another one.
    """

    def __init__(self, clock: Callable[[], float] = clock, grace: float = 0.0) -> None:
        self._clock = clock
        self._grace = grace
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._ended: deque[str] = deque(maxlen=ENDED_KEPT)
        self._hosts: dict[str, Host] = {}
        self._wake = threading.Event()
        # By whether they were free once, and are looked at again.
        self._hopeless = {again: threading.BoundedSemaphore(HOPELESS_AT_ONCE) for again in (False, True)}
        self._turned = clock()
        self._ending = False

    def start(self) -> None:
        """Begin to free what is due."""
        threading.Thread(target=self._expire, name="expire", daemon=True).start()

    def follow(self, uri: str) -> bool:
        """Look at this libvirt from now on; True if it was not followed before."""
        with self._lock:
            if uri in self._hosts:
                return False
            host = self._hosts[uri] = Host(uri, self.seen)
        host.start()
        return True

    def followed(self) -> list[str]:
        """The URIs of all libvirts that are followed."""
        with self._lock:
            return list(self._hosts)

    def arm(self, uri: str, domain: str, nonce: str) -> None:
        """Read the journal in the domain itself and start its timer. Raises RefusedError."""
        if self._ending:
            raise RefusedError("the guardian is ending")
        try:
            connection = release.connect(uri)
            try:
                found = release.read(connection.lookupByUUIDString(domain))
            finally:
                connection.close()
        except (libvirt.libvirtError, UnreadableJournalError) as error:
            raise RefusedError(f"domain {domain}: {error}") from error
        if found is None or found.nonce != nonce:
            raise RefusedError(f"domain {domain} does not bear the journal {nonce}")
        self._see(uri, domain, found, armed=True)

    def disarm(self, nonce: str) -> None:
        """The VM is free, says its holder."""
        with self._lock:
            held = self._held.get(nonce)
        if held is not None:
            held.over.set()

    def release(self, nonce: str, why: str) -> None:
        """Free a VM now, in a thread of its own: a dead agent delays nobody else."""
        with self._lock:
            held = self._held.get(nonce)
            if held is None or held.over.is_set() or held.releasing:
                return
            held.releasing = True
        threading.Thread(target=self._release, args=(held, why), name=f"free {held.domain}", daemon=True).start()

    def release_all(self, why: str, seconds: float) -> None:
        """Acknowledge nothing more, free everything that is held, and wait for that, but not longer than so many seconds."""
        self._ending = True
        for nonce in self._open():
            self.release(nonce, why)
        self.finish(seconds)

    def finish(self, seconds: float) -> None:
        """Acknowledge nothing more, and wait for those that are being freed, but not longer than so many seconds."""
        self._ending = True
        end = time.monotonic() + seconds
        for held in self._open().values():
            if held.releasing and not held.over.wait(max(0.0, end - time.monotonic())):
                say("left held", domain=held.domain, nonce=held.journal.nonce)

    def _open(self) -> dict[str, Held]:
        with self._lock:
            return {nonce: held for nonce, held in self._held.items() if not held.over.is_set()}

    def status(self) -> dict[str, Any]:
        """What is followed and what is held; `turned`: seconds since it was last looked whether something is due."""
        open_ = self._open()
        with self._lock:
            return {
                "armed": len(open_),
                "releasing": sum(h.releasing for h in open_.values()),
                "followed": {uri: host.answers for uri, host in self._hosts.items()},
                "turned": round(self._clock() - self._turned, 1),
            }

    def seen(self, uri: str, journals: dict[str, Journal]) -> None:
        """Take in all journals of one libvirt; forget those that are gone, unless somebody armed or frees them.

        One that was armed may have been written after this libvirt was looked at. One that migrated is seen again elsewhere.
        """
        for domain, journal in journals.items():
            self._see(uri, domain, journal, armed=False)
        present = {j.nonce for j in journals.values()}
        with self._lock:
            for nonce, held in list(self._held.items()):
                kept = not held.over.is_set() and (held.armed or held.releasing)
                if held.uri == uri and nonce not in present and not kept and not self._may_return(held):
                    if held.armed:
                        self._ended.append(nonce)
                    held.over.set()
                    del self._held[nonce]

    def _may_return(self, held: Held) -> bool:
        return held.lost is not None and self._clock() - held.lost < LOST_SECONDS

    def due(self) -> list[str]:
        """The nonces of all journals whose budget is over and that nobody frees yet."""
        now = self._clock()
        with self._lock:
            self._turned = now
            return [n for n, h in self._held.items() if h.until <= now and not h.over.is_set() and not h.releasing]

    def _see(self, uri: str, domain: str, journal: Journal, *, armed: bool) -> None:
        with self._lock:
            known = self._held.get(journal.nonce)
            if known is not None:
                known.uri = uri  # it may have migrated
                known.armed = known.armed or armed
                if known.lost is not None:
                    known.lost, known.until = None, self._clock()
                    known.over.clear()
                    self._wake.set()
                return
            # Its holder found a VM that does not run, hence is free; its saved memory is as it was, and has just come back.
            back = journal.nonce in self._ended
            until = self._clock() + (0.0 if back else journal.budget + self._grace)
            self._held[journal.nonce] = Held(uri, domain, journal, until, armed)
        say("armed", domain=domain, nonce=journal.nonce, method=journal.method, budget=journal.budget)
        self._wake.set()

    def _expire(self) -> None:
        while True:
            for nonce in self.due():
                self.release(nonce, "its budget is over")
            self._wake.wait(self.rest())
            self._wake.clear()

    def rest(self) -> float:
        """Seconds until somebody may be due; those that are being freed already are waited for by nobody."""
        with self._lock:
            next_ = min((h.until for h in self._held.values() if not h.over.is_set() and not h.releasing), default=None)
        return TURN_SECONDS if next_ is None else min(TURN_SECONDS, max(0.01, next_ - self._clock()))

    def _release(self, held: Held, why: str) -> None:
        """Try until it is free, then look whether it stays so: for as long as its journal is there, or an order of its holder may come."""
        facts = {"domain": held.domain, "nonce": held.journal.nonce}
        say("releasing", method=held.journal.method, why=why, **facts)
        attempts, tries = Attempts(), 0
        while not held.over.is_set():
            tries += 1
            # Somebody else (`thaw`, say) may have removed its journal before a freeze that was under way came.
            gone = held.armed and self._clock() < held.until + SETTLE_SECONDS
            outcome = self._in_turn(held, attempts, tries, again=False, gone=gone)
            if outcome is Outcome.ELSEWHERE:
                self._lose(held)
                say("not found", tries=tries, outcome=outcome.value, **facts)
                return
            if outcome is not Outcome.HELD:
                say("released", tries=tries, outcome=outcome.value, **facts)
                held.over.set()
                break
            held.over.wait(min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(tries, 8)))
        end, tries = time.monotonic() + SETTLE_SECONDS, 0
        while True:
            settling = time.monotonic() < end
            # One that is held again, or of which nobody can say that it is not, is looked at without delay.
            time.sleep(LONGEST_PAUSE if tries or settling else WATCHFUL_SECONDS)
            tries += 1
            # An operator that was started again may have found it free and removed the journal: that keeps no order from coming.
            may_come = held.armed and settling
            outcome = self._in_turn(held, attempts, tries, again=True, gone=may_come)
            if outcome is Outcome.OVER and not may_come:
                return
            if outcome is Outcome.ELSEWHERE:
                self._lose(held)
                return
            if outcome is not Outcome.HELD:
                tries = 0

    def _lose(self, held: Held) -> None:
        """It is on no host: nothing more is tried, until it is seen on one."""
        with self._lock:
            held.lost, held.releasing = self._clock(), False
            held.over.set()

    def _in_turn(self, held: Held, attempts: Attempts, tries: int, *, again: bool, gone: bool) -> Outcome:
        """Try; after many tries in vain only when it is its turn."""
        if tries <= HOPELESS_TRIES:
            return self._try(held, attempts, again=again, gone=gone)
        with self._hopeless[again]:
            return self._try(held, attempts, again=again, gone=gone)

    def _try(self, held: Held, attempts: Attempts, *, again: bool, gone: bool) -> Outcome:
        """Try where the VM was last seen, then on all the others: it may have migrated. Says every failure once, raises none."""
        silent = False
        domain, method, nonce = held.domain, held.journal.method, held.journal.nonce
        for uri in dict.fromkeys((held.uri, *self.followed())):
            try:
                free = partial(release.attempt, uri, domain, method, nonce, again=again, armed=held.armed, gone=gone)
                outcome = attempts.run(free, ATTEMPT_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is said, and tried again
                if held.said.get(uri) != str(error):
                    held.said[uri] = str(error)
                    say("not free yet", domain=domain, uri=uri, why=str(error))
                silent = True
                if uri == held.uri:
                    return Outcome.HELD
                continue
            held.said.pop(uri, None)
            if outcome is not Outcome.ELSEWHERE:
                return outcome
        return Outcome.HELD if silent else Outcome.ELSEWHERE
