"""Bad input and bad luck, row by row: a clear refusal before anything happens, or a free VM and the truth afterwards."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests import proof
from tests.integration.outcomes import class_conditions, failed, left, proved, refused, stopped, window_begins, workers
from tests.lab import Lab, LabError
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, Stack, conditions, until

FREEZE_SECONDS = 2
"""Of which an agent may take half for its freeze."""


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


# --- who and where ----------------------------------------------------------------------------------------------------


def test_unknown_hypervisor(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("nohost", source={"hypervisorName": "nowhere", "domain": "demo"})
    message = refused(stack, name, "HypervisorNotFound")
    assert "nowhere" in message
    until("an event says so", lambda: bool(stack.events(name, "HypervisorNotFound")))
    assert [(e["type"], e["note"]) for e in stack.events(name, "HypervisorNotFound")] == [("Warning", message)]


def test_a_domain_that_is_not_there_and_one_that_is_forbidden_look_the_same(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    other = fresh("other")
    stack.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    forbidden = stack.snapshot(fresh("forbidden"), "demo", namespace=other)
    body = stack.wait(forbidden, "Stalled", namespace=other)
    told = conditions(body)["Stalled"]
    missing = vmsnapshot("missing", source={"hypervisorName": "lab", "domain": "absent"})
    message = refused(stack, missing, "DomainNotFound")
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
    message = refused(stack, vmsnapshot("sorcery", quiesce={"method": "Sorcery"}), "QuiesceMethodUnknown")
    assert "Sorcery" in message
    assert "GuestAgent" in message


# --- classes ----------------------------------------------------------------------------------------------------------


def test_an_excluded_target_that_does_not_exist(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    message = refused(stack, vmsnapshot("excl", volumes={"exclude": ["vdq"]}), "ExcludedTargetNotFound")
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
    message = refused(stack, vmsnapshot("tie"), "ClassTie")
    for disk in ("vda", "vdb", "vdc"):
        assert disk in message
    assert "twin" in message


def test_a_driver_that_is_not_installed_is_passed_by_for_the_next_class(
    stack: Stack, vmsnapshot: Callable[..., str], extra_class: Callable[..., str]
) -> None:
    extra_class("absent-driver", "no-such-driver", [{"type": "file"}], 1000)
    assert class_conditions(stack, "absent-driver")["Ready"]["status"] == "False"
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
        message = refused(stack, vmsnapshot("noclass"), "NoClassForDisk")
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
        return class_conditions(stack, name).get("Ready", {}).get("status") == "True"

    lab.kubectl("-n", NAMESPACE, "patch", "secret", "ceph-rbd", "--type=merge", "-p", json.dumps(secret))
    try:
        lab.kubectl("annotate", "storagedriverclasses.vmsnapshot.io", name, "test/poke=1", "--overwrite")
        until("the class is not Ready", lambda: not is_ready())
        message = refused(stack, vmsnapshot("unready"), "ClassNotReady")
        assert name in message
        assert secret["data"]["key"] not in message
    finally:
        lab.kubectl(
            "-n", NAMESPACE, "patch", "secret", "ceph-rbd", "--type=merge", "-p", json.dumps({"data": {"key": good}})
        )
        lab.kubectl("annotate", "storagedriverclasses.vmsnapshot.io", name, "test/poke=2", "--overwrite")
        until("the class is Ready again", is_ready)


# --- the guest and its agent --------------------------------------------------------------------------------------------


AGENTS: dict[str, Callable[[Guest, bool], None]] = {
    "AgentAbsent": lambda guest, spoilt: guest.end_agent(end=spoilt),
    "AgentSilent": lambda guest, spoilt: guest.hang_agent(hang=spoilt),
    "AgentTooOld": lambda guest, spoilt: guest.age_agent(old=spoilt),
}


@pytest.mark.parametrize("reason", AGENTS)
def test_without_a_usable_agent_by_policy(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], reason: str) -> None:
    guest = lab.guest("demo")
    AGENTS[reason](guest, True)
    try:
        require = vmsnapshot("mute", quiesce={"policy": "Require"})
        prefer = stack.wait(vmsnapshot("mute"))
        never = stack.wait(vmsnapshot("mute", quiesce={"policy": "Never"}))
        assert "agent" in refused(stack, require, reason)
    finally:
        AGENTS[reason](guest, False)
    assert (prefer["status"]["consistency"], prefer["status"]["quiesce"]["method"]) == ("Crash", "Pause")
    assert "agent" in prefer["status"]["quiesce"]["reason"]
    assert conditions(prefer)["Quiesced"]["reason"] == "Paused"
    assert never["status"]["consistency"] == "PerVolume"
    assert conditions(never)["Quiesced"]["reason"] == "NotRequested"


def test_frozen_by_somebody_else_is_left_alone_and_waited_for(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    guest = lab.guest("demo")
    guest.agent("guest-fsfreeze-freeze")
    try:
        names = [vmsnapshot("frozen", quiesce={"policy": p}) for p in ("Require", "Prefer")]
        for name in names:
            found = conditions(stack.wait(name, "Planned", "False"))
            assert (found["Planned"]["reason"], found["Stalled"]["status"]) == ("AlreadyFrozen", "False")
        assert guest.freeze_status() == "frozen"
    finally:
        guest.agent("guest-fsfreeze-thaw")
    assert [stack.wait(n)["status"]["consistency"] for n in names] == ["Filesystem"] * 2


def test_a_vm_that_migrates_is_waited_for(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    guest, second = lab.guest("demo"), lab.second_host()

    def migrate() -> None:
        with suppress(LabError):  # it is ended below
            guest.migrate(second, mib_per_second=1)

    moving = threading.Thread(target=migrate)
    moving.start()
    try:
        until("it migrates", lambda: guest.domain().jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
        name = vmsnapshot("moving", quiesce={"policy": "Require"})
        found = conditions(stack.wait(name, "Planned", "False"))
        assert (found["Planned"]["reason"], found["Stalled"]["status"]) == ("VMMigrating", "False")
    finally:
        guest.domain().abortJob()
        moving.join()
        lab.end_second_host()
    assert stack.wait(name)["status"]["consistency"] == "Filesystem"


def test_a_freeze_that_fails_is_thawed_and_then_by_policy(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    guest = lab.guest("demo")
    guest.control(["touch", "/run/hook-fail"])
    try:
        require = vmsnapshot("hook", quiesce={"policy": "Require"})
        failed(stack, require, "FreezeFailed")
        body = stack.get(require) or {}
        quiesced = conditions(body)["Quiesced"]
        assert (quiesced["status"], quiesced["reason"]) == ("False", "FreezeFailed")
        assert body["status"]["quiesce"]["frozenTime"] <= body["status"]["quiesce"]["thawedTime"]
        name = vmsnapshot("hook")
        prefer = stack.wait(name)["status"]
        assert prefer["consistency"] == "Crash"
        assert prefer["quiesce"]["method"] == "Pause"
        assert "frozen" in prefer["quiesce"]["reason"]
        warnings = [e["note"] for e in stack.events(name, "FreezeFailed") if e["type"] == "Warning"]
        assert len(warnings) == 1
        assert "goes on with Pause" in warnings[0]
    finally:
        guest.control(["rm", "-f", "/run/hook-fail"])


def test_a_freeze_that_is_answered_too_late_is_thawed_and_then_by_policy(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    guest = lab.guest("demo")
    guest.hang_agent_at_freeze()
    try:
        name = vmsnapshot("late", quiesce={"maxFrozenSeconds": FREEZE_SECONDS})
        window_begins(lab)
        time.sleep(FREEZE_SECONDS)
    finally:
        guest.hang_agent_at_freeze(hang=False)
    status = stack.wait(name)["status"]
    assert (status["consistency"], status["quiesce"]["method"]) == ("Crash", "Pause")
    assert "could not be frozen" in status["quiesce"]["reason"]


def test_nothing_is_final_while_an_agent_hangs_in_its_freeze(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    guest = lab.guest("demo")
    guest.hang_agent_at_freeze()
    try:
        name = vmsnapshot("hung", quiesce={"policy": "Require", "maxFrozenSeconds": FREEZE_SECONDS})
        until(
            "nobody can say that the guest is free",
            lambda: conditions(stack.get(name) or {}).get("Unquiesced", {}).get("reason") == "Recovering",
        )
        assert conditions(stack.get(name) or {})["Stalled"]["status"] == "False"
    finally:
        guest.hang_agent_at_freeze(hang=False)
    assert "frozen" in failed(stack, name, "FreezeFailed")


@pytest.mark.parametrize("policy", ["Prefer", "Require"])
def test_fewer_file_systems_thawed_than_frozen_claims_no_stillness(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], policy: str
) -> None:
    guest = lab.guest("demo")
    name = vmsnapshot("early", quiesce={"policy": policy})
    window_begins(lab)
    with stopped(workers("ceph-vms")):
        until("somebody in the guest thawed one file system", lambda: _thawed_inside(guest))
    if policy == "Require":
        assert "our thaw found 2" in failed(stack, name, "PolicyNotMet")
        return
    status = stack.wait(name)["status"]
    assert (status["quiesce"]["filesystemsFrozen"], status["quiesce"]["filesystemsThawed"]) == (3, 2)
    assert {v["consistency"] for v in status["volumes"]} == {"PerVolume"}


def _thawed_inside(guest: Guest) -> bool:
    try:
        guest.control(["fsfreeze", "--unfreeze", "/mnt/vda"])
    except LabError:  # one that is not frozen refuses
        return False
    return True


def test_paused_by_somebody_stays_paused(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    domain = lab.guest("demo").domain()
    domain.suspend()
    try:
        assert "paused" in refused(stack, vmsnapshot("paused", quiesce={"policy": "Require"}), "VMPaused")
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
        message = refused(stack, vmsnapshot("off", quiesce={"policy": "Require"}), "VMNotCleanlyShutDown")
        assert "not heard" in message
        assert stack.wait(vmsnapshot("off"))["status"]["consistency"] == "Crash"
    finally:
        lab.guest("demo")


def test_destroyed_is_crash_consistent(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    lab.guest("demo").destroy()
    try:
        assert "shut" in refused(stack, vmsnapshot("off", quiesce={"policy": "Require"}), "VMNotCleanlyShutDown")
        assert stack.wait(vmsnapshot("off"))["status"]["consistency"] == "Crash"
    finally:
        lab.guest("demo")


# --- storage -----------------------------------------------------------------------------------------------------------


def test_a_cut_that_hangs_frees_the_guest_first(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    """The driver of one of two storage systems stops in the window; nothing of the other one's cut is left."""
    name = vmsnapshot("hang", quiesce={"maxFrozenSeconds": 3})
    window_begins(lab)
    frozen = 'vmsnapshot_frozen_vms{hypervisor="lab"}'
    with stopped(workers("ceph-vms")):
        until("the metric says that it is frozen now", lambda: f"{frozen} 1.0" in stack.http("/metrics")[1], 3)
        message = failed(stack, name, "FrozenTooLong")
        assert "ceph-vms" in message
        assert "vdc" in message
        assert f"{frozen} 0.0" in stack.http("/metrics")[1]


def test_a_driver_that_crashes_in_the_window(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("crash")
    window_begins(lab)
    for pid in workers("ceph-vms"):
        os.kill(pid, signal.SIGKILL)
    message = failed(stack, name, "DriverCrashed")
    assert "ceph-vms" in message
    assert "vdc" in message


def test_storage_down_at_delete_waits_and_says_so(stack: Stack, lab: Lab, fresh: Callable[[str], str]) -> None:
    name = stack.snapshot(fresh("down"))
    body = stack.wait(name)
    osd = lab.component("ceph-osd")
    osd.kill(signal.SIGSTOP)

    def told() -> dict[str, Any]:
        return conditions(stack.get(name) or {}).get("Reconciling", {})

    try:
        stack.delete(name, wait=False)
        until("the trouble is told", lambda: told().get("reason") == "StorageUnavailable")
        assert "ceph-vms" in told()["message"]
        assert stack.content(name) is not None, "nothing is forgotten"
    finally:
        osd.kill(signal.SIGCONT)
    until("it is gone", lambda: stack.get(name) is None)
    assert not left(stack, body)


# --- the API's own refusals ------------------------------------------------------------------------------------------------


def test_an_edited_spec_is_refused_by_the_api_server(stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("edit")
    stack.wait(name)
    with pytest.raises(LabError, match="immutable"):
        stack.snapshot(name, quiesce={"policy": "Never"})


# --- crashes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4])
def test_the_operator_is_killed_and_started_again(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], delay: float, tmp_path: Path
) -> None:
    name = vmsnapshot("killed")
    window_begins(lab)
    time.sleep(delay)
    stack.programs["operator"].kill()
    try:
        guest = lab.guest("demo")
        until("the guardian thawed the guest", lambda: guest.freeze_status() == "thawed", 20)
    finally:
        stack.start_operator()
    body = stack.wait(name)
    assert body["status"]["consistency"] == "Filesystem"
    proved(stack, name, tmp_path)


def test_the_operator_is_stopped_while_the_guest_is_frozen(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    """SIGSTOP in mid-window: the guardian thaws after the budget; the cut is then not claimed as more than it is."""
    guest = lab.guest("demo")
    name = vmsnapshot("stopped", quiesce={"maxFrozenSeconds": 3})
    operator = stack.programs["operator"]
    window_begins(lab)
    operator.kill(signal.SIGSTOP)
    try:
        until("the guardian thawed the guest", lambda: guest.freeze_status() == "thawed", 20)
    finally:
        operator.kill(signal.SIGCONT)
    status = stack.wait(name)["status"]
    assert status["consistency"] in ("PerVolume", "Filesystem")
    if status["consistency"] == "Filesystem":
        proved(stack, name, tmp_path)
    else:
        assert status["quiesce"]["attempts"] == 1


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
