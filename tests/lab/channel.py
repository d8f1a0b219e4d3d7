"""The laboratory's own agent channel into a guest: programs can be run there whatever the main agent does."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
from pathlib import Path
from typing import Any, Self

from tests.lab.errors import LabError

WAIT_SECONDS = 20


class Channel:
    """One conversation with the agent at the other end of a virtio-serial port. QEMU serves one at a time: another one waits."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._buffer = b""

    def __enter__(self) -> Self:
        self._socket.settimeout(WAIT_SECONDS)
        try:
            self._socket.connect(str(self._path))
        except OSError as error:
            self._socket.close()
            raise LabError(f"the guest's channel {self._path} cannot be opened: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def execute(self, argv: list[str], timeout: float) -> str:
        """Run a program and return what it wrote; raises LabError if it fails or does not end."""
        self._sync()
        arguments = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        pid = self._ask("guest-exec", arguments)["pid"]
        end = time.monotonic() + timeout
        while not (state := self._ask("guest-exec-status", {"pid": pid}))["exited"]:
            if time.monotonic() > end:
                raise LabError(f"{argv} in the guest did not end within {timeout:g} s")
            time.sleep(0.02)
        out = base64.b64decode(state.get("out-data", "")).decode(errors="replace")
        if state.get("exitcode"):
            words = base64.b64decode(state.get("err-data", "")).decode(errors="replace")
            raise LabError(f"{argv} in the guest: exit {state['exitcode']}: {words or out}")
        return out

    def _sync(self) -> None:
        """Drop what an earlier conversation left in the port."""
        number = random.randrange(1 << 30)  # noqa: S311 - no secret
        self._send("guest-sync-delimited", {"id": number}, b"\xff")
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            line = self._line()
            try:
                if json.loads(line.rpartition(b"\xff")[2]).get("return") == number:
                    return
            except ValueError:
                continue
        raise LabError(f"the guest's agent at {self._path} does not answer")

    def _ask(self, command: str, arguments: dict[str, Any]) -> Any:
        self._send(command, arguments)
        answer = json.loads(self._line().lstrip(b"\xff"))
        if "error" in answer:
            raise LabError(f"{command}: {answer['error']}")
        return answer["return"]

    def _send(self, command: str, arguments: dict[str, Any], before: bytes = b"") -> None:
        self._socket.sendall(before + json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            try:
                data = self._socket.recv(65536)
            except TimeoutError as error:
                raise LabError(f"the guest's agent at {self._path} does not answer") from error
            if not data:
                raise LabError(f"the guest's channel {self._path} was closed")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line
