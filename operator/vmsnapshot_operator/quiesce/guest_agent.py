"""Quiesce through the guest's agent: its file systems are frozen, then thawed, and both counts are kept as evidence.

Facts it rests on, seen with qemu-guest-agent 7.2 and libvirt 9.0: a freeze that timed out is executed when the agent
wakes; while frozen the agent still tells its state; a second thaw returns 0; somebody's thaw in between shows in the
count of ours, and in nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmsnapshot_operator.core.evidence import THAW_SAID, Evidence, Window
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState
from vmsnapshot_operator.core.planning import THAW_TIMEOUT, Method
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    DomainGoneError,
    ForeignJournalError,
    HypervisorError,
    NotPermittedError,
    QuiesceError,
)
from vmsnapshot_operator.hypervisors.domains import DomainWindow
from vmsnapshot_operator.quiesce.base import RELEASE_PATIENCE, Context, OpenWindow, insist, undisturbed

log = logging.getLogger(__name__)

STATUS_TIMEOUT = Seconds(2.0)
FREEZE_SHARE = 0.5
"""Part of the budget that the freeze itself may take: what is left must be enough for the cuts."""


class GuestAgentQuiescer:
    """Freeze and thaw by the agent. The freeze has a deadline; the thaw is repeated until the agent says `thawed`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @asynccontextmanager
    async def still(self, journal: Journal) -> AsyncIterator[Window]:
        """Hold the guest's file systems frozen. Raises QuiesceError when it cannot: then the guest was thawed again."""
        domain = await self._context.hypervisor.window(self._context.ref)
        plan = self._context.plan
        covered = frozenset(v.volume.id for v in plan.volumes if v.covered) if plan is not None else frozenset()
        window = OpenWindow(Evidence(method=Method.GUEST_AGENT, covered=covered))
        try:
            window.ask()
            mountpoints = plan.quiesce.mountpoints if plan is not None else ()
            async with step(Step.WINDOW_QUIESCE, journal.owner_uid):
                frozen = await domain.freeze(
                    mountpoints, timeout=Seconds(journal.budget * FREEZE_SHARE), permit=self._context.permit
                )
                window.learn(frozen=frozen)
                window.stands()
            yield window
        except NotPermittedError:
            window.free = True  # nothing was sent
            raise
        except HypervisorError as error:
            if window.evidence.still_from is not None:
                raise
            window.ending()
            window.note(f"freeze: {error.message}")
            await undisturbed(thaw(self._context, domain, window, journal))
            raise QuiesceError(
                f"the guest's file systems could not be frozen: {error.message}",
                reason="FreezeFailed",
                free=window.free,
                evidence=window.evidence,
            ) from error
        finally:
            if not window.free:
                window.ending()
                await undisturbed(self._free_as_step(domain, window, journal))

    async def let_go(self, journal: Journal) -> None:
        """Thaw until the agent says `thawed`."""
        await let_thaw(self._context, journal)

    def left(self, journal: Journal) -> Journal | None:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return None

    async def _free_as_step(self, domain: DomainWindow, window: OpenWindow, journal: Journal) -> None:
        async with step(Step.WINDOW_FREE, journal.owner_uid):
            await thaw(self._context, domain, window, journal)


async def let_thaw(context: Context, journal: Journal) -> None:
    """Free a guest that a journal says may be frozen; raises QuiesceError while nobody can say that it is thawed."""
    domain = await context.hypervisor.window(context.ref)
    window = OpenWindow(Evidence(method=journal.method))
    await undisturbed(thaw(context, domain, window, journal, late=True))
    if not window.free:
        raise QuiesceError(
            f"domain {context.ref.name} could not be thawed yet: its agent does not answer; trying again",
            reason="ThawFailed",
            retryable=True,
        )


async def thaw(
    context: Context, domain: DomainWindow, window: OpenWindow, journal: Journal, *, late: bool = False
) -> None:
    """Thaw until the agent says `thawed`, or for RELEASE_PATIENCE; what it counted goes into the window's evidence.

    `late`, or once nothing may be done any more: another one may hold the VM by now, who must not be disturbed.
    """
    counted = False
    timeout = context.plan.quiesce.thaw_timeout if context.plan is not None else THAW_TIMEOUT

    async def attempt() -> bool:
        nonlocal counted
        thawed = 0
        ours = journal.nonce if late or context.permit() else ""
        try:
            thawed = await domain.thaw(timeout=timeout, ours=ours)
        except DomainGoneError:
            raise
        except ForeignJournalError as error:
            domain.must_have_returned("freeze")
            window.superseded(error.message)
            return True
        except HypervisorError as error:
            # A hook that fails at thaw makes it raise though it thawed: only the state tells. The count is lost.
            log.warning("thaw of domain %s: %s", context.ref.name, error.message)
            if not counted:
                window.note(f"{THAW_SAID}{error.message}")
        if not counted:
            # Only the first answer counts what we froze: every later thaw finds nothing to do.
            window.learn(thawed=thawed)
            counted = True
        if thawed > 0 and thawed == window.evidence.frozen:
            window.ended()
            return True
        # The counts differ, or the freeze never answered: it may still be executed later. Only the state tells.
        if await domain.status(timeout=STATUS_TIMEOUT) is AgentState.THAWED:
            window.ended()
            return True
        return False

    await insist(f"thaw of domain {context.ref.name}", attempt, RELEASE_PATIENCE)
