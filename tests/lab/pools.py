"""Two file systems for libvirt's storage pools: `reflink` is xfs with reflink, `plain` is ext4, which has none."""

from __future__ import annotations

from pathlib import Path

from tests.lab.run import run

_MAKE = {"reflink": (6, "mkfs.xfs", "-q", "-m", "reflink=1"), "plain": (12, "mkfs.ext4", "-q", "-F")}
"""By pool: its size in GiB, of a sparse file, and what makes the file system."""
NAMES = tuple(_MAKE)


def path(state: Path, pool: str) -> Path:
    """Folder of a pool."""
    return state / "pools" / pool


def mount(state: Path) -> None:
    """Make and mount those that are not mounted, each from a sparse file on a loop device that goes when it is unmounted."""
    for pool, (size, *make) in _MAKE.items():
        folder, image = path(state, pool), state / "pools" / f"{pool}.img"
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_mount():
            continue
        if not image.exists() or image.stat().st_size < size << 30:
            unfinished = image.with_suffix(".new")
            run("truncate", "-s", f"{size}G", unfinished)
            run(*make, unfinished)
            unfinished.rename(image)
        run("mount", "-o", "loop,noatime", image, folder)
