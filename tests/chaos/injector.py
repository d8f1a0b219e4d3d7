"""Stands at the other end of the observed operator's socket: lets every step go on, but for the one that a trap waits for."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from vmsnapshot_operator.core.steps import Moment, Step


@dataclass(slots=True)
class Trap:
    """Waits for the first time that any snapshot reaches one side of a step; the operator stands there until `go`.

    `about`: the class or handle that it has to be about; empty: any. `detail` is then what it was about, `stood` for how many
    seconds the operator was kept there.
    """

    step: Step
    moment: Moment
    about: str = ""
    detail: str = ""
    stood: float = 0.0
    _since: float = 0.0
    _reached: threading.Event = field(default_factory=threading.Event)
    _going: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float) -> bool:
        """Whether the step was reached within this time."""
        return self._reached.wait(seconds)

    def go(self) -> None:
        """Let the operator go on."""
        if self._since and not self._going.is_set():
            self.stood = time.monotonic() - self._since
        self._going.set()

    @property
    def going(self) -> bool:
        """Whether the operator was let go on."""
        return self._going.is_set()

    def matches(self, step: str, moment: str, detail: str = "") -> bool:
        """Whether this is it, for the first time."""
        here = (step, moment) == (self.step, self.moment) and self.about in ("", detail)
        return here and not self._reached.is_set()

    def hold(self, detail: str = "") -> None:
        """Keep the operator there."""
        self.detail, self._since = detail, time.monotonic()
        self._reached.set()
        self._going.wait(120)


def _nothing() -> None:
    """Nothing is to be done."""


class Injector:
    """Listens on a socket as long as it is entered. `clock_seconds`: by so much the operator's wall clock shall be wrong. `stood`: for so
    many seconds traps have kept it anywhere.

    `orders`: what shall become of the next thing that the driver of a class does, by the class, told once: `lose` it is done, and the
    driver dies before it says so; `fail` it dies before; `refuse` it says that it cannot be done.

    `calls`: what is done right before the operator sends libvirt an order, by the name of the function, once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock_seconds = 0
        self.orders: dict[str, str] = {}
        self.calls: dict[str, Callable[[], None]] = {}
        self._obeyed: dict[int, int] = {}
        self.reached: Counter[tuple[str, str]] = Counter()
        self.stood = 0.0
        self._traps: list[Trap] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(64)
        threading.Thread(target=self._listen, args=(self._listener,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for trap in self._traps:
            trap.go()

    @property
    def obeyed(self) -> int:
        """To how many orders all operators together say that they have come; each counts from its start."""
        return sum(self._obeyed.values())

    @contextlib.contextmanager
    def trap(self, step: Step, moment: Moment, about: str = "") -> Iterator[Trap]:
        """Set a trap for as long as it is entered."""
        made = Trap(step, moment, about)
        self._traps.append(made)
        try:
            yield made
        finally:
            self._traps.remove(made)
            made.go()
            self.stood += made.stood

    def _listen(self, listener: socket.socket) -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(link,), daemon=True).start()

    def _answer(self, link: socket.socket) -> None:
        with link, contextlib.suppress(OSError, ValueError):
            said = json.loads(link.makefile().readline())
            if "call" in said:
                self.calls.pop(said["call"], _nothing)()
                link.sendall(b"\n")
                return
            self.reached[said["step"], said["moment"]] += 1
            self._obeyed[said["pid"]] = said["obeyed"]
            for trap in list(self._traps):
                if trap.matches(said["step"], said["moment"], said["detail"]):
                    trap.hold(said["detail"])
            answer = {"clock": self.clock_seconds, "order": self.orders.pop(said["detail"], "")}
            link.sendall(json.dumps(answer).encode() + b"\n")
