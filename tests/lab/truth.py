"""Read what a snapshot really holds, from outside: the guest's records, and the file system's state."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.lab.ceph import Ceph, bindings
from tests.lab.errors import LabError
from tests.lab.run import run

RECORD = 64
SLOTS = 131072
"""Records that the guest's log holds; the writer then goes on at its start (`guest/writer.c`)."""
CLEAN, NOT_REPLAYED = "clean", "journal not replayed"
_STEP = 4 << 20


def fetch_file(volume: Path, into: Path) -> None:
    """Write the content of a volume's file to a plain raw file; qcow2 is converted."""
    with volume.open("rb") as source:
        magic = source.read(4)
    if magic == b"QFI\xfb":
        run("qemu-img", "convert", "-U", "-O", "raw", volume, into)
    else:
        run("cp", "--reflink=auto", "--sparse=auto", volume, into)


def fetch_rbd_snapshot(ceph: Ceph, image: str, snapshot: str | int, into: Path) -> None:
    """Write the content of an RBD snapshot, by name or id, to a plain raw file with holes; a group's snapshot by the group's name of it.

    Raises LabError if the image has no such snapshot.
    """
    rbd = bindings("rbd")
    with ceph.connect() as (_, ioctx), rbd.Image(ioctx, image, read_only=True) as source, into.open("wb") as target:
        # An image's part of a group's snapshot has a name of its own, and tells to which it belongs.
        ids = {(s.get("group") or {}).get("snap_name") or s["name"]: s["id"] for s in source.list_snaps()}
        found = snapshot if isinstance(snapshot, int) else ids.get(snapshot)
        if found not in ids.values():
            raise LabError(f"image {image} has no snapshot {snapshot}; it has {', '.join(map(str, ids)) or 'none'}")
        source.set_snap_by_id(found)
        size = source.size()
        target.truncate(size)
        for offset in range(0, size, _STEP):
            data = source.read(offset, min(_STEP, size - offset))
            if data.strip(b"\0"):
                target.seek(offset)
                target.write(data)


def records(raw: Path, name: str = "/log") -> int:
    """Return the number of the last whole record in the writer's log, 0 if there is none, as a mount would show it.

    Raises LabError if a record before it is missing, repeated or damaged, or if the file system cannot be read. `raw` stays as it is.
    """
    with _replayed(raw) as readable:
        argv = ["debugfs", "-R", f"cat {name}", str(readable)]
        done = subprocess.run(argv, capture_output=True, check=False, timeout=120)
    said = done.stderr.decode(errors="replace")
    if done.returncode or "Bad magic number" in said or "Can't" in said:
        raise LabError(f"{raw}: debugfs: {said.strip()[-500:]}")
    if "File not found" in said:
        return 0
    return last_record(done.stdout, str(raw))


def last_record(log: bytes, where: str) -> int:
    """The same for the log's bytes; a piece of a record at the end does not count."""
    numbers = [_number(log, slot, where) for slot in range(len(log) // RECORD)]
    if not numbers:
        return 0
    last = max(numbers)
    newest = (last - 1) % SLOTS
    first_of_newest = last - newest
    expected = list(range(first_of_newest, last + 1)) + list(range(last + 1 - SLOTS, first_of_newest))
    if numbers != expected[: len(numbers)] or len(numbers) != min(last, SLOTS):
        slot = next((i for i, (a, b) in enumerate(zip(numbers, expected, strict=False)) if a != b), len(numbers))
        raise LabError(
            f"{where}: the log holds {len(numbers)} records up to {last}, but slot {slot} is not the one that belongs there"
        )
    return last


def fsck(raw: Path) -> str:
    """Return `clean`, `journal not replayed`, or what e2fsck found. Changes nothing.

    Only a file system that was frozen, or unmounted, has an empty journal.
    """
    done = subprocess.run(["e2fsck", "-fn", str(raw)], capture_output=True, text=True, check=False, timeout=120)
    if "skipping journal recovery" in done.stdout + done.stderr:
        return NOT_REPLAYED  # whatever else it found: a replay may mend it
    if done.returncode:
        return f"exit {done.returncode}: {' '.join(done.stdout.split()) or done.stderr.strip()}"[:400]
    return CLEAN


@contextlib.contextmanager
def _replayed(raw: Path) -> Iterator[Path]:
    """The file system with its journal replayed, in a copy if need be.

    debugfs does not look into the journal: of a file system that was not frozen it would show the sizes of some earlier moment, the
    same one on each disk perhaps, and a bad snapshot would look like a good one.
    """
    if "needs_recovery" not in run("dumpe2fs", "-h", raw):
        yield raw
        return
    with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
        copy = Path(folder) / raw.name
        run("cp", "--reflink=auto", "--sparse=always", raw, copy)
        # Exit status 1: something was mended, which a replay is.
        subprocess.run(["e2fsck", "-y", "-E", "journal_only", str(copy)], capture_output=True, check=False, timeout=120)
        if "needs_recovery" in run("dumpe2fs", "-h", copy):
            raise LabError(f"{raw}: e2fsck cannot replay the journal")
        yield copy


def _number(log: bytes, slot: int, where: str) -> int:
    word = log[slot * RECORD : slot * RECORD + 16]
    try:
        return int(word)
    except ValueError as error:
        raise LabError(f"{where}: the record in slot {slot} cannot be read: {word!r}") from error
