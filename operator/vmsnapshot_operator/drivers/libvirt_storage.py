"""A connection to a libvirt daemon for its storage API: address, credentials, pools, errors. Not what is done with volumes.

Only virStorage* is used by drivers. The URI is composed from typed fields and never taken from a user: a libvirt URI can
name commands and files and switch the verification of the other side off.
"""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlencode
from xml.etree import ElementTree as ET  # only what libvirt itself wrote is parsed

import libvirt
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic.alias_generators import to_camel

from vmsnapshot_operator.core.volumes import Layer, SourceKind
from vmsnapshot_operator.errors import DriverError, DriverUnavailableError

_log = logging.getLogger(__name__)

_REFRESH_SECONDS = (
    5.0  # clones are made in milliseconds; what keeps a pool busy for longer is a copy, which may take hours
)
_HOST = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?$|^[0-9A-Fa-f:]+$")
_BUSY = frozenset({libvirt.VIR_ERR_INTERNAL_ERROR, libvirt.VIR_ERR_OPERATION_INVALID})
_GONE = frozenset({libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_NO_STORAGE_POOL})


class Endpoint(BaseModel):
    """Where the daemon listens: the same fields as an endpoint of a Hypervisor."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    uri_transport: Literal["unix", "tls", "tcp", "ssh"] = "unix"
    host: str = Field(default="", max_length=253)
    port: int | None = Field(default=None, ge=1, le=65535)
    socket_path: str = Field(default="", pattern=r"^(/[^?#&]*)?$")

    @model_validator(mode="after")
    def _whole(self) -> Endpoint:
        local = self.uri_transport == "unix"
        if local and (self.host or self.port is not None):
            raise ValueError("host and port are for the transports tls, tcp and ssh, not for unix")
        if not local and not _HOST.match(self.host):
            raise ValueError(f"the transport {self.uri_transport} needs the name or the address of a host")
        if not local and self.socket_path:
            raise ValueError("socketPath is for the transport unix alone")
        return self


class LibvirtCredentials(BaseModel):
    """What the transport needs: nothing (unix, tcp without authentication), user and password, certificate, or SSH key."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True, validate_by_alias=True)

    username: str = ""
    password: SecretStr = SecretStr("")
    ca_certificate: str = Field(default="", alias="ca.crt")
    tls_certificate: str = Field(default="", alias="tls.crt")
    tls_key: SecretStr = Field(default=SecretStr(""), alias="tls.key")
    ssh_key: SecretStr = Field(default=SecretStr(""), alias="ssh-privatekey")
    known_hosts: str = Field(default="", alias="known_hosts")


def uri(endpoint: Endpoint, credentials: LibvirtCredentials, directory: str = "") -> str:
    """Compose the URI; `directory` holds the certificates or the SSH key as files, if there are any."""
    if endpoint.uri_transport == "unix":
        socket = f"?{urlencode({'socket': endpoint.socket_path})}" if endpoint.socket_path else ""
        return f"qemu+unix:///system{socket}"
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    where = host if endpoint.port is None else f"{host}:{endpoint.port}"
    if endpoint.uri_transport == "ssh":
        # libvirt's own SSH client: no program is started, and no configuration file can switch verification off.
        options = {"sshauth": "privkey", "known_hosts_verify": "normal", "no_tty": "1"}
        if directory:
            options |= {"keyfile": f"{directory}/key", "known_hosts": f"{directory}/known_hosts"}
        user = f"{quote(credentials.username, safe='')}@" if credentials.username else ""
        return f"qemu+libssh2://{user}{where}/system?{urlencode(options)}"
    options = {"pkipath": directory} if directory and endpoint.uri_transport == "tls" else {}
    return f"qemu+{endpoint.uri_transport}://{where}/system" + (f"?{urlencode(options)}" if options else "")


def connect(endpoint: Endpoint, credentials: LibvirtCredentials) -> Any:
    """Open a connection. Raises DriverUnavailableError. Files that libvirt needs exist only while it connects."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; libvirt would print them as well
    files = _files(credentials)
    with tempfile.TemporaryDirectory(prefix="libvirt-") as directory:
        for name, content in files.items():
            Path(directory, name).touch(mode=0o600)
            Path(directory, name).write_text(content)
        address = uri(endpoint, credentials, directory if files else "")
        try:
            return libvirt.openAuth(address, [_ASKED, _answer, credentials], 0)
        except libvirt.libvirtError as error:
            where = endpoint.host or endpoint.socket_path or "the local daemon"
            text = f"connecting to libvirt at {where} by {endpoint.uri_transport}: {error}"
            raise DriverUnavailableError(text) from error


def _files(credentials: LibvirtCredentials) -> dict[str, str]:
    files = {
        "cacert.pem": credentials.ca_certificate,
        "clientcert.pem": credentials.tls_certificate,
        "clientkey.pem": credentials.tls_key.get_secret_value(),
        "key": credentials.ssh_key.get_secret_value(),
        "known_hosts": credentials.known_hosts,
    }
    return {name: content for name, content in files.items() if content}


_ASKED = [libvirt.VIR_CRED_AUTHNAME, libvirt.VIR_CRED_PASSPHRASE]


def _answer(questions: list[list[Any]], credentials: LibvirtCredentials) -> int:
    for question in questions:
        asked = question[0] == libvirt.VIR_CRED_PASSPHRASE
        question[4] = credentials.password.get_secret_value() if asked else credentials.username
    return 0


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turn libvirt's errors into DriverError, or into DriverUnavailableError when the connection broke."""
    try:
        yield
    except libvirt.libvirtError as error:
        # The client's side of the protocol complains only when the daemon is gone.
        if error.get_error_domain() == libvirt.VIR_FROM_RPC or error.get_error_code() == libvirt.VIR_ERR_NO_CONNECT:
            raise DriverUnavailableError(f"{doing}: {error}") from error
        busy = error.get_error_code() in _BUSY
        raise DriverError(f"{doing}: {error}", retryable=busy) from error


def is_missing(error: libvirt.libvirtError) -> bool:
    """Tell whether an error says that a volume or pool does not exist."""
    return error.get_error_code() in _GONE


def find(pool: Any, name: str) -> Any | None:
    """Return the volume of this name as libvirt knows the pool, or None."""
    try:
        return pool.storageVolLookupByName(name)
    except libvirt.libvirtError as error:
        if is_missing(error):
            return None
        raise


def find_source(pool: Any, layer: Layer) -> Any | None:
    """Return the volume of a layer, or None. The pool is read again only if it may help: a refresh holds others up."""
    if layer.kind is SourceKind.VOLUME:
        place, _, name = layer.source.partition("/")
        if place != pool.name():
            return None
    else:
        path = PurePosixPath(layer.source)
        name = path.name
        if str(path.parent) != directory_of(pool):
            return None
    found = find(pool, name)
    if found is None:
        reread(pool)
        found = find(pool, name)
    return found


def must_be_raw(volume: Any) -> None:
    """Raise DriverError if libvirt takes the content of a volume for anything but raw.

    It looks at the content whenever it reads a pool. A guest can write on its raw disk what looks like a qcow2 file with any
    file of the host as its backing file; libvirt would then not clone it but convert it, and read that file.
    """
    found = ET.fromstring(volume.XMLDesc(0)).find("target/format")  # noqa: S314 - libvirt's own
    kind = "" if found is None else found.get("type", "")
    if kind != "raw":
        text = f"libvirt takes the content of {volume.name()} for {kind or 'something'}, not raw: it would be converted"
        raise DriverError(text, reason="FormatNotServed")


def written_time(volume: Any) -> float:
    """Return when a volume's file was last written to, in seconds by the clock of its file system.

    Raises DriverError if libvirt does not say: not every kind of pool has it.
    """
    found = ET.fromstring(volume.XMLDesc(0)).findtext("target/timestamps/mtime")  # noqa: S314 - libvirt's own
    if not found:
        raise DriverError(f"libvirt does not say when {volume.name()} was last written to", reason="SnapshotChanged")
    return float(found)


def directory_of(pool: Any) -> str:
    """Return the path of the directory of a pool."""
    return (ET.fromstring(pool.XMLDesc(0)).findtext("target/path") or "").rstrip("/")  # noqa: S314 - libvirt's own


def reread(pool: Any) -> None:
    """Let libvirt read the pool's directory again; waits while it is at work on volumes of the pool.

    While it copies, it refuses for as long as that takes. Then what it knows has to do: it knows all that it made itself,
    and only what another host put into a shared directory comes late.
    """
    until = time.monotonic() + _REFRESH_SECONDS
    while True:
        try:
            pool.refresh(0)
        except libvirt.libvirtError as error:
            # "Has asynchronous jobs running" has no code of its own.
            if error.get_error_code() not in _BUSY or not pool.isActive():
                raise
            if time.monotonic() > until:
                _log.info("the pool %s is at work and was not read again: %s", pool.name(), error)
                return
            time.sleep(0.05)
        else:
            return


def describe(name: str, size_bytes: int, like: str = "") -> str:
    """Return the description of a raw volume to be made, with the permissions of another one (its description)."""
    volume = ET.Element("volume")
    ET.SubElement(volume, "name").text = name
    ET.SubElement(volume, "capacity", unit="bytes").text = str(size_bytes)
    ET.SubElement(volume, "allocation", unit="bytes").text = "0"  # else the whole capacity is allocated beforehand
    target = ET.SubElement(volume, "target")
    ET.SubElement(target, "format", type="raw")
    permissions = ET.fromstring(like).find("target/permissions") if like else None  # noqa: S314 - libvirt's own
    if permissions is not None:
        target.append(permissions)
    return ET.tostring(volume, encoding="unicode")
