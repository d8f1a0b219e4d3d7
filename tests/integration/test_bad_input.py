"""Bad input and bad luck, row by row: a clear refusal before anything happens, or a free VM and the truth afterwards."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests import proof
from tests.lab import Lab, LabError
from tests.stack import NAMESPACE, Stack, conditions, until


@pytest.fixture(autouse=True)
def _nothing_is_left(lab: Lab) -> Iterator[None]:
    """Whatever a test did: the guest is thawed and storage holds nothing that was not there before."""
    before = set(proof.leftovers(lab))
    yield
    guest = lab.guest("demo")
    until("the guest is thawed", lambda: guest.freeze_status() == "thawed")
    until(
        "nothing is left",
        lambda: not [x for x in proof.leftovers(lab) if x not in before and not x.startswith("object")],
    )


def _refused(stack: Stack, name: str, reason: str) -> str:
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


def _events(lab: Lab, name: str, reason: str) -> list[dict[str, Any]]:
    """The events about a VMSnapshot with this reason."""
    found = json.loads(lab.kubectl("-n", "team-a", "get", "events.events.k8s.io", "-o", "json"))["items"]
    return [e for e in found if e["regarding"]["name"] == name and e["reason"] == reason]


def _failed(stack: Stack, name: str, *reasons: str) -> str:
    """Wait for the failure after something was touched; return its message."""
    body = stack.wait(name, "Stalled")
    found = conditions(body)
    assert found["Stalled"]["reason"] in reasons, found["Stalled"]
    assert found["Unquiesced"]["status"] == "True"
    assert found["Ready"]["status"] == "False"
    return str(found["Stalled"]["message"])


def _class(stack: Stack, name: str, driver: str, match: list[dict[str, str]], priority: int = 0, **spec: Any) -> None:
    stack.apply(
        {
            "apiVersion": "vmsnapshot.io/v1alpha1",
            "kind": "StorageDriverClass",
            "metadata": {"name": name},
            "spec": {"driver": driver, "priority": priority, "match": match, **spec},
        }
    )


@pytest.fixture
def extra_class(stack: Stack, lab: Lab) -> Iterator[Callable[..., str]]:
    """Create a StorageDriverClass for one test."""
    made: list[str] = []

    def create(name: str, driver: str, match: list[dict[str, str]], priority: int = 0, **spec: Any) -> str:
        made.append(name)
        _class(stack, name, driver, match, priority, **spec)
        until(f"class {name} was looked at", lambda: bool(_conditions_of_class(stack, name)))
        return name

    yield create
    for name in made:
        lab.kubectl("delete", "storagedriverclasses.vmsnapshot.io", name)


def _conditions_of_class(stack: Stack, name: str) -> dict[str, dict[str, Any]]:
    for body in stack.all("storagedriverclasses.vmsnapshot.io"):
        if body["metadata"]["name"] == name:
            return conditions(body)
    return {}


# --- who and where ----------------------------------------------------------------------------------------------------


def test_unknown_hypervisor(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("nohost", source={"hypervisorName": "nowhere", "domain": "demo"})
    message = _refused(stack, name, "HypervisorNotFound")
    assert "nowhere" in message
    until("an event says so", lambda: bool(_events(lab, name, "HypervisorNotFound")))
    assert [(e["type"], e["note"]) for e in _events(lab, name, "HypervisorNotFound")] == [("Warning", message)]


def test_a_domain_that_is_not_there_and_one_that_is_forbidden_look_the_same(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    other = fresh("other")
    stack.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    forbidden = stack.snapshot(fresh("forbidden"), "demo", namespace=other)
    body = stack.wait(forbidden, "Stalled", namespace=other)
    told = conditions(body)["Stalled"]
    missing = vmsnapshot("missing", source={"hypervisorName": "lab", "domain": "absent"})
    message = _refused(stack, missing, "DomainNotFound")
    assert told["reason"] == "DomainNotFound"
    assert told["message"].replace(other, "NS").replace("demo", "D") == message.replace("team-a", "NS").replace(
        "absent", "D"
    )
    assert "vm" not in body["status"]
    stack.delete(forbidden, namespace=other)


def test_they_look_the_same_also_while_one_of_the_hosts_does_not_answer(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    """The forbidden one is known to run; the missing one may be on the silent host: whoever may see neither learns neither."""
    other = fresh("other")
    stack.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    (document,) = stack.example("hypervisor.yaml")
    dead = {"driver": "qemu", "transport": "unix", "socketPath": f"/run/{other}"}
    document["spec"]["libvirt"]["endpoints"] = [stack.endpoint(), dead]
    stack.apply(document)
    names = {d: stack.snapshot(fresh(d), d, namespace=other, deadlineSeconds=10) for d in ("demo", "absent")}
    try:
        told = {}
        for domain, name in names.items():
            last = conditions(stack.wait(name, "Stalled", namespace=other))["Stalled"]
            told[domain] = last["message"].replace(domain, "D").replace("; trying again shortly", "")
            assert last["reason"] == "DeadlineExceeded"
        assert told["demo"] == told["absent"]
        assert "does not answer" in told["demo"]
        assert stack.wait(vmsnapshot("allowed", dryRun=True), "Planned"), "one whose VM is known to run is not delayed"
    finally:
        for name in names.values():
            stack.delete(name, namespace=other)
        stack.configure()
        stack.observed()


def test_a_quiesce_method_that_is_not_installed(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    message = _refused(stack, vmsnapshot("sorcery", quiesce={"method": "Sorcery"}), "QuiesceMethodUnknown")
    assert "Sorcery" in message
    assert "GuestAgent" in message


# --- classes ----------------------------------------------------------------------------------------------------------


def test_an_excluded_target_that_does_not_exist(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    message = _refused(stack, vmsnapshot("excl", volumes={"exclude": ["vdq"]}), "ExcludedTargetNotFound")
    assert "vdq" in message
    assert "vda" in message


def test_two_classes_with_one_priority(
    stack: Stack, vmsnapshot: Callable[..., str], extra_class: Callable[..., str]
) -> None:
    live = next(c for c in stack.all("storagedriverclasses.vmsnapshot.io") if c["metadata"]["name"] == "reflink-files")
    extra_class(
        "twin",
        "libvirt-volume",
        live["spec"]["match"],
        live["spec"].get("priority", 0),
        parameters=live["spec"]["parameters"],
    )
    message = _refused(stack, vmsnapshot("tie"), "ClassTie")
    for disk in ("vda", "vdb", "vdc"):
        assert disk in message
    assert "twin" in message


def test_a_driver_that_is_not_installed_is_passed_by_for_the_next_class(
    stack: Stack, vmsnapshot: Callable[..., str], extra_class: Callable[..., str]
) -> None:
    extra_class("absent-driver", "no-such-driver", [{"type": "file"}], 1000)
    assert _conditions_of_class(stack, "absent-driver")["Ready"]["status"] == "False"
    status = stack.wait(vmsnapshot("bypass"))["status"]
    reasons = {v["target"]: v["reason"] for v in status["volumes"]}
    assert "absent-driver" in reasons["vda"]
    assert "no-such-driver" in reasons["vda"] or "not Ready" in reasons["vda"]


def test_no_class_for_a_disk_lists_every_disk(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    live = next(c for c in stack.all("storagedriverclasses.vmsnapshot.io") if c["spec"]["driver"] == "ceph-rbd")
    name = live["metadata"]["name"]
    patch = {"spec": {"match": [{"type": "network", "protocol": "rbd", "pool": "another"}]}}
    lab.kubectl("patch", "storagedriverclasses.vmsnapshot.io", name, "--type=merge", "-p", json.dumps(patch))
    try:
        time.sleep(1)
        message = _refused(stack, vmsnapshot("noclass"), "NoClassForDisk")
        for disk in ("vda", "vdb", "vdc"):
            assert disk in message
    finally:
        patch = {"spec": {"match": live["spec"]["match"]}}
        lab.kubectl("patch", "storagedriverclasses.vmsnapshot.io", name, "--type=merge", "-p", json.dumps(patch))
        time.sleep(1)


def test_a_class_that_is_not_ready(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    secret = {"data": {"key": base64.b64encode(b"AQAAAAAAAAAAEAAAAAAAAAAAAAAAAAAAAAAAAA==").decode()}}
    good = lab.kubectl("-n", NAMESPACE, "get", "secret", "ceph-rbd", "-o", "jsonpath={.data.key}")
    live = next(c for c in stack.all("storagedriverclasses.vmsnapshot.io") if c["spec"]["driver"] == "ceph-rbd")
    name = live["metadata"]["name"]

    def is_ready() -> bool:
        return _conditions_of_class(stack, name).get("Ready", {}).get("status") == "True"

    lab.kubectl("-n", NAMESPACE, "patch", "secret", "ceph-rbd", "--type=merge", "-p", json.dumps(secret))
    try:
        lab.kubectl("annotate", "storagedriverclasses.vmsnapshot.io", name, "test/poke=1", "--overwrite")
        until("the class is not Ready", lambda: not is_ready())
        message = _refused(stack, vmsnapshot("unready"), "ClassNotReady")
        assert name in message
        assert secret["data"]["key"] not in message
    finally:
        lab.kubectl(
            "-n", NAMESPACE, "patch", "secret", "ceph-rbd", "--type=merge", "-p", json.dumps({"data": {"key": good}})
        )
        lab.kubectl("annotate", "storagedriverclasses.vmsnapshot.io", name, "test/poke=2", "--overwrite")
        until("the class is Ready again", is_ready)


# --- the guest and its agent --------------------------------------------------------------------------------------------


def test_already_frozen_by_somebody_else_is_left_alone(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    guest = lab.guest("demo")
    guest.agent("guest-fsfreeze-freeze")
    try:
        name = vmsnapshot("frozen", deadlineSeconds=10)
        body = stack.wait(name, "Stalled")
        assert "frozen already" in conditions(body)["Stalled"]["message"]
        assert guest.freeze_status() == "frozen"
    finally:
        guest.agent("guest-fsfreeze-thaw")


@pytest.mark.parametrize(("policy", "consistency"), [("Prefer", "Crash"), ("Never", "PerVolume")])
def test_without_an_agent(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], policy: str, consistency: str
) -> None:
    guest = lab.guest("demo")
    guest.control(["killall", "-STOP", "qemu-ga-main"])
    try:
        body = stack.wait(vmsnapshot("silent", quiesce={"policy": policy}))
        assert body["status"]["consistency"] == consistency
    finally:
        guest.control(["killall", "-CONT", "qemu-ga-main"])


def test_without_an_agent_require_is_refused(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    guest = lab.guest("demo")
    guest.control(["killall", "-STOP", "qemu-ga-main"])
    try:
        assert "agent" in _refused(stack, vmsnapshot("silent", quiesce={"policy": "Require"}), "AgentSilent")
    finally:
        guest.control(["killall", "-CONT", "qemu-ga-main"])


def test_a_freeze_that_fails_is_thawed_and_then_by_policy(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    guest = lab.guest("demo")
    guest.control(["touch", "/run/hook-fail"])
    try:
        require = vmsnapshot("hook", quiesce={"policy": "Require"})
        _failed(stack, require, "FreezeFailed")
        body = stack.get(require) or {}
        quiesced = conditions(body)["Quiesced"]
        assert (quiesced["status"], quiesced["reason"]) == ("False", "FreezeFailed")
        assert body["status"]["quiesce"]["frozenTime"] <= body["status"]["quiesce"]["thawedTime"]
        name = vmsnapshot("hook")
        prefer = stack.wait(name)["status"]
        assert prefer["consistency"] == "Crash"
        assert prefer["quiesce"]["method"] == "Pause"
        assert "frozen" in prefer["quiesce"]["reason"]
        warnings = [e["note"] for e in _events(lab, name, "FreezeFailed") if e["type"] == "Warning"]
        assert len(warnings) == 1
        assert "goes on with Pause" in warnings[0]
    finally:
        guest.control(["rm", "-f", "/run/hook-fail"])


def test_paused_by_somebody_stays_paused(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    domain = lab.guest("demo").domain()
    domain.suspend()
    try:
        assert "paused" in _refused(stack, vmsnapshot("paused", quiesce={"policy": "Require"}), "VMPaused")
        body = stack.wait(vmsnapshot("paused"))
        assert body["status"]["consistency"] == "Crash"
        assert domain.state()[0] == 3  # paused, as it was
    finally:
        domain.resume()


def test_shut_off_from_within_is_filesystem_consistent(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    guest = lab.guest("demo")
    guest.shutdown()
    try:
        name = vmsnapshot("off", quiesce={"policy": "Require"})
        body = stack.wait(name)
        assert body["status"]["consistency"] == "Filesystem"
        assert body["status"]["vm"]["powerState"] == "ShutOff"
        content = stack.content(name)
        assert content is not None
        held = proof.read(lab, content, tmp_path)
        assert held.clean, held.fsck
    finally:
        lab.guest("demo")


def test_a_qemu_that_was_ended_by_a_signal_is_crash_consistent(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    """QEMU goes in good order, and libvirt calls the VM `shut down`: the guest knew nothing of it."""
    guest = lab.guest("demo")
    domain = guest.domain()
    guest.kill(signal.SIGTERM)
    try:
        until("the VM is off", lambda: not domain.isActive())
        assert domain.state() == [libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_SHUTOFF_SHUTDOWN]
        message = _refused(stack, vmsnapshot("off", quiesce={"policy": "Require"}), "VMNotCleanlyShutDown")
        assert "not heard" in message
        assert stack.wait(vmsnapshot("off"))["status"]["consistency"] == "Crash"
    finally:
        lab.guest("demo")


def test_destroyed_is_crash_consistent(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    lab.guest("demo").destroy()
    try:
        assert "shut" in _refused(stack, vmsnapshot("off", quiesce={"policy": "Require"}), "VMNotCleanlyShutDown")
        assert stack.wait(vmsnapshot("off"))["status"]["consistency"] == "Crash"
    finally:
        lab.guest("demo")


# --- storage -----------------------------------------------------------------------------------------------------------


def _window_begins(lab: Lab, domain: str = "demo") -> None:
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


def _workers(class_name: str) -> list[int]:
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


@pytest.mark.parametrize("sig", [signal.SIGSTOP, signal.SIGKILL])
def test_a_cut_that_hangs_or_crashes_frees_the_guest_first(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], sig: signal.Signals
) -> None:
    """The driver of one of two storage systems stops, or dies, in the window; nothing of the other one's cut is left."""
    name = vmsnapshot("hang", quiesce={"maxFrozenSeconds": 3})
    _window_begins(lab)
    stopped = _workers("ceph-vms")
    for pid in stopped:
        os.kill(pid, sig)
    try:
        if sig == signal.SIGSTOP:
            held = 'vmsnapshot_frozen_vms{hypervisor="lab"}'
            until("the metric says that it is frozen now", lambda: f"{held} 1.0" in stack.http("/metrics")[1], 3)
        message = _failed(stack, name, "FrozenTooLong", "DriverTimeout", "DriverCrashed")
        assert "ceph-vms" in message
        assert "vdc" in message
        assert 'vmsnapshot_frozen_vms{hypervisor="lab"} 0.0' in stack.http("/metrics")[1]
    finally:
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)


def test_storage_down_at_delete_waits_and_says_so(stack: Stack, lab: Lab, fresh: Callable[[str], str]) -> None:
    name = stack.snapshot(fresh("down"))
    stack.wait(name)
    osd = lab.component("ceph-osd")
    osd.kill(signal.SIGSTOP)
    try:
        stack.delete(name, wait=False)
        until(
            "the trouble is told",
            lambda: "class" in conditions(stack.get(name) or {}).get("Reconciling", {}).get("message", ""),
        )
        assert stack.get(name) is not None
    finally:
        osd.kill(signal.SIGCONT)
    until("it is gone", lambda: stack.get(name) is None)


# --- the API's own refusals ------------------------------------------------------------------------------------------------


def test_an_edited_spec_is_refused_by_the_api_server(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("edit")
    stack.wait(name)
    with pytest.raises(LabError, match="immutable"):
        stack.snapshot(name, quiesce={"policy": "Never"})


# --- crashes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.25, 0.5])
def test_the_operator_is_killed_and_started_again(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], delay: float
) -> None:
    name = vmsnapshot("killed")
    _window_begins(lab)
    time.sleep(delay)
    stack.programs["operator"].kill()
    try:
        guest = lab.guest("demo")
        until("the guardian thawed the guest", lambda: guest.freeze_status() == "thawed", 20)
    finally:
        stack.start_operator()
    body = stack.wait(name)
    assert body["status"]["consistency"] == "Filesystem"


def test_the_operator_is_stopped_while_the_guest_is_frozen(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    """SIGSTOP in mid-window: the guardian thaws after the budget; the cut is then not claimed as more than it is."""
    guest = lab.guest("demo")
    name = vmsnapshot("stopped", quiesce={"maxFrozenSeconds": 3})
    operator = stack.programs["operator"]
    _window_begins(lab)
    operator.kill(signal.SIGSTOP)
    try:
        until("the guardian thawed the guest", lambda: guest.freeze_status() == "thawed", 20)
    finally:
        operator.kill(signal.SIGCONT)
    body = stack.wait(name)
    content = stack.content(name)
    assert content is not None
    assert body["status"]["consistency"] in ("PerVolume", "Filesystem")
    if body["status"]["consistency"] == "PerVolume":
        assert body["status"]["quiesce"]["attempts"] == 1


def test_the_same_manifest_by_kubectl_twice(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("manifest")
    stack.wait(name)
    body = stack.get(name)
    assert body is not None
    manifest = {k: body[k] for k in ("apiVersion", "kind", "spec")} | {
        "metadata": {"name": name, "namespace": "team-a"}
    }
    done = subprocess.run(
        [
            str(lab.bin("kubectl")),
            "--kubeconfig",
            str(lab.kubeconfig),
            "diff",
            "--server-side",
            "--force-conflicts",
            "-f",
            "-",
        ],
        input=json.dumps(manifest),
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
