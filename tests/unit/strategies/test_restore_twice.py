"""A VM that is defined twice is not set back; and one that is half done is found wherever its gate is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.machine import Machine, PowerState
from vmsnapshot_operator.core.markers import Gate
from vmsnapshot_operator.core.restoring import Claim, RestoreRequest, RestoreSeen
from vmsnapshot_operator.errors import DomainAmbiguousError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors.definitions import Defined
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.plan import definition, next_restore
from vmsnapshot_operator.plan.access import AccessRule
from vmsnapshot_operator.strategies import restore_gather, restore_search
from vmsnapshot_operator.strategies.world import LiveHypervisor

_REQUEST = RestoreRequest(uid="r1", namespace="team-a", name="back", generation=1, created=b.CREATED, snapshot="snap")
WORLD = fakes.world(installation=records.INSTALLATION)
MARKER = restore_search.marker_of(WORLD, _REQUEST, "s1")
OPEN = (
    "<domain><name>demo</name><devices><disk type='file'><driver name='qemu' type='raw'/><source file='/a'/><target dev='vda'/></disk>"
    "</devices></domain>"
)
GATED = definition.gated(OPEN, Gate(marker=MARKER, targets=("vda",), autostart=False))
OTHERS = definition.gated(
    OPEN, Gate(marker=replace(MARKER, restore="team-a/other", restore_uid="r2"), targets=("vda",), autostart=False)
)


@dataclass
class Pool:
    """Endpoints that define the VM so; `running`: the only one that is found without asking all; `silent`: another one says nothing."""

    by_endpoint: Mapping[str, str]
    running: str = ""
    silent: bool = False

    async def places(self, _ref: Ref) -> tuple[Ref, ...]:
        if self.silent:
            raise HypervisorUnreachableError("c does not answer")
        return self._all()

    def _all(self) -> tuple[Ref, ...]:
        found = [Ref(uuid="u", name="demo", endpoint=e) for e in self.by_endpoint]
        return tuple(sorted(found, key=lambda r: r.endpoint != self.running))

    async def definitions(self, _domain: str) -> tuple[Ref, ...]:
        return tuple(r for r in self._all() if self.running in ("", r.endpoint))

    async def act_on(self, endpoint: str, _what: str, act: Callable[[Any], Any], *, timeout: float) -> Defined:  # noqa: ASYNC109 - as the real one
        assert act
        assert timeout
        return Defined(
            ref=Ref(uuid="u", name="demo", endpoint=endpoint),
            xml=self.by_endpoint[endpoint],
            power=PowerState.RUNNING if self.running == endpoint else PowerState.SHUT_OFF,
            persistent=True,
            autostart=False,
            managed_save=False,
            agent_channel=False,
        )

    async def describe(self, _ref: Ref, *, ask_agent: bool) -> Machine:
        assert not ask_agent
        return b.machine(power=PowerState.SHUT_OFF, disks=())


async def looked(pool: Pool) -> tuple[str, RestoreSeen]:
    """Where the restore works, and what it sees."""
    live = LiveHypervisor(
        name="lab", client=cast("Hypervisor", pool), access=(AccessRule(namespace=(), domains=("*",)),)
    )
    world = replace(WORLD, hypervisors=cast("Any", {"lab": live}))

    async def labels(_namespace: str) -> Mapping[str, str]:
        return {}

    cast("Any", world.cluster).namespace_labels = labels
    request = replace(_REQUEST, safety=False, stop_running=True)
    found = await restore_search.find(world, request, "lab", records.example().plan.vm_uuid)
    assert found.defined is not None
    seen = RestoreSeen(request=request, marker=MARKER, record=records.example(), hypervisor="lab")
    return found.defined.ref.endpoint, await restore_gather._look(world, request, seen, records.example(), None)


@pytest.mark.parametrize("running", ["", "b"])
async def test_a_vm_that_is_defined_twice_is_not_set_back(running: str) -> None:
    """Even if both are equal, or the VM runs: off, it could be started half done where it is not gated."""
    _, seen = await looked(Pool({"a": OPEN, "b": OPEN}, running))
    assert seen.refusal is not None
    assert seen.refusal.reason == DomainAmbiguousError.reason
    assert f"defined on {'b and on a' if running else 'a and on b'}" in seen.refusal.message, "where it runs first"
    assert seen.plan is None
    _, alone = await looked(Pool({"b": OPEN}, running))
    assert alone.refusal is not None
    assert alone.refusal.reason == "DisksChanged", "it was looked at further"


@pytest.mark.parametrize("running", ["", "a"])
@pytest.mark.parametrize("first", [OPEN, OTHERS])
async def test_one_that_is_half_done_is_never_taken_for_one_that_was_not_begun(first: str, running: str) -> None:
    """Not even while it runs from the other definition."""
    where, seen = await looked(Pool({"a": first, "b": GATED}, running))
    assert (where, seen.gated) == ("b", True)
    assert (seen.problem_reason, seen.refusal) == (DomainAmbiguousError.reason, None)
    told = {c.type: c.status for c in next_restore.decide(seen, b.at(7200)).conditions}
    assert told["Stalled"] is False, "also if finalizer and status were taken away"
    assert "defined on a and on b" in seen.problem
    where, seen = await looked(Pool({"b": GATED}))
    assert (where, seen.gated, seen.problem) == ("b", True, "")
    assert isinstance(next_restore.decide(replace(seen, begun=False, finalizer=False), b.CREATED).effect, Claim)


@pytest.mark.parametrize("finalizer", [False, True])
async def test_what_may_be_half_done_behind_an_endpoint_that_does_not_answer_is_waited_for(finalizer: bool) -> None:
    """Wherever it runs meanwhile. What was not begun is refused all the same."""
    live = LiveHypervisor(name="lab", client=cast("Hypervisor", Pool({"a": OPEN}, running="a", silent=True)))
    world = replace(WORLD, hypervisors=cast("Any", {"lab": live}))
    if finalizer:
        with pytest.raises(HypervisorUnreachableError, match="c does not answer"):
            await restore_search.find(world, _REQUEST, "lab", "u", begun=True)
    else:
        found = await restore_search.find(world, _REQUEST, "lab", "u")
        assert found.defined is not None
    done = definition.restored(GATED, MARKER, genid="")
    live = replace(live, client=cast("Hypervisor", Pool({"a": done}, running="a", silent=True)))
    world = replace(WORLD, hypervisors=cast("Any", {"lab": live}))
    found = await restore_search.find(world, _REQUEST, "lab", "u", begun=finalizer)
    assert found.defined is not None, "nobody waits for the others once it is done"


async def test_a_mark_of_the_end_is_seen_wherever_the_vm_runs() -> None:
    done = definition.restored(GATED, MARKER, genid="")
    where, seen = await looked(Pool({"a": OPEN, "b": done}, running="a"))
    assert (where, seen.is_done) == ("b", True)
