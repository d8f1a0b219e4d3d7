"""Freeing by hand where the VM does not play along; on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Self

import pytest
from click.testing import CliRunner

from vmsnapshot_operator.cli import main
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.errors import AgentError, HypervisorError, HypervisorUnreachableError, QuiesceError
from vmsnapshot_operator.handlers import thaw
from vmsnapshot_operator.hypervisors.domains import Ref, Sighting
from vmsnapshot_operator.quiesce import base

pytestmark = pytest.mark.looptime

REF = Ref(uuid="00000000-0000-0000-0000-000000000001", name="demo", endpoint="host")
OTHER = "00000000-0000-0000-0000-000000000002"


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
    others: list[Sighting] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    blind: bool = False

    async def find(self, domain: str) -> Ref:
        if found := [s.ref for s in self.others if s.ref.uuid == domain]:
            return found[0]
        if domain not in (REF.name, REF.uuid):
            raise HypervisorUnreachableError("host: not connected")
        return REF

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        if self.blind:
            raise HypervisorUnreachableError("host: 48 calls have not returned; its libvirt hangs")
        agent = Agent(state=self.agent) if self.agent is not None else None
        facts = {"journal": self.journal, "journal_error": self.journal_error}
        return Machine(name=ref.name, uuid=ref.uuid, endpoint="host", run_id=1, power=self.power, agent=agent, **facts)

    async def read_journal(self, ref: Ref) -> Journal | None:
        if self.journal_error:
            raise HypervisorError(self.journal_error)
        return self.journal

    async def window(self, ref: Ref) -> FakeDomain:
        return self.domain

    async def sweep(self) -> list[Sighting]:
        if self.journal is None and not self.journal_error:
            return self.others
        return [Sighting(ref=REF, journal=self.journal, problem=self.journal_error), *self.others]


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def now() -> float:
        return asyncio.get_running_loop().time()

    monkeypatch.setattr(base, "clock", now)
    monkeypatch.setattr(thaw, "clock", now)


async def one(client: FakeHypervisor, domain: str = "demo", *, force: bool = False) -> tuple[str, bool]:
    lines: list[str] = []
    ok = await thaw._one(client, domain, force=force, say=lines.append)  # type: ignore[arg-type]  # a stand-in
    return " | ".join(lines), ok


async def everyone(client: FakeHypervisor, ours: str = "abc123", *, force: bool = False) -> tuple[list[str], bool]:
    lines: list[str] = []
    ok = await thaw._all(client, "kvm1", ours, force=force, say=lines.append)  # type: ignore[arg-type]  # a stand-in
    return lines, ok


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of VMs that were freed by their journals."""
    names: list[str] = []

    async def release(client: FakeHypervisor, ref: Ref, journal: Journal) -> None:
        names.append(ref.name)

    monkeypatch.setattr(thaw, "release", release)
    return names


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


async def test_of_all_those_are_freed_that_we_hold_and_it_is_said_which_first(freed: list[str]) -> None:
    client = FakeHypervisor(journal=a_journal())
    foreign = Sighting(
        ref=replace(REF, uuid=OTHER, name="theirs"), journal=replace(a_journal(), installation="zzzzzz"), problem=""
    )
    client.others = [foreign]
    lines, ok = await everyone(client)
    assert (ok, freed) == (True, ["demo"])
    assert lines[0] == "demo: held by installation abc123, object u, attempt 1; being freed"
    assert lines[1].startswith("theirs: left: held by installation zzzzzz"), "said before anything is done"
    assert "--domain theirs frees it all the same" in lines[1]
    assert lines[-1] == "demo: thawed, as its journal says; the journal is removed"


async def test_of_all_any_are_freed_if_nobody_knows_which_are_ours(freed: list[str]) -> None:
    lines, ok = await everyone(FakeHypervisor(journal=replace(a_journal(), installation="zzzzzz")), "")
    assert (ok, freed) == (True, ["demo"]), lines


async def test_of_all_others_are_freed_by_force_only(freed: list[str]) -> None:
    client = FakeHypervisor(journal=replace(a_journal(), installation="zzzzzz"))
    _, ok = await everyone(client)
    assert (ok, freed) == (True, []), "nothing of ours is held"
    _, ok = await everyone(client, force=True)
    assert (ok, freed) == (True, ["demo"])


async def test_a_vm_that_goes_on_on_overlays_is_not_held_and_its_journal_stays(freed: list[str]) -> None:
    overlaid = replace(a_journal("HypervisorSnapshot"), overlays={"v": "/pool/ovl"}, phase=Phase.COLLAPSING)
    lines, ok = await everyone(FakeHypervisor(journal=overlaid))
    assert ok
    assert lines == ["demo: not held: it goes on, on overlays of installation abc123, object u, attempt 1"]
    said, ok = await one(FakeHypervisor(journal=overlaid))
    assert (ok, freed) == (True, [])
    assert "not held: its snapshot's overlays are committed by the operator" in said


async def test_a_vm_that_is_held_with_overlays_keeps_a_journal_that_tells_of_them(freed: list[str]) -> None:
    held = replace(a_journal("HypervisorSnapshot"), overlays={"v": "/pool/ovl"})
    said, ok = await one(FakeHypervisor(journal=held))
    assert (ok, freed) == (True, ["demo"])
    assert "thawed, as its journal says; the journal now says that it is on overlays" in said


async def test_all_tells_of_journals_that_cannot_be_read() -> None:
    client = FakeHypervisor(journal_error="the journal has version 9")
    lines, ok = await everyone(client)
    assert (lines, ok, client.domain.sent) == (
        ["demo: left: the journal has version 9; --domain demo --force thaws it"],
        False,
        0,
    )
    lines, ok = await everyone(client, force=True)
    assert (ok, client.domain.sent) == (True, 1), lines


async def test_an_endpoint_that_does_not_answer_is_said_and_not_called_free() -> None:
    lines, ok = await everyone(FakeHypervisor(problems={"host2": "no route"}))
    assert not ok
    assert "host2 does not answer, its VMs were not seen: no route" in lines[0]


async def test_a_vm_that_cannot_be_freed_delays_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeHypervisor(journal=a_journal())
    client.others = [Sighting(ref=replace(REF, uuid=OTHER, name="quick"), journal=a_journal(), problem="")]
    moments: dict[str, float] = {}

    async def release(_client: FakeHypervisor, ref: Ref, _journal: Journal) -> None:
        if ref.name == "demo":
            raise QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)
        moments[ref.name] = asyncio.get_running_loop().time()

    monkeypatch.setattr(thaw, "release", release)
    lines, ok = await everyone(client)
    assert not ok
    assert moments == {"quick": 0.0}
    assert any("demo: not free yet, run this again" in line for line in lines)
    assert asyncio.get_running_loop().time() == pytest.approx(thaw.PATIENCE, abs=2)


async def test_a_vm_that_cannot_be_looked_at_is_freed_all_the_same(freed: list[str]) -> None:
    """A disk that hangs hangs every look at it, and of very many looks at once some are refused."""
    client = FakeHypervisor(journal=a_journal(), blind=True)
    client.others = [Sighting(ref=replace(REF, uuid=OTHER, name="other"), journal=a_journal(), problem="")]
    lines, ok = await everyone(client)
    assert (ok, sorted(freed)) == (True, ["demo", "other"]), lines
    said, ok = await one(client)
    assert (ok, freed.count("demo")) == (True, 2), said


async def test_which_installation_is_ours_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def __init__(self, **_: object) -> None:
            return

        async def __aenter__(self) -> Self:
            await asyncio.sleep(3600)
            return self

        async def __aexit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(thaw, "Cluster", Silent)
    said: list[str] = []
    assert not await thaw._installation(None, "ns", said.append)
    assert "no answer within 3 s" in said[0]
    assert asyncio.get_running_loop().time() == thaw.ID_TIMEOUT


def test_help_teaches() -> None:
    shown = CliRunner().invoke(main, ["thaw", "--help"])
    assert shown.exit_code == 0
    for taught in ("--hypervisor NAME|URI", "--domain", "--installation", "--force", "qemu+tls://", "Exit status"):
        assert taught in shown.output
    assert CliRunner().invoke(main, ["thaw", "--domain", "demo"]).exit_code == 2, "a hypervisor must be named"


async def test_a_journal_is_tried_again_until_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def never(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)

    monkeypatch.setattr(thaw, "release", never)
    said, ok = await one(FakeHypervisor(journal=a_journal()))
    assert not ok
    assert tries > 10
    assert "not free yet, run this again" in said


async def test_a_method_that_is_not_installed_is_not_tried_again() -> None:
    said, ok = await one(FakeHypervisor(journal=a_journal("Sorcery")))
    assert not ok
    assert 'quiesce method "Sorcery" is not installed' in said


async def test_a_host_that_does_not_answer_is_said() -> None:
    assert await one(FakeHypervisor(), "other") == ("other: host: not connected", False)
