"""Logs of the process: one JSON object per line, or lines for people. Registered secrets never stand in them.

Not what is logged. Objects are never logged as a whole; values of Secrets are registered as soon as they are read.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TextIO
from urllib.parse import quote

HIDDEN = "[redacted]"
_SHORTEST = 4
"""Shorter values are no secrets, and hiding them would make holes into every line."""

_OWN = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {"message", "asctime", "taskName"}


class Redactor:
    """Hides registered values in texts, as they are and in the spellings in which libraries quote them."""

    def __init__(self) -> None:
        self._values: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def hide(self, values: Iterable[str]) -> None:
        """Register values that must never be shown, for as long as the process lives."""
        spellings = {s for v in values for s in _spellings(v) if len(s) >= _SHORTEST} - self._values
        if not spellings:
            return
        self._values |= spellings
        # The longest first: a secret that begins with another one must not leave its tail behind.
        ordered = sorted(self._values, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(v) for v in ordered))

    def clean(self, text: str) -> str:
        """Return the text without registered values."""
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)


def _spellings(value: str) -> Iterable[str]:
    stripped = value.strip()
    yield stripped
    yield from (line.strip() for line in stripped.splitlines())
    yield repr(stripped)[1:-1]
    yield json.dumps(stripped)[1:-1]
    yield quote(stripped, safe="")
    yield base64.b64encode(value.encode()).decode()


REDACTOR = Redactor()
"""The one of this process: what is a secret for one line is one for all."""


def hide(values: Iterable[str]) -> None:
    """Register values of Secrets, so that no line of the log shows them."""
    REDACTOR.hide(values)


class TextFormatter(logging.Formatter):
    """Lines for people."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(name)s: %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Format, traceback included, then hide."""
        return self._redactor.clean(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, error (the traceback), and simple extra fields."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Format, traceback included, then hide."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # Only simple values: an extra that is an object may hold anything.
        extra = {k: v for k, v in record.__dict__.items() if k not in _OWN and isinstance(v, str | int | float | bool)}
        line |= {k: v for k, v in extra.items() if k not in line}
        # Before it becomes JSON, which would spell a secret in yet another way.
        return json.dumps({k: self._redactor.clean(v) if isinstance(v, str) else v for k, v in line.items()})


def configure(log_format: str, *, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send all logs of the process to `stream` (standard error by default), as `json` or `text`."""
    formatter = JsonFormatter(REDACTOR) if log_format == "json" else TextFormatter(REDACTOR)
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("vmsnapshot_operator").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Libraries log whole objects and each request on their lower levels.
    for noisy in ("kopf", "kubernetes", "aiohttp", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
