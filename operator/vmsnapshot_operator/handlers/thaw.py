"""Freeing VMs by hand, for the bad day: one, or all of a hypervisor that are held, said line by line as it happens.

Not the guardian, which frees by itself; both may do it at once, since freeing twice harms nobody. Nor the sweep, which spares
what ends by itself: whoever thaws by hand wants the VM to go on now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState, Machine, PowerState
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import KubeError, SnapshotError
from vmsnapshot_operator.hypervisors.domains import DomainWindow, Hypervisor, Ref, Sighting
from vmsnapshot_operator.kube import distill
from vmsnapshot_operator.kube.cluster import HYPERVISORS, Cluster
from vmsnapshot_operator.quiesce.base import clock, insist, release

PATIENCE = Seconds(60.0)
"""How long one VM is tried to be freed before it is said that it could not be."""

ID_TIMEOUT = Seconds(3.0)
"""How long the API server may take to say which installation is ours. A VM that is held does not wait for it any longer."""

_THAW_TIMEOUT, _STATUS_TIMEOUT, _PAUSE = Seconds(5.0), Seconds(2.0), 1.0
_DONE: Mapping[str, str] = {
    Method.GUEST_AGENT: "thawed",
    Method.HYPERVISOR_SNAPSHOT: "thawed",
    Method.PAUSE: "resumed",
    Method.NONE: "nothing was held",
}
BY_URI = "without the API server, name libvirt itself in the hypervisor's place: qemu+tls://HOST/system, or on its host qemu:///system"
_BY_HAND = (
    "free a VM without it, on its host: `virsh domfsthaw DOMAIN` if it is frozen, `virsh resume DOMAIN` if it is paused"
)

Say = Callable[[str], None]


async def thaw(
    kubeconfig: Path | None,
    namespace: str,
    hypervisor: str,
    domain: str | None,
    *,
    installation: str = "",
    force: bool = False,
    say: Say,
) -> bool:
    """Free one domain (by name or UUID), or with None all that are held by us, which are said first. Return whether all are free.

    A domain that is named is freed whoever's journal it bears: a person has asked for it. Of all, those of `installation`
    (empty: that of the cluster; if that is not to be learned, of any). `force`: also thaw a running domain without a journal, or
    one whose journal cannot be read; of all, also those of other installations. Never raises what this project raises on purpose:
    it is said.
    """
    try:
        client = await connect(kubeconfig, namespace, hypervisor)
    except SnapshotError as error:
        if isinstance(error, KubeError):
            say(f"cannot learn where hypervisor {hypervisor} is: {error.message}")
        else:
            say(f"hypervisor {hypervisor}: {error.message}")
        say(_BY_HAND)
        if isinstance(error, KubeError):
            say(BY_URI)
        return False
    try:
        if domain is not None:
            return await _one(client, domain, force=force, say=say)
        ours = "" if force else installation or await _installation(kubeconfig, namespace, say)
        return await _all(client, hypervisor, ours, force=force, say=say)
    except SnapshotError as error:
        say(f"hypervisor {hypervisor}: {error.message}")
        say(_BY_HAND)
        return False
    finally:
        await client.close()


async def _installation(kubeconfig: Path | None, namespace: str, say: Say) -> str:
    """The id of this cluster's installation, or nothing if it cannot be learned."""
    why = "it has none"
    try:
        async with asyncio.timeout(ID_TIMEOUT), Cluster(namespace=namespace, kubeconfig=kubeconfig) as cluster:
            if known := await cluster.known_installation():
                return known
    except KubeError as error:
        why = error.message
    except TimeoutError:
        why = f"no answer within {ID_TIMEOUT:g} s"
    say(f"the API server does not say which installation is ours ({why}): VMs that any installation holds are freed")
    return ""


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


async def _all(client: Hypervisor, name: str, ours: str, *, force: bool, say: Say) -> bool:
    """Say what is held, then free all of it at once: a VM whose agent does not answer delays none of the others."""
    found, problems = await client.sweep(), dict(client.problems)
    for endpoint, problem in sorted(problems.items()):
        say(f"hypervisor {name}: {endpoint} does not answer, its VMs were not seen: {problem}")
    chosen = [s for s in found if _is_chosen(s, ours, force=force)]
    for sighting in found:
        say(f"{sighting.ref.name}: {_told(sighting, chosen)}")
    if not found:
        say(f"hypervisor {name}: no domain bears a journal: none is held by a snapshot")
    freed = await asyncio.gather(
        *(
            _held(client, s.ref, s.journal, say)
            if s.journal is not None
            else _one(client, s.ref.uuid, force=force, say=say)
            for s in chosen
        )
    )
    unread = any(s.journal is None and s not in chosen for s in found)
    return all(freed) and not unread and not problems


def _is_chosen(sighting: Sighting, ours: str, *, force: bool) -> bool:
    journal = sighting.journal
    if journal is None:
        return force
    return journal.holds and (force or not ours or journal.installation == ours)


def _told(sighting: Sighting, chosen: Sequence[Sighting]) -> str:
    """What is about to be done about one VM."""
    journal = sighting.journal
    if sighting in chosen:
        who = f"held by {_who(journal)}" if journal is not None else sighting.problem
        return f"{who}; being freed"
    if journal is None:
        return f"left: {sighting.problem}; --domain {sighting.ref.name} --force thaws it"
    if not journal.holds:
        return f"not held: it goes on, on overlays of {_who(journal)}"
    return f"left: held by {_who(journal)}, which is not ours; --domain {sighting.ref.name} frees it all the same"


def _who(journal: Journal) -> str:
    return f"installation {journal.installation}, object {journal.owner_uid}, attempt {journal.attempt}"


async def _one(client: Hypervisor, domain: str, *, force: bool, say: Say) -> bool:
    """Free one domain. Of one that bears a journal nothing else is asked first: its disks or its agent may hang."""
    try:
        ref = await client.find(domain)
        if (journal := await _journal(client, ref)) is not None and journal.holds:
            say(f"{ref.name}: {_holder(journal)}; being freed")
            return await _held(client, ref, journal, say)
        machine = await client.describe(ref, ask_agent=True)
    except SnapshotError as error:
        say(f"{domain}: {error.message}")
        return False
    say(f"{ref.name}: {state(machine)}")
    if machine.journal is not None and machine.journal.holds:
        return await _held(client, ref, machine.journal, say)  # it was not to be read before
    return await _freed(ref, _by_force(client, ref, machine) if force else _let_be(machine), say)


async def _journal(client: Hypervisor, ref: Ref) -> Journal | None:
    """The journal in a domain; None also if it cannot be read: why, the next look tells."""
    try:
        return await client.read_journal(ref)
    except SnapshotError:
        return None


async def _held(client: Hypervisor, ref: Ref, journal: Journal, say: Say) -> bool:
    return await _freed(ref, _by_journal(client, ref, journal), say)


async def _freed(ref: Ref, freeing: Awaitable[tuple[list[str], bool]], say: Say) -> bool:
    """Say what came of it, whatever it was."""
    try:
        said, freed = await freeing
    except SnapshotError as error:
        said, freed = [f"not free yet, run this again: {error.message}"], False
    for line in said:
        say(f"{ref.name}: {line}")
    return freed


def state(machine: Machine) -> str:
    """Say in one line what is known of a VM that may be held."""
    words = [f"{machine.power} on {machine.endpoint}"]
    if machine.agent is not None:
        words.append(
            f"agent says {machine.agent.state}" + (f" ({machine.agent.message})" if machine.agent.message else "")
        )
    if machine.journal is not None:
        journal = machine.journal
        words.append(_holder(journal) if journal.holds else f"on overlays of {_who(journal)}")
    elif machine.journal_error:
        words.append(machine.journal_error)
    else:
        words.append("no journal")
    return "; ".join(words)


def _holder(journal: Journal) -> str:
    return f"held by {_who(journal)}, method {journal.method}, for at most {journal.budget:g} s"


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
            rest = "now says that it is on overlays" if journal.overlays else "is removed"
            return [f"{_DONE.get(journal.method, 'let go')}, as its journal says; the journal {rest}"], True


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


async def _let_be(machine: Machine) -> tuple[list[str], bool]:
    """Say what is so without touching it."""
    frozen = machine.agent is not None and machine.agent.state is AgentState.FROZEN
    if machine.journal_error:
        return ["its journal cannot be read, so whether and how it is held is unknown; --force thaws it"], False
    if frozen:
        return ["frozen by somebody else (a backup, say), so it was left; --force thaws it all the same"], False
    if machine.journal is not None:
        return ["not held: its snapshot's overlays are committed by the operator, by and by; nothing was done"], True
    return ["not held by a snapshot; nothing was done"], True
