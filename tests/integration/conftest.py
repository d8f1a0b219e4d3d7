"""The laboratory and the operator, shared by all integration tests. What is missing of it is a failure, never a skip."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from tests.lab import Lab
from tests.stack import Stack
from tests.stack import stack as run_stack

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The laboratory, started if it is not up."""
    return Lab.up(report=lambda _line: None)


@pytest.fixture(scope="session")
def stack(lab: Lab) -> Iterator[Stack]:
    """Operator and guardian under the chart's permissions, with the guest `demo` running."""
    lab.guest("demo")
    with run_stack(lab, "integration") as running:
        for body in running.all("vmsnapshots.vmsnapshot.io"):
            running.delete(body["metadata"]["name"], namespace=body["metadata"]["namespace"])
        yield running


@pytest.fixture
def fresh() -> Callable[[str], str]:
    """A name that no other test uses."""

    def name(stem: str) -> str:
        return f"{stem}-{next(_NUMBERS)}"

    return name


@pytest.fixture
def vmsnapshot(stack: Stack, fresh: Callable[[str], str]) -> Iterator[Callable[..., str]]:
    """Create VMSnapshots that are deleted at the end of the test."""
    made: list[str] = []

    def create(stem: str, **spec: object) -> str:
        made.append(stack.snapshot(fresh(stem), **spec))  # type: ignore[arg-type]  # fields of the spec
        return made[-1]

    yield create
    for name in made:
        stack.delete(name)
