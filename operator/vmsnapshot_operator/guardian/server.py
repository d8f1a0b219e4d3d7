"""The guardian's Unix socket: JSON lines from the operator of the same user. A closed connection frees what it armed.

{"op": "arm", "uri": ..., "domain": UUID, "nonce": ..., "pool": [URI, ...]}  ->  {"ok": true, "nonce": ...}
{"op": "disarm", "nonce": ...}                                               ->  {"ok": true, "nonce": ...}
{"op": "status"}                                                             ->  {"ok": true, "armed": n, ...}
anything else, or what cannot be done                                        ->  {"ok": false, "error": ...}
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.watch import RefusedError, Watch

REST_SECONDS = 0.5
_LINE_LIMIT = 64 * 1024
_POOL_LIMIT = 256


class Server:
    """Serves for ever. Each connection has a thread; what it armed is freed at once when it closes.

    `learned` is called with each URI that was not followed before. `arms`: off, it only tells its status.
    """

    def __init__(
        self, path: str, watch: Watch, learned: Callable[[str], None] = lambda _: None, *, arms: bool = True
    ) -> None:
        self._path = path
        self._watch = watch
        self._learned = learned
        self._arms = arms
        if os.path.exists(path):  # noqa: PTH110 - pathlib costs memory that this program does not need
            os.unlink(path)  # noqa: PTH108 - as above
        self._listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            self._listener.bind(path)
        finally:
            os.umask(before)
        self._listener.listen(64)

    def serve(self) -> None:
        """Accept connections."""
        say("listening", socket=self._path)
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError as error:
                say("cannot accept", why=str(error))  # out of file descriptors, say: what is held is freed all the same
                time.sleep(REST_SECONDS)
                continue
            threading.Thread(target=self._talk, args=(link,), name="talk", daemon=True).start()

    def _talk(self, link: socket.socket) -> None:
        armed: set[str] = set()
        try:
            if not same_user(link):
                say("refused", why="the peer is another user")
                return
            with link, link.makefile("rb") as lines:
                while line := lines.readline(_LINE_LIMIT):
                    link.sendall(json.dumps(self.answer(line, armed)).encode() + b"\n")
        except OSError as error:
            say("connection lost", why=str(error))
        finally:
            link.close()
            for nonce in armed:
                self._watch.release(nonce, "the process that armed it is gone")

    def answer(self, line: bytes, armed: set[str]) -> dict[str, Any]:
        """Do what a line asks and return the answer; `armed` are the nonces that this connection keeps armed."""
        try:
            question = json.loads(line)
            match question["op"]:
                case "arm" | "disarm" if not self._arms:
                    return {"ok": False, "error": "this guardian only watches"}
                case "arm":
                    uri, nonce = str(question["uri"]), str(question["nonce"])
                    for each in (uri, *map(str, question.get("pool", ())))[:_POOL_LIMIT]:
                        if self._watch.follow(each):
                            self._learned(each)
                    self._watch.arm(uri, str(question["domain"]), nonce)
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
            return {"ok": False, "error": f"not understood: {error!r}"}


def same_user(link: socket.socket) -> bool:
    """Whether the other end is this very user, or root."""
    credentials = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (os.geteuid(), 0)
