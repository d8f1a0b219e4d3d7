"""The API server's own clock, as its answers tell it: deadlines count from when it says that an object was created.

Our own wall clock may be wrong by any amount, and may be set at any moment; between two answers a clock goes on that never is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

TOLERANCE = timedelta(seconds=2)
"""The header tells whole seconds and is as old as the answer: a smaller difference is no news."""


def boottime() -> float:
    """Read CLOCK_BOOTTIME: it is never set, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> datetime:
    """Read this machine's wall clock."""
    return datetime.now(UTC)


class ServerClock:
    """`note` each answer's Date header, ask `now`. Before the first answer it is this machine's wall clock."""

    def __init__(self, elapsed: Callable[[], float] = boottime, own: Callable[[], datetime] = wall) -> None:
        self._elapsed = elapsed
        self._own = own
        self._zero: datetime | None = None

    def note(self, date: str | None) -> None:
        """Take an answer's Date header (RFC 9110); one that is absent or cannot be read is no news."""
        try:
            told = parsedate_to_datetime(date or "").astimezone(UTC)
        except ValueError:
            return
        own = self._own()
        if timedelta(0) <= own - told < TOLERANCE:
            told = own  # it agrees, and knows the part of the second: what is told to people is of one clock then
        zero = told - timedelta(seconds=self._elapsed())
        if self._zero is None or abs(zero - self._zero) > TOLERANCE:
            self._zero = zero

    def now(self) -> datetime:
        """Return the time at the API server."""
        if self._zero is None:
            return self._own()
        return self._zero + timedelta(seconds=self._elapsed())
