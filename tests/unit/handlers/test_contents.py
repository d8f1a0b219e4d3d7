"""Contents without their VMSnapshot, on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from vmsnapshot_operator.core.driver import Capabilities, CutKind
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.handlers.contents import RETRY_SECONDS, STANDBY_SECONDS, TELL_AFTER, VERIFY_EVERY, Contents
from vmsnapshot_operator.kube import contents as kube_contents
from vmsnapshot_operator.plan.unbound import GRACE
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import World

pytestmark = pytest.mark.looptime

NAME = kube_contents.name_for(records.REQUEST.uid)
REF = (records.REQUEST.namespace, records.REQUEST.name)
OWN = sorted(g.request.name for g in records.example().groups.values())


class Lab:
    """Contents over stand-ins; the watch knows `watched` and the API server what the cluster holds."""

    def __init__(self, *, bound: bool = False, leader: bool = True) -> None:
        record = records.example()
        self.hosts = {c: fakes.FakeHost(held={g.request.name, "backup"}) for c, g in record.groups.items()}
        self.world = fakes.world(
            installation=records.INSTALLATION,
            classes=fakes.FakeClasses(by_name=self.hosts),
            leader=leader,
        )
        self.cluster: fakes.FakeCluster = self.world.cluster  # type: ignore[assignment]  # a stand-in
        self.woken: list[str] = []
        self.watched = bound
        if bound:
            self.cluster.snapshots[REF] = {"metadata": {"uid": records.REQUEST.uid}}
        self.body = kube_contents.to_body(record, records.REQUEST, records.INSTALLATION)
        self.body["metadata"] |= {"uid": "c", "generation": 2, "resourceVersion": "5"}
        self.cluster.contents_by_name[NAME] = self.body
        self.contents = Contents(self.world, exists=lambda _: self.watched, wake=self.woken.append)
        self.contents.seen(self.body)

    def change(self, **spec: Any) -> None:
        self.body = {**self.body, "spec": {**self.body["spec"], **spec}}
        self.cluster.contents_by_name[NAME] = self.body
        self.contents.seen(self.body)

    async def look(self) -> float | None:
        seconds = await self.contents.reconcile(NAME)
        while self.contents._running:
            await asyncio.wait(list(self.contents._running.values()))
        return seconds

    async def look_twice(self) -> float | None:
        seconds = await self.look()
        assert seconds is not None
        assert seconds > GRACE
        await asyncio.sleep(seconds)
        return await self.look()

    @property
    def told(self) -> str:
        return self.cluster.statuses[-1][1]["conditions"][0]["reason"] if self.cluster.statuses else ""

    @property
    def left(self) -> list[str]:
        return sorted({n for h in self.hosts.values() for n in h.held} - {"backup"})


async def test_after_a_grace_storage_is_cleaned_then_the_content_removed() -> None:
    lab = Lab()
    assert lab.left == OWN
    await lab.look_twice()
    assert not lab.left
    assert all("backup" in h.held for h in lab.hosts.values())
    assert lab.cluster.deleted == [(NAME, "c")]
    assert any(records.REQUEST.uid in e for e in lab.world.events.posted)  # type: ignore[attr-defined]


async def test_a_vmsnapshot_that_the_watch_has_not_shown_yet_is_found() -> None:
    lab = Lab(bound=True)
    lab.watched = False
    await lab.look_twice()
    assert lab.left == OWN
    assert not lab.cluster.deleted


async def test_another_object_of_the_name_is_not_its_own() -> None:
    lab = Lab()
    lab.cluster.snapshots[REF] = {"metadata": {"uid": "another"}}
    await lab.look_twice()
    assert not lab.left


async def test_what_is_forged_restored_or_retained_is_told_and_left() -> None:
    forged = Lab()
    groups = [{**g, "requestName": OWN[0][:-6] + "aaaaaa"} for g in forged.body["spec"]["groups"]]
    forged.change(groups=groups)
    retained = Lab()
    retained.change(deletionPolicy="Retain")
    restored = Lab()
    restored.body["metadata"]["generation"] = 1
    for lab, reason in ((forged, "ContentNotBound"), (retained, "Retained"), (restored, "RestoredFromBackup")):
        assert await lab.look_twice() is None
        assert (lab.told, lab.left, lab.cluster.deleted) == (reason, OWN, [])
        assert await lab.look() is None
        assert len(lab.cluster.statuses) == 1, "told once"


async def test_another_installations_is_not_touched_nor_told() -> None:
    lab = Lab()
    lab.change(installation="zzzzzz")
    assert await lab.look_twice() is None
    assert (lab.told, lab.left) == ("", OWN)


async def test_a_storage_that_hangs_keeps_the_content_and_holds_no_worker() -> None:
    lab = Lab()
    lab.hosts["slow"].hangs = 1e6
    seconds = await lab.look()
    assert seconds is not None
    await asyncio.sleep(seconds)
    start = asyncio.get_running_loop().time()
    assert await lab.contents.reconcile(NAME) is None
    assert asyncio.get_running_loop().time() == start, "the queue's worker is free at once"
    await lab.look()
    while lab.contents._running:
        await asyncio.wait(list(lab.contents._running.values()))
    assert lab.told == "StorageUnavailable"
    assert not lab.cluster.deleted
    assert lab.left == [n for n in OWN if n in lab.hosts["slow"].held], "what answers is cleaned"
    await asyncio.sleep(RETRY_SECONDS + 1)
    assert lab.woken == [NAME]
    lab.hosts["slow"].hangs = 0.0
    await lab.look()
    assert lab.cluster.deleted


async def test_what_cannot_be_deleted_is_said_and_tried_again() -> None:
    lab = Lab()
    lab.hosts["fast"].undeletable = set(OWN)
    await lab.look_twice()
    assert lab.told == "StorageUnavailable"
    assert "the pool is read-only" in lab.cluster.statuses[-1][1]["conditions"][0]["message"]
    assert not lab.cluster.deleted
    lab.hosts["fast"].undeletable = set()
    await lab.look()
    assert lab.cluster.deleted


@pytest.mark.parametrize("stops", [True, False])
async def test_nothing_is_deleted_while_the_hypervisor_copies_into_it(
    monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    lab = Lab()
    record = records.example()
    kind = Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True)
    planned = tuple(replace(g, capabilities=kind) if g.class_name == "slow" else g for g in record.plan.groups)
    groups = {**record.groups, "slow": replace(record.groups["slow"], result=None)}
    record = replace(record, plan=replace(record.plan, groups=planned), groups=groups, outcome=None)
    body = kube_contents.to_body(record, records.REQUEST, records.INSTALLATION)
    lab.change(**body["spec"])
    stopped: list[tuple[object, ...]] = []

    async def stop(_world: World, *what: object) -> None:
        assert lab.left == OWN
        stopped.append(what)
        if not stops:
            raise HypervisorError("it does not answer", retryable=True)

    monkeypatch.setattr(backups, "stop", stop)
    await lab.look_twice()
    assert set(stopped) == {(records.REQUEST.hypervisor, record.plan.vm_uuid, records.REQUEST.uid, record.attempt)}
    assert lab.left == ([] if stops else OWN)
    assert (lab.cluster.deleted == [(NAME, "c")]) is stops


async def test_a_window_of_this_process_and_a_standby_hold_it_back() -> None:
    busy = Lab()
    busy.world.claims["vm"] = records.REQUEST.uid
    assert await busy.look_twice() is not None
    assert busy.left == OWN
    standby = Lab(leader=False)
    assert await standby.look() == STANDBY_SECONDS
    assert standby.left == OWN


async def test_a_bound_one_is_told_once_it_is_finished_and_not_before() -> None:
    lab = Lab(bound=True)
    assert await lab.look() is None
    assert lab.told == "", "its snapshot is still being made restorable"
    ready = kube_contents.to_body(
        records.replace(records.example(), ready=True, ready_time=records.REQUEST.created),
        records.REQUEST,
        records.INSTALLATION,
    )
    lab.change(**ready["spec"])
    assert await lab.look() == pytest.approx(TELL_AFTER)
    await asyncio.sleep(TELL_AFTER)
    assert await lab.look() is None
    assert lab.told == "Ready"
    assert lab.cluster.statuses[0][1]["ready"] is True
    lab.contents.seen(lab.cluster.contents_by_name[NAME])
    await lab.look()
    assert len(lab.cluster.statuses) == 1


async def test_a_watch_that_missed_the_deletion_hides_it_for_minutes_only() -> None:
    lab = Lab(bound=True)
    await lab.look()
    del lab.cluster.snapshots[REF]
    await lab.look()
    assert lab.left == OWN
    await asyncio.sleep(VERIFY_EVERY)
    seconds = await lab.look()
    assert seconds == pytest.approx(GRACE + 1)
    await asyncio.sleep(GRACE + 1)
    await lab.look()
    assert not lab.left, "although the watch still shows it"


async def test_one_that_is_gone_is_forgotten() -> None:
    lab = Lab()
    lab.cluster.contents_by_name.clear()
    await lab.look_twice()
    assert lab.contents.names() == ()
    assert await lab.contents.reconcile("never-seen") is None


async def test_what_was_to_be_retained_while_it_waited_for_its_turn_is_kept() -> None:
    lab = Lab()
    seconds = await lab.look()
    assert seconds is not None
    await asyncio.sleep(seconds)
    turn = lab.contents._turns.setdefault(tuple(sorted(lab.hosts)), asyncio.Semaphore(1))
    async with turn:  # another one's storage hangs
        await lab.contents.reconcile(NAME)
        await asyncio.sleep(60)
        lab.change(deletionPolicy="Retain")
    await lab.look()
    assert lab.left == OWN
    assert lab.told == "Retained"
