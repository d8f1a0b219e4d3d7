"""What a restore writes into a domain's metadata: the gate while disks are neither old nor new, and what became of it afterwards.

Their form alone. Not where they stand in a domain's definition (`plan.definition`), nor who writes it (`hypervisors`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GATE_NAMESPACE = "https://vmsnapshot.io/gate/1"
RESTORED_NAMESPACE = "https://vmsnapshot.io/restored/1"
WENT_BACK_NAMESPACE = "https://vmsnapshot.io/went-back/1"
PREFIX = "vmsnapshot"

_REFERENCE = re.compile(r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
_UID = re.compile(r"^[A-Za-z0-9][-A-Za-z0-9]{0,62}$")
_INSTALLATION = re.compile(r"^[a-z0-9]{1,16}$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """Which VMRestore it was, of which snapshot. `restore` is `namespace/name`; raises ValueError for what cannot be one."""

    installation: str
    restore: str
    restore_uid: str
    snapshot_uid: str

    def __post_init__(self) -> None:
        """Hold each part against its form: they become a path, and part of a definition."""
        for found, form, what in (
            (self.installation, _INSTALLATION, "an installation"),
            (self.restore, _REFERENCE, "namespace/name of a VMRestore"),
            (self.restore_uid, _UID, "the UID of a VMRestore"),
            (self.snapshot_uid, _UID, "the UID of a VMSnapshot"),
        ):
            if not form.match(found):
                msg = f"not {what}: {found[:300]!r}"
                raise ValueError(msg)

    def same_order(self, other: Marker) -> bool:
        """Whether both are of one VMRestore, by its name, and one snapshot: it may have been deleted and created anew between them."""
        mine = (self.installation, self.restore, self.snapshot_uid)
        return mine == (other.installation, other.restore, other.snapshot_uid)

    def attributes(self) -> dict[str, str]:
        """Return it as attributes of an element."""
        return {
            "installation": self.installation,
            "restore": self.restore,
            "uid": self.restore_uid,
            "snapshot": self.snapshot_uid,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Who has taken the disks `targets` from a domain until they are whole again, and whether it was started with its host."""

    marker: Marker
    targets: tuple[str, ...]
    autostart: bool


def marker_of(attributes: dict[str, str]) -> Marker:
    """Read the attributes of an element written by us; raises ValueError for those of anybody else."""
    return Marker(
        installation=attributes.get("installation", ""),
        restore=attributes.get("restore", ""),
        restore_uid=attributes.get("uid", ""),
        snapshot_uid=attributes.get("snapshot", ""),
    )
