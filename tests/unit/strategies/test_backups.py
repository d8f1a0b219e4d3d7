"""Waiting for a copy that the hypervisor makes, on a clock that the event loop fakes: whole only if it was heard of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from vmsnapshot_operator.core.backups import BackupSeen, Ending, RunningBackup
from vmsnapshot_operator.core.driver import CutResult, Hold, Progress
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.volumes import Handle, Seconds
from vmsnapshot_operator.errors import DomainGoneError, DriverError, HypervisorError
from vmsnapshot_operator.strategies import backups
from vmsnapshot_operator.strategies.world import World

pytestmark = pytest.mark.looptime

UID = records.REQUEST.uid
GOOD, BAD = Ending(True, "", Seconds(1.0)), Ending(False, "Operation canceled", Seconds(1.0))
RUNNING = BackupSeen(
    running=RunningBackup(targets=frozenset({"/p/slow"}), done_bytes=1, total_bytes=4),
    endings=(),
)
OVER = BackupSeen(endings=())


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
        self.answers, self.asked = list(answers), list[float]()

    def backups(self, _ref: object) -> Client:
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
    async def locate(*_: object) -> tuple[Any, None]:
        return client, None

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
    assert len(set(client.asked)) == 1, "from the first look at what runs on, nothing may be missed"


async def test_who_began_it_listens_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    world, client = fakes.world(installation=records.INSTALLATION), Client(replace(OVER, endings=(GOOD,)))
    world.memory(UID).listening = (copied().attempt, Seconds(5.0))
    await finish(monkeypatch, client, world)
    assert client.asked == [5.0]


@pytest.mark.parametrize("attempt", [None, 0])
async def test_who_comes_when_it_is_over_believes_nothing(monkeypatch: pytest.MonkeyPatch, attempt: int | None) -> None:
    world, client = fakes.world(installation=records.INSTALLATION), Client(replace(OVER, endings=(GOOD,)))
    if attempt is not None:  # what was heard of another attempt
        world.memory(UID).listening = (attempt, Seconds(5.0))
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


async def test_a_hypervisor_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = HypervisorError("it does not answer", retryable=True)
    world, client = (
        fakes.world(installation=records.INSTALLATION),
        Client(RUNNING, silent, silent, replace(OVER, endings=(GOOD,))),
    )
    await finish(monkeypatch, client, world)
    assert cast("tuple[int, float]", world.memory(UID).listening)[1] == client.asked[0]


async def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(backups, "clock", lambda: Seconds(float(next(ticks))))
    with pytest.raises(DriverError) as caught:
        await finish(monkeypatch, Client(RUNNING), fakes.world(installation=records.INSTALLATION), patience=20.0)
    assert caught.value.reason != "SnapshotLost"
