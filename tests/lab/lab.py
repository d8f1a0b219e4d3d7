"""The laboratory as one thing: up, down, and what is in it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt

from tests.lab import api, binaries, ceph, controlplane, image, leftovers, paths, pools
from tests.lab.api import Api
from tests.lab.ceph import Ceph
from tests.lab.control import Component, Control
from tests.lab.controlplane import ControlPlane
from tests.lab.definition import DEMO, WRITER_MICROSECONDS, GuestDisk, Spec
from tests.lab.errors import LabError
from tests.lab.guests import Guest
from tests.lab.hypervisor import Host
from tests.lab.locks import locked
from tests.lab.run import run
from tests.lab.supervisor import MARKER

LAYOUT = 3
"""Raised when a laboratory that runs cannot be used by code of another layout: it is ended and started anew."""
SECOND_HOST = "libvirtd-2"
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lab:
    """A laboratory. `Lab.up` starts what does not run, `Lab.attach` takes the one that runs."""

    state: Path
    given: Path | None
    """The kubeconfig of an existing cluster, used instead of a control plane of ours."""

    # --- up and down -------------------------------------------------------------------------------------------------

    @classmethod
    def up(cls, report: Report = lambda _line: None) -> Lab:
        """Start or mend what does not work, wait until all of it does, and return it. `report` gets a line per step."""
        if os.geteuid() != 0:
            raise LabError("the laboratory mounts file systems and runs libvirtd: it must be started as root")
        state = paths.state()
        lab = cls(state, _given_cluster(state))
        binaries.ensure(report, servers=lab.given is None)
        image.ensure(report)
        with locked(state / "lab.lock"):
            lab._start(report)
        return lab

    @classmethod
    def attach(cls, *, whole: bool = True) -> Lab:
        """Return the laboratory that runs; raises LabError if none does, or (unless `whole` is false) naming what of it does not."""
        state = paths.state()
        facts = _facts(state)
        lab = cls(state, Path(facts["given"]) if facts.get("given") else None)
        running = lab.control.pids()
        missing = [name for name in lab.components if name not in running]
        if whole and missing:
            raise LabError(f"of the laboratory at {state} does not run: {', '.join(missing)}: run `make lab-up`")
        if facts.get("layout") != LAYOUT:
            raise LabError(f"the laboratory at {state} is one of another version: run `make lab-up`")
        return lab

    @staticmethod
    def down() -> list[str]:
        """End everything, also what a killed supervisor left, and delete the state. Return what could not be ended."""
        state = paths.state()
        if not state.exists():
            return leftovers.found(state)
        with locked(state / "lab.lock"):
            Control(state).end()
            leftovers.clear(state)
            left = leftovers.found(state)
            if not left:
                shutil.rmtree(state)
        return left

    # --- control plane -----------------------------------------------------------------------------------------------

    @property
    def control_plane(self) -> ControlPlane:
        """Our own control plane, whether it is used or not."""
        return ControlPlane(self.state / "control-plane")

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.given or self.control_plane.kubeconfig

    @property
    def audit_log(self) -> Path | None:
        """The API server's audit log, one JSON object a line; None with an existing cluster."""
        return None if self.given else self.control_plane.audit_log

    def bin(self, name: str) -> Path:
        """One of etcd, kube-apiserver, kube-controller-manager, kubectl, helm; raises LabError if it is not built."""
        return binaries.need(name)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator; raises LabError with what it said."""
        return run(self.bin("kubectl"), "--kubeconfig", self.kubeconfig, *arguments, stdin=stdin)

    @property
    def api(self) -> Api:
        """The API server as the administrator; raises LabError if there is no kubeconfig."""
        try:
            return api.of(self.kubeconfig)
        except OSError as error:
            raise LabError(f"there is no kubeconfig: {error}") from error

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a fresh token, good for a day, of a ServiceAccount that exists."""
        token = self.kubectl("-n", namespace, "create", "token", name, "--duration=24h").strip()
        folder = self.given.parent if self.given and self.given.is_relative_to(self.state) else self.state
        path = folder / f"{namespace}-{name}.kubeconfig"
        if self.given is None:
            return self.control_plane.write_kubeconfig(path, {"token": token})
        config = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        config["users"][0]["user"] = {"token": token}
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    @property
    def second_control_plane(self) -> ControlPlane:
        """A second one, whether it runs or not."""
        return ControlPlane(self.state / "control-plane-2", suffix="-2")

    def second_cluster(self) -> Lab:
        """This very laboratory as another cluster sees it: same host, same storage, a control plane of its own, started if need be."""
        self.second_control_plane.up(self.control, lambda _name: None)
        return Lab(self.state, self.second_control_plane.kubeconfig)

    def end_second_cluster(self) -> None:
        """End the second control plane, and forget all that it held."""
        self.second_control_plane.down(self.control)

    # --- hypervisor and storage --------------------------------------------------------------------------------------

    @property
    def host(self) -> Host:
        """The hypervisor host."""
        return Host(self.state)

    @property
    def hosts(self) -> tuple[Host, ...]:
        """The hypervisor hosts that run or shall run: the first, and the second while it is there."""
        second = Host(self.state, SECOND_HOST)
        return (self.host, second) if second.name in self.control.pids() else (self.host,)

    def second_host(self) -> Host:
        """A second hypervisor host, to which guests can migrate; started if it does not run. It sees the same pools and Ceph."""
        host = Host(self.state, SECOND_HOST)
        host.up(self.control, lambda _name: None)
        host.give_key(self.ceph.key("libvirt"))
        return host

    def end_second_host(self) -> None:
        """End the second host. Its guests must have left it: raises LabError if one has not."""
        host = Host(self.state, SECOND_HOST)
        if host.name not in self.control.pids():
            return
        if left := host.pids():
            raise LabError(f"the second host still runs {', '.join(sorted(left))}")
        self.control.stop(host.name)

    @property
    def libvirt_socket(self) -> Path:
        """libvirtd's socket."""
        return self.host.socket

    @property
    def libvirt_uri(self) -> str:
        """libvirtd's URI, over its socket."""
        return self.host.uri

    def libvirt(self) -> Any:
        """A new connection to libvirtd; the caller closes it."""
        return self.host.open()

    @property
    def ceph(self) -> Ceph:
        """The Ceph cluster."""
        return Ceph(self.state / "ceph")

    def pool_path(self, pool: str) -> Path:
        """Folder of the storage pool `reflink` or `plain`."""
        return pools.path(self.state, pool)

    # --- guests --------------------------------------------------------------------------------------------------------

    def guest(
        self,
        name: str = "demo",
        disks: Mapping[str, GuestDisk] = DEMO,
        *,
        writer: bool = True,
        writer_us: int = WRITER_MICROSECONDS,
        memory_mib: int = 128,
        hook: bool = True,
        append: str = "",
        devices: str = "",
        firmware: str = "",
    ) -> Guest:
        """A running guest whose agent answers: made if there is none like it, started if it is off, let go on if it is paused.

        `disks` by target; `writer` and `writer_us`: records on all disks, with this pause between two rounds; `hook`: the agent's
        freeze hook holds the writer; `append`: more words for the kernel; `devices`, `firmware`: more XML. The same name with other options is
        another guest: the one before is removed with its disks.
        """
        options = {"memory_mib": memory_mib, "writer": writer, "writer_us": writer_us, "hook": hook}
        found = self._guest(name, disks, image.folder(), append=append, devices=devices, firmware=firmware, **options)
        found.up()
        return found

    def domain_stub(
        self,
        name: str,
        disks: Mapping[str, GuestDisk] | None = None,
        *,
        devices: str = "",
        firmware: str = "",
        started: bool = True,
    ) -> Guest:
        """A domain that is started paused, with nothing to boot and no agent: half a second and 50 MB, for fleets.

        One that is not `started` is off, and may have devices (`devices`, `firmware`: more XML) that are not there.
        """
        given = {"vda": GuestDisk(kind="file")} if disks is None else disks
        options = {"memory_mib": 32, "writer": False, "devices": devices, "firmware": firmware}
        found = self._guest(name, given, None, **options)
        found.up_paused() if started else found.define()
        return found

    def _guest(self, name: str, disks: Mapping[str, GuestDisk], boot: Path | None, **options: Any) -> Guest:
        spec = Spec(
            name=name,
            disks={t: d.placed(name, t, self.pool_path(d.pool or "reflink")) for t, d in disks.items()},
            image=boot,
            channel=self.state / "channels" / f"{name}.sock",
            log=self.state / "log" / f"guest-{name}.log",
            mon_host=self.ceph.mon_host,
            **options,
        )
        return Guest(spec, next((h for h in self.hosts if h.has(name)), self.host), self.ceph)

    # --- components ------------------------------------------------------------------------------------------------------

    @property
    def cache(self) -> Path:
        """Folder of what is built once."""
        return paths.cache()

    @property
    def control(self) -> Control:
        """The supervisor's other end."""
        return Control(self.state)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the programs that this laboratory runs."""
        return (*(() if self.given else controlplane.COMPONENTS), *ceph.COMPONENTS, self.host.name)

    def component(self, name: str) -> Component:
        """One program of the laboratory, to be hurt; raises LabError if it has none of this name."""
        if name == SECOND_HOST:
            return Component(name, self.control, Host(self.state, SECOND_HOST).check)
        if name not in self.components:
            raise LabError(f"there is no component {name}; there are {', '.join(self.components)}")
        checks: dict[str, Callable[[str], bool]] = dict.fromkeys(controlplane.COMPONENTS, self.control_plane.check)
        checks |= dict.fromkeys(ceph.COMPONENTS, self.ceph.check)
        check = checks.get(name, self.host.check)
        return Component(name, self.control, lambda: check(name))

    @property
    def marker(self) -> dict[str, str]:
        """Environment for a program that `down` shall end even if whoever started it is gone."""
        return {MARKER: str(self.state)}

    # --- starting --------------------------------------------------------------------------------------------------------

    def _start(self, report: Report) -> None:
        start = time.monotonic()

        def tell(name: str) -> None:
            report(f"{name:<26} ready after {time.monotonic() - start:5.1f} s")

        facts = {"layout": LAYOUT, "given": str(self.given) if self.given else None}
        if not self.control.alive() or _facts(self.state).get("layout") != LAYOUT:
            self._renew(report)
        (self.state / "facts.json").write_text(json.dumps(facts))
        pools.mount(self.state)
        parts = [lambda: self.host.up(self.control, tell), lambda: self._start_ceph(tell)]
        if self.given is None:
            parts.append(lambda: self.control_plane.up(self.control, tell))
        with ThreadPoolExecutor(len(parts)) as threads:
            for done in [threads.submit(part) for part in parts]:
                done.result()
        self.host.give_key(self.ceph.key("libvirt"))

    def _renew(self, report: Report) -> None:
        """Start a supervisor; what an earlier one left goes first."""
        if left := leftovers.found(self.state):
            report(f"ending what an earlier laboratory left: {len(left)} processes and mounts")
        self.control.end()
        leftovers.clear(self.state)
        if left := leftovers.found(self.state):
            raise LabError(f"an earlier laboratory cannot be ended: {'; '.join(left)}")
        for entry in self.state.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
        self.control.launch()

    def _start_ceph(self, tell: Callable[[str], None]) -> None:
        empty = ceph.up(self.ceph, self.control, tell)
        if empty and self.control.pids().get(self.host.name) and self.host.check():
            self._forget_guests_on_ceph()

    def _forget_guests_on_ceph(self) -> None:
        """A new cluster has none of the images of before: guests that had disks there are made again when asked for."""
        with self.host.connection() as connection:
            for domain in connection.listAllDomains():
                if "protocol='rbd'" not in domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE):
                    continue
                if domain.isActive():
                    domain.destroy()
                domain.undefine()


def _facts(state: Path) -> dict[str, Any]:
    path = state / "facts.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _given_cluster(state: Path) -> Path | None:
    """The existing cluster of `KUBECONFIG`, unless that is the laboratory's own."""
    given = os.environ.get("KUBECONFIG")
    if not given:
        return None
    if ":" in given:
        raise LabError(
            f"KUBECONFIG={given} names several files; the laboratory takes one: `kubectl config view --raw --flatten` joins them"
        )
    path = Path(given).resolve()
    if path.is_relative_to(state):
        return None
    if not path.exists():
        raise LabError(f"KUBECONFIG={given} is not there; unset it to get a control plane of the laboratory's own")
    return path
