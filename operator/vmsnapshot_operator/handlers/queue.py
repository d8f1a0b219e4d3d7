"""The keyed work queue: each key is worked on by one worker at a time, again when it was added meanwhile, later when it failed.

Not what the work is, nor where keys come from.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

RESYNC_SECONDS = 600.0
"""Everything is looked at again so often, whatever was missed or forgotten."""

MAX_BACKOFF_SECONDS = 60.0
_FIRST_BACKOFF_SECONDS = 0.5
_STUCK_SECONDS = 120.0
"""No single look at an object takes that long: if all workers are that busy, the queue is stuck."""


def _log_failure(key: object, error: Exception, seconds: float) -> None:
    log.error("%s failed, trying again in %.1f s: %s", key, seconds, error, exc_info=error)


class WorkQueue(Generic[Key]):
    """Calls `worker` with keys. What it returns is when to look again (seconds), or None for not until it is added.

    `failed` is told of each exception with the seconds until the next try: they double from half a second to a minute, with
    jitter. `resync` names all keys that are to be looked at every RESYNC_SECONDS. Time is the event loop's own clock, and all
    methods belong to the event loop's thread.
    """

    def __init__(
        self,
        worker: Callable[[Key], Awaitable[float | None]],
        *,
        workers: int = 8,
        resync: Callable[[], Iterable[Key]] | None = None,
        failed: Callable[[Key, Exception, float], None] = _log_failure,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._worker = worker
        self._workers = workers
        self._resync = resync
        self._failed = failed
        self._jitter = jitter
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._running: set[Key] = set()
        self._again: set[Key] = set()
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._task: asyncio.Task[None] | None = None
        self._progress = 0.0

    @property
    def depth(self) -> int:
        """How many keys wait for a worker."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether it runs and is not stuck: a worker is idle, or one has finished something lately."""
        if self._task is None or self._task.done():
            return False
        lately = asyncio.get_running_loop().time() - self._progress < _STUCK_SECONDS
        return lately or len(self._running) < self._workers

    def add(self, key: Key) -> None:
        """Have this key worked on now; once more afterwards if it is being worked on."""
        self._drop_timer(key)
        if key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Have this key worked on in so many seconds, or sooner if that was asked for already."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        before = self._timers.get(key)
        if before is not None and before.when() <= when:
            return
        self._drop_timer(key)
        self._timers[key] = loop.call_at(when, self.add, key)

    async def run(self) -> None:
        """Work until cancelled or stopped; leaves no task and no timer behind."""
        self._task = asyncio.current_task()
        self._progress = asyncio.get_running_loop().time()
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(self._workers):
                    group.create_task(self._work(), name=f"worker {number}")
                group.create_task(self._resync_all(), name="resync")
        finally:
            self._task = None
            for key in list(self._timers):
                self._drop_timer(key)

    async def stop(self) -> None:
        """End `run` and wait for its end; what is being worked on is cancelled."""
        task = self._task
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _work(self) -> None:
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._running.add(key)
            # What was asked for later is overtaken by this very look, which says anew when to look again.
            self._drop_timer(key)
            try:
                await self._once(key)
            finally:
                self._running.discard(key)
                self._progress = asyncio.get_running_loop().time()
            if key in self._again:
                self._again.discard(key)
                self.add(key)

    async def _once(self, key: Key) -> None:
        try:
            seconds = await self._worker(key)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told to `failed`, and the key is tried again
            seconds = self._backoff(key)
            self._failed(key, error, seconds)
        else:
            self._failures.pop(key, None)
        if seconds is not None:
            self.add_after(key, seconds)

    def _backoff(self, key: Key) -> float:
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        longest = min(MAX_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
        # Many keys often fail together (the API server was away): they must not come back together.
        return longest * (0.5 + 0.5 * self._jitter())

    async def _resync_all(self) -> None:
        while self._resync is not None:
            await asyncio.sleep(RESYNC_SECONDS)
            for key in self._resync():
                self.add(key)

    def _drop_timer(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
