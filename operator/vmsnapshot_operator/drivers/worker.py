"""The process in which a storage driver lives: `python -m vmsnapshot_operator.drivers.worker FD FENCE PARENT CLASS DRIVER`.

One request at a time, read from an inherited socket; parameters and credentials come through it as well, never by
argument or environment, where `ps` and /proc show them. It ends when the operator closes the socket, ends, or is
killed, at the deadline of a request even if nobody is left to kill it, and in the middle of what makes something when the moment is
over that the operator tells by the file descriptor FENCE (`fence`; -1: none). Not responsible for the pool (`host`).

A driver may have a method `rest()`: it is called when a cut has been answered, and when nothing was asked for a while after
something was prepared, so that what `prepare` opened for the window (connections, images) does not stay open for ever. A
method `progress()` is called by a thread of its own while a long operation is at work.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vmsnapshot_operator.core.driver import StorageDriver
from vmsnapshot_operator.drivers import fence, registry, wire
from vmsnapshot_operator.errors import DriverError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15


def _end_with(parent: int, name: str) -> None:
    """Have the kernel kill this process when its parent ends, whatever a driver's C code is doing then."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    libc.prctl(_PR_SET_NAME, f"driver:{name}".encode()[:15], 0, 0, 0)
    if os.getppid() != parent:  # it ended before the line above: the signal will never come
        os._exit(1)


def _call(driver: StorageDriver, message: dict[str, Any], fd: int) -> bytes:
    operation = str(message["operation"])
    arguments = wire.OPERATIONS[operation].arguments.validate_python(message["arguments"])
    moment = wire.boottime()
    left = float(message["until"]) - moment
    if left <= 0 or moment >= float(message["begin"]) or (_is_fenced(operation, fd) and fence.is_over(fd)):
        text = "it was asked for so late that its time was over; nothing was done"
        return wire.failure(DriverError(text, reason="DriverTimeout", retryable=True))
    # The default action of SIGALRM ends the process inside of any C call, also while the operator itself is stopped:
    # a cut must not be finished after its deadline by a process that nobody could kill in time.
    signal.setitimer(signal.ITIMER_REAL, max(min(float(message["seconds"]), left), 0.001))
    try:
        return wire.answer(operation, getattr(driver, operation)(*arguments))
    except DriverError as error:
        return wire.failure(error)
    except Exception as error:  # noqa: BLE001 - whatever a driver raises is its answer; the trace goes to the operator's log
        traceback.print_exc()
        return wire.failure(DriverError(f"{type(error).__name__}: {error}"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _reporting(driver: StorageDriver, operation: str, sock: socket.socket) -> Iterator[None]:
    """Tell the operator how far a long operation is, as often as the driver can say; nothing more when this is left."""
    ask = getattr(driver, "progress", None)
    if ask is None or operation not in wire.LONG:
        yield
        return
    over, sending = threading.Event(), threading.Lock()

    def report() -> None:
        failed = False
        while not over.wait(wire.REPORT_SECONDS):
            try:
                found = ask()
                told = b"" if found is None else wire.progress(found)
            except Exception:  # noqa: BLE001 - the operation itself goes on; the trace goes to the operator's log, once
                if not failed:
                    traceback.print_exc()
                failed = True
                continue
            with sending:
                if not over.is_set():
                    sock.sendall(told)

    # Not waited for: a question that hangs must not hold the answer up.
    threading.Thread(target=report, name="progress", daemon=True).start()
    try:
        yield
    finally:
        with sending:
            over.set()


def _is_fenced(operation: str, fd: int) -> bool:
    return fd >= 0 and operation in wire.FENCED


@contextmanager
def _fenced(operation: str, fd: int) -> Iterator[None]:
    """End this process if it still makes something when another instance may act."""
    over = threading.Event()
    if not _is_fenced(operation, fd):
        yield
        return

    def watch() -> None:
        while not over.wait(wire.FENCE_SECONDS):
            if fence.is_over(fd):
                os.killpg(0, signal.SIGKILL)  # its session is its own: what the driver started writes on else

    threading.Thread(target=watch, name="fence", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def serve(sock: socket.socket, fd: int = -1) -> int:
    """Make the driver that the first frame describes, then answer requests until the socket is closed."""
    hello = wire.receive(sock)
    if hello is None:
        return 1
    sys.path.extend(p for p in hello["path"] if p not in sys.path)
    try:
        driver = registry.make(hello["driver"], hello["parameters"], hello["credentials"])
    except DriverError as error:
        sock.sendall(wire.failure(error))
        return 1
    del hello
    sock.sendall(wire.frame({"ready": True}))
    prepared = False
    while True:
        if prepared and not select.select([sock], [], [], wire.REST_SECONDS)[0]:
            _rest(driver)
            prepared = False
        message = wire.receive(sock)
        if message is None:
            return 0
        operation = str(message["operation"])
        with _fenced(operation, fd), _reporting(driver, operation, sock):
            answer = _call(driver, message, fd)
        sock.sendall(answer)
        if message["operation"] == "prepare":
            prepared = True
        elif message["operation"] == "cut":
            _rest(driver)
            prepared = False


def _rest(driver: StorageDriver) -> None:
    rest = getattr(driver, "rest", None)
    if rest is not None:
        try:
            rest()
        except Exception:  # noqa: BLE001 - nobody waits for it; the trace goes to the operator's log
            traceback.print_exc()


def main(arguments: list[str]) -> int:
    """Run the worker; returns the exit status."""
    descriptor, fd, parent, class_name, _driver = arguments
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _end_with(int(parent), class_name)
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=int(descriptor)) as sock:
        sock.set_inheritable(False)  # what a driver starts (ssh, say) must not keep the socket open after us
        if int(fd) >= 0:
            os.set_inheritable(int(fd), False)
        return serve(sock, int(fd))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
