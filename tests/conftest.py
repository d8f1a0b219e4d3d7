"""What all tests share."""

from __future__ import annotations

import asyncio


def pytest_sessionstart() -> None:
    """Leave no event loop for anybody to find.

    looptime asks for the current loop around each test, also around one that is not asynchronous; without this the first such
    test makes a loop that nobody closes, and some later test fails for the warning.
    """
    asyncio.set_event_loop(None)
