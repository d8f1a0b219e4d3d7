"""What all ways to quiesce share: their context, the window's truth while it is being found out, freeing until it is sure.

Not: which way is taken (`plan.quiescing`), who may hold a VM (`strategies.window`), what may be claimed (`plan.verdict`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import entry_points
from typing import TypeVar

from vmsnapshot_operator.core.evidence import Evidence, Quiescer
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.planning import Plan
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import DomainGoneError, HypervisorError, QuiesceError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.hypervisors.window import Permit, always

log = logging.getLogger(__name__)

ENTRY_POINTS = "vmsnapshot_operator.quiesce"
RELEASE_PATIENCE = Seconds(10.0)
"""How long the window itself insists on freeing the VM; after that the recovery goes on with it, as often as it takes."""

_PAUSE = 0.1

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Which VM, where, what was planned for it, and who is asked right before it is held whether that is still allowed.

    `remaining`: seconds of the budget that are left; whoever does something while the VM is held waits no longer for it.
    """

    hypervisor: Hypervisor
    ref: Ref
    plan: Plan | None = None
    permit: Permit = always
    remaining: Callable[[], Seconds] = lambda: Seconds(math.inf)


QuiescerFactory = Callable[[Context], Quiescer]


@functools.cache
def find(method: str) -> QuiescerFactory:
    """Return the quiesce method of this name; raises QuiesceError if it is not installed, or does not load.

    The first look reads the metadata of all that is installed, some 10 ms: `load` does it before anything is held.
    """
    for point in entry_points(group=ENTRY_POINTS, name=method):
        try:
            factory: QuiescerFactory = point.load()
        except Exception as error:  # importing foreign code may raise anything
            why = f'quiesce method "{method}" ({point.value}) does not load: {error}'
            raise QuiesceError(why, reason="QuiesceMethodUnknown") from error
        return factory
    known = ", ".join(sorted(p.name for p in entry_points(group=ENTRY_POINTS)))
    raise QuiesceError(
        f'quiesce method "{method}" is not installed; use Auto, or one of {known}', reason="QuiesceMethodUnknown"
    )


def load() -> None:
    """Find every installed method, so that no window waits for it. Blocking. One that does not load is logged and left out."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            find(point.name)
        except QuiesceError as error:
            log.exception("%s", error.message)


def clock() -> Seconds:
    """Read the clock by which windows are measured: it goes on while the machine sleeps, and is never set."""
    return Seconds(time.clock_gettime(time.CLOCK_BOOTTIME))


def wall() -> datetime:
    """Read the wall clock, for people; nothing is decided by it."""
    return datetime.now(UTC)


@dataclass(slots=True)
class OpenWindow:
    """The truth about a window while it is being found out; read it after the window was left."""

    evidence: Evidence
    free: bool = False
    rest: bool = False

    def ask(self) -> None:
        """Note that the VM is now being asked to stand still."""
        self.evidence = replace(self.evidence, asked=clock(), frozen_time=wall())

    def stands(self) -> None:
        """Note that the VM has answered that it stands still."""
        self.evidence = replace(self.evidence, still_from=clock())

    def ending(self) -> None:
        """Note that from now on the VM may go on."""
        if self.evidence.still_until is None:
            self.evidence = replace(self.evidence, still_until=clock())

    def ended(self) -> None:
        """Note that the VM has answered that it goes on."""
        self.free = True
        self.evidence = self.evidence.freed(clock(), wall())

    def superseded(self, why: str) -> None:
        """Note that somebody else found the VM free and holds it by now: it is theirs to free, and ours no more."""
        self.learn(freed_by_other=True)
        self.note(why)
        self.ended()

    def learn(self, **facts: object) -> None:
        """Add facts to the evidence."""
        self.evidence = replace(self.evidence, **facts)  # type: ignore[arg-type]  # the callers name fields of Evidence

    def note(self, text: str) -> None:
        """Add a sentence for the user."""
        self.evidence = replace(self.evidence, notes=(*self.evidence.notes, text))


async def release(hypervisor: Hypervisor, ref: Ref, journal: Journal) -> None:
    """Free the VM as its journal says, then remove the journal, or have it say what is left to be done.

    Raises SnapshotError while nobody can say that the VM is free.
    """
    quiescer = find(journal.method)(Context(hypervisor=hypervisor, ref=ref))
    # Nothing is asked of a guest that is known to be free: its agent may have died since, and would be waited for without end.
    if not hypervisor.was_freed(journal.nonce):
        await quiescer.let_go(journal)
    rest = quiescer.left(journal)
    if rest is None:
        await hypervisor.clear_journal(ref, journal.nonce)
    else:
        await hypervisor.update_journal(ref, rest, held=True)


async def insist(what: str, attempt: Callable[[], Awaitable[bool]], patience: Seconds | None) -> bool:
    """Try to free a VM again and again until `attempt` says it is free; False if that took longer than `patience`.

    A domain that is gone holds nothing. Errors are logged and tried again: freeing has no other way out.
    """
    start = clock()
    tries = 0
    while True:
        tries += 1
        try:
            if await attempt():
                return True
        except DomainGoneError:
            return True
        except HypervisorError as error:
            log.warning("%s: not free yet (try %d): %s", what, tries, error.message)
        if patience is not None and clock() - start > patience:
            return False
        await asyncio.sleep(min(1.0, _PAUSE * tries))


async def undisturbed(awaitable: Awaitable[T]) -> T:
    """Await to the end even if this task is cancelled meanwhile: a VM is freed first, cancelled afterwards."""
    task = asyncio.ensure_future(awaitable)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except Exception:  # noqa: BLE001 - the result below raises it to the caller
            break
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result
