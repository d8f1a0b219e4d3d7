"""The conversation with the agent in the guest, against a socket that plays its part."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import LabError
from tests.lab.channel import Channel


class Agent(threading.Thread):
    """Answers one conversation with what it was given; before that it says what an earlier conversation left in the port."""

    def __init__(self, path: Path, answers: list[dict[str, Any]], before: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.asked: list[dict[str, Any]] = []
        self._answers, self._before = answers, before
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.start()

    def run(self) -> None:
        link, _ = self._listener.accept()
        with self._listener, link, link.makefile("rb") as lines:
            link.sendall(self._before)
            for line in lines:
                question = json.loads(line.lstrip(b"\xff"))
                if question["execute"] == "guest-sync-delimited":
                    link.sendall(b"\xff" + json.dumps({"return": question["arguments"]["id"]}).encode() + b"\n")
                else:
                    self.asked.append(question)
                    link.sendall(json.dumps(self._answers.pop(0)).encode() + b"\n")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "c.sock"


def ended(code: int, out: str = "", err: str = "") -> list[dict[str, Any]]:
    texts = {"out-data": base64.b64encode(out.encode()).decode(), "err-data": base64.b64encode(err.encode()).decode()}
    return [{"return": {"pid": 7}}, {"return": {"exited": True, "exitcode": code, **texts}}]


def test_what_a_program_wrote_is_returned_whatever_was_left_in_the_port(path: Path) -> None:
    agent = Agent(path, ended(0, "42\n"), before=b'{"return": {"pid": 1}}\n{"half a li')
    with Channel(path) as channel:
        assert channel.execute(["cat", "/run/x"], 5) == "42\n"
    assert agent.asked[0]["arguments"] == {"path": "cat", "arg": ["/run/x"], "capture-output": True}


def test_a_program_that_fails_is_quoted(path: Path) -> None:
    Agent(path, ended(2, err="no such file"))
    with Channel(path) as channel, pytest.raises(LabError, match="exit 2: no such file"):
        channel.execute(["cat", "/nothing"], 5)


def test_a_program_that_does_not_end(path: Path) -> None:
    Agent(path, [{"return": {"pid": 7}}, {"return": {"exited": False}}])
    with Channel(path) as channel, pytest.raises(LabError, match="did not end within 0 s"):
        channel.execute(["sleep", "9"], 0)


def test_an_error_of_the_agent_is_told(path: Path) -> None:
    Agent(path, [{"error": {"desc": "the agent is in frozen state"}}])
    with Channel(path) as channel, pytest.raises(LabError, match="frozen state"):
        channel.execute(["true"], 5)


def test_no_guest_no_channel(path: Path) -> None:
    with pytest.raises(LabError, match="cannot be opened"), Channel(path):
        pass
