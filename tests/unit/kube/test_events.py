"""Events are best effort, and never a flood."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.unit.kube.fake_api import FakeClient
from vmsnapshot_operator.errors import KubeUnavailableError
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.kube.events import QUIET_SECONDS, Events, compose

BODY: dict[str, Any] = {
    "apiVersion": "vmsnapshot.io/v1alpha1",
    "kind": "VMSnapshot",
    "metadata": {"name": "backup", "namespace": "team-a", "uid": "u-1", "resourceVersion": "5"},
}


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def api() -> FakeClient:
    return FakeClient()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(api: FakeClient, clock: Clock) -> Events:
    cluster = Cluster(namespace="system")
    cluster.client = api
    return Events(cluster, instance="one", clock=clock)


async def test_the_same_event_is_posted_once_in_a_while(events: Events, api: FakeClient, clock: Clock) -> None:
    for _ in range(5):
        await events.emit(BODY, "Warning", "StorageUnavailable", "no answer")
        clock.now += QUIET_SECONDS / 10
    assert len(api.objects) == 1
    clock.now += QUIET_SECONDS
    await events.emit(BODY, "Warning", "StorageUnavailable", "no answer")
    assert len(api.objects) == 2


async def test_other_news_and_other_objects_are_posted(events: Events, api: FakeClient) -> None:
    await events.emit(BODY, "Normal", "SnapshotTaken", "3 disks")
    await events.emit(BODY, "Normal", "SnapshotTaken", "2 disks")
    await events.emit(BODY, "Normal", "Other", "3 disks")
    await events.emit({**BODY, "metadata": {**BODY["metadata"], "uid": "u-2"}}, "Normal", "SnapshotTaken", "3 disks")
    assert len(api.objects) == 4


async def test_a_failure_is_only_logged_and_may_be_tried_again(
    events: Events, api: FakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    def silent(method: str, path: str) -> None:
        raise KubeUnavailableError("no answer")

    api.before = silent
    with caplog.at_level("INFO"):
        await events.emit(BODY, "Normal", "SnapshotTaken", "3 disks")
    assert "was not posted" in caplog.text
    api.before = lambda _method, _path: None
    await events.emit(BODY, "Normal", "SnapshotTaken", "3 disks")
    assert len(api.objects) == 1


async def test_memory_is_bounded(events: Events, api: FakeClient, clock: Clock) -> None:
    for i in range(4200):
        await events.emit(BODY, "Normal", "Something", str(i))
    assert len(api.objects) == 4096
    clock.now += QUIET_SECONDS
    await events.emit(BODY, "Normal", "Something", "later")
    assert len(api.objects) == 4097


def test_what_an_event_says() -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    event = compose(BODY, "Normal", "SnapshotTaken", "ä" * 2000, instance="one", moment=moment)
    assert event["metadata"]["namespace"] == "team-a"
    assert event["eventTime"] == "2026-01-02T03:04:05.000006Z"
    assert event["regarding"]["uid"] == "u-1"
    assert event["reportingController"] == "vmsnapshot.io/operator"
    assert len(event["note"].encode()) <= 1024
    cluster_scoped = {**BODY, "metadata": {"name": "fast", "uid": "u-3"}}
    assert (
        compose(cluster_scoped, "Normal", "A", "b", instance="one", moment=moment)["metadata"]["namespace"] == "default"
    )
