"""Volumes made from other volumes by libvirt's own copying: whole or not at all, joined after a kill, watched.

Facts it rests on, seen with libvirt 9.0: libvirt copies on the host, sparse, and goes on when whoever asked is killed. Until
it is done, it refuses to read from the new volume or to delete it. It ends with an fsync, also of a reflink, and removes what
failed. Only a daemon that ends in the middle leaves half a volume, which nothing tells from a whole one. Meanwhile it refuses
to read both pools again. A copy cannot be called off.

Not responsible for names (`libvirt_names`) nor for when a copy is right (`libvirt_volume`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

import libvirt

from vmsnapshot_operator.core.driver import Progress
from vmsnapshot_operator.drivers import libvirt_names, probes
from vmsnapshot_operator.drivers import libvirt_storage as storage
from vmsnapshot_operator.errors import DriverError

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


@dataclass(slots=True)
class Work:
    """What is being copied, for who asks from another thread. Bytes are those that the sources occupy."""

    connection: Any
    pool: str
    total: int
    done: int = 0
    name: str = ""
    told: int = 0

    def step(self, name: str, done: int) -> None:
        """Say what comes next, `done` bytes being done."""
        self.done, self.name = done, name

    def _made(self, name: str) -> int:
        try:
            return int(self.connection.storagePoolLookupByName(self.pool).storageVolLookupByName(name).info()[2])
        except libvirt.libvirtError as error:
            # libvirt knows a volume a moment before its file is there, and may have removed it since.
            if storage.is_missing(error):
                return 0
            raise

    def progress(self) -> Progress:
        """Ask libvirt how much the new volume occupies by now."""
        name, done = self.name, self.done
        if name:
            done += self._made(name)
        # A source with zeros written in it occupies more than its copy, one that grows less; and a file system gives a block of its
        # own bookkeeping to a file and takes it back.
        self.told = max(self.told, min(done, self.total))
        return Progress(done_bytes=self.told, total_bytes=self.total)


def shares_blocks(pool: Any, destination: Any) -> bool:
    """Tell whether volumes of one pool can share blocks with those of the other: clone a tiny one of our own. Leaves nothing behind."""
    _sweep_probes(pool, destination)
    name = probes.new_name()
    made = [pool.createXML(storage.describe(f"{name}a", 1 << 20), 0)]
    try:
        description = storage.describe(f"{name}b", 1 << 20)
        try:
            made.append(destination.createXMLFrom(description, made[0], libvirt.VIR_STORAGE_VOL_CREATE_REFLINK))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_SYSTEM_ERROR:
                raise
            _log.info("no reflink from pool %s to %s: %s", pool.name(), destination.name(), error)
            made.append(destination.createXMLFrom(description, made[0], 0))
            return False
        return True
    finally:
        for volume in made:
            volume.delete(0)


def _sweep_probes(*pools: Any) -> None:
    """Delete the probes of processes that were killed while they probed."""
    for pool in pools:
        for volume in pool.listAllVolumes(0):
            if probes.is_stale(volume.name()):
                with contextlib.suppress(libvirt.libvirtError):  # another process is at it
                    volume.delete(0)


def occupied(volume: Any) -> int:
    """Return how many bytes a volume takes in its pool."""
    return int(volume.info()[2])


def await_made(pool: Any, name: str) -> Any | None:
    """Wait while libvirt is making a volume for somebody who was killed.

    Return it if it is whole for certain: it was seen being made, and is there afterwards. Whatever else is there is not
    whole for certain.
    """
    seen = False
    while True:
        volume = storage.find(pool, name)
        if volume is None or not _is_being_made(pool.connect(), volume):
            return volume if seen else None
        seen = True
        time.sleep(_POLL_SECONDS)


def _is_being_made(connection: Any, volume: Any) -> bool:
    stream = connection.newStream(0)
    try:
        volume.download(stream, 0, 1)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
            return True
        if storage.is_missing(error):
            return False
        raise
    with contextlib.suppress(libvirt.libvirtError):  # nothing is read from it
        stream.abort()
    return False


def make_whole(pool: Any, description: str, name: str, source: Any, flags: int) -> None:
    """Make the volume `name` of the content of another one, and its mark when it is whole. Repeatable.

    One that is being made already is taken, so `name` must say of what. Raises DriverError if libvirt would convert.
    """
    mark = libvirt_names.whole_mark(name)
    if storage.find(pool, mark) is not None:
        return
    if await_made(pool, name) is None:
        remains = storage.find(pool, name)
        if remains is not None:
            remains.delete(0)
        storage.must_be_raw(source)
        pool.createXMLFrom(description, source, flags)
    storage.must_be_raw(source)  # again: the pool may have been read in between
    mark_down(pool, mark)


def mark_down(pool: Any, mark: str) -> None:
    """Make the empty volume that says something by its name. Repeatable."""
    if storage.find(pool, mark) is None:
        pool.createXML(storage.describe(mark, 0), 0)


def replace(pool: Any, held: Any, name: str, flags: int, min_free: int) -> None:
    """Put the content of the volume `held` into the place of the volume `name`: same path, same permissions.

    The storage API cannot rename, so the old one is deleted first, and is missing or half made until this has returned. Hence
    what can fail is tried before: whether blocks can be shared, or whether there is room.
    """
    await_made(pool, name)  # of a killed try: it may be of another cut, so it is not taken
    old = storage.find(pool, name)
    like = (held if old is None else old).XMLDesc(0)
    size = held.info()[1]
    storage.must_be_raw(held)
    if flags:
        pool.createXMLFrom(storage.describe(probes.new_name(), size, like), held, flags).delete(0)
    else:
        must_have_room(pool, occupied(held) - (0 if old is None else occupied(old)), min_free)
    if old is not None:
        old.delete(0)
    pool.createXMLFrom(storage.describe(name, size, like), held, flags)


def must_have_room(pool: Any, needed: int, min_free: int) -> None:
    """Raise DriverError (NoSpace) unless a pool has `min_free` bytes left after so many more are used."""
    wanted, free = needed + min_free, pool.info()[3]
    if free < wanted:
        # libvirt counts the blocks of clones as if they were not shared, until it reads the pool again
        storage.reread(pool)
        free = pool.info()[3]
    if free < wanted:
        text = (
            f"the pool {pool.name()} has {free} bytes left, {wanted} are needed: {needed}, and minFreeBytes {min_free}"
        )
        raise DriverError(text, reason="NoSpace", retryable=True)
