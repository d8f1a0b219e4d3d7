"""A safety snapshot holds what the VM would lose, or it is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.restoring import RestoreRequest, RestoreSeen, Safety
from vmsnapshot_operator.strategies import restore_gather

_REQUEST = RestoreRequest(uid="r1", namespace="team-a", name="back", generation=1, created=b.CREATED, snapshot="snap")


@pytest.mark.parametrize(
    ("power", "now", "safety"),
    [
        (PowerState.SHUT_OFF, "1", Safety.READY),
        (PowerState.SHUT_OFF, "2", Safety.FAILED),
        (PowerState.RUNNING, "2", Safety.READY),
    ],
)
def test_a_vm_that_ran_after_its_safety_snapshot_is_found_by_its_disks(
    power: PowerState, now: str, safety: Safety
) -> None:
    record = records.example()
    first = record.plan.volumes[0]
    layer = replace(first.volume.writable, fingerprint="1")
    taken = replace(first, volume=replace(first.volume, writable=layer))
    record = replace(record, plan=replace(record.plan, volumes=(taken,)))
    seen = RestoreSeen(request=_REQUEST, safety=Safety.READY, safety_record=record)
    machine = b.machine(power=power, disks=(b.disk("vda", replace(layer, fingerprint=now)),))
    judged = restore_gather._judge_safety(seen, machine)
    assert judged.safety is safety
    assert ("vda was written to" in judged.safety_message) is (safety is Safety.FAILED)
