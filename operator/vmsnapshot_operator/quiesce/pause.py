"""Quiesce by a pause: the whole VM stands still for a moment; crash consistency at one instant over any drivers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmsnapshot_operator.core.evidence import Evidence, Window
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.errors import ForeignJournalError, HypervisorError, NotPermittedError, QuiesceError
from vmsnapshot_operator.hypervisors.domains import DomainWindow
from vmsnapshot_operator.hypervisors.window import Resume
from vmsnapshot_operator.quiesce.base import RELEASE_PATIENCE, Context, OpenWindow, insist, undisturbed


class PauseQuiescer:
    """Pause and resume. An early resume by somebody else shows in the VM's state before ours, or as an event."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @asynccontextmanager
    async def still(self, journal: Journal) -> AsyncIterator[Window]:
        """Hold the VM paused. Raises QuiesceError when it cannot: then it was resumed again."""
        domain = await self._context.hypervisor.window(self._context.ref)
        window = OpenWindow(Evidence(method=Method.PAUSE))
        with self._context.hypervisor.events(self._context.ref) as events:
            try:
                window.ask()
                async with step(Step.WINDOW_QUIESCE, journal.owner_uid):
                    await domain.pause(self._context.permit)
                    window.stands()
                yield window
            except NotPermittedError:
                window.free = True  # nothing was sent
                raise
            except HypervisorError as error:
                if window.evidence.still_from is not None:
                    raise
                window.ending()
                await undisturbed(self._free(domain, window, journal))
                raise QuiesceError(
                    f"the VM could not be paused: {error.message}",
                    reason="PauseFailed",
                    free=window.free,
                    evidence=window.evidence,
                ) from error
            finally:
                if not window.free:
                    window.ending()
                    if events.resumed:
                        window.learn(freed_by_other=True)
                    await undisturbed(self._free_as_step(domain, window, journal))

    async def let_go(self, journal: Journal) -> None:
        """Resume the VM if it is paused as we pause.

        A person who has paused it since looks the same to libvirt; it is resumed then, as its journal says: better than held.
        """
        domain = await self._context.hypervisor.window(self._context.ref)
        window = OpenWindow(Evidence(method=Method.PAUSE))
        await undisturbed(self._free(domain, window, journal, late=True))
        if not window.free:
            raise QuiesceError(
                f"domain {self._context.ref.name} could not be resumed yet; trying again",
                reason="ResumeFailed",
                retryable=True,
            )

    def left(self, journal: Journal) -> Journal | None:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return None

    async def _free_as_step(self, domain: DomainWindow, window: OpenWindow, journal: Journal) -> None:
        async with step(Step.WINDOW_FREE, journal.owner_uid):
            await self._free(domain, window, journal)

    async def _free(self, domain: DomainWindow, window: OpenWindow, journal: Journal, *, late: bool = False) -> None:
        """Resume. `late`, or once nothing may be done any more: another one may hold the VM by now, who must not be disturbed."""

        async def attempt() -> bool:
            ours = journal.nonce if late or self._context.permit() else ""
            try:
                paused = await domain.state() is PowerState.PAUSED
                done = await domain.resume(ours) if paused else Resume.NOT_OURS
            except ForeignJournalError as error:
                domain.must_have_returned("pause")
                window.superseded(error.message)
                return True
            if done is Resume.LATER:
                return False
            if done is Resume.NOT_OURS and window.evidence.still_from is not None and not window.free:
                window.learn(freed_by_other=True)
            window.ended()
            return True

        await insist(f"resume of domain {self._context.ref.name}", attempt, RELEASE_PATIENCE)
