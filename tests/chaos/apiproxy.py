"""Stands between the operator and the API server, and fails as networks and overloaded servers do.

Faults: answers of its own (409, 429, 500), requests that are never answered, answers that get lost after the server did what
was asked, watches that fall silent or whose connections are dead and stay open; of writes or of reads. Leases are left out, so that a fault meets the work and not the
leadership, unless everything is meant.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp
import yaml
from aiohttp import web

_WRITES = ("POST", "PUT", "PATCH", "DELETE")
_HOP = {"transfer-encoding", "connection", "content-length", "content-encoding", "keep-alive"}


@dataclass(slots=True)
class Trouble:
    """What happens to requests now. `status`, `hang`, `lose` meet the next `count` writes, or `reads` (lists, too; no watches), or
    `all_of_them`, of leases, too; `silent` meets all watches.
    """

    status: int = 0
    hang: bool = False
    lose: bool = False
    silent: bool = False
    reads: bool = False
    all_of_them: bool = False
    count: int = 0

    def concerns(self, method: str, path: str, *, watch: bool) -> bool:
        """Whether such a request fails now."""
        if self.count <= 0 or watch:
            return False
        if self.all_of_them:
            return True
        wanted = method == "GET" if self.reads else method in _WRITES
        return wanted and "/leases" not in path and "/events" not in path


class ApiProxy:
    """A proxy in a thread of its own for as long as it is entered; speaks plain HTTP on loopback.

    `withheld`: how often a watch has had something to tell since the trouble began, and did not.
    """

    def __init__(self, kubeconfig: Path) -> None:
        given = yaml.safe_load(kubeconfig.read_text())
        cluster = given["clusters"][0]["cluster"]
        self._upstream = str(cluster["server"])
        self._authority = (
            Path(cluster["certificate-authority"]).read_text() if "certificate-authority" in cluster else None
        )
        if self._authority is None:
            import base64

            self._authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        self.trouble = Trouble()
        self.wanted = 0
        self.withheld = 0
        self._deaf_before = self._watches = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._end: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._calm = asyncio.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)

    def begin(self, trouble: Trouble) -> None:
        """Fail in this way from now on."""
        self.wanted, self.withheld = trouble.count, 0
        self.trouble = trouble

    def deafen(self) -> None:
        """Let nothing more come through the watches that there are now: their connections stay open. Those that are begun later work."""
        self.withheld, self._deaf_before = 0, self._watches

    def calm(self) -> None:
        """Fail no more; what hangs is cut off."""
        self.trouble, self._deaf_before = Trouble(), 0
        self._loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self._calm.set()
        self._calm = asyncio.Event()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        context = ssl.create_default_context(cadata=self._authority)
        connector = aiohttp.TCPConnector(ssl=context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as client:
            application = web.Application(client_max_size=16 * 2**20)

            async def answer(request: web.Request) -> web.StreamResponse:
                return await self._answer(request, client)

            application.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=1, handler_cancellation=True)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._ready.set()
            await self._end.wait()
            await runner.cleanup()

    def _meets(self, request: web.Request) -> Trouble | None:
        """Whether this request is one that fails now."""
        trouble = self.trouble
        if not trouble.concerns(request.method, request.path, watch=_is_watch(request)):
            return None
        trouble.count -= 1
        return trouble

    async def _answer(self, request: web.Request, client: aiohttp.ClientSession) -> web.StreamResponse:
        trouble = self._meets(request)
        if trouble is not None and trouble.status:
            return _refusal(trouble.status)
        if trouble is not None and trouble.hang:
            await self._calm.wait()
            _cut_off(request)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in (*_HOP, "host")}
        body = await request.read()
        try:
            answer = await client.request(
                request.method, self._upstream + request.raw_path, headers=headers, data=body or None
            )
        except aiohttp.ClientError as error:
            _cut_off(request)
            raise web.HTTPBadGateway(text=str(error)) from error
        async with answer:
            if trouble is not None and trouble.lose:
                await answer.read()
                _cut_off(request)
            passed = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
            response = web.StreamResponse(status=answer.status, headers=passed)
            watch, born = _is_watch(request), self._watches
            self._watches += watch
            try:
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    if watch and (self.trouble.silent or born < self._deaf_before):
                        self.withheld += 1
                        await self._calm.wait()
                        _cut_off(request)
                        break
                    await response.write(chunk)
            except (aiohttp.ClientError, ConnectionError):
                _cut_off(request)
            return response


def _is_watch(request: web.Request) -> bool:
    return request.query.get("watch") in ("true", "1")


def _refusal(status: int) -> web.Response:
    reason = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError"}[status]
    body = {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": "injected",
        "reason": reason,
        "code": status,
    }
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.Response(status=status, text=json.dumps(body), content_type="application/json", headers=headers)


def _cut_off(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
