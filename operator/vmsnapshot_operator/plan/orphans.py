"""What a storage system holds under our names, and who it belongs to: what is an orphan, and what may be removed. Pure.

A name alone proves nothing: somebody else may have made it, or the object that knew of it may come back from a backup. Only
a VMSnapshotContent or a journal proves that something is ours to remove. Not what becomes of a content without its
VMSnapshot (`plan.unbound`), nor how anything is listed or removed (`handlers.orphans`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.effects import RecordedGroup
from vmsnapshot_operator.core.volumes import Handle


class Place(NamedTuple):
    """A VM: the name of its Hypervisor, and its UUID."""

    hypervisor: str
    domain: str


class Proof(NamedTuple):
    """What a left journal of ours proves: the VM was in this attempt of its VMSnapshot."""

    attempt: int
    vm: Place


NOWHERE = Place("", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One VMSnapshotContent, as far as it proves what storage holds.

    `uid` is that of its VMSnapshot, of the VM `vm`; `names` are all request names on record, of whatever class: two classes may show the
    same storage. `ready`: the groups that can be restored from storage. `problem`: why nothing of it is believed; the rest then says
    nothing.
    """

    name: str
    uid: str
    vm: Place = NOWHERE
    attempt: int = 1
    names: frozenset[str] = frozenset()
    ready: tuple[RecordedGroup, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What one class's storage named, and all who may know of it.

    `contents` and `snapshots` (UIDs) are those that existed right before or right after the storage was asked. `busy`: UIDs
    of VMSnapshots whose attempt is under way in this process, and of VMRestores that are under way. `journals`: by UID, what the
    journal of the latest attempt proves that was left in a VM.
    """

    installation: str
    listed: tuple[str, ...]
    contents: tuple[Kept, ...] = ()
    snapshots: frozenset[str] = frozenset()
    busy: frozenset[str] = frozenset()
    journals: Mapping[str, Proof] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """One name that nobody knows. `removable`: it is proved to be ours, and left over; `why` says what is known of it.

    `uid`, `vm`: of which VMSnapshot one that is removable is, and whose disks it was cut from.
    `needed`: a VM that is defined has it among its disks, or nobody can say that none has: a person must not delete it either.
    """

    name: str
    why: str
    removable: bool = False
    uid: str = ""
    vm: Place = NOWHERE
    needed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """`held`: how many names of this installation were listed; `orphans`: those that nobody knows, by name."""

    held: int = 0
    orphans: tuple[Orphan, ...] = ()

    @property
    def removable(self) -> tuple[Orphan, ...]:
        """Those that are ours to remove."""
        return tuple(o for o in self.orphans if o.removable)

    @property
    def reported(self) -> tuple[Orphan, ...]:
        """Those that are left, and told."""
        return tuple(o for o in self.orphans if not o.removable)

    @property
    def listed(self) -> tuple[Orphan, ...]:
        """Those of the reported that no VM needs: what is listed as an orphan, people delete by hand."""
        return tuple(o for o in self.reported if not o.needed)


def unexplained(seen: Listing) -> bool:
    """Tell whether anything was listed that nobody knows: what is known may then be out of date."""
    return any(_judge(n, seen) is not None for n in _ours(seen))


def judge(seen: Listing) -> Findings:
    """Return what was found. Names of other installations are nobody's business here, whoever listed them."""
    ours = _ours(seen)
    found = (_judge(name, seen) for name in ours)
    return Findings(held=len(ours), orphans=tuple(o for o in found if o is not None))


def spare(found: Findings, users: Mapping[str, str], unseen: str) -> Findings:
    """Return the findings, held against the disks of all VMs that are defined.

    `users`: by name, a VM one of whose disks is of that name; `unseen`: why that is not known of all VMs, or empty. What is proved
    to be a leftover is no clone, and is removed unless a VM is seen to use it.
    """

    def one(orphan: Orphan) -> Orphan:
        if user := users.get(orphan.name):
            why = f"{orphan.why}; VM {user} has it among its disks: it is that VM's, so never delete it"
            return replace(orphan, why=why, removable=False, needed=True)
        if unseen and not orphan.removable:
            why = f"{orphan.why}; whether a VM has it among its disks is not known: {unseen}"
            return replace(orphan, why=why, needed=True)
        return orphan

    return replace(found, orphans=tuple(one(o) for o in found.orphans))


def lost(groups: Iterable[tuple[str, RecordedGroup]], missing: Collection[Handle]) -> dict[str, str]:
    """Return, by the UID of its VMSnapshot, the disks (by target) of whose cuts something is missing on a storage."""
    found = {}
    for uid, group in groups:
        handles = group.result.handles if group.result is not None else {}
        gone = [v.label for v in group.request.volumes if handles.get(v.id) in missing]
        if gone:
            found[uid] = ", ".join(gone)
    return found


def _ours(seen: Listing) -> list[str]:
    prefix = names.installation_prefix(seen.installation)
    return sorted({n for n in seen.listed if n.startswith(prefix)})


def _judge(name: str, seen: Listing) -> Orphan | None:
    attempt = names.attempt_of(name)
    if attempt is None or not names.is_ours(name, seen.installation):
        return Orphan(
            name=name, why="it begins as our names do and is none that this operator gives: somebody else made it"
        )

    def is_of(uid: str) -> bool:
        return name.startswith(names.object_prefix(seen.installation, uid))

    if any(is_of(uid) for uid in seen.busy):
        return None  # its own workflow is at it
    kept = next((k for k in seen.contents if is_of(k.uid)), None)
    if kept is not None:
        return _by_content(name, attempt, kept)
    if any(is_of(uid) for uid in seen.snapshots):
        why = "its VMSnapshot exists and the VMSnapshotContent is gone: deleting that VMSnapshot removes this too"
        return Orphan(name=name, why=why)
    uid = next((u for u in seen.journals if is_of(u)), "")
    if uid and attempt <= (proof := seen.journals[uid]).attempt:
        why = f"no VMSnapshot or VMSnapshotContent knows it, and a VM bore our journal of its attempt {proof.attempt}"
        return Orphan(name=name, why=why, removable=True, uid=uid, vm=proof.vm)
    return Orphan(name=name, why="no VMSnapshot or VMSnapshotContent knows it")


def _by_content(name: str, attempt: int, kept: Kept) -> Orphan | None:
    content = f'VMSnapshotContent "{kept.name}"'
    if kept.problem:
        return Orphan(name=name, why=f"{content} would know it and cannot be trusted")
    if name in kept.names:
        return None
    if attempt < kept.attempt:
        why = f"it is of attempt {attempt}, and {content} is of attempt {kept.attempt}"
        return Orphan(name=name, why=why, removable=True, uid=kept.uid, vm=kept.vm)
    return Orphan(name=name, why=f"it is of attempt {attempt}, which {content} does not record")
