"""Watches through the proxy: silent ones, and connections that are dead and stay open. The server is one of this test."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import certifi
import pytest
import yaml

from tests.chaos.apiproxy import ApiProxy, Trouble


class Watched(BaseHTTPRequestHandler):
    """Answers with a line each 50 ms, for as long as anybody is there."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"2\r\n.\n\r\n")
                time.sleep(0.05)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[ApiProxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Watched)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    authority = tmp_path / "ca.pem"  # of some authority: nothing is encrypted here
    end = "-----END CERTIFICATE-----"
    known = Path(certifi.where()).read_text()
    authority.write_text(known[known.index("-----BEGIN") : known.index(end) + len(end)] + "\n")
    cluster = {"server": f"http://127.0.0.1:{server.server_port}", "certificate-authority": str(authority)}
    config = tmp_path / "kubeconfig"
    config.write_text(yaml.safe_dump({"clusters": [{"cluster": cluster}]}))
    try:
        with ApiProxy(config) as running:
            yield running
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def watch(proxy: ApiProxy) -> Iterator[http.client.HTTPResponse]:
    link = http.client.HTTPConnection("127.0.0.1", int(proxy.url.rpartition(":")[2]), timeout=1.0)
    with closing(link):
        link.request("GET", "/x?watch=true")
        with link.getresponse() as answer:
            yield answer


def hears(watching: http.client.HTTPResponse) -> bool:
    """Whether it goes on, once what was on its way is read: a second without a line, or an end, is none."""
    end = time.monotonic() + 2.0
    try:
        while time.monotonic() < end:
            if not watching.readline():
                return False
    except (OSError, http.client.HTTPException):
        return False
    return True


def hears_anew(proxy: ApiProxy) -> bool:
    with watch(proxy) as begun:
        return hears(begun)


@pytest.mark.parametrize("deaf", [True, False])
def test_a_watch_that_is_told_nothing(proxy: ApiProxy, deaf: bool) -> None:
    with watch(proxy) as before:
        assert before.readline() == b".\n"
        if deaf:
            proxy.deafen()
        else:
            proxy.begin(Trouble(silent=True))
        assert not hears(before)
        assert proxy.withheld > 0
        assert hears_anew(proxy) is deaf, "one that was begun later works"
        proxy.calm()
        assert hears_anew(proxy)
