"""Quiesce by overlays: all disks are switched to overlays at once, and their bases stand still while the VM runs on.

The guest is frozen, if its agent can, only around that one call. What follows (cuts, copies, the commit of the overlays) has no
hurry: the journal tells of it from then on, and `strategies.overlays` brings the VM back onto its own disks.

libvirt's own QUIESCE flag is never used: after a freeze that failed or timed out it does not thaw, it skips the thaw and reports
success when it cannot get the agent's job, and it hides both counts (libvirt 9.0, qemu_snapshot.c).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from vmsnapshot_operator.core.evidence import Evidence, Window
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.planning import Method, Plan
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError, NotPermittedError, QuiesceError
from vmsnapshot_operator.hypervisors.domains import DomainWindow
from vmsnapshot_operator.quiesce.base import Context, OpenWindow, undisturbed
from vmsnapshot_operator.quiesce.guest_agent import FREEZE_SHARE, let_thaw, thaw

SWITCH_TIMEOUT = Seconds(10.0)


class HypervisorSnapshotQuiescer:
    """Freeze, switch, thaw; the window goes on after that, with the VM free and its disks standing still."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @asynccontextmanager
    async def still(self, journal: Journal) -> AsyncIterator[Window]:
        """Switch to the journal's overlays. Raises QuiesceError when that fails: then the guest was thawed again.

        Where it cannot be told whether the switch happened, `rest` is True: the journal must stay.
        """
        plan = self._context.plan
        assert plan is not None, "a window is opened with a plan"  # noqa: S101 - for the type checker
        domain = await self._context.hypervisor.window(self._context.ref)
        covered = frozenset(v.volume.id for v in plan.volumes if v.covered)
        window = OpenWindow(Evidence(method=Method.HYPERVISOR_SNAPSHOT, covered=covered))
        await self._switch(domain, window, journal, plan)
        await self._tell(window, journal, plan)
        try:
            yield window
        finally:
            window.ending()

    async def let_go(self, journal: Journal) -> None:
        """Thaw until the agent says `thawed`."""
        await let_thaw(self._context, journal)

    def left(self, journal: Journal) -> Journal | None:
        """What may be left of the switch, which the journal tells from then on."""
        return replace(journal, phase=Phase.OVERLAID)

    async def _switch(self, domain: DomainWindow, window: OpenWindow, journal: Journal, plan: Plan) -> None:
        """Freeze, switch and thaw, on every path; the VM is on its overlays when this returns."""
        frozen = False
        described = await domain.prepare_switch({v.target: journal.overlays[v.volume.id] for v in plan.disks})
        try:
            window.ask()
            if journal.holds:
                frozen = True
                await self._freeze(domain, window, journal, plan)
            async with step(Step.WINDOW_SWITCH, journal.owner_uid):
                window.rest = True
                patience = min(SWITCH_TIMEOUT, self._context.remaining()) if frozen else SWITCH_TIMEOUT
                await domain.switch(described, timeout=patience, permit=self._context.permit)
                window.stands()
        except NotPermittedError as error:
            window.rest = False  # nothing was switched
            await undisturbed(self._free(domain, window, journal, frozen=window.evidence.frozen > 0))
            if not window.free:
                why = f"{error.message}; it could not be thawed"
                raise QuiesceError(why, reason="ThawFailed", evidence=window.evidence) from error
            raise
        except HypervisorError as error:
            window.note(f"switch: {error.message}")
            await undisturbed(self._free(domain, window, journal, frozen=frozen))
            raise QuiesceError(
                f"the disks could not be switched to overlays: {error.message}",
                reason="SwitchFailed",
                free=window.free,
                rest=window.rest,
                fallback=False,
                evidence=window.evidence,
            ) from error
        finally:
            if not window.free:
                await undisturbed(self._free(domain, window, journal, frozen=frozen))

    async def _freeze(self, domain: DomainWindow, window: OpenWindow, journal: Journal, plan: Plan) -> None:
        try:
            async with step(Step.WINDOW_QUIESCE, journal.owner_uid):
                frozen = await domain.freeze(
                    plan.quiesce.mountpoints,
                    timeout=Seconds(journal.budget * FREEZE_SHARE),
                    permit=self._context.permit,
                )
                window.learn(frozen=frozen)
        except NotPermittedError:
            raise
        except HypervisorError as error:
            window.note(f"freeze: {error.message}")
            await undisturbed(self._free(domain, window, journal, frozen=True))
            raise QuiesceError(
                f"the guest's file systems could not be frozen: {error.message}",
                reason="FreezeFailed",
                free=window.free,
                evidence=window.evidence,
            ) from error

    async def _free(self, domain: DomainWindow, window: OpenWindow, journal: Journal, *, frozen: bool) -> None:
        if not frozen:
            window.ended()
            return
        async with step(Step.WINDOW_FREE, journal.owner_uid):
            await thaw(self._context, domain, window, journal)

    async def _tell(self, window: OpenWindow, journal: Journal, plan: Plan) -> None:
        """Write into the VM's metadata that it goes on, on overlays, and what betrays a change of the bases."""
        if not window.free:
            raise QuiesceError(
                "the guest could not be thawed after the switch",
                reason="ThawFailed",
                free=False,
                rest=True,
                fallback=False,
                evidence=window.evidence,
            )
        hypervisor, ref = self._context.hypervisor, self._context.ref
        try:
            async with step(Step.WINDOW_OVERLAID, journal.owner_uid):
                layers = {str(v.volume.id): v.volume.writable for v in plan.disks}
                bases = await hypervisor.overlays(ref).fingerprints(layers)
                there = await hypervisor.update_journal(ref, replace(journal, phase=Phase.OVERLAID, bases=bases))
                why = "" if there else "the journal is gone from the VM's metadata: somebody removed it"
        except HypervisorError as error:
            why = error.message
        if why:
            raise QuiesceError(
                f"the switch to overlays could not be written down: {why}",
                reason="SwitchFailed",
                free=True,
                rest=True,
                fallback=False,
                evidence=window.evidence,
            )
