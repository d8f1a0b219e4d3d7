"""The processes of one StorageDriverClass: every request gets one of them for itself, within its deadline.

A driver is foreign, blocking code that may hang inside of C. A request never waits for another one's process, and at its
deadline its own is killed: what hangs for one VM neither delays nor ends another VM's request. Not responsible for how a
process is spoken to (`process`), which driver it is (`registry`), or when a cut began and ended: the caller brackets
calls with its own clock.
"""

# ruff: noqa: ASYNC109 - a deadline here ends a process, which the caller's asyncio.timeout could not do in time
from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from vmsnapshot_operator.core.driver import Capabilities, CutResult, Fit, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import registry, wire
from vmsnapshot_operator.drivers.process import DriverProcess, Setup, word
from vmsnapshot_operator.errors import DriverError, DriverTimeoutError, DriverUnavailableError

_log = logging.getLogger(__name__)

START_SECONDS = 30.0
"""What the start of a process may take on a busy machine; a start that was measured takes 0.5 s."""
_CLOSE_SECONDS = 7.0  # a little more than a retired process gets


class DriverHost:
    """Hosts the driver of one class in processes of its own.

    Every method raises DriverUnavailableError (no driver, wrong parameters, no process), DriverTimeoutError,
    DriverCrashedError, or the driver's own DriverError; each names the class and the operation and has no secret in it.
    `timeout` is in seconds and covers everything: the wait for a process, its start, the work. After a timeout, a crash or a
    cancellation the process is dead or dying and its effect is unknown: delete by name before trying again.

    At most `max_workers` processes work at once, and as many more at what may copy (`wait_ready`, `revert`, `clone`): hours
    of copying hold nobody's cut up. Idle ones beyond the first end after `idle_seconds`.

    What may copy takes `stall`, in seconds, and `on_progress` beside `timeout`: it is ended when the driver says nothing of
    its progress for `stall`, however much of `timeout` is left, and each word of it is passed on, on the loop's thread. What
    was copied by then is found by name when the call is repeated. It also ends by itself, as what prepares and cuts does, when the
    moment is over that `fence` tells, the file descriptor of a `fence.Fence` (-1: none); after it none of these begins.
    """

    def __init__(
        self,
        class_name: str,
        driver: str,
        parameters: Mapping[str, str],
        credentials: Mapping[str, str],
        *,
        max_workers: int = 4,
        idle_seconds: float = 60.0,
        fence: int = -1,
    ) -> None:
        self._setup = Setup(
            class_name=class_name,
            driver=driver,
            parameters=dict(parameters),
            credentials=dict(credentials),
            fence=fence,
        )
        self._spec = ""
        self._max_workers = max_workers
        self._idle_seconds = idle_seconds
        self._permits = asyncio.Semaphore(max_workers)
        self._long_permits = asyncio.Semaphore(max_workers)
        self._processes: set[DriverProcess] = set()
        self._idle: list[DriverProcess] = []
        self._closed = False

    @property
    def alive(self) -> bool:
        """Tell whether a process with the loaded driver is running. False is no fault: the next request starts one."""
        return any(p.usable for p in self._processes)

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the numbers of all processes of this class that have not ended yet."""
        return tuple(sorted(p.pid for p in self._processes))

    async def start(self, *, timeout: float = START_SECONDS) -> None:
        """Start the first process, so that a driver that does not load, or wrong parameters, are found out here."""
        async with self._process("start", timeout):
            pass

    async def close(self) -> None:
        """End all processes: the idle ones by themselves, the working ones at once. Returns within seconds."""
        self._closed = True
        for process in list(self._processes):
            if process in self._idle:
                process.retire()
            else:
                process.kill()
        self._idle.clear()
        ends = [asyncio.ensure_future(p.ended.wait()) for p in self._processes]
        if ends:
            _, late = await asyncio.wait(ends, timeout=_CLOSE_SECONDS)
            for each in late:
                each.cancel()
        for process in list(self._processes):
            _log.error("%sprocess %d does not end", process.setup.where("close"), process.pid)
            process.forget()

    async def capabilities(self, *, timeout: float) -> Capabilities:
        """Let the driver probe its storage system."""
        result: Capabilities = await self._call("capabilities", (), timeout)
        return result

    async def can_handle(self, volumes: Sequence[Volume], *, timeout: float) -> Fit:
        """Ask whether the driver can cut all these volumes, and if not, why."""
        async with self._process("can_handle", timeout) as (process, seconds):
            fit: Fit = await process.call("can_handle", (tuple(volumes),), seconds)
            return _shown(process, fit)

    async def prepare(self, request: SnapshotRequest, *, timeout: float | None = None) -> None:
        """Let the driver do what is slow; within the request's own timeout if none is given."""
        async with self._process("prepare", request.timeout if timeout is None else timeout) as (process, seconds):
            await _prepare(process, request, seconds)

    @asynccontextmanager
    async def reserve(
        self, request: SnapshotRequest | None = None, *, timeout: float = START_SECONDS
    ) -> AsyncIterator[Slot]:
        """Hold one loaded process for a window, taken before the guest is frozen.

        With a request, it is the process that prepared it; if that one is gone or busy, another one that prepares it
        again now. `slot.cut` then finds everything looked up.
        """
        name = None if request is None else request.name
        async with self._process("reserve", timeout, name) as (process, seconds):
            if request is not None and not process.is_warm(request.name):
                await _prepare(process, request, seconds)
            yield Slot(process)

    async def wait_ready(
        self,
        request: SnapshotRequest,
        cut: CutResult,
        *,
        timeout: float,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Wait until the cut can be restored; a copying driver copies here."""
        await self._call("wait_ready", (request, cut), timeout, stall, on_progress)

    async def missing(self, cuts: Sequence[CutResult], *, timeout: float) -> frozenset[Handle]:
        """Ask which handles of these cuts, all of them ready, are not held (any more)."""
        return frozenset(await self._call("missing", (tuple(cuts),), timeout))

    async def check_revert(self, cut: CutResult, onto: Sequence[Volume], *, timeout: float) -> tuple[Fit, ...]:
        """Ask, for each volume in order, whether it could be set back."""
        async with self._process("check_revert", timeout) as (process, seconds):
            fits = await process.call("check_revert", (cut, tuple(onto)), seconds)
            if len(fits) != len(onto):
                text = f"the driver gave {len(fits)} answers for {len(onto)} volumes"
                raise DriverError(process.setup.where("check_revert") + text)
            return tuple(_shown(process, fit) for fit in fits)

    async def revert(
        self,
        cut: CutResult,
        onto: Sequence[Volume],
        *,
        timeout: float,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Set the volumes back to the cut; repeatable."""
        await self._call("revert", (cut, tuple(onto)), timeout, stall, on_progress)

    async def clone(
        self,
        cut: CutResult,
        name: str,
        *,
        timeout: float,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Mapping[VolumeId, Layer]:
        """Make new volumes from the cut, held under `name` until they are kept.

        Raises DriverError if the answer is not about exactly the volumes of the cut.
        """
        found: Mapping[VolumeId, Layer] = await self._call("clone", (cut, name), timeout, stall, on_progress)
        if found.keys() != cut.handles.keys():
            text = f"the driver answered with {len(found)} new volumes, not with those of the {len(cut.handles)} cut"
            raise DriverError(self._setup.where("clone") + text)
        return found

    async def keep(self, name: str, *, timeout: float) -> None:
        """Hand a clone's volumes over to the VM: they are neither listed nor deleted under the clone's name any more."""
        await self._call("keep", (name,), timeout)

    async def delete(self, name: str, *, timeout: float) -> None:
        """Delete all that is held under a request name; missing is success."""
        await self._call("delete", (name,), timeout)

    async def list(self, prefix: str, *, timeout: float) -> tuple[str, ...]:
        """Name the requests that begin so and of which anything is held.

        Raises DriverError if the driver names others: whoever asked may go on to delete what is named.
        """
        async with self._process("list", timeout) as (process, seconds):
            names: tuple[str, ...] = await process.call("list", (prefix,), seconds)
            for name in names:
                if not name.startswith(prefix):
                    text = f'asked for "{prefix}", the driver named "{process.clean(name)}"'
                    raise DriverError(process.setup.where("list") + text)
            return names

    async def _call(
        self,
        operation: str,
        arguments: tuple[Any, ...],
        timeout: float,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        async with self._process(operation, timeout) as (process, seconds):
            return await process.call(operation, arguments, seconds, stall=stall, on_progress=on_progress)

    @asynccontextmanager
    async def _process(
        self, operation: str, timeout: float, prepared: str | None = None
    ) -> AsyncIterator[tuple[DriverProcess, float]]:
        """Hold one process, and say how many seconds are left for its work."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        where = self._setup.where(operation)
        permits = self._long_permits if operation in wire.LONG else self._permits
        try:
            async with asyncio.timeout_at(deadline):
                await permits.acquire()
        except TimeoutError:
            text = f"all {self._max_workers} processes were busy for {timeout:.3g} s; nothing was done"
            raise DriverTimeoutError(where + text) from None
        process = None
        try:
            if self._closed:
                raise DriverUnavailableError(f"{where}its processes are ended: the class was removed or changed")
            process = self._take(prepared) or await self._spawn(where, deadline)
            yield process, max(deadline - loop.time(), 0.0)
        finally:
            if process is not None:
                self._put_back(process)
            permits.release()

    def _take(self, prepared: str | None) -> DriverProcess | None:
        """Take an idle process, if possible the one that prepared a request."""
        self._idle = [p for p in self._idle if p.usable]
        if not self._idle:
            return None
        chosen = next((p for p in self._idle if prepared and p.is_warm(prepared)), self._idle[-1])
        self._idle.remove(chosen)
        return chosen

    async def _spawn(self, where: str, deadline: float) -> DriverProcess:
        dying = [p.pid for p in self._processes if p.killed]
        if len(dying) >= 2 * self._max_workers:
            text = f"{len(dying)} killed processes do not end ({', '.join(map(str, dying))}): is its storage hanging?"
            raise DriverUnavailableError(where + text)
        if not self._spec:
            try:
                self._spec = await asyncio.to_thread(registry.find, self._setup.driver)
            except DriverUnavailableError as error:
                raise DriverUnavailableError(where + error.message, reason=error.reason, retryable=False) from None
        process = DriverProcess(self._setup, self._spec, self._processes.discard)
        self._processes.add(process)
        await process.greet(deadline)
        return process

    def _put_back(self, process: DriverProcess) -> None:
        if not process.usable:
            return
        if self._closed:
            process.kill()
            return
        self._idle.append(process)
        asyncio.get_running_loop().call_later(self._idle_seconds, self._trim, process, process.calls)

    def _trim(self, process: DriverProcess, calls: int) -> None:
        """End a process that had nothing to do since, unless it is the only idle one."""
        if process in self._idle and process.calls == calls and len(self._idle) > 1:
            self._idle.remove(process)
            process.retire()


class Slot:
    """One loaded process, held for one window. It is the caller's until `reserve` is left."""

    def __init__(self, process: DriverProcess) -> None:
        self._process = process

    @property
    def alive(self) -> bool:
        """Tell whether the process is still there: to be asked right before the guest is frozen."""
        return self._process.usable

    @property
    def pid(self) -> int:
        """Return the number of the process."""
        return self._process.pid

    async def prepare(self, request: SnapshotRequest) -> None:
        """Let this very process prepare a request, within the request's timeout."""
        await _prepare(self._process, request, request.timeout)

    async def inherit(self, request: SnapshotRequest, since: Mapping[VolumeId, Handle]) -> Mapping[VolumeId, Fit]:
        """Let it fill volumes that it prepared with what earlier cuts hold, within the request's timeout.

        Raises DriverError if the answer is not about exactly the volumes of `since`.
        """
        process = self._process
        found: Mapping[VolumeId, Fit] = await process.call("inherit", (request, since), request.timeout)
        wanted = replace(request, volumes=tuple(v for v in request.volumes if v.id in since))
        _must_be_about(process, "inherit", wanted, found)
        return {v: _shown(process, fit) for v, fit in found.items()}

    async def targets(self, request: SnapshotRequest) -> Mapping[VolumeId, Layer]:
        """Ask which volumes of those that it prepared the hypervisor is to copy into, within the request's timeout.

        Raises DriverError if the answer is not about exactly the volumes that were asked for, or does not name a file of its own for
        each, by the name of which everybody can see whose it is.
        """
        process = self._process
        found: Mapping[VolumeId, Layer] = await process.call("targets", (request,), request.timeout)
        _must_be_about(process, "targets", request, found)
        sources = {layer.source for layer in found.values()}
        named = all(PurePosixPath(s).is_absolute() and PurePosixPath(s).name.startswith(request.name) for s in sources)
        if not named or len(sources) < len(found) or any(f.kind is not SourceKind.FILE for f in found.values()):
            text = f"the driver did not answer with one file for each volume whose name begins with {request.name}"
            raise DriverError(process.setup.where("targets") + text)
        return found

    async def cut(self, request: SnapshotRequest, until: float | None = None) -> CutResult:
        """Cut, within the request's timeout. Nothing is started, imported or looked up here.

        `until`, a reading of CLOCK_BOOTTIME: from then on the process begins nothing, even if this one was stopped after it had
        last looked at the clock and asks for it all the same.

        At the deadline and on cancellation the process is killed without being waited for, and whatever it may still
        answer is never used. Raises DriverError if the answer is not about exactly the volumes that were asked for.
        """
        process = self._process
        result: CutResult = await process.call("cut", (request,), request.timeout, until)
        _must_be_about(process, "cut", request, result.handles)
        return result


def _must_be_about(
    process: DriverProcess, operation: str, request: SnapshotRequest, found: Mapping[VolumeId, Any]
) -> None:
    missing = {v.id for v in request.volumes} - found.keys()
    strange = found.keys() - {v.id for v in request.volumes}
    if missing or strange:
        text = f"the driver answered without {len(missing)} of the volumes and with {len(strange)} others"
        raise DriverError(process.setup.where(operation) + text)


async def _prepare(process: DriverProcess, request: SnapshotRequest, seconds: float) -> None:
    await process.call("prepare", (request,), seconds)
    process.remember(request.name)


def _shown(process: DriverProcess, fit: Fit) -> Fit:
    """Return a driver's answer fit for status."""
    return Fit(ok=fit.ok, reason=word(fit.reason, "DriverSaysNo"), message=process.clean(fit.message))
