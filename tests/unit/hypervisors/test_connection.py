"""A daemon that hangs, on a clock that the event loop fakes: few threads wait for it, and it is not missed once it answers again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, cast

import libvirt
import pytest

from vmsnapshot_operator.errors import CallTimeoutError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors import connection
from vmsnapshot_operator.hypervisors.calls import Calls
from vmsnapshot_operator.hypervisors.connection import HANGING, Connection

pytestmark = pytest.mark.looptime


class Link:
    """A virConnect."""

    closed = False

    def isAlive(self) -> bool:  # noqa: N802 - libvirt's name
        return not self.closed

    def setKeepAlive(self, *_: int) -> None:  # noqa: N802 - libvirt's name
        return

    def close(self) -> None:
        self.closed = True


class Daemon:
    """What is connected to, and the calls to it. `hangs`: connects do not return; `left`: those that have not, `made`: what did."""

    def __init__(self) -> None:
        self.hangs = self.refuses = self.late = False
        self.left: list[Callable[[], Any]] = []
        self.made: list[Link] = []
        self.tries: list[float] = []

    async def act(self, _what: str, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:  # noqa: ASYNC109 - as the real one
        if function is connection._shut:
            return function(*arguments)
        self.tries.append(asyncio.get_running_loop().time())
        if not self.hangs:
            try:
                return function(*arguments)
            except libvirt.libvirtError as error:
                raise HypervisorUnreachableError(str(error)) from error

        def body() -> None:
            with contextlib.suppress(libvirt.libvirtError):  # nobody is there to be told
                function(*arguments)

        self.left.append(body)
        await asyncio.sleep(timeout)
        if self.late:  # its thread comes to its end between the deadline and the one who notices that
            self.left.pop()()
        raise CallTimeoutError("no answer")

    def open(self, _uri: str) -> Link:
        if self.refuses:
            raise libvirt.libvirtError("connection reset")
        self.made.append(Link())
        return self.made[-1]

    async def answer(self) -> None:
        """All connects that hang return."""
        self.hangs = False
        left, self.left = self.left, []
        for each in left:
            each()
        await asyncio.sleep(0)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    made = Daemon()
    monkeypatch.setattr(connection.libvirt, "open", made.open)
    monkeypatch.setattr(connection, "start_event_loop", lambda: None)
    return made


@pytest.fixture
def link(daemon: Daemon) -> Connection:
    return Connection("qemu:///system", "host", cast("Calls", daemon))


async def ask(link: Connection, seconds: float) -> None:
    """Ask for a connection once a second for so long, as sweeps and thaws do."""
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        with pytest.raises(HypervisorUnreachableError):
            await link.get()
        await asyncio.sleep(1)


@pytest.mark.parametrize("hung", [15, 60, 600])
async def test_a_daemon_that_answers_again_is_connected_to_at_once(daemon: Daemon, link: Connection, hung: int) -> None:
    daemon.hangs = True
    await ask(link, hung)
    await daemon.answer()
    assert all(made.closed for made in daemon.made), "nobody waits for those any more"
    assert await link.get() is daemon.made[-1]
    assert not daemon.made[-1].closed


async def test_the_longer_it_hangs_the_fewer_threads_are_added(daemon: Daemon, link: Connection) -> None:
    daemon.hangs = True
    await ask(link, 45)
    assert len(daemon.left) >= HANGING, "a short hang is noticed to have ended also if a connect was lost"
    await ask(link, 1800)
    assert len(daemon.left) <= HANGING + 8
    before = len(daemon.tries)
    await ask(link, 1300)
    assert len(daemon.tries) > before, "a connect may be lost for good with its host"


async def test_a_daemon_that_refuses_is_asked_every_ten_seconds_at_least(daemon: Daemon, link: Connection) -> None:
    daemon.refuses = True
    await ask(link, 600)
    gaps = [later - earlier for earlier, later in zip(daemon.tries, daemon.tries[1:], strict=False)]
    assert max(gaps) <= 11
    daemon.refuses = False
    await asyncio.sleep(10)
    assert await link.get() is daemon.made[0]


async def test_connects_that_fail_after_all_make_it_try_again_soon(daemon: Daemon, link: Connection) -> None:
    """It hung and was killed."""
    daemon.hangs = True
    await ask(link, 1000)
    daemon.refuses = True
    await daemon.answer()
    daemon.refuses = False
    await asyncio.sleep(10)
    assert await link.get() is daemon.made[0]


async def test_one_that_comes_in_the_last_moment_is_taken(daemon: Daemon, link: Connection) -> None:
    daemon.hangs = daemon.late = True
    assert await link.get() is daemon.made[0]
    assert not daemon.made[0].closed


async def test_connects_whose_askers_gave_up_are_counted(daemon: Daemon, link: Connection) -> None:
    """A VM was found on another endpoint meanwhile: nobody waits for this one, again and again."""
    daemon.hangs = True
    for _ in range(1000):
        task = asyncio.create_task(link.get())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(daemon.left) <= HANGING + 3
    await daemon.answer()
    assert await link.get() is daemon.made[-1]
