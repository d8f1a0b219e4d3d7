"""libvirtd in a mount namespace of its own, so that the machine's libvirt files stay as they are; two storage pools."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt

from tests.lab.ceph import Ceph
from tests.lab.errors import LabError
from tests.lab.run import run
from tests.lab.supervisor import Control
from tests.lab.wait import free_ports, until

SECRET = "5d3c1a1e-3f0e-4c59-9a50-7c6f0f6f1a01"  # noqa: S105 - the name of a libvirt secret, not its value
POOL_SIZE = "6G"
_PLACES = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}


def socket_path(state: Path, name: str = "libvirtd") -> Path:
    """libvirtd's socket."""
    return state / name / "libvirt-sock"


def uri(state: Path, name: str = "libvirtd") -> str:
    """libvirtd's URI."""
    return f"qemu+unix:///system?socket={socket_path(state, name)}"


def up(state: Path, control: Control, ceph: Ceph, name: str = "libvirtd") -> None:
    """Mount the pools' file systems, start libvirtd, define pools and Ceph's secret."""
    mount(state)
    folder = state / name
    for place in _PLACES:
        (folder / place).mkdir(parents=True, exist_ok=True)
    _users()
    (folder / "etc" / "qemu.conf").write_text(_QEMU_CONF)
    conf = folder / "libvirtd.conf"
    if not conf.exists():
        conf.write_text(_libvirtd_conf(folder, free_ports(1)[0]))
    binds = "".join(f'mkdir -p {target}; mount --bind "$0/{place}" {target}; ' for place, target in _PLACES.items())
    script = f'{binds}exec /usr/sbin/libvirtd -f "$0/libvirtd.conf" -p "$0/libvirtd.pid" --listen'
    control.start(name, ["unshare", "-m", "sh", "-ec", script, str(folder)])
    until("libvirtd answers", lambda: answers(state, name))
    connection = libvirt.open(uri(state, name))
    try:
        for pool in ("reflink", "plain"):
            _pool(connection, pool, pool_path(state, pool))
        _secret(connection, ceph.key("libvirt"))
    finally:
        connection.close()


def answers(state: Path, name: str = "libvirtd") -> bool:
    """Whether libvirtd answers."""
    libvirt.registerErrorHandler(lambda *_: None, None)
    try:
        libvirt.open(uri(state, name)).close()
    except libvirt.libvirtError:
        return False
    return True


def pool_path(state: Path, pool: str) -> Path:
    """Folder of a pool: `reflink` is xfs with reflink, `plain` a file system without."""
    return state / "pools" / pool


def mount(state: Path) -> None:
    """Mount the pools' file systems from image files."""
    for pool, make in (("reflink", ["mkfs.xfs", "-q", "-m", "reflink=1"]), ("plain", ["mkfs.ext4", "-q", "-F"])):
        folder, image = pool_path(state, pool), state / "pools" / f"{pool}.img"
        folder.mkdir(parents=True, exist_ok=True)
        if folder.is_mount():
            continue
        if not image.exists():
            run("truncate", "-s", POOL_SIZE if pool == "reflink" else "1G", image)
            run(*make, image)
        run("mount", "-o", "loop,noatime", image, folder)


def unmount(state: Path) -> None:
    """Unmount the pools; their loop devices go with them."""
    for pool in ("reflink", "plain"):
        folder = pool_path(state, pool)
        if folder.is_mount():
            run("umount", "-l", folder)


def each_domain(state: Path, act: Callable[[Any], None], name: str = "libvirtd") -> None:
    """Do something with every domain."""
    connection = libvirt.open(uri(state, name))
    try:
        for domain in connection.listAllDomains():
            act(domain)
    finally:
        connection.close()


def _users() -> None:
    """libvirt wants this user to exist, whatever user QEMU runs as."""
    if "libvirt-qemu:" not in Path("/etc/group").read_text():
        run("groupadd", "-r", "libvirt-qemu")
    if "libvirt-qemu:" not in Path("/etc/passwd").read_text():
        run("useradd", "-r", "-g", "libvirt-qemu", "-d", "/nonexistent", "-s", "/usr/sbin/nologin", "libvirt-qemu")


def _pool(connection: Any, name: str, path: Path) -> None:
    try:
        pool = connection.storagePoolLookupByName(name)
    except libvirt.libvirtError:
        pool = connection.storagePoolDefineXML(
            f"<pool type='dir'><name>{name}</name><target><path>{path}</path></target></pool>", 0
        )
    pool.setAutostart(1)
    if not pool.isActive():
        pool.create(0)


def _secret(connection: Any, key: str) -> None:
    xml = f"<secret ephemeral='no' private='yes'><uuid>{SECRET}</uuid><usage type='ceph'><name>client.libvirt</name></usage></secret>"
    connection.secretDefineXML(xml, 0).setValue(base64.b64decode(key), 0)


def domain_pids(state: Path) -> dict[str, int]:
    """Numbers of the QEMU processes that this laboratory's libvirtd started, by domain."""
    found = {}
    for folder in sorted(state.glob("libvirtd*")):
        for path in (folder / "run" / "qemu").glob("*.pid"):
            pid = int(path.read_text().strip() or 0)
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"qemu" in words:
                found[path.stem] = pid
    return found


def tcp_port(state: Path, name: str = "libvirtd") -> int:
    """Port on which libvirtd listens on the loopback interface."""
    for line in (state / name / "libvirtd.conf").read_text().splitlines():
        if line.startswith("tcp_port"):
            return int(json.loads(line.split("=")[1]))
    raise LabError(f"{name} has no tcp_port")


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


def _libvirtd_conf(folder: Path, port: int) -> str:
    return f"""unix_sock_dir = "{folder}"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 1
listen_addr = "127.0.0.1"
tcp_port = "{port}"
auth_tcp = "none"
log_outputs = "2:file:{folder}/libvirtd.log"
max_clients = 500
"""
