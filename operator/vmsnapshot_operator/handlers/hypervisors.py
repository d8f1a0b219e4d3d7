"""Keep the connections of each Hypervisor object, its status true, and sweep it for VMs that are still held by us."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vmsnapshot_operator.core.effects import Condition
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError, RefusedError, SnapshotError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.kube import conditions, distill
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.quiesce.base import Context, find
from vmsnapshot_operator.strategies.world import LiveHypervisor, World, now

log = logging.getLogger(__name__)

LOOK_EVERY = Seconds(30.0)
RETRY_EVERY = Seconds(2.0)


class Hypervisors:
    """All hypervisors of this process; see `strategies.world.LiveHypervisors`."""

    def __init__(self) -> None:
        self._live: dict[str, LiveHypervisor] = {}
        self._spec: dict[str, object] = {}

    def get(self, name: str) -> LiveHypervisor | None:
        """The hypervisor of this name, or None."""
        return self._live.get(name)

    def clients(self) -> Mapping[str, Hypervisor]:
        """All connections by name."""
        return {n: live.client for n, live in self._live.items() if live.client is not None}

    async def reconcile(self, body: Mapping[str, Any], world: World) -> float:
        """Connect if need be, look, sweep, write status; return seconds until the next look."""
        name = body["metadata"]["name"]
        try:
            spec = distill.hypervisor(body)
            credentials = await world.cluster.secret(spec.secret_name) if spec.secret_name else {}
            key = (spec.endpoints, tuple(sorted(credentials.items())))
            live = self._live.get(name)
            if live is None or live.client is None or self._spec.get(name) != key:
                await self.remove(name)
                client = await Hypervisor.connect(name, spec.endpoints, credentials)
                live = LiveHypervisor(name=name, access=spec.access, client=client)
                self._spec[name] = key
            self._live[name] = live = replace(live, access=spec.access, problem="")
            assert live.client is not None, "made above"  # noqa: S101 - for the type checker
            about = await live.client.about()
            held = await self.sweep(name, live.client, world)
            await _report(body, world, {**about, "heldDomains": list(held) or None}, held, None)
        except (HypervisorError, RefusedError) as error:
            before = self._live.get(name)
            # A connection that broke mends itself; only a hypervisor that was never reached has no client.
            client_before = before.client if before is not None else None
            rules = before.access if before is not None else ()
            self._live[name] = LiveHypervisor(name=name, access=rules, client=client_before, problem=error.message)
            await _report(body, world, None, (), error)
            return RETRY_EVERY
        return LOOK_EVERY

    async def remove(self, name: str) -> None:
        """Close the connections of a hypervisor that is gone."""
        live = self._live.pop(name, None)
        self._spec.pop(name, None)
        if live is not None and live.client is not None:
            await live.client.close()

    async def close(self) -> None:
        """Close all connections."""
        for name in list(self._live):
            await self.remove(name)

    async def sweep(self, name: str, client: Hypervisor, world: World) -> tuple[str, ...]:
        """Free every VM that a journal of ours says is held, but for windows open in this process; return those not freed.

        Only the leader does it: another instance's window is over before its lease is.
        """
        left = []
        for ref, journal in await client.sweep():
            if journal.installation != world.installation or world.claims.get(ref.uuid) == journal.owner_uid:
                continue
            if not world.leadership.is_leader():
                left.append(ref.name)
                continue
            try:
                await free(client, ref, journal)
                log.warning(
                    "hypervisor %s: domain %s was still held by attempt %d; freed", name, ref.name, journal.attempt
                )
            except SnapshotError as error:
                left.append(ref.name)
                log.error("hypervisor %s: domain %s is still held: %s", name, ref.name, error.message)  # noqa: TRY400 - the message says it all
        world.metrics.frozen_vms(len(left), hypervisor=name)
        return tuple(left)


async def free(client: Hypervisor, ref: Ref, journal: Journal) -> None:
    """Free the VM as its journal says, then remove the journal. Raises SnapshotError when that is not confirmed."""
    await find(journal.method)(Context(hypervisor=client, ref=ref)).let_go(journal)
    await client.clear_journal(ref, journal.nonce)


async def _report(
    body: Mapping[str, Any],
    world: World,
    about: Mapping[str, Any] | None,
    held: tuple[str, ...],
    error: SnapshotError | None,
) -> None:
    generation = body["metadata"].get("generation", 0)
    ready = error is None
    reason = "Ready" if error is None else error.reason
    message = "all endpoints answer" if error is None else clip(error.message)
    if held:
        message += f"; still held by us: {', '.join(held)}"
    old = body.get("status") or {}
    decided = (
        Condition(type="Ready", status=ready, reason=reason, message=clip(message)),
        Condition(type="Reconciling", status=False, reason=reason),
        Condition(type="Stalled", status=not ready, reason=reason, message="" if ready else clip(message)),
    )
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": conditions.merge(old.get("conditions") or (), decided, generation, now()),
        **{k: v for k, v in (about or {}).items() if v is not None},
    }
    if conditions.changed(old, status):
        await world.cluster.write_hypervisor_status(body, status)
