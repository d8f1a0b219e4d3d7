"""The judge itself: what is planted is found, each by exactly the kind that it is, and a world that is in order yields nothing."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import libvirt
import pytest

from tests import proof
from tests.chaos import hosts, judge, restored, rules, runner
from tests.chaos.faults import Scene
from tests.chaos.judge import Allowed, Finding
from tests.lab import GuestDisk, Lab
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, ROOT, TENANT, Stack, until
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.markers import GATE_NAMESPACE, RESTORED_NAMESPACE, Gate, Marker
from vmsnapshot_operator.plan import definition

JOURNAL = "https://vmsnapshot.io/journal/1"
FOREIGN = "vms-aaaaaa-bbbbbbbbbb-01-cccccc"
SNAPSHOTS, CONTENTS = "vmsnapshots.vmsnapshot.io", "vmsnapshotcontents.vmsnapshot.io"


class World:
    """What the tests ask, and how they plant."""

    def __init__(self, lab: Lab, stack: Stack, guest: Guest) -> None:
        self.lab, self.stack, self.guest = lab, stack, guest

    def found(self, allowed: Allowed = judge.NOTHING, *more: Guest) -> list[Finding]:
        return judge.judge_now(self.lab, self.stack, [self.guest, *more], allowed)

    def one(self, kind: str, *words: str, allowed: Allowed = judge.NOTHING) -> None:
        """There is exactly one finding: of this kind, and with these words in it."""
        found = self.found(allowed)
        assert [f.kind for f in found] == [kind], found
        text = f"{found[0].subject}: {found[0].what}"
        assert all(w in text for w in words), text

    def lie(self, name: str, *words: str, records: tuple[int, int] | None = None) -> None:
        """The snapshot is judged as a liar, in these words."""
        found = judge.judge_snapshot(self.lab, self.stack, name, records=records)
        assert [f.kind for f in found] == ["lied"], found
        assert all(w in found[0].what for w in words), found[0].what

    @contextlib.contextmanager
    def nobody_acts(self) -> Iterator[None]:
        """Hold the operator, which would mend what is planted, or refuse it."""
        operator = self.stack.programs["operator"]
        operator.kill(signal.SIGSTOP)
        try:
            yield
        finally:
            operator.kill(signal.SIGCONT)

    @contextlib.contextmanager
    def forged(self, resource: str, name: str, change: Mapping[str, Any], *, status: bool = False) -> Iterator[None]:
        """Change an object by hand, with nobody there to mend it, and put it back."""
        with self.nobody_acts():
            before = json.loads(self._kubectl("get", resource, name, "-o", "json"))
            part = "status" if status else "spec"
            self._patch(resource, name, {part: change}, status=status)
            try:
                yield
            finally:
                whole = {k: before[part].get(k) for k in change}
                self._patch(resource, name, {part: whole}, status=status)

    def _patch(self, resource: str, name: str, patch: Mapping[str, Any], *, status: bool) -> None:
        options = ["--subresource=status"] if status else []
        self._kubectl("patch", resource, name, *options, "--type=merge", "-p", json.dumps(patch))

    def _kubectl(self, verb: str, resource: str, name: str, *words: str) -> str:
        place = ["-n", TENANT] if resource == SNAPSHOTS else []
        return self.lab.kubectl(*place, verb, resource, name, *words)

    def status(self, name: str) -> dict[str, Any]:
        body = self.stack.get(name)
        assert body is not None
        return dict(body["status"])

    def content(self, name: str) -> dict[str, Any]:
        content = self.stack.content(name)
        assert content is not None
        return content

    def handle(self, name: str, target: str) -> str:
        return next(str(v["handle"]) for v in self.content(name)["spec"]["volumes"] if v["target"] == target)


@pytest.fixture
def world(lab: Lab, stack: Stack) -> Iterator[World]:
    """A world that is in order before a test, and after it: what is found in between was planted."""
    made = World(lab, stack, lab.guest("demo"))
    until("the world is in order", lambda: not made.found())
    yield made
    made.guest.up()
    until("the world is in order again", lambda: not made.found(allowed=_ended(stack)))


def _ended(stack: Stack) -> Allowed:
    """VMSnapshots of the test are deleted after this fixture; until then the operator may mend them."""
    return Allowed(under_way=frozenset(rules.name_of(b) for b in stack.all(SNAPSHOTS)))


# --- a world in order ------------------------------------------------------------------------------------------------------------


def test_honest_snapshots_yield_nothing(world: World, vmsnapshot: Callable[..., str]) -> None:
    before = world.guest.records()
    wanted = {
        vmsnapshot("whole", quiesce={"policy": "Require"}): "Filesystem",
        vmsnapshot("pause", quiesce={"method": "Pause"}): "Crash",
        vmsnapshot("atomic", quiesce={"policy": "Never"}, volumes={"exclude": ["vda", "vdb"]}): "Crash",
        vmsnapshot("never", quiesce={"policy": "Never"}): "PerVolume",
        vmsnapshot("dry", dryRun=True): "",
    }
    for name, claim in wanted.items():
        world.stack.wait(name, "Ready" if claim else "Planned")
        assert world.status(name).get("consistency", "") == claim
    after = world.guest.records()
    assert world.found() == []
    for name in wanted:
        assert judge.judge_snapshot(world.lab, world.stack, name, records=(before, after)) == []


def test_a_group_of_images_is_accounted_for(world: World, vmsnapshot: Callable[..., str]) -> None:
    """And each part of it that is too much or too little is found."""
    import rbd

    disks = {t: GuestDisk(kind="rbd", size_mib=16) for t in ("vda", "vdb")}
    stub = world.lab.domain_stub("demo-judged", disks)
    try:
        name = vmsnapshot("group", domain="demo-judged")
        world.stack.wait(name)
        assert world.found(judge.NOTHING, stub) == []
        assert judge.judge_snapshot(world.lab, world.stack, name) == []
        (group,) = world.content(name)["spec"]["groups"]
        request = group["requestName"]
        with world.nobody_acts(), world.lab.ceph.connect() as (_, ioctx):
            rbd.Group(ioctx, request).add_image(ioctx, "demo-judged-a")
            world.one("leaked", f"rbd image demo-judged-a in the group vms/{request}")
            rbd.Group(ioctx, request).remove_image(ioctx, "demo-judged-a")
            rbd.RBD().group_create(ioctx, f"{request}.c-00")
            world.one("leaked", f"{request}.c-00", f"named after VMSnapshot {TENANT}/{name}")
            rbd.RBD().group_remove(ioctx, f"{request}.c-00")
            rbd.Group(ioctx, request).remove_snap(request)
            assert {f.kind for f in world.found()} == {"lied"}
            world.lie(name, f"the group snapshot vms/{request}@{request} is gone")
        world.stack.delete(name)
    finally:
        stub.remove()


def test_what_is_said_to_be_under_way_is_tolerated(world: World, vmsnapshot: Callable[..., str]) -> None:
    with world.nobody_acts():
        name = vmsnapshot("moving")
        world.one("stuck", f"VMSnapshot {TENANT}/{name}")
        (found,) = judge.judge_snapshot(world.lab, world.stack, name)
        assert found.kind == "stuck"
        body = world.stack.get(name)
        assert body is not None
        part = world.lab.pool_path("plain") / f"vms-aaaaaa-{rules.digest(body['metadata']['uid'])}-01-cccccc-dddddddd"
        part.write_bytes(b"x")
        mark(world.guest, "<journal/>", libvirt.VIR_DOMAIN_AFFECT_LIVE)
        try:
            assert world.found(Allowed(under_way=frozenset({f"{TENANT}/{name}"}))) == []
        finally:
            mark(world.guest, None, libvirt.VIR_DOMAIN_AFFECT_LIVE)
            part.unlink()
    world.stack.wait(name)


# --- frozen ----------------------------------------------------------------------------------------------------------------------


def test_a_guest_that_is_frozen_by_its_agent(world: World) -> None:
    world.guest.agent("guest-fsfreeze-freeze")
    try:
        world.one("frozen", "guest demo", "its agent says frozen")
    finally:
        world.guest.agent("guest-fsfreeze-thaw")


def test_a_guest_that_is_frozen_behind_its_agent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "WRITES_SECONDS", 1.0)
    world.guest.control(["fsfreeze", "--freeze", "/mnt/vdb"])
    try:
        # Its writer waits; what the guest had still to write to the other disks may be counted there.
        world.one("frozen", "guest demo", "its agent says thawed", "no write to", "vdb")
    finally:
        world.guest.control(["fsfreeze", "--unfreeze", "/mnt/vdb"])


def test_a_guest_whose_agent_does_not_say(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "AGENT_SECONDS", 1)
    world.guest.hang_agent()
    try:
        world.one("frozen", "guest demo", "cannot be told")
    finally:
        world.guest.hang_agent(hang=False)
        until("the agent answers again", world.guest.agent_answers)


def test_a_guest_that_is_paused_or_off_unless_it_may_be(world: World) -> None:
    world.guest.domain().suspend()
    try:
        world.one("frozen", "guest demo", "paused")
        assert world.found(Allowed(paused=frozenset({"demo"}))) == []
    finally:
        world.guest.domain().resume()
    world.guest.destroy()
    world.one("frozen", "guest demo", "off")
    assert world.found(Allowed(off=frozenset({"demo"}))) == []


# --- leaked ----------------------------------------------------------------------------------------------------------------------


def mark(guest: Guest, element: str | None, flags: int, namespace: str = JOURNAL) -> None:
    prefix = None if element is None else "vmsnapshot"
    guest.domain().setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, element, prefix, namespace, flags)


@pytest.mark.parametrize(
    ("place", "flags"),
    [("running", libvirt.VIR_DOMAIN_AFFECT_LIVE), ("stored", libvirt.VIR_DOMAIN_AFFECT_CONFIG)],
)
def test_a_journal(world: World, place: str, flags: int) -> None:
    mark(world.guest, "<journal/>", flags)
    try:
        world.one("leaked", "domain demo", f"a journal of ours in the metadata of its {place} definition")
    finally:
        mark(world.guest, None, flags)


def test_a_gate_is_a_leak_and_that_a_restore_was_done_is_none(world: World) -> None:
    gate, done = GATE_NAMESPACE, RESTORED_NAMESPACE
    stored = libvirt.VIR_DOMAIN_AFFECT_CONFIG
    before = world.guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    try:
        mark(world.guest, "<restored/>", stored, done)
        assert world.found() == []
        mark(world.guest, "<gate/>", stored, gate)
        world.one("leaked", "domain demo", "a journal of ours in the metadata of its stored definition")
    finally:
        world.guest.connection().defineXML(before)


def test_an_overlay_is_one_leak_beside_its_file(world: World) -> None:
    domain, overlay = world.guest.domain(), world.lab.pool_path("reflink") / "vms-overlay.qcow2"
    disks = f"<disk name='vda'><source file='{overlay}'/></disk><disk name='vdb' snapshot='no'/><disk name='vdc' snapshot='no'/>"
    flags = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    domain.snapshotCreateXML(f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>", flags)
    try:
        found = world.found()
        assert [(f.kind, f.subject) for f in found] == [("leaked", "domain demo"), ("leaked", f"file {overlay}")]
        assert "disk vda" in found[0].what
    finally:
        domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        until("the commit is ready", lambda: "ready='yes'" in domain.XMLDesc())
        domain.blockJobAbort("vda", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
        overlay.unlink()


@pytest.mark.parametrize("pool", ["reflink", "plain"])
def test_a_volume_in_a_pool_unless_it_is_somebody_elses(world: World, pool: str) -> None:
    left = world.lab.pool_path(pool) / f"{FOREIGN}-dddddddd"
    left.write_bytes(b"x")
    try:
        world.one("leaked", f"file {left}", "no VMSnapshotContent accounts for it")
        assert world.found(Allowed(foreign=("vms-aaaaaa-",))) == []
    finally:
        left.unlink()


def test_whatever_ceph_still_has(world: World) -> None:
    import rbd

    with world.lab.ceph.connect() as (_, ioctx):
        rbd.RBD().group_create(ioctx, FOREIGN)
        world.one("leaked", f"rbd group vms/{FOREIGN}")
        rbd.RBD().group_remove(ioctx, FOREIGN)
        with rbd.Image(ioctx, "demo-c") as image:
            image.create_snap(FOREIGN)
            world.one("leaked", f"rbd snapshot vms/demo-c@{FOREIGN}")
            image.remove_snap(FOREIGN)
        rbd.RBD().create(ioctx, FOREIGN, 4 << 20, old_format=False)
        world.one("leaked", f"rbd image vms/{FOREIGN}")
        with rbd.Image(ioctx, FOREIGN) as image:
            image_id = image.id()
        rbd.RBD().trash_move(ioctx, FOREIGN)
        world.one("leaked", f"in rbd's trash: vms/{FOREIGN}")
        rbd.RBD().trash_remove(ioctx, image_id)


def test_a_lock_of_somebody_who_is_not_qemu(world: World) -> None:
    import rbd

    features = rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK
    with world.lab.ceph.connect() as (_, ioctx):
        rbd.RBD().create(ioctx, "locked", 4 << 20, features=features, old_format=False)
        try:
            with rbd.Image(ioctx, "locked") as image:
                assert world.found() == []
                image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
                world.one("leaked", "rbd image vms/locked", "client.admin")
                image.lock_release()
        finally:
            rbd.RBD().remove(ioctx, "locked")


def test_what_a_ready_snapshot_has_too_much(world: World, vmsnapshot: Callable[..., str]) -> None:
    """The cut of another attempt is not accounted for by the one that succeeded."""
    name = vmsnapshot("twice")
    world.stack.wait(name)
    ours = Path(world.handle(name, "vda"))
    other = ours.with_name(ours.name.replace("-01-", "-02-"))
    assert other != ours
    with world.nobody_acts():
        other.write_bytes(b"x")
        try:
            world.one("leaked", f"file {other}", f"named after VMSnapshot {TENANT}/{name}")
        finally:
            other.unlink()


def test_a_content_without_its_snapshot(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("model")
    world.stack.wait(name)
    content = world.content(name)
    nobody = "00000000-0000-4000-8000-00000000dead"
    orphan = {
        "apiVersion": content["apiVersion"],
        "kind": content["kind"],
        "metadata": {"name": f"vmsnapcontent-{nobody}"},
        "spec": content["spec"]
        | {"vmSnapshotRef": {"namespace": TENANT, "name": "gone", "uid": nobody}, "installation": "aaaaaa"},
    }
    with world.nobody_acts():
        world.stack.apply(orphan)
        try:
            world.one("leaked", f"vmsnapcontent-{nobody}", f"{TENANT}/gone")
        finally:
            world.lab.kubectl("delete", CONTENTS, f"vmsnapcontent-{nobody}")


def test_a_finalizer_on_what_is_deleted(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("held")
    world.stack.wait(name)
    with world.nobody_acts():
        world.stack.delete(name, wait=False)
        world.one("leaked", f"VMSnapshot {TENANT}/{name}", "vmsnapshot.io/cleanup is still on it")
    until("it is gone", lambda: world.stack.get(name) is None)


def test_a_driver_that_outlived_its_operator(world: World) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    words = ["-c", "import time; time.sleep(600)", "vmsnapshot_operator.drivers.worker", "3", "4", str(dead.pid), "x"]
    left = subprocess.Popen(["python3", *words], cwd=ROOT)
    try:
        until("it is called so", lambda: bool(world.found()))
        world.one("leaked", f"process {left.pid}", str(dead.pid))
    finally:
        left.kill()
        left.wait()


# --- stuck -----------------------------------------------------------------------------------------------------------------------


def test_a_lease_of_nobody_who_lives(world: World) -> None:
    lease = ["-n", NAMESPACE, "patch", "lease", "vmsnapshot-operator", "--type=merge", "-p"]
    with world.nobody_acts():
        for holder, words in (("", "nobody holds it"), ("somebody", "held by somebody, which does not run")):
            world.lab.kubectl(*lease, json.dumps({"spec": {"holderIdentity": holder}}))
            world.one("stuck", "lease vmsnapshot-operator", words)
            assert world.found(Allowed(operator_down=True)) == []
        world.lab.kubectl(*lease, '{"spec":{"holderIdentity":"operator"}}')


# --- lied ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", ["Crash", "Filesystem", "Application"])
def test_a_status_that_claims_more_than_its_content(world: World, vmsnapshot: Callable[..., str], claim: str) -> None:
    name = vmsnapshot("boast", quiesce={"policy": "Never"})
    world.stack.wait(name)
    with world.forged(SNAPSHOTS, name, {"consistency": claim}, status=True):
        world.lie(name, f"its status claims {claim}, its VMSnapshotContent PerVolume")
    volumes = world.status(name)["volumes"]
    volumes[1]["consistency"] = claim
    with world.forged(SNAPSHOTS, name, {"volumes": volumes}, status=True):
        world.lie(name, f"its status claims {claim} of disk vdb, its VMSnapshotContent PerVolume")


def test_a_content_that_claims_more_than_the_storage_holds(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("forged", quiesce={"policy": "Never"})
    world.stack.wait(name)
    volumes = [v | {"consistency": "Filesystem"} for v in world.content(name)["spec"]["volumes"]]
    with world.forged(
        CONTENTS, world.content(name)["metadata"]["name"], {"volumes": volumes, "consistency": "Filesystem"}
    ):
        world.lie(name, "its VMSnapshotContent claims Filesystem", "journal not replayed")


def test_a_failed_snapshot_that_claims_anything(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("failed", domain="nobody")
    world.stack.wait(name, "Stalled")
    assert judge.judge_snapshot(world.lab, world.stack, name) == []
    with world.forged(SNAPSHOTS, name, {"consistency": "Crash"}, status=True):
        world.lie(name, "it is Stalled, and claims Crash")


def test_one_disk_of_a_later_moment(world: World, vmsnapshot: Callable[..., str]) -> None:
    early, late = vmsnapshot("early"), ""
    world.stack.wait(early)
    late = vmsnapshot("late")
    world.stack.wait(late)
    Path(world.handle(early, "vda")).write_bytes(Path(world.handle(late, "vda")).read_bytes())
    world.lie(early, "claims Filesystem, one moment at which the writer was held, but its disks hold records vda")


def test_all_disks_of_a_later_moment(world: World, vmsnapshot: Callable[..., str]) -> None:
    """They agree with each other: only who counted the records meanwhile can tell."""
    before = world.guest.records()
    early = vmsnapshot("early")
    world.stack.wait(early)
    after = world.guest.records()
    until("the writer went on", lambda: world.guest.records() > after + 1)
    late = vmsnapshot("late")
    world.stack.wait(late)
    handles = {v["target"]: v["handle"] for v in world.content(late)["spec"]["volumes"]}
    volumes = [v | {"handle": handles[v["target"]]} for v in world.content(early)["spec"]["volumes"]]
    assert judge.judge_snapshot(world.lab, world.stack, early, records=(before, after)) == []
    with world.forged(CONTENTS, world.content(early)["metadata"]["name"], {"volumes": volumes}):
        assert judge.judge_snapshot(world.lab, world.stack, early) == []
        world.lie(early, "it is of another moment", records=(before, after))


@pytest.mark.parametrize("target", ["vda", "vdc"])
def test_a_ready_snapshot_that_lost_a_member(world: World, vmsnapshot: Callable[..., str], target: str) -> None:
    import rbd

    name = vmsnapshot("lost")
    world.stack.wait(name)
    handle = world.handle(name, target)
    if target == "vda":
        Path(handle).unlink()
    else:
        with world.lab.ceph.connect() as (_, ioctx), rbd.Image(ioctx, "demo-c") as image:
            image.remove_snap(handle.rpartition("@")[2])
    world.one("lied", world.content(name)["metadata"]["name"], "it is Ready, and", handle)
    world.lie(name, "it is Ready, and", handle)


def test_a_member_with_nothing_in_it(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("empty", quiesce={"policy": "Never"})
    world.stack.wait(name)
    path = Path(world.handle(name, "vdb"))
    path.write_bytes(bytes(path.stat().st_size))
    world.lie(name, "claims PerVolume of disk vdb", "holds nothing that can be read")


def test_a_snapshot_without_its_content(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("bare")
    world.stack.wait(name)
    content = world.content(name)
    with world.nobody_acts():
        world.lab.kubectl("delete", CONTENTS, content["metadata"]["name"])
        kinds = {(f.kind, f.subject.partition(" ")[0]) for f in world.found()}
        assert kinds == {("lied", "VMSnapshot"), ("leaked", "file"), ("leaked", "rbd")}
        world.lie(name, "no VMSnapshotContent holds anything of it")
        again = {k: content[k] for k in ("apiVersion", "kind", "spec")}
        meta = {k: content["metadata"][k] for k in ("name", "labels")}
        world.stack.apply({**again, "metadata": meta})


def test_a_disk_that_is_left_out_silently(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("part", volumes={"exclude": ["vda"]})
    world.stack.wait(name)
    with world.forged(SNAPSHOTS, name, {"excluded": None}, status=True):
        world.lie(name, "disk vda of its VM is neither in it nor said to be left out")


# --- restores --------------------------------------------------------------------------------------------------------------------


def of_restore(world: World, snapshot: str, folder: Path, restore: str, new_vm: str = "") -> Scene:
    """The scene of one restore of a snapshot that was read before."""
    nobody: Any = None
    return Scene(
        lab=world.lab,
        stack=world.stack,
        proxy=nobody,
        injector=nobody,
        annex=nobody,
        guest=world.guest,
        random=Random(0),  # noqa: S311 - nothing secret
        name=snapshot,
        restores=[restore],
        new_vms={restore: new_vm} if new_vm else {},
        held=proof.read(world.lab, world.content(snapshot), folder),
    )


def found_of(scene: Scene, kind: str, *words: str) -> None:
    """There is exactly one finding of what the restores have made: of this kind, and with these words in it."""
    found = restored.look(scene)
    assert [f.kind for f in found] == [kind], found
    text = f"{found[0].subject}: {found[0].what}"
    assert all(w in text for w in words), text


@contextlib.contextmanager
def redefined(guest: Guest, change: Callable[[str], str]) -> Iterator[None]:
    """The stored definition is another one meanwhile."""
    before = guest.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    guest.connection().defineXML(change(before))
    try:
        yield
    finally:
        guest.connection().defineXML(before)


def later(world: World, vmsnapshot: Callable[..., str], than: str, folder: Path) -> str:
    """A snapshot that holds more records than another one."""
    last = max(proof.read(world.lab, world.content(than), folder).records.values())
    until("the writer went on", lambda: world.guest.records() > last + 20)
    late = vmsnapshot("late")
    world.stack.wait(late)
    return late


def test_a_vm_that_was_set_back(world: World, vmsnapshot: Callable[..., str], tmp_path: Path) -> None:
    """Nothing is found of one that is in order; a disk of another moment, a gate, a mark and a disk that are missing are."""
    name = vmsnapshot("back", quiesce={"policy": "Require"})
    world.stack.wait(name)
    late = later(world, vmsnapshot, name, tmp_path)
    restore = world.stack.restore(f"{name}-r", name)
    scene = of_restore(world, name, tmp_path, restore)
    try:
        body = world.stack.wait_restore(restore)
        assert restored.look(scene) == []

        disk = Path(world.guest.disks["vda"].path)
        honest = disk.read_bytes()
        disk.write_bytes(Path(world.handle(late, "vda")).read_bytes())
        found_of(scene, "lied", "domain demo", f"the snapshot {name}: the disks hold")
        disk.write_bytes(honest)

        domain, uid = world.guest.domain(), body["metadata"]["uid"]
        marker = Marker(installation="aaaaaa", restore=f"{TENANT}/gone", restore_uid="u-1", snapshot_uid="u-2")
        gate = Gate(marker=marker, targets=("vda",), autostart=False)
        with redefined(world.guest, lambda xml: definition.gated(xml, gate)):
            found_of(scene, "leaked", "the gate of u-1 is closed")
            assert [f.kind for f in runner.booted(scene, world.guest, mend=False)] == ["unbootable"]
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, RESTORED_NAMESPACE, 2)
        found_of(scene, "lied", "its mark is not there")
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, "<restored uid='u-1'/>", "vmsnapshot", RESTORED_NAMESPACE, 2
        )
        found_of(scene, "lied", "its mark is u-1")
        domain.setMetadata(
            libvirt.VIR_DOMAIN_METADATA_ELEMENT, f"<restored uid='{uid}'/>", "vmsnapshot", RESTORED_NAMESPACE, 2
        )
        with redefined(world.guest, lambda xml: xml.replace("dev='vdb'", "dev='vdy'")):
            found_of(scene, "stuck", "vdb are not in its definition")
        assert restored.look(scene) == []
    finally:
        restored.judge(scene)


def test_disks_of_different_moments_after_a_restore_that_is_gone(
    world: World, vmsnapshot: Callable[..., str], tmp_path: Path
) -> None:
    """Nobody says what they should be: that they are of one moment can be told all the same."""
    name = vmsnapshot("half", quiesce={"policy": "Require"})
    world.stack.wait(name)
    until("the writer went on", lambda: world.guest.records() > 20)
    scene = of_restore(world, name, tmp_path, "never-was")
    last = max(scene.held.records.values()) if scene.held else 0
    until("the writer went on", lambda: world.guest.records() > last + 20)
    world.guest.destroy()
    assert restored.look(scene) == []
    disk = Path(world.guest.disks["vda"].path)
    honest = disk.read_bytes()
    disk.write_bytes(Path(world.handle(name, "vda")).read_bytes())
    found_of(scene, "lied", "its disks are of different moments")
    disk.write_bytes(honest)


def test_a_vm_that_was_made(
    world: World, vmsnapshot: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is found of one that is in order; a guest that does not come up, disks and a mark that are missing are."""
    name = vmsnapshot("new", quiesce={"policy": "Require"})
    world.stack.wait(name)
    restore, vm = f"{name}-r", f"demo-{name}"
    world.stack.restore(restore, name, mode="NewVM", newVM={"name": vm})
    scene = of_restore(world, name, tmp_path, restore, vm)
    connection = world.lab.libvirt()
    try:
        world.stack.wait_restore(restore)
        domain = connection.lookupByName(vm)
        before = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        assert restored.look(scene) == []
        scene.started = True  # by the judge itself, to see whether it comes up

        monkeypatch.setattr(restored, "BOOT_SECONDS", 3.0)
        connection.defineXML(before.replace("<cmdline>", "<cmdline>rdinit=/nothing "))
        found_of(scene, "unbootable", f"the guest of {vm} answers")
        connection.defineXML(before)
        monkeypatch.undo()

        disk = file_of(before)
        disk.rename(disk.with_suffix(".away"))
        assert {f.kind for f in restored.look(scene)} == {"unbootable"}
        disk.with_suffix(".away").rename(disk)

        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, RESTORED_NAMESPACE, 2)
        found_of(scene, "lied", "its mark is not there")
        domain.undefine()
        found_of(scene, "lied", f"it is Ready, and there is no VM {vm}")
        connection.defineXML(before)
    finally:
        connection.close()
        restored.judge(scene)


def file_of(definition_: str) -> Path:
    """The first disk of a definition that is a file."""
    return Path(definition_.split("<source file='")[1].split("'", maxsplit=1)[0])


def test_a_vm_that_was_made_of_another_moment(world: World, vmsnapshot: Callable[..., str], tmp_path: Path) -> None:
    name = vmsnapshot("new", quiesce={"policy": "Require"})
    world.stack.wait(name)
    late = later(world, vmsnapshot, name, tmp_path)
    restore, vm = f"{name}-r", f"demo-{name}"
    world.stack.restore(restore, name, mode="NewVM", newVM={"name": vm})
    scene = of_restore(world, name, tmp_path, restore, vm)
    connection = world.lab.libvirt()
    try:
        world.stack.wait_restore(restore)
        disk = file_of(connection.lookupByName(vm).XMLDesc(0))
        disk.write_bytes(Path(world.handle(late, "vda")).read_bytes())
        found = restored.look(scene)
        assert {(f.kind, f.subject) for f in found} == {("lied", f"domain {vm}")}
        assert any(f"the snapshot {name}: the disks hold" in f.what for f in found)
    finally:
        connection.close()
        restored.judge(scene)


def test_clones_of_a_vm_that_will_not_be(world: World) -> None:
    """They are named after a VMRestore, and no content accounts for them."""
    import rbd

    name = names.request_name(
        world.stack.installation(), "11111111-0000-4000-8000-000000000000", 1, "reflink-files", ()
    )
    clone = world.lab.pool_path("reflink") / f"{name}-dddddddd"
    clone.write_bytes(b"x")
    try:
        world.one("leaked", f"file {clone}", "no VMSnapshotContent accounts for it")
    finally:
        clone.unlink()
    with world.lab.ceph.connect() as (_, ioctx):
        rbd.RBD().create(ioctx, name, 4 << 20, old_format=False)
        try:
            world.one("leaked", f"rbd image vms/{name}", "no VMSnapshotContent accounts for it")
        finally:
            rbd.RBD().remove(ioctx, name)


def test_a_restore_that_does_not_end(world: World, vmsnapshot: Callable[..., str]) -> None:
    name = vmsnapshot("waits")
    world.stack.wait(name)
    with world.nobody_acts():
        restore = world.stack.restore(f"{name}-r", name, runningVM="Refuse")
        world.one("stuck", f"VMRestore {TENANT}/{restore}")
        assert world.found(Allowed(under_way=frozenset({f"{TENANT}/{restore}"}))) == []
    world.stack.wait_restore(restore, "Stalled")
    world.stack.delete_restore(restore)
