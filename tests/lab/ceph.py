"""A whole Ceph cluster on the loopback interface: one monitor, one OSD on memory, cephx, one pool."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.run import run
from tests.lab.supervisor import Control
from tests.lab.wait import free_ports, until

POOL = "vms"
USERS = {"vmsnapshot": f"profile rbd pool={POOL}", "libvirt": f"profile rbd pool={POOL}"}


@dataclass(frozen=True, slots=True)
class Ceph:
    """How to reach the cluster."""

    folder: Path

    @property
    def conf(self) -> Path:
        """Configuration of the administrator."""
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
        """The cephx key of `client.USER`."""
        return run("ceph-authtool", self.folder / "keyring", "-n", f"client.{user}", "--print-key").strip()

    @contextmanager
    def connect(self) -> Iterator[tuple[Any, Any]]:
        """A connection of the administrator, with the pool open."""
        import rados  # Debian's bindings: there only after `make bindings`

        with rados.Rados(conffile=str(self.conf)) as cluster, cluster.open_ioctx(POOL) as ioctx:
            yield cluster, ioctx

    def _facts(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "facts.json").read_text()))


def up(state: Path, control: Control) -> Ceph:
    """Start the cluster if it does not run. Its OSD is memory: a cluster that was ended starts empty."""
    ceph = Ceph(state / "ceph")
    if {"ceph-mon", "ceph-osd"} <= control.pids().keys():
        return ceph
    run("rm", "-rf", ceph.folder)
    for name in ("mon", "osd", "run", "log", "crash"):
        (ceph.folder / name).mkdir(parents=True)
    facts = {"fsid": str(uuid.uuid4()), "mon": free_ports(1)[0]}
    (ceph.folder / "facts.json").write_text(json.dumps(facts))
    ceph.conf.write_text(_conf(ceph.folder, facts))
    _keys(ceph)
    folder, conf = ceph.folder, str(ceph.conf)
    run(
        "monmaptool",
        "--create",
        "--clobber",
        "--fsid",
        facts["fsid"],
        "--addv",
        "a",
        f"[v2:{ceph.mon_host}]",
        folder / "monmap",
    )
    run("ceph-mon", "-c", conf, "-i", "a", "--mkfs", "--monmap", folder / "monmap", "--keyring", folder / "keyring")
    control.start("ceph-mon", ["ceph-mon", "-c", conf, "-i", "a", "-f"])
    run("ceph", "-c", conf, "--connect-timeout", "60", "mon", "stat")
    osd = str(uuid.uuid4())
    run("ceph", "-c", conf, "osd", "new", osd)
    run("ceph-osd", "-c", conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
    control.start("ceph-osd", ["ceph-osd", "-c", conf, "-i", "0", "-f"])
    until("the OSD is up", lambda: " 1 up" in run("ceph", "-c", conf, "osd", "stat"))
    run("ceph", "-c", conf, "osd", "pool", "create", POOL, "8", "8", "replicated")
    run("rbd", "-c", conf, "pool", "init", POOL)
    for user, caps in USERS.items():
        text = run("ceph", "-c", conf, "auth", "get-or-create", f"client.{user}", "mon", "profile rbd", "osd", caps)
        with (folder / "keyring").open("a") as keyring:
            keyring.write(text)
    return ceph


def _keys(ceph: Ceph) -> None:
    keyring = ceph.folder / "keyring"
    for create, name, caps in (
        (True, "mon.", {"mon": "allow *"}),
        (False, "client.admin", {"mon": "allow *", "osd": "allow *", "mgr": "allow *"}),
        (False, "osd.0", {"mon": "allow profile osd", "osd": "allow *"}),
    ):
        words = [w for kind, cap in caps.items() for w in ("--cap", kind, cap)]
        run("ceph-authtool", *(["--create-keyring"] if create else []), keyring, "--gen-key", "-n", name, *words)


def _conf(folder: Path, facts: dict[str, Any]) -> str:
    port = facts["mon"]
    return f"""[global]
fsid = {facts["fsid"]}
mon host = v2:127.0.0.1:{port}
public addr = 127.0.0.1
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
ms bind ipv6 = false
ms bind msgr1 = false
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
pid file = {folder}/run/$name.pid
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
auth allow insecure global id reclaim = false
mon data avail warn = 1
mon data avail crit = 0
mon cluster log file = {folder}/log/cluster.log
[mon]
mon data = {folder}/mon
mon initial members = a
mon election timeout = 1
mon lease = 2
# The defaults gather changes for a second or so: here each snapshot would wait for it.
paxos min wait = 0.01
paxos propose interval = 0.01
[osd]
osd data = {folder}/osd
osd client watch timeout = 5
osd objectstore = memstore
osd class load list = *
osd memory target = 939524096
memstore device bytes = {2 * 1024**3}
[client]
rbd default features = layering,exclusive-lock,object-map,fast-diff,deep-flatten
rbd cache = false
"""
