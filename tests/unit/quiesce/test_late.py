"""Who comes late frees nothing that another one holds by now, and resumes nothing that he has not paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack

import libvirt
import pytest

from tests.unit.quiesce.fake_libvirt import REF, FakeDomain, FakeHypervisor, a_journal, as_any, error
from vmsnapshot_operator.core.evidence import Evidence
from vmsnapshot_operator.core.machine import AgentState
from vmsnapshot_operator.errors import NotPermittedError, QuiesceError
from vmsnapshot_operator.hypervisors import agent
from vmsnapshot_operator.quiesce.base import Context
from vmsnapshot_operator.quiesce.guest_agent import GuestAgentQuiescer
from vmsnapshot_operator.quiesce.pause import PauseQuiescer

OURS, THEIRS = a_journal(1), a_journal(2)


@pytest.fixture(autouse=True)
def _agent(monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze_state(domain: FakeDomain, _seconds: int) -> tuple[AgentState, str]:
        return (AgentState.FROZEN if domain.frozen else AgentState.THAWED), ""

    monkeypatch.setattr(agent, "freeze_state", freeze_state)


class Permit:
    """The limit of an attempt."""

    why = ""

    def __call__(self) -> str:
        return self.why


def taken_over(domain: FakeDomain) -> None:
    """What a successor does: it thaws, removes our journal, and freezes under its own."""
    domain.frozen, domain.journal = domain.filesystems, THEIRS


async def test_an_instance_that_was_stopped_does_not_thaw_its_successors_window() -> None:
    domain, permit = FakeDomain(journal=OURS), Permit()
    quiescer = GuestAgentQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF, permit=permit))
    async with quiescer.still(OURS) as window:
        taken_over(domain)
        permit.why = "another instance may have taken over"
    assert domain.frozen == domain.filesystems, "the successor's window was thawed"
    assert window.free
    assert window.evidence.freed_by_other


async def test_an_instance_that_was_stopped_thaws_what_is_still_its_own() -> None:
    domain, permit = FakeDomain(journal=OURS), Permit()
    quiescer = GuestAgentQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF, permit=permit))
    async with quiescer.still(OURS) as window:
        permit.why = "another instance may have taken over"
    assert domain.frozen == 0
    assert window.free


@pytest.mark.parametrize("left", [OURS, None], ids=["its journal", "no journal"])
async def test_recovery_thaws(left: None) -> None:
    domain = FakeDomain(frozen=2, journal=left)
    await GuestAgentQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF)).let_go(OURS)
    assert domain.frozen == 0


@pytest.mark.parametrize("method", [GuestAgentQuiescer, PauseQuiescer])
async def test_recovery_leaves_a_vm_that_changed_hands(method: type[GuestAgentQuiescer | PauseQuiescer]) -> None:
    domain = FakeDomain(frozen=2, journal=THEIRS)
    domain.paused()
    await method(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF)).let_go(OURS)
    assert (domain.frozen, domain.power) == (2, libvirt.VIR_DOMAIN_PAUSED)


@pytest.mark.parametrize(
    ("method", "call", "reason"),
    [(GuestAgentQuiescer, "freeze", "FreezeFailed"), (PauseQuiescer, "suspend", "PauseFailed")],
)
async def test_a_vm_that_would_not_stand_still_was_asked_all_the_same(
    method: type[GuestAgentQuiescer | PauseQuiescer], call: str, reason: str
) -> None:
    """What was seen until then goes with the error: when it was asked, and how long it took to have it free again."""
    domain = FakeDomain(journal=OURS)

    def refuse() -> None:
        raise error(libvirt.VIR_ERR_INTERNAL_ERROR)

    domain.before[call] = refuse
    quiescer = method(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF))
    with pytest.raises(QuiesceError) as caught:
        async with quiescer.still(OURS):
            raise AssertionError("it stood still")
    assert (caught.value.reason, caught.value.free) == (reason, True)
    seen = caught.value.evidence
    assert isinstance(seen, Evidence)
    assert (seen.frozen_time is not None, seen.thawed_time is not None, seen.still_from) == (True, True, None)


class Pauses(list[float]):
    """The pauses between tries; `then`: what happens in the third."""

    then: Callable[[], object] = staticmethod(lambda: None)

    async def sleep(self, seconds: float) -> None:
        self.append(seconds)
        if len(self) == 3:
            self.then()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    found = Pauses()
    monkeypatch.setattr(asyncio, "sleep", found.sleep)
    return found


async def test_it_is_not_over_while_a_freeze_of_ours_may_still_come(pauses: Pauses) -> None:
    hypervisor = FakeHypervisor(FakeDomain(frozen=2, journal=THEIRS))
    with ExitStack() as calls:
        calls.enter_context(hypervisor.outstanding.holding(REF.uuid))
        pauses.then = calls.close
        await GuestAgentQuiescer(Context(hypervisor=as_any(hypervisor), ref=REF)).let_go(OURS)
    assert len(pauses) == 3


async def test_a_vm_that_was_paused_by_somebody_is_not_paused_nor_resumed() -> None:
    domain = FakeDomain(journal=OURS)
    domain.paused()
    quiescer = PauseQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF))
    with pytest.raises(NotPermittedError, match="paused by somebody else"):
        async with quiescer.still(OURS):
            raise AssertionError("it was taken for held by us")
    assert domain.calls == []


async def test_a_pause_is_resumed() -> None:
    domain = FakeDomain(journal=OURS)
    async with PauseQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF)).still(OURS) as window:
        assert domain.power == libvirt.VIR_DOMAIN_PAUSED
    assert domain.calls == ["suspend", "resume"]
    assert window.free
    assert not window.evidence.freed_by_other


async def test_a_vm_that_an_error_has_paused_since_is_left_so() -> None:
    domain = FakeDomain(journal=OURS)
    domain.paused(libvirt.VIR_DOMAIN_PAUSED_IOERROR)
    await PauseQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF)).let_go(OURS)
    assert domain.calls == []


async def test_what_libvirt_holds_for_a_job_is_waited_for(pauses: Pauses) -> None:
    domain = FakeDomain(journal=OURS)
    domain.paused(libvirt.VIR_DOMAIN_PAUSED_MIGRATION)
    pauses.then = domain.paused
    await PauseQuiescer(Context(hypervisor=as_any(FakeHypervisor(domain)), ref=REF)).let_go(OURS)
    assert len(pauses) == 3
    assert domain.calls == ["resume"]


@pytest.mark.parametrize(("code", "may_come"), [(libvirt.VIR_ERR_RPC, True), (libvirt.VIR_ERR_OPERATION_FAILED, False)])
async def test_an_order_whose_connection_broke_may_still_come_and_one_that_was_refused_may_not(
    code: int, may_come: bool
) -> None:
    """libvirtd hangs, the connection is given up; when it goes on, it may carry out what it had in its line by then."""

    def broken() -> None:
        raise error(code)

    domain = FakeDomain(journal=OURS, before={"freeze": broken})
    hypervisor = FakeHypervisor(domain)
    with pytest.raises(QuiesceError) as caught:
        async with GuestAgentQuiescer(Context(hypervisor=as_any(hypervisor), ref=REF)).still(OURS):
            pass
    assert caught.value.free
    assert hypervisor.outstanding.lost(REF.uuid) is may_come
    async with GuestAgentQuiescer(Context(hypervisor=as_any(hypervisor), ref=REF)).still(THEIRS):
        assert not hypervisor.outstanding.lost(REF.uuid), "it is an order of the next window that counts then"
