"""No quiescing: nothing is sent to the VM. If it stands still by itself (off, or paused by somebody), that is evidence."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmsnapshot_operator.core.evidence import Evidence, Window
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Machine, PowerState
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.quiesce.base import Context, OpenWindow

_STILL = (PowerState.SHUT_OFF, PowerState.PAUSED)


class NothingQuiescer:
    """Watch, and touch nothing."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @asynccontextmanager
    async def still(self, journal: Journal) -> AsyncIterator[Window]:  # noqa: ARG002 - the protocol's signature
        """Look at the VM at both ends; claim stillness only if it never left its state."""
        window = OpenWindow(Evidence(method=Method.NONE), free=True)
        with self._context.hypervisor.events(self._context.ref) as events:
            before = await self._look()
            if before.power in _STILL:
                window.stands()
            try:
                yield window
            finally:
                window.ending()
            if window.evidence.still_from is not None:
                after = await self._look()
                window.learn(
                    shut_down_from_within=before.shut_down_from_within and after.shut_down_from_within,
                    freed_by_other=after.power is not before.power or events.resumed or events.started,
                )

    async def let_go(self, journal: Journal) -> None:
        """Nothing is held."""

    def left(self, journal: Journal) -> Journal | None:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return None

    async def _look(self) -> Machine:
        return await self._context.hypervisor.describe(self._context.ref, ask_agent=False)
