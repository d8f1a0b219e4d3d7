"""What becomes of a VMSnapshotContent, above all of one whose VMSnapshot is gone; and what its status says. Pure.

While its VMSnapshot is there, the VMSnapshot's own workflow does everything, and only the status is told here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.effects import Condition, Record
from vmsnapshot_operator.core.volumes import Seconds

GRACE = Seconds(30.0)
"""So long a VMSnapshot must be gone before what it held is touched: objects that are restored together come in any order."""

_SOON, _LATER, _NEVER = Seconds(2.0), Seconds(60.0), Seconds(0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One content and all that matters to it.

    `owner`: its VMSnapshot as `namespace/name (uid ...)`; `owner_exists`: with this very UID. `namesake`: the UID of another
    VMSnapshot of that name. `whole`: it was created with its results in it, which the operator never does. `busy`: its attempt
    is under way in this process. `missing_for`: how long the VMSnapshot has been known to be gone. `held`: names of its
    VMSnapshot that the storage systems listed, by class, None if nobody was asked; `unlisted`: who could not be asked, and why.
    `trouble`: why the last removal failed.
    """

    record: Record
    uid: str
    owner: str
    owner_exists: bool
    namesake: str = ""
    whole: bool = False
    busy: bool = False
    leader: bool = True
    missing_for: Seconds = _NEVER
    installation: str
    held: Mapping[str, frozenset[str]] | None = None
    unlisted: Mapping[str, str] = field(default_factory=dict)
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Nothing:
    """Nothing to do but to tell; until an event, or for so many seconds."""

    seconds: Seconds | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the storage systems what they hold of it."""


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete these names, by class."""

    names: Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Drop:
    """Delete the content: the storage systems have confirmed that they hold nothing that it records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What its status says. `ready`: whether it can be restored, None if that is not known."""

    ready: bool | None
    conditions: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next, and what is told before; None: nothing is told, since its workflow is at it or it is not ours."""

    effect: Nothing | Ask | Remove | Drop
    told: Told | None = None


def decide(seen: Seen) -> Decision:
    """Return what to do. Only an intact content of ours whose policy says Delete is ever acted upon."""
    record = seen.record
    if record.foreign or not seen.leader:
        return Decision(Nothing())
    if record.problem:
        return Decision(Nothing(), _tell(False, "ContentNotBound", record.problem, stalled=True))
    if seen.owner_exists:
        return Decision(Nothing(), _bound(record))
    if seen.busy or seen.missing_for < GRACE:
        return Decision(Nothing(_SOON))
    gone = f"VMSnapshot {seen.owner} is gone{_instead(seen)}"
    if record.taken and record.retain:
        return Decision(Nothing(), _tell(record.ready, "Retained", f"{gone}; kept, since its deletionPolicy is Retain"))
    if seen.whole:
        said = f"{gone}, and this was created with its results in it, as a restore from a backup does: not touched"
        return Decision(Nothing(), _tell(None, "RestoredFromBackup", said, stalled=True))
    return _clean_up(seen, gone)


def _instead(seen: Seen) -> str:
    return f" (another one of this name, uid {seen.namesake}, is there)" if seen.namesake else ""


def _bound(record: Record) -> Told | None:
    if record.failure is not None:
        return _tell(False, record.failure.reason, record.failure.message, stalled=True)
    return _tell(True, "Ready", "it can be restored") if record.ready else None


def _clean_up(seen: Seen, gone: str) -> Decision:
    if seen.held is None:
        return Decision(Ask())
    ours = {c: _recorded(n, seen) for c, n in seen.held.items()}
    left = {c: n for c, n in sorted(ours.items()) if n}
    if left and not seen.trouble:
        return Decision(Remove(left))
    silent = [f'class "{c}": {m}' for c, m in sorted(seen.unlisted.items())]
    if left or silent:
        said = f"{gone}; what it held is being removed, trying again: {seen.trouble or '; '.join(silent)}"
        return Decision(Nothing(_LATER), _tell(False, "StorageUnavailable", said, working=True))
    return Decision(Drop())


def _recorded(held: frozenset[str], seen: Seen) -> frozenset[str]:
    """Those of attempts that the content knows of; a later one's is reported by the scan for orphans, never removed."""
    prefix = names.object_prefix(seen.installation, seen.uid)
    return frozenset(
        n
        for n in held
        if n.startswith(prefix) and (attempt := names.attempt_of(n)) is not None and attempt <= seen.record.attempt
    )


def _tell(ready: bool | None, reason: str, message: str, *, stalled: bool = False, working: bool = False) -> Told:
    return Told(
        ready=ready,
        conditions=(
            Condition(type="Ready", status=ready, reason=reason, message=message),
            Condition(type="Reconciling", status=working, reason=reason, message=message if working else ""),
            Condition(type="Stalled", status=stalled, reason=reason if stalled else "NotStalled"),
        ),
    )
