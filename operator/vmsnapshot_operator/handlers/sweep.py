"""Sweeping by hand, for the bad day: what bears a journal on some hypervisors, and freeing what is ours; said line by line.

It needs no API server where hypervisors are given by their libvirt URIs. What is done about a journal is decided by
`plan.sweep`, as in the operator; one VM of another installation, or without a journal, is for `thaw`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.markers import Gate
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import KubeError, SnapshotError
from vmsnapshot_operator.handlers import thaw
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Sighting
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.plan import gates, kept
from vmsnapshot_operator.plan.sweep import Action, Found, Ruling, judge
from vmsnapshot_operator.quiesce.base import release

LIVE = Seconds(5.0)
"""So long a journal must stand before it is taken for a left one: a window that is open now mostly ends sooner by itself."""

ABOUT_STORAGE = (
    "what the storage systems hold is listed by the operator itself: status.orphans of each StorageDriverClass; nothing of"
    " it is touched here"
)


@dataclass(slots=True)
class Report:
    """What was found and done. `ok`: nothing of ours is held, and no VM was unreadable or out of reach."""

    lines: list[str] = field(default_factory=list)
    ok: bool = True

    def bad(self, line: str) -> None:
        """Add what needs somebody's attention."""
        self.lines.append(line)
        self.ok = False


async def sweep(
    kubeconfig: Path | None, namespace: str, hypervisors: Sequence[str], installation: str, *, dry_run: bool
) -> tuple[list[str], bool]:
    """Sweep these hypervisors (names of objects, or libvirt URIs; none: all objects); return what was found and whether all is well.

    `installation`: whose journals are freed; empty: that of the cluster, and if it cannot be asked, nobody's. `dry_run`: only
    say what would be done. Never raises what this project raises on purpose: it is among the lines.
    """
    report = Report()
    everyone, ours = tuple(hypervisors), installation
    if not everyone or not ours:
        try:
            async with Cluster(namespace=namespace, kubeconfig=kubeconfig) as cluster:
                ours = ours or await cluster.known_installation() or ""
                everyone = everyone or await cluster.hypervisor_names()
        except KubeError as error:
            report.lines.append(f"the API server cannot be asked: {error.message}")
            if not everyone:
                report.bad(thaw.BY_URI)
    if everyone and not ours:
        report.lines.append(
            "which installation is ours is not known, so nothing is freed; name it by --installation as a journal below says"
        )
    # At once: one that does not answer delays none of the others.
    parts = await asyncio.gather(*(_one(kubeconfig, namespace, h, ours, dry_run=dry_run) for h in everyone))
    for part in parts:
        report.lines += part.lines
        report.ok = report.ok and part.ok
    report.lines.append(ABOUT_STORAGE)
    return report.lines, report.ok


async def _one(kubeconfig: Path | None, namespace: str, name: str, ours: str, *, dry_run: bool) -> Report:
    report = Report()

    def cluster() -> Cluster:
        return Cluster(namespace=namespace, kubeconfig=kubeconfig)

    try:
        client = await thaw.connect(kubeconfig, namespace, name)
    except SnapshotError as error:
        report.bad(f"hypervisor {name}: cannot be swept: {error.message}")
        return report
    try:
        await _sweep(client, name, ours, report, dry_run=dry_run)
        await _gates(client, name, ours, cluster, report)
        await _checkpoints(client, name, ours, report)
    except SnapshotError as error:
        report.bad(f"hypervisor {name}: {error.message}")
    finally:
        await client.close()
    return report


async def _sweep(client: Hypervisor, name: str, ours: str, report: Report, *, dry_run: bool) -> None:
    found = await client.sweep()
    for endpoint, problem in sorted(client.problems.items()):
        report.bad(f"hypervisor {name}: {endpoint} does not answer, its VMs were not seen: {problem}")
    await _overlays(client, name, ours, found, report)
    if not found:
        report.lines.append(f"hypervisor {name}: no domain bears a journal: none is held by a snapshot")
        return
    if not dry_run and any(_judge(s, ours).action is Action.FREE for s in found):
        await asyncio.sleep(LIVE)
    again = {_nonce(s) for s in await client.sweep()} if not dry_run else {_nonce(s) for s in found}
    parts = await asyncio.gather(
        *(_domain(client, name, s, ours, there=_nonce(s) in again, dry_run=dry_run) for s in found)
    )
    for part in parts:
        report.lines += part.lines
        report.ok = report.ok and part.ok


async def _overlays(client: Hypervisor, name: str, ours: str, sightings: Sequence[Sighting], report: Report) -> None:
    """Say which overlays no journal tells of. None is touched here: one may hold the only copy of what a VM wrote."""
    files, silent = await client.overlay_files(names.overlays_prefix(ours) if ours else names.OVERLAYS)
    for endpoint, problem in sorted(silent.items()):
        report.lines.append(f"hypervisor {name}: {endpoint} does not say which overlays it has: {problem}")
    journaled = frozenset(p for s in sightings if s.journal is not None for p in s.journal.overlays.values())
    for found in kept.judge(kept.Seen(installation=ours, files=files, journaled=journaled, silent=silent)):
        where = f"hypervisor {name}: overlay {found.file.path} on {found.file.endpoint}"
        if found.removable:
            report.lines.append(f"{where}: empty and not in use; the operator removes it when its VMSnapshot is gone")
        else:
            report.lines.append(f"{where}: kept: {found.why}")


async def _checkpoints(client: Hypervisor, name: str, ours: str, report: Report) -> None:
    """Say which checkpoints of ours VMs have. None is touched here: whose they are, contents tell."""
    for each in await client.all_checkpoints(names.installation_prefix(ours)) if ours else ():
        where = f"hypervisor {name}: checkpoint {each.name} of domain {each.domain}"
        report.lines.append(f"{where}: goes with its VMSnapshot; if that is gone, once the operator sees the VM run")


async def _gates(client: Hypervisor, name: str, ours: str, cluster: Callable[[], Cluster], report: Report) -> None:
    """Say which VMs bear a restore's gate, and whether anybody opens it. None is touched: its disks may be half set back."""
    found, silent = await client.gates()
    for endpoint, problem in sorted(silent.items()):
        report.lines.append(f"hypervisor {name}: {endpoint} does not say which VMs bear a restore's gate: {problem}")
    for seen in found:
        where = f"hypervisor {name}: domain {seen.ref.name}"
        gate = gates.read(seen.definition) if not seen.problem else seen.problem
        if isinstance(gate, str):
            report.bad(f"{where}: its gate cannot be read: {gate}")
        elif gate.marker.installation != ours:
            report.lines.append(f"{where}: {gates.about(gate)}; it is of installation {gate.marker.installation}")
        else:
            await _gate(where, gate, cluster, report)


async def _gate(where: str, gate: Gate, cluster: Callable[[], Cluster], report: Report) -> None:
    try:
        async with cluster() as asked:
            why = gates.abandoned(gate, await asked.restore(*gates.owner(gate)))
    except KubeError as error:
        report.bad(f"{where}: {gates.about(gate)}; whether that is still there is not known: {error.message}")
        return
    if why:
        report.bad(f"{where}: {why}")
    else:
        report.lines.append(f"{where}: {gates.about(gate)}, and gives them back when it has come to its end")


def _nonce(sighting: Sighting) -> tuple[str, str]:
    return sighting.ref.uuid, sighting.journal.nonce if sighting.journal is not None else ""


def _judge(sighting: Sighting, ours: str) -> Ruling:
    journal = sighting.journal
    if journal is not None and not ours:
        return Ruling(Action.LEAVE, f"--installation {journal.installation} would free it")
    return judge(
        Found(journal=journal, problem=sighting.problem, installation=ours, leader=True, stalled=sighting.stalled)
    )


async def _domain(
    client: Hypervisor, name: str, sighting: Sighting, ours: str, *, there: bool, dry_run: bool
) -> Report:
    report, ref, ruling = Report(), sighting.ref, _judge(sighting, ours)
    where = f"hypervisor {name}: domain {ref.name}"
    try:
        machine = await client.describe(ref, ask_agent=True)
        report.lines.append(f"{where}: {thaw.state(machine)}")
    except SnapshotError as error:
        report.bad(f"{where}: {error.message}")
    journal = sighting.journal
    if journal is None:
        report.bad(
            f"{where}: left: {ruling.why}; `thaw --force` thaws it, its host's administrator removes the journal"
        )
    elif ruling.action is Action.COLLAPSE:
        report.bad(
            f"{where}: {ruling.why}; the operator commits them; room in their pool, and `virsh resume`, let it go on"
        )
    elif ruling.action is not Action.FREE:
        report.lines.append(f"{where}: left: {ruling.why}")
        report.ok = bool(ours)  # another installation's business, if it is known not to be ours
    elif not there:
        report.lines.append(f"{where}: its window ended by itself meanwhile")
    elif dry_run:
        report.bad(f"{where}: would be freed: {ruling.why}")
    else:
        try:
            await release(client, ref, journal)
            report.lines.append(f"{where}: freed ({ruling.why}); its journal is removed")
        except SnapshotError as error:
            report.bad(f"{where}: not free yet, run this again: {error.message}")
    return report
