"""The laboratory and the operator, shared by all integration tests. What is missing of it is a failure, never a skip."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator

import pytest

from tests.chaos.injector import Injector
from tests.integration import third_driver
from tests.integration.outcomes import class_conditions
from tests.lab import Lab
from tests.lab.errors import LabError
from tests.stack import Stack, until
from tests.stack import stack as run_stack

_NUMBERS = itertools.count(1)

BREATH_SECONDS = 30.0
"""So long a component may need to get over what a test did to it."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End the run where a failing test leaves a laboratory that does not work: each later test would wait in vain."""
    report = yield
    if report.failed:
        broken = _broken()
        if broken:
            item.session.shouldfail = f"the laboratory does not work after {item.nodeid}: {', '.join(broken)}"
    return report


def _broken() -> list[str]:
    """Components that are not healthy and do not become so."""
    try:
        lab = Lab.attach()
    except LabError as error:
        return [str(error)]
    found = []
    for name in lab.components:
        component = lab.component(name)
        try:
            until(f"{name} is healthy", component.healthy, BREATH_SECONDS)
        except LabError:
            found.append(name)
    return found


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The laboratory, started if it is not up."""
    return Lab.up(report=lambda _line: None)


@pytest.fixture(scope="session")
def stack(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Operator (a third storage driver is installed for it) and guardian under the chart's permissions; the guest `demo` runs."""
    lab.guest("demo")
    with run_stack(lab, "integration", third_driver.install(tmp_path_factory.mktemp("plugins"))) as running:
        for body in running.all("vmsnapshots.vmsnapshot.io"):
            running.delete(body["metadata"]["name"], namespace=body["metadata"]["namespace"])
        yield running


@pytest.fixture(scope="module")
def alone(stack: Stack) -> Iterator[None]:
    """No guardian but those of the tests: the operator's own follows the same libvirt and would free at the budget's end."""
    stack.stop()
    yield
    stack.start()


@pytest.fixture(scope="module")
def injector(stack: Stack) -> Iterator[Injector]:
    """The operator, observed at every step, to the end of the module that asked for it."""
    with Injector(stack.state / "injector.sock") as injector:
        stack.stop()
        stack.observer = injector.path
        stack.start()
        yield injector
        stack.stop()
        stack.observer = None
        stack.start()


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


@pytest.fixture
def extra_class(stack: Stack, lab: Lab) -> Iterator[Callable[..., str]]:
    """Create StorageDriverClasses for one test; each has been looked at when it is returned."""
    made: list[str] = []

    def create(name: str, driver: str, match: list[dict[str, str]], priority: int = 0, **spec: object) -> str:
        made.append(name)
        stack.apply(
            {
                "apiVersion": "vmsnapshot.io/v1alpha1",
                "kind": "StorageDriverClass",
                "metadata": {"name": name},
                "spec": {"driver": driver, "priority": priority, "match": match, **spec},
            }
        )
        until(f"class {name} was looked at", lambda: bool(class_conditions(stack, name)))
        return name

    yield create
    for name in made:
        lab.kubectl("delete", "storagedriverclasses.vmsnapshot.io", name)
