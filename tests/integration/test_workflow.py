"""A snapshot from apply to gone, on real parts: what is claimed is held against what the disks hold."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import audit, proof
from tests.integration.outcomes import left
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until


def test_one_instant_over_two_storage_systems(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("whole", quiesce={"policy": "Require"})
    status = stack.wait(name)["status"]
    assert status["consistency"] == "Filesystem"
    assert {v["target"]: v["consistency"] for v in status["volumes"]} == dict.fromkeys(
        ("vda", "vdb", "vdc"), "Filesystem"
    )
    assert status["quiesce"]["filesystemsFrozen"] == status["quiesce"]["filesystemsThawed"] == 3
    assert 0 < status["quiesce"]["frozenMilliseconds"] < 30_000
    assert {g["driver"] for g in status["groups"]} == {"libvirt-volume", "ceph-rbd"}
    content = stack.content(name)
    assert content is not None
    held = proof.read(lab, content, tmp_path)
    assert held.one_instant, held.records
    assert held.clean, held.fsck


def test_never_claims_no_more_than_each_volume(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("never", quiesce={"policy": "Never"})
    body = stack.wait(name)
    assert body["status"]["consistency"] == "PerVolume"
    assert conditions(body)["Quiesced"]["reason"] == "NotRequested"
    assert "frozenMilliseconds" not in body["status"]["quiesce"]


def test_never_over_one_atomic_group_is_crash_consistent(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]
) -> None:
    name = vmsnapshot("atomic", quiesce={"policy": "Never"}, volumes={"exclude": ["vda", "vdb"]})
    status = stack.wait(name)["status"]
    assert status["consistency"] == "Crash"
    assert {e["name"]: e["rule"] for e in status["excluded"]} == {"vda": "ByRequest", "vdb": "ByRequest"}


def test_pause_is_crash_consistent_at_one_instant(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = vmsnapshot("pause", quiesce={"method": "Pause"})
    body = stack.wait(name)
    assert body["status"]["consistency"] == "Crash"
    assert conditions(body)["Unquiesced"]["reason"] == "Resumed"
    content = stack.content(name)
    assert content is not None
    assert proof.read(lab, content, tmp_path).in_order
    assert lab.guest("demo").agent("guest-ping") == {}


def test_dry_run_plans_and_touches_nothing(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("dry", dryRun=True)
    body = stack.wait(name, "Planned")
    found = conditions(body)
    assert "Ready" not in found
    assert found["Reconciling"]["status"] == "False"
    assert body["status"]["phase"] == "Planned"
    assert not body["metadata"].get("finalizers")
    assert stack.content(name) is None
    assert len(body["status"]["volumes"]) == 3


def test_nothing_is_left_after_deleting(lab: Lab, stack: Stack, fresh: Callable[[str], str]) -> None:
    names = [stack.snapshot(fresh("gone")) for _ in range(2)]
    bodies = [stack.wait(name) for name in names]
    for name in names:
        stack.delete(name)
    assert not [x for body in bodies for x in left(stack, body)]
    assert not [x for x in proof.leftovers(lab) if not x.startswith("object")]


def test_deleting_at_any_moment_leaves_a_free_vm_and_no_trace(
    lab: Lab, stack: Stack, fresh: Callable[[str], str]
) -> None:
    bodies = []
    for delay in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8):
        name = stack.snapshot(fresh("early"))
        bodies.append(stack.get(name) or {})
        time.sleep(delay)
        stack.delete(name)
    assert lab.guest("demo").freeze_status() == "thawed"
    assert not [x for body in bodies for x in left(stack, body)]
    assert not [x for x in proof.leftovers(lab) if not x.startswith("object")]


def test_no_request_between_freeze_and_thaw(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    """But for the lease, which another task renews all the time: no window waits for that."""
    log = lab.audit_log
    assert log is not None, "the laboratory's own control plane writes an audit log"
    mark = log.stat().st_size
    status = stack.wait(vmsnapshot("quiet"))["status"]
    time.sleep(1)
    inside = [
        r
        for r in audit.requests(log, start=mark)
        if status["quiesce"]["frozenTime"]
        <= r.time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        <= status["quiesce"]["thawedTime"]
    ]
    assert not inside


def test_a_plain_snapshot_is_taken_with_few_writes(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    """At most 8 with the one renewal of the lease that a window may need; those that go on all the time are not counted."""
    log = lab.audit_log
    assert log is not None, "the laboratory's own control plane writes an audit log"
    mark = log.stat().st_size
    name = vmsnapshot("few")
    stack.wait(name)
    time.sleep(1)
    # What was asked of an earlier one may be written down late.
    asked = [
        r for r in audit.of_snapshots(log, start=mark) if not r.resource.startswith("vmsnapshots") or r.name == name
    ]
    writes = [f"{r.verb} {r.resource}" for r in asked if r.is_write]
    assert len(writes) <= 8 - 1, writes


def test_the_probes_say_what_lives(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    stack.wait(vmsnapshot("alive"))
    for path in ("/healthz", "/readyz"):
        status, text = stack.http(path)
        said = json.loads(text)
        assert (status, said["ok"], said["stale"], said["missing"]) == (200, True, [], [])
        assert {"queue", "api server", "hypervisor lab", "watch vmsnapshots"} <= said["ageSeconds"].keys()


def test_a_second_apply_is_no_diff(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("twice")
    before = stack.wait(name)
    stack.snapshot(name)
    after = stack.get(name)
    assert after is not None
    assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]


def test_two_snapshots_of_one_vm_come_one_after_the_other(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]
) -> None:
    names = [vmsnapshot("pair") for _ in range(2)]
    times = sorted(
        (stack.wait(n)["status"]["quiesce"]["frozenTime"], stack.wait(n)["status"]["quiesce"]["thawedTime"])
        for n in names
    )
    assert times[0][1] <= times[1][0]


def test_a_status_edited_by_hand_is_healed(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("healed")
    stack.wait(name)
    lie = {"status": {"consistency": "Application", "phase": "Nonsense"}}
    lab.kubectl(
        "-n",
        "team-a",
        "patch",
        "vmsnapshots.vmsnapshot.io",
        name,
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps(lie),
    )
    until("the status tells the truth again", lambda: (stack.get(name) or {})["status"]["consistency"] == "Filesystem")


def test_a_finalizer_removed_by_hand_is_put_back(lab: Lab, stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("bare")
    stack.wait(name)
    lab.kubectl(
        "-n",
        "team-a",
        "patch",
        "vmsnapshots.vmsnapshot.io",
        name,
        "--type=merge",
        "-p",
        '{"metadata":{"finalizers":[]}}',
    )
    until("the finalizer is back", lambda: bool((stack.get(name) or {})["metadata"].get("finalizers")))


def test_a_forged_name_of_a_content_leads_nowhere(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    """Who writes another one's content into his status gets no snapshot, and his deletion takes nothing from anybody."""
    victim = vmsnapshot("victim")
    stack.wait(victim)
    theirs = stack.content(victim)
    assert theirs is not None
    operator = stack.programs["operator"]
    operator.kill(signal.SIGSTOP)  # else it has a content of its own before the name of another one is written
    try:
        forger = vmsnapshot("forger")
        patch = {"status": {"contentName": theirs["metadata"]["name"]}}
        lab.kubectl(
            *("-n", "team-a", "patch", "vmsnapshots.vmsnapshot.io", forger),
            *("--subresource=status", "--type=merge", "-p", json.dumps(patch)),
        )
    finally:
        operator.kill(signal.SIGCONT)
    body = stack.wait(forger, "Stalled")
    told = conditions(body)
    assert (told["Stalled"]["reason"], told["Ready"]["status"]) == ("ContentLost", "False")
    events = lab.kubectl("-n", "team-a", "get", "events.events.k8s.io", "-o", "json")
    about = [e for e in json.loads(events)["items"] if e["regarding"]["uid"] == body["metadata"]["uid"]]
    assert [(e["type"], e["reason"]) for e in about] == [("Warning", "ContentLost")]
    stack.delete(forger)
    held = proof.read(lab, stack.content(victim) or {}, tmp_path)
    assert held.one_instant, held.records


def test_a_forged_content_is_refused_and_no_foreign_handle_is_used(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    victim, forger = vmsnapshot("victim"), vmsnapshot("forger")
    stack.wait(victim)
    stack.wait(forger)
    theirs, ours = stack.content(victim), stack.content(forger)
    assert theirs is not None
    assert ours is not None
    ours["spec"]["groups"] = theirs["spec"]["groups"]
    ours["spec"]["volumes"] = theirs["spec"]["volumes"]
    ours["metadata"].pop("managedFields", None)
    lab.kubectl("replace", "-f", "-", stdin=json.dumps(ours))
    body = stack.wait(forger, "Stalled")
    assert conditions(body)["Stalled"]["reason"] == "ContentNotBound"
    stack.delete(forger)
    again = stack.get(victim)
    assert again is not None
    assert conditions(again)["Ready"]["status"] == "True"
    assert proof.read(lab, theirs, tmp_path).one_instant, "what it names is there as a whole"


@pytest.mark.parametrize("policy", ["Prefer", "Require"])
def test_time_to_live(lab: Lab, stack: Stack, fresh: Callable[[str], str], policy: str) -> None:
    name = stack.snapshot(fresh("ttl"), quiesce={"policy": policy}, ttlSeconds=60)
    stack.wait(name)
    lab.kubectl(
        "-n", "team-a", "patch", "vmsnapshots.vmsnapshot.io", name, "--type=merge", "-p", '{"spec":{"ttlSeconds":1}}'
    )
    until("it is gone by itself", lambda: stack.get(name) is None)


def test_retain_keeps_content_and_cut(lab: Lab, stack: Stack, fresh: Callable[[str], str], tmp_path: Path) -> None:
    name = stack.snapshot(fresh("kept"), deletionPolicy="Retain")
    stack.wait(name)
    content = stack.content(name)
    assert content is not None
    stack.delete(name)
    try:
        assert proof.read(lab, content, tmp_path).one_instant
    finally:
        lab.kubectl("delete", "vmsnapshotcontents.vmsnapshot.io", content["metadata"]["name"])
        stack.remove_by_hand(content["spec"]["vmSnapshotRef"]["uid"])
    assert not proof.held_of(lab, stack.installation(), content["spec"]["vmSnapshotRef"]["uid"])


@pytest.fixture(scope="module")
def fleet(lab: Lab) -> Iterator[dict[str, str]]:
    """Sixteen domains, and what a snapshot of each must be: the guest `demo`, two small ones, the others paused and without a kernel."""
    disks = {"vda": GuestDisk(kind="file", size_mib=16)}
    with ThreadPoolExecutor(8) as threads:
        small = [threads.submit(lab.guest, f"demo-{n}", disks, memory_mib=96, writer=False) for n in range(1, 3)]
        stubs = [threads.submit(lab.domain_stub, f"demo-{n}") for n in range(3, 16)]
        made = [(f.result(), "Filesystem") for f in small] + [(f.result(), "Crash") for f in stubs]
        yield {"demo": "Filesystem"} | {guest.name: claimed for guest, claimed in made}
        list(threads.map(Guest.remove, [guest for guest, _ in made]))


def test_twenty_snapshots_over_sixteen_vms_at_once(
    lab: Lab, stack: Stack, fleet: dict[str, str], fresh: Callable[[str], str]
) -> None:
    domains = list(fleet)
    wanted = {fresh("burst"): domains[n % len(domains)] for n in range(20)}
    with ThreadPoolExecutor(len(wanted)) as threads:
        list(threads.map(stack.snapshot, wanted, wanted.values()))
    bodies = {name: stack.wait(name) for name in wanted}
    assert {n: b["status"]["consistency"] for n, b in bodies.items()} == {n: fleet[d] for n, d in wanted.items()}
    for name in wanted:
        stack.delete(name, wait=False)
    until("all are gone", lambda: not any(stack.get(n) for n in wanted))
    assert not [x for body in bodies.values() for x in left(stack, body)]
    assert not [x for x in proof.leftovers(lab) if not x.startswith("object")]
