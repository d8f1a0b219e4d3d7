from pathlib import Path
from xml.etree import ElementTree as ET

import libvirt
import pytest
from pydantic import ValidationError

from vmsnapshot_operator.drivers import libvirt_storage
from vmsnapshot_operator.drivers.libvirt_storage import Endpoint, LibvirtCredentials, connect, describe, uri
from vmsnapshot_operator.drivers.libvirt_volume import LibvirtVolumeDriver
from vmsnapshot_operator.drivers.registry import validate
from vmsnapshot_operator.errors import DriverUnavailableError

NOTHING = LibvirtCredentials()


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ({}, "qemu+unix:///system"),
        ({"socket_path": "/run/my sock"}, "qemu+unix:///system?socket=%2Frun%2Fmy+sock"),
        ({"uri_transport": "tcp", "host": "10.0.0.1", "port": 16509}, "qemu+tcp://10.0.0.1:16509/system"),
        ({"uri_transport": "tls", "host": "kvm1.example"}, "qemu+tls://kvm1.example/system"),
        ({"uri_transport": "tls", "host": "fe80::1", "port": 1}, "qemu+tls://[fe80::1]:1/system"),
        (
            {"uri_transport": "ssh", "host": "kvm1"},
            "qemu+libssh2://kvm1/system?sshauth=privkey&known_hosts_verify=normal&no_tty=1",
        ),
    ],
)
def test_the_uri_is_composed(endpoint, expected):
    assert uri(Endpoint(**endpoint), NOTHING) == expected


def test_a_user_is_quoted_and_files_are_named():
    secret = LibvirtCredentials.model_validate({"username": "o@x?y", "ssh-privatekey": "k", "known_hosts": "h"})
    made = uri(Endpoint(uri_transport="ssh", host="kvm1"), secret, "/d")
    assert made.startswith("qemu+libssh2://o%40x%3Fy@kvm1/system?")
    assert "keyfile=%2Fd%2Fkey" in made
    assert "known_hosts=%2Fd%2Fknown_hosts" in made
    assert uri(Endpoint(uri_transport="tls", host="kvm1"), secret, "/d").endswith("/system?pkipath=%2Fd")


@pytest.mark.parametrize(
    "wrong",
    [
        {"uri_transport": "ext", "host": "kvm1"},
        {"uri_transport": "tls"},
        {"uri_transport": "tls", "host": "kvm1/system?no_verify=1"},
        {"uri_transport": "tls", "host": "kvm1", "socket_path": "/x"},
        {"host": "kvm1"},
        {"port": 1},
        {"socket_path": "/x?command=/bin/sh"},
        {"socket_path": "x"},
        {"uri_transport": "tcp", "host": "-oProxyCommand=x"},
    ],
)
def test_what_could_smuggle_something_into_the_uri_is_refused(wrong):
    with pytest.raises(ValidationError):
        Endpoint(**wrong)


def test_files_of_credentials_exist_only_while_connecting(monkeypatch):
    seen = {}

    def answer(address, _auth, _flags):
        folder = Path(address.partition("pkipath=")[2].replace("%2F", "/"))
        seen.update({p.name: (p.read_text(), p.stat().st_mode & 0o777) for p in folder.iterdir()})
        seen["folder"] = folder
        raise libvirt_storage.libvirt.libvirtError("no")

    monkeypatch.setattr(libvirt_storage.libvirt, "openAuth", answer)
    credentials = LibvirtCredentials.model_validate({"tls.key": "KEY", "tls.crt": "CERTIFICATE", "ca.crt": "CA"})
    with pytest.raises(DriverUnavailableError, match="connecting to libvirt at kvm1 by tls"):
        connect(Endpoint(uri_transport="tls", host="kvm1"), credentials)

    assert seen["clientkey.pem"] == ("KEY", 0o600)
    assert seen["clientcert.pem"] == ("CERTIFICATE", 0o600)
    assert seen["cacert.pem"] == ("CA", 0o600)
    assert not seen["folder"].exists()
    assert "KEY" not in repr(credentials)


def test_user_and_password_answer_the_daemons_questions():
    credentials = LibvirtCredentials.model_validate({"username": "u", "password": "p"})
    libvirt = libvirt_storage.libvirt
    questions = [[libvirt.VIR_CRED_AUTHNAME, "", "", "", None], [libvirt.VIR_CRED_PASSPHRASE, "", "", "", None]]
    assert libvirt_storage._answer(questions, credentials) == 0
    assert [q[4] for q in questions] == ["u", "p"]


def test_a_volume_is_described_without_allocation_and_like_its_source():
    like = (
        "<volume><target><permissions><mode>0640</mode><owner>7</owner><group>8</group></permissions></target></volume>"
    )
    made = ET.fromstring(describe("a<b", 4096, like))  # noqa: S314 - our own
    assert made.findtext("name") == "a<b"
    assert made.findtext("capacity") == "4096"
    assert made.findtext("allocation") == "0"
    assert made.find("target/format").get("type") == "raw"
    assert made.findtext("target/permissions/owner") == "7"


def test_parameters_are_strings_on_the_class():
    parameters, _ = validate(
        LibvirtVolumeDriver, {"poolName": "p", "uriTransport": "tcp", "host": "h", "port": "16509"}, {}
    )
    assert (parameters.pool_name, parameters.port, parameters.destination_pool_name) == ("p", 16509, "")


class BusyPool:
    """Copies for ever, as libvirt says it."""

    def __init__(self, active):
        self.active = active

    def name(self):
        return "pool"

    def isActive(self):  # noqa: N802 - libvirt's name
        return self.active

    def refresh(self, _flags):
        error = libvirt.libvirtError("internal error: pool 'pool' has asynchronous jobs running.")
        error.err = (libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_FROM_STORAGE, str(error), 2, "", None, None, -1, -1)
        raise error


def test_a_pool_that_copies_for_long_is_taken_as_it_is_known(monkeypatch):
    monkeypatch.setattr(libvirt_storage, "_REFRESH_SECONDS", -1.0)
    libvirt_storage.reread(BusyPool(active=1))
    with pytest.raises(libvirt.libvirtError, match="asynchronous jobs"):
        libvirt_storage.reread(BusyPool(active=0))
