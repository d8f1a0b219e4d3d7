"""The judge's eye on hypervisors and guests: libvirt's definitions, QEMU's own word, each guest's agent and its writes."""

from __future__ import annotations

import json
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import libvirt
import libvirt_qemu

from tests.chaos.seen import Allowed, Disk, Domain, GuestSeen
from tests.lab import LabError
from tests.lab.guests import Guest
from tests.lab.hypervisor import Host

AGENT_SECONDS = 10
WRITES_SECONDS = 10.0
"""So long every disk of a free guest with a writer gets to be written to; the slowest writer makes a round in a quarter of a second."""
_OURS = "vmsnapshot.io"
_STAY = ("{https://vmsnapshot.io/restored/1}", "{https://vmsnapshot.io/went-back/1}")
"""Tell that a restore was done, so that nobody does it again, or that it went back: they belong to the VM from then on."""
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
}
_GONE = frozenset({libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID})

Writes = Mapping[str, Mapping[str, int]]
"""Requests to write that QEMU counted, by guest and target."""


# --- domains -----------------------------------------------------------------------------------------------------------------


def domains(host: Host) -> list[Domain]:
    """What libvirt and QEMU say of every domain of a host. Raises LabError if libvirtd does not answer."""
    try:
        with host.connection() as connection:
            return [seen for domain in connection.listAllDomains() if (seen := _domain(domain)) is not None]
    except libvirt.libvirtError as error:
        raise LabError(f"libvirtd at {host.uri} cannot be asked for its domains: {error}") from error


def _domain(domain: Any) -> Domain | None:
    try:
        state = _STATES.get(domain.state()[0], "in an unknown state")
        alive = bool(domain.isActive())
        texts = {"running": domain.XMLDesc()} if alive else {}
        if domain.isPersistent():
            texts["stored"] = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        roots = {place: ET.fromstring(text) for place, text in texts.items()}  # noqa: S314 - libvirt's own
        return Domain(
            name=domain.name(),
            state=state,
            disks=tuple(d for place, root in roots.items() for d in _disks(place, root)),
            journals=tuple(
                p
                for p, root in roots.items()
                for e in root.findall("metadata/*")
                if _OURS in e.tag and not e.tag.startswith(_STAY)
            ),
            snapshots=tuple(str(s.getName()) for s in domain.listAllSnapshots()),
            opened=_opened(domain) if alive else (),
            jobs=tuple(str(j["device"]) for j in _monitor(domain, "query-block-jobs")) if alive else (),
            remembering=tuple(
                sorted({c.getName() for c in domain.listAllCheckpoints()} | _bitmaps(domain, alive=alive))
            ),
        )
    except libvirt.libvirtError as error:
        if error.get_error_code() in _GONE:  # it went away, or off, since it was listed
            return None
        raise


def _disks(place: str, root: ET.Element) -> Iterable[Disk]:
    for disk in root.findall("devices/disk"):
        target, source = disk.find("target"), disk.find("source")
        if target is None or source is None:
            continue
        used = next((source.attrib[a] for a in ("file", "dev", "name", "volume") if a in source.attrib), "")
        chained = disk.find("backingStore/source") is not None
        yield Disk(place, target.get("dev", ""), used, chained, disk.find("mirror") is not None)


def _opened(domain: Any) -> tuple[str, ...]:
    """Names of what QEMU has open, also of what no device of the domain shows any more."""
    found: set[str] = set()
    for node in _monitor(domain, "query-named-block-nodes", flat=True):
        for text in (node["file"], node.get("backing_file", "")):
            found |= set(_names(text))
    return tuple(sorted(found))


def _bitmaps(domain: Any, *, alive: bool) -> set[str]:
    """Names of what remembers writes in the disks of a domain that runs: libvirt lists only what it has a description of."""
    nodes = _monitor(domain, "query-named-block-nodes", flat=True) if alive else []
    return {b["name"] for n in nodes for b in n.get("dirty-bitmaps", ()) if b.get("name")}


def _names(text: str) -> Iterable[str]:
    """The file's or image's name in what QEMU calls a file: a path, or `json:` with the options that it was opened with."""
    if not text.startswith("json:"):
        return [PurePath(text).name] if text else []
    options, names = [json.loads(text.removeprefix("json:"))], []
    while options:
        for key, value in options.pop().items():
            if isinstance(value, dict):
                options.append(value)
            elif key in ("filename", "image", "snapshot"):
                names.append(PurePath(str(value)).name)
    return names


def _monitor(domain: Any, command: str, **arguments: Any) -> list[dict[str, Any]]:
    question = json.dumps({"execute": command, "arguments": arguments})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, question, 0))
    if "return" not in answer:
        raise LabError(f"QEMU of {domain.name()} was asked {command}: {answer.get('error')}")
    return list(answer["return"])


# --- one domain's own definition -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """Of a domain: disks that bear state, and whether a writer writes to all of them."""

    targets: frozenset[str]
    writer: bool


def definition(host: Host, name: str) -> Definition | None:
    """The stored definition of a domain (a disk plugged in for a while is not in it), by name or UUID; None if there is none."""
    with host.connection() as connection:
        found = [d for d in connection.listAllDomains() if name in (d.name(), d.UUIDString())]
        if not found:
            return None
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE if found[0].isPersistent() else 0
        root = ET.fromstring(found[0].XMLDesc(flags))  # noqa: S314 - libvirt's own
    disks = [
        d for d in root.findall("devices/disk") if d.get("device", "disk") == "disk" and d.find("readonly") is None
    ]
    targets = frozenset(t.get("dev", "") for d in disks if (t := d.find("target")) is not None)
    return Definition(targets=targets, writer="writer_us=" in (root.findtext("os/cmdline") or ""))


# --- guests --------------------------------------------------------------------------------------------------------------------


def writes(guests: Sequence[Guest]) -> Writes:
    """What QEMU has counted of the guests that run and have a writer. No domain's job is waited for."""
    counted: dict[str, dict[str, int]] = {}
    for host in {g.host for g in guests}:
        wanted = {g.name: g for g in guests if g.host == host and g.spec.writer and g.spec.image is not None}
        flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
        with host.connection() as connection:
            for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BLOCK, flags):
                if (name := domain.name()) in wanted:
                    by_target = {
                        stats[f"block.{n}.name"]: int(stats.get(f"block.{n}.wr.reqs", 0))
                        for n in range(int(stats.get("block.count", 0)))
                    }
                    counted[name] = {t: n for t, n in by_target.items() if t in wanted[name].disks}
    return counted


def guests(given: Sequence[Guest], before: Writes, allowed: Allowed) -> list[GuestSeen]:
    """Ask each guest's agent, all at once, and see whether writes arrive that were not there `before`."""
    if not given:
        return []
    with ThreadPoolExecutor(min(16, len(given))) as threads:
        seen = list(threads.map(lambda g: _guest(g, allowed), given))
    free = [g for g, s in zip(given, seen, strict=True) if s.agent != "frozen" and not s.stub]
    silent = _silent(free, before)
    return [
        GuestSeen(
            name=s.name, sources=s.sources, stub=s.stub, agent=s.agent, trouble=s.trouble, silent=silent.get(s.name, ())
        )
        for s in seen
    ]


def _guest(guest: Guest, allowed: Allowed) -> GuestSeen:
    sources = {t: d.path if d.kind == "file" else f"{d.pool}/{d.image}" for t, d in guest.disks.items()}
    if guest.spec.image is None:
        return GuestSeen(name=guest.name, sources=sources, stub=True)
    try:
        if guest.name in allowed.paused | allowed.off and guest.domain().state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            return GuestSeen(name=guest.name, sources=sources)
        agent = str(guest.agent("guest-fsfreeze-status", timeout=AGENT_SECONDS))
    except (LabError, libvirt.libvirtError) as error:
        return GuestSeen(name=guest.name, sources=sources, trouble=str(error))
    return GuestSeen(name=guest.name, sources=sources, agent=agent)


def _silent(given: Sequence[Guest], before: Writes) -> dict[str, tuple[str, ...]]:
    """Disks on which nothing was written for `WRITES_SECONDS`: a guest in which all is well does not take a tenth of that.

    Raises LabError if a guest's writer has ended: without it the content of snapshots would prove nothing.
    """
    end = time.monotonic() + WRITES_SECONDS
    while True:
        now = writes(given)
        still = {
            name: tuple(sorted(t for t, n in before[name].items() if now[name].get(t, 0) <= n))
            for name in now
            if name in before
        }
        still = {name: targets for name, targets in still.items() if targets}
        if not still or time.monotonic() > end:
            break
        time.sleep(0.05)
    for guest in given:
        if guest.name in still:
            _must_write(guest)
    return still


def _must_write(guest: Guest) -> None:
    try:
        guest.control(["sh", "-c", "kill -0 $(cat /run/writer.pid)"])
    except LabError as error:
        raise LabError(f"the writer of guest {guest.name} has ended, nothing can be judged: {error}") from error
