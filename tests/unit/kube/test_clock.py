"""The API server's clock: by its answers, and by nothing that can be set here."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from vmsnapshot_operator.kube.clock import ServerClock

NOON = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
HEADER = "Thu, 01 Jan 2026 12:00:00 GMT"


class Here:
    elapsed = 500.0
    wall = NOON + timedelta(hours=1)


@pytest.fixture
def here() -> Here:
    return Here()


@pytest.fixture
def clock(here: Here) -> ServerClock:
    return ServerClock(lambda: here.elapsed, lambda: here.wall)


def test_before_the_first_answer_it_is_our_own(clock: ServerClock, here: Here) -> None:
    assert clock.now() == here.wall


def test_our_own_being_wrong_or_stepped_changes_nothing(clock: ServerClock, here: Here) -> None:
    clock.note(HEADER)
    assert clock.now() == NOON
    here.wall += timedelta(hours=5)
    here.elapsed += 10.5
    assert clock.now() == NOON + timedelta(seconds=10.5)


def test_our_own_that_agrees_tells_the_part_of_the_second(clock: ServerClock, here: Here) -> None:
    here.wall = NOON + timedelta(seconds=0.7)
    clock.note(HEADER)
    assert clock.now() == here.wall


def test_seconds_of_the_header_do_not_make_it_jump(clock: ServerClock, here: Here) -> None:
    clock.note(HEADER)
    here.elapsed += 1.9
    clock.note(HEADER.replace("12:00:00", "12:00:01"))
    assert clock.now() == NOON + timedelta(seconds=1.9)


def test_another_server_with_another_clock_is_followed(clock: ServerClock) -> None:
    clock.note(HEADER)
    clock.note(HEADER.replace("12:00:00", "12:10:00"))
    assert clock.now() == NOON + timedelta(minutes=10)


@pytest.mark.parametrize("header", [None, "", "yesterday", "Thu, 99 Jan 2026 12:00:00 GMT"])
def test_what_cannot_be_read_is_no_news(clock: ServerClock, here: Here, header: str | None) -> None:
    clock.note(header)
    assert clock.now() == here.wall
