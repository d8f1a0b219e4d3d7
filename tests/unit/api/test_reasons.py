"""One list of all reasons: none is used that it does not explain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmsnapshot_operator
from vmsnapshot_operator.api.conditions import ConditionType
from vmsnapshot_operator.api.reasons import Reason
from vmsnapshot_operator.plan import conditions

PACKAGE = Path(vmsnapshot_operator.__file__).parent
PLUG_INS = ("ceph_", "libvirt_")
"""Modules of storage drivers: they have words of their own, like those that others will write."""

TAKES_A_REASON = {"_say", "_fail", "_unknown", "_progress", "fail", "emit", "_QuiesceFailed"}
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
        if "api" in path.parts or path.name.startswith(PLUG_INS):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            words: list[str] = []
            if isinstance(node, ast.Call):
                words += _of_call(node)
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "reason" for t in node.targets):
                words += _texts(node.value)
            for word in words:
                if WORD.match(word) and word not in ("Normal", "Warning"):
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
    assert f"{reason}" == reason.value
    assert reason.name.replace("_", "").lower() == reason.value.lower()


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
