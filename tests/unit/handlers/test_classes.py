"""The status of classes, on a clock that the event loop fakes: what is written, when, and by whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.handlers import fakes
from vmsnapshot_operator.core.driver import Capabilities, CutKind
from vmsnapshot_operator.errors import DriverUnavailableError
from vmsnapshot_operator.handlers import classes
from vmsnapshot_operator.handlers.classes import LOOK_EVERY, PROBE_EVERY, RETRY_EVERY, Classes
from vmsnapshot_operator.plan.orphans import Findings, Orphan

pytestmark = pytest.mark.looptime


class FakeDriverHost(fakes.FakeHost):
    """A process that answers probes; `probes` counts them."""

    probes = 0
    error: DriverUnavailableError | None = None

    async def start(self) -> None:
        return

    async def close(self) -> None:
        return

    async def capabilities(self, *, timeout: float) -> Capabilities:  # noqa: ASYNC109 - as the real one
        type(self).probes += 1
        if self.error is not None:
            raise self.error
        return Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True)


class Lab:
    """One class over stand-ins; the watch shows each status as it was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = fakes.FakeCluster()
        self.leader = True
        FakeDriverHost.probes, FakeDriverHost.error = 0, None
        monkeypatch.setattr(classes, "DriverHost", lambda *_, **__: FakeDriverHost())
        self.classes = Classes(self.cluster, leading=lambda: self.leader)  # type: ignore[arg-type]  # a stand-in
        self.body: dict[str, Any] = {
            "metadata": {"name": "files", "uid": "c", "generation": 1},
            "spec": {"driver": "toy", "match": [{"type": "file"}]},
        }

    async def look(self) -> float:
        before = len(self.cluster.statuses)
        seconds = await self.classes.reconcile(self.body)
        if len(self.cluster.statuses) > before:
            self.body = {**self.body, "status": self.cluster.statuses[-1][1]}
        return seconds

    @property
    def status(self) -> dict[str, Any]:
        return self.body.get("status") or {}


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


async def test_numbers_are_written_at_most_once_a_minute(lab: Lab) -> None:
    assert await lab.look() == LOOK_EVERY
    assert "cutMilliseconds" not in lab.status
    for _ in range(50):
        lab.classes.note_cut("files", 0.012)
        await lab.look()
        await asyncio.sleep(1)
    assert len(lab.cluster.statuses) == 1
    await asyncio.sleep(10)
    await lab.look()
    assert lab.status["cutMilliseconds"] == {"p50": 12, "p95": 12, "samples": 50}
    assert len(lab.cluster.statuses) == 2
    assert FakeDriverHost.probes == 1, "a look is no probe"


async def test_a_class_is_probed_now_and_then_and_when_it_changes(lab: Lab) -> None:
    for _ in range(11):
        await lab.look()
        await asyncio.sleep(PROBE_EVERY / 10)
    assert FakeDriverHost.probes == 2
    lab.body = {**lab.body, "spec": {**lab.body["spec"], "priority": 5}}
    await lab.look()
    assert FakeDriverHost.probes == 3


async def test_trouble_is_told_at_once_and_numbers_stay(lab: Lab) -> None:
    await lab.look()
    for _ in range(2):
        lab.classes.note_cut("files", 1.0)
    lab.classes.note_findings("files", Findings(held=2, orphans=(Orphan(name="vms-x", why="nobody knows it"),)))
    await asyncio.sleep(61)
    await lab.look()
    assert (lab.status["snapshotsHeld"], lab.status["orphans"], lab.status["orphansFound"]) == (2, ["vms-x"], 1)
    FakeDriverHost.error = DriverUnavailableError("it does not answer")
    await asyncio.sleep(PROBE_EVERY)
    assert await lab.look() == RETRY_EVERY
    assert lab.status["conditions"][0]["reason"] == "DriverUnavailable"
    assert lab.status["orphans"] == ["vms-x"]
    assert lab.status["cutMilliseconds"]["samples"] == 2
    assert "capabilities" not in lab.status


async def test_a_new_process_leaves_what_it_has_not_seen_yet(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.body["status"] = {
        "cutMilliseconds": {"p50": 1, "p95": 2, "samples": 3},
        "orphans": ["vms-x"],
        "orphansFound": 1,
    }
    await lab.look()
    assert lab.status["cutMilliseconds"]["samples"] == 3
    assert lab.status["orphans"] == ["vms-x"]
    lab.classes.note_findings("files", Findings())
    await asyncio.sleep(61)
    await lab.look()
    assert "orphans" not in lab.status
    assert lab.status["orphansFound"] == 0


async def test_only_the_leader_tells_and_a_standby_is_ready_to(lab: Lab) -> None:
    lab.leader = False
    assert await lab.look() == RETRY_EVERY
    assert not lab.cluster.statuses
    assert lab.classes.all()[0].ready
    lab.leader = True
    assert await lab.look() == LOOK_EVERY
    assert lab.status["conditions"][0]["status"] == "True"
    assert FakeDriverHost.probes == 1


async def test_an_object_that_cannot_be_understood_is_told(lab: Lab) -> None:
    lab.body["spec"] = {"driver": "toy"}
    assert await lab.look() == RETRY_EVERY
    assert lab.status["conditions"][0]["reason"] == "InvalidObject"
