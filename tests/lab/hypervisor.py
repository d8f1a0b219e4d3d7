"""libvirtd as a host of this laboratory: in mount and name namespaces of its own, so that the machine's libvirt stays as it is."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from tests.lab import paths, pools
from tests.lab.control import Control
from tests.lab.wait import free_ports

SECRET = "5d3c1a1e-3f0e-4c59-9a50-7c6f0f6f1a01"  # noqa: S105 - the name of a libvirt secret, not its value
FIRST_HOST = "libvirtd"
_PLACES = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
_FILES = ("passwd", "group")
libvirt.registerErrorHandler(lambda *_: None, None)  # libvirt prints each error to stderr otherwise


@dataclass(frozen=True, slots=True)
class Host:
    """One hypervisor host. `name` is its component, too; a second one is another name."""

    state: Path
    name: str = FIRST_HOST

    @property
    def folder(self) -> Path:
        """Everything that this libvirtd has."""
        return self.state / self.name

    @property
    def socket(self) -> Path:
        """libvirtd's socket."""
        return self.folder / "libvirt-sock"

    @property
    def uri(self) -> str:
        """libvirtd's URI."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def tcp_port(self) -> int:
        """Port on which libvirtd listens on the loopback interface, without authentication."""
        return int(self._facts()["port"])

    def open(self) -> Any:
        """A new virConnect."""
        return libvirt.open(self.uri)

    @contextlib.contextmanager
    def connection(self) -> Iterator[Any]:
        """A virConnect that is closed at the end."""
        connection = self.open()
        try:
            yield connection
        finally:
            connection.close()

    def check(self, _name: str = "") -> bool:
        """Whether libvirtd answers."""
        try:
            with self.connection() as connection:
                connection.getLibVersion()
        except libvirt.libvirtError:
            return False
        return True

    def has(self, domain: str) -> bool:
        """Whether it knows a domain of this name; false if it does not answer."""
        try:
            with self.connection() as connection:
                connection.lookupByName(domain)
        except libvirt.libvirtError:
            return False
        return True

    def up(self, control: Control, tell: Callable[[str], None]) -> None:
        """Start libvirtd if it does not run; define and start the pools; tell of it."""
        self._write()
        control.start(self.name, ["unshare", "--mount", "--uts", "sh", "-ec", _START, str(self.folder), self.name])
        control.healthy(self.name, self.check)
        _keep_capabilities(self.folder / "cache", _known_capabilities())
        with self.connection() as connection:
            for pool in pools.NAMES:
                _pool(connection, pool, pools.path(self.state, pool))
        tell(self.name)

    def give_key(self, key: str) -> None:
        """Let QEMU read Ceph images as `client.libvirt`."""
        xml = f"<secret ephemeral='no' private='yes'><uuid>{SECRET}</uuid><usage type='ceph'><name>client.libvirt</name></usage></secret>"
        with self.connection() as connection:
            connection.secretDefineXML(xml, 0).setValue(base64.b64decode(key), 0)

    def pids(self) -> dict[str, int]:
        """Numbers of the QEMU processes of this host's running domains, by domain."""
        found = {}
        for path in (self.folder / "run" / "qemu").glob("*.pid"):
            try:
                pid = int(path.read_text())
                name = Path(f"/proc/{pid}/comm").read_text()
            except (OSError, ValueError):  # ended meanwhile
                continue
            if name.startswith("qemu"):
                found[path.stem] = pid
        return found

    def _write(self) -> None:
        for place, target in _PLACES.items():
            (self.folder / place).mkdir(parents=True, exist_ok=True)
            Path(target).mkdir(parents=True, exist_ok=True)  # where it is mounted, in the namespace only
        (self.folder / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        # libvirt wants a user and a group `libvirt-qemu` to exist, whoever QEMU runs as.
        for name, line in zip(
            _FILES, ("libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin", "libvirt-qemu:x:64055:"), strict=True
        ):
            known = Path("/etc", name).read_text()
            (self.folder / name).write_text(known if "\nlibvirt-qemu:" in known else f"{known.rstrip()}\n{line}\n")
        facts = self.folder / "facts.json"
        if not facts.exists():
            facts.write_text(json.dumps({"port": free_ports(1)[0], "uuid": str(uuid.uuid4())}))
            _keep_capabilities(_known_capabilities(), self.folder / "cache")
        (self.folder / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(folder=self.folder, **self._facts()))

    def _facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "facts.json").read_text()))


def _known_capabilities() -> Path:
    return paths.cache() / "libvirt"


def _keep_capabilities(source: Path, target: Path) -> None:
    """What libvirtd found out about QEMU's binaries, in seconds; it looks itself whether that still holds."""
    for path in (source / "qemu" / "capabilities").glob("*.xml"):
        kept = target / "qemu" / "capabilities" / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # libvirtd may be replacing it
            shutil.copy2(path, kept.with_suffix(".new"))
            kept.with_suffix(".new").rename(kept)


def _pool(connection: Any, name: str, path: Path) -> None:
    try:
        pool = connection.storagePoolLookupByName(name)
    except libvirt.libvirtError:
        xml = f"<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>"
        pool = connection.storagePoolDefineXML(xml, 0)
    pool.setAutostart(1)
    if not pool.isActive():
        pool.create(0)


_START = "\n".join(
    [
        'hostname "$1"',  # which migration between two of them wants
        *(f'mount --bind "$0/{place}" {target}' for place, target in _PLACES.items()),
        *(f'mount --bind "$0/{name}" /etc/{name}' for name in _FILES),
        # By its path: libvirtd looks there whether it is the one that wrote its cache of QEMU's capabilities.
        'exec /usr/sbin/libvirtd -f "$0/libvirtd.conf" -p "$0/libvirtd.pid" --listen',
    ]
)

_QEMU_CONF = """user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
stdio_handler = "file"
max_core = 0
"""

_LIBVIRTD_CONF = """unix_sock_dir = "{folder}"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 1
listen_addr = "127.0.0.1"
tcp_port = "{port}"
auth_tcp = "none"
host_uuid = "{uuid}"
log_outputs = "2:file:{folder}/libvirtd.log"
max_clients = 500
"""
