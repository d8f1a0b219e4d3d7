"""etcd, kube-apiserver and kube-controller-manager on the loopback interface."""

from __future__ import annotations

import json
import shutil
import ssl
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.lab import binaries, pki
from tests.lab.control import Control
from tests.lab.wait import free_ports

COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager")
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
_CONTROLLERS = (
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "root-ca-certificate-publisher-controller",
    "persistentvolume-binder-controller",
    "persistentvolume-protection-controller",
    "persistentvolumeclaim-protection-controller",
    "deployment-controller",
    "replicaset-controller",
    "clusterrole-aggregation-controller",
)


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """The control plane at `folder`; its ports are chosen once and kept."""

    folder: Path
    suffix: str = ""
    """Of the names of its components: a second control plane of one laboratory has another one."""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of its programs."""
        return tuple(name + self.suffix for name in COMPONENTS)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.folder / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        """The API server's audit log: one JSON object a line."""
        return self.folder / "audit.log"

    @property
    def server(self) -> str:
        """URL of the API server."""
        return f"https://127.0.0.1:{self._ports()['api']}"

    @property
    def etcd(self) -> str:
        """URL of etcd."""
        return f"http://127.0.0.1:{self._ports()['etcd']}"

    def up(self, control: Control, tell: Callable[[str], None]) -> None:
        """Start what does not run, wait until it does its work, and tell of each. What etcd holds is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "kcm.kubeconfig").exists():
            pki.make(self.folder / "pki")
            for user in ("admin", "kcm"):
                self.write_kubeconfig(self.folder / f"{user}.kubeconfig", self._certificate_of(user))
        (self.folder / "audit-policy.json").write_text(json.dumps(_AUDIT))
        etcd, apiserver, manager = self.components
        control.start(etcd, [_bin("etcd"), *_flags(self._etcd())])
        control.start(apiserver, [_bin("kube-apiserver"), *_flags(self._apiserver())])
        for name in (etcd, apiserver):
            control.healthy(name, partial(self.check, name))
            tell(name)
        control.start(manager, [_bin("kube-controller-manager"), *_flags(self._controller_manager())])
        control.healthy(manager, partial(self.check, manager))
        tell(manager)

    def down(self, control: Control) -> None:
        """End its programs and delete what they wrote."""
        for name in reversed(self.components):
            control.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def check(self, name: str) -> bool:
        """Whether a component does its work: etcd and the API server say so; the controller manager has made a ServiceAccount."""
        try:
            match name.removesuffix(self.suffix):
                case "etcd":
                    return b"true" in self._get(f"{self.etcd}/health")
                case "kube-apiserver":
                    return self._get(f"{self.server}/readyz") == b"ok"
                case _:
                    path = "/api/v1/namespaces/default/serviceaccounts/default"
                    return bool(json.loads(self._get(self.server + path))["metadata"]["name"] == "default")
        except OSError:
            return False

    def write_kubeconfig(self, path: Path, user: dict[str, Any]) -> Path:
        """Write a kubeconfig for a user of our API server, readable by its owner only."""
        cluster = {"server": self.server, "certificate-authority-data": pki.b64(self.folder / "pki" / "ca.crt")}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "u", "user": user}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "u"}}],
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def _etcd(self) -> dict[str, str]:
        peer = f"http://127.0.0.1:{self._ports()['peer']}"
        return {
            "name": "lab",
            "data-dir": f"{self.folder}/etcd",
            "listen-client-urls": self.etcd,
            "advertise-client-urls": self.etcd,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"lab={peer}",
            "unsafe-no-fsync": "true",
            "log-level": "warn",
        }

    def _apiserver(self) -> dict[str, str]:
        keys = self.folder / "pki"
        return {
            "etcd-servers": self.etcd,
            "bind-address": "127.0.0.1",
            "secure-port": str(self._ports()["api"]),
            "tls-cert-file": f"{keys}/apiserver.crt",
            "tls-private-key-file": f"{keys}/apiserver.key",
            "client-ca-file": f"{keys}/ca.crt",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": f"{keys}/sa.pub",
            "service-account-signing-key-file": f"{keys}/sa.key",
            "authorization-mode": "RBAC",
            "endpoint-reconciler-type": "none",
            "service-cluster-ip-range": "10.96.0.0/16",
            "audit-policy-file": f"{self.folder}/audit-policy.json",
            "audit-log-path": str(self.audit_log),
        }

    def _controller_manager(self) -> dict[str, str]:
        keys = self.folder / "pki"
        return {
            "kubeconfig": f"{self.folder}/kcm.kubeconfig",
            "leader-elect": "false",
            "secure-port": "0",
            "service-account-private-key-file": f"{keys}/sa.key",
            "root-ca-file": f"{keys}/ca.crt",
            "use-service-account-credentials": "true",
            "controllers": ",".join(_CONTROLLERS),
        }

    def _certificate_of(self, user: str) -> dict[str, str]:
        keys = self.folder / "pki"
        return {
            "client-certificate-data": pki.b64(keys / f"{user}.crt"),
            "client-key-data": pki.b64(keys / f"{user}.key"),
        }

    def _ports(self) -> dict[str, int]:
        path = self.folder / "ports.json"
        if not path.exists():
            path.write_text(json.dumps(dict(zip(("api", "etcd", "peer"), free_ports(3), strict=True))))
        return dict(json.loads(path.read_text()))

    def _get(self, url: str) -> bytes:
        keys = self.folder / "pki"
        context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
        context.load_cert_chain(keys / "admin.crt", keys / "admin.key")
        direct = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with direct.open(url, timeout=3) as answer:
            return bytes(answer.read())


def _bin(name: str) -> str:
    return str(binaries.need(name))


def _flags(values: dict[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]
