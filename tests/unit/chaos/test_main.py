"""The exit status of `make chaos` and `make bench`: 0 only if nothing was found, or missed. No laboratory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from tests.benchmarks import __main__ as bench
from tests.benchmarks.result import Result as Measured
from tests.chaos import __main__ as chaos
from tests.chaos.cases import Case
from tests.chaos.judge import Finding
from tests.chaos.results import Result

KINDS = ("frozen", "leaked", "lied", "stuck", "unbootable")


class NoLab:
    """Is up at once, and has all guests."""

    @staticmethod
    def up(**_: Any) -> SimpleNamespace:
        return SimpleNamespace(guest=lambda _name: None)


@pytest.mark.parametrize(
    ("found", "reached", "status"), [("", True, 0), ("", False, 1), *((k, True, 1) for k in KINDS)]
)
def test_chaos(found: Any, reached: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Suite:
        def __init__(self) -> None:
            self.results: list[Result] = []

        def inject(self, case: Case, number: int) -> Result:
            self.results.append(
                Result(
                    case=case.name,
                    number=number,
                    reached=reached,
                    seconds=1.0,
                    recovery_seconds=0.0,
                    longest_freeze_milliseconds=0,
                    outcome="gone",
                    findings=(Finding(found, "it", "is wrong"),) if found else (),
                )
            )
            return self.results[-1]

    @contextmanager
    def suite(_lab: object, _seed: int) -> Iterator[Suite]:
        yield Suite()

    monkeypatch.setattr(chaos, "Lab", NoLab)
    monkeypatch.setattr(chaos, "BUILD", tmp_path)
    monkeypatch.setattr(chaos.runner, "suite", suite)
    done = CliRunner().invoke(chaos.main, ["--case", "deleted@Keep:after"])
    assert done.exit_code == status, done.output
    assert (tmp_path / "chaos.json").exists()


@pytest.mark.parametrize(("met", "status"), [([True, None], 0), ([None], 0), ([True, False], 1)])
def test_bench(met: list[bool | None], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(value: bool | None) -> Measured:
        made = Measured(name=f"m-{value}", unit="ms", goal="little", met=value, ours=(1.0,))
        monkeypatch.setattr(Measured, "write", lambda _: None)
        return made

    @contextmanager
    def stack(_lab: object, _name: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(bench, "Lab", NoLab)
    monkeypatch.setattr(bench, "stack", stack)
    monkeypatch.setattr(bench, "ALL", {f"m{n}": lambda *_, v=v: measured(v) for n, v in enumerate(met)})
    assert CliRunner().invoke(bench.main, []).exit_code == status
