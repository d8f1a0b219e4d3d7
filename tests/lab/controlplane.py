"""etcd, kube-apiserver and kube-controller-manager on the loopback interface."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import json
import ssl
import urllib.request
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.lab import binaries
from tests.lab.errors import LabError
from tests.lab.supervisor import Control
from tests.lab.wait import free_ports, until

_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
_CONTROLLERS = (
    "namespace-controller,garbage-collector-controller,serviceaccount-controller,serviceaccount-token-controller,"
    "root-ca-certificate-publisher-controller,persistentvolume-binder-controller,persistentvolume-protection-controller,"
    "persistentvolumeclaim-protection-controller,deployment-controller,replicaset-controller,clusterrole-aggregation-controller"
)
Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def kubeconfig(state: Path) -> Path:
    """The administrator's kubeconfig."""
    return state / "control-plane" / "admin.kubeconfig"


def audit_log(state: Path) -> Path:
    """The API server's audit log."""
    return state / "control-plane" / "audit.log"


def up(state: Path, control: Control) -> None:
    """Start what does not run, and wait until the API server is ready. State of an earlier run is kept."""
    folder = state / "control-plane"
    folder.mkdir(parents=True, exist_ok=True)
    ports = _ports(folder)
    if not (folder / "pki" / "sa.pub").exists():
        _make_pki(folder, ports["api"])
    (folder / "audit-policy.json").write_text(json.dumps(_AUDIT))
    etcd, peer = f"http://127.0.0.1:{ports['etcd']}", f"http://127.0.0.1:{ports['peer']}"
    control.start(
        "etcd",
        [
            _bin("etcd"),
            "--data-dir",
            f"{folder}/etcd",
            "--name",
            "lab",
            "--listen-client-urls",
            etcd,
            "--advertise-client-urls",
            etcd,
            "--listen-peer-urls",
            peer,
            "--initial-advertise-peer-urls",
            peer,
            "--initial-cluster",
            f"lab={peer}",
            "--unsafe-no-fsync",
            "--log-level",
            "warn",
        ],
    )
    pki = folder / "pki"
    control.start(
        "kube-apiserver",
        [
            _bin("kube-apiserver"),
            "--etcd-servers",
            etcd,
            "--bind-address",
            "127.0.0.1",
            "--secure-port",
            str(ports["api"]),
            "--tls-cert-file",
            f"{pki}/apiserver.crt",
            "--tls-private-key-file",
            f"{pki}/apiserver.key",
            "--client-ca-file",
            f"{pki}/ca.crt",
            "--service-account-issuer",
            "https://kubernetes.default.svc",
            "--service-account-key-file",
            f"{pki}/sa.pub",
            "--service-account-signing-key-file",
            f"{pki}/sa.key",
            "--authorization-mode",
            "RBAC",
            "--endpoint-reconciler-type",
            "none",
            "--service-cluster-ip-range",
            "10.96.0.0/16",
            "--audit-policy-file",
            f"{folder}/audit-policy.json",
            "--audit-log-path",
            str(audit_log(state)),
        ],
    )
    until("kube-apiserver is ready", lambda: ready(state))
    control.start(
        "kube-controller-manager",
        [
            _bin("kube-controller-manager"),
            "--kubeconfig",
            f"{folder}/kcm.kubeconfig",
            "--leader-elect=false",
            "--secure-port=0",
            "--service-account-private-key-file",
            f"{pki}/sa.key",
            "--root-ca-file",
            f"{pki}/ca.crt",
            "--use-service-account-credentials=true",
            f"--controllers={_CONTROLLERS}",
        ],
    )


def ready(state: Path) -> bool:
    """Whether the API server says that it is."""
    folder = state / "control-plane"
    try:
        context = ssl.create_default_context(cafile=str(folder / "pki" / "ca.crt"))
        with urllib.request.urlopen(
            f"https://127.0.0.1:{_ports(folder)['api']}/readyz", context=context, timeout=2
        ) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def write_kubeconfig(state: Path, path: Path, user: dict[str, Any]) -> Path:
    """Write a kubeconfig for a user of our API server, readable by its owner only."""
    folder = state / "control-plane"
    server = {
        "server": f"https://127.0.0.1:{_ports(folder)['api']}",
        "certificate-authority-data": _b64(folder / "pki" / "ca.crt"),
    }
    path.touch(mode=0o600)
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "lab",
                "clusters": [{"name": "lab", "cluster": server}],
                "users": [{"name": "u", "user": user}],
                "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "u"}}],
            }
        )
    )
    return path


def _bin(name: str) -> str:
    found = binaries.find(name)
    if found is None:
        raise LabError(f"{name} is not built: run `make lab-up`")
    return str(found)


def _ports(folder: Path) -> dict[str, int]:
    path = folder / "ports.json"
    if not path.exists():
        api, etcd, peer = free_ports(3)
        path.write_text(json.dumps({"api": api, "etcd": etcd, "peer": peer}))
    return dict(json.loads(path.read_text()))


def _make_pki(folder: Path, _port: int) -> None:
    pki = folder / "pki"
    pki.mkdir(mode=0o700, exist_ok=True)
    ca = _certificate(pki, "ca", "lab-ca", None)
    _certificate(pki, "apiserver", "kube-apiserver", ca, server=True)
    for name, common, groups in (
        ("admin", "lab-admin", ("system:masters",)),
        ("kcm", "system:kube-controller-manager", ()),
    ):
        _certificate(pki, name, common, ca, groups=groups)
        user = {"client-certificate-data": _b64(pki / f"{name}.crt"), "client-key-data": _b64(pki / f"{name}.key")}
        write_kubeconfig(folder.parent, folder / f"{name}.kubeconfig", user)
    key = rsa.generate_private_key(65537, 2048)
    (pki / "sa.key").write_bytes(_pem(key))
    (pki / "sa.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def _certificate(
    pki: Path, name: str, common: str, ca: Pair | None, *, groups: tuple[str, ...] = (), server: bool = False
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    attributes += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, g) for g in groups]
    subject, now = x509.Name(attributes), dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca[0].subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
    )
    if ca is not None:
        use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    if server:
        names = [
            x509.DNSName("localhost"),
            x509.DNSName("kubernetes.default.svc"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    certificate = builder.sign(ca[1] if ca else key, hashes.SHA256())
    (pki / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (pki / f"{name}.key").write_bytes(_pem(key))
    return certificate, key


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _b64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
