"""What planning makes of a VM of which nobody can tell where it is."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from vmsnapshot_operator.core.planning import Patience
from vmsnapshot_operator.errors import (
    DomainAmbiguousError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
)
from vmsnapshot_operator.strategies import gather
from vmsnapshot_operator.strategies.world import LiveHypervisor


@pytest.mark.parametrize(
    ("error", "reason", "patience"),
    [
        (DomainAmbiguousError("demo", ["a", "b"], "it is off"), "DomainAmbiguous", Patience.SETTLE),
        (DomainGoneError("none has it"), "DomainNotFound", Patience.SETTLE),
        (HypervisorUnreachableError("b is silent"), "HypervisorUnreachable", Patience.WAIT),
    ],
)
async def test_each_error_is_a_refusal_of_its_own(
    monkeypatch: pytest.MonkeyPatch, error: HypervisorError, reason: str, patience: Patience
) -> None:
    async def plan_on(*_: object) -> Any:
        raise error

    monkeypatch.setattr(gather, "_plan_on", plan_on)
    world = fakes.world(installation=records.INSTALLATION)
    world.hypervisors = cast("Any", {"lab": LiveHypervisor(name="lab", client=cast("Any", object()))})
    planned = await gather._planning(world, records.REQUEST, world.memory("u"), None)
    assert planned.refusal is not None
    assert (planned.refusal.reason, planned.refusal.patience) == (reason, patience)
    if isinstance(error, DomainAmbiguousError):
        assert "demo is defined on a and on b, and it is off. Undefine it" in planned.refusal.message
