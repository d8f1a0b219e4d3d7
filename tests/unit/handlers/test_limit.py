"""An attempt acts until one moment, asked again right before each deed: who was stopped meanwhile does nothing."""

from __future__ import annotations

from typing import cast

import pytest

from vmsnapshot_operator.errors import NotPermittedError
from vmsnapshot_operator.kube.lease import Leadership
from vmsnapshot_operator.strategies import window
from vmsnapshot_operator.strategies.window import Limit


class Fake:
    leading = True
    now = 100.0

    def is_leader(self) -> bool:
        return self.leading


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
    fake.leading = False
    assert "another instance" in limit.refusal()
