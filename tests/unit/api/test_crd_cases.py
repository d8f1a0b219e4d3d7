"""The cases that the API server is held to: every rule has one, and the models agree with them as far as they go."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.errors import RefusedError

CASES = {
    p.stem: yaml.safe_load(p.read_text()) for p in sorted((Path(__file__).parents[2] / "crd-cases").glob("*.yaml"))
}
MODELS = {k.name: k.model for k in schema.KINDS}
ACROSS_FIELDS = "x-kubernetes-validations"


def objects(case: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = case.get("objects") or [case["object"]]
    return found


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    inner = [*node.get("properties", {}).values()] + [node[k] for k in ("items", "additionalProperties") if k in node]
    for each in inner:
        yield from nodes(each)


def messages(kind: str) -> dict[str, bool]:
    """The messages of all rules of a kind; true for those of a single text's form, which the models know too."""
    crd = schema.crd(next(k for k in schema.KINDS if k.name == kind))
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return {r["message"]: r["rule"].startswith("self.matches(") for n in nodes(root) for r in n.get(ACROSS_FIELDS, ())}


RULES = [(kind, message) for kind in MODELS for message in messages(kind)]


def test_cases_are_well_formed() -> None:
    assert len(CASES) > 150
    for name, case in CASES.items():
        kinds = {o["kind"] for o in objects(case)}
        assert len(kinds) == 1, name
        assert name.startswith(f"{kinds.pop().lower()}-"), name
        assert case["expect"] in ("accepted", "refused"), name
        assert ("message" in case) == (case["expect"] == "refused"), name
        assert case["title"], name
        assert case.keys() <= {"title", "expect", "message", "object", "objects"}, name
    assert len({(c["title"], str(objects(c))) for c in CASES.values()}) == len(CASES)


@pytest.mark.parametrize(("kind", "message"), RULES)
def test_every_rule_has_a_case_that_it_refuses(kind: str, message: str) -> None:
    refused = [c for c in CASES.values() if c["expect"] == "refused" and objects(c)[0]["kind"] == kind]
    assert any(c["message"] in message for c in refused)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["expect"] == "accepted"])
def test_what_the_api_server_accepts_can_be_read(name: str) -> None:
    for body in objects(CASES[name]):
        read = MODELS[body["kind"]].from_body(body)
        again = MODELS[body["kind"]].from_body(read.to_body())
        assert again == read


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c["expect"] == "refused"])
def test_what_the_api_server_refuses_for_one_value_cannot_be_read(name: str) -> None:
    """Rules over several fields, sets and updates are the API server's alone."""
    case = CASES[name]
    *before, last = objects(case)
    for body in before:
        MODELS[body["kind"]].from_body(body)
    model = MODELS[last["kind"]]
    across = any(case["message"] in m and not of_one for m, of_one in messages(last["kind"]).items())
    if across or re.search(r"Duplicate value|RFC 1123", case["message"]):
        model.from_body(last)
    else:
        with pytest.raises(RefusedError):
            model.from_body(last)
