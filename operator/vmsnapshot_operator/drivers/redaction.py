"""Text of a driver, made fit for logs, errors and status: no secret, nothing unprintable, bounded. Not what is said with it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote, quote_plus

MAX_CHARACTERS = 1024
_HIDDEN = "[redacted]"
_SHORTEST_LINE = 8


def _spellings(value: str) -> Iterable[str]:
    """Return how a secret may come out of a library: as it is, quoted, escaped, encoded, or line by line."""
    yield value
    yield from (line for line in value.splitlines() if len(line.strip()) >= _SHORTEST_LINE)
    yield repr(value)[1:-1]
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield quote(value, safe="")
    yield quote_plus(value)
    yield base64.b64encode(value.encode()).decode()
    yield base64.urlsafe_b64encode(value.encode()).decode()


def redactor(credentials: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that replaces every value of `credentials` in a text, in any of its usual spellings."""
    spellings = {s.strip() for value in credentials.values() for s in _spellings(value)}
    spellings.discard("")
    if not spellings:
        return str
    # The longest first: a secret that begins with another one must not leave its tail behind.
    pattern = re.compile("|".join(re.escape(s) for s in sorted(spellings, key=len, reverse=True)))
    return lambda text: pattern.sub(_HIDDEN, text)


def printable(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return `text` in one line of at most `limit` printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
