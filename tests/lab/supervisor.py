"""The parent of all components: starts and stops them on command, and takes them along when it ends, however it ends.

Runs as `python -m tests.lab supervise`; spoken to (`control.py`) with one JSON line each over a Unix socket in the state folder.
It does not know what a component is for, nor whether it is healthy.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.lab import paths

MARKER = "VMSNAPSHOT_LAB"
"""Set to the state folder in the environment of everything that a laboratory starts: so it is found again."""
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """To be called in a new child: it is killed when the one that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_ending", True))
        (self._state / "supervisor.pid").write_text(str(os.getpid()))
        held = _post_sentry(self._state)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(16)
            listener.settimeout(0.2)
            while not self._ending:
                for child in self._children.values():
                    child.poll()
                self._serve_one(listener)
        for name in reversed(list(self._children)):
            self._stop(name, signal.SIGKILL)
        path.unlink(missing_ok=True)
        os.close(held)

    def _serve_one(self, listener: socket.socket) -> None:
        try:
            link, _ = listener.accept()
        except TimeoutError:
            return
        with link, link.makefile("r") as lines:
            link.settimeout(10)
            try:
                answer = self._answer(json.loads(lines.readline()))
                link.sendall(json.dumps(answer).encode() + b"\n")
            except (OSError, ValueError) as error:  # a client that went away must not end the laboratory
                print(f"a question could not be answered: {error}", file=sys.stderr, flush=True)

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        name = command.get("name", "")
        match command["op"]:
            case "start":
                self._specs[name] = command
                return self._start(name)
            case "again":
                return self._start(name) if name in self._specs else {"error": f"{name} was never started"}
            case "stop":
                self._stop(name, signal.SIGTERM)
            case "end":
                self._ending = True
        return {
            "pids": {n: c.pid for n, c in self._children.items() if c.poll() is None},
            "ended": {n: c.returncode for n, c in self._children.items() if c.poll() is not None},
        }

    def _start(self, name: str) -> dict[str, Any]:
        child = self._children.get(name)
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGCONT)
            return {"pid": child.pid}
        spec = self._specs[name]
        log = self._state / "log" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            try:
                child = subprocess.Popen(
                    spec["argv"],
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
                    cwd=self._state,
                )
            except OSError as error:
                return {"error": f"{name} cannot be started: {error}"}
        self._children[name] = child
        return {"pid": child.pid}

    def _stop(self, name: str, sig: signal.Signals, seconds: float = 20) -> None:
        child = self._children.pop(name, None)
        if child is None or child.poll() is not None:
            return
        child.send_signal(signal.SIGCONT)  # a stopped process hears nothing else
        child.send_signal(sig)
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _post_sentry(state: Path) -> int:
    """Start the one who, when this process is gone, ends what is no child of it: QEMU is libvirtd's and outlives it, mounts outlive
    all. A shell that waits at a pipe: it costs no memory and dies of nothing. Returns the end of the pipe that is held.
    """
    waits, held = os.pipe()
    script = 'read -r _; exec "$0" -m tests.lab clear "$1"'
    with (state / "supervisor.log").open("ab") as log:
        subprocess.Popen(
            ["/bin/sh", "-c", script, sys.executable, str(os.getpid())],
            stdin=waits,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=paths.REPOSITORY,
        )
    os.close(waits)
    return held
