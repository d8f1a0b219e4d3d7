"""What the judge makes of a world, without one: each rule with a world that keeps it and one that breaks it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import rules
from tests.chaos.seen import (
    Allowed,
    Disk,
    Domain,
    Finding,
    Group,
    GuestSeen,
    Image,
    Lock,
    Process,
    Snap,
    Storage,
    World,
)

UID = "7b6c2a52-3f62-4a0e-9a53-0d1a3b1f0001"
REQUEST = f"vms-inst01-{rules.digest(UID)}-01-groupa"
FILE, OVERLAY = f"/pools/reflink/{REQUEST}-memberab", "/pools/reflink/vms-overlay"
NOW = 1_000_000.0
NOTHING = Allowed()


def snapshot(**status: str) -> dict[str, Any]:
    told = {"Ready": "True", "Reconciling": "False", "Stalled": "False"} | status
    return {
        "kind": "VMSnapshot",
        "metadata": {"namespace": "t", "name": "s", "uid": UID, "generation": 1},
        "spec": {"source": {"domain": "vm"}},
        "status": {
            "observedGeneration": 1,
            "conditions": [{"type": k, "status": v, "reason": "Why"} for k, v in told.items()],
        },
    }


def content(**spec: Any) -> dict[str, Any]:
    body = {
        "vmSnapshotRef": {"namespace": "t", "name": "s", "uid": UID},
        "deletionPolicy": "Delete",
        "readyTime": "2026-01-01T00:00:00Z",
        "groups": [
            {"className": "files", "driver": "libvirt-volume", "requestName": REQUEST},
            {
                "className": "ceph",
                "driver": "ceph-rbd",
                "requestName": REQUEST,
                "groupHandle": f"p/{REQUEST}@{REQUEST}",
            },
        ],
        "volumes": [
            {"target": "vda", "className": "files", "handle": FILE},
            {"target": "vdb", "className": "ceph", "handle": f"p/a@{REQUEST}"},
        ],
    }
    return {"kind": "VMSnapshotContent", "metadata": {"name": f"vmsnapcontent-{UID}"}, "spec": body | spec}


STORAGE = Storage(
    files=frozenset({FILE, "/pools/reflink/vm-vda.raw"}),
    images={"p/a": Image(id="1", snaps=(Snap(REQUEST, REQUEST),), locks=(Lock("client.1", "client.libvirt"),))},
    groups={f"p/{REQUEST}": Group(snaps={REQUEST: True})},
)
DISKS = tuple(
    Disk(place, target, source)
    for place in ("running", "stored")
    for target, source in (("vda", "/pools/reflink/vm-vda.raw"), ("vdb", "p/a"))
)
WORLD = World(
    domains=(Domain(name="vm", state="running", disks=DISKS, opened=("vm-vda.raw", "a")),),
    guests=(GuestSeen(name="vm", sources={"vda": "/pools/reflink/vm-vda.raw", "vdb": "p/a"}, agent="thawed"),),
    storage=STORAGE,
    objects=(snapshot(), content()),
    holders={"vmsnapshot-operator": "operator"},
    instances=frozenset({"operator"}),
    drivers=(Process(10, 9, 9),),
    now=NOW,
)


def found(world: World, allowed: Allowed = NOTHING) -> list[tuple[str, str]]:
    return [(f.kind, f.subject) for f in rules.findings(world, allowed)]


def domain(**change: Any) -> World:
    return replace(WORLD, domains=(replace(WORLD.domains[0], **change),))


def guest(**change: Any) -> World:
    return replace(WORLD, guests=(replace(WORLD.guests[0], **change),))


def storage(**change: Any) -> World:
    return replace(WORLD, storage=replace(STORAGE, **change))


def test_a_world_in_order() -> None:
    assert rules.findings(WORLD, NOTHING) == []


@pytest.mark.parametrize("running_first", [True, False])
def test_a_guest_is_what_it_is_on_the_host_where_it_runs(running_first: bool) -> None:
    here, there = WORLD.domains[0], replace(WORLD.domains[0], state="off", opened=())
    both = (here, there) if running_first else (there, here)
    assert rules.findings(replace(WORLD, domains=both), NOTHING) == []
    left = replace(there, journals=("stored",))
    assert found(replace(WORLD, domains=(here, left))) == [("leaked", "domain vm")]


@pytest.mark.parametrize(
    ("world", "what"),
    [
        (domain(state="paused"), "libvirt says that it is paused"),
        (domain(state="off"), "libvirt says that it is off, and it shall run"),
        (domain(state="crashed"), "libvirt says that it is crashed, and it shall run"),
        (replace(WORLD, domains=(), storage=Storage(), objects=()), "no hypervisor has such a domain"),
        (guest(agent="frozen"), "its agent says frozen"),
        (
            guest(agent="", trouble="no answer"),
            "whether it is frozen cannot be told, its agent does not say: no answer",
        ),
        (
            guest(silent=("vda", "vdb")),
            "its agent says thawed, but QEMU counts no write to vda, vdb, to which its writer writes",
        ),
    ],
)
def test_frozen(world: World, what: str) -> None:
    assert rules.findings(world, NOTHING) == [Finding("frozen", "guest vm", what)]


def test_what_is_meant_to_stand_still_may() -> None:
    assert found(domain(state="paused"), Allowed(paused=frozenset({"vm"}))) == []
    assert found(domain(state="off"), Allowed(off=frozenset({"vm"}))) == []
    assert found(domain(state="paused"), Allowed(off=frozenset({"vm"}))) == [("frozen", "guest vm")]
    stub = guest(stub=True, agent="")
    assert found(replace(stub, domains=domain(state="paused").domains)) == []


def overlaid(place: str, source: str = OVERLAY, **change: Any) -> World:
    disks = (replace(DISKS[0], place=place, source=source, **change), *DISKS[1:])
    return domain(disks=disks)


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (domain(journals=("running", "stored")), "metadata of its running and its stored definition"),
        (domain(snapshots=("x",)), "a snapshot x of libvirt's own"),
        (domain(jobs=("libvirt-1",)), "a block job runs on libvirt-1"),
        (
            domain(remembering=("vms-abcdef-aaaaaaaaaa-01-bbbbbb-cccccccc",)),
            "remember what was written since vms-abcdef-",
        ),
        (domain(opened=("vms-overlay",)), "QEMU has vms-overlay open"),
        (overlaid("running"), f"disk vda of its running definition is {OVERLAY}, an overlay of ours"),
        (overlaid("stored"), "disk vda of its stored definition"),
        (overlaid("running", "/elsewhere"), "/elsewhere, and was made as /pools/reflink/vm-vda.raw"),
        (overlaid("running", DISKS[0].source, mirrored=True), "is being mirrored"),
        (overlaid("running", DISKS[0].source, chained=True), "has a backing chain"),
    ],
)
def test_left_in_a_domain(world: World, words: str) -> None:
    (finding,) = rules.findings(world, NOTHING)
    assert (finding.kind, finding.subject) == ("leaked", "domain vm")
    assert words in finding.what


@pytest.mark.parametrize(
    ("world", "subject"),
    [
        (storage(files=STORAGE.files | {f"{FILE}x"}), f"file {FILE}x"),
        (storage(trash=("p/any",)), "in rbd's trash: p/any"),
        (storage(images={**STORAGE.images, "p/vms-x": Image(id="2")}), "rbd image p/vms-x"),
        (storage(images={**STORAGE.images, "p/b": Image(id="2", snaps=(Snap("any"),))}), "rbd snapshot p/b@any"),
        (storage(groups={**STORAGE.groups, "p/any": Group()}), "rbd group p/any"),
        (storage(groups={**STORAGE.groups, f"p/{REQUEST}.c-00": Group()}), f"rbd group p/{REQUEST}.c-00"),
        (
            storage(groups={f"p/{REQUEST}": Group(snaps={REQUEST: True}, members=("a",))}),
            f"rbd image a in the group p/{REQUEST}",
        ),
        (
            storage(files=STORAGE.files | {f"/p/vms-probe-{int(NOW) - 7201}-abcdef"}),
            f"file /p/vms-probe-{int(NOW) - 7201}-abcdef",
        ),
    ],
)
def test_left_on_storage(world: World, subject: str) -> None:
    assert found(world) == [("leaked", subject)]


def test_what_is_no_leak() -> None:
    assert found(domain(remembering=(f"{REQUEST}-cccccccc", "backup-of-monday"))) == []
    assert found(storage(files=STORAGE.files | {f"/p/vms-probe-{int(NOW) - 60}-abcdef", "/p/filler"})) == []
    other = storage(files=STORAGE.files | {"/p/vms-other1-x"})
    assert found(other, Allowed(foreign=("vms-other1-",))) == []
    copied = storage(files=STORAGE.files | {f"{FILE}.whole"})
    assert found(copied) == []


def test_a_leak_names_the_snapshot_that_it_is_named_after() -> None:
    (finding,) = rules.findings(storage(files=STORAGE.files | {f"{FILE}x"}), NOTHING)
    assert finding.what == "it is named after VMSnapshot t/s, and its VMSnapshotContent does not account for it"


@pytest.mark.parametrize("failed", [{"failure": {"reason": "X"}}, {"readyTime": None}])
def test_what_failed_accounts_for_nothing(failed: dict[str, Any]) -> None:
    world = replace(WORLD, objects=(snapshot(Ready="False", Stalled="True"), content(**failed)))
    assert {k for k, _ in found(world)} == {"leaked"}
    assert len(found(world)) == 4


@pytest.mark.parametrize(
    ("world", "what"),
    [
        (storage(files=frozenset()), f"it is Ready, and {FILE} (disk vda) is not in its pool"),
        (
            storage(groups={f"p/{REQUEST}": Group(snaps={REQUEST: False})}),
            f"it is Ready, and the group snapshot p/{REQUEST}@{REQUEST} is incomplete",
        ),
        (
            storage(images={"p/a": Image(id="1")}),
            f"it is Ready, and p/a@{REQUEST} (disk vdb) is not among the snapshots of its image",
        ),
    ],
)
def test_a_ready_one_that_lost_a_member(world: World, what: str) -> None:
    assert rules.findings(world, NOTHING) == [Finding("lied", f"VMSnapshotContent vmsnapcontent-{UID}", what)]
    honest = replace(world, objects=(snapshot(Ready="False", Stalled="True"), content()))
    assert rules.findings(honest, NOTHING) == [], "a snapshot that says so is no liar"


def test_a_single_image_is_accounted_for_with_its_record() -> None:
    group = {"className": "ceph", "driver": "ceph-rbd", "requestName": REQUEST}
    volume = {"target": "vdb", "className": "ceph", "handle": f"p/a@{REQUEST}"}
    held = Storage(images={"p/a": Image(id="1a", snaps=(Snap(REQUEST),))}, groups={f"p/{REQUEST}.i-1a": Group()})
    world = replace(WORLD, storage=held, objects=(snapshot(), content(groups=[group], volumes=[volume])))
    assert found(world) == []


def test_objects_belong_to_each_other() -> None:
    assert found(replace(WORLD, objects=(content(),))) == [("leaked", f"VMSnapshotContent vmsnapcontent-{UID}")]
    assert found(replace(WORLD, objects=(content(deletionPolicy="Retain"),))) == []
    lone = replace(WORLD, objects=(snapshot(),), storage=Storage())
    assert found(lone) == [("lied", "VMSnapshot t/s")]


@pytest.mark.parametrize(
    "status",
    [{"Ready": "False"}, {"Ready": "Unknown"}, {"Reconciling": "True"}, {"Stalled": "True"}],
)
def test_stuck_unless_it_is_under_way(status: dict[str, str]) -> None:
    moving = replace(WORLD, objects=(snapshot(**status), content(readyTime=None)))
    assert found(moving) == [("stuck", "VMSnapshot t/s")]
    busy = replace(moving, domains=domain(journals=("running",)).domains, guests=guest(agent="frozen").guests)
    assert found(busy, Allowed(under_way=frozenset({"t/s"}))) == []


def test_a_status_of_an_older_generation_is_no_end() -> None:
    body = snapshot()
    body["metadata"]["generation"] = 2
    assert found(replace(WORLD, objects=(body, content()))) == [("stuck", "VMSnapshot t/s")]


def test_a_finalizer_of_ours_on_what_is_deleted() -> None:
    body = snapshot()
    body["metadata"] |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["vmsnapshot.io/cleanup"]}
    assert found(replace(WORLD, objects=(body, content()))) == [("leaked", "VMSnapshot t/s")]
    body["metadata"]["finalizers"] = ["somebody.else/x"]
    assert found(replace(WORLD, objects=(body, content()))) == []


@pytest.mark.parametrize(
    ("lock", "state", "kinds"),
    [
        (Lock("client.2", "client.vmsnapshot"), "running", ["leaked"]),
        (Lock("client.2", ""), "running", ["leaked"]),
        (Lock("client.2", ""), "off", []),
        (Lock("client.2", "client.libvirt"), "running", []),
    ],
)
def test_locks(lock: Lock, state: str, kinds: list[str]) -> None:
    images = {"p/a": replace(STORAGE.images["p/a"], locks=(lock,))}
    world = replace(domain(state=state), storage=replace(STORAGE, images=images))
    assert [k for k, _ in found(world, Allowed(off=frozenset({"vm"})))] == kinds


def test_a_lock_on_an_image_of_no_domain() -> None:
    images = {**STORAGE.images, "p/b": Image(id="2", locks=(Lock("client.3", "client.libvirt"),))}
    assert found(storage(images=images)) == [("leaked", "rbd image p/b")]


@pytest.mark.parametrize(
    ("holders", "kind", "subject"),
    [
        ({}, "stuck", "lease vmsnapshot-operator"),
        ({"vmsnapshot-operator": ""}, "stuck", "lease vmsnapshot-operator"),
        ({"vmsnapshot-operator": "dead"}, "stuck", "lease vmsnapshot-operator"),
        ({"vmsnapshot-operator": "operator", "other": "x"}, "leaked", "lease other"),
    ],
)
def test_leases(holders: dict[str, str], kind: str, subject: str) -> None:
    world = replace(WORLD, holders=holders)
    assert found(world) == [(kind, subject)]
    assert found(world, Allowed(operator_down=True)) == ([] if kind == "stuck" else [(kind, subject)])


def test_a_driver_that_outlived_its_operator() -> None:
    assert found(replace(WORLD, drivers=(Process(10, 1, 9),))) == [("leaked", "process 10")]
