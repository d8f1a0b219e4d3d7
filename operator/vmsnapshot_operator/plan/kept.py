"""What becomes of overlays that no journal tells of: who has to know of them, and which may be removed. Pure.

While a journal names an overlay, `plan.collapse` decides about it. Afterwards nobody would: one whose base was changed, or that a VM
went on without, is kept for good, and a VM may run on it unnoticed; one that was made for an attempt which never came to
its switch is rubbish, if its VMSnapshot went away without a chance to remove it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import OverlayFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All files under names of this installation's overlays, on all endpoints that answered; `silent`: those that did not, and why.

    `journaled`: paths that a journal names, whoever's. `owners`: UIDs of the VMSnapshots that exist, or whose attempt is under way.
    """

    installation: str
    files: tuple[OverlayFile, ...]
    journaled: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    silent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One overlay that a person must know of, and why; or (`removable`) that nobody needs."""

    file: OverlayFile
    why: str
    removable: bool = False


def judge(seen: Seen) -> tuple[Kept, ...]:
    """Return what is left over, in the order of the files. A file is used if any endpoint says so: they may share their storage."""
    users = {f.path: f.domain for f in seen.files if f.domain}
    found = (_one(f, users.get(f.path, ""), seen) for f in seen.files if f.path not in seen.journaled)
    return tuple(k for k in found if k is not None)


def reported(found: Iterable[Kept]) -> tuple[Kept, ...]:
    """Those that are not to be removed."""
    return tuple(k for k in found if not k.removable)


def _one(file: OverlayFile, user: str, seen: Seen) -> Kept | None:
    if not names.is_overlay(file.name):
        why = "it begins as the names of our overlays do and is none that this operator gives: somebody else made it"
        return Kept(file=file, why=why)
    if file.domain:
        why = f"VM {file.domain} has it among its disks, and no journal says so: nobody commits it"
        return Kept(file=file, why=why)
    if user:
        return None  # told where it is used
    if not file.pristine:
        return Kept(file=file, why="no VM uses it, and it was written to: what a VM wrote may be in this file alone")
    if any(file.name.startswith(names.overlay_prefix(seen.installation, uid)) for uid in seen.owners):
        return None  # its own workflow uses or removes it
    if not file.genuine:
        return Kept(file=file, why="it is empty, and not as this operator makes overlays: somebody else made it")
    if seen.silent:
        why = f"it is empty, and whether a VM uses it is not known: {'; '.join(sorted(seen.silent.values()))}"
        return Kept(file=file, why=why)
    why = "nobody ever wrote to it, no VM uses it, and its VMSnapshot is gone"
    return Kept(file=file, why=why, removable=True)
