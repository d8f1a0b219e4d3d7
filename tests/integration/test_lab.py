"""The laboratory itself: what the other tests take for granted.

A second laboratory, beside the shared one and with the shared one's control plane as its existing cluster, is ended in all ways.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import Guest, GuestDisk, Lab, LabError, leftovers, truth
from tests.lab.ceph import bindings
from tests.lab.paths import REPOSITORY
from tests.lab.run import run
from tests.lab.wait import until


def cli(*arguments: str) -> str:
    return run(sys.executable, "-m", "tests.lab", *arguments, cwd=REPOSITORY)


def status() -> dict[str, str]:
    return {line.split("  ")[0].strip(): line for line in cli("status").splitlines()}


@pytest.fixture
def demo(lab: Lab) -> Iterator[Guest]:
    """The shared guest; whatever a test does to it, it is left answering and thawed."""
    guest = lab.guest("demo")
    yield guest
    with contextlib.suppress(LabError):
        guest.control(["killall", "-CONT", "qemu-ga-main"])
        guest.control(["rm", "-f", "/run/agent-off", "/run/hook-fail"])
    guest = lab.guest("demo")
    if guest.freeze_status() == "frozen":
        guest.agent("guest-fsfreeze-thaw")


@pytest.fixture
def private(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State of a laboratory of the test's own, which uses the shared one's control plane."""
    with tempfile.TemporaryDirectory(prefix="lab-", dir="/var/tmp") as folder:
        monkeypatch.setenv("LAB_STATE", f"{folder}/s")
        monkeypatch.setenv("KUBECONFIG", str(lab.kubeconfig))
        yield Path(folder, "s")
        assert Lab.down() == []


def traces(state: Path) -> list[str]:
    """What names a laboratory's folder among processes, mounts and loop devices: read by other means than `down` uses."""
    found = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f"{state}/" in line]
    found += [line for line in run("losetup", "--list", "--noheadings").splitlines() if f"{state}/" in line]
    found += [line for line in run("ps", "-eo", "pid,args", "-ww").splitlines() if f"{state}/" in line]
    return found


# --- up, status, env -------------------------------------------------------------------------------------------------


def test_a_second_up_changes_nothing(lab: Lab, demo: Guest) -> None:
    before, qemu = lab.control.pids(), demo.pid
    said = cli("up")
    assert lab.control.pids() == before
    assert demo.pid == qemu
    assert all(name in said for name in lab.components)
    assert Lab.attach().kubeconfig == lab.kubeconfig


def test_status_shows_every_part_and_that_it_works(lab: Lab, demo: Guest) -> None:
    shown = status()
    for name in lab.components:
        assert "works" in shown[name]
        assert str(lab.component(name).pid) in shown[name]
    assert "running" in shown["guest demo"]
    assert "mounted" in shown["pool reflink"]


def test_env_is_what_a_shell_needs(lab: Lab, demo: Guest) -> None:
    commands = "kubectl get namespace default -o name; virsh list --name; rbd ls vms; helm version --short"
    script = f'set -e; eval "$({sys.executable} -m tests.lab env)"; {commands}'
    said = run("bash", "-c", script, cwd=REPOSITORY).split()
    assert "namespace/default" in said
    assert "demo" in said
    assert demo.disks["vdc"].image in said


def test_the_operators_key_reaches_its_pool_and_no_more(lab: Lab) -> None:
    rados = bindings("rados")
    options = {"mon_host": lab.ceph.mon_host, "key": lab.ceph.key("vmsnapshot"), "client_mount_timeout": "30"}
    with rados.Rados(rados_id="vmsnapshot", conf=options) as cluster, cluster.open_ioctx(lab.ceph.pool) as ioctx:
        assert bindings("rbd").RBD().list(ioctx) is not None
        code, _, _ = cluster.mon_command(json.dumps({"prefix": "auth ls", "format": "json"}), b"")
        assert code != 0


# --- guests ----------------------------------------------------------------------------------------------------------


def test_the_guest_is_controlled_while_it_is_frozen_and_its_agent_hangs(demo: Guest) -> None:
    assert demo.agent("guest-fsfreeze-freeze") == 3
    demo.hang_agent()
    held = demo.records()
    with pytest.raises(LabError, match="not responding"):
        demo.agent("guest-ping", timeout=1)
    assert demo.records() == held, "the hook holds the writer"
    demo.hang_agent(hang=False)
    until("the agent answers", lambda: demo.freeze_status() == "frozen")
    assert demo.agent("guest-fsfreeze-thaw") == 3
    until("the guest writes again", lambda: demo.records() > held)


def test_a_hook_that_fails_and_an_agent_that_is_gone(demo: Guest) -> None:
    demo.fail_hook()
    with pytest.raises(LabError, match="hook has failed"):
        demo.agent("guest-fsfreeze-freeze")
    demo.fail_hook(fail=False)
    demo.end_agent()
    with pytest.raises(LabError, match="not connected"):
        demo.agent("guest-ping", timeout=2)
    demo.end_agent(end=False)
    assert demo.freeze_status() == "thawed"


def test_a_killed_libvirtd_leaves_the_guest_alone(lab: Lab, demo: Guest) -> None:
    qemu, before = demo.pid, demo.records()
    libvirtd = lab.component("libvirtd")
    libvirtd.kill()
    assert not libvirtd.running
    libvirtd.start()
    assert demo.pid == qemu
    until("the guest answers", demo.agent_answers)
    until("the guest goes on", lambda: demo.records() > before)


def test_another_definition_makes_another_guest(lab: Lab) -> None:
    first = lab.domain_stub("stub")
    uuid, again = first.uuid, lab.domain_stub("stub")
    assert again.uuid == uuid
    disks = {"vda": GuestDisk(kind="rbd"), "vdb": GuestDisk(kind="file", pool="plain", format="qcow2")}
    other = lab.domain_stub("stub", disks)
    assert other.uuid != uuid
    assert not Path(first.disks["vda"].path).exists(), "the disks of the one before are gone"
    assert other.domain().isActive()
    other.remove()
    assert not Path(other.disks["vdb"].path).exists()
    assert "stub-a" not in run("rbd", "-c", lab.ceph.conf, "ls", lab.ceph.pool)


# --- the truth test --------------------------------------------------------------------------------------------------


def copies(lab: Lab, guest: Guest, folder: Path, between: Any = lambda: None) -> dict[str, tuple[int, str]]:
    """Copy the guest's disks one after the other, and tell what each copy holds."""
    held = {}
    for target, disk in sorted(guest.disks.items()):
        raw = folder / f"{target}.raw"
        if disk.kind == "file":
            truth.fetch_file(Path(disk.path), raw)
        else:
            fetch_image(lab, disk.image, raw)
        held[target] = (truth.records(raw), truth.fsck(raw))
        between()
    return held


def fetch_image(lab: Lab, image: str, raw: Path) -> None:
    with lab.ceph.connect() as (_, ioctx), bindings("rbd").Image(ioctx, image) as source:
        source.create_snap("truth")
        try:
            truth.fetch_rbd_snapshot(lab.ceph, image, "truth", raw)
        finally:
            source.remove_snap("truth")


def test_copies_one_after_the_other_are_caught(lab: Lab, demo: Guest, tmp_path: Path) -> None:
    def wait_for_more() -> None:
        now = demo.records()
        until("the guest writes ten more", lambda: demo.records() > now + 10)

    held = copies(lab, demo, tmp_path, wait_for_more)
    records = [held[t][0] for t in sorted(held)]
    assert records == sorted(set(records)), f"each later copy holds more: {held}"
    assert held["vda"][1] == truth.NOT_REPLAYED


def test_copies_of_a_frozen_guest_are_one_instant(lab: Lab, demo: Guest, tmp_path: Path) -> None:
    demo.agent("guest-fsfreeze-freeze")
    counted = demo.records()
    held = copies(lab, demo, tmp_path)
    assert demo.agent("guest-fsfreeze-thaw") == 3
    assert held == dict.fromkeys(("vda", "vdb", "vdc"), (counted, truth.CLEAN))


# --- another laboratory, and its end -----------------------------------------------------------------------------------


def test_half_dead_is_mended(lab: Lab, private: Path) -> None:
    before = lab.control.pids()
    mine = Lab.up()
    assert mine.state == private
    assert mine.audit_log is None
    assert mine.kubectl("get", "namespace", "default", "-o", "name").strip() == "namespace/default"
    stub = mine.domain_stub("stub")
    on_ceph = mine.domain_stub("ceph", {"vda": GuestDisk(kind="rbd")})
    mine.component("libvirtd").kill()
    mine.component("ceph-mon").kill(signal.SIGSTOP)
    mine.component("ceph-osd").kill()
    with pytest.raises(LabError, match="ceph-osd, libvirtd"):
        Lab.attach()
    shown = status()
    assert "ended" in shown["libvirtd"]
    assert "does not answer" in shown["ceph-mon"]

    again = Lab.up()
    assert all(again.component(name).healthy() for name in again.components)
    assert stub.domain().isActive(), "what has nothing to do with Ceph goes on"
    with pytest.raises(LabError, match="no guest ceph"):
        on_ceph.domain()
    assert lab.control.pids() == before, "the shared laboratory was not touched"


def test_down_after_the_supervisor_was_killed_leaves_nothing(
    lab: Lab, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBECONFIG")  # wholly its own, with a control plane
    mine = Lab.up()
    assert mine.components == lab.components
    qemu = mine.domain_stub("stub").pid
    # The shared libvirtd, started again, takes copies of the other laboratory's mounts into its namespace.
    lab.component("libvirtd").stop()
    lab.component("libvirtd").start()
    children = list(mine.control.pids().values())
    # The sentry would do the work of `down` at once: both are gone.
    supervisor = int((private / "supervisor.pid").read_text())
    sentry = next(pid for pid, words in leftovers.processes(private).items() if "tests.lab clear" in words)
    os.kill(sentry, signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    until("the components end with their parent", lambda: not any(_alive(pid) for pid in children), 30)
    assert _alive(qemu), "libvirtd's child, not the supervisor's"
    assert traces(private)

    assert "no process, mount or loop device" in cli("down")
    assert traces(private) == []
    assert not _alive(qemu)
    assert not private.exists()
    assert lab.host.check()


def test_a_killed_supervisor_takes_all_along(private: Path) -> None:
    mine = Lab.up()
    mine.domain_stub("stub")
    os.kill(int((private / "supervisor.pid").read_text()), signal.SIGKILL)
    until("nothing runs", lambda: not traces(private), 60)
    with pytest.raises(LabError, match="run `make lab-up`"):
        Lab.attach()


def _alive(pid: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return done.returncode == 0 and not done.stdout.startswith("Z")
