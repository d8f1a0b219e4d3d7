"""The CustomResourceDefinitions, made from the models: those are the only source. Not what stands in them (each kind's module).

Kubernetes takes structural schemas: no reference, no `anyOf` with null, no `additionalProperties: false`, a type everywhere.
An optional field is one that may be left out; the API server takes an explicit null for that, so that no rule meets one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vmsnapshot_operator.api import hypervisor, storage_driver_class, vmrestore, vmsnapshot, vmsnapshot_content
from vmsnapshot_operator.api.meta import CATEGORY, GROUP, VERSION
from vmsnapshot_operator.api.model import PATTERN_MESSAGE, RULES, Column, Kind

KINDS: tuple[Kind, ...] = (
    hypervisor.KIND,
    storage_driver_class.KIND,
    vmsnapshot.KIND,
    vmsnapshot_content.KIND,
    vmrestore.KIND,
)
"""Every kind of the group; a new one is added here and nowhere else."""

_HEADER = "# Generated from the models by `make generate`; a test fails if it differs.\n"
_EXTENSION = "x-kubernetes-"
_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "default",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "pattern",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
)
_SCALARS = ("string", "boolean", "integer")


def crd_documents() -> dict[str, str]:
    """Return the text of each file by its name: for the same models always the same."""
    return {f"{GROUP}_{k.plural}.yaml": _HEADER + _yaml(crd(k)) for k in KINDS}


def write(folder: Path) -> None:
    """Write one file per kind; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in crd_documents().items():
        (folder / name).write_text(text, encoding="utf-8")


def check(folder: Path) -> list[str]:
    """Return the names of files that are missing, differ, or do not belong there."""
    wanted = crd_documents()
    present = {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.yaml")}
    return sorted(n for n in wanted.keys() | present.keys() if wanted.get(n) != present.get(n))


def crd(kind: Kind) -> dict[str, Any]:
    """Return the CustomResourceDefinition of a kind."""
    names = {
        "kind": kind.name,
        "listKind": f"{kind.name}List",
        "plural": kind.plural,
        "singular": kind.singular,
        "shortNames": list(kind.short_names),
        "categories": [CATEGORY],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [_column(c) for c in kind.columns],
        "schema": {"openAPIV3Schema": _root(kind)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": names,
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [version],
        },
    }


def _yaml(document: Mapping[str, Any]) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes a part that stands in several places as often, not as a reference to the first."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the library's signature
        """Say so for everything."""
        return True


def _column(column: Column) -> dict[str, Any]:
    shown = {"name": column.name, "type": column.type, "jsonPath": column.path, "description": column.description}
    return shown | ({"priority": 1} if column.wide else {})


def _root(kind: Kind) -> dict[str, Any]:
    source = kind.model.model_json_schema(by_alias=True, mode="validation")
    spec, status = (structural(source["properties"][part], source["$defs"]) for part in ("spec", "status"))
    # A fresh object must not be taken for a finished one: it shows that nobody has looked at it yet.
    status["default"] = {"observedGeneration": -1}
    return {
        "description": " ".join(source["description"].split()),
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }


def structural(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema as pydantic writes it in the form that Kubernetes takes; ValueError for what that cannot say."""
    node = _resolve(node, definitions)
    made = {k: node[k] for k in _KEPT if k in node} | {k: node[k] for k in sorted(node) if k.startswith(_EXTENSION)}
    if "description" in made:
        made["description"] = " ".join(made["description"].split())
    match node.get("type"):
        case "object" if "properties" in node:
            made["properties"] = {k: structural(v, definitions) for k, v in node["properties"].items()}
        case "object" if isinstance(node.get("additionalProperties"), Mapping):
            made["additionalProperties"] = structural(node["additionalProperties"], definitions)
        case "array":
            made["items"] = _without_defaults(structural(node["items"], definitions))
        case "integer":
            made["format"] = "int64"
        case kind if kind not in _SCALARS:
            raise ValueError(f"a structural schema cannot say this: {dict(node)}")
    _say_pattern(made, node.get(PATTERN_MESSAGE))
    _fit_default(made)
    return made


def _without_defaults(item: dict[str, Any]) -> dict[str, Any]:
    """Take the defaults out of what a list holds; they are filled in where the object is read.

    Tools that compare on their own side hold a list against the manifest's as a whole: with a default filled in by the API
    server the two would differ for ever.
    """
    made = {k: v for k, v in item.items() if k != "default"}
    if "properties" in made:
        made["properties"] = {k: _without_defaults(v) for k, v in made["properties"].items()}
    return made


def _resolve(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Put what is referred to, or the one alternative to null, in its place. What stands beside it speaks of this place."""
    beside = {k: v for k, v in node.items() if k not in ("$ref", "anyOf")}
    if "$ref" in node:
        inner = definitions[node["$ref"].rsplit("/", 1)[-1]]
    elif "anyOf" in node:
        alternatives = [a for a in node["anyOf"] if a.get("type") != "null"]
        if len(alternatives) != 1:
            raise ValueError(f"a structural schema cannot say alternatives: {dict(node)}")
        inner = alternatives[0]
    else:
        return dict(node)
    inner = _resolve(inner, definitions)
    both = [*inner.get(RULES, ()), *beside.get(RULES, ())]
    return {**inner, **beside, **({RULES: both} if both else {})}


def _say_pattern(made: dict[str, Any], message: str | None) -> None:
    """Turn a pattern that has a message into a rule: for a pattern the API server would only show the pattern."""
    if message is not None:
        quoted = made.pop("pattern").replace("\\", "\\\\").replace("'", "\\'")
        made[RULES] = [{"rule": f"self.matches('{quoted}')", "message": message}, *made.get(RULES, ())]


def _fit_default(made: dict[str, Any]) -> None:
    """Keep defaults that say something. A parent's is empty: where it is absent, those of its fields are filled in then."""
    given = made.get("default")
    if made["type"] == "object" and "properties" in made and given is not None:
        made["default"] = {}
    elif given in (None, "", [], {}):
        made.pop("default", None)
