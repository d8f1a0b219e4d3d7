import pytest
from pydantic import ValidationError

from vmsnapshot_operator.drivers import ceph_cluster
from vmsnapshot_operator.drivers.ceph_cluster import addresses, same_monitor
from vmsnapshot_operator.drivers.ceph_rbd import CephRbdDriver, CephRbdParameters
from vmsnapshot_operator.drivers.registry import validate
from vmsnapshot_operator.errors import DriverUnavailableError


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10.0.0.1", [("10.0.0.1", "")]),
        ("10.0.0.1:6789, mon-2.example:3300", [("10.0.0.1", "6789"), ("mon-2.example", "3300")]),
        ("v2:10.0.0.1:3300/0", [("10.0.0.1", "3300")]),
        ("[v2:10.0.0.1:3300/0,v1:10.0.0.1:6789/0],mon3", [("10.0.0.1", "3300"), ("10.0.0.1", "6789"), ("mon3", "")]),
        ("[fe80::1]:6789,[::1]", [("fe80::1", "6789"), ("::1", "")]),
        ("[v2:[::1]:3300,v1:[::1]:6789]", [("::1", "3300"), ("::1", "6789")]),
        (" , ", []),
    ],
)
def test_addresses_of_monitors_are_read_in_all_of_cephs_spellings(text, found):
    assert addresses(text) == found


@pytest.mark.parametrize(
    ("disk", "known", "same"),
    [
        ("10.0.0.1:6789", "10.0.0.2,10.0.0.1", True),
        ("10.0.0.1:6789", "10.0.0.1:3300", True),  # two protocols of one monitor
        ("10.0.0.1:7000", "10.0.0.1:7001", False),  # two clusters on one machine
        ("10.0.0.1", "10.0.0.2", False),
        ("localhost:6789", "127.0.0.1:6789", True),
        ("no-such-host.invalid", "10.0.0.2", False),
    ],
)
def test_two_lists_of_monitors_are_of_one_cluster_if_they_have_one_in_common(disk, known, same):
    assert same_monitor(addresses(disk), addresses(known)) is same


def test_bindings_that_are_nowhere_are_asked_for(monkeypatch):
    monkeypatch.setattr(ceph_cluster, "_SYSTEM_DIRECTORIES", ("/nonexistent",))
    with pytest.raises(DriverUnavailableError, match="install python3-nosuchbinding") as caught:
        ceph_cluster.binding("nosuchbinding")
    assert not caught.value.retryable


def test_a_file_that_is_no_binding_is_named(monkeypatch, tmp_path):
    suffix = ceph_cluster.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"nosuchbinding{suffix}").write_bytes(b"not an object file")
    monkeypatch.setattr(ceph_cluster, "_SYSTEM_DIRECTORIES", (str(tmp_path),))
    with pytest.raises(DriverUnavailableError, match="does not load"):
        ceph_cluster.binding("nosuchbinding")


def test_parameters_are_strings_on_the_class_and_types_in_the_driver():
    parameters, credentials = validate(
        CephRbdDriver,
        {"monHosts": "10.0.0.1,10.0.0.2", "pool": "vms", "clientName": "client.vms", "operationTimeoutSeconds": "7"},
        {"key": "AQ=="},
    )
    assert parameters == CephRbdParameters(
        mon_hosts="10.0.0.1,10.0.0.2", pool="vms", client_name="vms", operation_timeout_seconds=7
    )
    assert "AQ==" not in repr(credentials)


@pytest.mark.parametrize(
    "wrong", [{"mon_hosts": " , "}, {"pool": "a/b"}, {"pool": ""}, {"client_name": "a b"}, {"namespace": "a@b"}]
)
def test_parameters_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError):
        CephRbdParameters(**{"mon_hosts": "10.0.0.1", "pool": "vms"} | wrong)
