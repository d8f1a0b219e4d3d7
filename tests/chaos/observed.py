"""The operator with an observer: each step waits until the injector, at the other end of a Unix socket, lets it go on.

`python -m tests.chaos.observed SOCKET run …` is `vmsnapshot-operator run …`, and nothing else is different. With nobody at the
other end a step goes on at once.
"""

from __future__ import annotations

import asyncio
import json
import sys

from vmsnapshot_operator.cli import main
from vmsnapshot_operator.core import steps
from vmsnapshot_operator.core.steps import Moment, Step


class SocketObserver:
    """Tells the injector of each step, and waits for its answer."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def reached(self, step: Step, moment: Moment, uid: str, detail: str) -> None:
        """Return when the injector answers, or is not there."""
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
        except OSError:
            return
        try:
            said = {"step": step, "moment": moment, "uid": uid, "detail": detail}
            writer.write(json.dumps(said).encode() + b"\n")
            await reader.readline()
        except OSError:
            return
        finally:
            writer.close()


if __name__ == "__main__":
    steps.observe(SocketObserver(sys.argv[1]))
    main(sys.argv[2:])
