"""Try something that may hang for ever, as a call to a host that was lost in mid-handshake, without hanging with it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

HANGING_LIMIT = 3
PATIENCE_SECONDS = 600.0


class Attempts:
    """Attempts at one thing, each in a thread of its own. Not more than a few of them hang at a time."""

    def __init__(self) -> None:
        self._left: list[threading.Thread] = []

    def run(self, function: Callable[[], T], seconds: float) -> T:
        """Return what `function` returns, or raise what it raises; TimeoutError if it does neither in so many seconds.

        Its thread is then left behind. If too many are, waits long for the oldest before the next one is started.
        """
        self._left = [t for t in self._left if t.is_alive()]
        if len(self._left) >= HANGING_LIMIT:
            self._left.pop(0).join(PATIENCE_SECONDS)
        answer: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def body() -> None:
            try:
                answer.put((function(), None))
            except Exception as error:  # noqa: BLE001 - raised again for the one who waits
                answer.put((None, error))

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            self._left.append(thread)
            raise TimeoutError(f"no answer within {seconds:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # None only if the function returned it
