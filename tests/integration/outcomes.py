"""How a request of bad input, or in bad luck, has to end; and the moments in which bad luck strikes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import libvirt

from tests import proof
from tests.lab import Lab, LabError
from tests.stack import Stack, conditions


def refused(stack: Stack, name: str, reason: str) -> str:
    """Wait for the refusal; return its message."""
    body = stack.wait(name, "Stalled")
    found = conditions(body)
    assert found["Planned"]["status"] == "False"
    assert found["Planned"]["reason"] == reason
    assert found["Stalled"]["reason"] == reason
    assert found["Ready"]["status"] == "False"
    assert not body["metadata"].get("finalizers")
    assert stack.content(name) is None
    return str(found["Stalled"]["message"])


def failed(stack: Stack, name: str, *reasons: str) -> str:
    """Wait for the failure after something was touched; return its message. Of what was cut nothing is left."""
    body = stack.wait(name, "Stalled")
    found = conditions(body)
    assert found["Stalled"]["reason"] in reasons, found["Stalled"]
    assert found["Unquiesced"]["status"] == "True"
    assert found["Ready"]["status"] == "False"
    assert "consistency" not in body["status"]
    assert not [x for x in left(stack, body) if not x.startswith("object")]
    return str(found["Stalled"]["message"])


def proved(stack: Stack, name: str, into: Path) -> None:
    """Hold a claim of `Filesystem` against what the disks hold."""
    content = stack.content(name)
    assert content is not None
    held = proof.read(stack.lab, content, into)
    assert held.one_instant, held.records
    assert held.clean, held.fsck


def left(stack: Stack, body: Mapping[str, Any]) -> list[str]:
    """What the world still holds of this VMSnapshot."""
    return proof.held_of(stack.lab, stack.installation(), body["metadata"]["uid"])


def class_conditions(stack: Stack, name: str) -> dict[str, dict[str, Any]]:
    """The conditions of a StorageDriverClass by type; empty if it was not looked at yet."""
    for body in stack.all("storagedriverclasses.vmsnapshot.io"):
        if body["metadata"]["name"] == name:
            return conditions(body)
    return {}


def window_begins(lab: Lab, domain: str = "demo") -> None:
    """Return when a journal is in the domain: the guest is about to be frozen, and the drivers are prepared."""
    connection = lab.libvirt()
    try:
        found = connection.lookupByName(domain)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                found.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, proof.JOURNAL, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            except libvirt.libvirtError:
                time.sleep(0.002)
            else:
                return
    finally:
        connection.close()
    raise LabError(f"no window of {domain} within 60 s")


def workers(class_name: str) -> list[int]:
    """The driver processes of a class."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
            if b"vmsnapshot_operator.drivers.worker" in words and class_name.encode() in words:
                found.append(int(entry.name))
    return found


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Let these processes stand still for a while; those that were killed meanwhile are passed over."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
