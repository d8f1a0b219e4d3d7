"""Every effect is a step, and an observer is told of both sides of those that succeed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from vmsnapshot_operator.core import steps
from vmsnapshot_operator.core.effects import Effect, Wait
from vmsnapshot_operator.core.restoring import Rest, RestoreEffect
from vmsnapshot_operator.core.steps import Moment, Step, step


class Notes:
    def __init__(self) -> None:
        self.taken: list[tuple[Step, Moment, str, str]] = []

    async def reached(self, step: Step, moment: Moment, uid: str, detail: str) -> None:
        self.taken.append((step, moment, uid, detail))


@pytest.fixture
def notes() -> Iterator[Notes]:
    made = Notes()
    steps.observe(made)
    yield made
    steps.observe(None)


def test_no_effect_escapes() -> None:
    effects = {e.__name__ for e in (*get_args(Effect), *get_args(RestoreEffect))} - {Wait.__name__, Rest.__name__}
    assert {s.value for s in Step if "/" not in s.value} == effects
    assert {s.value.split("/")[0] for s in Step} == effects


async def test_both_sides_are_told(notes: Notes) -> None:
    async with step(Step.WINDOW_CUT, "u", "ceph"):
        assert notes.taken == [(Step.WINDOW_CUT, Moment.BEFORE, "u", "ceph")]
    assert notes.taken[1:] == [(Step.WINDOW_CUT, Moment.AFTER, "u", "ceph")]


async def test_what_failed_has_no_after(notes: Notes) -> None:
    with pytest.raises(ValueError, match="boom"):
        async with step(Step.KEEP, "u"):
            raise ValueError("boom")
    assert [m for _, m, _, _ in notes.taken] == [Moment.BEFORE]


async def test_nobody_looks() -> None:
    async with step(Step.KEEP, "u"):
        pass
