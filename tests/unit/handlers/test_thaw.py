"""Freeing by hand where the VM does not play along; on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.errors import AgentError, HypervisorError, HypervisorUnreachableError, QuiesceError
from vmsnapshot_operator.handlers import thaw
from vmsnapshot_operator.hypervisors.domains import Ref, Sighting
from vmsnapshot_operator.quiesce import base

pytestmark = pytest.mark.looptime

REF = Ref(uuid="00000000-0000-0000-0000-000000000001", name="demo", endpoint="host")


def a_journal(method: str = "GuestAgent") -> Journal:
    return Journal(installation="abc123", owner_uid="u", nonce="0" * 32, attempt=1, method=method, budget=30.0)


@dataclass
class FakeDomain:
    """A guest's agent: what each thaw and each question for the state answers, the last one for ever."""

    thaws: list[int | HypervisorError] = field(default_factory=lambda: [0])
    states: list[AgentState] = field(default_factory=lambda: [AgentState.THAWED])
    sent: int = 0

    async def thaw(self, timeout: float, ours: str = "") -> int:  # noqa: ASYNC109 - as the real one
        self.sent += 1
        answer = self.thaws.pop(0) if len(self.thaws) > 1 else self.thaws[0]
        if isinstance(answer, HypervisorError):
            raise answer
        return answer

    async def status(self, timeout: float) -> AgentState:  # noqa: ASYNC109 - as the real one
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@dataclass
class FakeHypervisor:
    """One domain."""

    power: PowerState = PowerState.RUNNING
    agent: AgentState | None = AgentState.THAWED
    journal: Journal | None = None
    journal_error: str = ""
    domain: FakeDomain = field(default_factory=FakeDomain)

    async def find(self, domain: str) -> Ref:
        if domain not in (REF.name, REF.uuid):
            raise HypervisorUnreachableError("host: not connected")
        return REF

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        agent = Agent(state=self.agent) if self.agent is not None else None
        facts = {"journal": self.journal, "journal_error": self.journal_error}
        return Machine(name=ref.name, uuid=ref.uuid, endpoint="host", run_id=1, power=self.power, agent=agent, **facts)

    async def window(self, ref: Ref) -> FakeDomain:
        return self.domain

    async def sweep(self) -> list[Sighting]:
        if self.journal is None and not self.journal_error:
            return []
        return [Sighting(ref=REF, journal=self.journal, problem=self.journal_error)]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> float:
        return asyncio.get_running_loop().time()

    monkeypatch.setattr(base, "clock", now)
    monkeypatch.setattr(thaw, "clock", now)


async def one(client: FakeHypervisor, domain: str = "demo", *, force: bool = False) -> tuple[str, bool]:
    lines, ok = await thaw._one(client, domain, force=force)  # type: ignore[arg-type]  # a stand-in
    return " | ".join(lines), ok


async def test_force_goes_on_until_the_agent_says_thawed() -> None:
    # A hook that fails makes a thaw raise; a freeze that timed out is executed after a thaw that found nothing.
    answers: list[int | HypervisorError] = [AgentError("hook failed"), 0, 3]
    domain = FakeDomain(thaws=answers, states=[AgentState.FROZEN, AgentState.FROZEN, AgentState.THAWED])
    said, ok = await one(FakeHypervisor(agent=AgentState.FROZEN, domain=domain), force=True)
    assert (ok, domain.sent) == (True, 3)
    assert "says thawed" in said


async def test_a_thaw_that_raised_and_thawed_is_enough() -> None:
    domain = FakeDomain(thaws=[AgentError("hook failed")])
    said, ok = await one(FakeHypervisor(agent=AgentState.FROZEN, domain=domain), force=True)
    assert (ok, domain.sent) == (True, 1), said


async def test_an_agent_that_never_answers_is_given_up_and_said() -> None:
    domain = FakeDomain(thaws=[AgentError("no answer")], states=[AgentState.SILENT])
    start = asyncio.get_running_loop().time()
    said, ok = await one(FakeHypervisor(agent=AgentState.SILENT, domain=domain), force=True)
    assert not ok
    assert "only a reset of the VM is left" in said
    assert asyncio.get_running_loop().time() - start == pytest.approx(thaw.PATIENCE, abs=5)


@pytest.mark.parametrize(
    ("power", "ok"), [(PowerState.SHUT_OFF, True), (PowerState.PAUSED, False), (PowerState.SUSPENDED, False)]
)
async def test_a_vm_that_does_not_run_cannot_be_thawed(power: PowerState, ok: bool) -> None:
    client = FakeHypervisor(power=power, agent=None)
    said, freed = await one(client, force=True)
    assert freed is ok
    assert "does not run" in said
    assert client.domain.sent == 0


async def test_a_journal_that_cannot_be_read_is_never_called_free() -> None:
    client = FakeHypervisor(journal_error="the journal has version 9")
    said, ok = await one(client)
    assert not ok
    assert "--force thaws it" in said
    said, ok = await one(client, force=True)
    assert ok
    assert "version 9" in said
    assert "was left" in said


async def test_all_tells_of_journals_that_cannot_be_read() -> None:
    lines, ok = await thaw._all(FakeHypervisor(journal_error="the journal has version 9"), force=False)  # type: ignore[arg-type]  # a stand-in
    assert not ok
    assert "--force thaws it" in lines[-1]


async def test_a_journal_is_tried_again_until_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def never(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)

    monkeypatch.setattr(thaw, "release", never)
    lines, ok = await thaw._all(FakeHypervisor(journal=a_journal()), force=False)  # type: ignore[arg-type]  # a stand-in
    assert not ok
    assert tries > 10
    assert "not free yet, run this again" in lines[-1]


async def test_a_method_that_is_not_installed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said, ok = await one(FakeHypervisor(journal=a_journal("Sorcery")))
    assert not ok
    assert 'quiesce method "Sorcery" is not installed' in said


async def test_a_host_that_does_not_answer_is_said() -> None:
    assert await one(FakeHypervisor(), "other") == ("other: host: not connected", False)
