"""A copy of disks that the hypervisor itself makes while the VM runs (a backup job), as it is seen. Not what follows (`plan.copying`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vmsnapshot_operator.core.volumes import Seconds


class Ending(NamedTuple):
    """The end of a backup of a domain. `at`: when this process heard of it; `said`: libvirt's words if it is not `whole`."""

    whole: bool
    said: str
    at: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningBackup:
    """The one backup job that a domain may have: the files that it copies into, and how many bytes of how many."""

    targets: frozenset[str]
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupSeen:
    """`running`: the job that was seen, if any. `endings`: those heard of since a certain moment; None: one may have been missed."""

    running: RunningBackup | None = None
    endings: tuple[Ending, ...] | None = None
