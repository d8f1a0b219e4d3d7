"""What the watch last showed of VMSnapshots that have not come to an end: since when, and what they left on storage.

For metrics alone: nothing is decided by it. Not what an end is (`plan.conditions` says that by `Reconciling`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from vmsnapshot_operator.plan.conditions import RECONCILING


class Doing(StrEnum):
    """What has not come to its end."""

    TAKING = "taking"
    DELETING = "deleting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One VMSnapshot: what is under way (None: nothing) and since when; how many names it still has on storage that should go."""

    doing: Doing | None
    since: datetime
    leftovers: int


def standing(body: Mapping[str, Any]) -> Standing:
    """Read a VMSnapshot. One without any condition was not looked at yet: it is under way."""
    meta, status = body["metadata"], body.get("status") or {}
    leftovers = len(status.get("leftovers") or ())
    if deleted := meta.get("deletionTimestamp"):
        return Standing(doing=Doing.DELETING, since=_moment(deleted), leftovers=leftovers)
    ended = any(c.get("type") == RECONCILING and c.get("status") == "False" for c in status.get("conditions") or ())
    return Standing(
        doing=None if ended else Doing.TAKING, since=_moment(meta["creationTimestamp"]), leftovers=leftovers
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


class Unfinished:
    """The VMSnapshots of the watch that are under way or have leftovers, by UID."""

    def __init__(self) -> None:
        self._known: dict[str, Standing] = {}

    def seen(self, body: Mapping[str, Any]) -> None:
        """Take what the watch shows."""
        found = standing(body)
        if found.doing is None and not found.leftovers:
            self._known.pop(body["metadata"]["uid"], None)
        else:
            self._known[body["metadata"]["uid"]] = found

    def gone(self, uid: str) -> None:
        """It exists no more."""
        self._known.pop(uid, None)

    def oldest(self, doing: Doing, now: datetime) -> float:
        """Seconds since the oldest was asked for; 0 if there is none. `now` is the API server's time, as theirs is."""
        return max(
            (max(0.0, (now - s.since).total_seconds()) for s in self._known.values() if s.doing is doing), default=0.0
        )

    def leftovers(self) -> int:
        """How many names are still on storage, or storage systems cannot be asked, of all VMSnapshots together."""
        return sum(s.leftovers for s in self._known.values())
