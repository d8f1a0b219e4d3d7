"""One at a time, across processes: two `up` at once, two users of one guest."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.errors import LabError


@contextmanager
def locked(path: Path, seconds: float = 3600) -> Iterator[None]:
    """Hold the lock file `path`; the folder it lies in may be deleted by a holder. Raises LabError after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:  # its folder was deleted this very moment
            continue
        try:
            if _acquired(descriptor) and _still_there(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)
        if time.monotonic() > end:
            raise LabError(f"{path} is held by another process for more than {seconds:g} s")
        time.sleep(0.05)


def _acquired(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _still_there(descriptor: int, path: Path) -> bool:
    """Whether the file locked is still the one at the path: whoever held it before may have deleted it."""
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
