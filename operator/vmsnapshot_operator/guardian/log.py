"""One JSON line for each thing the guardian does."""

from __future__ import annotations

import json
import sys
import time

_TEXT_LIMIT = 256


def say(what: str, **facts: object) -> None:
    """Write one line to stderr; a log that cannot be written stops nothing. Texts may come from a guest: they are cut."""
    cut = {k: v[:_TEXT_LIMIT] if isinstance(v, str) else v for k, v in facts.items()}
    line = json.dumps({"time": round(time.time(), 3), "guardian": what, **cut}, default=str)
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        return
