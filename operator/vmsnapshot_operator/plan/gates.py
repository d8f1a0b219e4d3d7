"""Whose a gate is that a VM bears, and whether anybody opens it again. Pure.

A restore in place that is under way closes one and opens it again (`next_restore`). If its VMRestore is gone, nobody would: the
VM cannot be started, and its disks may be neither old nor new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.core.markers import Gate
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.plan import definition


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A VM whose gate nobody opens, and why. `restore` is the `namespace/name` of the VMRestore that closed it, if that can be read."""

    domain: str
    endpoint: str
    why: str
    restore: str = ""


def read(xml: str) -> Gate | str:
    """Return the gate in a VM's definition, or why it cannot be read."""
    try:
        gate = definition.gate_of(xml)
    except RefusedError as error:
        return error.message
    return gate if gate is not None else "there is none any more"


def owner(gate: Gate) -> tuple[str, str]:
    """Return namespace and name of the VMRestore that closed a gate."""
    namespace, _, name = gate.marker.restore.partition("/")
    return namespace, name


def about(gate: Gate) -> str:
    """Say who took which disks."""
    marker = gate.marker
    return f"VMRestore {marker.restore} (UID {marker.restore_uid}) has taken its disks {', '.join(gate.targets)}"


def abandoned(gate: Gate, restore: Mapping[str, Any] | None) -> str:
    """Why nobody opens a gate of this installation, or nothing. `restore`: the VMRestore of its namespace and name, as it is now."""
    if restore is None or restore["metadata"].get("uid") != gate.marker.restore_uid:
        what = "is gone"
    elif FINALIZER not in (restore["metadata"].get("finalizers") or ()):
        what = "has let go of it"
    else:
        return ""
    return f"{about(gate)} and {what}: the VM cannot be started, its disks may be neither old nor new, and nobody opens its gate"
