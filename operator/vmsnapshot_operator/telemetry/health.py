"""Heartbeats: which parts of the operator have shown signs of life lately, and which are overdue. Not how it is asked (`http`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum


class Importance(Enum):
    """What an overdue heartbeat means."""

    VITAL = "vital"  # the process cannot work any more: restart it
    SERVING = "serving"  # it cannot work now, and a restart would not help: not ready
    INFORMATION = "information"  # one of many things it works with is silent: shown, nothing more


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """How old the heartbeats whose names begin so may be, in seconds (None: any age)."""

    prefix: str
    importance: Importance
    allowed: float | None


EXPECTATIONS = (
    Expectation(prefix="queue", importance=Importance.VITAL, allowed=60.0),
    Expectation(prefix="api server", importance=Importance.SERVING, allowed=60.0),
    # One host that is down must not restart what serves all the others.
    Expectation(prefix="hypervisor ", importance=Importance.INFORMATION, allowed=120.0),
    # Events come when something changes, so their age says nothing. That a watch is dead is found out by kopf alone: it begins anew one
    # that was silent for `watching.inactivity_timeout`, since the API server sends a bookmark each minute.
    Expectation(prefix="watch ", importance=Importance.INFORMATION, allowed=None),
)
_UNKNOWN = Expectation(prefix="", importance=Importance.INFORMATION, allowed=None)

REQUIRED = ("queue",)
"""Without these heartbeats the process has not finished starting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overdue:
    """One heartbeat that is older than it may be; seconds."""

    name: str
    age: float
    allowed: float
    importance: Importance


class Heartbeats:
    """The last sign of life of each named part, by `clock` (seconds that never go back; the default is `time.monotonic`)."""

    def __init__(
        self,
        expectations: Sequence[Expectation] = EXPECTATIONS,
        required: Sequence[str] = REQUIRED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expectations = expectations
        self._required = required
        self._clock = clock
        self._beats: dict[str, float] = {}

    def now(self) -> float:
        """Read the clock of the heartbeats."""
        return self._clock()

    def beat(self, name: str) -> None:
        """A part is alive now."""
        self._beats[name] = self._clock()

    def note(self, name: str, moment: float | None) -> None:
        """A part was alive at `moment` (a reading of the same clock); None: it never was, as far as anybody knows."""
        if moment is not None:
            self._beats[name] = max(moment, self._beats.get(name, moment))

    def forget(self, name: str) -> None:
        """A part is gone, and nobody waits for it any more."""
        self._beats.pop(name, None)

    def ages(self, now: float) -> dict[str, float]:
        """Return the age of each heartbeat, in seconds."""
        return {name: max(0.0, now - beat) for name, beat in sorted(self._beats.items())}

    def stale(self, now: float) -> list[Overdue]:
        """Return the heartbeats that are older than they may be."""
        found = []
        for name, age in self.ages(now).items():
            expected = self._expectation(name)
            if expected.allowed is not None and age > expected.allowed:
                found.append(Overdue(name=name, age=age, allowed=expected.allowed, importance=expected.importance))
        return found

    def missing(self) -> list[str]:
        """Return the required heartbeats that never came: the process is still starting."""
        return [name for name in self._required if name not in self._beats]

    def _expectation(self, name: str) -> Expectation:
        return next((e for e in self._expectations if name.startswith(e.prefix)), _UNKNOWN)
