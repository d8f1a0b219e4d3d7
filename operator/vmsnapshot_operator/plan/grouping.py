"""From volumes to classes to groups: which storage driver class serves which volume, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vmsnapshot_operator.core.driver import Fit
from vmsnapshot_operator.core.planning import Candidates, Match, Patience, PlannedGroup, Refusal, StorageClass
from vmsnapshot_operator.core.volumes import Layer, Volume


def matches(rules: Iterable[Match], layer: Layer) -> bool:
    """Tell whether any rule agrees with the writable layer in all of its parts."""
    return any(
        (not r.type or r.type == layer.kind)
        and (not r.protocol or r.protocol == layer.protocol)
        and (not r.pool or r.pool == layer.pool)
        and (not r.format or r.format == layer.format)
        and (not r.source_pattern or fnmatchcase(layer.source, r.source_pattern))
        for r in rules
    )


def candidates(classes: Sequence[StorageClass], volume: Volume) -> tuple[StorageClass, ...]:
    """Return the classes whose rules match a volume, the highest priority first."""
    found = [c for c in classes if matches(c.match, volume.writable)]
    return tuple(sorted(found, key=lambda c: (-c.priority, c.name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The class for one volume, with what was considered."""

    class_name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refused:
    """What is in the way of one volume."""

    reason: str
    text: str
    patience: Patience = Patience.SETTLE


def _considered(cls: StorageClass, fit: Fit | None) -> str:
    if cls.ready is None:
        return f'class "{cls.name}" (priority {cls.priority}): its driver has not answered yet'
    if not cls.ready:
        return f'class "{cls.name}" (priority {cls.priority}): not Ready: {cls.problem or "no reason given"}'
    if fit is None:
        return f'class "{cls.name}" (priority {cls.priority}): its driver was not asked'
    if not fit.ok:
        return f'class "{cls.name}" (priority {cls.priority}): {fit.reason}: {fit.message or "the driver declines"}'
    return f'class "{cls.name}" (priority {cls.priority}): fits'


def _choose(found: Sequence[StorageClass], fits: Mapping[str, Fit]) -> Choice | _Refused:
    text = "; ".join(_considered(c, fits.get(c.name)) for c in found)
    if not found:
        return _Refused(reason="NoClassForDisk", text="no StorageDriverClass matches it (spec.match)")
    able = [c for c in found if c.ready and fits.get(c.name, Fit(ok=False, reason="")).ok]
    waiting = [c for c in found if c.ready is None]
    # A class that has not answered yet might win by its priority: choosing another now would make the outcome
    # depend on which process started first.
    if waiting and (not able or waiting[0].priority >= able[0].priority):
        return _Refused(reason="ClassNotReady", text=text, patience=Patience.WAIT)
    if not able:
        unready = all(not c.ready for c in found)
        return _Refused(reason="ClassNotReady" if unready else "NoClassForDisk", text=text)
    best = able[0]
    ties = [c.name for c in able if c.priority == best.priority]
    if len(ties) > 1:
        return _Refused(
            reason="ClassTie",
            text=f"classes {', '.join(ties)} have the same priority {best.priority}; give one of them a higher one",
        )
    others = [c for c in found if c is not best]
    why = f"priority {best.priority}, the driver says it fits" if others else "the only class that matches"
    return Choice(
        class_name=best.name,
        reason=why + "".join(f"; {_considered(c, fits.get(c.name))}" for c in others),
    )


def unserved(volume: Volume, classes: Sequence[StorageClass], fits: Mapping[str, Fit]) -> str:
    """Return why no class serves a volume; nothing if one does, or if that cannot be told yet or needs a person."""
    chosen = _choose(candidates(classes, volume), fits)
    return chosen.text if isinstance(chosen, _Refused) and chosen.reason == "NoClassForDisk" else ""


_WORST = ("ClassTie", "NoClassForDisk", "ClassNotReady")


def assign(
    volumes: Sequence[tuple[str, Volume]], classes: Sequence[StorageClass], fits: Candidates
) -> Mapping[str, Choice] | Refusal:
    """Choose a class for each target, or refuse with a message that lists every disk and all that was considered."""
    chosen = {t: _choose(candidates(classes, v), fits.get(v.id, {})) for t, v in volumes}
    refused = {t: c for t, c in chosen.items() if isinstance(c, _Refused)}
    if not refused:
        return {t: c for t, c in chosen.items() if isinstance(c, Choice)}
    lines = []
    for target, volume in volumes:
        choice = chosen[target]
        where = f"disk {target} ({volume.writable.source})"
        lines.append(
            f"{where}: {choice.text}" if isinstance(choice, _Refused) else f'{where}: class "{choice.class_name}"'
        )
    reason = next(r for r in _WORST if any(x.reason == r for x in refused.values()))
    patient = all(x.patience is Patience.WAIT for x in refused.values())
    return Refusal(reason=reason, message=". ".join(lines), patience=Patience.WAIT if patient else Patience.SETTLE)


def group(
    volumes: Sequence[tuple[str, Volume]], chosen: Mapping[str, Choice], classes: Sequence[StorageClass]
) -> tuple[PlannedGroup, ...]:
    """Group the volumes by their class, in the order of the class names; each driver is called once with its list."""
    by_name = {c.name: c for c in classes}
    groups = []
    for name in sorted({c.class_name for c in chosen.values()}):
        cls = by_name[name]
        assert cls.capabilities is not None, "a class is Ready only with capabilities"  # noqa: S101 - invariant of gathering
        groups.append(
            PlannedGroup(
                class_name=name,
                driver=cls.driver,
                parameters=dict(cls.parameters),
                secret_name=cls.secret_name,
                capabilities=cls.capabilities,
                volumes=tuple(v for t, v in volumes if chosen[t].class_name == name),
            )
        )
    return tuple(groups)
