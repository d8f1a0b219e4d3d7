"""No field of a status that nobody writes: what is promised to users is told to them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import vmsnapshot_operator
from vmsnapshot_operator.api import schema
from vmsnapshot_operator.api.model import Kind

PACKAGE = Path(vmsnapshot_operator.__file__).parent


def _fields(node: Mapping[str, Any]) -> Iterator[str]:
    for name, child in (node.get("properties") or {}).items():
        yield name
        yield from _fields(child)
    if "items" in node:
        yield from _fields(node["items"])


def _words() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if "api" in path.relative_to(PACKAGE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Dict(keys=keys):
                    found |= {k.value for k in keys if isinstance(k, ast.Constant)}
                case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(word)))]):
                    found.add(word)
    return found


def _served() -> list[Kind]:
    """The kinds that the operator reads and writes at the API server."""
    tree = ast.parse((PACKAGE / "kube" / "cluster.py").read_text())
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return [k for k in schema.KINDS if k.plural in words]


def test_kinds_that_are_served() -> None:
    assert {"VMSnapshot", "VMSnapshotContent", "Hypervisor", "StorageDriverClass"} <= {k.name for k in _served()}


@pytest.mark.parametrize("kind", _served(), ids=lambda k: k.name)
def test_every_field_of_a_status_is_written(kind: Kind) -> None:
    made = schema.crd(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    fields = set(_fields(made["properties"]["status"]))
    assert {"conditions", "observedGeneration"} <= fields
    assert fields - _words() == set()
