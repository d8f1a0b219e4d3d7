"""Where the laboratory keeps things: one state folder for what runs, one cache for what is built once."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def state() -> Path:
    """Folder of everything that runs; short, since the paths of Unix sockets are."""
    return Path(os.environ.get("LAB_STATE", "/var/tmp/vmsnapshot-lab"))  # noqa: S108 - a fixed place, so that `down` finds it


def cache() -> Path:
    """Folder of what is built once: binaries, the guest's image."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vmsnapshot-operator"
    return Path(os.environ.get("LAB_CACHE", default))
