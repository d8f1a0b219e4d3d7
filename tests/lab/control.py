"""The other end of the supervisor: used by everybody who starts, asks for or hurts a component."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.supervisor import MARKER
from tests.lab.wait import until

Healthy = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Control:
    """Speaks to the supervisor of the laboratory at `state`."""

    state: Path

    def alive(self) -> bool:
        """Whether a supervisor answers."""
        try:
            self.pids()
        except LabError:
            return False
        return True

    def launch(self) -> None:
        """Start a supervisor in a session of its own, and wait for it."""
        self.state.mkdir(parents=True, exist_ok=True)
        supervise = [sys.executable, "-m", "tests.lab", "supervise"]
        with (self.state / "supervisor.log").open("ab") as log:
            # `setsid --fork` ends at once: the supervisor is nobody's child, and no zombie of whoever started it.
            subprocess.run(
                ["setsid", "--fork", *supervise],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "LAB_STATE": str(self.state), MARKER: str(self.state)},
                cwd=paths.REPOSITORY,
                check=True,
                timeout=60,
            )
        try:
            until("the laboratory's supervisor answers", self.alive, 60)
        except LabError as error:
            raise LabError(f"{error}:\n{tail(self.state / 'supervisor.log')}") from error

    def pids(self) -> dict[str, int]:
        """Number of each component that runs. Raises LabError if no supervisor answers."""
        return dict(self._ask({"op": "pids"})["pids"])

    def start(self, name: str, argv: list[str]) -> None:
        """Start a component unless it runs; one that is stopped by a signal goes on."""
        self._ask({"op": "start", "name": name, "argv": argv})

    def again(self, name: str) -> None:
        """Start a component as it was started before."""
        self._ask({"op": "again", "name": name})

    def stop(self, name: str) -> None:
        """End a component: SIGTERM, and SIGKILL after 20 s."""
        self._ask({"op": "stop", "name": name})

    def healthy(self, name: str, healthy: Healthy, seconds: float = 90) -> None:
        """Wait until a component is; raises LabError with its last words as soon as it ended instead."""

        def check() -> bool:
            if healthy():
                return True
            if name not in self.pids():
                raise LabError(f"{name} ended:\n{tail(self.log(name))}")
            return False

        until(f"{name} is healthy (log: {self.log(name)})", check, seconds)

    def log(self, name: str) -> Path:
        """What a component wrote."""
        return self.state / "log" / f"{name}.log"

    def end(self) -> None:
        """End the supervisor and all its children; it need not run."""
        known = self.state / "supervisor.pid"
        pid = known.read_text() if known.exists() else "none"
        try:
            self._ask({"op": "end"})
        except LabError:
            return
        end = time.monotonic() + 60
        while ((self.state / "supervisor.sock").exists() or Path(f"/proc/{pid}").exists()) and time.monotonic() < end:
            time.sleep(0.02)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.settimeout(60)
                link.connect(str(self.state / "supervisor.sock"))
                link.sendall(json.dumps(question).encode() + b"\n")
                answer: dict[str, Any] = json.loads(link.makefile().readline())
        except (OSError, ValueError) as error:
            raise LabError(f"no laboratory runs at {self.state} ({error}): run `make lab-up`") from error
        if "error" in answer:
            raise LabError(answer["error"])
        return answer


@dataclass(frozen=True, slots=True)
class Component:
    """One real program of the laboratory, for tests that hurt it."""

    name: str
    control: Control
    check: Healthy

    @property
    def pid(self) -> int:
        """Its number; raises LabError if it does not run."""
        pids = self.control.pids()
        if self.name not in pids:
            raise LabError(f"{self.name} does not run")
        return pids[self.name]

    @property
    def running(self) -> bool:
        """Whether there is such a process; it may be stopped by a signal."""
        return self.name in self.control.pids()

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send it a signal; after SIGKILL return when it is gone."""
        pid = self.pid
        os.kill(pid, sig)
        if sig == signal.SIGKILL:
            until(f"{self.name} is gone", lambda: self.control.pids().get(self.name) != pid, 30, 0.01)

    def start(self) -> None:
        """Start it as it was, or let it go on if it is stopped; return when it is healthy."""
        self.control.again(self.name)
        self.control.healthy(self.name, self.check)

    def stop(self) -> None:
        """End it."""
        self.control.stop(self.name)

    def healthy(self) -> bool:
        """Whether it does its work now."""
        return self.running and self.check()


def tail(path: Path, characters: int = 2000) -> str:
    """The end of a log."""
    try:
        return path.read_text(errors="replace")[-characters:].strip() or "(it wrote nothing)"
    except FileNotFoundError:
        return "(it wrote nothing)"
