"""The judge: looks at the world, and believes nothing that the operator says.

Guests are asked through their own agents and by their writes, domains through libvirt and QEMU, storage by its own listings,
contents of snapshots by reading them, processes in /proc. Nothing of the operator's code is used. A claim of status or content is
only ever compared with what was seen. What cannot be looked at (a component of the laboratory is down) is a LabError, no finding.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import libvirt

from tests.chaos import claims, hosts, objects, rules, storage
from tests.chaos.claims import Expected
from tests.chaos.seen import Allowed, Finding, Kind, World
from tests.lab import Lab, LabError
from tests.lab.ceph import bindings
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack

__all__ = ["Allowed", "Finding", "Kind", "judge_now", "judge_snapshot", "look", "settled"]

NOTHING = Allowed()


def judge_now(lab: Lab, stack: Stack, guests: Sequence[Guest], allowed: Allowed = NOTHING) -> list[Finding]:
    """What is wrong while nothing is under way but what is `allowed`. Takes well under 2 s unless something is wrong.

    Every guest runs, its agent says thawed and its writer's writes arrive; no domain bears a journal, an overlay, a block job or a
    snapshot of libvirt's; pools and Ceph hold exactly what the contents of Ready VMSnapshots account for, and no lock but QEMU's;
    contents and VMSnapshots belong to each other; every VMSnapshot and VMRestore has ended; nothing that is deleted waits for our finalizer; one
    instance that lives holds the lease; no driver outlived its operator.
    """
    return rules.findings(look(lab, stack, guests, allowed), allowed)


def settled(
    lab: Lab, stack: Stack, guests: Sequence[Guest], seconds: float = 30.0, allowed: Allowed = NOTHING
) -> list[Finding]:
    """What is still wrong after a while: a thaw or a clearing of traces may be under way."""
    end = time.monotonic() + seconds
    while True:
        found = judge_now(lab, stack, guests, allowed)
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


def look(lab: Lab, stack: Stack, guests: Sequence[Guest], allowed: Allowed = NOTHING) -> World:
    """See everything at one moment. Raises LabError where the laboratory does not answer."""
    places = [*lab.hosts, *sorted({g.host for g in guests} - set(lab.hosts), key=lambda h: h.name)]
    with _answering(), ThreadPoolExecutor(4) as threads:
        before = hosts.writes(guests)
        listed = threads.submit(storage.look, lab)
        told = threads.submit(objects.objects, lab)
        domains = threads.submit(lambda: tuple(d for host in places for d in hosts.domains(host)))
        asked = threads.submit(hosts.guests, guests, before, allowed)
        bodies, holders = told.result()
        return World(
            domains=domains.result(),
            guests=tuple(asked.result()),
            storage=listed.result(),
            objects=bodies,
            holders=holders,
            instances=objects.instances(stack),
            drivers=tuple(objects.drivers()),
            now=time.time(),
        )


def judge_snapshot(
    lab: Lab,
    stack: Stack,
    name: str,
    namespace: str = TENANT,
    *,
    records: tuple[int, int] | None = None,
) -> list[Finding]:
    """What is wrong about a VMSnapshot that is said to have come to its end: it has not, or it is worse than it claims.

    `records`: how many its guest had written when it was asked for, and after it had ended: without that, a snapshot whose disks all
    hold the same wrong moment cannot be told. One that is gone is none, and nothing is found.
    """
    body = stack.get(name, namespace)
    if body is None:
        return []
    subject = f"VMSnapshot {rules.name_of(body)}"
    if why := rules.not_ended(body):
        return [Finding("stuck", subject, why)]
    if not rules.is_true(body, "Ready"):
        return _lied(subject, list(claims.of_failed(body)))
    content = stack.content(name, namespace)
    if content is None:
        return _lied(subject, ["it is Ready, and no VMSnapshotContent holds anything of it"])
    source = body["spec"]["source"]["domain"]
    with _answering(), tempfile.TemporaryDirectory(dir=lab.state, prefix="judge-") as folder:
        vm = next((d for host in lab.hosts if (d := hosts.definition(host, source)) is not None), None)
        # One that was counted while it was written may be on the disks already.
        counted = None if records is None else (records[0], records[1] + 1)
        expected = Expected(records=counted)
        if vm is not None:
            expected = Expected(targets=vm.targets, writer=vm.writer, records=counted)
        lost = list(rules.missing(content, storage.look(lab)))
        found = claims.read(lab, content, Path(folder))
    lies = [f"it is Ready, and {what}" for what in lost]
    # What is not even listed need not be read to be told.
    lies += claims.of_ready(body, content, found, expected, tell_missing=not lost)
    return _lied(subject, lies)


def _lied(subject: str, lies: Sequence[str]) -> list[Finding]:
    """One finding for a snapshot, whatever the number of its lies: snapshots are counted."""
    return [Finding("lied", subject, "; ".join(lies))] if lies else []


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """What the laboratory's storage or hypervisor says no to, as a LabError."""
    try:
        yield
    except (libvirt.libvirtError, bindings("rbd").Error, bindings("rados").Error) as error:
        raise LabError(f"the world cannot be looked at: {type(error).__name__}: {error}") from error
