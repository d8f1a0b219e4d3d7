"""Wait for something real to answer."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from tests.lab.errors import LabError


def until(what: str, ready: Callable[[], bool], seconds: float = 90, pause: float = 0.05) -> None:
    """Return once `ready` says so; raises LabError naming what did not come."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


def free_ports(count: int) -> list[int]:
    """Return so many different ports of the loopback interface that are free now."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [p.getsockname()[1] for p in probes]
    finally:
        for probe in probes:
            probe.close()
