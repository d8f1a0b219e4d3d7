"""The scan for orphans, on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.handlers.orphans import (
    CONNECT_SECONDS,
    LIST_TIMEOUT,
    LOOK_AGAIN,
    SCAN_EVERY,
    Known,
    OrphanScan,
)
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import class_report
from vmsnapshot_operator.plan.orphans import Kept, Place, Proof
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import LiveHypervisor

pytestmark = pytest.mark.looptime

UID = records.REQUEST.uid
VM = Place("lab", "the VM's UUID")


def name(attempt: int = 1, uid: str = UID) -> str:
    return names.request_name(records.INSTALLATION, uid, attempt, "strange", [VolumeId("v")])


class Lab:
    """A scan of the classes `files` and `ceph` over stand-ins."""

    def __init__(self) -> None:
        self.files, self.ceph = fakes.FakeHost(), fakes.FakeHost()
        self.classes = fakes.FakeClasses(by_name={"files": self.files, "ceph": self.ceph})
        self.world = fakes.world(installation=records.INSTALLATION, classes=self.classes)
        self.cluster: fakes.FakeCluster = self.world.cluster  # type: ignore[assignment]  # a stand-in
        self.known = Known()
        self.journals: dict[str, Proof] = {}
        self.told: list[str] = []
        self.lost: list[AbstractSet[str]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        scan = OrphanScan(
            self.world,
            self.classes,  # type: ignore[arg-type]  # a stand-in
            known=lambda: self.known,
            proven=lambda: self.journals,
            told=self.told.append,
            lost=self.lost.append,
            jitter=lambda: 0.5,
        )
        task = asyncio.create_task(scan.run())
        await asyncio.sleep(2)
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def record(self, attempt: int = 1) -> str:
        """Let the cluster have a content of this attempt; return a request name of it."""
        record = replace(records.intent(records.example().plan, attempt))
        body = contents.to_body(record, records.REQUEST, records.INSTALLATION)
        self.cluster.contents_by_name[record.name] = body
        return record.groups["fast"].request.name

    def orphans(self, class_name: str = "files") -> list[str]:
        return [o.name for o in self.classes.found[class_name].orphans]

    def metric(self, metric: str, class_name: str = "files") -> float | None:
        return self.world.metrics.registry.get_sample_value(metric, {"class_name": class_name})

    @property
    def events(self) -> list[str]:
        return self.world.events.posted  # type: ignore[attr-defined,no-any-return]  # a stand-in


async def test_at_once_and_then_seldom() -> None:
    lab = Lab()
    async with lab.running():
        assert len(lab.files.lists) == len(lab.ceph.lists) == 1
        await asyncio.sleep(SCAN_EVERY)
        assert len(lab.files.lists) == 1
        await asyncio.sleep(SCAN_EVERY / 10)
        assert len(lab.files.lists) == 2
    assert lab.cluster.lists == 2, "for each class at first, and then no more: nothing was unexplained"
    assert lab.told.count("files") == 2


async def test_a_storage_that_hangs_delays_no_other_and_is_counted() -> None:
    lab = Lab()
    lab.ceph.hangs = 1e6
    lab.files.held = {name()}
    async with lab.running():
        assert lab.orphans() == [name()]
        await asyncio.sleep(LIST_TIMEOUT + 1)
        assert "ceph" not in lab.classes.found
        assert lab.metric("vmsnapshot_orphan_scan_failures_total", "ceph") == 1
        await asyncio.sleep(SCAN_EVERY * 0.9)
        assert len(lab.ceph.lists) == 1, "one that fails is not asked more often"


async def test_an_orphan_is_told_once_and_left() -> None:
    lab = Lab()
    lab.files.held = {name()}
    async with lab.running():
        await asyncio.sleep(SCAN_EVERY * 3)
    assert lab.files.held == {name()}
    assert lab.metric("vmsnapshot_orphans") == 1
    assert len([e for e in lab.events if e.startswith("OrphansFound") and name() in e]) == 1


async def test_what_the_watch_does_not_know_yet_is_looked_up() -> None:
    lab = Lab()
    lab.files.held = {lab.record()}
    async with lab.running():
        assert lab.orphans() == []
    assert lab.cluster.lists == 2


async def test_what_is_missing_on_storage_is_told_and_so_is_its_return() -> None:
    lab = Lab()
    group = next(iter(records.example().groups.values()))
    of_files = replace(group, class_name="files")
    elsewhere = replace(group, class_name="files", parameters={"edited": "since"})
    kept = [Kept(name="c", uid=UID, ready=(of_files,)), Kept(name="d", uid="other", ready=(elsewhere,))]
    lab.known = Known(contents=tuple(kept), snapshots=frozenset({UID, "other"}))
    async with lab.running():
        assert lab.lost == []
        lab.files.gone = {"h-vdb"}
        await asyncio.sleep(2 * SCAN_EVERY)
        assert lab.lost == [{UID}]
        assert lab.world.lost_of(UID) == 'class "files": of disk vdb the storage does not hold what was cut any more'
        assert lab.world.lost_of("other") == ""
        lab.files.gone = set()
        await asyncio.sleep(2 * SCAN_EVERY)
        assert lab.lost == [{UID}, {UID}]
        assert lab.world.lost_of(UID) == ""


async def test_what_is_missing_is_found_at_once_though_the_watch_does_not_know_it_yet() -> None:
    lab = Lab()
    record = replace(records.example(), ready=True, ready_time=records.REQUEST.created)
    body = contents.to_body(record, records.REQUEST, records.INSTALLATION)
    lab.cluster.contents_by_name[record.name] = body
    fast = record.groups["fast"]
    lab.classes.by_name = {"fast": lab.files}
    lab.files.held, lab.files.gone = {fast.request.name}, {"h-vda"}
    async with lab.running():
        assert "disk vda" in lab.world.lost_of(UID)


async def test_what_goes_meanwhile_is_no_orphan_and_what_stays_is_one() -> None:
    lab = Lab()
    held = lab.record()
    lab.known = Known(contents=(Kept(name="c", uid=UID, names=frozenset({"another group's"})),))
    lab.cluster.contents_by_name.clear()
    lab.files.held = {held}
    async with lab.running():
        assert lab.orphans() == [], "its content was there before the storage was asked"
        await asyncio.sleep(SCAN_EVERY * 1.1)
        assert lab.orphans() == [held], "a watch that fell silent hides it no longer"


async def test_clones_of_a_restore_that_is_under_way_are_nobodys_orphans() -> None:
    """Whatever else is on that storage, and however long they take: who deletes orphans by hand would delete them."""
    lab = Lab()
    clone, stranger = name(uid="restore"), name(uid="stranger")
    restore: dict[str, Any] = {"metadata": {"uid": "restore", "finalizers": ["ours"]}}
    lab.known = Known(restores=frozenset({"restore"}))
    lab.cluster.restores[("team-a", "new")] = restore
    lab.files.held, lab.ceph.held = {clone, stranger}, {clone}
    async with lab.running():
        await asyncio.sleep(3 * SCAN_EVERY)
        assert (lab.orphans("files"), lab.orphans("ceph")) == ([stranger], [])
        assert lab.cluster.lists == len(lab.files.lists) + 1, "a clone alone needs no second look"
        del restore["metadata"]["finalizers"]
        lab.known = Known()
        await asyncio.sleep(3 * SCAN_EVERY)
        assert lab.orphans("ceph") == [clone], "it is over, and this was left"


async def test_what_a_content_proves_to_be_older_is_removed() -> None:
    lab = Lab()
    current = lab.record(attempt=3)
    lab.files.held = {name(1), name(2), name(4), current}
    lab.files.undeletable = {name(2)}
    async with lab.running():
        assert lab.files.deleted == [name(1)]
        assert sorted(lab.orphans()) == sorted([name(2), name(4)])
    found = {o.name: o.why for o in lab.classes.found["files"].orphans}
    assert "the pool is read-only" in found[name(2)]
    assert lab.classes.found["files"].held == 3
    assert lab.metric("vmsnapshot_orphans_removed_total") == 1
    assert any("OrphanRemoved" in e and name(1) in e for e in lab.events)


class Job:
    """A copy of the hypervisor's, in place of the real one. `deleted`: what was deleted when it was to stop."""

    def __init__(self, lab: Lab, monkeypatch: pytest.MonkeyPatch, error: HypervisorError | None = None) -> None:
        self.lab, self.error = lab, error
        self.found: list[tuple[object, ...]] = []
        self.deleted: list[list[str]] = []
        self.ours: list[tuple[bool, bool, bool]] = []
        copying = Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True)
        lab.classes.known = (StorageClass(name="files", driver="libvirt-backup", ready=True, capabilities=copying),)
        lab.world.hypervisors = {"lab": object()}  # type: ignore[assignment]  # a stand-in
        monkeypatch.setattr(backups, "find", self.find)

    async def find(self, _world: object, *what: object) -> tuple[object, None]:
        self.found.append(what)
        return type("Client", (), {"backups": lambda _self, _ref: self})(), None

    async def stop(self, is_ours: Callable[[str], bool]) -> None:
        self.deleted.append(list(self.lab.files.deleted))
        self.ours.append((is_ours(f"/p/{name(2)}-m"), is_ours(f"/p/{name(3)}-m"), is_ours(f"/p/{name(1, 'other')}-m")))
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("by", ["content", "journal"])
async def test_what_the_hypervisor_may_copy_into_is_removed_when_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    lab = Lab()
    job = Job(lab, monkeypatch)
    if by == "content":
        current = lab.record(attempt=3)
        lab.files.held = {name(2), current}
    else:
        lab.journals = {UID: Proof(2, VM)}
        lab.files.held = {name(2)}
    async with lab.running():
        assert lab.files.deleted == [name(2)]
    assert job.found == [("lab", "u" if by == "content" else VM.domain)]
    assert job.deleted == [[]], "first the copy, then its files"
    assert job.ours == [(True, False, False)], "a later attempt's copy is a successor's"


async def test_what_may_still_be_copied_into_is_left_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    job = Job(lab, monkeypatch, HypervisorError("the hypervisor does not stop copying its disks", retryable=True))
    lab.journals, lab.files.held = {UID: Proof(2, VM)}, {name(2)}
    async with lab.running():
        assert lab.files.held == {name(2)}
        (left,) = lab.classes.found["files"].orphans
        assert "does not stop copying" in left.why
        job.error = None
        await asyncio.sleep(2 * SCAN_EVERY)
        assert lab.files.held == set()


async def test_nothing_is_removed_before_the_vm_s_hypervisor_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    job = Job(lab, monkeypatch)
    lab.world.hypervisors = {}  # type: ignore[assignment]  # a stand-in
    lab.journals, lab.files.held = {UID: Proof(2, VM)}, {name(2)}
    async with lab.running():
        assert lab.files.held == {name(2)}
        assert 'no Hypervisor "lab"' in lab.classes.found["files"].orphans[0].why
    assert job.found == []


async def test_where_no_class_has_the_hypervisor_copy_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab()
    job = Job(lab, monkeypatch)
    instant = Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True)
    lab.classes.known = (replace(lab.classes.known[0], capabilities=instant),)
    lab.journals, lab.files.held = {UID: Proof(2, VM)}, {name(2)}
    async with lab.running():
        assert lab.files.deleted == [name(2)]
    assert job.found == []
    lab.classes.known = (replace(lab.classes.known[0], capabilities=None),)
    lab.files.held = {name(2)}
    async with lab.running():
        assert lab.files.deleted == [name(2)] * 2
    assert job.found == [VM], "one that has not answered yet may be one that copies"


async def test_a_forged_content_proves_nothing() -> None:
    lab = Lab()
    lab.record(attempt=3)
    body: dict[str, Any] = next(iter(lab.cluster.contents_by_name.values()))
    body["spec"]["groups"][0]["requestName"] = name(3)
    lab.files.held = {name(1)}
    async with lab.running():
        assert lab.files.held == {name(1)}
        assert lab.orphans() == [name(1)]


async def test_what_a_journal_proves_is_removed_unless_its_object_is_there_after_all() -> None:
    lab = Lab()
    lab.journals = {UID: Proof(1, VM)}
    lab.files.held = {name(1), name(2)}
    lab.ceph.held = {name(1, uid="other")}
    async with lab.running():
        assert lab.files.held == {name(2)}
        assert lab.ceph.held == {name(1, uid="other")}
    again = Lab()
    again.journals, again.files.held = {UID: Proof(1, VM)}, {name(1)}
    again.cluster.snapshots[("team-a", "backup")] = {"metadata": {"uid": UID}}
    async with again.running():
        assert again.files.held == {name(1)}


async def test_a_snapshot_that_another_instance_takes_meanwhile_is_left_alone() -> None:
    lab = Lab()
    lab.journals = {UID: Proof(5, VM)}  # the VM was freed after that attempt; the watch knows nothing of it yet
    lab.files.hangs = 10.0
    async with lab.running():
        taken = lab.record(attempt=5)
        older = name(attempt=4)
        lab.files.held |= {taken, older}
        await asyncio.sleep(25)
        assert lab.files.deleted == [older]


async def test_an_attempt_under_way_and_a_silent_api_server_remove_nothing() -> None:
    busy = Lab()
    busy.record(attempt=3)
    busy.files.held = {name(1)}
    busy.world.claims["vm"] = UID
    async with busy.running():
        assert busy.files.held == {name(1)}
        assert busy.orphans() == []
    silent = Lab()
    silent.files.held = {name(1)}
    silent.journals = {UID: Proof(1, VM)}
    silent.cluster.down = True
    async with silent.running():
        assert silent.files.held == {name(1)}
        assert silent.metric("vmsnapshot_orphan_scan_failures_total") == 1


async def test_a_standby_asks_nobody() -> None:
    lab = Lab()
    lab.world.leadership.leader = False  # type: ignore[attr-defined]  # a stand-in
    async with lab.running():
        await asyncio.sleep(SCAN_EVERY)
        assert not lab.files.lists
        lab.world.leadership.leader = True  # type: ignore[attr-defined]  # a stand-in
        await asyncio.sleep(2)
        assert len(lab.files.lists) == 1


async def test_a_class_that_is_gone_is_forgotten() -> None:
    lab = Lab()
    lab.files.held = {name()}
    async with lab.running():
        del lab.classes.by_name["files"]
        await asyncio.sleep(2)
        assert lab.metric("vmsnapshot_orphans") is None
        lab.classes.by_name["files"] = lab.files
        await asyncio.sleep(2)
        assert len(lab.files.lists) == 2


# --- disks of VMs under our names -----------------------------------------------------------------------------------------


class Live:
    """One hypervisor, which is connected to or not."""

    def __init__(self, lab: Lab) -> None:
        self.client: fakes.FakeClient | None = fakes.FakeClient()
        lab.cluster.hypervisors = ("lab",)
        lab.world.hypervisors = self

    def get(self, name: str) -> LiveHypervisor | None:
        return LiveHypervisor(name=name, client=self.client)  # type: ignore[arg-type]  # a stand-in


async def test_what_a_vm_has_among_its_disks_is_listed_as_nobodys() -> None:
    """A clone of a restore that was taken away by force: who deletes orphans by hand would delete the VM's disk."""
    lab = Lab()
    live = Live(lab)
    used, free = name(1, "clone"), name(2, "clone")
    lab.files.held = {used, free}
    assert live.client is not None
    live.client.disks = {f"/pool/{used}-abcdefgh.img": "vm1"}
    async with lab.running():
        found = lab.classes.found["files"]
        assert [o.name for o in found.listed] == [free]
        assert class_report.findings(found)["orphans"] == [free]
        assert class_report.findings(found)["orphansFound"] == 1
        assert lab.world.metrics.registry.get_sample_value("vmsnapshot_orphans", {"class_name": "files"}) == 1
        (said,) = [e for e in lab.world.events.posted if "OrphansFound" in e]  # type: ignore[attr-defined]  # a stand-in
        assert f"{used}: no VMSnapshot or VMSnapshotContent knows it; VM vm1 has it among its disks" in said


async def test_what_is_proved_to_be_ours_stays_while_a_vm_uses_it() -> None:
    lab = Lab()
    live = Live(lab)
    lab.journals["gone"] = Proof(1, VM)
    lab.files.held = {name(1, "gone")}
    assert live.client is not None
    live.client.disks = {f"/pool/{name(1, 'gone')}-abcdefgh.img": "vm1"}
    async with lab.running():
        assert not lab.files.deleted
        assert not lab.classes.found["files"].listed


@pytest.mark.parametrize("silent", [False, True])
async def test_without_the_hypervisors_word_nothing_is_listed_for_deletion(silent: bool) -> None:
    lab = Lab()
    live = Live(lab)
    lab.files.held = {name(1, "clone")}
    client = live.client
    assert client is not None
    if silent:
        client.silent = {"second": "second does not answer"}
    else:
        live.client = None
    async with lab.running():
        await asyncio.sleep(CONNECT_SECONDS + 1)
        found = lab.classes.found["files"]
        assert (found.listed, len(found.reported)) == ((), 1)
        assert "is not known" in found.reported[0].why
        client.silent, live.client = {}, client
        await asyncio.sleep(LOOK_AGAIN + 2)
        assert len(lab.classes.found["files"].listed) == 1, "it is asked again soon"
