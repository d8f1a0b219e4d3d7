"""What is believed of a copy that the hypervisor makes: nothing but a good end that can only be its own."""

from __future__ import annotations

import pytest

from vmsnapshot_operator.core.backups import BackupSeen, Ending, RunningBackup
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan.copying import Copy, judge

OURS = frozenset({"/pool/vms-a", "/pool/vms-b"})
RUNNING, OTHER = RunningBackup(targets=OURS), RunningBackup(targets=frozenset({"/pool/vms-a"}))
GOOD, BAD = Ending(True, "", Seconds(1.0)), Ending(False, "No space left on device", Seconds(2.0))


@pytest.mark.parametrize(
    ("running", "endings", "listened", "copy", "why"),
    [
        (RUNNING, (), False, Copy.RUNNING, ""),
        (RUNNING, None, True, Copy.RUNNING, ""),
        (RUNNING, (GOOD,), True, Copy.RUNNING, ""),  # another one's end: this one goes on
        (None, (GOOD,), True, Copy.WHOLE, ""),
        (OTHER, (GOOD,), True, Copy.WHOLE, ""),
        (None, (), True, Copy.UNHEARD, "did not say"),
        (OTHER, (), True, Copy.UNHEARD, "did not say"),
        (None, (BAD,), True, Copy.LOST, "No space left on device"),
        (None, (GOOD, BAD), True, Copy.LOST, "several copies"),
        (None, (GOOD, GOOD), True, Copy.LOST, "several copies"),
        (None, None, True, Copy.LOST, "nobody was listening"),
        (None, (GOOD,), False, Copy.LOST, "nobody was listening"),
        (None, (), False, Copy.LOST, "nobody was listening"),
    ],
)
def test_what_is_known(
    running: RunningBackup | None, endings: tuple[Ending, ...] | None, listened: bool, copy: Copy, why: str
) -> None:
    found = judge(OURS, BackupSeen(running=running, endings=endings), listened=listened)
    assert found.copy is copy
    assert why in found.why
