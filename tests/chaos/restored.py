"""The judge's eye on restores: all disks of one moment or none touched, a VM that can be started, and nothing left of what was not to be.

Reads the disks themselves and the domain's definition. Takes away what a restore that went well rightly leaves: the VM that it made,
the safety snapshot.
"""

from __future__ import annotations

import contextlib
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests import proof
from tests.chaos.claims import PLUGGED
from tests.chaos.faults import Scene
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.proof import Truth
from tests.stack import TENANT, conditions, until
from vmsnapshot_operator.core.markers import GATE_NAMESPACE, RESTORED_NAMESPACE

SECONDS = 240.0
BOOT_SECONDS = 120.0
_STARTED_BADLY = frozenset({"AgentSilent", "DeadlineExceeded", "VMStopped"})
"""What a restore is Stalled for that has done all but to see the guest come up."""

Body = Mapping[str, Any]


def judge(scene: Scene) -> list[Finding]:
    """What is wrong with what the restores of this scene have made, which have ended; then take away what they made. Raises LabError."""
    if not scene.restores:
        return []
    findings = look(scene)
    if scene.guest.spec.image is not None:
        with contextlib.suppress(libvirt.libvirtError):  # it runs, or cannot: whoever waits for it to come up tells
            scene.guest.domain().create()
    for name in scene.restores:
        scene.stack.delete_restore(name, namespace=TENANT, wait=False)
    for name in scene.restores:
        until(f"VMRestore {name} is gone", lambda name=name: scene.stack.get_restore(name, TENANT) is None, SECONDS)  # type: ignore[misc]
    for made in scene.new_vms.values():
        proof.remove_vm(scene.lab, made)
    for name in safety_snapshots(scene):
        scene.stack.delete(name, namespace=TENANT)
    return findings


def safety_snapshots(scene: Scene) -> list[str]:
    """What the restores have taken of the VM before they touched it: by its own mark, not by what their status says."""
    label, there = "vmsnapshot.io/safety-of", scene.stack.all("vmsnapshots")
    return [b["metadata"]["name"] for b in there if b["metadata"].get("labels", {}).get(label) in scene.restores]


def look(scene: Scene) -> list[Finding]:
    """The same, and nothing is taken away; a new VM is started to see whether it comes up, and destroyed. Raises LabError."""
    bodies = {n: scene.stack.get_restore(n, TENANT) for n in scene.restores}
    findings = [f for name in scene.new_vms for f in _of_new_vm(scene, name, bodies.get(name))]
    if in_place := [b for n, b in bodies.items() if n not in scene.new_vms]:
        findings += _of_vm(scene, in_place)
    return findings


def _is_true(body: Body | None, kind: str) -> bool:
    return conditions(body or {}).get(kind, {}).get("status") == "True"


# --- in place ----------------------------------------------------------------------------------------------------------------


def _of_vm(scene: Scene, bodies: Sequence[Body | None]) -> Iterator[Finding]:
    """After a restore in place all disks are of the snapshot, or after one that failed all of what they were; anybody can start it."""
    subject, domain = f"domain {scene.guest.name}", scene.guest.domain()
    root = ET.fromstring(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))  # noqa: S314 - libvirt's own
    if (gate := _marker(root, GATE_NAMESPACE)) is not None:
        yield Finding(
            "leaked", subject, f"its restores have ended, and the gate of {gate} is closed: nobody can start it"
        )
        return
    targets = [t.get("dev", "") for t in root.findall("devices/disk/target")]
    if missing := [t for t in scene.guest.disks if t not in targets]:
        yield Finding("stuck", subject, f"its restores have ended, and {', '.join(missing)} are not in its definition")
        return
    told = [b for b in bodies if b is not None]
    # One that is gone may have been done to the end before, or not at all: then the disks are of one moment, whichever that is.
    gone = len(told) < len(bodies)
    if not scene.redefined:
        yield from of_marker(subject, _marker(root, RESTORED_NAMESPACE), told)
    if not domain.isActive():
        yield from _of_disks(scene, told, gone=gone)
        return
    # It never came to its being stopped, or it writes on: nothing is to be compared, but that it writes to its disks can be seen.
    with contextlib.suppress(LabError, FileNotFoundError):  # it has just ended
        lost = unlinked(scene.guest.pid, [str(d.path) for d in scene.guest.disks.values() if d.kind == "file"])
        if lost:
            yield Finding(
                "lied", subject, f"disks were replaced beneath it, so what it writes is lost: {', '.join(lost)}"
            )


def unlinked(pid: int, paths: Collection[str]) -> list[str]:
    """Which of these files a process has open although they are not there any more under their names. Raises FileNotFoundError."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return sorted(p for p in paths if f"{p} (deleted)" in found)


def of_marker(subject: str, done: str | None, told: Sequence[Body]) -> Iterator[Finding]:
    """Who has set it back stands in the VM itself: else a replay would do it again. Pure; `done`: the UID that stands there."""
    ready = [b["metadata"]["uid"] for b in told if _is_true(b, "Ready")]
    if ready and done not in ready:
        yield Finding("lied", subject, f"a VMRestore of it is Ready, and its mark is {done or 'not there'}")
    for body in told:
        reason = conditions(body).get("Stalled", {}).get("reason")
        if _is_true(body, "Stalled") and reason not in _STARTED_BADLY and done == body["metadata"]["uid"]:
            text = f"it bears the mark of VMRestore {body['metadata']['name']}, which came to nothing: {reason}"
            yield Finding("lied", subject, text)


def _of_disks(scene: Scene, told: Sequence[Body], *, gone: bool) -> Iterator[Finding]:
    subject = f"domain {scene.guest.name}"
    with tempfile.TemporaryDirectory(dir=scene.lab.state, prefix="judge-") as folder:
        now = _without_plugged(proof.of_domain(scene.lab, scene.guest.domain(), Path(folder)))
        if any(_is_true(b, "Ready") for b in told):
            source, held = f"the snapshot {scene.name}", scene.held or _read(scene, scene.name, Path(folder))
        else:
            source, held = "", None
            for name in safety_snapshots(scene):
                if held is None and not gone:
                    source, held = f"the safety snapshot {name}", _read(scene, name, Path(folder))
    if held is not None:
        yield from (Finding("lied", subject, f"{source}: {w}") for w in unlike(now, held))
    elif not now.in_order:
        text = f"no VMRestore of it is Ready, and its disks are of different moments: {dict(now.records)}"
        yield Finding("lied", subject, text)


def _without_plugged(found: Truth) -> Truth:
    """A disk that a fault plugs in is of no restore."""
    return Truth(
        {t: n for t, n in found.records.items() if t != PLUGGED}, {t: w for t, w in found.fsck.items() if t != PLUGGED}
    )


def _read(scene: Scene, name: str, folder: Path) -> Truth | None:
    content = scene.stack.content(name, TENANT)
    if content is None or not content["spec"].get("readyTime") or content["spec"].get("failure"):
        return None
    return proof.read(scene.lab, content, folder)


def unlike(now: Truth, held: Truth) -> Iterator[str]:
    """How disks that were set back are not what they were set back to. Pure."""
    held = _without_plugged(held)
    if now.records != held.records:
        yield f"the disks hold {dict(now.records)}, and it holds {dict(held.records)}"
    if not now.clean and held.clean:
        yield f"its file systems are clean, the disks' are not: {dict(now.fsck)}"


def _marker(root: ET.Element, namespace: str) -> str | None:
    """The UID of the VMRestore that a mark names; None if there is none."""
    found = next((e for e in root.findall("metadata/*") if e.tag.startswith(f"{{{namespace}}}")), None)
    return None if found is None else found.get("uid", "nobody")


# --- a new VM ----------------------------------------------------------------------------------------------------------------


def _of_new_vm(scene: Scene, name: str, body: Body | None) -> Iterator[Finding]:
    """A new VM is there as a whole, or not at all; its disks are the snapshot's, and its guest comes up."""
    vm, subject = scene.new_vms[name], f"domain {scene.new_vms[name]}"
    connection = scene.lab.libvirt()
    try:
        domain = next((d for d in connection.listAllDomains() if d.name() == vm), None)
        if domain is None:
            if _is_true(body, "Ready"):
                yield Finding("lied", f"VMRestore {name}", f"it is Ready, and there is no VM {vm}")
            return
        if body is not None and _is_true(body, "Stalled"):
            reason = conditions(body)["Stalled"].get("reason")
            if reason not in _STARTED_BADLY:
                yield Finding("leaked", subject, f"its restore {name} is Stalled: {reason}")
        if body is not None and _is_true(body, "Ready"):
            done = _marker(ET.fromstring(domain.XMLDesc()), RESTORED_NAMESPACE)  # noqa: S314 - libvirt's own
            if done != body["metadata"]["uid"]:
                yield Finding("lied", subject, f"VMRestore {name} is Ready, and its mark is {done or 'not there'}")
        if not domain.isActive() and not scene.started:
            yield from _of_clones(scene, domain, subject)
        yield from _boots(domain, subject)
        # One that was started has written more since; what it began with is still there.
        yield from _of_clones(scene, domain, subject, grown=True)
    finally:
        connection.close()


def _of_clones(scene: Scene, domain: Any, subject: str, *, grown: bool = False) -> Iterator[Finding]:
    if scene.held is None:
        return
    with contextlib.suppress(libvirt.libvirtError):
        domain.destroy()
    with tempfile.TemporaryDirectory(dir=scene.lab.state, prefix="judge-") as folder:
        try:
            now = _without_plugged(proof.of_domain(scene.lab, domain, Path(folder)))
        except (LabError, OSError) as error:
            yield Finding("unbootable", subject, f"its disks cannot be read: {error}")
            return
    if not grown:
        yield from (Finding("lied", subject, f"the snapshot {scene.name}: {w}") for w in unlike(now, scene.held))
    elif shrunk := {t: n for t, n in scene.held.records.items() if t != PLUGGED and now.records.get(t, 0) < n}:
        text = f"it was made of a snapshot that holds {shrunk}, and its disks hold {dict(now.records)}"
        yield Finding("lied", subject, text)
    elif not now.in_order:
        yield Finding("lied", subject, f"its disks are of different moments: {dict(now.records)}")


def _boots(domain: Any, subject: str) -> Iterator[Finding]:
    try:
        if not domain.isActive():
            domain.create()
        until(f"the guest of {domain.name()} answers", lambda: _answers(domain), BOOT_SECONDS)
    except (libvirt.libvirtError, LabError) as error:
        yield Finding("unbootable", subject, str(error))


def _answers(domain: Any) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-ping"}', 2, 0)
    except libvirt.libvirtError:
        return False
    return True
