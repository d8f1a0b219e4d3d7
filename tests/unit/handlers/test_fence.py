"""An instance whose lease is about to end ends what must not go on beside another one, and lets the rest come to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import pytest_asyncio

from tests.unit.handlers import fakes
from tests.unit.kube import records
from vmsnapshot_operator.core.effects import Effect, Prepare, Recover, RollBack, Settle, TakeWindow
from vmsnapshot_operator.core.restoring import Revert
from vmsnapshot_operator.handlers.operator import Operator, Options
from vmsnapshot_operator.handlers.reconcile import Reconciler, _Running
from vmsnapshot_operator.handlers.restores import Restores
from vmsnapshot_operator.handlers.restores import _Running as Restoring

pytestmark = pytest.mark.looptime


class Lab:
    """Effects under way, and the operator that fences them."""

    def __init__(self) -> None:
        self.world = fakes.world(installation=records.INSTALLATION)
        self.snapshots = Reconciler(self.world, lambda *_: None)
        self.restores = Restores(self.world, lambda *_: None)
        self.operator = Operator(Options(namespace="ns"))
        self.operator._reconciler, self.operator._restores = self.snapshots, self.restores
        self.fencing: asyncio.Task[None] | None = None

    async def pass_by(self, seconds: float) -> None:
        """Let so much time pass. The fence begins with the first of it: only then does this test's clock tick."""
        self.fencing = self.fencing or asyncio.create_task(self.operator._fence(self.world.leadership))
        await asyncio.sleep(seconds)

    def begin(self, kind: type[Effect]) -> asyncio.Task[Any]:
        task = asyncio.create_task(asyncio.Event().wait())
        effect = cast("Effect", kind.__new__(kind))
        self.snapshots._running[kind.__name__] = _Running(effect, cast("Any", task))
        return task

    def restore(self) -> asyncio.Task[Any]:
        task = asyncio.create_task(asyncio.Event().wait())
        self.restores._running["uid"] = Restoring(Revert(()), cast("Any", task))
        return task


@pytest_asyncio.fixture
async def lab() -> AsyncIterator[Lab]:
    made = Lab()
    yield made
    fencing = [made.fencing] if made.fencing is not None else []
    running = [*made.snapshots._running.values(), *made.restores._running.values()]
    tasks = [*fencing, *(r.task for r in running)]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_as_long_as_it_leads_nothing_is_ended(lab: Lab) -> None:
    tasks = [lab.begin(Settle), lab.begin(Prepare), lab.restore()]
    await lab.pass_by(60)
    assert not any(t.done() for t in tasks)


async def test_copies_and_restores_are_ended_before_another_one_begins(lab: Lab) -> None:
    ended = [lab.begin(Settle), lab.begin(Prepare), lab.restore()]
    # A window ends its cuts itself and then frees its VM; freeing and removing by name may be done twice.
    left = [lab.begin(TakeWindow), lab.begin(Recover), lab.begin(RollBack)]
    lab.world.leadership.leader = False  # type: ignore[attr-defined]  # a stand-in
    await lab.pass_by(1)
    assert all(t.cancelled() for t in ended)
    assert not any(t.done() for t in left)


async def test_what_was_begun_at_the_last_moment_is_ended_too(lab: Lab) -> None:
    lab.world.leadership.leader = False  # type: ignore[attr-defined]  # a stand-in
    await lab.pass_by(1)
    late = lab.restore()
    await lab.pass_by(1)
    assert late.cancelled()
