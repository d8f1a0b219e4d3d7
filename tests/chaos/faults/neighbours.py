"""Others are at work on the same hosts and storage: another installation, and VMs whose agents hang."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.chaos import judge
from tests.chaos.faults.base import Fault, NoEffectError, Scene
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until

END_SECONDS = 240.0
ALONE_SECONDS, RESTORE_SECONDS = 60.0, 150.0
"""So long a snapshot, or a restore, may take while six agents hang: several times of what it takes alone."""


def is_over(stack: Stack, name: str) -> bool:
    """Whether a VMSnapshot is gone, or has come to its end and is at rest."""
    return _at_rest(stack.get(name))


def is_restored(stack: Stack, name: str) -> bool:
    """Whether a VMRestore is gone, or has come to its end."""
    return _at_rest(stack.get_restore(name))


def _at_rest(body: Mapping[str, Any] | None) -> bool:
    if body is None:
        return True
    found = conditions(body)
    settled = found.get("Reconciling", {}).get("status") == "False" and not body["metadata"].get("deletionTimestamp")
    return settled and "True" in (found.get("Ready", {}).get("status"), found.get("Stalled", {}).get("status"))


def all_over(scene: Scene) -> bool:
    """Whether nothing of this scene is under way any more."""
    names = (scene.name, *scene.others, *scene.beside)
    return all(is_over(scene.stack, n) for n in names) and all(is_restored(scene.stack, n) for n in scene.restores)


# --- another installation ------------------------------------------------------------------------------------------------------


def _prepare_other(scene: Scene) -> None:
    scene.annex.other()


def _snapshot_by_other(scene: Scene) -> None:
    """Another cluster's operator is asked for a snapshot of the same VM, and has begun with it."""
    other = scene.annex.other()
    scene.planted.append(other.snapshot(f"{scene.name}-other", scene.guest.name))

    def begun() -> bool:
        return bool(conditions(other.get(scene.planted[-1]) or {}))

    try:
        until("the other installation has begun", begun, 30)
    except LabError as error:
        raise NoEffectError(str(error)) from error


def _end_of_other(scene: Scene) -> None:
    """The other one's comes to its end, holds what it claims, and is deleted."""
    other = scene.annex.other()
    for name in scene.planted:
        try:
            until(f"{name} of the other installation has ended", lambda name=name: is_over(other, name), END_SECONDS)  # type: ignore[misc]
            scene.findings += judge.judge_snapshot(other.lab, other, name)
            other.delete(name)
        except LabError as error:
            scene.findings.append(Finding("stuck", f"{name} of the other installation", f"{error}: {other.get(name)}"))


def _nothing_of_other(scene: Scene) -> None:
    """Both have deleted what they took: nothing is left, by the other's books either."""
    other = scene.annex.other()
    until_calm = judge.settled(other.lab, other, [scene.guest])
    scene.findings += [Finding(f.kind, f"{f.subject} (as the other installation knows it)", f.what) for f in until_calm]


# --- six others whose agents hang ------------------------------------------------------------------------------------------------


def _prepare_six(scene: Scene) -> None:
    """Three hang before anybody asks them, three will in the middle of their freeze."""
    six = scene.annex.six()
    for guest in six:
        guest.up()
    with ThreadPoolExecutor(len(six)) as threads:
        list(threads.map(Guest.hang_agent, six[:3]))
        list(threads.map(Guest.hang_agent_at_freeze, six[3:]))


def _snapshot_six(scene: Scene) -> None:
    """All at once, and quickly: the VM under test may be frozen now."""
    scene.beside = {f"{scene.name}-six-{number}": guest for number, guest in enumerate(scene.annex.six())}
    quiesce = {"policy": "Require", "maxFrozenSeconds": 5}
    wanted = [
        scene.stack.body(name, guest.name, namespace=scene.namespace, quiesce=quiesce)
        for name, guest in scene.beside.items()
    ]
    scene.stack.apply({"apiVersion": "v1", "kind": "List", "items": wanted})


def _unhang_six(scene: Scene) -> None:
    """The VM under test is done while the six still hang; then they may go on."""
    try:
        _must_hang(scene.annex.six())
        until(
            f"{scene.name} has ended while six agents hang",
            lambda: is_over(scene.stack, scene.name) and all(is_restored(scene.stack, n) for n in scene.restores),
            RESTORE_SECONDS if scene.restores else ALONE_SECONDS,
        )
    except LabError as error:
        scene.findings.append(Finding("stuck", scene.name, str(error)))
    finally:
        _let_six_go_on(scene)


def _let_six_go_on(scene: Scene) -> None:
    six = scene.annex.six()
    with ThreadPoolExecutor(len(six)) as threads:
        list(threads.map(lambda guest: guest.hang_agent_at_freeze(hang=False), six))


def _must_hang(six: list[Guest]) -> None:
    def hanging() -> list[Guest]:
        with ThreadPoolExecutor(len(six)) as threads:
            return [g for g, answers in zip(six, threads.map(Guest.agent_answers, six), strict=True) if not answers]

    try:
        until("all six agents hang", lambda: len(hanging()) == len(six), 60)
    except LabError as error:
        raise NoEffectError(f"{error}: it is {', '.join(g.name for g in hanging())}") from error


FAULTS = (
    Fault(
        name="another-installation",
        prepare=_prepare_other,
        strike=_snapshot_by_other,
        heal=_end_of_other,
        leave=_nothing_of_other,
        slow=True,
    ),
    Fault(
        name="six-agents-hung",
        prepare=_prepare_six,
        strike=_snapshot_six,
        heal=_unhang_six,
        leave=_let_six_go_on,
        slow=True,
    ),
)
