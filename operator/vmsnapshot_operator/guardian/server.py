"""The guardian's Unix socket: JSON lines from the operator of the same user. A closed connection frees what it armed."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from typing import Any

from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.watch import RefusedError, Watch

_LINE_LIMIT = 64 * 1024


class Server:
    """Serves until `stop`. Each connection has a thread; what it armed is freed at once when it closes."""

    def __init__(self, path: str, watch: Watch) -> None:
        self._path = path
        self._watch = watch
        self._ended = threading.Event()
        if os.path.exists(path):  # noqa: PTH110 - pathlib costs memory that this program does not need
            os.unlink(path)  # noqa: PTH108 - as above
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            self._listener.bind(path)
        finally:
            os.umask(before)
        self._listener.listen(8)
        self._listener.settimeout(0.5)

    def serve(self) -> None:
        """Accept connections until `stop`."""
        say("listening", socket=self._path)
        while not self._ended.is_set():
            try:
                link, _ = self._listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._talk, args=(link,), daemon=True).start()
        self._listener.close()

    def stop(self) -> None:
        """End `serve` within a second."""
        self._ended.set()

    def _talk(self, link: socket.socket) -> None:
        armed: set[str] = set()
        try:
            if not _same_user(link):
                say("refused", why="the peer is another user")
                return
            with link, link.makefile("rb") as lines:
                while line := lines.readline(_LINE_LIMIT):
                    link.sendall(json.dumps(self._answer(line, armed)).encode() + b"\n")
        except OSError as error:
            say("connection lost", why=str(error))
        finally:
            link.close()
            for nonce in armed:
                self._watch.release(nonce, "the process that armed it is gone")

    def _answer(self, line: bytes, armed: set[str]) -> dict[str, Any]:
        try:
            question = json.loads(line)
            match question["op"]:
                case "arm":
                    nonce = str(question["nonce"])
                    self._watch.arm(str(question["uri"]), str(question["domain"]), nonce)
                    armed.add(nonce)
                    return {"ok": True, "nonce": nonce}
                case "disarm":
                    nonce = str(question["nonce"])
                    armed.discard(nonce)
                    self._watch.disarm(nonce)
                    return {"ok": True, "nonce": nonce}
                case "status":
                    return {"ok": True, **self._watch.status()}
                case other:
                    return {"ok": False, "error": f"unknown op {other!r}"}
        except RefusedError as error:
            return {"ok": False, "error": str(error)}
        except (ValueError, KeyError, TypeError) as error:
            return {"ok": False, "error": f"not understood: {error}"}


def _same_user(link: socket.socket) -> bool:
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (os.geteuid(), 0)
