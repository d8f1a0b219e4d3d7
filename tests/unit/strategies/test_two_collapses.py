"""Two that bring one VM back at once, as a workflow and a sweep do, interleaved at every await: done twice it is done once."""

from __future__ import annotations

import types
from collections.abc import Coroutine, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.plan.test_collapse import JOURNAL
from tests.unit.quiesce.fake_libvirt import REF, FakeDomain, as_any
from vmsnapshot_operator.core.chains import BlockJob, Chains, DiskChain, Overlaid, Ruling
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import journals
from vmsnapshot_operator.strategies import overlays

OVERLAID = replace(JOURNAL, overlays={"v": "/over/v", "w": "/over/w"}, bases={"v": "then", "w": "then"})
TARGETS = {"v": "vda", "w": "vdb"}


@types.coroutine
def turn(*_: object) -> Generator[None, None, None]:
    """Let the other one, or the VM, go on."""
    yield


@dataclass
class Disk:
    volume: str
    on_overlay: bool = True
    job: BlockJob | None = None
    written: bool = False
    exists: bool = True

    @property
    def overlay(self) -> str:
        return OVERLAID.overlays[self.volume]


@dataclass
class Vm:
    """A VM that stands still on full overlays. Each call lets others go on before it and after it, not in its midst."""

    domain: FakeDomain = field(default_factory=lambda: FakeDomain(journal=OVERLAID))
    disks: dict[str, Disk] = field(default_factory=lambda: {t: Disk(v) for v, t in TARGETS.items()})
    stalled: bool = True

    def overlays(self, _ref: object) -> Vm:
        return self

    def goes_on(self) -> None:
        """Time goes by: commits come to their end."""
        for disk in self.disks.values():
            if disk.job is not None:
                disk.job = BlockJob(commit=True, ready=True)

    async def look(self, _overlays: object) -> Overlaid:
        await turn()
        disks = self.disks.values()
        seen = Overlaid(
            chains=Chains(
                run_id=OVERLAID.run_id,
                power=PowerState.PAUSED if self.stalled else PowerState.RUNNING,
                io_error=self.stalled,
                stalled=self.stalled,
                disks=tuple(
                    DiskChain(target=t, live=(d.overlay, "/base") if d.on_overlay else ("/base",), job=d.job)
                    for t, d in self.disks.items()
                ),
            ),
            fingerprints={d.volume: "now" if d.written else "then" for d in disks},
            missing=frozenset(d.volume for d in disks if not d.exists),
            on_base=frozenset(d.volume for d in disks if not d.on_overlay),
        )
        await turn()
        return seen

    async def read_journal(self, _ref: object) -> Journal | None:
        await turn()
        there = journals.read(self.domain)
        await turn()
        return there

    async def update_journal(self, _ref: object, journal: Journal) -> bool:
        await turn()
        there = journals.update(self.domain, journal)
        await turn()
        return there

    async def clear_journal(self, _ref: object, nonce: str) -> None:
        await turn()
        if self.domain.journal is not None:
            assert not any(d.on_overlay for d in self.disks.values()), "cleared while the VM is on an overlay"
            assert not self.stalled, "cleared while it stands still"
        journals.clear(self.domain, nonce)
        await turn()

    async def commit(self, target: str, _overlay: str, _bandwidth: int) -> None:
        await turn()
        disk = self.disks[target]
        if not disk.on_overlay:
            raise HypervisorError("it does not write to it any more", retryable=True)
        assert self.domain.journal is not None
        assert disk.volume in self.domain.journal.begun, "begun before the journal says so"
        disk.job, disk.written = disk.job or BlockJob(commit=True), True
        await turn()

    async def unlimit(self, _target: str) -> None:
        await turn()

    async def pivot(self, target: str) -> None:
        await turn()
        disk = self.disks[target]
        if disk.job is None or not disk.job.ready:
            raise HypervisorError("there is no such job", retryable=True)
        disk.job, disk.on_overlay = None, False
        await turn()

    async def resume(self) -> None:
        await turn()
        assert not any(d.on_overlay for d in self.disks.values()), "resumed on an overlay without room"
        self.stalled = False
        await turn()

    async def remove_path(self, path: str) -> None:
        await turn()
        disk = next(d for d in self.disks.values() if d.overlay == path)
        assert not disk.on_overlay
        disk.exists = False
        await turn()


async def bring_back(vm: Vm, read: Journal) -> None:
    """As a workflow or a sweep does: with the journal that it read at some time, and again where that comes to nothing."""
    journal: Journal | None = read
    while journal is not None:
        try:
            rulings = await overlays.collapse(as_any(vm), REF, journal, None, _nothing)
        except HypervisorError:
            journal = journals.read(vm.domain)
        else:
            assert not [r for r in rulings if r.why.startswith("its base has changed")]
            return


def _nothing(_: tuple[Ruling, ...]) -> None:
    return


@pytest.fixture(scope="module", autouse=True)
def _no_clock() -> Generator[None, None, None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlays.asyncio, "sleep", turn)
        yield


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from("abt"), max_size=150))
def test_whichever_goes_on_the_vm_comes_back(order: list[str]) -> None:
    vm = Vm()
    both: dict[str, Coroutine[Any, Any, None]] = {n: bring_back(vm, OVERLAID) for n in "ab"}
    for who in (*order, *"atbt" * 500):
        if who == "t":
            vm.goes_on()
        elif who in both:
            try:
                both[who].send(None)
            except StopIteration:
                del both[who]
        if not both:
            break
    assert not both, "one of them never ends"
    assert vm.domain.journal is None
    assert not vm.stalled
    assert [(d.on_overlay, d.job, d.exists) for d in vm.disks.values()] == [(False, None, False)] * 2


@pytest.mark.parametrize(
    ("said", "there"),
    [
        (replace(OVERLAID, phase=Phase.COLLAPSING, begun=("v",)), replace(OVERLAID, begun=("w",), pivoted=("w",))),
        (
            replace(OVERLAID, bases={}, begun=("v",)),
            replace(OVERLAID, phase=Phase.COLLAPSING, begun=("w", "v"), pivoted=("w",)),
        ),
        (replace(OVERLAID, begun=("w", "v"), pivoted=("w",)), replace(OVERLAID, phase=Phase.COLLAPSING, bases={})),
    ],
)
def test_the_slower_one_forgets_nothing_of_what_the_other_wrote(said: Journal, there: Journal) -> None:
    domain = FakeDomain(journal=there)
    assert journals.update(domain, said)
    assert domain.journal is not None
    assert domain.journal == replace(
        OVERLAID, phase=Phase.COLLAPSING, begun=domain.journal.begun, pivoted=domain.journal.pivoted
    )
    assert (set(domain.journal.begun), domain.journal.pivoted) == ({"v", "w"}, ("w",))
