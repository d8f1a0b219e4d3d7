"""The operator and its guardian beside the laboratory, under exactly the permissions of the chart.

Shared by the demo, the integration tests and the benchmarks. Not the laboratory itself (`tests.lab`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from tests.lab import Lab, LabError, api
from tests.lab.hypervisor import Host
from tests.lab.supervisor import die_with_parent
from vmsnapshot_operator.core import names
from vmsnapshot_operator.drivers import probes

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "vmsnapshot-operator"
EXAMPLES = ROOT / "examples"
NAMESPACE = "vmsnapshot-system"
TENANT = "team-a"
SERVICE_ACCOUNT = "vmsnapshot-operator"
GUARD_SECONDS = 120.0
"""Longer than anything here takes: a guard against hanging, not a measure."""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Program:
    """A child process with its log; ends with the one who started it."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self.process.pid

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send a signal; wait for the end if it is a deadly one."""
        self.process.send_signal(sig)
        if sig in (signal.SIGKILL, signal.SIGTERM):
            self.process.wait(timeout=GUARD_SECONDS)

    def stop(self) -> None:
        """End it as Kubernetes would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def until(what: str, ready: Callable[[], bool], timeout: float = GUARD_SECONDS) -> None:
    """Wait until something holds; raises LabError naming it otherwise."""
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise LabError(f"not within {timeout:g} s: {what}")
        time.sleep(0.05)


@dataclass(slots=True)
class Stack:
    """The operator under test. `snapshots` and friends speak to the API server as the administrator does.

    `server`: where the operator looks for the API server, if not where it is. `observer`: the socket of one who is told of each
    of its steps (see `tests.chaos.observed`). `plugins`: a folder with distributions that are installed for it beside the project.
    """

    lab: Lab
    state: Path
    plugins: Path | None = None
    telemetry_port: int = 0
    server: str = ""
    observer: Path | None = None
    programs: dict[str, Program] = field(default_factory=dict)
    _token: Path | None = None
    """The kubeconfig of the operators of this stack; its token is good for a day."""

    # --- starting and ending -------------------------------------------------------------------------------------

    def install(self) -> None:
        """Apply CRDs, namespaces and the chart's RBAC, and nothing more."""
        self.lab.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(ROOT / "crds"))
        self.lab.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(ROOT / "crds"))
        for name in (NAMESPACE, TENANT):
            self.make_namespace(name)
        self.lab.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=self.chart_permissions())

    def make_namespace(self, name: str) -> None:
        """Make a namespace, if there is none."""
        self._apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    def chart_permissions(self) -> str:
        """Render the chart's ServiceAccount and RBAC."""
        shown = ["-s", "templates/serviceaccount.yaml", "-s", "templates/rbac.yaml"]
        helm = [
            str(self.lab.bin("helm")),
            "template",
            "vmsnapshot-operator",
            str(CHART),
            "--namespace",
            NAMESPACE,
            "--kube-version",
            "1.37.0",
        ]
        done = subprocess.run([*helm, *shown], capture_output=True, text=True, check=False, timeout=GUARD_SECONDS)
        if done.returncode:
            raise LabError(f"helm template: {done.stderr}")
        return done.stdout

    def start(self) -> None:
        """Start guardian and operator, and wait until the operator is ready."""
        self.start_guardian()
        self.start_operator()

    def start_guardian(self) -> None:
        """Start the guardian and wait for its socket."""
        self.guardian_socket.unlink(missing_ok=True)
        self._spawn("guardian", ["guardian", "--socket", str(self.guardian_socket)])
        until("the guardian listens", self.guardian_socket.exists)

    def start_operator(self, name: str = "operator", *, wait: bool = True) -> None:
        """Start the operator as its ServiceAccount."""
        kubeconfig = self._kubeconfig()
        port = free_port()
        if name == "operator":
            self.telemetry_port = port
        options = ["--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE, "--telemetry-host", "127.0.0.1"]
        options += [
            "--telemetry-port",
            str(port),
            "--guardian-socket",
            str(self.guardian_socket),
            "--identity",
            name,
            "--log-format",
            "text",
        ]
        self._spawn(name, ["run", *options], self.observer)
        if wait:
            until(f"the operator is ready (log: {self.programs[name].log})", self.ready)

    def _kubeconfig(self) -> Path:
        """A file of this stack alone: another one may look for the API server elsewhere."""
        if self._token is None:
            made = self.lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT)
            config = yaml.safe_load(made.read_text())
            if self.server:
                config["clusters"][0]["cluster"] = {"server": self.server}
            path = self.state / "operator.kubeconfig"
            path.touch(mode=0o600)
            path.write_text(yaml.safe_dump(config))
            self._token = path
        return self._token

    def stop(self) -> None:
        """End operator and guardian, in this order."""
        for name in sorted(self.programs, key=lambda n: n == "guardian"):
            self.programs.pop(name).stop()

    def __enter__(self) -> Self:
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            self.install()
            self.configure()
            self.start()
            self.observed()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def guardian_socket(self) -> Path:
        """Where the guardian listens."""
        return self.state / "guardian.sock"

    def ready(self) -> bool:
        """Whether the operator says that it is ready."""
        for name, program in self.programs.items():
            if program.process.poll() is not None:
                raise LabError(f"{name} ended with {program.process.returncode}:\n{program.log.read_text()[-3000:]}")
        try:
            return self.http("/readyz")[0] == 200
        except OSError:
            return False

    def http(self, path: str) -> tuple[int, str]:
        """Ask the operator's telemetry port."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.telemetry_port}{path}", timeout=5) as answer:
                return int(answer.status), answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def _spawn(self, name: str, arguments: list[str], observer: Path | None = None) -> None:
        log = self.state / f"{name}.log"
        program = [str(Path(sys.executable).parent / "vmsnapshot-operator")]
        if observer is not None:
            program = [sys.executable, "-m", "tests.chaos.observed", str(observer)]
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*program, *arguments],
                cwd=ROOT,
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - nothing of ours holds a lock that the child could need
                env=self._environment(),
            )
        self.programs[name] = Program(name, process, log)

    def _environment(self) -> dict[str, str]:
        plugins = {"PYTHONPATH": str(self.plugins)} if self.plugins is not None else {}
        return {k: v for k, v in os.environ.items() if k != "KUBECONFIG"} | {"PYTHONUNBUFFERED": "1"} | plugins

    # --- the examples, fitted to this laboratory --------------------------------------------------------------------

    def configure(self) -> None:
        """Apply the examples of an administrator: Hypervisor, classes, Ceph's key."""
        for name in ("ceph-secret.yaml", "hypervisor.yaml", "storage-classes.yaml"):
            for document in self.example(name):
                self._apply(self.fitted(document))

    def fitted(self, document: dict[str, Any]) -> dict[str, Any]:
        """An example with the addresses of this laboratory."""
        if document["kind"] == "Secret":
            document["stringData"] = {"key": self.lab.ceph.key("vmsnapshot")}
        elif document["kind"] == "Hypervisor":
            document["spec"]["libvirt"]["endpoints"] = [self.endpoint()]
        elif document["kind"] == "StorageDriverClass" and document["spec"]["driver"] == "ceph-rbd":
            document["spec"]["parameters"] |= {"monHosts": self.lab.ceph.mon_host, "pool": self.lab.ceph.pool}
        elif document["kind"] == "StorageDriverClass":
            document["spec"]["parameters"]["socketPath"] = str(self.lab.libvirt_socket)
        return document

    def spread(self, hosts: Sequence[Host]) -> None:
        """Make these hosts the endpoints of the Hypervisor, and wait until the operator has looked at all of them."""
        (document,) = self.example("hypervisor.yaml")
        document["spec"]["libvirt"]["endpoints"] = [self.endpoint(host) for host in hosts]
        self._apply(document)
        name = document["metadata"]["name"]

        def seen() -> bool:
            body = json.loads(self.lab.kubectl("get", "hypervisors.vmsnapshot.io", name, "-o", "json"))
            ready = conditions(body).get("Ready", {})
            return ready.get("status") == "True" and ready.get("observedGeneration") == body["metadata"]["generation"]

        until(f"the operator knows the hosts {', '.join(h.name for h in hosts)}", seen)

    def observed(self) -> None:
        """Wait until the operator knows the classes and hypervisors: until it could plan a snapshot of the guest."""
        self.delete("warm-up")
        self.snapshot("warm-up", dryRun=True)
        self.wait("warm-up", "Planned")
        self.delete("warm-up")

    def endpoint(self, host: Host | None = None) -> dict[str, Any]:
        """The libvirt of a host, by default the laboratory's first, as an endpoint of a Hypervisor."""
        return {"driver": "qemu", "transport": "unix", "socketPath": str((host or self.lab.host).socket)}

    @staticmethod
    def example(name: str) -> list[dict[str, Any]]:
        """The documents of an example file."""
        return [d for d in yaml.safe_load_all((EXAMPLES / name).read_text()) if d]

    # --- objects -----------------------------------------------------------------------------------------------------

    def apply(self, document: Mapping[str, Any]) -> None:
        """Apply an object as a user does."""
        self._apply(document)

    def _apply(self, document: Mapping[str, Any]) -> None:
        if (where := api.path_of(document)) is not None:
            self.lab.api.apply(where, document)
            return
        self.lab.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(document))

    def snapshot(self, name: str, domain: str = "demo", *, namespace: str = TENANT, **spec: Any) -> str:
        """Create a VMSnapshot and return its name."""
        self._apply(self.body(name, domain, namespace=namespace, **spec))
        return name

    @staticmethod
    def body(name: str, domain: str, *, namespace: str = TENANT, **spec: Any) -> dict[str, Any]:
        """A VMSnapshot as a user writes it."""
        return {
            "apiVersion": "vmsnapshot.io/v1alpha1",
            "kind": "VMSnapshot",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"source": {"hypervisorName": "lab", "domain": domain}, **spec},
        }

    def patch(self, name: str, change: dict[str, Any], *, namespace: str = TENANT) -> None:
        """Change a VMSnapshot by a merge patch."""
        self.lab.kubectl(
            "-n", namespace, "patch", "vmsnapshots.vmsnapshot.io", name, "--type=merge", "-p", json.dumps(change)
        )

    def get(self, name: str, namespace: str = TENANT) -> dict[str, Any] | None:
        """The VMSnapshot as it is, or None."""
        return self.lab.api.get(api.path("vmsnapshots", name, namespace))

    def installation(self) -> str:
        """The id of the installation that runs here."""
        text = self.lab.kubectl("-n", NAMESPACE, "get", "configmap", "vmsnapshot-installation", "-o", "json")
        return names.installation_id(json.loads(text)["data"]["seed"])

    def remove_by_hand(self, uid: str) -> None:
        """Delete what one VMSnapshot left on the storage systems, as their administrator would; a driver's probe may be beside it."""
        import rbd  # Debian's bindings; only where the laboratory is

        prefix = names.object_prefix(self.installation(), uid)
        for file in self.lab.pool_path("reflink").glob(f"{prefix}*"):
            file.unlink()
        with self.lab.ceph.connect() as (_, io):
            for record in rbd.RBD().group_list(io):
                if record.startswith(prefix):
                    rbd.RBD().group_remove(io, record)
            for image in rbd.RBD().list(io):
                if probes.is_probe(image):
                    continue
                with rbd.Image(io, image) as opened:
                    for snapshot in opened.list_snaps():
                        if snapshot["name"].startswith(prefix):
                            opened.remove_snap(snapshot["name"])

    def all(self, resource: str) -> list[dict[str, Any]]:
        """All objects of a resource."""
        return self.lab.api.items(api.path(resource))

    def events(self, name: str, reason: str, namespace: str = TENANT) -> list[dict[str, Any]]:
        """The events about an object with this reason; those about cluster-scoped ones are in `default`."""
        found = self.lab.api.items(f"/apis/events.k8s.io/v1/namespaces/{namespace}/events")
        return [e for e in found if e["regarding"]["name"] == name and e["reason"] == reason]

    def wait(
        self,
        name: str,
        kind: str = "Ready",
        status: str = "True",
        *,
        namespace: str = TENANT,
        timeout: float = GUARD_SECONDS,
    ) -> dict[str, Any]:
        """Wait for a condition (for Ready: fail at once when it stalls) and return the object."""
        end = time.monotonic() + timeout
        while True:
            body = self.get(name, namespace)
            found = conditions(body or {})
            if found.get(kind, {}).get("status") == status and body is not None:
                return body
            if kind == "Ready" and status == "True" and found.get("Stalled", {}).get("status") == "True":
                raise LabError(f"{name} stalled: {found['Stalled'].get('reason')}: {found['Stalled'].get('message')}")
            if time.monotonic() > end:
                raise LabError(
                    f"{name}: {kind} is not {status} after {timeout:g} s: {json.dumps((body or {}).get('status'), indent=1)}"
                )
            time.sleep(0.1)

    def delete(self, name: str, *, namespace: str = TENANT, wait: bool = True) -> None:
        """Delete a VMSnapshot; by default wait until it is gone."""
        self.lab.api.delete(api.path("vmsnapshots", name, namespace))
        if wait:
            until(f"{name} is gone", lambda: self.get(name, namespace) is None)

    def restore(self, name: str, snapshot: str, *, namespace: str = TENANT, **spec: Any) -> str:
        """Create a VMRestore and return its name; by default in place, of a VM that may be stopped."""
        if spec.setdefault("mode", "InPlace") == "InPlace":
            spec.setdefault("runningVM", "Stop")
        self._apply(
            {
                "apiVersion": "vmsnapshot.io/v1alpha1",
                "kind": "VMRestore",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {"snapshotName": snapshot, **spec},
            }
        )
        return name

    def get_restore(self, name: str, namespace: str = TENANT) -> dict[str, Any] | None:
        """The VMRestore as it is, or None."""
        return self.lab.api.get(api.path("vmrestores", name, namespace))

    def wait_restore(
        self, name: str, kind: str = "Ready", *, namespace: str = TENANT, timeout: float = 2 * GUARD_SECONDS
    ) -> dict[str, Any]:
        """Wait for a condition of a VMRestore to be true (for Ready: fail at once when it stalls) and return the object."""
        end = time.monotonic() + timeout
        while True:
            body = self.get_restore(name, namespace) or {}
            found = conditions(body)
            if found.get(kind, {}).get("status") == "True":
                return body
            if kind == "Ready" and found.get("Stalled", {}).get("status") == "True":
                raise LabError(f"{name} stalled: {found['Stalled'].get('reason')}: {found['Stalled'].get('message')}")
            if time.monotonic() > end:
                raise LabError(
                    f"{name}: {kind} is not true after {timeout:g} s: {json.dumps(body.get('status'), indent=1)}"
                )
            time.sleep(0.2)

    def delete_restore(self, name: str, *, namespace: str = TENANT, wait: bool = True) -> None:
        """Delete a VMRestore; by default wait until it is gone."""
        self.lab.api.delete(api.path("vmrestores", name, namespace))
        if wait:
            until(f"{name} is gone", lambda: self.get_restore(name, namespace) is None)

    def content(self, name: str, namespace: str = TENANT) -> dict[str, Any] | None:
        """The VMSnapshotContent of a VMSnapshot, or None."""
        body = self.get(name, namespace)
        if body is None:
            return None
        return self.lab.api.get(api.path("vmsnapshotcontents", f"vmsnapcontent-{body['metadata']['uid']}"))


def conditions(body: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditions of an object by type."""
    return {c["type"]: c for c in (body.get("status") or {}).get("conditions") or ()}


@contextmanager
def stack(lab: Lab, name: str = "stack", plugins: Path | None = None) -> Iterator[Stack]:
    """Run operator and guardian beside a laboratory for a while."""
    with Stack(lab, lab.state / name, plugins) as running:
        yield running
