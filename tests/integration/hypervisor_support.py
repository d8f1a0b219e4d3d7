"""What the tests of hypervisors and guardian share: a guest of their own, a process that can be killed, a guardian."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import Journal, to_xml
from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors.domains import DomainWindow, Hypervisor, Ref

ONE_DISK = {"vda": GuestDisk(kind="file")}
TWO_DISKS = {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="file")}
GUARD_SECONDS = 60.0
"""Longer than anything here takes: a guard against hanging, not a measure."""


def small_guest(lab: Lab, name: str, disks: dict[str, GuestDisk]) -> Guest:
    """A running guest without a writer."""
    return lab.guest(name, disks, writer=False, memory_mib=96)


def endpoint(lab: Lab) -> Endpoint:
    """The laboratory's libvirt."""
    return Endpoint(socket_path=str(lab.libvirt_socket))


async def connect(lab: Lab) -> Hypervisor:
    """The operator's connections to the laboratory's libvirt."""
    return await Hypervisor.connect("lab", [endpoint(lab)], {})


def journal(method: str = "GuestAgent", budget: float = 120.0) -> Journal:
    """A journal that no operator of the laboratory takes for its own."""
    return Journal(
        installation="tested",
        owner_uid="3b7f1f0e-0000-4000-8000-000000000000",
        nonce=secrets.token_hex(16),
        attempt=1,
        method=method,
        budget=budget,
    )


async def eventually(what: str, holds: Callable[[], Awaitable[bool]]) -> float:
    """Wait until something holds; return how many seconds that took."""
    start = time.monotonic()
    while True:
        try:
            if await holds():
                return time.monotonic() - start
        except HypervisorError as error:
            last = error.message
        else:
            last = "it does not"
        assert time.monotonic() - start < GUARD_SECONDS, f"not within {GUARD_SECONDS:g} s: {what}: {last}"
        await asyncio.sleep(0.02)


async def free(window: DomainWindow) -> None:
    """Thaw until the agent says so."""

    async def thawed() -> bool:
        await window.thaw(3)
        return await window.status(2) is AgentState.THAWED

    await eventually("the guest is thawed", thawed)


async def is_state(hypervisor: Hypervisor, ref: Ref, wanted: AgentState | PowerState) -> bool:
    """Whether the VM is in this state, by a look of our own."""
    window = await hypervisor.window(ref)
    return (await window.status(2) if isinstance(wanted, AgentState) else await window.state()) == wanted


@dataclass(slots=True)
class Guardian:
    """A guardian as a process of its own."""

    socket: Path
    log: Path
    uris: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Guardian:
        """Start it and wait until it answers."""
        options = [word for uri in self.uris for word in ("--uri", uri)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vmsnapshot_operator.guardian", "--socket", str(self.socket), *options],
                stderr=out,
            )
        end = time.monotonic() + GUARD_SECONDS
        while self.probe() != 0:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
        return self

    def probe(self) -> int:
        """Exit status of its own probe."""
        words = [sys.executable, "-m", "vmsnapshot_operator.guardian", "--socket", str(self.socket), "--probe"]
        return subprocess.run(words, check=False, capture_output=True, timeout=GUARD_SECONDS).returncode

    def signal(self, number: int) -> int | None:
        """Send a signal; after a deadly one return the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=GUARD_SECONDS) if number in (signal.SIGKILL, signal.SIGTERM) else None

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=GUARD_SECONDS)

    def said(self, what: str, nonce: str) -> list[dict[str, Any]]:
        """Lines of its log about one journal."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["guardian"] == what and line.get("nonce") == nonce]


_HOLDER = """
import asyncio, sys
from pathlib import Path
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import from_xml
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink

async def main(socket, guardian, domain, held):
    hypervisor = await Hypervisor.connect("lab", [Endpoint(socket_path=socket)], {})
    link = GuardianLink(Path(guardian))
    ref = await hypervisor.find(domain)
    journal = from_xml(held)
    await hypervisor.write_journal(ref, journal)
    await link.arm(hypervisor.uri(ref), ref.uuid, journal.nonce, hypervisor.uris)
    window = await hypervisor.window(ref)
    if journal.method == "Pause":
        await window.pause()
    else:
        await window.freeze((), 15)
    print("held", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main(*sys.argv[1:]))
"""


class Holder:
    """A process that holds a VM as the operator does, to be killed or stopped."""

    def __init__(self, lab: Lab, guardian: Guardian, ref: Ref, held: Journal) -> None:
        words = [str(lab.libvirt_socket), str(guardian.socket), ref.uuid, to_xml(held)]
        self.process = subprocess.Popen([sys.executable, "-c", _HOLDER, *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        self.process.kill()
        self.process.wait(timeout=GUARD_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
