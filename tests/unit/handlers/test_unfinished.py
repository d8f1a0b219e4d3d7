"""Which VMSnapshots have not come to an end, and since when; for metrics."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from vmsnapshot_operator.handlers.unfinished import Doing, Unfinished

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def body(uid: str = "u", *, reconciling: str = "", deleted: str = "", leftovers: int = 0) -> dict[str, Any]:
    meta = {"uid": uid, "name": uid, "creationTimestamp": "2026-01-01T11:59:00Z"}
    if deleted:
        meta["deletionTimestamp"] = deleted
    conditions = [{"type": "Reconciling", "status": reconciling}] if reconciling else []
    left = [{"className": "c", "name": f"n{i}"} for i in range(leftovers)]
    return {"metadata": meta, "status": {"conditions": conditions, "leftovers": left}}


@pytest.mark.parametrize("given", [body(), body(reconciling="True"), {**body(), "status": None}])
def test_it_is_under_way_until_its_status_says_otherwise(given: dict[str, Any]) -> None:
    unfinished = Unfinished()
    unfinished.seen(given)
    assert unfinished.oldest(Doing.TAKING, NOON) == 60
    assert unfinished.oldest(Doing.DELETING, NOON) == 0
    unfinished.seen(body(reconciling="False"))
    assert unfinished.oldest(Doing.TAKING, NOON) == 0


def test_the_oldest_counts_and_goes_with_its_object() -> None:
    unfinished = Unfinished()
    unfinished.seen(body("old"))
    unfinished.seen({**body("new"), "metadata": {"uid": "new", "creationTimestamp": "2026-01-01T11:59:50Z"}})
    assert unfinished.oldest(Doing.TAKING, NOON) == 60
    unfinished.gone("old")
    assert unfinished.oldest(Doing.TAKING, NOON) == 10
    unfinished.gone("never-seen")


def test_a_deletion_is_under_way_until_the_object_is_gone() -> None:
    unfinished = Unfinished()
    unfinished.seen(body(reconciling="False", deleted="2026-01-01T11:59:55Z"))
    assert unfinished.oldest(Doing.DELETING, NOON) == 5
    assert unfinished.oldest(Doing.TAKING, NOON) == 0
    unfinished.gone("u")
    assert unfinished.oldest(Doing.DELETING, NOON) == 0


def test_a_clock_behind_the_api_server_makes_no_negative_age() -> None:
    unfinished = Unfinished()
    unfinished.seen(body())
    assert unfinished.oldest(Doing.TAKING, NOON.replace(hour=11)) == 0


def test_leftovers_count_after_the_end_too() -> None:
    unfinished = Unfinished()
    unfinished.seen(body("failed", reconciling="False", leftovers=2))
    unfinished.seen(body("deleting", deleted="2026-01-01T11:59:55Z", leftovers=1))
    assert unfinished.leftovers() == 3
    unfinished.seen(body("failed", reconciling="False"))
    assert unfinished.leftovers() == 1
