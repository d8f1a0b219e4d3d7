"""Blocking calls off the event loop: a thread for each, a deadline for each, counted, bounded per endpoint.

No pool: six guests whose agents hang must not delay the thaw of a seventh. A thread whose call does not return is left
behind and counted; its call ends when libvirt gives up, or never.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import libvirt

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import (
    AgentError,
    CallTimeoutError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
)

T = TypeVar("T")

TEXT_LIMIT = 256
LOOKS_LIMIT = 48
"""Calls to one endpoint that may be under way before another look at it is refused: only hanging ones add up to so many."""

AGENT_COMMAND_TIMEOUT, AGENT_COMMAND_FAILED = 112, 113
"""libvirt's codes since 11.2 (virterror.h), which bindings built against an older libvirt do not name."""

_AGENT = frozenset(
    {
        libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
        libvirt.VIR_ERR_AGENT_UNSYNCED,
        AGENT_COMMAND_TIMEOUT,
        AGENT_COMMAND_FAILED,
    }
)
_UNREACHABLE = frozenset(
    {
        libvirt.VIR_ERR_RPC,
        libvirt.VIR_ERR_NO_CONNECT,
        libvirt.VIR_ERR_INVALID_CONN,
        libvirt.VIR_ERR_AUTH_FAILED,
        libvirt.VIR_ERR_AUTH_CANCELLED,
    }
)
_RETRYABLE = frozenset({libvirt.VIR_ERR_OPERATION_TIMEOUT, libvirt.VIR_ERR_SYSTEM_ERROR})

_lock = threading.Lock()
_running = 0
_left = 0


def threads_running() -> int:
    """Number of calls of this process that have not returned, those left behind included."""
    return _running


def left_behind() -> int:
    """Number of calls of this process that nobody waits for any more and that have not returned."""
    return _left


def sanitised(text: str) -> str:
    """Make a text from a guest or a daemon fit for status: printable, one line, at most 256 characters."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(plain.split())[:TEXT_LIMIT]


def is_unreachable(error: libvirt.libvirtError) -> bool:
    """Whether nobody answered: what was asked may have been done, or be done later."""
    # A client whose connection broke says "internal error", and only the error's domain tells that it is the connection.
    return error.get_error_code() in _UNREACHABLE or error.get_error_domain() == libvirt.VIR_FROM_RPC


def translate(error: libvirt.libvirtError, what: str) -> HypervisorError:
    """Turn libvirt's error into ours."""
    code = error.get_error_code()
    text = f"{what}: {sanitised(str(error.get_error_message()))}"
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return DomainGoneError(text)
    if code in _AGENT:
        return AgentError(text)
    if is_unreachable(error):
        return HypervisorUnreachableError(text)
    return HypervisorError(text, retryable=code in _RETRYABLE)


class _Call:
    """One call, as its thread and the one who waits for it leave it: counted while the thread alone is there."""

    def __init__(self) -> None:
        self._returned = self._left = False

    def returned(self) -> None:
        """Its thread is at its end."""
        global _left  # noqa: PLW0603 - a process-wide count
        with _lock:
            self._returned = True
            _left -= self._left

    def abandoned(self) -> None:
        """Nobody waits for it any more."""
        global _left  # noqa: PLW0603 - a process-wide count
        with _lock:
            self._left = not self._returned
            _left += self._left


class Calls:
    """The calls to one endpoint. `act` is never refused: it may be the one that frees a VM."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._count = 0

    async def look(self, what: str, function: Callable[..., T], *arguments: Any, timeout: Seconds) -> T:  # noqa: ASYNC109 - the thread is left behind at the deadline
        """As `act`, but raises HypervisorUnreachableError at once while too many calls hang."""
        if self._count >= LOOKS_LIMIT:
            raise HypervisorUnreachableError(
                f"{self._endpoint}: {self._count} calls have not returned; its libvirt hangs"
            )
        return await self.act(what, function, *arguments, timeout=timeout)

    async def act(self, what: str, function: Callable[..., T], *arguments: Any, timeout: Seconds) -> T:  # noqa: ASYNC109 - as above
        """Run a blocking call in a thread of its own.

        Raises HypervisorError or a child of it; CallTimeoutError after `timeout` seconds: the call may still take effect.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        call = _Call()

        def deliver(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None is a result like any other

        def body() -> None:
            result: T | None = None
            failure: BaseException | None = None
            try:
                result = function(*arguments)
            except libvirt.libvirtError as error:
                failure = translate(error, what)
            except BaseException as error:  # noqa: BLE001 - handed to the one who waits
                failure = error
            call.returned()
            self._add(-1)
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(deliver, result, failure)

        self._add(1)
        try:
            threading.Thread(target=body, name=f"libvirt {what}"[:60], daemon=True).start()
        except RuntimeError as error:
            self._add(-1)
            raise HypervisorError(f"{what}: no thread could be started: {error}", retryable=True) from error
        try:
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise CallTimeoutError(f"{what}: no answer within {timeout:g} s") from None
        finally:
            call.abandoned()

    def _add(self, number: int) -> None:
        global _running  # noqa: PLW0603 - a process-wide count
        with _lock:
            _running += number
            self._count += number
