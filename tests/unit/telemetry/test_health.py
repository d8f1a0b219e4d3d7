"""Which heartbeats are overdue, and what the probes answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from vmsnapshot_operator.errors import SnapshotError
from vmsnapshot_operator.telemetry.health import Heartbeats, Importance
from vmsnapshot_operator.telemetry.http import TelemetryServer
from vmsnapshot_operator.telemetry.metrics import Metrics


class Clock:
    """A clock that goes on when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def heartbeats(clock: Clock) -> Heartbeats:
    return Heartbeats(clock=clock)


def test_each_kind_has_its_own_patience(heartbeats: Heartbeats, clock: Clock) -> None:
    for name in ("queue", "api server", "hypervisor lab", "watch vmsnapshots", "unheard of"):
        heartbeats.beat(name)
    assert heartbeats.stale(clock.now + 60.0) == []
    overdue = {o.name: o for o in heartbeats.stale(clock.now + 100_000.0)}
    assert {n: o.importance for n, o in overdue.items()} == {
        "queue": Importance.VITAL,
        "api server": Importance.SERVING,
        "hypervisor lab": Importance.INFORMATION,
    }
    assert overdue["queue"].age == 100_000.0
    assert [o.name for o in heartbeats.stale(clock.now + 61.0)] == ["api server", "queue"]


def test_a_noted_moment_counts_and_never_goes_back(heartbeats: Heartbeats, clock: Clock) -> None:
    heartbeats.note("hypervisor lab", None)
    assert heartbeats.ages(clock.now) == {}
    heartbeats.note("hypervisor lab", 90.0)
    heartbeats.note("hypervisor lab", 80.0)
    assert heartbeats.ages(clock.now) == {"hypervisor lab": 10.0}
    heartbeats.forget("hypervisor lab")
    heartbeats.forget("hypervisor lab")
    assert heartbeats.stale(clock.now + 1e6) == []


def test_what_never_came_is_missing(heartbeats: Heartbeats) -> None:
    assert heartbeats.missing() == ["queue"]
    heartbeats.beat("queue")
    assert heartbeats.missing() == []


@pytest.fixture
async def server(heartbeats: Heartbeats) -> AsyncIterator[TelemetryServer]:
    metrics = Metrics()
    metrics.thaw_failed(hypervisor="lab")
    async with TelemetryServer(metrics, heartbeats, host="127.0.0.1", port=0) as made:
        yield made


async def _get(server: TelemetryServer, path: str) -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{server.port}{path}") as answer:
        return answer.status, answer.headers["Content-Type"], await answer.text()


async def test_starting_is_healthy_but_not_ready(server: TelemetryServer) -> None:
    assert (await _get(server, "/healthz"))[0] == 200
    status, _, text = await _get(server, "/readyz")
    assert status == 503
    assert json.loads(text)["missing"] == ["queue"]


async def test_running_is_both(server: TelemetryServer, heartbeats: Heartbeats) -> None:
    heartbeats.beat("queue")
    heartbeats.beat("api server")
    assert (await _get(server, "/healthz"))[0] == 200
    status, _, text = await _get(server, "/readyz")
    assert status == 200
    assert json.loads(text) == {"ok": True, "stale": [], "missing": [], "ageSeconds": {"api server": 0.0, "queue": 0.0}}


async def test_a_stuck_queue_asks_for_a_restart_and_is_named(
    server: TelemetryServer, heartbeats: Heartbeats, clock: Clock
) -> None:
    heartbeats.beat("queue")
    clock.now += 90.0
    for path in ("/healthz", "/readyz"):
        status, _, text = await _get(server, path)
        assert status == 503
        assert json.loads(text)["stale"] == [
            {"name": "queue", "ageSeconds": 90.0, "allowedSeconds": 60.0, "importance": "vital"}
        ]


@pytest.mark.parametrize(("name", "ready"), [("api server", 503), ("hypervisor lab", 200)])
async def test_what_a_restart_would_not_mend_does_not_ask_for_one(
    server: TelemetryServer, heartbeats: Heartbeats, clock: Clock, name: str, ready: int
) -> None:
    heartbeats.beat(name)
    clock.now += 1000.0
    heartbeats.beat("queue")
    status, _, text = await _get(server, "/healthz")
    assert status == 200
    assert [s["name"] for s in json.loads(text)["stale"]] == [name]
    assert (await _get(server, "/readyz"))[0] == ready


async def test_metrics_are_served_as_prometheus_wants_them(server: TelemetryServer) -> None:
    status, kind, text = await _get(server, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain; version=")
    assert 'vmsnapshot_thaw_failures_total{hypervisor="lab"} 1.0' in text


async def test_a_taken_port_is_told(server: TelemetryServer, heartbeats: Heartbeats) -> None:
    with pytest.raises(SnapshotError, match="use another --telemetry-port"):
        async with TelemetryServer(Metrics(), heartbeats, host="127.0.0.1", port=server.port):
            pass
