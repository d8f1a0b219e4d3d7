"""The content of a snapshot copied into another image, object by object. Not which images, nor when (`ceph_restore`).

librbd 16 copies an open snapshot (`Image.copy`) without telling how far it is, from the start each time; `Image.deep_copy`
of a snapshot of a group ends the process by an assertion. Here an object is one write, which the cluster does wholly or not
at all: so an object that is there is whole, and a copy that was cut short goes on with those that are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

_AT_ONCE = 8  # as many objects are under way; a request to the cluster is mostly waiting


def bytes_in(image: Any) -> int:
    """Return how many bytes the objects of an open image take at most."""
    return len(_objects(image)) * _object_bytes(image)


def complete(source: Any, target: Any, step: Callable[[int], None]) -> None:
    """Copy the objects that `target`, a new image of the same size and order, does not have yet; `step` is told bytes."""
    there = _objects(target)
    wanted = _objects(source)
    step(len(wanted & there) * _object_bytes(target))
    _write(source, target, sorted(wanted - there), step)
    target.flush()


def overwrite(source: Any, target: Any, step: Callable[[int], None]) -> None:
    """Give `target`, of the same size and order, the content of `source`. Repeatable; half done until it returns."""
    size, part = target.size(), _object_bytes(target)
    wanted = _objects(source)
    for number in sorted(_objects(target) - wanted):
        target.write_zeroes(number * part, min(part, size - number * part))
    _write(source, target, sorted(wanted), step)
    target.flush()


def _write(source: Any, target: Any, objects: Iterable[int], step: Callable[[int], None]) -> None:
    size, part = target.size(), _object_bytes(target)

    def copy(number: int) -> None:
        begin = number * part
        target.write(source.read(begin, min(part, size - begin)), begin)

    left = iter(objects)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        while batch := list(islice(left, 4 * _AT_ONCE)):  # few enough that an error ends it soon
            for _ in threads.map(copy, batch):
                step(part)


def _object_bytes(image: Any) -> int:
    return int(image.stat()["obj_size"])


def _objects(image: Any) -> set[int]:
    part, found = _object_bytes(image), set[int]()

    def extent(offset: int, length: int, exists: bool) -> None:
        if exists and length:
            found.update(range(offset // part, (offset + length - 1) // part + 1))

    image.diff_iterate(0, image.size(), None, extent)
    return found
