"""Guardians elsewhere than beside the operator: each does what it promises, and not what it cannot.

By layer: on another node (over the network, journals alone), on the hypervisor's host (one file, no network), in the guest.
"""

from __future__ import annotations

import asyncio
import base64
import configparser
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio

from tests.integration.hypervisor_support import (
    GUARD_SECONDS,
    TWO_DISKS,
    Guardian,
    Holder,
    connect,
    eventually,
    free,
    is_state,
    journal,
    small_guest,
)
from tests.lab import Lab
from tests.lab.errors import LabError
from tests.lab.guests import Guest
from tests.lab.wait import until
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref

ROOT = Path(__file__).resolve().parents[2]
CONTRIB = ROOT / "contrib"
GRACE = 2.0
CLOCKS = 0.1
"""So much the clock that a guardian waits by, and the one that it writes down, may differ in some seconds."""
pytestmark = pytest.mark.usefixtures("alone")

BACK_SECONDS = 5.0
"""How soon a VM is free after everything that is needed for it answers again."""
LIVE_AND_CONFIG = libvirt.VIR_DOMAIN_AFFECT_LIVE | libvirt.VIR_DOMAIN_AFFECT_CONFIG


# --- what the tests hold and watch with ------------------------------------------------------------------------------


@dataclass(slots=True)
class Watcher(Guardian):
    """A guardian that only watches. `command`: how it is started, if not from this tree; `environment` is added."""

    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> Watcher:
        """Start it and wait until every libvirt that it follows answers it."""
        words = self.command or (sys.executable, "-m", "vmsnapshot_operator.guardian")
        options = [word for uri in self.uris for word in ("--uri", uri)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [*words, "--watch-only", *options, *(["--socket", str(self.socket)] if self.socket.name else [])],
                stderr=out,
                env={**os.environ, **self.environment},
            )
        end = time.monotonic() + GUARD_SECONDS
        while not all(self.heard("following", uri=uri) for uri in self.uris):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        return self

    def heard(self, what: str, **facts: object) -> list[dict[str, object]]:
        """Lines of its log that say this."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [x for x in lines if x["guardian"] == what and all(x.get(k) == v for k, v in facts.items())]

    def waited(self, held: Journal) -> float:
        """Seconds from its first sight of a journal until it began to free the VM."""
        (armed,), (releasing,) = self.said("armed", held.nonce), self.said("releasing", held.nonce)
        return float(releasing["time"]) - float(armed["time"])


class Network:
    """A way to libvirt's TCP port that can be cut: nothing passes then, and nobody is told."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._whole = threading.Event()
        self._whole.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.uri = f"qemu+tcp://127.0.0.1:{self._listener.getsockname()[1]}/system"
        self._start(self._accept)

    def cut(self) -> None:
        """Let nothing through."""
        self._whole.clear()

    def mend(self) -> None:
        """Let everything through again, also what was sent meanwhile."""
        self._whole.set()

    def close(self) -> None:
        """End it with all connections."""
        self._whole.set()
        for link in list(self._links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(GUARD_SECONDS)
        for link in self._links:
            link.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._links.append(near)
                self._start(self._join, near)

    def _join(self, near: socket.socket) -> None:
        self._whole.wait()
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # nobody listens there
            near.close()
            return
        self._links.append(far)
        self._start(self._pass, far, near)
        self._pass(near, far)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._whole.wait()
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    made = small_guest(lab, "layers", TWO_DISKS)
    yield made
    made.remove()


@pytest_asyncio.fixture
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    made = await connect(lab)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def ref(hypervisor: Hypervisor, guest: Guest) -> AsyncIterator[Ref]:
    found = await hypervisor.find("layers")
    yield found
    domain = guest.domain()
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()
    await free(await hypervisor.window(found))
    with contextlib.suppress(libvirt.libvirtError):
        set_metadata(guest, None)


def set_metadata(guest: Guest, text: str | None) -> None:
    """Have the domain bear this journal, whatever it says."""
    key = journals.PREFIX if text is not None else None
    guest.domain().setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, text, key, journals.NAMESPACE, LIVE_AND_CONFIG)


@pytest.fixture
def network(lab: Lab) -> Iterator[Network]:
    made = Network(lab.host.tcp_port)
    yield made
    made.close()


@pytest.fixture
def remote(network: Network, tmp_path: Path) -> Iterator[Watcher]:
    """A guardian as in the pod on another node: over the network, with a socket for its probes alone."""
    made = Watcher(tmp_path / "remote", tmp_path / "remote.log", (network.uri,)).start()
    yield made
    made.stop()


Lose = Callable[[Journal], float]


@pytest.fixture
def lose_node(lab: Lab, ref: Ref, tmp_path: Path) -> Iterator[Lose]:
    """Hold the VM as the operator does, and lose the operator's node: it and its guardian at once. Returns when it was held."""
    beside = Guardian(tmp_path / "beside", tmp_path / "beside.log").start()
    holders: list[Holder] = []

    def lose(held: Journal) -> float:
        begin = time.monotonic()
        holders.append(Holder(lab, beside, ref, held))
        holders[-1].signal(signal.SIGSTOP)
        beside.signal(signal.SIGKILL)
        holders[-1].signal(signal.SIGKILL)
        return begin

    yield lose
    beside.stop()
    for holder in holders:
        holder.stop()


HELD = {"GuestAgent": AgentState.FROZEN, "Pause": PowerState.PAUSED}
FREE = {"GuestAgent": AgentState.THAWED, "Pause": PowerState.RUNNING}


# --- a second pod on another node ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GuestAgent", "Pause"])
async def test_remote_survives_the_loss_of_the_operators_node(
    hypervisor: Hypervisor, ref: Ref, remote: Watcher, lose_node: Lose, method: str
) -> None:
    held = journal(method, budget=3.0)
    begin = lose_node(held)
    assert await is_state(hypervisor, ref, HELD[method])
    await eventually("it is free", lambda: is_state(hypervisor, ref, FREE[method]))
    assert time.monotonic() - begin >= held.budget + GRACE, "never before its budget and the grace are over"
    assert held.budget + GRACE - CLOCKS <= remote.waited(held) < held.budget + GRACE + 1.5
    assert await hypervisor.read_journal(ref) == held, "the operator must see what happened"


async def test_remote_shortens_no_window_not_even_when_it_is_ended(
    hypervisor: Hypervisor, ref: Ref, remote: Watcher
) -> None:
    held = journal()
    await hypervisor.write_journal(ref, held)
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    await eventually("it has seen the journal", lambda: said(remote, "armed", held))
    assert remote.signal(signal.SIGTERM) == 0
    assert await window.status(2) is AgentState.FROZEN
    assert not remote.said("releasing", held.nonce)
    assert await window.thaw(5) == 2, "the evidence is whole"


async def said(guardian: Guardian, what: str, held: Journal) -> bool:
    return bool(guardian.said(what, held.nonce))


async def test_remote_does_nothing_about_a_window_that_ends_in_time(
    hypervisor: Hypervisor, ref: Ref, remote: Watcher
) -> None:
    held = journal(budget=1.0)
    await hypervisor.write_journal(ref, held)
    await eventually("it has seen the journal", lambda: said(remote, "armed", held))
    await hypervisor.clear_journal(ref, held.nonce)

    async def over() -> bool:
        await asyncio.sleep(0.2)
        return time.monotonic() > end

    end = time.monotonic() + held.budget + GRACE + 1.5
    await eventually("its time is over", over)
    assert not remote.said("releasing", held.nonce)


NEWER = f'<journal version="9" installation="tested" nonce="{"0" * 32}" budget="0.1"/>'


@pytest.mark.parametrize("text", [None, NEWER, "<journal/>"], ids=["none", "newer", "broken"])
async def test_remote_touches_no_vm_whose_journal_it_cannot_read(
    hypervisor: Hypervisor, ref: Ref, guest: Guest, remote: Watcher, text: str | None
) -> None:
    if text is not None:
        set_metadata(guest, text)
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    if text is not None:
        await eventually("it has seen it", lambda: told(remote, "journal not understood"))
    await asyncio.sleep(GRACE + 2.5)  # budget, grace and two rounds: nothing can be waited for that must not happen
    assert await window.status(2) is AgentState.FROZEN
    assert await window.thaw(5) == 2, "nobody else has thawed"


async def told(watcher: Watcher, what: str) -> bool:
    return bool(watcher.heard(what))


async def test_remote_cannot_help_while_the_network_is_cut_and_does_so_afterwards(
    hypervisor: Hypervisor, ref: Ref, remote: Watcher, network: Network, lose_node: Lose
) -> None:
    held = journal(budget=1.0)
    lose_node(held)
    await eventually("it has seen the journal", lambda: said(remote, "armed", held))
    network.cut()
    await eventually("it tries", lambda: said(remote, "releasing", held))
    await asyncio.sleep(2.0)
    assert await is_state(hypervisor, ref, AgentState.FROZEN), "this is what it cannot help with"
    network.mend()
    took = await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert took < BACK_SECONDS
    await eventually("this guardian freed it", lambda: said(remote, "released", held))


async def test_the_probe_of_the_remote_one_tells_whether_it_reaches_libvirt(lab: Lab, remote: Watcher) -> None:
    words = [sys.executable, "-m", "vmsnapshot_operator.guardian", "--socket", str(remote.socket), "--probe"]

    def exits(*more: str) -> int:
        return subprocess.run([*words, *more], check=False, capture_output=True, timeout=GUARD_SECONDS).returncode

    assert (exits(), exits("--reach")) == (0, 0)
    lab.component("libvirtd").kill()
    try:
        until("it is not ready", lambda: exits("--reach") == 1)
        assert exits() == 0, "to be started again would not help it"
    finally:
        lab.component("libvirtd").start()
    until("it is ready again", lambda: exits("--reach") == 0)


# --- a service on the hypervisor's host ------------------------------------------------------------------------------


@pytest.fixture
def on_host(lab: Lab, tmp_path: Path) -> Iterator[tuple[Watcher, socket.socket]]:
    """The one file, started as the unit says but for its places; without a network; and what it tells systemd."""
    program = tmp_path / "vmsnapshot-guardian.pyz"
    subprocess.run([sys.executable, str(CONTRIB / "guardian-host" / "build.py"), str(program)], check=True)
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's options are case-sensitive
    unit.read(CONTRIB / "guardian-host" / "vmsnapshot-guardian.service")
    interpreter, isolated, _, *options = shlex.split(unit["Service"]["ExecStart"])
    assert (interpreter, isolated) == ("/usr/bin/python3", "-I")
    assert options == ["--watch-only", "--uri", "qemu:///system"]
    command = ("unshare", "--net", sys.executable, "-I", str(program))
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(GUARD_SECONDS)
    made = Watcher(Path(), tmp_path / "host.log", (lab.libvirt_uri,), command=command)
    made.environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "PYTHONPATH": "/nowhere"}
    yield made.start(), told
    made.stop()
    told.close()


async def test_on_host_survives_the_loss_of_everything_but_libvirtd(
    hypervisor: Hypervisor, ref: Ref, on_host: tuple[Watcher, socket.socket], lose_node: Lose
) -> None:
    guardian, systemd = on_host
    assert systemd.recv(64) == b"READY=1"
    assert systemd.recv(64) == b"WATCHDOG=1"
    assert guardian.process is not None
    net = Path(f"/proc/{guardian.process.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in net] == ["lo"], "it has no network"
    held = journal(budget=3.0)
    begin = lose_node(held)
    assert await is_state(hypervisor, ref, AgentState.FROZEN)
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert time.monotonic() - begin >= held.budget + GRACE
    assert held.budget + GRACE - CLOCKS <= guardian.waited(held) < held.budget + GRACE + 1.5


async def test_on_host_waits_for_a_killed_libvirtd(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, on_host: tuple[Watcher, socket.socket], lose_node: Lose
) -> None:
    guardian, _ = on_host
    held = journal(budget=2.0)
    lose_node(held)
    await eventually("it has seen the journal", lambda: said(guardian, "armed", held))
    libvirtd = lab.component("libvirtd")
    libvirtd.kill()
    try:
        await eventually("its time is over and it tries", lambda: told(guardian, "not free yet"))
        assert not guardian.said("released", held.nonce)
    finally:
        libvirtd.start()
    took = await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert took < BACK_SECONDS
    await eventually("this guardian freed it", lambda: said(guardian, "released", held))


async def test_on_host_started_after_all_was_lost(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, on_host: tuple[Watcher, socket.socket], lose_node: Lose
) -> None:
    guardian, _ = on_host
    guardian.signal(signal.SIGKILL)
    held = journal(budget=1.0)
    lose_node(held)
    assert await is_state(hypervisor, ref, AgentState.FROZEN)
    guardian.start()
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert held.budget + GRACE - CLOCKS <= guardian.waited(held)


async def test_on_host_cannot_help_with_a_dead_agent(
    hypervisor: Hypervisor, ref: Ref, guest: Guest, on_host: tuple[Watcher, socket.socket], lose_node: Lose
) -> None:
    guardian, _ = on_host
    held = journal(budget=1.0)
    lose_node(held)
    guest.end_agent()
    try:
        await eventually("it tries", lambda: told(guardian, "not free yet"))
        assert not guardian.said("released", held.nonce)
    finally:
        begin = time.monotonic()
        guest.end_agent(end=False)
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert time.monotonic() - begin < BACK_SECONDS + 2, "an agent that ended is started again within a second or so"


# --- in the guest ----------------------------------------------------------------------------------------------------

HOOK = CONTRIB / "guest-watchdog" / "vmsnapshot-watchdog"
SECONDS = 6
DISPATCHER = '#!/bin/sh\nfor f in /etc/qemu/fsfreeze-hook.d/*; do "$f" "$@" >> /mnt/vda/hook.log 2>&1 || exit 1; done\n'
"""As distributions have one: it runs all scripts of a folder, and its log lies on a file system that is about to be frozen."""


class Watched:
    """A guest with the watchdog, and a look into it by an agent that the laboratory alone uses."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.sh(
            "mkdir -p /etc/qemu/fsfreeze-hook.d; grep -q ' /sys/fs/cgroup ' /proc/mounts || mount -t cgroup2 none /sys/fs/cgroup"
        )
        self.put("/etc/qemu/fsfreeze-hook", DISPATCHER.encode())
        self.put("/etc/qemu/fsfreeze-hook.d/vmsnapshot-watchdog", HOOK.read_bytes())
        self.configure(f"seconds={SECONDS}\n")

    def sh(self, script: str, timeout: float = 30) -> str:
        """Run a script in the guest."""
        return self.guest.control(["sh", "-c", script], timeout)

    def put(self, path: str, content: bytes) -> None:
        """Write a program into the guest."""
        self.sh(f"rm -f {path}")
        text = base64.b64encode(content).decode()
        for start in range(0, len(text), 60_000):
            self.sh(f"echo {text[start : start + 60_000]} | base64 -d >> {path}")
        self.sh(f"chmod 755 {path}")

    def configure(self, text: str) -> None:
        """Write its settings."""
        self.put("/etc/vmsnapshot-watchdog.conf", text.encode())

    def freeze(self) -> float:
        """Freeze both disks, have somebody write to each, and return when that was."""
        begin = time.monotonic()
        assert self.guest.agent("guest-fsfreeze-freeze", timeout=30) == 2
        for disk in ("vda", "vdb"):
            self.sh(f"rm -f /run/{disk}; (echo x > /mnt/{disk}/x; echo > /run/{disk}) > /dev/null 2>&1 &")
        return begin

    def frozen(self) -> bool:
        """Whether who writes to the disks still waits: the agent may be dead, or wrong."""
        return self.sh("ls /run/vda /run/vdb 2> /dev/null || true").split() == []

    def thawed(self) -> bool:
        """Whether who writes to the disks has written to both."""
        return self.sh("ls /run/vda /run/vdb 2> /dev/null || true").split() == ["/run/vda", "/run/vdb"]

    def messages(self) -> list[str]:
        """What it told the kernel's log."""
        return [line for line in self.sh("dmesg").splitlines() if "vmsnapshot-watchdog" in line]


@pytest.fixture(scope="module")
def with_watchdog(lab: Lab) -> Iterator[Guest]:
    made = small_guest(lab, "watched", TWO_DISKS)
    yield made
    made.remove()


@pytest.fixture
def watched(with_watchdog: Guest) -> Iterator[Watched]:
    made = Watched(with_watchdog)
    yield made
    with_watchdog.domain().setBlockIoTune("vda", {"read_bytes_sec": 0}, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    made.sh("killall -CONT qemu-ga-main; rm -f /run/agent-off /run/read; dmesg -c > /dev/null")
    with_watchdog.wait()
    with_watchdog.agent("guest-fsfreeze-thaw")
    until("nobody waits for a disk", lambda: "D" not in made.sh("cat /proc/[0-9]*/stat | sed 's/.*) //; s/ .*//'"))
    made.sh("umount -l /run/vmsnapshot-watchdog || true; [ ! -d /sys/fs/cgroup/agent ] || rmdir /sys/fs/cgroup/agent")


def test_in_guest_survives_the_death_of_the_agent_and_of_all_that_it_started(watched: Watched) -> None:
    """As systemd does when an agent's service ends: everything in its cgroup is killed."""
    watched.sh(
        "mkdir /sys/fs/cgroup/agent; for p in $(pidof qemu-ga-main); do echo $p > /sys/fs/cgroup/agent/cgroup.procs; done"
    )
    begin = watched.freeze()
    watched.sh("touch /run/agent-off; echo 1 > /sys/fs/cgroup/agent/cgroup.kill")
    until("all in it are gone", lambda: watched.sh("cat /sys/fs/cgroup/agent/cgroup.procs") == "")
    assert watched.frozen()
    until("it has thawed itself", watched.thawed)
    assert time.monotonic() - begin >= SECONDS - 1, "uptime is counted in whole seconds"
    until("it is said", lambda: len(watched.messages()) == 1)
    assert f"thawed 2 file systems: no thaw came within {SECONDS} s" in watched.messages()[0]
    watched.guest.end_agent(end=False)
    assert watched.guest.agent("guest-fsfreeze-thaw") == 0, "the count betrays it: the snapshot claims nothing"


def test_in_guest_does_nothing_when_the_thaw_comes_in_time(watched: Watched) -> None:
    watched.freeze()
    assert watched.guest.agent("guest-fsfreeze-thaw") == 2
    until("it goes on", watched.thawed)
    time.sleep(SECONDS / 2)
    second = watched.freeze()
    while time.monotonic() - second < SECONDS - 2:  # the first one's time is over, this one's is not
        assert watched.frozen()
    assert watched.guest.agent("guest-fsfreeze-thaw") == 2, "the evidence is whole"
    assert watched.messages() == []


def test_in_guest_needs_no_disk_once_all_are_frozen(watched: Watched) -> None:
    """Its programs lie on a file system that is frozen, nothing of them is in the page cache, and the disk gives nothing."""
    watched.sh("mkdir -p /mnt/vda/bin /mnt/vda/lib; cp /lib/*.so* /mnt/vda/lib; cp /bin/busybox /mnt/vda/unread")
    for name, source in {"sh": "/bin/dash", "sleep": "/bin/sleep", "fsfreeze": "/sbin/fsfreeze"}.items():
        watched.put(f"/mnt/vda/bin/{name}", Path(source).read_bytes())
    for library in _libraries("/bin/dash", "/bin/sleep", "/sbin/fsfreeze") - set(watched.sh("ls /lib").split()):
        raise AssertionError(f"the guest has no {library}")
    ldd = '#!/bin/busybox sh\nLD_LIBRARY_PATH=/mnt/vda/lib exec /lib64/ld-linux-x86-64.so.2 --list "$1"\n'
    watched.put("/mnt/vda/bin/ldd", ldd.encode())
    watched.configure(f"seconds={SECONDS}\nPATH=/mnt/vda/bin:/bin\n")
    begin = watched.freeze()
    watched.guest.domain().setBlockIoTune("vda", {"read_bytes_sec": 1}, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    watched.sh("touch /run/agent-off; killall -KILL qemu-ga-main; echo 3 > /proc/sys/vm/drop_caches")
    watched.sh("(cat /mnt/vda/unread > /dev/null; echo > /run/read) > /dev/null 2>&1 &")
    assert watched.frozen()
    until("it has thawed all", lambda: len(watched.messages()) == 1)
    assert "thawed 2 file systems" in watched.messages()[0]
    assert time.monotonic() - begin >= SECONDS - 1
    assert watched.sh("ls /run/read || true") == "", "the disk gives nothing all the while"
    watched.guest.domain().setBlockIoTune("vda", {"read_bytes_sec": 0}, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    until("who wrote goes on", watched.thawed)


def _libraries(*programs: str) -> set[str]:
    text = subprocess.run(["ldd", *programs], check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in text.splitlines() if "=> /" in line}


def test_in_guest_nothing_is_frozen_if_it_cannot_be_armed(watched: Watched) -> None:
    watched.configure("seconds=soon\n")
    with pytest.raises(LabError, match="hook has failed"):
        watched.guest.agent("guest-fsfreeze-freeze")
    assert watched.guest.freeze_status() == "thawed"
    watched.configure(f"seconds={SECONDS}\nPATH=/nowhere:/bin\nbase=/proc/nowhere\n")
    with pytest.raises(LabError, match="hook has failed"):
        watched.guest.agent("guest-fsfreeze-freeze")
    assert watched.guest.freeze_status() == "thawed"


def test_in_guest_one_that_is_ended_thaws_first(watched: Watched) -> None:
    watched.configure("seconds=600\n")
    watched.freeze()
    watched.sh("killall -STOP qemu-ga-main; kill -TERM $(ps | grep time[r] | sed 's/^ *//; s/ .*//')")
    until("it has thawed all", watched.thawed)
    until("it is said", lambda: len(watched.messages()) == 1)
    assert "thawed 2 file systems: its timer was ended" in watched.messages()[0]
