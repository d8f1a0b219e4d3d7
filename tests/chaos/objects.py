"""The judge's eye on the API server and on the processes of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.seen import Process
from tests.lab import Lab, api
from tests.stack import NAMESPACE, ROOT, Stack

_KINDS = ("vmsnapshots", "vmsnapshotcontents", "vmrestores", "hypervisors", "storagedriverclasses")
_WORKER = "vmsnapshot_operator.drivers.worker"


def objects(lab: Lab) -> tuple[tuple[Mapping[str, Any], ...], dict[str, str]]:
    """All objects of the group, and the holder of each lease in the operator's namespace."""
    leases = lab.api.items(f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases")
    holders = {o["metadata"]["name"]: str((o.get("spec") or {}).get("holderIdentity") or "") for o in leases}
    return tuple(o for kind in _KINDS for o in lab.api.items(api.path(kind))), holders


def instances(stack: Stack) -> frozenset[str]:
    """The operators of this stack that live; each is known by the name it was started under."""
    return frozenset(n for n, p in stack.programs.items() if n != "guardian" and p.process.poll() is None)


def drivers() -> Iterator[Process]:
    """The drivers' processes of this checkout: they inherit the folder. Their words name the operator that started them."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if _WORKER in words and (entry / "cwd").readlink() == ROOT:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                yield Process(int(entry.name), parent, int(words[words.index(_WORKER) + 3]))
