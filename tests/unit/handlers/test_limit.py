"""An attempt acts until one moment, asked again right before each deed: who was stopped meanwhile does nothing."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from vmsnapshot_operator.core.evidence import Evidence
from vmsnapshot_operator.errors import NotPermittedError
from vmsnapshot_operator.kube.lease import Leadership
from vmsnapshot_operator.strategies import window
from vmsnapshot_operator.strategies.window import Limit


class Fake:
    now = 100.0
    until = 200.0

    def is_leader(self, margin: float = 0.0) -> bool:
        return self.now + margin < self.until


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(window, "clock", lambda: made.now)
    return made


def test_within_the_budget_and_the_lease(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    fake.now += 29.0
    assert limit.refusal() == ""
    assert limit.remaining == 1.0
    limit.check()


def test_stopped_for_longer_than_the_budget(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    fake.now += 31.0
    assert "budget" in limit.refusal()
    assert limit.remaining == 0.0
    with pytest.raises(NotPermittedError):
        limit.check()


def test_a_window_that_was_left(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    limit.end()
    assert "window" in limit.refusal(), "a call that was given up may still come to its deed"


def test_another_one_took_over(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    fake.until = fake.now
    assert "another instance" in limit.refusal()


def test_nothing_is_begun_shortly_before_another_one_may_take_over(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    fake.until = fake.now + window.LEASE_MARGIN
    assert "another instance" in limit.refusal()
    fake.until += 0.1
    assert limit.refusal() == ""


def test_an_order_is_good_until_the_budget_or_the_lease_as_it_is_known_now(fake: Fake) -> None:
    limit = Limit(cast("Leadership", fake), 30.0)
    assert limit.order_until == 130.0
    fake.until = 110.0
    assert limit.order_until == 110.0 - window.LEASE_MARGIN


async def test_cuts_are_ended_before_another_one_may_begin(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "LEASE_LOOK", 0.0)
    limit, progress = (
        Limit(cast("Leadership", fake), 30.0),
        window._Progress(groups={}, evidence=Evidence(method="GuestAgent")),
    )
    cut = asyncio.create_task(asyncio.Event().wait())
    fence = asyncio.create_task(window._fence([cut], progress, limit))  # type: ignore[list-item]  # what it answers is nobody's business
    await asyncio.wait([fence], timeout=0.0)
    assert not fence.done()
    fake.until = fake.now + window.LEASE_MARGIN
    with pytest.raises(window._CutFailedError):
        await fence
    assert (progress.reason, progress.interrupted) == ("NotLeader", True)
    cut.cancel()


async def test_cuts_that_end_are_not_held_up(fake: Fake) -> None:
    limit, progress = (
        Limit(cast("Leadership", fake), 30.0),
        window._Progress(groups={}, evidence=Evidence(method="GuestAgent")),
    )
    await window._fence([asyncio.create_task(asyncio.sleep(0))], progress, limit)
    assert progress.reason == ""
