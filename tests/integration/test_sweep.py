"""What was left behind, or looks so: each kind is recognised, nothing foreign is touched, and the reason is said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import libvirt
import pytest
import pytest_asyncio
import yaml
from click.testing import CliRunner

from tests import proof
from tests.integration.sweep_support import NOBODY, a_journal, events, get, mark, marked
from tests.lab import Lab, LabError
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, SERVICE_ACCOUNT, TENANT, Stack, conditions, until
from vmsnapshot_operator import cli
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core import names, qcow2
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.handlers.sweep import sweep
from vmsnapshot_operator.hypervisors.domains import Hypervisor

CONTENTS, SNAPSHOTS = "vmsnapshotcontents.vmsnapshot.io", "vmsnapshots.vmsnapshot.io"


# --- the laboratory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(lab: Lab, stack: Stack) -> Iterator[Guest]:
    """The guest, which is neither frozen nor marked afterwards."""
    found = lab.guest("demo")
    yield found
    mark(found, None)
    found.agent("guest-fsfreeze-thaw")
    until("the guest is thawed", lambda: found.freeze_status() == "thawed")


@pytest_asyncio.fixture(loop_scope="function")
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    """Our own connections to libvirt."""
    client = await Hypervisor.connect("lab", [Endpoint(socket_path=str(lab.libvirt_socket))], {})
    yield client
    await client.close()


def ready(stack: Stack, resource: str, name: str) -> dict[str, Any]:
    """The condition Ready of an object of the cluster."""
    return conditions(get(stack, resource, name) or {}).get("Ready", {})


def restart(stack: Stack) -> None:
    """End the operator and start it again: it scans at once."""
    stack.programs.pop("operator").stop()
    stack.start_operator()


def orphans(stack: Stack, class_name: str) -> list[str] | None:
    """The orphans of a class as its status says; None before the first scan of it."""
    status = (get(stack, "storagedriverclasses.vmsnapshot.io", class_name) or {}).get("status") or {}
    return list(status.get("orphans") or ()) if "orphansFound" in status else None


def taken(stack: Stack, name: str, **spec: Any) -> tuple[str, dict[str, Any]]:
    """Take a snapshot of two disks without touching the guest; return its uid and its content."""
    stack.snapshot(name, quiesce={"policy": "Never"}, volumes={"exclude": ["vdb"]}, **spec)
    stack.wait(name)
    content = stack.content(name)
    assert content is not None
    return content["spec"]["vmSnapshotRef"]["uid"], content


def on_storage(stack: Stack, uid: str) -> list[str]:
    """What the storage systems hold under the names of one VMSnapshot, read past the drivers."""
    prefix = names.object_prefix(stack.installation(), uid)
    return [x for x in proof.leftovers(stack.lab) if prefix in x]


def forced(stack: Stack, name: str) -> None:
    """Remove a VMSnapshot as an impatient administrator does: its finalizer first."""
    patch = json.dumps({"metadata": {"finalizers": []}})
    stack.lab.kubectl("-n", TENANT, "delete", SNAPSHOTS, name, "--wait=false")
    with contextlib.suppress(LabError):  # the operator may be faster, where it runs
        stack.lab.kubectl("-n", TENANT, "patch", SNAPSHOTS, name, "--type=merge", "-p", patch)
    until(f"{name} is gone", lambda: stack.get(name) is None)


@contextmanager
def without_operator(stack: Stack) -> Iterator[None]:
    """While the operator is not there; it is started again."""
    stack.programs.pop("operator").stop()
    try:
        yield
    finally:
        stack.start_operator()


# --- a content without its VMSnapshot, and the other way round ------------------------------------------------------------


def test_a_forced_deletion_is_cleaned_up(stack: Stack, fresh: Callable[[str], str]) -> None:
    name = fresh("forced")
    with_operator_down: dict[str, Any] = {}
    uid, content = taken(stack, name)
    with without_operator(stack):
        forced(stack, name)
        with_operator_down = get(stack, CONTENTS, content["metadata"]["name"]) or {}
    assert with_operator_down, "its content is still there"
    assert on_storage(stack, uid)
    until("its content is removed", lambda: get(stack, CONTENTS, content["metadata"]["name"]) is None)
    assert not on_storage(stack, uid)
    assert any(uid in note for note in events(stack, "ContentRemoved"))


def test_retained_outlives_its_vmsnapshot_even_if_that_was_said_late(stack: Stack, fresh: Callable[[str], str]) -> None:
    name = fresh("kept")
    uid, content = taken(stack, name)
    patch = json.dumps({"spec": {"deletionPolicy": "Retain"}})
    stack.lab.kubectl("-n", TENANT, "patch", SNAPSHOTS, name, "--type=merge", "-p", patch)
    kept = content["metadata"]["name"]
    until("the content says so", lambda: (get(stack, CONTENTS, kept) or {})["spec"]["deletionPolicy"] == "Retain")
    forced(stack, name)
    until("it is told", lambda: ready(stack, CONTENTS, kept).get("reason") == "Retained")
    assert len(on_storage(stack, uid)) >= 2
    # Whoever wants it gone says so in the content.
    released = json.dumps({"spec": {"deletionPolicy": "Delete"}})
    stack.lab.kubectl("patch", CONTENTS, kept, "--type=merge", "-p", released)
    until("it is removed", lambda: get(stack, CONTENTS, kept) is None)
    assert not on_storage(stack, uid)


def test_a_forged_content_is_told_and_nothing_it_names_is_touched(stack: Stack, fresh: Callable[[str], str]) -> None:
    victim, name = fresh("victim"), fresh("forger")
    victims_uid, victims = taken(stack, victim)
    uid, content = taken(stack, name)
    forger = content["metadata"]["name"]
    stolen = {g["className"]: g["requestName"] for g in victims["spec"]["groups"]}
    true_groups = content["spec"]["groups"]
    groups = [{**g, "requestName": stolen[g["className"]]} for g in true_groups]
    with without_operator(stack):
        stack.lab.kubectl("patch", CONTENTS, forger, "--type=merge", "-p", json.dumps({"spec": {"groups": groups}}))
        forced(stack, name)
    until("it is told", lambda: ready(stack, CONTENTS, forger).get("reason") == "ContentNotBound")
    assert on_storage(stack, victims_uid)
    assert on_storage(stack, uid)
    stack.lab.kubectl("patch", CONTENTS, forger, "--type=merge", "-p", json.dumps({"spec": {"groups": true_groups}}))
    until("what is whole again is cleaned up", lambda: get(stack, CONTENTS, forger) is None)
    assert not on_storage(stack, uid)
    assert on_storage(stack, victims_uid)
    stack.delete(victim)


def test_a_content_out_of_a_backup_is_told_and_not_touched(stack: Stack, fresh: Callable[[str], str]) -> None:
    name = fresh("restored")
    uid, content = taken(stack, name)
    saved = {
        **{k: content[k] for k in ("apiVersion", "kind", "spec")},
        "metadata": {k: content["metadata"][k] for k in ("name", "labels")},
    }
    with without_operator(stack):
        forced(stack, name)
        stack.lab.kubectl("delete", CONTENTS, content["metadata"]["name"])
        stack.apply(saved)
        again = stack.snapshot(name, dryRun=True)  # the VMSnapshot came back as well, with another UID
    kept = content["metadata"]["name"]
    until("it is told", lambda: ready(stack, CONTENTS, kept).get("reason") == "RestoredFromBackup")
    assert (stack.get(again) or {})["metadata"]["uid"] in ready(stack, CONTENTS, kept)["message"]
    assert on_storage(stack, uid)
    stack.delete(again)
    # By hand, as the reason's page says: then its cuts are orphans.
    stack.lab.kubectl("delete", CONTENTS, kept)
    restart(stack)
    until(
        "orphans are told",
        lambda: any(names.object_prefix(stack.installation(), uid) in o for o in orphans(stack, "reflink-files") or ()),
    )
    assert on_storage(stack, uid), "a name alone proves nothing"
    stack.remove_by_hand(uid)


def test_a_vmsnapshot_that_lost_its_content_says_so_and_cleans_up(stack: Stack, fresh: Callable[[str], str]) -> None:
    name = fresh("lost")
    uid, content = taken(stack, name)
    held = on_storage(stack, uid)
    stack.lab.kubectl("delete", CONTENTS, content["metadata"]["name"])
    body = stack.wait(name, "Stalled")
    assert conditions(body)["Ready"]["reason"] == "ContentLost"
    assert content["metadata"]["name"] in conditions(body)["Ready"]["message"]
    assert "consistency" not in body["status"]
    assert on_storage(stack, uid) == held, "nothing was taken again, and nothing removed"
    stack.delete(name)
    assert not on_storage(stack, uid)


def test_an_object_restored_under_its_name_is_another_one(stack: Stack, fresh: Callable[[str], str]) -> None:
    """As a backup of the cluster's objects brings a VMSnapshot back: spec and status as they were, with another UID."""
    name = fresh("again")
    uid, content = taken(stack, name)
    saved = stack.get(name)
    assert saved is not None
    with without_operator(stack):
        forced(stack, name)
        stack.snapshot(name, **saved["spec"])
        body = stack.get(name) or {}
        new_uid = body["metadata"]["uid"]
        body["status"] = saved["status"]
        stack.lab.kubectl("-n", TENANT, "replace", "--subresource=status", "-f", "-", stdin=json.dumps(body))
        assert conditions(stack.get(name) or {})["Ready"]["status"] == "True", "so the backup says"
        assert new_uid != uid
    until("the old one's content is removed", lambda: get(stack, CONTENTS, content["metadata"]["name"]) is None)
    assert not on_storage(stack, uid), "what the old one held went with it"
    until("it is said", lambda: any(uid in note for note in events(stack, "ContentRemoved")))
    # To take it now would put another moment under a name that promises an older one.
    body = stack.wait(name, "Stalled")
    told = conditions(body)["Ready"]
    assert (told["status"], told["reason"]) == ("False", "ContentLost")
    assert "consistency" not in body["status"], "nothing of what the backup said is claimed"
    assert not on_storage(stack, new_uid)
    stack.delete(name)


# --- names on storage that nobody knows -----------------------------------------------------------------------------------


def test_names_that_somebody_else_made_are_reported_and_left(stack: Stack) -> None:
    import rbd

    ours = stack.installation()
    lonely = names.request_name(ours, NOBODY, 1, "reflink-files", [VolumeId("v")])
    file = stack.lab.pool_path("reflink") / f"{lonely}-{names.member(VolumeId('v'))}"
    strange = f"{names.installation_prefix(ours)}my-own"
    theirs = names.request_name("zzzzzz", NOBODY, 1, "ceph-vms", [VolumeId("v")])
    with stack.lab.ceph.connect() as (_, io):
        for group in (strange, theirs):
            rbd.RBD().group_create(io, group)
    file.write_bytes(b"somebody's")
    try:
        restart(stack)
        until("the file is told", lambda: orphans(stack, "reflink-files") == [lonely])
        until("the group is told", lambda: orphans(stack, "ceph-vms") == [strange])
        assert file.read_bytes() == b"somebody's"
        assert any(lonely in note and "no VMSnapshot" in note for note in events(stack, "OrphansFound"))
        assert any(strange in note and "somebody else made it" in note for note in events(stack, "OrphansFound"))
        assert 'vmsnapshot_orphans{class_name="reflink-files"} 1.0' in stack.http("/metrics")[1]
        with stack.lab.ceph.connect() as (_, io):
            assert {strange, theirs} <= set(rbd.RBD().group_list(io))
    finally:
        file.unlink()
        with stack.lab.ceph.connect() as (_, io):
            for group in (strange, theirs):
                rbd.RBD().group_remove(io, group)
    restart(stack)
    until("they are forgotten", lambda: not orphans(stack, "reflink-files") and not orphans(stack, "ceph-vms"))


def test_what_an_older_attempt_left_is_removed(stack: Stack, fresh: Callable[[str], str]) -> None:
    name = fresh("older")
    uid, content = taken(stack, name)
    # The content says attempt 2: what is of attempt 1 is then left over, and the content proves whose it is.
    kept = content["metadata"]["name"]
    spec = content["spec"]
    members = {
        g["className"]: [VolumeId(v["id"]) for v in spec["volumes"] if v["className"] == g["className"]]
        for g in spec["groups"]
    }
    later = [
        {**g, "requestName": names.request_name(stack.installation(), uid, 2, g["className"], members[g["className"]])}
        for g in spec["groups"]
    ]
    held = on_storage(stack, uid)
    assert held
    with without_operator(stack):
        change = {"spec": {"attempt": 2, "groups": later}}
        stack.lab.kubectl("patch", CONTENTS, kept, "--type=merge", "-p", json.dumps(change))
    until("it is removed", lambda: not on_storage(stack, uid))
    assert any(names.object_prefix(stack.installation(), uid) in note for note in events(stack, "OrphanRemoved"))
    stack.delete(name)


def test_status_of_class_and_content_tell_what_is(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("told", quiesce={"policy": "Never"})
    stack.wait(name)
    content = stack.content(name)
    assert content is not None
    kept = content["metadata"]["name"]

    def told() -> dict[str, Any]:
        return (get(stack, CONTENTS, kept) or {}).get("status") or {}

    until("the content's status is written", lambda: told().get("ready") is True)
    assert told()["observedGeneration"] == content["metadata"]["generation"]
    found = (get(stack, "storagedriverclasses.vmsnapshot.io", "ceph-vms") or {})["status"]
    until(
        "the class's latency is written",
        lambda: "cutMilliseconds" in (get(stack, "storagedriverclasses.vmsnapshot.io", "ceph-vms") or {})["status"],
    )
    found = (get(stack, "storagedriverclasses.vmsnapshot.io", "ceph-vms") or {})["status"]
    assert 0 < found["cutMilliseconds"]["p50"] <= found["cutMilliseconds"]["p95"]
    assert found["cutMilliseconds"]["samples"] >= 1


def test_overlays_that_nobody_knows_are_told_or_removed(stack: Stack) -> None:
    ours, pool = stack.installation(), stack.lab.pool_path("reflink")
    volume = VolumeId("v")

    def overlay(installation: str, attempt: int) -> Path:
        return pool / names.overlay_name(installation, NOBODY, attempt, volume)

    new = qcow2.overlay(64 << 20, str(pool / "demo-vda.raw"), "raw")
    rubbish, written, alien = overlay(ours, 1), overlay(ours, 2), overlay(ours, 3)
    strange, theirs = pool / f"{names.overlays_prefix(ours)}mine", overlay("zzzzzz", 1)
    contents = {
        rubbish: new,
        written: new + bytes(qcow2.CLUSTER),
        alien: bytes(4 * qcow2.CLUSTER),
        strange: new,
        theirs: new,
    }
    try:
        for file, content in contents.items():
            file.write_bytes(content)
        restart(stack)
        until("rubbish is removed", lambda: not rubbish.exists())
        told = {str(f) for f in (written, alien, strange)}
        until("the others are told", lambda: {e["path"] for e in kept_overlays(stack)} == told)
        why = {Path(e["path"]): e["message"] for e in kept_overlays(stack)}
        assert "in this file alone" in why[written]
        assert "somebody else made it" in why[alien]
        assert "somebody else made it" in why[strange]
        for file in (written, alien, strange, theirs):
            assert file.read_bytes() == contents[file], "what is not proved to be ours and of no use stays as it is"
        assert any(str(rubbish) in note for note in events(stack, "OrphanRemoved"))
        assert any(str(written) in note for note in events(stack, "OverlayKept"))
        assert 'vmsnapshot_kept_overlays{hypervisor="lab"} 3.0' in stack.http("/metrics")[1]
    finally:
        for file in contents:
            file.unlink(missing_ok=True)
    restart(stack)
    until("they are forgotten", lambda: not kept_overlays(stack))


def kept_overlays(stack: Stack) -> list[dict[str, Any]]:
    """What the Hypervisor's status says of overlays that are kept."""
    status = (get(stack, "hypervisors.vmsnapshot.io", "lab") or {}).get("status") or {}
    return list(status.get("keptOverlays") or ())


# --- journals -------------------------------------------------------------------------------------------------------------


STRANGE = pytest.mark.parametrize(
    ("element", "said"),
    [
        ("<journal>this is none</journal>", "cannot be read"),
        (
            "<journal version='99' installation='abc123' owner='u' nonce='n' attempt='1' method='Sorcery' budget='1'/>",
            "version 99",
        ),
        (journals.to_xml(a_journal("zzzzzz")), "another installation (zzzzzz)"),
    ],
    ids=["corrupt", "newer", "foreign"],
)
"""Journals that nobody here may act on, and what is said of each."""


@STRANGE
def test_a_journal_that_is_not_ours_is_left_and_said(stack: Stack, guest: Guest, element: str, said: str) -> None:
    guest.agent("guest-fsfreeze-freeze")
    mark(guest, element)
    restart(stack)
    until("the hypervisor says so", lambda: said in ready(stack, "hypervisors.vmsnapshot.io", "lab").get("message", ""))
    assert any(said in note and "demo" in note for note in events(stack, "JournalLeft"))
    assert 'vmsnapshot_strange_journals{hypervisor="lab"} 1.0' in stack.http("/metrics")[1]
    assert marked(guest)
    assert guest.freeze_status() == "frozen", "whoever froze it may need it so"


@STRANGE
def test_no_snapshot_of_a_vm_with_a_strange_journal_begins(
    stack: Stack, guest: Guest, fresh: Callable[[str], str], element: str, said: str
) -> None:
    mark(guest, element)
    before = guest.domain().metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, 0)
    name = stack.snapshot(fresh("waits"), quiesce={"policy": "Require"})

    def told() -> dict[str, Any]:
        return conditions(stack.get(name) or {}).get("Ready", {})

    # Whose installation it is, the administrator is told; the tenant that it is another one.
    why = "another installation" if "another" in said else said
    until("it is told why", lambda: why in json.dumps((stack.get(name) or {}).get("status")))
    assert told()["status"] != "True"
    dry = stack.snapshot(fresh("dry"), dryRun=True)
    until("so is a dry run", lambda: why in json.dumps((stack.get(dry) or {}).get("status")))
    stack.delete(dry)
    assert stack.content(name) is None, "nothing was begun"
    assert guest.domain().metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, 0) == before
    assert guest.freeze_status() == "thawed"
    mark(guest, None)
    stack.wait(name)
    stack.delete(name)


def test_a_journal_of_ours_without_an_owner_frees_the_vm_first(stack: Stack, guest: Guest) -> None:
    # Without a guardian: this is the sweeper's own test.
    guardian = stack.programs.pop("guardian")
    guardian.stop()
    try:
        stack.programs.pop("operator").stop()
        guest.agent("guest-fsfreeze-freeze")
        mark(guest, journals.to_xml(a_journal(stack.installation())))
        # 5 s from its start are promised, and measured by `make bench`; a sweep that waits for its next turn takes half a minute.
        stack.start_operator(wait=False)
        until("the guest is thawed", lambda: guest.freeze_status() == "thawed", 15)
        until("the operator is ready", stack.ready)
        until("the journal is removed", lambda: not marked(guest))
        until("it is told", lambda: any(NOBODY in note for note in events(stack, "VMFreed")))
        assert 'vmsnapshot_swept_vms_total{hypervisor="lab"} 1.0' in stack.http("/metrics")[1]
    finally:
        stack.start_guardian()


def test_a_journal_proves_whose_a_handle_is(stack: Stack, guest: Guest) -> None:
    ours = stack.installation()
    lonely = names.request_name(ours, NOBODY, 1, "reflink-files", [VolumeId("v")])
    later = names.request_name(ours, NOBODY, 2, "reflink-files", [VolumeId("v")])
    files = [stack.lab.pool_path("reflink") / f"{n}-{names.member(VolumeId('v'))}" for n in (lonely, later)]
    with without_operator(stack):
        for file in files:
            file.write_bytes(b"left")
        mark(guest, journals.to_xml(a_journal(ours)))
    try:
        until("the journal is removed", lambda: not marked(guest))
        until("the class is scanned", lambda: orphans(stack, "reflink-files") in ([later], [lonely, later]))
        # The scan may have been faster than the sweep: then the next one removes it.
        if files[0].exists():
            assert orphans(stack, "reflink-files") == [lonely, later]
        assert files[1].exists(), "the journal was of an earlier attempt"
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    restart(stack)
    until("they are forgotten", lambda: orphans(stack, "reflink-files") == [])


# --- by hand --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(lab: Lab, stack: Stack, tmp_path: Path) -> Path:
    """A kubeconfig of an API server that is gone."""
    config = yaml.safe_load(lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT).read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def uri(lab: Lab) -> str:
    """The laboratory's libvirt, as an administrator names it."""
    return f"qemu+unix:///system?socket={lab.libvirt_socket}"


async def test_by_hand_with_the_api_server_gone(guest: Guest, hypervisor: Hypervisor, nowhere: Path, uri: str) -> None:
    ref = await hypervisor.find("demo")
    await hypervisor.write_journal(ref, a_journal("gone01"))
    guest.agent("guest-fsfreeze-freeze")

    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "", dry_run=True)
    said = "\n".join(lines)
    assert not ok
    assert "the API server cannot be asked" in said
    assert "agent says Frozen; held by installation gone01" in said
    assert "--installation gone01 would free it" in said

    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "gone01", dry_run=True)
    assert not ok
    assert any("demo: would be freed" in line for line in lines)
    assert guest.freeze_status() == "frozen"

    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "abc123", dry_run=False)
    assert ok, "another installation's business"
    assert any("held by another installation (gone01)" in line for line in lines)
    assert guest.freeze_status() == "frozen"

    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "gone01", dry_run=False)
    assert ok, lines
    assert any("demo: freed" in line for line in lines)
    assert guest.freeze_status() == "thawed"
    assert await hypervisor.read_journal(ref) is None
    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "gone01", dry_run=False)
    assert ok
    assert any("no domain bears a journal" in line for line in lines)


async def test_by_hand_a_journal_that_cannot_be_read_is_said(guest: Guest, nowhere: Path, uri: str) -> None:
    mark(guest, "<journal version='99'/>")
    lines, ok = await sweep(nowhere, NAMESPACE, [uri], "gone01", dry_run=False)
    assert not ok
    assert any("demo: left" in line and "has version 99" in line for line in lines)
    assert marked(guest)


def test_the_command(lab: Lab, stack: Stack, guest: Guest, nowhere: Path, uri: str) -> None:
    ours = lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT)
    all_is_well = CliRunner().invoke(
        cli.main, ["sweep", "--dry-run", "--kubeconfig", str(ours), "--namespace", NAMESPACE, "--hypervisor", "lab"]
    )
    assert all_is_well.exit_code == 0, all_is_well.output
    assert "none is held by a snapshot" in all_is_well.output
    blind = CliRunner().invoke(cli.main, ["sweep", "--dry-run", "--kubeconfig", str(nowhere)])
    assert blind.exit_code == 1
    assert "qemu+tls://HOST/system" in blind.output
    dead = CliRunner().invoke(
        cli.main, ["sweep", "--kubeconfig", str(nowhere), "--hypervisor", "qemu+unix:///system?socket=/nowhere"]
    )
    assert dead.exit_code == 1
    assert "cannot be swept" in dead.output
    thawed = CliRunner().invoke(
        cli.main, ["thaw", "--kubeconfig", str(nowhere), "--hypervisor", uri, "--domain", "demo"]
    )
    assert thawed.exit_code == 0, thawed.output
    assert "not held by a snapshot" in thawed.output
