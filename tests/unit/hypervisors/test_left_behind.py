"""Calls that hang are counted from the moment nobody waits for them until they return."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import CallTimeoutError
from vmsnapshot_operator.hypervisors import calls
from vmsnapshot_operator.hypervisors.calls import Calls, left_behind, threads_running

GUARD_SECONDS = 30


async def _none_runs() -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while threads_running():  # noqa: ASYNC110 - threads say nothing when they end
            await asyncio.sleep(0)


async def test_one_that_returns_in_time_is_never_counted() -> None:
    assert await Calls("host").act("look", left_behind, timeout=Seconds(GUARD_SECONDS)) == 0
    await _none_runs()
    assert left_behind() == 0


async def test_one_that_hangs_is_counted_until_it_returns() -> None:
    end = threading.Event()
    with pytest.raises(CallTimeoutError):
        await Calls("host").act("look", end.wait, timeout=Seconds(0))
    assert left_behind() == 1
    end.set()
    await _none_runs()
    assert left_behind() == 0


async def test_so_is_one_whose_caller_gave_up() -> None:
    begun, end = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        end.wait(GUARD_SECONDS)

    task = asyncio.create_task(Calls("host").act("look", hang, timeout=Seconds(GUARD_SECONDS)))
    await asyncio.to_thread(begun.wait, GUARD_SECONDS)
    assert left_behind() == 0, "it is waited for"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert left_behind() == 1
    end.set()
    await _none_runs()
    assert left_behind() == 0


def test_returned_and_abandoned_at_the_same_moment_counts_for_nothing() -> None:
    for order in (("returned", "abandoned"), ("abandoned", "returned")):
        call = calls._Call()
        for what in order:
            getattr(call, what)()
        assert left_behind() == 0
