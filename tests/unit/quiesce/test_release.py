"""A VM that is known to be free is not asked for it again; one that is not known to be is freed first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from tests.unit.quiesce.fake_libvirt import REF, a_journal
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.errors import QuiesceError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.quiesce import base
from vmsnapshot_operator.quiesce.base import release
from vmsnapshot_operator.quiesce.guest_agent import GuestAgentQuiescer
from vmsnapshot_operator.quiesce.hypervisor_snapshot import HypervisorSnapshotQuiescer
from vmsnapshot_operator.quiesce.pause import PauseQuiescer

OURS = a_journal(1)


@dataclass
class Hosts:
    """A hypervisor: which windows ended well, and what became of the journal."""

    freed: set[str] = field(default_factory=set)
    journal: Journal | None = OURS

    def was_freed(self, nonce: str) -> bool:
        return nonce in self.freed

    async def clear_journal(self, _ref: Ref, _nonce: str) -> None:
        self.journal = None

    async def update_journal(self, _ref: Ref, journal: Journal, *, held: bool) -> bool:
        assert held, "what was written down since by another one stays"
        self.journal = journal
        return True


@pytest.fixture(autouse=True)
def _dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can be freed any more."""

    async def let_go(_self: object, _journal: Journal) -> None:
        raise QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)

    methods = {
        Method.GUEST_AGENT: GuestAgentQuiescer,
        Method.HYPERVISOR_SNAPSHOT: HypervisorSnapshotQuiescer,
        Method.PAUSE: PauseQuiescer,
    }
    for method in methods.values():
        monkeypatch.setattr(method, "let_go", let_go)
    monkeypatch.setattr(base, "find", lambda name: methods[Method(name)])


METHODS = [Method.GUEST_AGENT, Method.HYPERVISOR_SNAPSHOT, Method.PAUSE]


@pytest.mark.parametrize("method", METHODS)
async def test_an_agent_that_died_after_the_thaw_is_not_waited_for(method: Method) -> None:
    hosts, journal = Hosts(freed={OURS.nonce}), replace(OURS, method=method)
    await release(cast("Hypervisor", hosts), REF, journal)
    left = replace(journal, phase=Phase.OVERLAID) if method is Method.HYPERVISOR_SNAPSHOT else None
    assert hosts.journal == left


@pytest.mark.parametrize("method", METHODS)
async def test_what_is_not_known_to_be_free_keeps_its_journal(method: Method) -> None:
    hosts, journal = Hosts(freed={"another"}), replace(OURS, method=method)
    with pytest.raises(QuiesceError):
        await release(cast("Hypervisor", hosts), REF, journal)
    assert hosts.journal == OURS
