"""Wait for something real to answer; find ports for it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.errors import LabError

_LOWEST_PORT = 15000


def until(what: str, ready: Callable[[], bool], seconds: float = 90, pause: float = 0.05) -> None:
    """Return once `ready` says so; raises LabError naming what did not come within `seconds`, and what `ready` raises."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {seconds:g} s")
        time.sleep(pause)


def free_ports(count: int) -> list[int]:
    """Return so many ports of the loopback interface that nobody listens on.

    They lie below those that the kernel gives to outgoing connections, so that a program that is started again finds its port free.
    """
    ceiling = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(_LOWEST_PORT, ceiling), k=min(2000, ceiling - _LOWEST_PORT)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise LabError(f"there are no {count} free ports between {_LOWEST_PORT} and {ceiling}")
