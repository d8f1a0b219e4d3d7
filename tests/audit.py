"""Count what was asked of the API server, from its own audit log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})
OPERATOR = "system:serviceaccount:vmsnapshot-system:vmsnapshot-operator"


@dataclass(frozen=True, slots=True)
class Asked:
    """One answered request."""

    time: datetime
    user: str
    verb: str
    resource: str
    name: str
    code: int

    @property
    def is_write(self) -> bool:
        """Whether it changes something."""
        return self.verb in WRITES


def requests(log: Path, *, user: str = OPERATOR, start: int = 0, leases: bool = False) -> Iterator[Asked]:
    """Read the requests of one user that were answered, from this offset of the log; watches left out.

    Either those of `leases`, which are renewed all the time, whether there is anything to do or not; or all the others.
    """
    with log.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            entry = json.loads(line)
            what = entry.get("objectRef") or {}
            if entry["stage"] != "ResponseComplete" or entry["user"].get("username") != user:
                continue
            if (what.get("resource") == "leases") is not leases or entry["verb"] == "watch" or not what:
                continue
            resource = what.get("resource", "") + (f"/{what['subresource']}" if what.get("subresource") else "")
            yield Asked(
                time=datetime.fromisoformat(entry["requestReceivedTimestamp"]),
                user=user,
                verb=entry["verb"],
                resource=resource,
                name=what.get("name", ""),
                code=int((entry.get("responseStatus") or {}).get("code", 0)),
            )


def of_snapshots(log: Path, *, start: int = 0) -> list[Asked]:
    """What the operator asked concerning VMSnapshots, their contents and events."""
    kinds = ("vmsnapshots", "vmsnapshotcontents", "events")
    return [r for r in requests(log, start=start) if r.resource.split("/")[0] in kinds]
