"""Deterministic names under which storage systems hold our cuts. Safety rests on them, so they live in one place.

A name has the form `vms-<installation>-<object>-<attempt>-<group>`: 31 characters, lower case letters, digits and
hyphens. Drivers that need one name per volume append `-` and `member(volume_id)`: 40 characters, which every storage
system that we know of accepts. The parts make scans possible: `installation_prefix` lists all that one installation
holds, `object_prefix` all attempts of one VMSnapshot.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

from vmsnapshot_operator.core.volumes import VolumeId

OVERLAYS = "ovl-"
"""What the names of all overlays begin with."""

LENGTH = 31
"""Characters of a request's name."""

MAX_ATTEMPT = 36 * 36 - 1
_NAME = re.compile(r"^vms-([a-z0-9]{6})-([a-z2-7]{10})-([0-9a-z]{2})-([a-z2-7]{6})$")
_CHECKPOINT = re.compile(r"^(vms-[a-z0-9]{6}-[a-z2-7]{10}-[0-9a-z]{2}-[a-z2-7]{6})-[a-z2-7]{8}$")
_OVERLAY = re.compile(r"^ovl-([a-z0-9]{6})-([a-z2-7]{10})-([0-9a-z]{2})-([a-z2-7]{6})$")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _hash(text: str, length: int) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().lower()[:length]


def installation_id(seed: str) -> str:
    """Derive the six-character id of an installation from a random seed (kept in the operator's namespace)."""
    return _hash(seed, 6)


def installation_prefix(installation: str) -> str:
    """Return the prefix of all names of one installation: two clusters on one array never see each other's."""
    return f"vms-{installation}-"


def object_prefix(installation: str, uid: str) -> str:
    """Return the prefix of all names of one VMSnapshot, whatever the attempt."""
    return f"{installation_prefix(installation)}{_hash(uid, 10)}-"


def request_name(installation: str, uid: str, attempt: int, class_name: str, volumes: Iterable[VolumeId]) -> str:
    """Return the name of one group's cut in one attempt: another attempt can never adopt it.

    Raises ValueError if `attempt` is not between 1 and MAX_ATTEMPT.
    """
    if not 1 <= attempt <= MAX_ATTEMPT:
        msg = f"attempt {attempt} is outside 1..{MAX_ATTEMPT}"
        raise ValueError(msg)
    digits = _DIGITS[attempt // 36] + _DIGITS[attempt % 36]
    group = _hash("\0".join((class_name, *sorted(volumes))), 6)
    return f"{object_prefix(installation, uid)}{digits}-{group}"


def overlay_name(installation: str, uid: str, attempt: int, volume: VolumeId) -> str:
    """Return the name of the overlay of one volume in one attempt.

    It is no request name: an overlay may hold what a VM wrote, and must never be taken for a cut that a driver may delete.
    """
    return "ovl" + request_name(installation, uid, attempt, "", (volume,)).removeprefix("vms")


def overlays_prefix(installation: str) -> str:
    """Return the prefix of all overlays of one installation."""
    return f"{OVERLAYS}{installation}-"


def is_overlay(name: str) -> bool:
    """Tell whether a name is one that we give to an overlay, of whatever installation."""
    return _OVERLAY.match(name) is not None


def overlay_prefix(installation: str, uid: str) -> str:
    """Return the prefix of all overlays of one VMSnapshot."""
    return "ovl" + object_prefix(installation, uid).removeprefix("vms")


def member(volume: VolumeId) -> str:
    """Return the eight characters that a driver appends (after a hyphen) for one volume of a group."""
    return _hash(volume, 8)


def checkpoint_name(request: str, volume: VolumeId) -> str:
    """Return the name of the checkpoint since which a disk's next copy may be made: that of the request's cut of it."""
    return f"{request}-{member(volume)}"


def request_of(checkpoint: str) -> str | None:
    """Return the request whose checkpoint this is, or None if it is none of ours."""
    found = _CHECKPOINT.match(checkpoint)
    return found.group(1) if found is not None else None


def attempt_of(name: str) -> int | None:
    """Return the attempt that a request's or overlay's name belongs to, or None if it is neither."""
    found = _NAME.match(name) or _OVERLAY.match(name)
    if found is None:
        return None
    digits = found.group(3)
    return _DIGITS.index(digits[0]) * 36 + _DIGITS.index(digits[1])


def is_ours(name: str, installation: str) -> bool:
    """Tell whether a name held by a storage system is a request name of this installation."""
    found = _NAME.match(name)
    return found is not None and found.group(1) == installation
