"""Quiesce methods are found once: no window waits until all that is installed has been read."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vmsnapshot_operator.errors import QuiesceError
from vmsnapshot_operator.quiesce import base
from vmsnapshot_operator.quiesce.nothing import NothingQuiescer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Count the looks at what is installed."""
    looks: list[str] = []
    found = [
        EntryPoint("None", "vmsnapshot_operator.quiesce.nothing:NothingQuiescer", base.ENTRY_POINTS),
        EntryPoint("Broken", "vmsnapshot_operator.nowhere:Quiescer", base.ENTRY_POINTS),
    ]

    def entry_points(**wanted: str) -> EntryPoints:
        looks.append(wanted.get("name", ""))
        return EntryPoints(found).select(**wanted)

    monkeypatch.setattr(base, "entry_points", entry_points)
    base.find.cache_clear()
    yield looks
    base.find.cache_clear()


def test_what_was_loaded_is_not_looked_for_again(installed: list[str]) -> None:
    base.load()
    installed.clear()
    assert base.find("None") is NothingQuiescer
    assert not installed


def test_one_that_is_not_there_is_said_with_those_that_are(installed: list[str]) -> None:
    with pytest.raises(QuiesceError, match="one of Broken, None"):
        base.find("Overlay")
    assert installed


def test_one_that_does_not_load_is_said_to_be_so(installed: list[str]) -> None:
    with pytest.raises(QuiesceError, match="does not load") as caught:
        base.find("Broken")
    assert (caught.value.reason, installed) == ("QuiesceMethodUnknown", ["Broken"])
