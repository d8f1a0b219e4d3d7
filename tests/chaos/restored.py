"""The judge's eye on restores: all disks of one moment or none touched, a VM that can be started, and nothing left of what was not to be.

Reads the disks themselves and the domain's definition. Takes away what a restore that went well rightly leaves: the VM that it made,
the safety snapshot.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu

from tests import proof
from tests.chaos.faults import Scene
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.stack import TENANT, Stack, conditions, until

SECONDS = 240.0
BOOT_SECONDS = 120.0


def is_over(stack: Stack, name: str) -> bool:
    """Whether a VMRestore is gone, or has come to its end."""
    body = stack.get_restore(name, TENANT)
    if body is None:
        return True
    found = conditions(body)
    settled = found.get("Reconciling", {}).get("status") == "False" and not body["metadata"].get("deletionTimestamp")
    return settled and "True" in (found.get("Ready", {}).get("status"), found.get("Stalled", {}).get("status"))


def judge(scene: Scene) -> list[Finding]:
    """What is wrong with what the restores of this scene have made, which have ended; then take away what they made. Raises LabError."""
    findings: list[Finding] = []
    for name in scene.restores:
        body = scene.stack.get_restore(name, TENANT)
        if scene.new_vm:
            findings += _of_new_vm(scene, name, body)
        elif body is not None:
            findings += _of_disks(scene, name, body)
        scene.stack.delete_restore(name, namespace=TENANT, wait=False)
        until(f"VMRestore {name} is gone", lambda name=name: scene.stack.get_restore(name, TENANT) is None, SECONDS)  # type: ignore[misc]
    if scene.new_vm:
        proof.remove_vm(scene.lab, scene.new_vm)
    for body in scene.stack.all("vmsnapshots.vmsnapshot.io"):
        if body["metadata"].get("labels", {}).get("vmsnapshot.io/safety-of") in scene.restores:
            scene.stack.delete(body["metadata"]["name"], namespace=TENANT)
    return findings


def _is_true(body: Mapping[str, Any] | None, kind: str) -> bool:
    return conditions(body or {}).get(kind, {}).get("status") == "True"


def _of_disks(scene: Scene, name: str, body: Mapping[str, Any]) -> Iterator[Finding]:
    """After a restore in place all disks are of the snapshot, or after one that failed all of the safety snapshot."""
    subject = f"VMRestore {name}"
    domain = scene.guest.domain()
    stored = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    if missing := [t for t in scene.guest.disks if f"dev='{t}'" not in stored]:
        yield Finding("stuck", subject, f"it has ended, and {', '.join(missing)} are not in the VM's definition")
        return
    if domain.isActive():
        return  # it never came to the VM's being stopped, or the VM writes on: nothing is to be compared
    source = scene.name if _is_true(body, "Ready") else (body.get("status") or {}).get("safetySnapshotName")
    content = scene.stack.content(source, TENANT) if source else None
    if content is None or not content["spec"].get("readyTime"):
        return
    with tempfile.TemporaryDirectory(dir=scene.lab.state, prefix="judge-") as folder:
        held = proof.read(scene.lab, content, Path(folder))
        now = proof.of_domain(scene.lab, domain, Path(folder))
    if now.records != held.records:
        text = f"the disks hold {dict(now.records)}, and the snapshot {source} holds {dict(held.records)}"
        yield Finding("lied", subject, text)
    if not now.clean and held.clean:
        yield Finding("lied", subject, f"the snapshot's file systems are clean, the disks' are not: {dict(now.fsck)}")


def _of_new_vm(scene: Scene, name: str, body: Mapping[str, Any] | None) -> Iterator[Finding]:
    """A new VM is there as a whole, or not at all, and its guest comes up."""
    connection = scene.lab.libvirt()
    try:
        there = scene.new_vm in [d.name() for d in connection.listAllDomains()]
    finally:
        connection.close()
    subject = f"VMRestore {name}"
    if there:
        yield from _boots(scene)
    if _is_true(body, "Ready") and not there:
        yield Finding("lied", subject, f"it is Ready, and there is no VM {scene.new_vm}")
    if body is not None and _is_true(body, "Stalled") and there:
        reason = conditions(body)["Stalled"].get("reason")
        if reason not in ("AgentSilent", "DeadlineExceeded"):  # it was made, and did not start well
            yield Finding("leaked", f"domain {scene.new_vm}", f"its restore {name} is Stalled: {reason}")


def _boots(scene: Scene) -> Iterator[Finding]:
    connection = scene.lab.libvirt()
    try:
        domain = connection.lookupByName(scene.new_vm)
        try:
            if not domain.isActive():
                domain.create()
            until(f"the guest of {scene.new_vm} answers", lambda: _answers(domain), BOOT_SECONDS)
        except (libvirt.libvirtError, LabError) as error:
            yield Finding("unbootable", f"domain {scene.new_vm}", str(error))
    finally:
        connection.close()


def _answers(domain: libvirt.virDomain) -> bool:
    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute":"guest-ping"}', 2, 0)
    except libvirt.libvirtError:
        return False
    return True
