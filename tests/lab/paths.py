"""Where the laboratory keeps things: one state folder for what runs, one cache for what is built once."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab.errors import LabError

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
LONGEST_STATE = 60
"""The path of a Unix socket holds 107 characters; ours and libvirt's lie some 40 below the state folder."""


def state() -> Path:
    """Folder of everything that runs: `LAB_STATE`. Raises LabError if it is too long for the sockets in it."""
    path = Path(os.environ.get("LAB_STATE", "/var/tmp/vmsnapshot-lab")).resolve()  # noqa: S108 - a fixed place: `down` finds it
    if len(str(path)) > LONGEST_STATE:
        raise LabError(
            f"LAB_STATE={path} is longer than {LONGEST_STATE} characters, too long for the paths of Unix sockets"
        )
    return path


def cache() -> Path:
    """Folder of what is built once: programs, the guest's image. `LAB_CACHE`."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vmsnapshot-operator"
    return Path(os.environ.get("LAB_CACHE", default)).resolve()
