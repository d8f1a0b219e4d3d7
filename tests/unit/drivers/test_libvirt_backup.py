"""The copies that the hypervisor made are looked at before they are called whole; the pool is a stand-in."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import libvirt
import pytest

from vmsnapshot_operator.core.driver import CutResult, Hold, Progress, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.drivers import libvirt_names as naming
from vmsnapshot_operator.drivers.libvirt_backup import LibvirtBackupDriver, LibvirtBackupParameters
from vmsnapshot_operator.drivers.libvirt_storage import LibvirtCredentials
from vmsnapshot_operator.errors import DriverError

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYER = Layer(kind=SourceKind.NETWORK, source="vms/a", format="raw", protocol="rbd")
VOLUME = Volume(id=volume_id(LAYER), label="vda", writable=LAYER, size_bytes=1 << 20)
REQUEST = SnapshotRequest(name="vms-1", volumes=(VOLUME,), timeout=Seconds(1.0))
COPY = naming.cut_name("vms-1", VOLUME.id)
CUT = CutResult(handles={VOLUME.id: Handle(f"/held/{COPY}")}, atomic=True, hold=Hold.JOB)


class StandIn:
    """A volume as libvirt describes it."""

    def __init__(self, name: str, size: int, kind: str = "raw") -> None:
        self._name, self._size, self._kind = name, size, kind

    def name(self) -> str:
        return self._name

    def info(self) -> list[int]:
        return [0, self._size, self._size]

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        return f"<volume><target><format type='{self._kind}'/></target></volume>"


class Pool:
    """A directory, and what libvirt knows of it: what it made itself, and the rest when it reads it (`on_disk`)."""

    def __init__(self, name: str = "held") -> None:
        self._name = name
        self.known: dict[str, StandIn] = {}
        self.on_disk: dict[str, StandIn] = {}

    def name(self) -> str:
        return self._name

    def refresh(self, _flags: int) -> None:
        self.known = dict(self.on_disk)

    def storageVolLookupByName(self, name: str) -> StandIn:  # noqa: N802 - libvirt's name
        if name not in self.known:
            error = libvirt.libvirtError("no")
            error.err = (libvirt.VIR_ERR_NO_STORAGE_VOL, 0, "no", 0, "", "", "", 0, 0)
            raise error
        return self.known[name]

    def listAllVolumes(self, _flags: int) -> list[StandIn]:  # noqa: N802 - libvirt's name
        return list(self.known.values())

    def createXML(self, text: str, _flags: int) -> StandIn:  # noqa: N802 - libvirt's name
        name = ET.fromstring(text).findtext("name") or ""  # noqa: S314 - our own
        self.known[name] = self.on_disk[name] = StandIn(name, 0)
        return self.known[name]

    def storagePoolLookupByName(self, _name: str) -> Pool:  # noqa: N802 - the connection's, too
        return self


@pytest.fixture
def pool() -> Pool:
    made = Pool()
    made.known[COPY] = made.on_disk[COPY] = StandIn(COPY, VOLUME.size_bytes)
    return made


@pytest.fixture
def driver(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> LibvirtBackupDriver:
    @contextmanager
    def connect(_self: object) -> Iterator[Any]:
        yield pool

    monkeypatch.setattr(LibvirtBackupDriver, "_open", connect)
    return LibvirtBackupDriver(LibvirtBackupParameters(pool_name="held"), LibvirtCredentials())


def test_a_copy_is_marked_as_whole(driver: LibvirtBackupDriver, pool: Pool) -> None:
    driver.wait_ready(REQUEST, CUT)
    driver.wait_ready(REQUEST, CUT)
    assert set(pool.known) == {COPY, naming.whole_mark(COPY)}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "does not exist"),
        (StandIn(COPY, 4096), "has 4096 bytes"),
        (StandIn(COPY, VOLUME.size_bytes, "qcow2"), "for qcow2, not raw"),
    ],
)
def test_what_cannot_be_the_copy_is_never_marked(
    driver: LibvirtBackupDriver, pool: Pool, found: StandIn | None, said: str
) -> None:
    """It was changed past libvirt, which still knows it as it was."""
    if found is None:
        del pool.on_disk[COPY]
    else:
        pool.on_disk[COPY] = found
    with pytest.raises(DriverError, match=said) as caught:
        driver.wait_ready(REQUEST, CUT)
    assert caught.value.reason == "SnapshotLost"
    assert naming.whole_mark(COPY) not in pool.known


@pytest.mark.parametrize("flags", [0, 1])
def test_how_far_a_copy_is_can_be_asked_whatever_the_pool_could_share(
    driver: LibvirtBackupDriver, pool: Pool, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    """What counts is how it is copied: a pool that is probed in the middle of a copy may answer otherwise, or not at all."""

    def probe(_self: object) -> int:
        raise DriverError("the probe failed")

    monkeypatch.setattr(LibvirtBackupDriver, "_flags", probe)
    with driver._copying(pool, [pool.known[COPY]], flags) as begin:
        begin(COPY, pool.known[COPY])
        done = driver.progress()
        assert done == (Progress(done_bytes=1 << 20, total_bytes=1 << 20) if not flags else None)
    assert driver.progress() is None


def test_cuts_of_another_class_are_not_listed(
    driver: LibvirtBackupDriver, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any pool may be the home of a disk, and of another class's copies; a disk that is being set back is marked there."""
    other = Pool("other")
    theirs, reverted = naming.cut_name("vms-2", VOLUME.id), naming.revert_mark(naming.cut_name("vms-3", VOLUME.id))
    other.known = {n: StandIn(n, 0) for n in (theirs, naming.whole_mark(theirs), reverted)}
    monkeypatch.setattr(LibvirtBackupDriver, "_homes", lambda *_: (other, pool))
    assert driver.list("vms-") == ["vms-1", "vms-3"]
