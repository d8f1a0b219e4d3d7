"""What goes over the socket between the operator and a driver's process: frames of JSON, typed by the operation.

A frame is four bytes of length (big endian) and so many bytes of JSON. Never pickle: a driver is third-party code, and
its answer is data to be checked, not code to be run. Not responsible for who sends what when (`process`, `worker`).
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

from vmsnapshot_operator import errors
from vmsnapshot_operator.core.driver import Capabilities, CutResult, Fit, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Volume, VolumeId
from vmsnapshot_operator.errors import DriverError

if TYPE_CHECKING:
    import socket

MAX_FRAME: Final = 16 * 1024 * 1024
"""Bytes: some ten thousand volumes; a longer frame is a broken driver, not a longer answer."""
REST_SECONDS: Final = 120.0
"""More than any window takes: what was prepared for one is put away by a process that is asked nothing for so long."""
REPORT_SECONDS: Final = 1.0
"""How often a driver is asked how far it is with one of the `LONG` operations."""
FENCE_SECONDS: Final = 0.25
"""How often a process that is at one of the `FENCED` operations looks whether it still may."""
LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Operation:
    """The types of one operation's arguments and of its result."""

    arguments: TypeAdapter[Any]
    result: TypeAdapter[Any]


def _operation(result: Any, *arguments: Any) -> Operation:
    # Subscripted as a value: the types are data here, which the tuple[...] of an annotation cannot express.
    shape: Any = tuple.__class_getitem__(arguments)
    return Operation(TypeAdapter(shape), TypeAdapter(result))


_Volumes = tuple[Volume, ...]

OPERATIONS: Final[Mapping[str, Operation]] = {
    "capabilities": _operation(Capabilities),
    "can_handle": _operation(Fit, _Volumes),
    "prepare": _operation(None, SnapshotRequest),
    "inherit": _operation(Mapping[VolumeId, Fit], SnapshotRequest, Mapping[VolumeId, Handle]),
    "targets": _operation(Mapping[VolumeId, Layer], SnapshotRequest),
    "cut": _operation(CutResult, SnapshotRequest),
    "wait_ready": _operation(None, SnapshotRequest, CutResult),
    "check_revert": _operation(tuple[Fit, ...], CutResult, _Volumes),
    "revert": _operation(None, CutResult, _Volumes),
    "clone": _operation(Mapping[VolumeId, Layer], CutResult, str),
    "keep": _operation(None, str),
    "delete": _operation(None, str),
    "list": _operation(tuple[str, ...], str),
    "missing": _operation(tuple[Handle, ...], tuple[CutResult, ...]),
}

LONG: Final = frozenset({"wait_ready", "revert", "clone"})
"""Operations that may copy: they last as long as they get on."""
FENCED: Final = LONG | {"prepare", "inherit", "cut"}
"""Operations that make something: they end, and do not begin, when another instance may act."""

_PROGRESS: Final = TypeAdapter(Progress)

# What a driver may raise on purpose. Timeouts and crashes are for the host alone to state: it saw them.
_RAISED: Final[Mapping[str, type[DriverError]]] = {
    kind.__name__: kind for kind in (errors.DriverError, errors.DriverUnavailableError, errors.AlreadyCutError)
}


def frame(message: Mapping[str, Any]) -> bytes:
    """Return the bytes of one frame. Raises DriverError if it were too long to be read."""
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()
    if len(body) > MAX_FRAME:
        msg = f"a message of {len(body)} bytes is longer than the {MAX_FRAME} that are exchanged with a driver"
        raise DriverError(msg)
    return LENGTH.pack(len(body)) + body


def body_length(prefix: bytes) -> int:
    """Return the length that a frame's prefix announces. Raises DriverError if it is more than MAX_FRAME."""
    length: int = LENGTH.unpack(prefix)[0]
    if length > MAX_FRAME:
        msg = f"the driver's process announces an answer of {length} bytes; at most {MAX_FRAME} are read"
        raise DriverError(msg)
    return length


def parse(body: bytes) -> dict[str, Any]:
    """Return the message in a frame's body. Raises DriverError if it is not a JSON object."""
    try:
        message = json.loads(body)
    except ValueError as error:
        msg = "the driver's process sent what is not JSON"
        raise DriverError(msg) from error
    if not isinstance(message, dict):
        msg = "the driver's process sent JSON that is not an object"
        raise DriverError(msg)
    return message


def boottime() -> float:
    """Read CLOCK_BOOTTIME: the processes of one machine share it, and it goes on while they are stopped or the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def call(operation: str, arguments: tuple[Any, ...], seconds: float, until: float, begin: float) -> bytes:
    """Return the frame that asks for an operation, to be finished within so many seconds, and not after `until` (`boottime`).

    `begin`: from then on it must not be begun any more; one that was begun before may go on.

    Both, since the request may lie unread for as long as both processes are stopped.
    """
    dumped = OPERATIONS[operation].arguments.dump_python(arguments, mode="json")
    return frame({"operation": operation, "arguments": dumped, "seconds": seconds, "until": until, "begin": begin})


def answer(operation: str, result: Any) -> bytes:
    """Return the frame that answers with a result. Raises DriverError if the result is not of the operation's type."""
    adapter = OPERATIONS[operation].result
    try:
        # Validated here as well: dumping alone would let a wrong type pass with a warning.
        return frame({"result": adapter.dump_python(adapter.validate_python(result), mode="json")})
    except ValidationError as error:
        msg = f"the driver answered {operation} with something else than the contract says: {_where(error)}"
        raise DriverError(msg) from error


def progress(found: Progress) -> bytes:
    """Return the frame that tells, before the answer, how far a driver is."""
    return frame({"progress": _PROGRESS.dump_python(_PROGRESS.validate_python(found), mode="json")})


def reported(message: Mapping[str, Any]) -> Progress | None:
    """Return the progress in a frame, or None if it is the answer. Raises DriverError if it cannot be read."""
    if "progress" not in message:
        return None
    try:
        return _PROGRESS.validate_python(message["progress"])
    except ValidationError as error:
        msg = f"the driver's process told of its progress something else than the contract says: {_where(error)}"
        raise DriverError(msg) from error


def failure(error: DriverError) -> bytes:
    """Return the frame that answers with an error."""
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _RAISED), DriverError.__name__)
    # Far more than is ever shown, so that no secret is cut in two before the operator has hidden it.
    message = error.message[: 64 * 1024]
    told = {"kind": kind, "message": message, "reason": error.reason, "retryable": error.retryable}
    return frame({"error": told})


def result(operation: str, message: Mapping[str, Any]) -> Any:
    """Return the result in an answer; raises the DriverError in it, or one that says why it cannot be read."""
    raise_failure(message)
    try:
        return OPERATIONS[operation].result.validate_python(message.get("result"))
    except ValidationError as error:
        msg = f"the driver's process answered {operation} with something else than the contract says: {_where(error)}"
        raise DriverError(msg) from error


def raise_failure(message: Mapping[str, Any]) -> None:
    """Raise the error that an answer carries, if it does."""
    told = message.get("error")
    if isinstance(told, dict):
        kind = _RAISED.get(str(told.get("kind")), DriverError)
        raise kind(
            str(told.get("message", "")),
            reason=str(told.get("reason") or kind.reason),
            retryable=bool(told.get("retryable")),
        )


def _where(error: ValidationError) -> str:
    told = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}" for e in told[:3])


def receive(sock: socket.socket) -> dict[str, Any] | None:
    """Read one frame (blocking). None at the end of the stream. Raises DriverError if it cannot be read."""
    prefix = _exactly(sock, LENGTH.size)
    if prefix is None:
        return None
    body = _exactly(sock, body_length(prefix))
    return None if body is None else parse(body)


def _exactly(sock: socket.socket, count: int) -> bytes | None:
    chunks = bytearray()
    while len(chunks) < count:
        chunk = sock.recv(count - len(chunks))
        if not chunk:
            return None
        chunks += chunk
    return bytes(chunks)
