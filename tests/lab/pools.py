"""Two file systems for libvirt's storage pools: `reflink` is xfs with reflink, `plain` is ext4, which has none."""

from __future__ import annotations

from pathlib import Path

from tests.lab.run import run

_MAKE = {"reflink": ("6G", "mkfs.xfs", "-q", "-m", "reflink=1"), "plain": ("1G", "mkfs.ext4", "-q", "-F")}
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
        if not image.exists():
            unfinished = image.with_suffix(".new")
            run("truncate", "-s", size, unfinished)
            run(*make, unfinished)
            unfinished.rename(image)
        run("mount", "-o", "loop,noatime", image, folder)
