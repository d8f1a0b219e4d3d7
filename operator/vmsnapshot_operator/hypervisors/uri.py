"""Compose libvirt URIs from typed fields. A URI can name commands and switch verification off, so none is taken from a user."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.errors import RefusedError


def compose(endpoint: Endpoint, *, user: str = "", credentials: Path | None = None) -> str:
    """Return the URI of an endpoint. `credentials`: folder with the files of the Hypervisor's Secret.

    Raises RefusedError for a combination that libvirt would understand as something else.
    """
    if endpoint.driver == "test":
        return "test:///default"
    if endpoint.driver != "qemu":
        raise RefusedError(f"libvirt driver {endpoint.driver!r} is not supported; use qemu", reason="EndpointInvalid")
    if endpoint.transport == "unix":
        path = endpoint.socket_path or "/run/libvirt/libvirt-sock"
        if not path.startswith("/"):
            raise RefusedError(f"socketPath {path!r} is not absolute", reason="EndpointInvalid")
        return f"qemu+unix:///system?socket={quote(path)}"
    if not endpoint.host or not all(c.isalnum() or c in ".-:" for c in endpoint.host):
        raise RefusedError(f"host {endpoint.host!r} is not a host name or address", reason="EndpointInvalid")
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    authority = f"{quote(user, safe='')}@{host}" if user else host
    if endpoint.port:
        authority += f":{endpoint.port}"
    match endpoint.transport:
        case "tcp":
            return f"qemu+tcp://{authority}/system"
        case "tls":
            pki = f"?pkipath={quote(str(credentials))}" if credentials is not None else ""
            return f"qemu+tls://{authority}/system{pki}"
        case "ssh":
            if credentials is None:
                raise RefusedError("transport ssh needs spec.libvirt.credentialsSecretName", reason="EndpointInvalid")
            # libssh2 inside libvirt: no ssh program, and the host's key is checked against the Secret's known hosts.
            files = f"keyfile={quote(str(credentials / 'ssh-privatekey'))}&known_hosts={quote(str(credentials / 'known_hosts'))}"
            return f"qemu+libssh2://{authority}/system?{files}&known_hosts_verify=normal&sshauth=privkey"
        case _:
            raise RefusedError(f"transport {endpoint.transport!r} is not supported", reason="EndpointInvalid")
