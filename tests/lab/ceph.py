"""A whole Ceph cluster on the loopback interface: one monitor, one OSD on memory, cephx, one pool."""

from __future__ import annotations

import contextlib
import importlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.control import Control
from tests.lab.errors import LabError
from tests.lab.run import run
from tests.lab.wait import free_ports, until

COMPONENTS = ("ceph-mon", "ceph-osd")
POOL = "vms"
_USERS = {
    "vmsnapshot": 'allow r, allow command "osd blocklist" with blocklistop=add expire prefix 600',
    "libvirt": "profile rbd",
}
"""What the operator and QEMU may ask of the monitors; the operator's as in `examples/ceph-secret.yaml`."""
_MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Ceph:
    """The cluster whose files lie in `folder`."""

    folder: Path

    @property
    def conf(self) -> Path:
        """Configuration of the administrator, for every Ceph program."""
        return self.folder / "ceph.conf"

    @property
    def mon_host(self) -> str:
        """Address of the monitor as `host:port`."""
        return f"127.0.0.1:{self._facts()['mon']}"

    @property
    def pool(self) -> str:
        """The pool of the guests' images."""
        return POOL

    @property
    def fsid(self) -> str:
        """Identity of the cluster."""
        return str(self._facts()["fsid"])

    def key(self, user: str) -> str:
        """The cephx key of `client.USER`: admin, vmsnapshot (the operator's) or libvirt (QEMU's)."""
        return run("ceph-authtool", self.folder / "keyring", "-n", f"client.{user}", "--print-key").strip()

    @contextlib.contextmanager
    def connect(self) -> Iterator[tuple[Any, Any]]:
        """A connection of the administrator and the pool, open. Each operation ends after 30 s, whatever the cluster does."""
        rados = bindings("rados")
        limits = {"rados_osd_op_timeout": "30", "rados_mon_op_timeout": "30", "client_mount_timeout": "30"}
        with rados.Rados(conffile=str(self.conf), conf=limits) as cluster, cluster.open_ioctx(POOL) as ioctx:
            yield cluster, ioctx

    def check(self, _name: str = "") -> bool:
        """Whether the monitor, the OSD and the pool with its data answer: an OSD on memory loses its data when it is killed."""
        try:
            run("rados", "-c", self.conf, "-p", POOL, "stat", "rbd_info", timeout=5)
        except LabError:
            return False
        return True

    def create_image(self, name: str, content: Path) -> None:
        """Make an image with exclusive lock of the content of a raw file; its holes stay holes."""
        rbd = bindings("rbd")
        with self.connect() as (_, ioctx):
            rbd.RBD().create(ioctx, name, content.stat().st_size, features=_features(rbd), old_format=False)
            with rbd.Image(ioctx, name) as image, content.open("rb") as source:
                offset = 0
                while data := source.read(_MiB):
                    if data.strip(b"\0"):
                        image.write(data, offset)
                    offset += len(data)

    def remove_image(self, name: str) -> None:
        """Delete an image with all its snapshots, also those that a group holds; nothing happens if it is not there."""
        rbd = bindings("rbd")
        with self.connect() as (_, ioctx):
            try:
                with rbd.Image(ioctx, name) as image:
                    self._leave_group(ioctx, image, name)
                    for snapshot in list(image.list_snaps()):
                        if image.is_protected_snap(snapshot["name"]):
                            image.unprotect_snap(snapshot["name"])
                        image.remove_snap(snapshot["name"])
                rbd.RBD().remove(ioctx, name)
            except rbd.ImageNotFound:
                return

    def _leave_group(self, ioctx: Any, image: Any, name: str) -> None:
        rbd = bindings("rbd")
        try:
            group_name = image.group()["name"]
        except rbd.Error:
            return
        if not group_name:
            return
        group = rbd.Group(ioctx, group_name)
        for snapshot in list(group.list_snaps()):
            group.remove_snap(snapshot["name"])
        group.remove_image(ioctx, name)

    def _facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "facts.json").read_text()))


def bindings(name: str) -> Any:
    """Debian's `rados` or `rbd`; raises LabError saying how they come into this environment."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LabError(f"Ceph's bindings cannot be imported ({error}): run `make bindings`") from error


def up(ceph: Ceph, control: Control, tell: Callable[[str], None]) -> bool:
    """Make the cluster work and tell of its parts; return whether it is a new one, with nothing in it: memory does not outlive its process."""
    running = set(COMPONENTS) <= control.pids().keys()
    if running:
        for name in COMPONENTS:
            control.again(name)  # one that is stopped goes on
        with contextlib.suppress(LabError):
            until("Ceph answers", ceph.check, 20)
            tell("ceph-mon, ceph-osd")
            return False
    for name in reversed(COMPONENTS):
        control.stop(name)
    run("rm", "-rf", ceph.folder)
    for name in ("mon", "osd", "run", "log", "crash"):
        (ceph.folder / name).mkdir(parents=True)
    _make(ceph, control, tell)
    return True


def _make(ceph: Ceph, control: Control, tell: Callable[[str], None]) -> None:
    folder, conf = ceph.folder, str(ceph.conf)
    facts = {"fsid": str(uuid.uuid4()), "mon": free_ports(1)[0]}
    (folder / "facts.json").write_text(json.dumps(facts))
    ceph.conf.write_text(_CONF.format(folder=folder, port=facts["mon"], fsid=facts["fsid"], memory=2 << 30))
    osd = str(uuid.uuid4())
    _keys(folder / "keyring")
    monitor = f"[v2:{ceph.mon_host}]"
    run("monmaptool", "--create", "--clobber", "--fsid", ceph.fsid, "--addv", "a", monitor, folder / "monmap")
    mkfs = ("--mkfs", "--monmap", folder / "monmap", "--keyring", folder / "keyring")
    run("ceph-mon", "-c", conf, "-i", "a", *mkfs)
    control.start("ceph-mon", ["ceph-mon", "-c", conf, "-i", "a", "-f"])
    run("ceph", "-c", conf, "--connect-timeout", "60", "osd", "new", osd)
    tell("ceph-mon")
    run("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
    control.start("ceph-osd", ["ceph-osd", "-c", conf, "-i", "0", "-f"])
    run("ceph", "-c", conf, "osd", "pool", "create", POOL, "8", "8", "replicated")
    until("the OSD is up", lambda: json.loads(run("ceph", "-c", conf, "osd", "stat", "-f", "json"))["num_up_osds"] == 1)
    run("rbd", "-c", conf, "pool", "init", POOL)
    control.healthy("ceph-osd", ceph.check)
    tell("ceph-osd")


def _keys(keyring: Path) -> None:
    """Make all keys beforehand: the monitor takes over those of its initial keyring."""
    users = {
        "mon.": {"mon": "allow *"},
        "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
        "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
        **{f"client.{user}": {"mon": cap, "osd": f"profile rbd pool={POOL}"} for user, cap in _USERS.items()},
    }
    for number, (name, caps) in enumerate(users.items()):
        words = [word for kind, cap in caps.items() for word in ("--cap", kind, cap)]
        run("ceph-authtool", *([] if number else ["--create-keyring"]), keyring, "--gen-key", "-n", name, *words)


def _features(rbd: Any) -> int:
    """Layering, exclusive-lock, object-map, fast-diff, deep-flatten: what `rbd create` gives."""
    names = ("LAYERING", "EXCLUSIVE_LOCK", "OBJECT_MAP", "FAST_DIFF", "DEEP_FLATTEN")
    return sum(int(getattr(rbd, f"RBD_FEATURE_{name}")) for name in names)


_CONF = """[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}/run
admin socket = {folder}/run/$name.$pid.asok
log file = {folder}/log/$name.log
log to stderr = false
err to stderr = false
crash dir = {folder}/crash
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon warn on pool no redundancy = false
mon allow pool size one = true
mon allow pool delete = true
mon data avail warn = 1
mon data avail crit = 0
mon cluster log file = {folder}/log/cluster.log
[mon]
mon data = {folder}/mon
mon initial members = a
mon election timeout = 1
mon lease = 2
# The defaults gather changes for a second or so: here each snapshot would wait for that.
paxos min wait = 0.01
paxos propose interval = 0.01
[osd]
osd data = {folder}/osd
# A dead owner of an image's lock delays the next one for this long; the default is 30. A live one that gets no processor for
# so long has its lock broken, and is shut out.
osd client watch timeout = 15
osd objectstore = memstore
# An OSD that is ended, and not killed, writes its memory down and has it again after a start.
osd fast shutdown = false
osd class load list = *
# Tests stop the process for as long as they need. One that then takes its own silence for a defect ends itself, and
# its memory is gone.
osd op thread timeout = 3600
osd op thread suicide timeout = 0
# Reads and writes wait for a lease of 16 s that copies of the data give each other. With a single copy nobody renews one
# that ended while the process was stopped, and every image hangs for good ("active+clean+laggy").
osd pool default read lease ratio = 1000
# One copy of everything has nobody to recover from: the log of past writes would only eat memory.
osd min pg log entries = 100
osd max pg log entries = 200
osd pg log dups tracked = 100
osd memory target = 939524096
memstore device bytes = {memory}
[client]
rbd default features = layering,exclusive-lock,object-map,fast-diff,deep-flatten
rbd cache = false
"""
