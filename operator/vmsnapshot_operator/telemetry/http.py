"""The port for probes and scrapes: `/metrics`, `/healthz` (restart me), `/readyz` (I serve). Read-only and without secrets."""

from __future__ import annotations

from typing import Self

from aiohttp import web

from vmsnapshot_operator.errors import SnapshotError
from vmsnapshot_operator.telemetry.health import Heartbeats, Importance
from vmsnapshot_operator.telemetry.metrics import CONTENT_TYPE, Metrics

_SHUTDOWN_SECONDS = 1.0


class TelemetryServer:
    """Serves while entered (an async context manager). `port` 0 picks a free one; it can be read afterwards."""

    def __init__(self, metrics: Metrics, heartbeats: Heartbeats, *, host: str, port: int) -> None:
        self._metrics = metrics
        self._heartbeats = heartbeats
        self._host = host
        self.port = port
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/metrics", self._serve_metrics)
        app.router.add_get("/healthz", self._serve_health)
        app.router.add_get("/readyz", self._serve_readiness)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_SECONDS)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self.port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise SnapshotError(
                f"cannot listen on {self._host}:{self.port} for probes and metrics: {error.strerror}; use another --telemetry-port",
                reason="PortInUse",
            ) from error
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serve_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _serve_health(self, _: web.Request) -> web.Response:
        return self._answer({Importance.VITAL}, missing=[])

    async def _serve_readiness(self, _: web.Request) -> web.Response:
        return self._answer({Importance.VITAL, Importance.SERVING}, missing=self._heartbeats.missing())

    def _answer(self, deciding: set[Importance], missing: list[str]) -> web.Response:
        now = self._heartbeats.now()
        overdue = self._heartbeats.stale(now)
        fatal = [o.name for o in overdue if o.importance in deciding]
        body = {
            "ok": not fatal and not missing,
            "stale": [
                {
                    "name": o.name,
                    "ageSeconds": round(o.age, 1),
                    "allowedSeconds": o.allowed,
                    "importance": o.importance.value,
                }
                for o in overdue
            ],
            "missing": missing,
            "ageSeconds": {name: round(age, 1) for name, age in self._heartbeats.ages(now).items()},
        }
        return web.json_response(body, status=200 if body["ok"] else 503)
