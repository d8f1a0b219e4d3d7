"""The parent of all components: starts, stops and watches them by command, and takes them along when it ends.

Runs as `python -m tests.lab supervise`; spoken to with one JSON line each over a Unix socket in the state folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.lab.errors import LabError

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """To be called in a child process: it ends when the one that started it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Supervisor:
    """Child processes by name."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._specs: dict[str, dict[str, Any]] = {}
        self._ending = False

    def serve(self) -> None:
        """Answer commands until `end`, or a signal."""
        path = self._state / "supervisor.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(8)
        listener.settimeout(0.5)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_ending", True))
        while not self._ending:
            for child in self._children.values():
                child.poll()
            try:
                link, _ = listener.accept()
            except TimeoutError:
                continue
            with link, link.makefile("r") as lines:
                answer = self._answer(json.loads(lines.readline()))
                link.sendall(json.dumps(answer).encode() + b"\n")
        for name in reversed(list(self._children)):
            self._stop(name)
        path.unlink(missing_ok=True)

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        name = command.get("name", "")
        match command["op"]:
            case "start":
                self._specs[name] = command
                return self._start(name)
            case "again":
                return self._start(name) if name in self._specs else {"error": f"{name} was never started"}
            case "stop":
                self._stop(name)
            case "end":
                self._ending = True
        return {"pids": {n: c.pid for n, c in self._children.items() if c.poll() is None}}

    def _start(self, name: str) -> dict[str, Any]:
        child = self._children.get(name)
        if child is not None and child.poll() is None:
            return {"pid": child.pid}
        spec = self._specs[name]
        log = self._state / "log" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            child = subprocess.Popen(
                spec["argv"],
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **spec.get("env", {})},
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
                cwd=self._state,
            )
        self._children[name] = child
        return {"pid": child.pid}

    def _stop(self, name: str, seconds: float = 15) -> None:
        child = self._children.pop(name, None)
        if child is None or child.poll() is not None:
            return
        child.send_signal(signal.SIGCONT)
        child.terminate()
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Control:
    """The other end: used by everybody who works with the laboratory."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._path = state / "supervisor.sock"

    def alive(self) -> bool:
        """Whether a supervisor answers."""
        try:
            self.pids()
        except LabError:
            return False
        return True

    def launch(self) -> None:
        """Start a supervisor of its own session, and wait for it."""
        self._state.mkdir(parents=True, exist_ok=True)
        # Not subprocess: this one outlives us on purpose, and nobody will ever wait for it.
        log = os.open(self._state / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.posix_spawn(
                sys.executable,
                [sys.executable, "-m", "tests.lab", "supervise"],
                {**os.environ, "LAB_STATE": str(self._state), "PYTHONPATH": str(Path(__file__).parents[2])},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
            )
        finally:
            os.close(log)
        end = time.monotonic() + 30
        while not self.alive():
            if time.monotonic() > end:
                raise LabError(f"the laboratory's supervisor does not answer; see {self._state}/supervisor.log")
            time.sleep(0.05)

    def pids(self) -> dict[str, int]:
        """Number of each running component."""
        return dict(self._ask({"op": "pids"})["pids"])

    def start(self, name: str, argv: list[str], env: dict[str, str] | None = None) -> int:
        """Start a component unless it runs; return its number."""
        return int(self._ask({"op": "start", "name": name, "argv": argv, "env": env or {}})["pid"])

    def again(self, name: str) -> int:
        """Start a component as it was started before."""
        return int(self._ask({"op": "again", "name": name})["pid"])

    def stop(self, name: str) -> None:
        """End a component."""
        self._ask({"op": "stop", "name": name})

    def end(self) -> None:
        """End the supervisor and everything it started."""
        try:
            self._ask({"op": "end"})
        except LabError:
            return
        end = time.monotonic() + 60
        while self._path.exists() and time.monotonic() < end:
            time.sleep(0.05)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(60)
                link.connect(str(self._path))
                link.sendall(json.dumps(question).encode() + b"\n")
                answer: dict[str, Any] = json.loads(link.makefile().readline())
        except (OSError, ValueError) as error:
            raise LabError(f"the laboratory is not up ({error}): run `make lab-up`") from error
        if "error" in answer:
            raise LabError(answer["error"])
        return answer
