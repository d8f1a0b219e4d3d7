"""Effects whose process stands still, or whose parts fail, on a clock that the event loop fakes: nothing of them acts later."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from tests.unit.plan import builders as b
from tests.unit.plan.test_collapse import JOURNAL
from vmsnapshot_operator.core.driver import Hold, Progress, SnapshotRequest
from vmsnapshot_operator.core.effects import Fail, Failure, Observation, Prepare, Record, Recover, Settle
from vmsnapshot_operator.core.evidence import Evidence, WindowOutcome
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Disk, Machine, PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Method, OverlaySettings
from vmsnapshot_operator.core.volumes import Seconds, Volume
from vmsnapshot_operator.errors import DriverError, NotPermittedError
from vmsnapshot_operator.hypervisors import domain_xml
from vmsnapshot_operator.plan import conditions, definition, report
from vmsnapshot_operator.strategies import settling, storage
from vmsnapshot_operator.strategies.storage import StorageStrategy
from vmsnapshot_operator.strategies.world import LiveHypervisor, Memory, Prepared, World, clock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from contextlib import AsyncExitStack

pytestmark = pytest.mark.looptime


@dataclass
class Host(fakes.FakeHost):
    """A class's process. `error`: its answer; `late`: seconds until a process is free; `log`: what it was asked."""

    error: DriverError | None = None
    late: float = 0.0
    reserved: int = 0
    log: list[str] = field(default_factory=list)

    async def wait_ready(
        self,
        *_: object,
        timeout: float,  # noqa: ASYNC109 - as the real one
        stall: float,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.log.append("wait_ready")
        on_progress(Progress(done_bytes=1 << 20, total_bytes=4 << 20))
        try:
            await asyncio.sleep(self.hangs)
        finally:
            self.log.append("over")
        if self.error is not None:
            raise self.error

    @asynccontextmanager
    async def reserve(self, *, timeout: float) -> AsyncIterator[Host]:  # noqa: ASYNC109 - as the real one
        await asyncio.sleep(self.late)
        self.reserved += 1
        try:
            yield self
        finally:
            self.reserved -= 1

    async def prepare(self, _request: SnapshotRequest) -> None:
        await asyncio.sleep(0)
        self.log.append("prepare")


class Lab:
    """One record and a strategy over stand-ins."""

    def __init__(self, record: Record) -> None:
        self.hosts = {c: Host() for c in record.groups}
        classes = fakes.FakeClasses(by_name=dict(self.hosts))
        self.world: World = fakes.world(installation=records.INSTALLATION, classes=classes)
        self.written: list[Record] = []
        self.strategy = StorageStrategy(self.world)
        self.seen = Observation(request=replace(records.REQUEST, created=self.world_now()), record=record)

        async def write(written: Record, _seen: Observation, *, create: bool) -> None:
            self.written.append(written)

        self.strategy._write = write  # type: ignore[method-assign]

    def world_now(self) -> Any:
        clock = type("Clock", (), {"now": staticmethod(lambda: records.REQUEST.created)})
        cast("Any", self.world.cluster).client = type("Client", (), {"clock": clock})
        return records.REQUEST.created


async def test_when_one_class_fails_to_settle_the_others_are_not_left_to_themselves() -> None:
    lab = Lab(records.example())
    lab.hosts["fast"].error = DriverError("no connection", retryable=True)
    lab.hosts["slow"].hangs = 200.0
    assert lab.seen.record is not None
    with pytest.raises(DriverError, match="no connection"):
        await lab.strategy.apply(Settle(lab.seen.record.groups), lab.seen, {})
    assert lab.hosts["slow"].log == ["wait_ready", "over"], "it goes on while something else begins"
    assert not lab.written


async def test_how_far_a_copy_is_can_be_told_while_it_runs() -> None:
    lab = Lab(records.example())
    lab.hosts["slow"].hangs = 200.0
    assert lab.seen.record is not None
    task = asyncio.create_task(lab.strategy.apply(Settle(lab.seen.record.groups), lab.seen, {}))
    await asyncio.sleep(1)
    memory = lab.world.memory(lab.seen.request.uid)
    assert memory.copied["slow"] == (1 << 20, 4 << 20)
    assert report.under_way(memory.copied, {"vda": (5 << 20, 8 << 20)}) == (
        'class "fast": 1 of 4 MiB copied; class "slow": 1 of 4 MiB copied; disk vda: 5 of 8 MiB committed'
    )
    await task
    assert memory.copied == {}


OVERLAID = replace(JOURNAL, owner_uid=records.REQUEST.uid)


@pytest.mark.parametrize("stalled", [False, True])
async def test_a_copy_is_given_up_before_the_overlays_have_no_room_or_at_once_after(
    monkeypatch: pytest.MonkeyPatch, stalled: bool
) -> None:
    record = records.example()
    quiesce = replace(record.plan.quiesce, method=Method.HYPERVISOR_SNAPSHOT, overlay_pool="over")
    lab = Lab(replace(record, plan=replace(record.plan, quiesce=quiesce)))
    lab.hosts["slow"].hangs = 200.0
    free = iter([100 << 20, 50 << 20, *(() if stalled else (49 << 20,))])

    class Overlays:
        async def free_bytes(self, pool: str) -> int:
            assert pool == "over"
            return next(free)

        async def stalled(self, overlays: Mapping[str, str]) -> bool:
            assert overlays == OVERLAID.overlays
            return stalled and next(free) == 50 << 20

    class Client:
        def overlays(self, _ref: object) -> Overlays:
            return Overlays()

        async def read_journal(self, _ref: object) -> Journal:
            return OVERLAID

    async def locate(*_: object) -> tuple[Client, None]:
        return Client(), None

    live = LiveHypervisor(name="lab", overlay=OverlaySettings(pool="over", min_free_bytes=100 << 20))
    monkeypatch.setattr(settling, "locate", locate)
    lab.world.hypervisors = cast("Any", {lab.seen.request.hypervisor: live})
    assert lab.seen.record is not None
    with pytest.raises(DriverError, match="given up") as caught:
        await lab.strategy.apply(Settle(lab.seen.record.groups), lab.seen, {})
    assert (caught.value.reason, next(free, None)) == ("OverlayFull", None)
    assert lab.hosts["slow"].log == ["wait_ready", "over"], "the copy has ended"
    assert not lab.written


@pytest.mark.parametrize("lasts", [0.5, 200.0], ids=["the copy was made already", "the copy goes on"])
@pytest.mark.parametrize(
    "after",
    [None, replace(OVERLAID, phase=Phase.COLLAPSING), replace(OVERLAID, owner_uid="another")],
    ids=["ended", "under way", "another snapshot has begun since"],
)
async def test_a_copy_whose_overlays_a_sweep_commits_meanwhile_had_no_room(
    monkeypatch: pytest.MonkeyPatch, after: Journal | None, lasts: float
) -> None:
    record = records.example()
    quiesce = replace(record.plan.quiesce, method=Method.HYPERVISOR_SNAPSHOT, overlay_pool="over")
    group = record.groups["slow"]
    assert group.result is not None
    held = replace(group, result=replace(group.result, hold=Hold.BASE))
    groups = {**record.groups, "slow": held}
    lab = Lab(replace(record, plan=replace(record.plan, quiesce=quiesce), groups=groups))
    lab.hosts["slow"].hangs = lasts

    class Client:
        def overlays(self, _ref: object) -> Client:
            return self

        async def free_bytes(self, _pool: str) -> int:
            return 100 << 20

        async def stalled(self, _overlays: Mapping[str, str]) -> bool:
            return False

        async def read_journal(self, _ref: object) -> Journal | None:
            return after

    async def locate(*_: object) -> tuple[Client, None]:
        return Client(), None

    monkeypatch.setattr(settling, "locate", locate)
    lab.world.hypervisors = cast("Any", {})
    with pytest.raises(DriverError, match=r"as where .* (stands|stood) still") as caught:
        await lab.strategy.apply(Settle(groups), lab.seen, {})
    assert caught.value.reason == "OverlayFull"
    assert lab.hosts["slow"].log == ["wait_ready", "over"]
    assert asyncio.get_running_loop().time() < 10, "it was not copied to its end"
    assert not lab.written


class Off:
    """A copy of a VM that is off, and how its disks are once it is made. Each disk's storage tells when it was written to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        record = records.example()

        def off(volume: Volume) -> Volume:
            return replace(volume, writable=replace(volume.writable, fingerprint="1"))

        planned = tuple(replace(v, volume=off(v.volume)) for v in record.plan.volumes)
        plan = replace(record.plan, volumes=planned, power=PowerState.SHUT_OFF, run_id=-1)
        group = record.groups["slow"]
        assert group.result is not None
        group = replace(group, result=replace(group.result, hold=Hold.BASE))
        self.record = replace(record, plan=plan, groups={**record.groups, "slow": group})
        self.lab = Lab(self.record)
        self.machine = b.machine(
            power=PowerState.SHUT_OFF,
            run_id=-1,
            disks=tuple(b.disk(v.target, v.volume.writable) for v in planned),
        )
        off_vm = self

        class Client:
            async def describe(self, _ref: object, *, ask_agent: bool) -> Machine:
                assert not ask_agent
                return off_vm.machine

        async def locate(*_: object) -> tuple[object, None]:
            return Client(), None

        monkeypatch.setattr(settling, "locate", locate)

    def plug(self, number: int, disk: Disk | None) -> None:
        """Have another disk, or none, in the place of this one."""
        disks = list(self.machine.disks)
        disks[number : number + 1] = [disk] if disk is not None else []
        self.machine = replace(self.machine, disks=tuple(disks))

    async def settle(self) -> None:
        await self.lab.strategy.apply(Settle(self.record.groups), self.lab.seen, {})


async def test_a_vm_that_stays_off_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Off(monkeypatch)
    off.machine = replace(off.machine, disks=off.machine.disks[::-1])
    await off.settle()
    assert [r.ready for r in off.lab.written] == [True]


@pytest.mark.parametrize("how", ["detached", "written to", "gated", "the VM runs"])
async def test_a_disk_that_did_not_stand_still_is_no_copy(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    off = Off(monkeypatch)
    layer = off.machine.disks[2].layers[0]
    if how == "detached":
        off.plug(2, None)
    elif how == "written to":
        off.plug(2, b.disk("vdc", replace(layer, fingerprint="2")))
    elif how == "gated":
        # A restore of the same VM in place: the claim on it was given back when the point in time was there.
        marker = Marker(installation="i", restore="team-a/back", restore_uid="r", snapshot_uid="s")
        text = "<domain><name>demo</name><devices>{}</devices></domain>".format(
            "".join(
                f"<disk type='file'><driver name='qemu' type='raw'/><source file='{d.layers[0].source}'/><target dev='{d.target}'/></disk>"
                for d in off.machine.disks
            )
        )
        gated = definition.gated(text, Gate(marker=marker, targets=("vdc",), autostart=False))
        off.plug(2, domain_xml.parse(gated)[0][2])
    else:
        off.machine = replace(off.machine, power=PowerState.RUNNING, run_id=3)
    with pytest.raises(DriverError) as caught:
        await off.settle()
    assert caught.value.reason == "SnapshotLost"
    assert ("vdc" in caught.value.message) is (how != "the VM runs")
    assert not off.lab.written


async def test_what_cannot_be_seen_now_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    off = Off(monkeypatch)
    off.plug(2, b.disk("vdc", replace(off.machine.disks[2].layers[0], fingerprint="")))
    with pytest.raises(DriverError, match="disk vdc") as caught:
        await off.settle()
    assert (caught.value.reason, caught.value.retryable) == ("DriverError", True)
    assert not off.lab.written


async def test_what_is_lost_is_told_before_what_may_come_back() -> None:
    lab = Lab(records.example())
    lab.hosts["fast"].error = DriverError("no connection", retryable=True)
    lab.hosts["slow"].error = DriverError("it is gone", reason="SnapshotLost")
    assert lab.seen.record is not None
    with pytest.raises(DriverError, match="it is gone"):
        await lab.strategy.apply(Settle(lab.seen.record.groups), lab.seen, {})


async def test_settling_that_is_cancelled_leaves_nothing_under_way() -> None:
    lab = Lab(records.example())
    lab.hosts["slow"].hangs = 200.0
    assert lab.seen.record is not None
    task = asyncio.create_task(lab.strategy.apply(Settle(lab.seen.record.groups), lab.seen, {}))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lab.hosts["slow"].log == ["wait_ready", "over"]
    assert not lab.written


@pytest.mark.parametrize("lost", [False, True])
async def test_who_lost_the_lease_while_it_waited_for_a_process_prepares_nothing(lost: bool) -> None:
    record = records.intent(records.example().plan, 1)
    lab = Lab(record)
    lab.hosts["slow"].late = 60.0
    requests = {c: g.request for c, g in record.groups.items()}
    task = asyncio.create_task(lab.strategy.apply(Prepare(1, record.plan, requests), lab.seen, {}))
    await asyncio.sleep(30)
    cast("fakes.FakeLeadership", lab.world.leadership).leader = not lost
    if lost:
        with pytest.raises(NotPermittedError) as caught:
            await task
        assert caught.value.retryable
    else:
        await task
    asked = [h.log for h in lab.hosts.values()]
    assert asked == ([[], []] if lost else [["prepare"], ["prepare"]])


@pytest.mark.parametrize("fallback", [True, False])
async def test_falling_back_is_an_event_with_the_agents_words(fallback: bool) -> None:
    record = records.intent(records.example().plan, 1)
    lab = Lab(record)
    memory = lab.world.memory(records.REQUEST.uid)
    memory.outcome = WindowOutcome(
        attempt=1,
        evidence=Evidence(method=Method.GUEST_AGENT),
        free=True,
        fallback=fallback,
        reason="FreezeFailed",
        message="the hook said no",
    )
    paused = replace(record.plan, quiesce=replace(record.plan.quiesce, method=Method.PAUSE))
    requests = {c: g.request for c, g in record.groups.items()}
    await lab.strategy.apply(Prepare(2, paused, requests), lab.seen, {})
    posted = cast("fakes.FakeEvents", lab.world.events).posted
    text = "FreezeFailed: the hook said no; policy Prefer goes on with Pause"
    assert posted == ([text] if fallback else [])
    await lab.world.forget(records.REQUEST.uid)


@pytest.mark.parametrize("turns", range(12))
async def test_a_prepare_that_is_cancelled_anywhere_gives_its_processes_back(turns: int) -> None:
    record = records.intent(records.example().plan, 1)
    lab = Lab(record)
    requests = {c: g.request for c, g in record.groups.items()}
    task = asyncio.create_task(lab.strategy.apply(Prepare(1, record.plan, requests), lab.seen, {}))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    memory = lab.world.memory(records.REQUEST.uid)
    assert sum(h.reserved for h in lab.hosts.values()) == (2 if memory.prepared is not None else 0)
    assert task.cancelled() or memory.prepared is not None
    await lab.world.forget(records.REQUEST.uid)
    assert sum(h.reserved for h in lab.hosts.values()) == 0


class Stack:
    """What owns reserved processes."""

    closed = False

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("term", "kept"), [(1, True), (2, False)])
async def test_what_was_taken_in_an_earlier_term_is_not_kept(term: int, kept: bool) -> None:
    memory, stack = Memory(since=Seconds(0.0)), Stack()
    await memory.enter(1)
    memory.outcome = WindowOutcome(attempt=1, evidence=Evidence(method="None"))
    memory.prepared = Prepared(attempt=1, slots={}, stack=cast("AsyncExitStack", stack))
    await memory.enter(term)
    assert (memory.outcome is not None, memory.prepared is not None, stack.closed) == (kept, kept, not kept)


def measured(lab: Lab) -> tuple[float, float]:
    """How many holds were measured, and how long they were together."""
    found = {s.name: s.value for m in lab.world.metrics.registry.collect() for s in m.samples if not s.labels.get("le")}
    return found.get("vmsnapshot_frozen_seconds_count", 0.0), found.get("vmsnapshot_frozen_seconds_sum", 0.0)


def held(*, free: bool, stood: bool = True) -> WindowOutcome:
    """A VM that was asked to stand still 40 s ago."""
    asked = Seconds(clock() - 40.0)
    evidence = Evidence(
        method=Method.GUEST_AGENT,
        asked=asked,
        frozen_time=records.REQUEST.created,
        still_from=asked if stood else None,
        frozen_milliseconds=40_000 if free else 0,
    )
    return WindowOutcome(attempt=1, evidence=evidence, free=free)


@pytest.mark.parametrize("stood", [True, False], ids=["frozen", "freeze failed"])
async def test_a_hold_is_measured_once_it_is_over(monkeypatch: pytest.MonkeyPatch, stood: bool) -> None:
    async def located(*_: object) -> tuple[Any, None]:
        return type("Client", (), {"order_may_come": lambda _self, _ref: False})(), None

    async def nothing(*_: object) -> None:
        return

    monkeypatch.setattr(storage, "locate", located)
    monkeypatch.setattr(storage, "release", nothing)
    lab = Lab(records.intent(records.example().plan, 1))
    lab.strategy._measure(held(free=True, stood=stood), lab.seen)
    assert measured(lab) == (1, 40.0)
    late = held(free=False, stood=stood)
    lab.strategy._measure(late, lab.seen)
    assert measured(lab) == (1, 40.0), "it is held still: nobody knows for how long"
    memory = lab.world.memory(lab.seen.request.uid)
    memory.outcome = late
    journal = Journal(installation="i", owner_uid="u", nonce="n", attempt=1, method="GuestAgent", budget=30.0)
    await lab.strategy.apply(Recover(journal), lab.seen, {})
    assert memory.outcome.free
    assert memory.outcome.evidence.frozen_milliseconds >= 40_000
    count, total = measured(lab)
    assert (count, total >= 80.0) == (2, True)


@pytest.mark.parametrize("gone", [True, False])
async def test_only_a_vm_that_is_gone_needs_nobodys_word_that_it_is_free(gone: bool) -> None:
    lab = Lab(records.intent(records.example().plan, 1))
    lab.world.memory(lab.seen.request.uid).outcome = held(free=False)
    effect = Fail(Failure(reason="Interrupted", message="its journal is gone"))
    await lab.strategy.apply(effect, replace(lab.seen, vm_gone=gone), {})
    (written,) = lab.written
    assert written.outcome is not None
    assert written.outcome.free is gone


@pytest.mark.parametrize(
    ("facts", "known"),
    [({}, True), ({"vm_unseen": True}, False), ({"vm_unseen": True, "prepared": 1}, True)],
    ids=["seen", "its Hypervisor is gone", "never begun"],
)
async def test_a_vm_that_cannot_be_looked_at_any_more_is_not_called_free(facts: dict[str, Any], known: bool) -> None:
    lab = Lab(records.intent(records.example().plan, 1))
    failure = Failure(reason="HypervisorNotFound", message="there is none")
    await lab.strategy.apply(Fail(failure), replace(lab.seen, **facts), {})
    (written,) = lab.written
    told = {c.type: c for c in conditions.failed(lab.seen, written, failure)}["Unquiesced"]
    assert (told.status, told.reason) == ((True, "Free") if known else (None, "FreeUnknown"))


def test_a_vm_that_got_another_uuid_is_claimed_instead_of_the_old_one() -> None:
    world = fakes.world(installation=records.INSTALLATION)
    assert world.claim("old", "u")
    assert world.claim("new", "u")
    assert world.claims == {"new": "u"}
    assert not world.claim("new", "another")
    world.release("u")
    assert world.claims == {}
