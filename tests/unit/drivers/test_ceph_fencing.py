"""Who may be put on the cluster's blocklist: never a process of ours that goes on working."""

from types import SimpleNamespace

import pytest

from vmsnapshot_operator.core.driver import SnapshotRequest
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import ceph_cluster, ceph_snapshots
from vmsnapshot_operator.drivers.ceph_rbd import CephRbdCredentials, CephRbdDriver, CephRbdParameters
from vmsnapshot_operator.errors import DriverError


def volume(name):
    layer = Layer(kind=SourceKind.NETWORK, protocol="rbd", source=f"vms/{name}", format="raw")
    return Volume(id=VolumeId(name), label=name, writable=layer, size_bytes=1)


@pytest.fixture
def driver(monkeypatch):
    made = iter(range(1, 10))

    class Cluster:
        def __init__(self):
            self.address = f"10.0.0.1:0/{next(made)}"

        def get_addrs(self):
            return self.address

        def open_ioctx(self, _pool):
            return SimpleNamespace(set_namespace=lambda _: None)

    class Rbd:
        class Error(Exception):
            pass

    monkeypatch.setattr(ceph_cluster, "binding", lambda _: Rbd)
    monkeypatch.setattr(ceph_cluster, "connect", lambda *_: Cluster())
    monkeypatch.setattr(ceph_snapshots, "prepare_group", lambda *_: None)
    given = CephRbdParameters(mon_hosts="10.0.0.9", pool="vms")
    return CephRbdDriver(given, CephRbdCredentials(key="k"))


@pytest.mark.parametrize(("error", "same"), [(None, True), (DriverError("left incomplete"), False)])
def test_a_process_whose_cut_failed_goes_on_under_another_address(driver, monkeypatch, error, same):
    def cut_group(*_):
        if error is not None:
            raise error

    monkeypatch.setattr(ceph_snapshots, "cut_group", cut_group)
    request = SnapshotRequest(name="vms-x", volumes=(volume("a"), volume("b")), timeout=Seconds(9))
    driver.prepare(request)
    recorded = driver._address
    if error is None:
        driver.cut(request)
    else:
        with pytest.raises(DriverError):
            driver.cut(request)
    assert (driver._address == recorded) is same
