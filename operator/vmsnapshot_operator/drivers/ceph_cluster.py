"""A connection to a Ceph cluster: the bindings, the addresses, the errors. Not what is done with images (`ceph_rbd`)."""

from __future__ import annotations

import errno
import importlib
import importlib.machinery
import importlib.util
import json
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from vmsnapshot_operator.errors import DriverError, DriverUnavailableError

# Where distributions put the bindings: they are not on the Python package index, hence never inside of a virtual
# environment, and are extension modules without any Python around them.
_SYSTEM_DIRECTORIES = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
_MONITOR_PORTS = frozenset({"3300", "6789"})  # of the two messenger protocols of one monitor
_ADDRESS = re.compile(r"(?:v[12]:)?(\[[0-9A-Fa-f:.]+\]|[^\s,;:\[\]/]+)(?::(\d+))?(?:/\d+)?")
FENCED = frozenset({errno.ESHUTDOWN, errno.ENOTCONN})
"""Errors after which a connection is of no use any more: somebody put its address on the cluster's blocklist."""
_AWAY = FENCED | frozenset({errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTUNREACH})

Address = tuple[str, str]
"""A monitor's host and port; the port may be empty."""


def binding(name: str) -> ModuleType:
    """Import `rados` or `rbd`. Raises DriverUnavailableError that says what to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    for directory in _SYSTEM_DIRECTORIES:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(directory, name + suffix)
            if file.exists():
                return _load(name, file)
    text = (
        f'the Python module "{name}" is not installed: install python3-{name} of your distribution for Python '
        f"{sys.version_info.major}.{sys.version_info.minor} (it is not on the Python package index)"
    )
    raise DriverUnavailableError(text, retryable=False)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise DriverUnavailableError(f"{file} is not a Python module", retryable=False)
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # rbd imports rados by name
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(name, None)
        raise DriverUnavailableError(f"{file} does not load: {error}", retryable=False) from error
    return module


def connect(client: str, settings: Mapping[str, str], key: str) -> Any:
    """Return a connected `rados.Rados`. No file of this machine is read. Raises DriverUnavailableError."""
    rados = binding("rados")
    with told(f"connecting to the monitors {settings['mon_host']} as client.{client}"):
        cluster = rados.Rados(name=f"client.{client}", conf=dict(settings))
        cluster.conf_set("key", key)  # nowhere else: not an argument, not a file
        try:
            cluster.connect()
        except rados.Error as error:
            cluster.shutdown()
            number = getattr(error, "errno", None)
            why = "the key is refused" if number in {errno.EACCES, errno.EPERM} else str(error)
            raise DriverUnavailableError(
                f"connecting to the monitors {settings['mon_host']} as client.{client}: {why}"
            ) from error
    return cluster


@contextmanager
def told(doing: str) -> Iterator[None]:
    """Turn errors of the bindings into DriverError or, where the cluster does not answer, DriverUnavailableError."""
    kinds = (binding("rados").Error, binding("rbd").Error)
    try:
        yield
    except kinds as error:
        if number_of(error) in _AWAY:
            text = f"{doing}: the cluster does not answer: {error}"
            raise DriverUnavailableError(text) from error
        raise DriverError(f"{doing}: {error}") from error


def number_of(error: BaseException) -> int:
    """Return the errno of an error of the bindings, as a positive number; 0 if it has none."""
    return abs(int(getattr(error, "errno", 0) or 0))


def monitors_of(cluster: Any) -> list[Address]:
    """Return the monitors' addresses as the cluster knows them."""
    code, output, why = cluster.mon_command(json.dumps({"prefix": "mon dump", "format": "json"}), b"")
    if code != 0:
        raise DriverError(f"asking for the addresses of the monitors: {why}")
    monitors = json.loads(output).get("mons", [])
    return [a for m in monitors for v in m["public_addrs"]["addrvec"] for a in addresses(v["addr"])]


def addresses(text: str) -> list[Address]:
    """Return the addresses in a text like `10.0.0.1,[v2:10.0.0.2:3300,v1:10.0.0.2:6789],mon3:6789`."""
    bare = re.sub(r"\[(?=v[12]:)|(?<!:)\](?=,|$|\s)", " ", text) if "[v" in text else text
    return [(host.strip("[]"), port) for host, port in _ADDRESS.findall(bare)]


def same_monitor(one: Iterable[Address], other: Iterable[Address]) -> bool:
    """Tell whether two lists of addresses have a monitor in common; names are looked up only if the texts differ."""
    first, second = list(one), list(other)
    if _common(first, second):
        return True
    return _common(_resolved(first), _resolved(second))


def _common(one: Iterable[Address], other: list[Address]) -> bool:
    return any(
        a[0] == b[0] and (not a[1] or not b[1] or a[1] == b[1] or {a[1], b[1]} <= _MONITOR_PORTS)
        for a in one
        for b in other
    )


def _resolved(given: Iterable[Address]) -> list[Address]:
    found = []
    for host, port in given:
        try:
            answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:  # a name that nobody knows is no common monitor
            continue
        found += [(str(address[0]), port) for *_, address in answers]
    return found
