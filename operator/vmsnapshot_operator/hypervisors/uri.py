"""Compose libvirt URIs from typed fields. A URI can name commands and switch verification off, so none is taken from a user."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, urlencode

from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.hypervisors.credentials import AUTH_FILE, KNOWN_HOSTS, SSH_KEY, TLS_FILES, has

DEFAULT_SOCKET = "/run/libvirt/libvirt-sock"
_PORTS = range(1, 65536)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*")


def compose(endpoint: Endpoint, *, user: str = "", credentials: Path | None = None) -> str:
    """Return the URI of an endpoint. `credentials`: folder with the files of the Hypervisor's Secret.

    The URI holds no secret: it names the files that do. Raises RefusedError for what libvirt would understand as something
    else, and for credentials that are missing.
    """
    if endpoint.driver == "test":
        return "test:///default"
    if endpoint.driver != "qemu":
        raise _invalid(f"libvirt driver {endpoint.driver!r} is not supported; use qemu")
    if endpoint.transport == "unix":
        path = endpoint.socket_path or DEFAULT_SOCKET
        if not path.startswith("/"):
            raise _invalid(f"socketPath {path!r} is not absolute")
        return f"qemu+unix:///system?{_query(socket=path)}"
    if not _HOST.fullmatch(endpoint.host):
        raise _invalid(f"host {endpoint.host!r} is not a host name or address")
    if endpoint.port is not None and endpoint.port not in _PORTS:
        raise _invalid(f"port {endpoint.port} is not a port")
    host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
    where = f"{host}:{endpoint.port}" if endpoint.port is not None else host
    match endpoint.transport:
        case "tcp":
            return _with(f"qemu+tcp://{where}/system", _auth(credentials))
        case "tls":
            pki = {"pkipath": str(credentials)} if has(credentials, *TLS_FILES) else {}
            return _with(f"qemu+tls://{where}/system", pki | _auth(credentials))
        case "ssh":
            if credentials is None or not has(credentials, SSH_KEY, KNOWN_HOSTS):
                raise _invalid(
                    "transport ssh needs spec.libvirt.credentialsSecretName: a Secret with ssh-privatekey and known_hosts"
                )
            # libssh2 inside libvirt: no ssh program, and the host's key is checked against the Secret's known hosts.
            files = {"keyfile": str(credentials / SSH_KEY), "known_hosts": str(credentials / KNOWN_HOSTS)}
            login = f"{quote(user, safe='')}@" if user else ""
            checks = {"known_hosts_verify": "normal", "sshauth": "privkey", "no_tty": "1"}
            return _with(f"qemu+libssh2://{login}{where}/system", files | checks)
        case _:
            raise _invalid(f"transport {endpoint.transport!r} is not supported")


def _invalid(message: str) -> RefusedError:
    return RefusedError(message, reason="EndpointInvalid")


def _auth(credentials: Path | None) -> dict[str, str]:
    return {"authfile": str(credentials / AUTH_FILE)} if credentials is not None and has(credentials, AUTH_FILE) else {}


def _with(uri: str, parameters: dict[str, str]) -> str:
    return f"{uri}?{_query(**parameters)}" if parameters else uri


def _query(**parameters: str) -> str:
    return urlencode(parameters, quote_via=quote, safe="/")
