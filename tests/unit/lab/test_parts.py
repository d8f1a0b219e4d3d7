"""The laboratory's small parts: places, locks, ports, definitions, leftovers, the existing cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from tests.lab import GuestDisk, LabError, __main__, leftovers, paths
from tests.lab.definition import DEMO, Spec
from tests.lab.lab import Lab, _given_cluster
from tests.lab.locks import locked
from tests.lab.run import run
from tests.lab.wait import free_ports, until


def spec(**other: object) -> Spec:
    disks = {t: d.placed("demo", t, Path("/pool")) for t, d in DEMO.items()}
    fixed = {"name": "demo", "disks": disks, "image": Path("/image"), "channel": Path("/c.sock"), "log": Path("/l.log")}
    return Spec(**(fixed | {"mon_host": "127.0.0.1:3300"} | other))  # type: ignore[arg-type]  # fields of the spec


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_state_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_STATE", f"/var/tmp/{'x' * 60}")  # noqa: S108 - never made
    with pytest.raises(LabError, match="longer than 60"):
        paths.state()


def test_ports_are_free_different_and_not_those_of_outgoing_connections() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < lowest
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


# --- locks and programs ----------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(LabError, match="held by another process"),
        locked(tmp_path / "lock", 0),
    ):
        pass
    with locked(tmp_path / "lock", 0):
        pass


def test_a_lock_whose_folder_was_deleted_by_its_holder_is_a_new_lock(tmp_path: Path) -> None:
    path = tmp_path / "state" / "lock"
    with locked(path):
        path.unlink()
        path.parent.rmdir()
        with locked(path, 0):
            assert path.exists()


def test_what_never_comes_is_named() -> None:
    with pytest.raises(LabError, match="the moon: not within 0 s"):
        until("the moon", lambda: False, 0, 0)


def test_a_program_that_fails_is_quoted() -> None:
    with pytest.raises(LabError, match=r"sh -c .*: exit 3: bad luck"):
        run("sh", "-c", "echo bad luck >&2; exit 3")
    with pytest.raises(LabError, match="not installed: run `make system`"):
        run("no-such-program-here")


# --- definitions -----------------------------------------------------------------------------------------------------


def test_the_demo_guest_lies_on_two_storage_systems() -> None:
    xml = ET.fromstring(spec().xml())  # noqa: S314 - our own text
    sources = {d.find("target").get("dev"): dict(d.find("source").attrib) for d in xml.findall("devices/disk")}  # type: ignore[union-attr]
    assert sources == {
        "vda": {"file": "/pool/demo-vda.raw"},
        "vdb": {"file": "/pool/demo-vdb.raw"},
        "vdc": {"protocol": "rbd", "name": "vms/demo-c"},
    }
    assert {d.find("driver").get("cache") for d in xml.findall("devices/disk")} == {"none"}  # type: ignore[union-attr]
    assert xml.get("type") == "qemu", "KVM may be advertised and not boot"


@pytest.mark.parametrize(
    "other",
    [{"memory_mib": 96}, {"writer": False}, {"hook": False}, {"append": "x"}, {"mon_host": "127.0.0.1:1"}],
    ids=str,
)
def test_another_definition_is_another_guest(other: dict[str, object]) -> None:
    assert spec(**other).digest() != spec().digest()
    assert spec().digest() in spec().xml()


def test_a_stub_boots_nothing_and_has_no_agent() -> None:
    xml = spec(image=None).xml()
    assert "<kernel>" not in xml
    assert "guest_agent" not in xml


def test_what_the_guest_reads_on_its_command_line() -> None:
    assert "writer_us=50000" in spec().command_line()
    assert "writer_us" not in spec(writer=False).command_line()
    assert "hook=off" in spec(hook=False).command_line()


def test_a_disk_keeps_the_place_it_was_given() -> None:
    assert GuestDisk(kind="file", path="/else/x.raw").placed("g", "vda", Path("/pool")).path == "/else/x.raw"
    assert GuestDisk(kind="file", format="qcow2").placed("g", "vdb", Path("/pool")).path == "/pool/g-vdb.qcow2"


# --- an existing cluster ---------------------------------------------------------------------------------------------


def test_the_existing_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, other = tmp_path / "lab", tmp_path / "lab2" / "config"
    other.parent.mkdir()
    other.touch()
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert _given_cluster(state) is None
    monkeypatch.setenv("KUBECONFIG", str(state / "control-plane" / "admin.kubeconfig"))
    assert _given_cluster(state) is None, "the laboratory's own"
    monkeypatch.setenv("KUBECONFIG", str(other))
    assert _given_cluster(state) == other, "a folder whose name begins alike is not the laboratory's"
    monkeypatch.setenv("KUBECONFIG", f"{other}:{other}")
    with pytest.raises(LabError, match="several files"):
        _given_cluster(state)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(LabError, match="is not there"):
        _given_cluster(state)


def test_the_audit_log_is_none_with_an_existing_cluster(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path / "config")
    assert lab.audit_log is None
    assert lab.kubeconfig == tmp_path / "config"
    assert "etcd" not in lab.components
    with pytest.raises(LabError, match="there is no component etcd"):
        lab.component("etcd")


# --- leftovers and the command line ----------------------------------------------------------------------------------


def test_nothing_is_left_where_nothing_was(tmp_path: Path) -> None:
    assert leftovers.found(tmp_path) == []


def test_a_shell_that_works_with_the_laboratory_is_not_part_of_it(tmp_path: Path) -> None:
    """`less STATE/log/etcd.log` and a shell with KUBECONFIG set must survive `down`."""
    (tmp_path / "log").touch()
    bystander = subprocess.Popen(
        ["tail", "-f", str(tmp_path / "log")],
        env={**os.environ, "KUBECONFIG": f"{tmp_path}/config"},
        stdout=subprocess.DEVNULL,
    )
    try:
        assert leftovers.processes(tmp_path) == {}
    finally:
        bystander.kill()
        bystander.wait()


def test_what_bears_the_mark_is_part_of_it(tmp_path: Path) -> None:
    ours = subprocess.Popen(["sleep", "600"], env=os.environ | Lab(tmp_path, None).marker)
    try:
        assert list(leftovers.processes(tmp_path)) == [ours.pid]
        leftovers.clear(tmp_path)
        assert ours.wait(timeout=30) == -signal.SIGKILL
    finally:
        ours.kill()
        ours.wait()


def test_attach_without_a_laboratory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_STATE", "/var/tmp/no-laboratory")  # noqa: S108 - never made
    with pytest.raises(LabError, match="run `make lab-up`"):
        Lab.attach()


def test_help_teaches() -> None:
    said = CliRunner().invoke(__main__.main, ["--help"]).output
    for word in ("up", "down", "status", "env", "LAB_STATE", "LAB_CACHE", "KUBEBUILDER_ASSETS", "KUBECONFIG"):
        assert word in said


def test_bindings_of_another_python_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(__main__.sysconfig, "get_config_var", lambda _name: ".cpython-399-x86_64-linux-gnu.so")
    done = CliRunner().invoke(__main__.main, ["bindings"])
    assert isinstance(done.exception, LabError)
    assert "python3.11 -m venv" in str(done.exception)
