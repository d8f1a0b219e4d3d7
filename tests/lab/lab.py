"""The laboratory as one thing: up, down, and what is in it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from tests.lab import binaries, ceph, controlplane, guests, hypervisor, image, paths
from tests.lab.errors import LabError
from tests.lab.guests import Disk, Guest
from tests.lab.run import run
from tests.lab.supervisor import Control

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "ceph-mon", "ceph-osd", "libvirtd")
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Component:
    """One real program of the laboratory, for tests that hurt it."""

    name: str
    control: Control

    @property
    def pid(self) -> int:
        """Its number; raises LabError if it does not run."""
        pids = self.control.pids()
        if self.name not in pids:
            raise LabError(f"{self.name} does not run")
        return pids[self.name]

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, sig)

    def start(self) -> None:
        """Start it as it was."""
        self.control.again(self.name)

    def stop(self) -> None:
        """End it."""
        self.control.stop(self.name)


@dataclass(frozen=True, slots=True)
class Lab:
    """A running laboratory. Make it with `Lab.up` or `Lab.attach`."""

    state: Path
    cache: Path
    control: Control
    kubeconfig: Path
    audit_log: Path | None
    ceph: ceph.Ceph

    @classmethod
    def up(cls, report: Report = lambda _line: None) -> Lab:
        """Start what does not run, wait until all of it answers, and return it."""
        state = paths.state()
        control = Control(state)
        given = _given_cluster(state)
        start = time.monotonic()

        def tell(line: str) -> None:
            report(f"{line:<60} {time.monotonic() - start:6.1f} s")

        if not control.alive():
            _clear(state)
            control.launch()
        if given is None:
            binaries.ensure(report)
            controlplane.up(state, control)
            tell("control plane is ready")
        cluster = ceph.up(state, control)
        tell("Ceph is up")
        hypervisor.up(state, control, cluster)
        tell("libvirtd is up")
        image.ensure(report)
        own = given is None
        config = controlplane.kubeconfig(state) if own else given
        assert config is not None, "one of both"
        return cls(state, paths.cache(), control, config, controlplane.audit_log(state) if own else None, cluster)

    @classmethod
    def attach(cls) -> Lab:
        """Return the laboratory that runs; raises LabError if it does not."""
        state = paths.state()
        control = Control(state)
        missing = set(COMPONENTS) - control.pids().keys()
        given = _given_cluster(state)
        if given is not None:
            missing -= {"etcd", "kube-apiserver", "kube-controller-manager"}
        if missing:
            raise LabError(f"of the laboratory {', '.join(sorted(missing))} does not run: run `make lab-up`")
        own = given is None
        config = given if given is not None else controlplane.kubeconfig(state)
        return cls(
            state,
            paths.cache(),
            control,
            config,
            controlplane.audit_log(state) if own else None,
            ceph.Ceph(state / "ceph"),
        )

    @staticmethod
    def down() -> list[str]:
        """End everything; return what could not be ended."""
        state = paths.state()
        if hypervisor.socket_path(state).exists() and hypervisor.answers(state):
            hypervisor.each_domain(state, _destroy)
        Control(state).end()
        _clear(state)
        shutil.rmtree(state, ignore_errors=True)
        return leftovers(state)

    def component(self, name: str) -> Component:
        """One program of the laboratory."""
        return Component(name, self.control)

    def bin(self, name: str) -> Path:
        """One of the control plane's programs."""
        found = binaries.find(name)
        if found is None:
            raise LabError(f"{name} is not built: run `make lab-up`")
        return found

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator."""
        return run(self.bin("kubectl"), "--kubeconfig", self.kubeconfig, *arguments, stdin=stdin)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a fresh token of a ServiceAccount."""
        token = self.kubectl("-n", namespace, "create", "token", name, "--duration=24h").strip()
        path = self.state / f"{namespace}-{name}.kubeconfig"
        if self.audit_log is not None:
            return controlplane.write_kubeconfig(self.state, path, {"token": token})
        config = json.loads(self.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
        config["users"][0]["user"] = {"token": token}
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    @property
    def libvirt_socket(self) -> Path:
        """libvirtd's socket."""
        return hypervisor.socket_path(self.state)

    @property
    def libvirt_uri(self) -> str:
        """libvirtd's URI."""
        return hypervisor.uri(self.state)

    def libvirt(self) -> Any:
        """A new connection to libvirtd."""
        return libvirt.open(self.libvirt_uri)

    def pool_path(self, pool: str) -> Path:
        """Folder of a storage pool."""
        return hypervisor.pool_path(self.state, pool)

    def guest(self, name: str = "demo", disks: Mapping[str, Disk] = guests.DEMO, **options: Any) -> Guest:
        """A running guest: made if there is none of this name, started if it is off."""
        found = Guest(
            name=name,
            state=self.state,
            ceph=self.ceph,
            image=image.folder(),
            disks=guests.placed(self.state, name, disks),
            **options,
        )
        found.up()
        return found

    def domain_stub(self, name: str, disks: Mapping[str, Disk] | None = None, devices: str = "") -> Guest:
        """A domain that is started paused, without a kernel that runs: cheap, and without an agent."""
        given = disks if disks is not None else {"vda": Disk(kind="file")}
        found = Guest(
            name=name,
            state=self.state,
            ceph=self.ceph,
            image=image.folder(),
            disks=guests.placed(self.state, name, given),
            memory_mib=32,
            writer_us=None,
            devices=devices,
        )
        found._make_disks()
        found.connection().defineXML(found.xml()).createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        return found


def leftovers(state: Path) -> list[str]:
    """Processes, mounts and loop devices that belong to this laboratory."""
    found = [f"process {pid}: {words[:100]}" for pid, words in _processes(state)]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(f"{state}/")]
    loops = json.loads(run("losetup", "--list", "--json") or '{"loopdevices": []}').get("loopdevices", [])
    found += [f"loop device {loop['name']}" for loop in loops if str(loop["back-file"]).startswith(f"{state}/")]
    return found


def _given_cluster(state: Path) -> Path | None:
    given = os.environ.get("KUBECONFIG")
    return Path(given) if given and not given.startswith(str(state)) else None


def _destroy(domain: Any) -> None:
    if domain.isActive():
        domain.destroy()


def _processes(state: Path) -> list[tuple[int, str]]:
    """Processes that name our folder; this one and its ancestors left out."""
    mine, pid = set(), os.getpid()
    while pid > 1:
        mine.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in mine:
            continue
        try:
            words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if f"{state}/" in words:
            found.append((int(entry.name), words.strip()))
    return found


def _clear(state: Path) -> None:
    """Remove what an earlier laboratory left: processes first, then mounts. Its cluster's data goes too."""
    end = time.monotonic() + 20
    while (left := _processes(state)) and time.monotonic() < end:
        for pid, _ in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    hypervisor.unmount(state)
    for name in ("pools", "control-plane", "ceph", "channels", "libvirtd"):
        shutil.rmtree(state / name, ignore_errors=True)
