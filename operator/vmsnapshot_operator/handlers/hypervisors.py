"""Keep the connections of each Hypervisor object, its status true, and sweep it for VMs that are still held by us."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vmsnapshot_operator.api.meta import content_name
from vmsnapshot_operator.core.chains import Move
from vmsnapshot_operator.core.effects import Condition
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.steps import Step, step
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    GuardianError,
    HypervisorError,
    KubeError,
    KubeUnavailableError,
    RefusedError,
    SnapshotError,
)
from vmsnapshot_operator.handlers import gates, kept
from vmsnapshot_operator.handlers.gates import LeftGates
from vmsnapshot_operator.handlers.kept import KeptOverlays
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref, Sighting
from vmsnapshot_operator.hypervisors.guardian_link import layers
from vmsnapshot_operator.kube import conditions, distill
from vmsnapshot_operator.plan.orphans import Place, Proof
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.plan.sweep import Action, Found, Ruling, judge
from vmsnapshot_operator.quiesce.base import clock, release
from vmsnapshot_operator.strategies import overlays
from vmsnapshot_operator.strategies.world import LiveHypervisor, World, now

log = logging.getLogger(__name__)

LOOK_EVERY = Seconds(30.0)
RETRY_EVERY = Seconds(2.0)

PATIENCE = Seconds(3.0)
"""So long one sweep waits for VMs to be freed before it tells which are still held; the freeing goes on."""

CONNECTING = "it is being connected to"

MOST_PROVEN, MOST_NAMED = 1024, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep found, by the names of VMs.

    `held` by us and not freed yet; with `overlays` of ours; `stalled` on these, by an I/O error; with a journal that was `left` untouched,
    and why.
    """

    held: tuple[str, ...] = ()
    overlays: tuple[str, ...] = ()
    stalled: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)


class Hypervisors:
    """All hypervisors of this process; see `strategies.world.LiveHypervisors`."""

    def __init__(self) -> None:
        self._live: dict[str, LiveHypervisor] = {}
        self._spec: dict[str, object] = {}
        self._secret: dict[str, Mapping[str, str]] = {}
        self._seen: dict[tuple[str, str], float] = {}
        self._told: dict[tuple[str, str], str] = {}
        self._freeing: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._freed: set[tuple[str, str, str]] = set()
        self._proven: dict[str, Proof] = {}
        self._kept = KeptOverlays()
        self._gates = LeftGates()

    def get(self, name: str) -> LiveHypervisor | None:
        """The hypervisor of this name, or None."""
        return self._live.get(name)

    def expect(self, body: Mapping[str, Any]) -> None:
        """Note a hypervisor at once: until it was looked at, nobody takes it for one that does not exist."""
        name = body["metadata"]["name"]
        if name not in self._live:
            self._live[name] = LiveHypervisor(name=name, problem=CONNECTING)

    def clients(self) -> Mapping[str, Hypervisor]:
        """All connections by name."""
        return {n: live.client for n, live in self._live.items() if live.client is not None}

    async def reconcile(self, body: Mapping[str, Any], world: World) -> float:
        """Connect if need be, look, sweep, write status; return seconds until the next look."""
        name = body["metadata"]["name"]
        try:
            spec = distill.hypervisor(body)
            live = self._live.get(name)
            credentials = await self._credentials(name, spec.secret_name, world)
            key = (spec.endpoints, tuple(sorted(credentials.items())))
            if live is None or live.client is None or self._spec.get(name) != key:
                await self.remove(name, replaced=True)
                self._live[name] = LiveHypervisor(
                    name=name, access=spec.access, overlay=spec.overlay, problem=CONNECTING
                )
                folder = world.guardian.folder / "credentials" if world.guardian is not None else None
                made = Hypervisor.to(name, spec.endpoints, credentials, folder)
                live = replace(self._live[name], client=made)
                self._live[name] = live
                self._spec[name], self._secret[name] = key, credentials
            client = live.client
            assert client is not None, "made above"  # noqa: S101 - for the type checker
            await client.reach()
            self._live[name] = replace(live, access=spec.access, overlay=spec.overlay, problem="")
            swept = await self.sweep(body, client, world)
            guardians = await _layers(client, world)
            world.metrics.guardian(answers=guardians is not None, hypervisor=name)
            about = {**await client.about(), "guardianLayers": guardians}
            world.metrics.hypervisor_answers(answers=not client.problems, hypervisor=name)
            found = self._kept.look(body, client, spec.overlay.pool if spec.overlay is not None else "", world)
            about["keptOverlays"] = kept.status(body.get("status") or {}, found, world, now())
            left = await self._gates.look(body, client, world)
            about["leftGates"] = gates.status(body.get("status") or {}, left, now())
            await _report(body, world, about, swept, None, client.problems)
        except (HypervisorError, RefusedError, KubeError) as error:
            before = self._live.get(name)
            # Connections mend themselves, with their own back-off: another one for each try would leave a thread in each.
            client_before = before.client if before is not None else None
            self._live[name] = replace(before or LiveHypervisor(name=name), problem=error.message)
            world.metrics.hypervisor_answers(answers=False, hypervisor=name)
            swept = (
                await self._sweep_all_the_same(body, client_before, world) if isinstance(error, KubeError) else Swept()
            )
            await _report(body, world, None, swept, error, {})
            return RETRY_EVERY
        hurry = swept.held or swept.stalled or not world.leadership.is_leader()
        return RETRY_EVERY if hurry else LOOK_EVERY

    async def _sweep_all_the_same(self, body: Mapping[str, Any], client: Hypervisor | None, world: World) -> Swept:
        """Sweep by the connection that stands: a Secret that was deleted must leave no VM held."""
        try:
            return await self.sweep(body, client, world) if client is not None else Swept()
        except HypervisorError as error:
            log.warning("hypervisor %s was not swept: %s", body["metadata"]["name"], error.message)
            return Swept()

    async def _credentials(self, name: str, secret_name: str, world: World) -> Mapping[str, str]:
        """Read the Secret; those that a connection was made with do while the API server does not answer.

        Without the API server nothing is snapshotted, but VMs that are held must still be freed.
        """
        if not secret_name:
            return {}
        try:
            return await world.cluster.secret(secret_name)
        except KubeUnavailableError:
            if name not in self._secret:
                raise
            return self._secret[name]

    async def remove(self, name: str, *, replaced: bool = False) -> None:
        """Close the connections of a hypervisor that is gone; of one that is `replaced`, nobody takes it for gone meanwhile."""
        tasks = [t for (hypervisor, _, _), t in self._freeing.items() if hypervisor == name]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kept.remove(name)
        self._gates.remove(name)
        self._secret.pop(name, None)
        live = self._live.pop(name, None)
        if replaced:
            self._live[name] = LiveHypervisor(name=name, problem=CONNECTING)
        self._spec.pop(name, None)
        if live is not None and live.client is not None:
            await live.client.close()

    async def close(self) -> None:
        """Close all connections."""
        for name in list(self._live):
            await self.remove(name)

    def proven(self) -> Mapping[str, Proof]:
        """By UID of a VMSnapshot: what the journal of the latest attempt proves that was left in a VM."""
        return self._proven

    async def sweep(self, body: Mapping[str, Any], client: Hypervisor, world: World) -> Swept:
        """Free every VM that a journal of ours says is held by nobody who lives; say what was found.

        Each VM is freed in a task of its own, which outlives this sweep if need be: one that hangs delays none of the others.
        """
        name = body["metadata"]["name"]
        sightings = await client.sweep()
        self._forget_unseen(name, sightings)
        rulings = [(s, self._judge(name, s, world)) for s in sightings]
        for sighting, ruling in rulings:
            if ruling.action in (Action.FREE, Action.COLLAPSE) and sighting.journal is not None:
                self._free(body, client, sighting, sighting.journal, ruling.why, world)
        if tasks := [t for (hypervisor, _, _), t in self._freeing.items() if hypervisor == name]:
            await asyncio.wait(tasks, timeout=PATIENCE)
        held = [s.ref.name for s, r in rulings if r.action is Action.FREE and not self._is_free(name, s)]
        left = {s.ref.name: r.why for s, r in rulings if r.action is Action.LEAVE}
        overlaid = [s.ref.name for s, _ in rulings if s.journal is not None and self._overlay(s.journal, world)]
        world.metrics.still_held(len(held), hypervisor=name)
        world.metrics.strange_journals(len(left), hypervisor=name)
        ours = [s for s in sightings if s.journal is not None and s.journal.installation == world.installation]
        world.metrics.journals(len(ours), overlays=len(overlaid), hypervisor=name)
        stalled = tuple(s.ref.name for s in ours if s.stalled and not self._is_free(name, s))
        world.metrics.stalled(len({*stalled, *self._kept.stalled(name)}), hypervisor=name)
        for domain, why in sorted(left.items()):
            if self._told.get((name, domain)) != why:
                log.warning("hypervisor %s: domain %s: %s", name, domain, why)
                await world.events.emit(body, "Warning", "JournalLeft", f"domain {domain}: {why}")
        self._told = {k: v for k, v in self._told.items() if k[0] != name} | {(name, d): w for d, w in left.items()}
        return Swept(
            held=tuple(sorted(held)),
            overlays=tuple(sorted(overlaid)),
            stalled=stalled,
            left=left,
        )

    def _judge(self, name: str, sighting: Sighting, world: World) -> Ruling:
        journal = sighting.journal
        first = self._seen.setdefault((name, journal.nonce), clock()) if journal is not None else clock()
        return judge(
            Found(
                journal=journal,
                problem=sighting.problem,
                installation=world.installation,
                owner=world.claims.get(sighting.ref.uuid, ""),
                leader=world.leadership.is_leader(),
                known=journal is None or world.known(journal.owner_uid),
                stalled=sighting.stalled,
                seen_for=Seconds(clock() - first),
            )
        )

    def _forget_unseen(self, name: str, sightings: Sequence[Sighting]) -> None:
        there = {(name, s.journal.nonce) for s in sightings if s.journal is not None}
        self._seen = {k: t for k, t in self._seen.items() if k[0] != name or k in there}
        self._freed = {k for k in self._freed if k[0] != name or (k[0], k[2]) in there}

    def _is_free(self, name: str, sighting: Sighting) -> bool:
        journal = sighting.journal
        return journal is not None and (name, sighting.ref.uuid, journal.nonce) in self._freed

    @staticmethod
    def _overlay(journal: Journal, world: World) -> bool:
        return bool(journal.overlays) and journal.installation == world.installation

    def _free(
        self, body: Mapping[str, Any], client: Hypervisor, seen: Sighting, journal: Journal, why: str, world: World
    ) -> None:
        """Begin to free one VM, unless it is being freed already."""
        name, ref = str(body["metadata"]["name"]), seen.ref
        key = (name, ref.uuid, journal.nonce)
        if key in self._freeing:
            return
        self._freed.discard(key)
        # Whoever frees it first, with the journal goes the last proof of what its attempt may have cut.
        self._prove(journal, Place(name, ref.uuid))

        async def let_go() -> None:
            try:
                # The list is as old as the slowest host of it: meanwhile another snapshot may have begun on this VM.
                there = await client.read_journal(ref)
                if there is None or there.nonce != journal.nonce or (journal.holds and not there.holds):
                    # Somebody freed it; what was listed may be left in a definition on a host from which the VM has migrated.
                    await client.clear_left(ref, journal.nonce)
                    self._freed.add(key)
                    return
                # The sweep asks no QEMU at which disk the error occurred: one that hangs would delay all others.
                stalled = seen.stalled and await client.overlays(ref).stalled(there.overlays)
                runs = replace(seen, stalled=False)
                if seen.stalled and not stalled and self._judge(name, runs, world).action is not Action.COLLAPSE:
                    self._freed.add(key)  # another disk has paused it: nothing of ours holds it
                    return
                async with step(Step.RECOVER_SWEEP, journal.owner_uid, ref.name):
                    await self._release(client, ref, there, world, stalled=stalled)
            except SnapshotError as error:
                reason, still = ("VMStillHeld", "held") if journal.holds else ("OverlayInUse", "on overlays")
                log.error("hypervisor %s: domain %s is still %s: %s", name, ref.name, still, error.message)  # noqa: TRY400 - the message says it all
                await world.events.emit(body, "Warning", reason, f"domain {ref.name}: {why}; {error.message}")
                return
            if world.guardian is not None:
                await world.guardian.disarm(journal.nonce, late=client.order_may_come(ref))
            self._freed.add(key)
            if journal.holds or not world.known(journal.owner_uid):
                world.metrics.swept(hypervisor=name)
            log.warning("hypervisor %s: domain %s was %s; freed", name, ref.name, why)
            await world.events.emit(body, "Warning", "VMFreed", f"domain {ref.name} was {why}; freed")

        task = asyncio.create_task(let_go(), name=f"free {ref.name}")
        self._freeing[key] = task
        task.add_done_callback(lambda _: self._freeing.pop(key, None))

    async def _release(
        self, client: Hypervisor, ref: Ref, journal: Journal, world: World, *, stalled: bool = False
    ) -> None:
        """Free the VM; one that is on overlays of a snapshot that is gone is brought back onto its own disks."""
        if journal.holds:
            await release(client, ref, journal)
            return
        uid = journal.owner_uid
        if uid in world.uids() and not stalled and await world.cluster.content(content_name(uid)) is not None:
            # A snapshot is not given up for a content that a watch has not shown.
            raise HypervisorError(f"its VMSnapshot {uid} is on record after all", reason="OverlayInUse")
        rulings = await overlays.collapse(client, ref, journal, None, lambda _: None)
        world.kept.update({r.overlay: r.why for r in rulings if r.move is Move.KEEP})
        if stays := [r for r in rulings if r.move in (Move.WAIT, Move.KEEP)]:
            text = "; ".join(f"overlay {r.overlay}: {r.why}" for r in stays)
            raise HypervisorError(text, reason="OverlayInUse")

    def _prove(self, journal: Journal, vm: Place) -> None:
        """Remember whose journal it was, the attempt, and where."""
        found = Proof(journal.attempt, vm)
        self._proven[journal.owner_uid] = max(
            self._proven.pop(journal.owner_uid, found), found, key=lambda p: p.attempt
        )
        while len(self._proven) > MOST_PROVEN:
            del self._proven[next(iter(self._proven))]


async def _layers(client: Hypervisor, world: World) -> list[str] | None:
    """The guardians that answer, by their layers; None for none."""
    if world.guardian is None:
        return None
    try:
        followed = await world.guardian.ping()
    except GuardianError:
        return None
    return [layer.value for layer in layers(followed, client.uris)] or None


def _seen(old: Mapping[str, Any], about: Mapping[str, Any] | None, swept: Swept) -> Mapping[str, Any]:
    """What was seen now, or (nobody answered) what was seen last."""
    if about is None:
        return {k: v for k, v in old.items() if k not in ("conditions", "observedGeneration")}
    return {
        **about,
        "heldDomains": list(swept.held[:MOST_NAMED]) or None,
        "overlayDomains": list(swept.overlays[:MOST_NAMED]) or None,
    }


async def _report(
    body: Mapping[str, Any],
    world: World,
    about: Mapping[str, Any] | None,
    swept: Swept,
    error: SnapshotError | None,
    problems: Mapping[str, str],
) -> None:
    """Write status if there is news. Only the leader does: instances that see different things would write in turn."""
    if not world.leadership.is_leader():
        return
    generation = body["metadata"].get("generation", 0)
    ready = error is None
    reason = "Ready" if error is None else error.reason
    parts = [error.message] if error is not None else sorted(problems.values()) or ["all endpoints answer"]
    if swept.held:
        parts.append(f"still held by us: {', '.join(swept.held)}")
    parts += [f"domain {domain}: {why}" for domain, why in sorted(swept.left.items())]
    message = clip("; ".join(parts))
    old = body.get("status") or {}
    decided = (
        Condition(type="Ready", status=ready, reason=reason, message=message),
        Condition(type="Reconciling", status=False, reason=reason),
        Condition(type="Stalled", status=not ready, reason=reason, message="" if ready else message),
    )
    status: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": conditions.merge(old.get("conditions") or (), decided, generation, now()),
        **_seen(old, about, swept),
    }
    status = {k: v for k, v in status.items() if v is not None}
    if not conditions.changed(old, status):
        return
    try:
        await world.cluster.write_hypervisor_status(body, status)
    except KubeError as failure:
        # A sweep must not wait until the API server is back: the next look writes it.
        log.warning("status of hypervisor %s is not written yet: %s", body["metadata"]["name"], failure.message)
