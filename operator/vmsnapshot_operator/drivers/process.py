"""One process of a storage driver, seen from the operator: start, ask, kill, log. Not which process serves whom (`host`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vmsnapshot_operator.core.driver import Progress, is_reason
from vmsnapshot_operator.drivers import wire
from vmsnapshot_operator.drivers.redaction import printable, redactor
from vmsnapshot_operator.errors import DriverCrashedError, DriverError, DriverTimeoutError, DriverUnavailableError

_log = logging.getLogger(__name__)

_GRACE = 5.0  # seconds that a process gets to close its connections before it is killed
_LONGEST_LINE = 64 * 1024
_LINES, _PER_SECONDS = 200, 10.0

# The operator's environment is not the driver's business (and may hold what is not for it): only what a program needs
# to find its files and speak the user's language.
_ENVIRONMENT = re.compile(r"PATH|HOME|TMPDIR|TZ|LANG|LC_\w+|LD_LIBRARY_PATH|PYTHON\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE")


def word(text: str, otherwise: str) -> str:
    """Return a driver's reason if it is one CamelCase word, as conditions need it."""
    return text if is_reason(text) else otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a class's processes are made from. Its representation shows no parameter and no credential.

    `fence`: the file descriptor of a `fence.Fence`, or -1 for none.
    """

    class_name: str
    driver: str
    parameters: Mapping[str, str] = field(repr=False)
    credentials: Mapping[str, str] = field(repr=False)
    fence: int = -1

    def where(self, operation: str) -> str:
        """Return the beginning of every message about this class."""
        return f'storage class "{self.class_name}" (driver {self.driver}), {operation}: '


class DriverProcess:
    """A child process with one driver in it, for one request at a time.

    It is started by the constructor and killed by the kernel when the thread that called it ends: make it on the event
    loop's thread. `on_end` is called once, when the process has ended and is reaped.
    """

    def __init__(self, setup: Setup, spec: str, on_end: Callable[[DriverProcess], None]) -> None:
        self.setup = setup
        self.calls = 0
        self.usable = False
        self.killed = False
        self.prepared: tuple[str, float] | None = None
        self.ended = asyncio.Event()
        self._spec = spec
        self._on_end = on_end
        self._hide = redactor(setup.credentials)
        self._loop = asyncio.get_running_loop()
        self._last_line = ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._socket, theirs = socket.socketpair()
        output, their_output = os.pipe()
        try:
            self._process = self._spawn(theirs, their_output)
        except OSError as error:
            self._socket.close()
            os.close(output)
            text = f"{setup.where('start')}its process cannot be started: {error}"
            raise DriverUnavailableError(text) from error
        finally:
            theirs.close()
            os.close(their_output)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._reap)
        self._logging = self._loop.create_task(self._read_log(output), name=f"log of driver process {self.pid}")

    def _spawn(self, theirs: socket.socket, output: int) -> subprocess.Popen[bytes]:
        module = "vmsnapshot_operator.drivers.worker"
        identity = [self.setup.class_name, self.setup.driver]  # for whoever looks at `ps`
        return subprocess.Popen(  # noqa: S603 - our own module, no shell
            [
                sys.executable,
                "-P",
                "-m",
                module,
                str(theirs.fileno()),
                str(self.setup.fence),
                str(os.getpid()),
                *identity,
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=tuple(fd for fd in (theirs.fileno(), self.setup.fence) if fd >= 0),
            env={k: v for k, v in os.environ.items() if _ENVIRONMENT.fullmatch(k)},
            start_new_session=True,  # so that a kill reaches whatever the driver itself started
        )

    async def greet(self, deadline: float) -> None:
        """Wait until the driver is loaded and made; `deadline` is a reading of the loop's clock.

        Raises DriverUnavailableError with the driver's reason; the process is gone then.
        """
        hello = {
            "driver": self._spec,
            "parameters": dict(self.setup.parameters),
            "credentials": dict(self.setup.credentials),
            "path": [p for p in sys.path if p],
        }
        try:
            async with asyncio.timeout_at(deadline):
                self._reader, self._writer = await asyncio.open_connection(sock=self._socket, limit=wire.MAX_FRAME)
            wire.raise_failure(await self._exchange(wire.frame(hello), deadline))
        except TimeoutError:
            self.kill()
            text = f"{self.setup.where('start')}its process {self.pid} was not ready in time and was killed"
            raise DriverUnavailableError(text) from None
        except (EOFError, OSError):
            self.kill()
            await asyncio.wait([self._logging], timeout=1.0)  # nobody is frozen for us yet, and the reason stands there
            said = f": {self._last_line}" if self._last_line else ""
            text = f"{self.setup.where('start')}its process {self.pid} ended before it was ready{said}"
            raise DriverUnavailableError(text) from None
        except DriverError as error:
            self.kill()
            raise self._told("start", error) from None
        except BaseException:
            self.kill()
            raise
        self.usable = True

    async def call(
        self,
        operation: str,
        arguments: tuple[Any, ...],
        seconds: float,
        until: float | None = None,
        *,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        """Ask the driver and return its answer. Only for the one who holds this process.

        `seconds` is for the whole. With `stall`, in seconds, the process is also killed when the driver says nothing of its
        progress for so long; each word of it is passed to `on_progress`. `until`: a reading of CLOCK_BOOTTIME at which nothing
        may be begun any more, if that is sooner than in `seconds`.

        On the deadline and on cancellation the process is killed at once and not waited for; no answer of it can be
        used after that. Raises DriverTimeoutError, DriverCrashedError, or the driver's own DriverError.
        """
        began = self._loop.time()
        deadline = began + seconds
        latest = wire.boottime() + seconds
        self.calls += 1
        self.prepared = None
        said: Progress | None = None

        def heard(progress: Progress) -> None:
            nonlocal said
            said = progress
            if on_progress is not None:
                on_progress(progress)

        try:
            order = wire.call(operation, arguments, seconds, latest, min(latest, until or latest))
            answer = await self._exchange(order, deadline, stall, heard)
            return wire.result(operation, answer)
        except TimeoutError:
            self.kill()
            stalled = stall is not None and self._loop.time() < deadline
            text = f"no progress for {stall:.3g} s" if stalled else f"no answer within {seconds:.3g} s"
            if said is not None:
                text += f", {said.done_bytes} of {said.total_bytes} bytes done"
            text += f"; its process {self.pid} was killed, what it did is unknown"
            raise DriverTimeoutError(self.setup.where(operation) + text) from None
        except (EOFError, OSError):
            self.kill()
            if self._process.poll() == -signal.SIGALRM:  # the worker's own deadline was faster than ours
                text = f"no answer within {seconds:.3g} s; its process {self.pid} ended, what it did is unknown"
                raise DriverTimeoutError(self.setup.where(operation) + text) from None
            text = f"its process {self.pid} ended{self._how()} before it answered; what it did is unknown"
            raise DriverCrashedError(self.setup.where(operation) + text) from None
        except DriverError as error:
            raise self._told(operation, error) from None
        except BaseException:
            self.kill()
            raise

    async def _exchange(
        self,
        request: bytes,
        deadline: float,
        stall: float | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Send one frame and read the answer. Raises TimeoutError, EOFError or OSError; then the process is of no use."""
        assert self._reader is not None  # noqa: S101 - opened by `greet`
        assert self._writer is not None  # noqa: S101

        def next_deadline() -> float:
            return deadline if stall is None else min(deadline, self._loop.time() + stall)

        async with asyncio.timeout_at(next_deadline()) as limit:
            if self.killed:
                raise EOFError
            self._writer.write(request)
            await self._writer.drain()
            while True:
                prefix = await self._reader.readexactly(wire.LENGTH.size)
                try:
                    answer = wire.parse(await self._reader.readexactly(wire.body_length(prefix)))
                    progress = wire.reported(answer)
                except DriverError:
                    self.kill()  # out of step: nothing that follows can be trusted
                    raise
                if progress is None:
                    break
                limit.reschedule(next_deadline())
                on_progress(progress)
        if self._loop.time() > deadline:  # this process itself stood still, and the answer came after the deadline
            raise TimeoutError
        return answer

    def _told(self, operation: str, error: DriverError) -> DriverError:
        text = self.setup.where(operation) + (printable(self._hide(error.message)) or "failed without a reason")
        return type(error)(text, reason=word(error.reason, type(error).reason), retryable=error.retryable)

    def remember(self, name: str) -> None:
        """Note that this process has just prepared a request."""
        self.prepared = (name, self._loop.time())

    def is_warm(self, name: str) -> bool:
        """Tell whether this process prepared the request last, and so recently that it has not put it away."""
        if self.prepared is None or self.prepared[0] != name:
            return False
        return self._loop.time() - self.prepared[1] < wire.REST_SECONDS / 2

    def clean(self, text: str) -> str:
        """Return a text that the driver wrote, fit to be shown."""
        return printable(self._hide(text))

    def kill(self) -> None:
        """Kill the process and all it started, at once. It is reaped in the background."""
        self.usable = False
        self.killed = True
        if self._process.returncode is None:  # not reaped, hence the number is still this process's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._hang_up()

    def retire(self) -> None:
        """Let the process end by itself, and kill it if it does not."""
        self.usable = False
        self._hang_up()
        self._loop.call_later(_GRACE, self.kill)

    def _hang_up(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        else:
            self._socket.close()

    def _reap(self) -> None:
        if self._process.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        expected = self.killed or not self.usable
        level = logging.INFO if expected else logging.ERROR
        _log.log(level, "%sprocess %d ended%s", self.setup.where("process"), self.pid, self._how())
        self.usable = False
        self._hang_up()
        self.ended.set()
        self._on_end(self)

    def _how(self) -> str:
        status = self._process.returncode
        if status is None:
            return ""
        if status >= 0:
            return f" with status {status}"
        try:
            return f" by {signal.Signals(-status).name}"
        except ValueError:
            return f" by signal {-status}"

    def forget(self) -> None:
        """Stop reading the log: something that the driver started may hold it open for ever."""
        self._logging.cancel()

    async def _read_log(self, descriptor: int) -> None:
        reader = asyncio.StreamReader(limit=_LONGEST_LINE)
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await self._loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        since, lines, dropping = self._loop.time(), 0, False
        try:
            while True:
                whole = True
                try:
                    raw = await reader.readuntil()
                except asyncio.IncompleteReadError as rest:
                    raw = rest.partial
                    if not raw:
                        return
                except asyncio.LimitOverrunError as overrun:
                    # Dropped as a whole: a piece could begin in the middle of a secret and would not be recognised.
                    await reader.readexactly(overrun.consumed)
                    raw, whole = b"(a line that is too long to be logged)", False
                skip, dropping = dropping, not whole
                if self._loop.time() - since > _PER_SECONDS:
                    if lines > _LINES:
                        _log.warning("%s%d lines were not logged", self.setup.where("log"), lines - _LINES)
                    since, lines = self._loop.time(), 0
                text = "" if skip else self.clean(raw.decode(errors="replace"))
                if text:
                    self._last_line = text
                    lines += 1
                    if lines <= _LINES:
                        _log.info("%s%s", self.setup.where(f"process {self.pid}"), text)
        finally:
            transport.close()
