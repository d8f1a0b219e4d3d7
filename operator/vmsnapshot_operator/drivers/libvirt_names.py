"""Names of what the drivers of libvirt's storage API hold in pools. Nothing else remembers what a volume is, and libvirt cannot rename one.

Under a request or clone name N, with m the member name of a disk:

- `N-m`: the disk as it was cut
- `N-m.img`: the disk's clone. It is ours as long as `N.new` exists; after that it is the VM's, and no name of ours leads to it
- `N-m.whole`, `N-m.img.whole`: an empty volume that says that the one of that name is no half-made copy
- `N-m.revert`: an empty volume that says that the disk itself is being replaced, and may be missing or half made
- `N.new`: see above
"""

from __future__ import annotations

import re

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import VolumeId

_CLONE, _WHOLE, _REVERT, _NEW = ".img", ".whole", ".revert", ".new"
_HELD = re.compile(r"(?P<request>.+)-[a-z2-7]{8}(?:\.whole|\.img\.whole|\.revert)?|(?P<clone>.+)\.new")
_CLONED = re.compile(r"(?P<clone>.+)-[a-z2-7]{8}\.img")


def cut_name(request: str, volume: VolumeId) -> str:
    """Return the name of a cut disk."""
    return f"{request}-{names.member(volume)}"


def clone_name(clone: str, volume: VolumeId) -> str:
    """Return the name of a disk's clone."""
    return f"{cut_name(clone, volume)}{_CLONE}"


def whole_mark(volume_name: str) -> str:
    """Return the name of what says that a volume is whole."""
    return f"{volume_name}{_WHOLE}"


def whole(volume_name: str, *, copied: bool) -> frozenset[str]:
    """Return the names that are there if a volume is whole; `copied`: it was not made at once."""
    return frozenset({volume_name, whole_mark(volume_name)} if copied else {volume_name})


def revert_mark(cut: str) -> str:
    """Return the name of what says that a disk is being set back to this cut of it."""
    return f"{cut}{_REVERT}"


def is_revert_mark(volume_name: str, volume: VolumeId) -> bool:
    """Tell whether a name says that this disk is being set back to whatever cut."""
    return volume_name.endswith(f"-{names.member(volume)}{_REVERT}")


def says_revert(volume_name: str) -> bool:
    """Tell whether a name says that some disk is being set back."""
    return volume_name.endswith(_REVERT)


def new_mark(clone: str) -> str:
    """Return the name of what says that clones are not kept yet."""
    return f"{clone}{_NEW}"


def is_clone_mark(volume_name: str, clone: str) -> bool:
    """Tell whether a name is one of those that say something of the clones of this name."""
    return volume_name == new_mark(clone) or (
        volume_name.endswith(_WHOLE) and is_clone_of(volume_name.removesuffix(_WHOLE), clone)
    )


def holder(volume_name: str) -> str | None:
    """Return the request or clone that a volume is held under for certain; None for a disk's clone as for a stranger."""
    found = _HELD.fullmatch(volume_name)
    return (found["request"] or found["clone"]) if found else None


def is_clone_of(volume_name: str, clone: str) -> bool:
    """Tell whether a volume is a disk's clone made under this name, kept or not."""
    found = _CLONED.fullmatch(volume_name)
    return found is not None and found["clone"] == clone
