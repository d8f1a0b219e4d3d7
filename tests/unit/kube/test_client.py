"""One request: what is sent (above all: the Authorization header), and which error each answer becomes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kubernetes.aio.config import incluster_config

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, KubeError, KubeUnavailableError
from vmsnapshot_operator.kube.client import Client, Resource

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _ok(_: web.Request) -> web.StreamResponse:
    return web.json_response({"kind": "Thing"})


@dataclass
class Server:
    """A web server that remembers what it was asked."""

    requests: list[tuple[str, str, dict[str, str], str]] = field(default_factory=list)
    answer: Handler = _ok
    port: int = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs, dict(request.headers), await request.text()))
        return await self.answer(request)

    def authorizations(self) -> list[str | None]:
        return [headers.get("Authorization") for _, _, headers, _ in self.requests]


async def _serve(server: Server, context: ssl.SSLContext | None = None) -> web.AppRunner:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    server.port = runner.addresses[0][1]
    return runner


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    runner = await _serve(made)
    yield made
    await runner.cleanup()


def _kubeconfig(folder: Path, port: int, user: dict[str, str]) -> Path:
    path = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
async def client(server: Server, tmp_path: Path) -> AsyncIterator[Client]:
    async with Client(_kubeconfig(tmp_path, server.port, {"token": "t0ken"})) as made:
        yield made


async def test_a_token_of_a_kubeconfig_is_sent(server: Server, client: Client) -> None:
    assert await client.get("/api/v1/things") == {"kind": "Thing"}
    assert server.authorizations() == ["Bearer t0ken"]
    assert client.last_answer is not None


async def test_a_renewed_token_file_is_read_again(server: Server, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old")

    async def only_new(request: web.Request) -> web.StreamResponse:
        fresh = request.headers["Authorization"] == "Bearer new"
        return web.json_response({}, status=200 if fresh else 401)

    server.answer = only_new
    async with Client(_kubeconfig(tmp_path, server.port, {"tokenFile": str(token)})) as client:
        token.write_text("new")
        await client.request("GET", "/api/v1/things")
    assert server.authorizations() == ["Bearer old", "Bearer new"]


def _certificate(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key")
    return context


async def test_a_pod_sends_the_token_of_its_service_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One release of the library sent no Authorization header in a pod at all."""
    (tmp_path / "token").write_text("pod-token")
    server = Server()
    runner = await _serve(server, _certificate(tmp_path))
    try:
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
        async with Client() as client:
            await client.request("GET", "/api/v1/things")
    finally:
        await runner.cleanup()
    assert [a.lower() for a in server.authorizations() if a] == ["bearer pod-token"]


async def test_outside_of_a_pod_and_without_a_kubeconfig_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubeError, match="the pod's ServiceAccount cannot be used") as caught:
        async with Client():
            pass
    assert caught.value.reason == "KubeconfigInvalid"


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, KubeError, "KubernetesError"),
        (401, KubeError, "Unauthorized"),
        (403, KubeError, "Forbidden"),
        (404, KubeError, "NotFound"),
        (409, ConflictError, "Conflict"),
        (410, ConflictError, "Conflict"),
        (422, KubeError, "Invalid"),
        (429, KubeUnavailableError, "KubernetesUnavailable"),
        (500, KubeUnavailableError, "KubernetesUnavailable"),
        (503, KubeUnavailableError, "KubernetesUnavailable"),
    ],
)
async def test_each_refusal_becomes_one_error(
    server: Server, client: Client, status: int, error: type[KubeError], reason: str
) -> None:
    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "not like that"}, status=status)

    server.answer = refuse
    with pytest.raises(KubeError, match="not like that") as caught:
        await client.request("POST", "/api/v1/things", {})
    assert type(caught.value) is error
    assert caught.value.reason == reason
    assert "POST /api/v1/things" in caught.value.message


async def test_what_does_not_exist_is_none(server: Server, client: Client) -> None:
    async def missing(_: web.Request) -> web.StreamResponse:
        return web.Response(status=404, text="404 page not found")

    server.answer = missing
    assert await client.get("/api/v1/things/a") is None


async def test_a_test_that_does_not_hold_is_a_conflict(server: Server, client: Client) -> None:
    async def invalid(_: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "the server rejected our request"}, status=422)

    server.answer = invalid
    with pytest.raises(ConflictError):
        await client.json_patch("/api/v1/things/a", [{"op": "test", "path": "/metadata/uid", "value": "1"}])


async def test_patches_say_what_they_are(server: Server, client: Client) -> None:
    await client.apply("/api/v1/things/a/status", {"status": {}})
    await client.json_patch("/api/v1/things/a", [{"op": "remove", "path": "/x"}])
    (_, applied, first, _), (_, patched, second, text) = server.requests
    assert first["Content-Type"] == "application/apply-patch+yaml"
    assert applied.endswith("?fieldManager=vmsnapshot-operator&force=true")
    assert second["Content-Type"] == "application/json-patch+json"
    assert patched.endswith("?fieldManager=vmsnapshot-operator")
    assert json.loads(text) == [{"op": "remove", "path": "/x"}]


async def test_a_hung_server_is_left_at_the_deadline(server: Server, client: Client) -> None:
    release = asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({})

    server.answer = hang
    with pytest.raises(KubeUnavailableError, match=r"did not answer GET /api/v1/things within 0\.05 s"):
        await client.request("GET", "/api/v1/things", timeout=Seconds(0.05))
    release.set()


async def test_a_dead_server_is_unavailable(tmp_path: Path) -> None:
    server = Server()
    runner = await _serve(server)
    await runner.cleanup()
    async with Client(_kubeconfig(tmp_path, server.port, {"token": "x"})) as client:
        with pytest.raises(KubeUnavailableError, match="cannot be reached"):
            await client.request("GET", "/api/v1/things")
        assert client.last_answer is None


async def test_after_its_end_it_sends_nothing(server: Server, tmp_path: Path) -> None:
    async with Client(_kubeconfig(tmp_path, server.port, {"token": "x"})) as client:
        pass
    with pytest.raises(KubeError, match="closed"):
        await client.request("GET", "/api/v1/things")


def test_paths_are_quoted() -> None:
    thing = Resource("g.io", "v1", "things", "Thing", namespaced=True)
    assert thing.path("a/../b", "n s") == "/apis/g.io/v1/namespaces/n%20s/things/a%2F..%2Fb"
    assert (
        Resource("", "v1", "nodes", "Node", namespaced=False).path("n", subresource="status")
        == "/api/v1/nodes/n/status"
    )


@pytest.mark.parametrize(("status", "believed"), [(200, True), (404, True), (503, False)])
async def test_a_proxys_own_clock_is_not_believed(server: Server, client: Client, status: int, believed: bool) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({}, status=status, headers={"Date": "Mon, 01 Jan 2035 00:00:00 GMT"})

    server.answer = answer
    with contextlib.suppress(KubeError):
        await client.request("GET", "/x")
    assert (client.clock.now().year == 2035) is believed
