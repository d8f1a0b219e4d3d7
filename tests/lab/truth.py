"""Read what a snapshot really holds, from outside: the guest's records, and the file system's state."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab.ceph import Ceph
from tests.lab.errors import LabError
from tests.lab.run import run

RECORD = 64
CLEAN = "clean"
NOT_REPLAYED = "journal not replayed"


def fetch_file(volume: Path, into: Path) -> None:
    """Copy a volume's file as it is to a plain raw file."""
    run("cp", "--reflink=auto", "--sparse=auto", volume, into)


def fetch_rbd_snapshot(ceph: Ceph, image: str, snapshot: str, into: Path) -> None:
    """Copy the content of an RBD snapshot (its own, or its part of a group's) to a raw file."""
    import rbd  # Debian's bindings: there only after `make bindings`

    with ceph.connect() as (_, ioctx), rbd.Image(ioctx, image, read_only=True) as source:
        # A plain snapshot has this name itself; an image's part of a group's snapshot only tells to which it belongs.
        ids = {(s.get("group") or {}).get("snap_name") or s["name"]: s["id"] for s in source.list_snaps()}
        if snapshot not in ids:
            raise LabError(f"image {image} has no snapshot {snapshot}; it has {', '.join(map(str, ids)) or 'none'}")
        source.set_snap_by_id(ids[snapshot])
        size, step = source.size(), 4 << 20
        with into.open("wb") as target:
            target.truncate(size)
            for offset in range(0, size, step):
                data = source.read(offset, min(step, size - offset))
                if data.strip(b"\0"):
                    target.seek(offset)
                    target.write(data)


def records(raw: Path, name: str = "/log") -> int:
    """Return the number of the last whole record in the writer's log; raises LabError if the log is not what it should be.

    What the file system's journal holds counts: it is replayed first, in a copy, as a VM that is started would do.
    """
    replayed = raw.with_suffix(".replayed")
    run("cp", "--sparse=always", raw, replayed)
    try:
        # Exit status 1: something was mended, that is replayed.
        subprocess.run(
            ["e2fsck", "-y", "-E", "journal_only", str(replayed)], capture_output=True, check=False, timeout=120
        )
        done = subprocess.run(
            ["debugfs", "-R", f"cat {name}", str(replayed)], capture_output=True, check=False, timeout=120
        )
    finally:
        replayed.unlink()
    count = len(done.stdout) // RECORD
    if count == 0:
        return 0
    last = done.stdout[(count - 1) * RECORD : count * RECORD]
    try:
        number = int(last[:16])
    except ValueError as error:
        raise LabError(f"{raw}: record {count} cannot be read: {last[:16]!r}") from error
    if number != count:
        raise LabError(f"{raw}: the log has {count} records, the last one says {number}")
    return number


def fsck(raw: Path) -> str:
    """Return `clean`, or what is not: a journal that must be replayed first is not clean, a frozen file system has none."""
    if "needs_recovery" in run("dumpe2fs", "-h", raw):
        return NOT_REPLAYED
    done = subprocess.run(["e2fsck", "-fn", str(raw)], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode == 0:
        return CLEAN
    return f"exit {done.returncode}: {' '.join(done.stdout.split())[:300]}"
