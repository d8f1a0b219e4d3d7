"""One list of all reasons: none is used that it does not explain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import vmsnapshot_operator
from vmsnapshot_operator import errors
from vmsnapshot_operator.api.conditions import ConditionType
from vmsnapshot_operator.api.reasons import Reason, document
from vmsnapshot_operator.cli import main
from vmsnapshot_operator.errors import SnapshotError
from vmsnapshot_operator.plan import conditions

PACKAGE = Path(vmsnapshot_operator.__file__).parent
TAKES_A_REASON = {"_say", "_fail", "_unknown", "_progress", "_tell", "_emit", "fail", "emit", "word"}
NO_REASONS = {"Normal", "Warning", "Unknown"}
"""Words that stand beside a reason among the arguments of those."""
WORD = re.compile(r"^[A-Z][A-Za-z]+$")


def _texts(node: ast.expr) -> Iterator[str]:
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from _texts(node.body)
            yield from _texts(node.orelse)
        case ast.BoolOp():
            for value in node.values:
                yield from _texts(value)
        case ast.Dict():
            for value in node.values:
                yield from _texts(value)
        case ast.Call(func=ast.Attribute(value=ast.Dict() as table, attr="get"), args=args):
            for value in (table, *args[1:]):
                yield from _texts(value)


def _of_call(node: ast.Call) -> Iterator[str]:
    keywords = {k.arg: k.value for k in node.keywords}
    said_yes = isinstance(ok := keywords.get("ok"), ast.Constant) and ok.value is True
    if "reason" in keywords and not said_yes:
        yield from _texts(keywords["reason"])
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in TAKES_A_REASON:
        for argument in node.args:
            yield from _texts(argument)


def _used() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if "api" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            words: list[str] = []
            if isinstance(node, ast.Call):
                words += _of_call(node)
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "reason" for t in node.targets):
                words += _texts(node.value)
            for word in words:
                if WORD.match(word) and word not in NO_REASONS:
                    found.setdefault(word, set()).add(str(path.relative_to(PACKAGE)))
    return found


def test_every_reason_in_the_code_is_explained() -> None:
    used = _used()
    assert {"DomainNotFound", "ClassTie", "Preparing", "DeadlineExceeded", "CutFailed"} <= used.keys(), (
        "the search finds them"
    )
    assert {w: p for w, p in used.items() if w not in set(Reason)} == {}


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_is_one_word_with_a_sentence(reason: Reason) -> None:
    assert re.fullmatch(r"[A-Z][A-Za-z]{1,62}", reason)
    assert reason.meaning.endswith(".")
    assert reason.action.endswith(".")
    assert not re.search(r"[\n|<>]", reason.meaning + reason.action), "it stands in a cell of a table"
    assert f"{reason}" == reason.value
    assert reason.name.replace("_", "").lower() == reason.value.lower()


def _errors(base: type[SnapshotError] = SnapshotError) -> Iterator[type[SnapshotError]]:
    yield base
    for child in base.__subclasses__():
        yield from _errors(child)


def test_every_error_becomes_a_reason() -> None:
    assert [e.__name__ for e in _errors() if e.__module__ == errors.__name__ and e.reason not in set(Reason)] == []


def test_no_reason_is_explained_that_nobody_uses() -> None:
    words = {n.value for p in PACKAGE.rglob("*.py") if p.name != "reasons.py" for n in _constants(p)}
    assert {str(r) for r in Reason} - words == set()


def _constants(path: Path) -> Iterator[ast.Constant]:
    return (
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    )


def test_the_page_lists_all_and_is_as_generated() -> None:
    page = (PACKAGE.parent.parent / "docs" / "reasons.md").read_text()
    assert page == document(), "run `make generate`"
    assert [r for r in Reason if f"| `{r}` | " not in page] == []


def test_drift_is_found(tmp_path: Path) -> None:
    page = tmp_path / "reasons.md"
    assert CliRunner().invoke(main, ["reasons", "--write", str(page)]).exit_code == 0
    assert CliRunner().invoke(main, ["reasons", "--check", str(page)]).exit_code == 0
    page.write_text(page.read_text().replace("Frozen", "Thrown"))
    assert CliRunner().invoke(main, ["reasons", "--check", str(page)]).exit_code == 1


def test_reasons_are_told_apart() -> None:
    assert len({r.meaning for r in Reason}) == len(Reason)


def test_condition_types_are_those_of_the_plan() -> None:
    planned = [
        conditions.PLANNED,
        conditions.QUIESCED,
        conditions.VOLUMES_SNAPSHOTTED,
        conditions.UNQUIESCED,
        conditions.READY,
        conditions.RECONCILING,
        conditions.STALLED,
    ]
    assert planned == list(ConditionType)
