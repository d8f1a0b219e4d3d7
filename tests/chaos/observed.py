"""The operator with an observer: each step waits until the injector, at the other end of a Unix socket, lets it go on.

`python -m tests.chaos.observed SOCKET run …` is `vmsnapshot-operator run …`, and nothing else is different. With nobody at the
other end a step goes on at once. The answer says by how many seconds the process's wall clock shall be wrong from now on.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import time_machine

from vmsnapshot_operator.cli import main
from vmsnapshot_operator.core import steps
from vmsnapshot_operator.core.steps import Moment, Step


class SocketObserver:
    """Tells the injector of each step, and waits for its answer."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._wrong = 0
        self._clock: time_machine.travel | None = None

    async def reached(self, step: Step, moment: Moment, uid: str, detail: str) -> None:
        """Return when the injector answers, or is not there."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            return
        try:
            said = {"step": step, "moment": moment, "uid": uid, "detail": detail}
            writer.write(json.dumps(said).encode() + b"\n")
            self._step_clock(int(await reader.readline() or b"0"))
        except OSError:
            return
        finally:
            writer.close()

    def _step_clock(self, seconds: int) -> None:
        """Step the wall clock; the monotonic ones go on as they did."""
        if seconds == self._wrong:
            return
        if self._clock is not None:
            self._clock.stop()
            self._clock = None
        if seconds:
            self._clock = time_machine.travel(time.time() + seconds, tick=True)
            self._clock.start()
        self._wrong = seconds


if __name__ == "__main__":
    steps.observe(SocketObserver(sys.argv[1]))
    main(sys.argv[2:])
