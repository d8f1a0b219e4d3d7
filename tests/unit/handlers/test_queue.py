"""The keyed work queue, on a clock that the event loop itself fakes: nothing here waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from vmsnapshot_operator.handlers.queue import MAX_BACKOFF_SECONDS, RESYNC_SECONDS, WorkQueue

pytestmark = pytest.mark.looptime


def _now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def _running(queue: WorkQueue[str]) -> AsyncIterator[None]:
    task = asyncio.create_task(queue.run())
    await asyncio.sleep(0)
    yield
    await queue.stop()
    assert task.done()
    assert len(asyncio.all_tasks()) == 1, "it leaves no task behind"


class Work:
    """A worker that takes `seconds` and remembers when it worked on what; at most one at a time per key."""

    def __init__(self, seconds: float = 0.0, answer: float | None = None) -> None:
        self.seconds = seconds
        self.answer = answer
        self.runs: list[tuple[str, float]] = []
        self.busy: set[str] = set()
        self.most = 0
        self.before: Callable[[str], None] = lambda _key: None

    async def __call__(self, key: str) -> float | None:
        assert key not in self.busy, "two at once on one key"
        self.busy.add(key)
        self.most = max(self.most, len(self.busy))
        self.runs.append((key, _now()))
        try:
            self.before(key)
            await asyncio.sleep(self.seconds)
        finally:
            self.busy.discard(key)
        return self.answer


async def test_a_key_added_often_is_worked_on_once() -> None:
    work = Work()
    queue: WorkQueue[str] = WorkQueue(work)
    for _ in range(5):
        queue.add("a")
    assert queue.depth == 1
    async with _running(queue):
        await asyncio.sleep(1)
        assert queue.depth == 0
    assert [k for k, _ in work.runs] == ["a"]


async def test_a_key_added_meanwhile_is_worked_on_again_afterwards() -> None:
    work = Work(seconds=10)
    queue: WorkQueue[str] = WorkQueue(work)
    async with _running(queue):
        queue.add("a")
        await asyncio.sleep(5)
        queue.add("a")
        queue.add("a")
        await asyncio.sleep(100)
    start = work.runs[0][1]
    assert [t - start for _, t in work.runs] == [0, 10]


async def test_keys_are_worked_on_side_by_side_up_to_the_number_of_workers() -> None:
    work = Work(seconds=10)
    queue: WorkQueue[str] = WorkQueue(work, workers=3)
    async with _running(queue):
        for key in "abcdefg":
            queue.add(key)
        await asyncio.sleep(1)
        assert queue.depth == 4
        await asyncio.sleep(100)
    assert work.most == 3
    assert sorted(k for k, _ in work.runs) == list("abcdefg")


async def test_the_worker_says_when_to_look_again() -> None:
    work = Work(answer=30.0)
    queue: WorkQueue[str] = WorkQueue(work)
    async with _running(queue):
        queue.add("a")
        await asyncio.sleep(100)
    start = work.runs[0][1]
    assert [t - start for _, t in work.runs] == [0, 30, 60, 90]


async def test_the_soonest_of_several_wishes_counts() -> None:
    work = Work()
    queue: WorkQueue[str] = WorkQueue(work)
    async with _running(queue):
        start = _now()
        queue.add_after("a", 50)
        queue.add_after("a", 20)
        queue.add_after("a", 40)
        await asyncio.sleep(200)
    assert work.runs == [("a", start + 20)]


async def test_working_now_overtakes_what_was_asked_for_later() -> None:
    work = Work()
    queue: WorkQueue[str] = WorkQueue(work)
    async with _running(queue):
        start = _now()
        queue.add_after("a", 20)
        queue.add("a")
        await asyncio.sleep(200)
    assert work.runs == [("a", start)]


async def test_failures_back_off_and_are_told() -> None:
    told: list[tuple[str, str, float]] = []
    work = Work()

    def fail(key: str) -> None:
        raise ValueError(f"no {key}")

    work.before = fail
    queue: WorkQueue[str] = WorkQueue(
        work, failed=lambda key, error, seconds: told.append((key, str(error), seconds)), jitter=lambda: 1.0
    )
    async with _running(queue):
        queue.add("a")
        await asyncio.sleep(300)
        work.before = lambda _key: None
        await asyncio.sleep(60)
        runs = len(work.runs)
        await asyncio.sleep(400)
        assert len(work.runs) == runs, "it succeeded: there is nothing to try again"
        work.before = fail
        queue.add("a")
        await asyncio.sleep(0.1)
    delays = [seconds for _, _, seconds in told]
    assert delays[:9] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert told[0][:2] == ("a", "no a")
    assert delays[-1] == 0.5, "a success forgets earlier failures"


async def test_jitter_spreads_what_failed_together() -> None:
    delays: list[float] = []
    values = iter([0.0, 0.5, 1.0])
    work = Work()

    def fail(key: str) -> None:
        raise ValueError(key)

    work.before = fail
    queue: WorkQueue[str] = WorkQueue(
        work, failed=lambda _k, _e, seconds: delays.append(seconds), jitter=lambda: next(values)
    )
    async with _running(queue):
        for key in "abc":
            queue.add(key)
        await asyncio.sleep(0.1)
    assert delays == [0.25, 0.375, 0.5]
    assert max(delays) <= MAX_BACKOFF_SECONDS


async def test_a_failure_of_one_key_does_not_touch_the_others() -> None:
    work = Work()

    def fail_a(key: str) -> None:
        if key == "a":
            raise ValueError(key)

    work.before = fail_a
    queue: WorkQueue[str] = WorkQueue(work, workers=1, failed=lambda *_: None)
    async with _running(queue):
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(0.01)
    assert [k for k, _ in work.runs] == ["a", "b"]


async def test_everything_is_looked_at_again_from_time_to_time() -> None:
    work = Work()
    keys = ["a", "b"]
    queue: WorkQueue[str] = WorkQueue(work, resync=lambda: list(keys))
    async with _running(queue):
        await asyncio.sleep(RESYNC_SECONDS + 1)
        keys.remove("a")
        await asyncio.sleep(RESYNC_SECONDS)
    assert [k for k, _ in work.runs] == ["a", "b", "b"]


async def test_stopping_cancels_what_is_under_way() -> None:
    ended: list[str] = []

    async def work(key: str) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            ended.append(key)
            raise

    queue: WorkQueue[str] = WorkQueue(work)
    async with _running(queue):
        queue.add("a")
        queue.add_after("b", 5000)
        await asyncio.sleep(1)
    assert ended == ["a"]
    assert not queue.alive
    await queue.stop()


async def test_cancelling_run_is_a_clean_end_too() -> None:
    queue: WorkQueue[str] = WorkQueue(Work(seconds=1000))
    task = asyncio.create_task(queue.run())
    queue.add("a")
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert len(asyncio.all_tasks()) == 1


async def test_it_is_alive_while_a_worker_is_free_or_something_was_done() -> None:
    work = Work(seconds=1000)
    queue: WorkQueue[str] = WorkQueue(work, workers=2)
    assert not queue.alive
    async with _running(queue):
        assert queue.alive
        queue.add("a")
        await asyncio.sleep(500)
        assert queue.alive, "one worker is free"
        queue.add("b")
        await asyncio.sleep(200)
        assert not queue.alive, "all workers hang"
        await asyncio.sleep(400)
        assert queue.alive, "one has come back"
