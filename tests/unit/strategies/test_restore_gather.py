"""A safety snapshot holds what the VM would lose, or it is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.restoring import RestoreRequest, RestoreSeen, Safety
from vmsnapshot_operator.plan import restore_plan
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


@pytest.mark.parametrize("lacks", [True, False])
def test_one_that_lacks_what_is_set_back_is_none(lacks: bool) -> None:
    """As the firmware's variables, whose class is gone by now: they are left out where no class takes them."""
    record = records.example()
    plan = restore_plan.make(record, record.plan.volumes, {v.target: v.volume for v in record.plan.volumes})
    held = record.plan.volumes[1:] if lacks else record.plan.volumes
    safety = replace(record, plan=replace(record.plan, volumes=held))
    seen = RestoreSeen(request=_REQUEST, plan=plan, safety=Safety.READY, safety_record=safety)
    judged = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=()))
    assert judged.safety is (Safety.FAILED if lacks else Safety.READY)
    assert ("does not hold vda" in judged.safety_message) is lacks
