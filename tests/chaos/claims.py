"""Whether a snapshot claims more than its content shows: each volume is read, and held against what is said of it.

Not whether the world around it is in order (`rules`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.lab import Lab, LabError, truth
from tests.lab.ceph import bindings

ORDER = ("", "Unknown", "PerVolume", "Crash", "Filesystem", "Application")
"""From the least to the most; empty: nothing is claimed."""
PER_VOLUME, CRASH, FILESYSTEM = ORDER.index("PerVolume"), ORDER.index("Crash"), ORDER.index("Filesystem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one volume holds. `missing`: why there is nothing to read at all; `damaged`: why no record can be read."""

    missing: str = ""
    damaged: str = ""
    records: int = 0
    fsck: str = ""


PLUGGED = "vdx"
"""The disk that a fault plugs into a VM that runs: the VM's writer does not know it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of the VM. `targets`: disks that bear state; `writer`: writes to all of them; `records`: least and most that a
    snapshot can hold that was taken when this one says, None if nobody counted.
    """

    targets: frozenset[str] = frozenset()
    writer: bool = False
    records: tuple[int, int] | None = None


# --- reading ---------------------------------------------------------------------------------------------------------------------


def read(lab: Lab, content: Mapping[str, Any], into: Path) -> dict[str, Read]:
    """Read every volume of a content by itself, by target. What keeps one from being read is told, never raised."""
    drivers = {g["className"]: g["driver"] for g in content["spec"]["groups"]}
    volumes = [v for v in content["spec"]["volumes"] if v.get("handle")]

    def one(volume: Mapping[str, Any]) -> Read:
        raw = into / f"{volume['target']}.raw"
        try:
            return _read(lab, drivers[volume["className"]], volume["handle"], raw)
        finally:
            raw.unlink(missing_ok=True)

    with ThreadPoolExecutor(max(1, min(4, len(volumes)))) as threads:
        return dict(zip((v["target"] for v in volumes), threads.map(one, volumes), strict=True))


def _read(lab: Lab, driver: str, handle: str, raw: Path) -> Read:
    try:
        if driver == "ceph-rbd":
            image, _, snap = handle.rpartition("@")
            truth.fetch_rbd_snapshot(lab.ceph, image.rpartition("/")[2], snap, raw)
        else:
            truth.fetch_file(Path(handle), raw)
    except (LabError, OSError, bindings("rbd").Error, bindings("rados").Error) as error:
        return Read(missing=f"{handle} cannot be read: {error}")
    try:
        return Read(records=truth.records(raw), fsck=truth.fsck(raw))
    except LabError as error:
        return Read(damaged=f"{handle} holds nothing that can be read: {error}")


# --- judging: pure ---------------------------------------------------------------------------------------------------------------


def rank(claim: str) -> int:
    """How much is claimed; what is no claim that we know counts as the most, so that it is never taken for little."""
    return ORDER.index(claim) if claim in ORDER else len(ORDER)


def of_failed(body: Mapping[str, Any]) -> Iterator[str]:
    """A VMSnapshot that came to nothing claims nothing."""
    status = body.get("status") or {}
    if rank(str(status.get("consistency", ""))) > ORDER.index("Unknown"):
        yield f"it is Stalled, and claims {status['consistency']}"


def of_ready(
    body: Mapping[str, Any],
    content: Mapping[str, Any],
    found: Mapping[str, Read],
    expected: Expected,
    *,
    tell_missing: bool = True,
) -> Iterator[str]:
    """What a Ready VMSnapshot and its content say that is not so, each lie once."""
    status = body.get("status") or {}
    yield from _coverage(status, content["spec"], expected)
    for target, seen in sorted(found.items()):
        if seen.missing and tell_missing:
            yield f"it is Ready, and disk {target} is lost: {seen.missing}"
    yield from _higher("its status", status, "its VMSnapshotContent", content["spec"])
    said: set[str] = set()
    for where, told in (("its status", status), ("its VMSnapshotContent", content["spec"])):
        for lie in _lies(told, found, expected):
            if lie not in said:
                said.add(lie)
                yield f"{where} {lie}"


def _coverage(status: Mapping[str, Any], spec: Mapping[str, Any], expected: Expected) -> Iterator[str]:
    held = {v["target"] for v in spec["volumes"] if v.get("handle")}
    told = {v["target"] for v in status.get("volumes") or ()}
    if told - held:
        yield f"it is Ready, and its VMSnapshotContent has no handle of disk {', '.join(sorted(told - held))}"
    excluded = {e["name"] for e in status.get("excluded") or ()}
    silent = expected.targets - held - told - excluded
    if silent:
        yield f"disk {', '.join(sorted(silent))} of its VM is neither in it nor said to be left out"


def _higher(one: str, more: Mapping[str, Any], other: str, less: Mapping[str, Any]) -> Iterator[str]:
    """Status may say less than the content, which has the evidence, and never more."""
    if rank(_whole(more)) > rank(_whole(less)):
        yield f"{one} claims {_whole(more)}, {other} {_whole(less) or 'nothing'}"
    by_target = _each(less)
    for target, claim in sorted(_each(more).items()):
        if rank(claim) > rank(by_target.get(target, "")):
            yield f"{one} claims {claim} of disk {target}, {other} {by_target.get(target) or 'nothing'}"


def _whole(told: Mapping[str, Any]) -> str:
    return str(told.get("consistency") or "")


def _each(told: Mapping[str, Any]) -> dict[str, str]:
    return {v["target"]: str(v.get("consistency") or "") for v in told.get("volumes") or ()}


def _lies(told: Mapping[str, Any], found: Mapping[str, Read], expected: Expected) -> Iterator[str]:
    """What one place says that the volumes do not bear out."""
    whole, each = _whole(told), _each(told)
    for claim in sorted({whole, *each.values()}):
        if claim not in ORDER or claim == "Application":
            yield f"claims {claim}, for which nothing gives evidence"
    least = min(each.values(), key=rank, default="")
    if each and rank(whole) > rank(least):
        yield f"claims {whole} of the whole and {least or 'nothing'} of disk {min(t for t, c in each.items() if c == least)}"
    claims = {t: max(rank(whole), rank(each.get(t, ""))) for t in found if not found[t].missing}
    unwritten = replace(expected, writer=False, records=None)
    for target, claim in sorted(claims.items()):
        if claim >= PER_VOLUME:
            yield from (
                f"claims {ORDER[min(claim, FILESYSTEM)]} of disk {target}, but {w}"
                for w in _flaws(found[target], claim, unwritten if target == PLUGGED else expected)
            )
    whole_ones = {t: found[t].records for t, c in claims.items() if c >= CRASH and not found[t].damaged}
    still = {t: n for t, n in whole_ones.items() if claims[t] >= FILESYSTEM}
    if len(set(still.values())) > 1:
        yield f"claims Filesystem, one moment at which the writer was held, but its disks hold {_shown(still)}"
    elif not _in_order(whole_ones):
        yield f"claims one moment of all disks, but they hold {_shown(whole_ones)}"


def _flaws(seen: Read, claim: int, expected: Expected) -> Iterator[str]:
    if seen.damaged:
        yield seen.damaged
        return
    if claim >= FILESYSTEM and seen.fsck != truth.CLEAN:
        yield f"its file system was not still: {seen.fsck}"
    if expected.writer and seen.records == 0:
        yield "it holds no record, and the VM's writer writes to it"
    elif expected.records is not None and not expected.records[0] <= seen.records <= expected.records[1]:
        yield (
            f"it holds {seen.records} records, and the VM had between {expected.records[0]} and {expected.records[1]}"
            " while the snapshot was taken: it is of another moment"
        )


def _in_order(records: Mapping[str, int]) -> bool:
    """One record is written to all disks in their order, then the next: so one moment shows in the numbers."""
    counts = [records[t] for t in sorted(records)]
    return all(a >= b for a, b in pairwise(counts)) and (not counts or counts[0] - counts[-1] <= 1)


def _shown(records: Mapping[str, int]) -> str:
    return "records " + ", ".join(f"{t} {records[t]}" for t in sorted(records))
