"""The switch to overlays: how long a guest that is frozen for it is kept waiting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from tests.unit.plan import builders as b
from tests.unit.quiesce.fake_libvirt import REF, a_journal, as_any
from vmsnapshot_operator.core.journal import Phase
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import CallTimeoutError, QuiesceError
from vmsnapshot_operator.quiesce.base import Context
from vmsnapshot_operator.quiesce.hypervisor_snapshot import SWITCH_TIMEOUT, HypervisorSnapshotQuiescer

PLAN = b.plan()


@dataclass
class Domain:
    """A VM whose hypervisor does not come to an end with the switch."""

    waited: list[float] = field(default_factory=list)

    async def window(self, _ref: object) -> Domain:
        return self

    async def prepare_switch(self, _targets: object) -> str:
        return "<domainsnapshot/>"

    async def freeze(self, _mountpoints: Sequence[str], **_: object) -> int:
        return 2

    async def switch(self, _described: str, *, timeout: float, **_: object) -> None:  # noqa: ASYNC109
        self.waited.append(timeout)
        raise CallTimeoutError("no answer")

    async def thaw(self, **_: object) -> int:
        return 2


@pytest.mark.parametrize(
    ("phase", "left", "waits"),
    [
        (Phase.HOLDING, 1.5, 1.5),
        (Phase.HOLDING, 60.0, SWITCH_TIMEOUT),
        (Phase.OVERLAID, 1.5, SWITCH_TIMEOUT),
    ],
    ids=["no longer than the budget", "nor for ever", "nobody is frozen"],
)
async def test_a_frozen_guest_waits_for_the_switch_no_longer_than_its_budget(
    phase: Phase, left: float, waits: float
) -> None:
    domain = Domain()
    overlays = {str(v.volume.id): f"/pool/{v.target}" for v in PLAN.volumes}
    journal = replace(a_journal(method="HypervisorSnapshot"), phase=phase, overlays=overlays)
    quiescer = HypervisorSnapshotQuiescer(
        Context(hypervisor=as_any(domain), ref=REF, plan=PLAN, remaining=lambda: Seconds(left))
    )
    with pytest.raises(QuiesceError) as caught:
        async with quiescer.still(journal):
            raise AssertionError("nothing was switched")
    assert domain.waited == [waits]
    assert caught.value.free
