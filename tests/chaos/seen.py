"""What the judge sees of the world, as plain facts: no connection, nothing to ask. Not how it is seen (`hosts`, `storage`,
`objects`) nor what is wrong with it (`rules`, `claims`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["frozen", "leaked", "lied", "stuck", "unbootable"]


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing that must not be. `subject` is where it was seen, `what` says it in plain words."""

    kind: Kind
    subject: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """What may be so at this moment because somebody meant it. Everything else is a finding.

    `paused`, `off`: names of guests that may be. `under_way`: VMSnapshots and VMRestores as `namespace/name` that need not have ended yet, with
    whatever their VM and the storage bear of them meanwhile. `foreign`: beginnings of names on storage that are somebody else's.
    `operator_down`: nobody needs to hold the lease.
    """

    paused: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    under_way: frozenset[str] = frozenset()
    foreign: tuple[str, ...] = ()
    operator_down: bool = False


# --- hypervisors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk in one definition of a domain; `place` is that definition. A source is a path, or pool and image."""

    place: str
    target: str
    source: str
    chained: bool = False
    mirrored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """What libvirt and QEMU say of a domain. `opened`: names of the files, images and snapshots that QEMU has open.

    `remembering`: names of the checkpoints that libvirt lists, and of the bitmaps in its disks.
    """

    name: str
    state: str
    disks: tuple[Disk, ...] = ()
    journals: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    remembering: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSeen:
    """A guest beside what it was made as. `sources` by target is what its disks shall be.

    `agent`: `thawed`, `frozen`, or empty with the reason in `trouble`. `silent`: targets that nothing was written to although the
    guest's writer runs. `stub`: has neither system nor agent, and is paused by nature.
    """

    name: str
    sources: Mapping[str, str]
    stub: bool = False
    agent: str = ""
    trouble: str = ""
    silent: tuple[str, ...] = ()


# --- storage -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Snap:
    """A snapshot of an image: a user's with its name, or an image's part of the snapshot `name` of the group `group`."""

    name: str
    group: str = ""


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock of an image. `user` is the cephx user of a client that is connected; empty: the client is gone."""

    client: str
    user: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """An RBD image."""

    id: str
    snaps: tuple[Snap, ...] = ()
    locks: tuple[Lock, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An RBD group: images that are members of it, and whether each of its snapshots is complete."""

    members: tuple[str, ...] = ()
    snaps: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """The listings. `files`: full paths in the pools. Images and groups are named `pool/[namespace/]name`."""

    files: frozenset[str] = frozenset()
    images: Mapping[str, Image] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    trash: tuple[str, ...] = ()


# --- objects and processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A driver's process, its parent now, and the operator that started it by its own words."""

    pid: int
    parent: int
    operator: int


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All of it, at one moment. `objects`: all of the API group; `holders` by lease; `instances`: of the operator, that live."""

    domains: tuple[Domain, ...] = ()
    guests: tuple[GuestSeen, ...] = ()
    storage: Storage = Storage()
    objects: tuple[Mapping[str, Any], ...] = ()
    holders: Mapping[str, str] = field(default_factory=dict)
    instances: frozenset[str] = frozenset()
    drivers: tuple[Process, ...] = ()
    now: float = 0.0

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """The objects of one kind."""
        return [o for o in self.objects if o["kind"] == kind]
