"""Names of what drivers make to probe a storage system: told from snapshots, and from those of processes at work.

No request has such a name: those have an installation of six characters in the second place.
"""

from __future__ import annotations

import re
import secrets
import time

PREFIX = "vms-probe-"
"""What the name of a probe begins with, and no other name of ours."""

_NAME = re.compile(PREFIX + r"(\d+)-[0-9a-f]{6}")
_STALE_SECONDS = 600


def new_name() -> str:
    """Return a name that nobody else has."""
    return f"{PREFIX}{int(time.time())}-{secrets.token_hex(3)}"


def is_probe(name: str) -> bool:
    """Tell whether a thing in a storage system is (or was made for) a probe."""
    return name.startswith(PREFIX)


def is_stale(name: str) -> bool:
    """Tell whether whoever made a probe was killed while probing: no probe takes that long."""
    made = _NAME.match(name)
    return made is not None and time.time() - int(made[1]) > _STALE_SECONDS
