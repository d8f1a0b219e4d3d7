"""Waiting for a copy that the hypervisor makes, on a clock that the event loop fakes: whole only if it was heard of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from tests.unit.strategies.test_storage import Lab
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.backups import BackupSeen, Ending, RunningBackup
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Hold, Progress
from vmsnapshot_operator.core.effects import Record, RollBack, Settle
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.core.volumes import Handle, Seconds
from vmsnapshot_operator.errors import DomainGoneError, DriverError, HypervisorError
from vmsnapshot_operator.hypervisors.domains import Ref
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import Listening, World

pytestmark = pytest.mark.looptime

UID = records.REQUEST.uid
REF = Ref(uuid="6dd6ed9d-0000-4000-8000-000000000002", name="demo", endpoint="host")
GOOD, BAD = Ending(True, "", Seconds(1.0)), Ending(False, "Operation canceled", Seconds(1.0))
RUNNING = BackupSeen(
    running=RunningBackup(targets=frozenset({"/p/slow"}), done_bytes=1, total_bytes=4),
    endings=(),
)
OVER = BackupSeen(endings=())
GOOD_END = replace(OVER, endings=(GOOD,))


def copied() -> Record:
    """A record whose class `slow` was copied by the hypervisor."""
    record = records.example()
    group = record.groups["slow"]
    handles = {v.id: Handle("/p/slow") for v in group.request.volumes}
    group = replace(group, result=CutResult(handles=handles, atomic=True, hold=Hold.JOB))
    return replace(record, groups={**record.groups, "slow": group})


class Client:
    """Answers with one thing after the other, the last one again and again; `asked`: since when endings were wanted."""

    def __init__(self, *answers: BackupSeen | HypervisorError) -> None:
        self.answers, self.asked, self.where = list(answers), list[float](), list[str]()

    def backups(self, ref: Ref) -> Client:
        self.where.append(ref.endpoint)
        return self

    async def look(self, since: Seconds) -> BackupSeen:
        self.asked.append(since)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, HypervisorError):
            raise answer
        return answer


async def finish(
    monkeypatch: pytest.MonkeyPatch, client: Client, world: World, patience: float = 60.0
) -> list[Progress]:
    async def locate(*_: object) -> tuple[Any, Ref]:
        return client, REF

    monkeypatch.setattr(backups, "locate", locate)
    told: list[Progress] = []
    await backups.finish(world, copied(), records.REQUEST, Seconds(patience), told.append)
    return told


async def test_a_copy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world, client = (
        fakes.world(installation=records.INSTALLATION),
        Client(RUNNING, RUNNING, OVER, replace(OVER, endings=(GOOD,))),
    )
    assert await finish(monkeypatch, client, world) == [Progress(done_bytes=1, total_bytes=4)] * 2
    assert sorted(client.asked) == client.asked
    assert len(set(client.asked[2:])) == 1, "from the last look at what runs on, nothing may be missed"


async def test_a_connection_that_broke_while_it_ran_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sees it running listens from then on; what he could have missed before is not its end."""
    heard, broke = Seconds(0.0), 2

    class Reconnecting(Client):
        async def look(self, since: Seconds) -> BackupSeen:
            nonlocal heard
            seen = await super().look(since)
            if len(self.asked) == broke:
                heard = backups.clock()
            return seen if heard < since else replace(seen, endings=None)

    client = Reconnecting(RUNNING, RUNNING, RUNNING, OVER, GOOD_END)
    world = fakes.world(installation=records.INSTALLATION)
    world.memory(UID).listening = Listening(copied().attempt, backups.clock(), "host")
    await finish(monkeypatch, client, world)


@pytest.mark.parametrize("again", [GOOD_END, replace(OVER, endings=None)])
async def test_its_files_are_closed_when_it_is_called_whole(monkeypatch: pytest.MonkeyPatch, again: BackupSeen) -> None:
    """The hypervisor tells of the end before it closes the files: one more look, begun after that, waits for it."""
    silent = HypervisorError("it does not answer in time", retryable=True)
    client = Client(RUNNING, GOOD_END, silent, again)
    await finish(monkeypatch, client, fakes.world(installation=records.INSTALLATION))
    assert len(client.asked) == 4


async def test_what_was_proved_once_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of another class could not mark its copies then."""
    world = fakes.world(installation=records.INSTALLATION)
    await finish(monkeypatch, Client(RUNNING, GOOD_END), world)
    await finish(monkeypatch, Client(replace(OVER, endings=None)), world)
    world.memory(UID).whole = copied().attempt - 1
    with pytest.raises(DriverError, match="nobody was listening"):
        await finish(monkeypatch, Client(replace(OVER, endings=None)), world)


async def test_what_is_heard_until_its_files_are_closed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(RUNNING, GOOD_END, replace(OVER, endings=(GOOD, BAD)))
    with pytest.raises(DriverError, match="several copies"):
        await finish(monkeypatch, client, fakes.world(installation=records.INSTALLATION))


async def test_who_began_it_listens_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    world, client = fakes.world(installation=records.INSTALLATION), Client(replace(OVER, endings=(GOOD,)))
    world.memory(UID).listening = Listening(copied().attempt, Seconds(5.0), "host")
    await finish(monkeypatch, client, world)
    assert set(client.asked) == {5.0}


async def test_its_end_is_told_where_it_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM may have migrated since, and another program's copy may end where it is now."""
    world, client, places = fakes.world(installation=records.INSTALLATION), Client(RUNNING, OVER, GOOD_END), iter("aab")

    async def locate(*_: object) -> tuple[Any, Ref]:
        return client, replace(REF, endpoint=next(places, "b"))

    monkeypatch.setattr(backups, "locate", locate)
    await backups.finish(world, copied(), records.REQUEST, Seconds(60.0), lambda _: None)
    assert client.where == ["a", "a", "a", "a"]


@pytest.mark.parametrize("attempt", [None, 0])
async def test_who_comes_when_it_is_over_believes_nothing(monkeypatch: pytest.MonkeyPatch, attempt: int | None) -> None:
    world, client = fakes.world(installation=records.INSTALLATION), Client(replace(OVER, endings=(GOOD,)))
    if attempt is not None:  # what was heard of another attempt
        world.memory(UID).listening = Listening(attempt, Seconds(5.0), "host")
    with pytest.raises(DriverError, match="nobody was listening") as caught:
        await finish(monkeypatch, client, world)
    assert caught.value.reason == "SnapshotLost"


@pytest.mark.parametrize(
    ("answers", "reason", "said"),
    [
        ((RUNNING, replace(OVER, endings=(BAD,))), "SnapshotLost", "Operation canceled"),
        ((RUNNING, OVER), "SnapshotLost", "did not say how it ended"),
        ((RUNNING, replace(OVER, endings=None)), "SnapshotLost", "nobody was listening"),
        ((DomainGoneError("there is no domain"),), "SnapshotLost", "there is no domain"),
    ],
)
async def test_what_is_not_proved_is_lost(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[Any, ...], reason: str, said: str
) -> None:
    with pytest.raises(DriverError, match=said) as caught:
        await finish(monkeypatch, Client(*answers), fakes.world(installation=records.INSTALLATION))
    assert caught.value.reason == reason


async def test_who_comes_while_it_runs_listens_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drivers may not have started yet: what is heard of meanwhile is not lost."""
    world, client = fakes.world(installation=records.INSTALLATION), Client(RUNNING)

    async def locate(*_: object) -> tuple[Any, Ref]:
        return client, REF

    monkeypatch.setattr(backups, "locate", locate)
    await backups.listen(world, copied(), records.REQUEST)
    await backups.listen(world, copied(), records.REQUEST)
    assert len(client.asked) == 1
    client.answers = [replace(OVER, endings=(GOOD,))]
    await finish(monkeypatch, client, world)
    assert client.asked[0] == client.asked[1]


async def test_who_comes_while_it_runs_listens_when_the_connection_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    world, opened = fakes.world(installation=records.INSTALLATION), Seconds(0.0)

    async def locate(*_: object) -> tuple[Any, Ref]:
        nonlocal opened
        opened = backups.clock()
        return Client(RUNNING), REF

    monkeypatch.setattr(backups, "locate", locate)
    await backups.listen(world, copied(), records.REQUEST)
    heard = world.memory(UID).listening
    assert heard is not None
    assert heard.since >= opened


@pytest.mark.parametrize("answer", [OVER, replace(OVER, endings=(GOOD,)), HypervisorError("it does not answer")])
async def test_who_saw_nothing_run_does_not_listen(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    world = fakes.world(installation=records.INSTALLATION)

    async def locate(*_: object) -> tuple[Any, Ref]:
        return Client(answer), REF

    monkeypatch.setattr(backups, "locate", locate)
    await backups.listen(world, copied(), records.REQUEST)
    assert world.memory(UID).listening is None


async def test_a_hypervisor_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = HypervisorError("it does not answer", retryable=True)
    world, client = (
        fakes.world(installation=records.INSTALLATION),
        Client(RUNNING, silent, silent, replace(OVER, endings=(GOOD,))),
    )
    await finish(monkeypatch, client, world)
    heard = world.memory(UID).listening
    assert heard is not None
    assert heard.since == client.asked[0] == client.asked[-1]


@pytest.mark.parametrize("ambiguous", [False, True])
async def test_a_hypervisor_that_is_not_there_takes_no_vm_with_it(
    monkeypatch: pytest.MonkeyPatch, ambiguous: bool
) -> None:
    """Its object may not be read yet, or is being made anew."""
    unread = DomainGoneError("nobody can say", reason=None if ambiguous else "HypervisorNotFound", ambiguous=ambiguous)
    await finish(monkeypatch, Client(RUNNING, unread, GOOD_END), fakes.world(installation=records.INSTALLATION))


@pytest.mark.parametrize(("after", "certain", "passes"), [(1, False, False), (11, False, True), (1, True, True)])
async def test_what_copies_is_stopped_also_early(
    monkeypatch: pytest.MonkeyPatch, after: float, certain: bool, passes: bool
) -> None:
    """So soon after the start a hypervisor that is not there may not have been read yet."""

    async def locate(*_: object) -> tuple[Any, Ref]:
        raise DomainGoneError("it is not there", reason=None if certain else "HypervisorNotFound")

    monkeypatch.setattr(backups, "find", locate)
    world = fakes.world(installation=records.INSTALLATION)
    since = world.memory(UID).since
    monkeypatch.setattr(backups, "clock", lambda: Seconds(since + after))
    if passes:
        await backups.stop(world, "lab", "demo", UID)
    else:
        with pytest.raises(HypervisorError, match="not there"):
            await backups.stop(world, "lab", "demo", UID)


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(backups, "clock", lambda: Seconds(float(next(ticks))))
    with pytest.raises(DriverError) as caught:
        await finish(monkeypatch, Client(RUNNING), fakes.world(installation=records.INSTALLATION), patience=20.0)
    assert caught.value.reason != "SnapshotLost"


# --- among the other groups -----------------------------------------------------------------------------------------------


class Job:
    """The hypervisor's copy, in place of the real one: it takes so many seconds, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0, error: DriverError | None = None) -> None:
        self.log: list[str] = []
        self.seconds, self.error = seconds, error
        monkeypatch.setattr(backups, "finish", self.finish)
        self.found: list[tuple[object, ...]] = []
        monkeypatch.setattr(backups, "locate", self.locate)
        monkeypatch.setattr(backups, "find", self.find)

    async def finish(self, *_: object) -> None:
        self.log.append("finish")
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        self.log.append("whole")

    async def locate(self, *_: object) -> tuple[Any, Ref]:
        return type("Client", (), {"backups": lambda _self, _ref: self})(), REF

    async def find(self, _world: object, *what: object) -> tuple[Any, Ref]:
        self.found.append(what)
        return await self.locate()

    async def look(self, _since: Seconds) -> BackupSeen:
        return OVER

    async def stop(self, is_ours: Callable[[str], bool]) -> None:
        name = copied().groups["slow"].request.name
        assert is_ours(f"/p/{name}-member")
        assert not is_ours("/p/vms-others")
        self.log.append("stop")
        if self.error is not None:
            raise self.error


async def test_a_driver_marks_its_copies_when_the_job_is_proved_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, job = Lab(copied()), Job(monkeypatch, seconds=30.0)
    lab.hosts["slow"].gone = {"/p/slow"}  # not marked as whole yet
    task = asyncio.create_task(lab.strategy.apply(Settle(copied().groups), lab.seen, {}))
    await asyncio.sleep(20)
    assert (job.log, lab.hosts["slow"].log, lab.hosts["fast"].log) == (["finish"], [], ["wait_ready", "over"])
    await task
    assert (job.log, lab.hosts["slow"].log) == (["finish", "whole"], ["wait_ready", "over"])
    assert [r.ready for r in lab.written] == [True]


async def test_copies_that_are_marked_need_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, job = Lab(copied()), Job(monkeypatch)
    await lab.strategy.apply(Settle(copied().groups), lab.seen, {})
    assert job.log == []
    assert [r.ready for r in lab.written] == [True]


async def test_copies_that_are_lost_are_never_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = DriverError("the copy failed", reason="SnapshotLost")
    lab, _ = Lab(copied()), Job(monkeypatch, error=lost)
    lab.hosts["slow"].gone = {"/p/slow"}
    with pytest.raises(DriverError, match="the copy failed"):
        await lab.strategy.apply(Settle(copied().groups), lab.seen, {})
    assert lab.hosts["slow"].log == []
    assert not lab.written


async def test_settling_that_is_cancelled_waits_for_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, job = Lab(copied()), Job(monkeypatch, seconds=300.0)
    lab.hosts["slow"].gone = {"/p/slow"}
    task = asyncio.create_task(lab.strategy.apply(Settle(copied().groups), lab.seen, {}))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(400)
    assert (job.log, lab.hosts["slow"].log, lab.written) == (["finish"], [], [])


def by_hypervisor(hold: Hold | None) -> Record:
    """A record whose class `slow` is one that the hypervisor copies for, with this result or none."""
    record = copied()
    kind = Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True)
    planned = tuple(replace(g, capabilities=kind) if g.class_name == "slow" else g for g in record.plan.groups)
    group = record.groups["slow"]
    assert group.result is not None
    group = replace(group, result=replace(group.result, hold=hold) if hold is not None else None)
    return replace(
        record, plan=replace(record.plan, groups=planned), groups={**record.groups, "slow": group}, version="1"
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("hold", "unmarked", "broken", "asked"),
    [
        (Hold.JOB, True, "", True),
        (Hold.JOB, False, "", False),
        (Hold.JOB, False, "its pool is gone", True),
        (Hold.BASE, True, "", False),
        (None, False, "", True),
    ],
)
async def test_a_copy_is_stopped_before_its_volumes_are_deleted_if_it_may_run(
    monkeypatch: pytest.MonkeyPatch, hold: Hold | None, unmarked: bool, broken: str, asked: bool, fails: bool
) -> None:
    """Without need nobody asks the hypervisor: it may be gone for long, and the snapshot is to be deleted all the same."""
    record = by_hypervisor(hold)
    lab = Lab(record)
    lab.hosts["slow"].gone = {"/p/slow"} if unmarked else set()
    lab.hosts["slow"].broken = broken
    job = Job(monkeypatch, error=DriverError("it may go on", retryable=True) if fails else None)
    cast("fakes.FakeCluster", lab.world.cluster).contents_by_name[record.name] = {"metadata": {"resourceVersion": "1"}}
    name = record.groups["slow"].request.name
    effect = RollBack({"slow": frozenset({name})})
    kept = (asked and fails) or bool(broken)
    if kept:
        with pytest.raises(DriverError, match="it may go on" if asked and fails else broken):
            await lab.strategy.apply(effect, lab.seen, {})
    else:
        await lab.strategy.apply(effect, lab.seen, {})
    assert job.log == (["stop"] if asked else [])
    assert lab.hosts["slow"].deleted == ([] if kept else [name])


@pytest.mark.parametrize(
    ("held", "problem", "asked"),
    [("slow", "", True), ("fast", "", False), ("", "", False), ("slow", "it cannot be trusted", True)],
)
async def test_a_copy_is_stopped_though_its_content_is_lost(
    monkeypatch: pytest.MonkeyPatch, held: str, problem: str, asked: bool
) -> None:
    lab, job = Lab(by_hypervisor(None)), Job(monkeypatch)
    kind = Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True)
    cast("fakes.FakeClasses", lab.world.classes).known = (
        StorageClass(name="slow", driver="libvirt-backup", capabilities=kind),
        StorageClass(name="fast", driver="ceph-rbd", capabilities=replace(kind, cut=CutKind.INSTANT)),
        StorageClass(name="new", driver="ceph-rbd"),
    )
    record = replace(lab.seen.record, problem=problem) if problem and lab.seen.record else None
    name = copied().groups["slow"].request.name
    there = {held: frozenset({name})} if held else {"slow": frozenset[str]()}
    await backups.clear_way(lab.world, record, records.REQUEST, there)
    assert job.log == (["stop"] if asked else [])
    assert job.found == ([(records.REQUEST.hypervisor, records.REQUEST.domain)] if asked else [])


@pytest.mark.parametrize(("of", "upto", "stops"), [(2, 2, True), (1, 2, True), (3, 2, False), (3, None, True)])
async def test_who_was_deposed_does_not_stop_his_successors_copy(
    monkeypatch: pytest.MonkeyPatch, of: int, upto: int | None, stops: bool
) -> None:
    running = names.request_name(records.INSTALLATION, UID, of, "slow", ())
    seen: list[bool] = []

    class Stopped:
        def backups(self, _ref: object) -> Stopped:
            return self

        async def stop(self, is_ours: Callable[[str], bool]) -> None:
            assert is_ours(f"/p/{running}-member") == is_ours(f"/p/{running}.raw") == is_ours(f"/p/{running}")
            seen.append(is_ours(f"/p/{running}"))

    async def find(*_: object) -> tuple[Any, Ref]:
        return Stopped(), REF

    monkeypatch.setattr(backups, "find", find)
    world = fakes.world(installation=records.INSTALLATION)
    await (backups.stop(world, "lab", "demo", UID) if upto is None else backups.stop(world, "lab", "demo", UID, upto))
    assert seen == [stops]
