"""The definitions follow from the models, are what Kubernetes takes, and bound everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import ConfigDict, Field

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.api.model import PATTERN_MESSAGE, Kind, Model, rule, rules

ROOT = Path(__file__).resolve().parents[3]
CRDS = {name: yaml.safe_load(text) for name, text in schema.crd_documents().items()}
FORBIDDEN = {"$ref", "$defs", "anyOf", "allOf", "oneOf", "title", "const", "nullable", PATTERN_MESSAGE}


def root(crd: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def parts(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas within one, with their paths."""
    yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from parts(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in node:
            yield from parts(node[key], f"{path}[]")


PARTS = [(f"{name}{path}", node) for name, crd in CRDS.items() for path, node in parts(root(crd))]
OURS = [(path, node) for path, node in PARTS if not re.search(r"yaml(\.apiVersion|\.kind|\.metadata)?$", path)]
WITH_RULES = [(path, node) for path, node in PARTS if "x-kubernetes-validations" in node]


# --- the files ---------------------------------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_models() -> None:
    assert schema.check(ROOT / "crds") == []


def test_a_change_by_hand_is_seen(tmp_path: Path) -> None:
    schema.write(tmp_path / "new")
    assert schema.check(tmp_path / "new") == []
    names = sorted(CRDS)
    (tmp_path / "new" / names[0]).unlink()
    (tmp_path / "new" / names[1]).write_text("edited")
    (tmp_path / "new" / "other.yaml").write_text("foreign")
    assert schema.check(tmp_path / "new") == sorted([names[0], names[1], "other.yaml"])


def test_the_text_is_the_same_in_every_process() -> None:
    program = "from vmsnapshot_operator.api import schema; print(*schema.crd_documents().values(), sep='', end='')"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert texts == {"".join(schema.crd_documents().values())}


def test_names() -> None:
    assert {c["metadata"]["name"]: (c["spec"]["scope"], c["spec"]["names"]["shortNames"]) for c in CRDS.values()} == {
        "hypervisors.vmsnapshot.io": ("Cluster", ["vmhv"]),
        "storagedriverclasses.vmsnapshot.io": ("Cluster", ["vmsdc"]),
        "vmsnapshotcontents.vmsnapshot.io": ("Cluster", ["vmsnapcontent"]),
        "vmsnapshots.vmsnapshot.io": ("Namespaced", ["vmsnap"]),
        "vmrestores.vmsnapshot.io": ("Namespaced", ["vmrest"]),
    }
    for name, crd in CRDS.items():
        assert name == f"vmsnapshot.io_{crd['spec']['names']['plural']}.yaml"


# --- what Kubernetes takes -----------------------------------------------------------------------------------------------------


def test_structural() -> None:
    for path, node in PARTS:
        assert not FORBIDDEN & node.keys(), path
        assert node["type"] in ("object", "array", "string", "integer", "boolean"), path
        assert not ("properties" in node and "additionalProperties" in node), path


def test_everything_is_bounded() -> None:
    assert len(OURS) > 250
    for path, node in OURS:
        match node["type"]:
            case "string":
                assert "maxLength" in node or "enum" in node or node.get("format") == "date-time", path
            case "integer":
                assert {"minimum", "maximum", "format"} <= node.keys(), path
            case "array":
                assert {"maxItems", "x-kubernetes-list-type"} <= node.keys(), path
            case "object":
                assert "properties" in node or "maxProperties" in node, path


@pytest.mark.parametrize("name", CRDS)
def test_every_field_has_a_description(name: str) -> None:
    for path, node in parts(root(CRDS[name])):
        for field, inner in node.get("properties", {}).items():
            if path or field in ("spec", "status"):
                assert inner.get("description"), f"{path}.{field}"


@pytest.mark.parametrize("name", CRDS)
def test_defaults_come_true_from_the_top(name: str) -> None:
    """A nested default is filled in only where its parent is there: each parent has the default {}, and none within a list."""
    spec = root(CRDS[name])["properties"]["spec"]

    def walk(node: dict[str, Any], *, reached: bool, in_list: bool) -> None:
        for field, inner in node.get("properties", {}).items():
            if "default" in inner:
                assert not in_list, f"{field}: tools that compare lists would see a difference for ever"
                assert reached, f"{field}: its parent may be absent"
            required = field in node.get("required", ())
            there = reached and (required or inner.get("default") == {})
            # An optional parent without a default (overlay) may hold defaults: they are for those who write it.
            walk(inner, reached=there or not required, in_list=in_list)
        if "items" in node:
            walk(node["items"], reached=True, in_list=True)

    walk(spec, reached=True, in_list=False)
    parents = {f for f, inner in spec["properties"].items() if inner.get("default") == {}}
    wanted = {"vmsnapshot.io_vmsnapshots.yaml": {"quiesce", "volumes"}, "vmsnapshot.io_vmrestores.yaml": {"volumes"}}
    assert parents == wanted.get(name, set())
    assert root(CRDS[name])["properties"]["status"]["default"] == {"observedGeneration": -1}


def test_all_of_the_spec_but_two_fields_is_immutable() -> None:
    spec = root(CRDS["vmsnapshot.io_vmsnapshots.yaml"])["properties"]["spec"]
    fixed = {
        m[1] for r in spec["x-kubernetes-validations"] if (m := re.fullmatch(r"self\.(\w+) == oldSelf\.\1", r["rule"]))
    }
    assert spec["properties"].keys() - fixed == {"deletionPolicy", "ttlSeconds"}
    # The rules compare what is always there: required, or with a default.
    assert all(f in spec["required"] or "default" in spec["properties"][f] for f in fixed)


def test_all_of_a_restore_is_immutable() -> None:
    spec = root(CRDS["vmsnapshot.io_vmrestores.yaml"])["properties"]["spec"]
    fixed = {}
    for each in spec["x-kubernetes-validations"]:
        if m := re.search(r"self\.(\w+) == oldSelf\.\1\)?$", each["rule"]):
            fixed[m[1]] = each["rule"].startswith("has(")
    assert fixed.keys() == spec["properties"].keys()
    # A rule that compares what may be absent asks first whether it is there.
    always = {f for f, inner in spec["properties"].items() if f in spec["required"] or "default" in inner}
    assert {f for f, asks in fixed.items() if asks} == spec["properties"].keys() - always


def test_rules_speak_plainly() -> None:
    assert len(WITH_RULES) > 20
    for path, node in WITH_RULES:
        for each in node["x-kubernetes-validations"]:
            assert len(each["message"]) <= 250, path
            assert not each["message"].endswith("."), path
            assert "self" not in each["message"], path
            if "fieldPath" in each:
                inner = node
                for field in each["fieldPath"].removeprefix(".").split("."):
                    inner = inner["properties"][field]


# --- how it is made -----------------------------------------------------------------------------------------------------------


def made(annotation: Any, default: Any = ...) -> dict[str, Any]:
    """The structural schema of one field of a model made for the purpose."""
    namespace: dict[str, Any] = {"__annotations__": {"field": annotation}, "__module__": __name__}
    if default is not ...:
        namespace["field"] = default
    source = type("Made", (Model,), namespace).model_json_schema()
    found: dict[str, Any] = schema.structural(source, source.get("$defs", {}))["properties"]["field"]
    return found


class Inner(Model):
    """Said of the type."""

    model_config = ConfigDict(json_schema_extra=rules(rule("self.x == 1", "of the type")))
    x: int = Field(default=1, ge=0, le=9)


def test_an_optional_field_is_one_that_may_be_absent() -> None:
    found = made(Annotated[int, Field(ge=1, le=5)] | None, None)
    assert found == {"type": "integer", "minimum": 1, "maximum": 5, "format": "int64"}


def test_a_pattern_with_a_message_becomes_a_rule() -> None:
    found = made(
        Annotated[str, Field(max_length=9, pattern=r"^it's \d$", json_schema_extra={PATTERN_MESSAGE: "must be it"})]
    )
    assert found == {
        "type": "string",
        "maxLength": 9,
        "x-kubernetes-validations": [{"rule": r"self.matches('^it\'s \\d$')", "message": "must be it"}],
    }


def test_what_stands_beside_a_reference_wins_and_rules_add_up() -> None:
    found = made(
        Annotated[Inner, Field(description="of the place", json_schema_extra=rules(rule("true", "of the place")))],
        Inner(),
    )
    assert found["description"] == "of the place"
    assert [r["message"] for r in found["x-kubernetes-validations"]] == ["of the type", "of the place"]
    assert found["default"] == {}
    assert found["properties"]["x"]["default"] == 1


def test_defaults_within_a_list_are_left_to_the_reader() -> None:
    found = made(Annotated[tuple[Inner, ...], Field(max_length=3)], ())
    assert "default" not in found
    assert "default" not in found["items"]["properties"]["x"]


@pytest.mark.parametrize(
    ("annotation", "default"), [(str, ""), (tuple[str, ...], ()), (dict[str, str], {}), (str | None, None)]
)
def test_a_default_that_says_nothing_is_left_out(annotation: Any, default: Any) -> None:
    assert "default" not in made(annotation, default)


def test_a_default_of_false_says_something() -> None:
    assert made(bool, False)["default"] is False


@pytest.mark.parametrize("annotation", [float, int | str, Any, None])
def test_what_a_structural_schema_cannot_say_is_refused(annotation: Any) -> None:
    with pytest.raises(ValueError, match="structural schema cannot say"):
        made(annotation)


def test_every_kind_has_ready_and_age() -> None:
    for kind in schema.KINDS:
        assert isinstance(kind, Kind)
        assert {"Ready", "Age"} <= {c.name for c in kind.columns} or kind.name == "VMSnapshotContent"
        assert all(" " not in c.name for c in kind.columns)
