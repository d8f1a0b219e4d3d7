"""One JSON line for each thing the guardian does."""

from __future__ import annotations

import json
import sys
import time


def say(what: str, **facts: object) -> None:
    """Write one line to stderr; a log that cannot be written stops nothing."""
    line = json.dumps({"time": time.time(), "guardian": what, **facts}, default=str)
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        return
