"""What became of a copy that the hypervisor makes: under way, whole, or lost. Pure; nothing is called whole that is not proved.

libvirt tells how a backup ended once, by an event, and not of which backup. So an end proves something only to a process that
listened from before the copy began, or from when it saw it running, and only if it is the only one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmsnapshot_operator.core.backups import BackupSeen


class Copy(StrEnum):
    """What is known of a copy."""

    RUNNING = "Running"
    WHOLE = "Whole"
    UNHEARD = "Unheard"  # it is over, and its end may be heard of in a moment
    LOST = "Lost"


@dataclass(frozen=True, slots=True)
class Finding:
    """`why` in words for the user, where it is lost."""

    copy: Copy
    why: str = ""


def judge(targets: frozenset[str], seen: BackupSeen, *, listened: bool) -> Finding:
    """Return what is known of the copy into exactly these files.

    `listened`: the endings are those since before it began, or since it was seen running.
    """
    if seen.running is not None and seen.running.targets == targets:
        return Finding(Copy.RUNNING)
    if not listened or seen.endings is None:
        return Finding(Copy.LOST, "the hypervisor copies no more, and nobody was listening when it ended")
    if not seen.endings:
        return Finding(Copy.UNHEARD, "the hypervisor copies no more, and did not say how it ended")
    if len(seen.endings) > 1:
        return Finding(Copy.LOST, "several copies of this VM have ended, which the hypervisor does not tell apart")
    ending = seen.endings[0]
    return Finding(Copy.WHOLE) if ending.whole else Finding(Copy.LOST, f"the copy failed: {ending.said}")
