"""A Hypervisor's Secret as the files from which libvirt reads it: the operator's libvirt, and the guardian's, who is given the URI.

So the folder must be one that both see, and the same one after a restart. No secret is ever in a URI or an argument.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from vmsnapshot_operator.errors import RefusedError

CA, CERTIFICATE, KEY = "cacert.pem", "clientcert.pem", "clientkey.pem"
TLS_FILES = (CA, CERTIFICATE, KEY)
SSH_KEY, KNOWN_HOSTS, AUTH_FILE = "ssh-privatekey", "known_hosts", "auth.conf"

_FILES = {
    "ca.crt": CA,
    "tls.crt": CERTIFICATE,
    "tls.key": KEY,
    CA: CA,
    CERTIFICATE: CERTIFICATE,
    KEY: KEY,
    SSH_KEY: SSH_KEY,
    KNOWN_HOSTS: KNOWN_HOSTS,
}
"""Keys of the Secret (those of kubernetes.io/tls and kubernetes.io/ssh-auth, or libvirt's own names) and the file of each."""


KEEP_SECONDS = 3600.0
"""Longer than any VM is held: the guardian of one was given the URI with the files of then."""


def has(folder: Path | None, *names: str) -> bool:
    """Whether all these files are there."""
    return folder is not None and all((folder / n).exists() for n in names)


def write(base: Path, hypervisor: str, secret: Mapping[str, str]) -> Path | None:
    """Write the files of a Secret under `base`, readable by this user alone, and return their folder; None for an empty one.

    Folders of earlier versions of this Hypervisor's Secret are removed when no guardian can still free a VM by them. Raises
    RefusedError if it cannot be written.
    """
    contents = {_FILES[k]: v for k, v in secret.items() if k in _FILES and v}
    if secret.get("password"):
        contents[AUTH_FILE] = _auth_file(secret.get("username", ""), secret["password"])
    if not contents:
        return None
    stem = f"libvirt-{hashlib.sha256(hypervisor.encode()).hexdigest()[:12]}-"
    digest = hashlib.sha256("\0".join(f"{k}\0{contents[k]}" for k in sorted(contents)).encode()).hexdigest()[:16]
    folder = base / f"{stem}{digest}"
    try:
        for earlier in base.glob(f"{stem}*"):
            if earlier != folder and time.time() - earlier.stat().st_mtime > KEEP_SECONDS:
                shutil.rmtree(earlier)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in contents.items():
            _write(folder / name, content)
    except OSError as error:
        raise RefusedError(
            f"the credentials of hypervisor {hypervisor} cannot be written to {folder}: {error.strerror}",
            reason="EndpointInvalid",
        ) from error
    return folder


def _write(path: Path, content: str) -> None:
    """Replace a file at once: another process may be reading it."""
    unfinished = path.with_suffix(f"{path.suffix}.new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    unfinished.rename(path)


def _auth_file(username: str, password: str) -> str:
    """Return the text of libvirt's client authentication file (libvirt, "Client authentication"); its values end at the end of the line."""
    if any(c in value for value in (username, password) for c in "\r\n"):
        raise RefusedError("username and password must not contain line breaks", reason="EndpointInvalid")
    return f"[credentials-default]\nauthname={username}\nusername={username}\npassword={password}\n[auth-libvirt-default]\ncredentials=default\n"
