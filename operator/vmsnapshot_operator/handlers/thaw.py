"""Freeing VMs by hand, for the bad day: what the operator's sweep does, for one VM or all of a hypervisor, said line by line.

Not the guardian, which frees by itself; both may do it at once, since freeing twice harms nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState, Machine, PowerState
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import KubeError, SnapshotError
from vmsnapshot_operator.hypervisors.domains import DomainWindow, Hypervisor, Ref
from vmsnapshot_operator.kube import distill
from vmsnapshot_operator.kube.cluster import HYPERVISORS, Cluster
from vmsnapshot_operator.quiesce.base import clock, insist, release

PATIENCE = Seconds(60.0)
"""How long one VM is tried to be freed before it is said that it could not be."""

_THAW_TIMEOUT, _STATUS_TIMEOUT, _PAUSE = Seconds(5.0), Seconds(2.0), 1.0
_DONE: Mapping[str, str] = {Method.GUEST_AGENT: "thawed", Method.PAUSE: "resumed", Method.NONE: "nothing was held"}
BY_URI = "without the API server, name libvirt itself in the hypervisor's place: qemu+tls://HOST/system, or on its host qemu:///system"
_BY_HAND = (
    "free a VM without it, on its host: `virsh domfsthaw DOMAIN` if it is frozen, `virsh resume DOMAIN` if it is paused"
)


async def thaw(
    kubeconfig: Path | None, namespace: str, hypervisor: str, domain: str | None, *, force: bool
) -> tuple[list[str], bool]:
    """Free one domain (by name or UUID), or with None all that bear a journal; return what was found and done, and whether all are free.

    A journal of another installation is obeyed as well: a person has asked for it. `force`: also thaw a running domain without
    a journal, or whose journal cannot be read. Never raises what this project raises on purpose: it is among the lines.
    """
    try:
        client = await connect(kubeconfig, namespace, hypervisor)
    except KubeError as error:
        return [f"cannot learn where hypervisor {hypervisor} is: {error.message}", _BY_HAND, BY_URI], False
    except SnapshotError as error:
        return [f"hypervisor {hypervisor}: {error.message}", _BY_HAND], False
    try:
        if domain is not None:
            return await _one(client, domain, force=force)
        return await _all(client, force=force)
    except SnapshotError as error:
        return [f"hypervisor {hypervisor}: {error.message}", _BY_HAND], False
    finally:
        await client.close()


async def connect(kubeconfig: Path | None, namespace: str, name: str) -> Hypervisor:
    """Connect to the Hypervisor object of this name, or to a libvirt URI without asking the API server at all.

    Raises SnapshotError; KubeError if the object cannot be read.
    """
    if "://" in name:
        return await Hypervisor.at(name)
    async with Cluster(namespace=namespace, kubeconfig=kubeconfig) as cluster:
        body = await cluster.client.get(HYPERVISORS.path(name))
        if body is None:
            raise KubeError(f'there is no Hypervisor "{name}"', reason="NotFound")
        settings = distill.hypervisor(body)
        credentials = await cluster.secret(settings.secret_name) if settings.secret_name else {}
    return await Hypervisor.connect(name, settings.endpoints, credentials)


async def _all(client: Hypervisor, *, force: bool) -> tuple[list[str], bool]:
    held = await client.sweep()
    if not held:
        return ["no domain bears a journal: none is held by a snapshot"], True
    lines, ok = [], True
    for sighting in held:
        said, freed = await _one(client, sighting.ref.uuid, force=force)
        lines += said
        ok = ok and freed
    return lines, ok


async def _one(client: Hypervisor, domain: str, *, force: bool) -> tuple[list[str], bool]:
    try:
        ref = await client.find(domain)
        machine = await client.describe(ref, ask_agent=True)
    except SnapshotError as error:
        return [f"{domain}: {error.message}"], False
    lines = [f"{ref.name}: {state(machine)}"]
    try:
        if machine.journal is not None:
            said, freed = await _by_journal(client, ref, machine.journal)
        elif force:
            said, freed = await _by_force(client, ref, machine)
        else:
            said, freed = _let_be(machine)
    except SnapshotError as error:
        said, freed = [f"not free yet, run this again: {error.message}"], False
    return lines + [f"{ref.name}: {line}" for line in said], freed


def state(machine: Machine) -> str:
    """Say in one line what is known of a VM that may be held."""
    words = [f"{machine.power} on {machine.endpoint}"]
    if machine.agent is not None:
        words.append(
            f"agent says {machine.agent.state}" + (f" ({machine.agent.message})" if machine.agent.message else "")
        )
    if machine.journal is not None:
        journal = machine.journal
        words.append(
            f"held by installation {journal.installation}, object {journal.owner_uid}, attempt {journal.attempt},"
            f" method {journal.method}, for at most {journal.budget:g} s"
        )
    elif machine.journal_error:
        words.append(machine.journal_error)
    else:
        words.append("no journal")
    return "; ".join(words)


async def _by_journal(client: Hypervisor, ref: Ref, journal: Journal) -> tuple[list[str], bool]:
    end = clock() + PATIENCE
    while True:
        try:
            await release(client, ref, journal)
        except SnapshotError as error:
            if not error.retryable or clock() > end:
                raise
            await asyncio.sleep(_PAUSE)
        else:
            return [f"{_DONE.get(journal.method, 'let go')}, as its journal says; the journal is removed"], True


async def _by_force(client: Hypervisor, ref: Ref, machine: Machine) -> tuple[list[str], bool]:
    if machine.power is not PowerState.RUNNING:
        off = machine.power is PowerState.SHUT_OFF
        said = (
            "nothing is held"
            if off
            else "resume or wake it first (`virsh resume`, `virsh dompmwakeup`), then try again"
        )
        return [f"it does not run, so no agent can be asked: {said}"], off
    window = await client.window(ref)
    freed = await insist(f"thaw of domain {ref.name}", lambda: _thawed(window), PATIENCE)
    if not freed:
        return [f"its agent did not say that it is thawed within {PATIENCE:g} s; only a reset of the VM is left"], False
    kept = ["its journal cannot be read and was left: no snapshot of it begins until it is removed"]
    return ["its agent says thawed", *(kept if machine.journal_error else [])], True


async def _thawed(window: DomainWindow) -> bool:
    """Thaw, then ask: a hook in the guest that fails makes a thaw fail that thawed all the same."""
    try:
        await window.thaw(_THAW_TIMEOUT)
    except SnapshotError:
        if await window.status(_STATUS_TIMEOUT) is AgentState.THAWED:
            return True
        raise
    return await window.status(_STATUS_TIMEOUT) is AgentState.THAWED


def _let_be(machine: Machine) -> tuple[list[str], bool]:
    """Say what is so without touching it."""
    frozen = machine.agent is not None and machine.agent.state is AgentState.FROZEN
    if machine.journal_error:
        return ["its journal cannot be read, so whether and how it is held is unknown; --force thaws it"], False
    if frozen:
        return ["frozen by somebody else (a backup, say), so it was left; --force thaws it all the same"], False
    return ["not held by a snapshot; nothing was done"], True
