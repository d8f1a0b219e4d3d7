"""Certificates of the laboratory's control plane."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]
_NAMES = [
    x509.DNSName("localhost"),
    x509.DNSName("kubernetes.default.svc"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
]


def make(folder: Path) -> None:
    """Write `NAME.crt` and `NAME.key` of ca, apiserver, admin and kcm, and the key pair of ServiceAccount tokens `sa.key`, `sa.pub`."""
    folder.mkdir(mode=0o700, exist_ok=True)
    ca = _certificate(folder, "ca", "lab-ca", None)
    _certificate(folder, "apiserver", "kube-apiserver", ca, server=True)
    _certificate(folder, "admin", "lab-admin", ca, groups=("system:masters",))
    _certificate(folder, "kcm", "system:kube-controller-manager", ca)
    key = rsa.generate_private_key(65537, 2048)
    (folder / "sa.key").write_bytes(_pem(key))
    public = key.public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "sa.pub").write_bytes(public.public_bytes(serialization.Encoding.PEM, form))


def b64(path: Path) -> str:
    """A file as kubeconfigs hold it."""
    return base64.b64encode(path.read_bytes()).decode()


def _certificate(
    folder: Path, name: str, common: str, ca: Pair | None, *, groups: tuple[str, ...] = (), server: bool = False
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
        builder = builder.add_extension(x509.SubjectAlternativeName(_NAMES), critical=False)
    certificate = builder.sign(ca[1] if ca else key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(_pem(key))
    return certificate, key


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
