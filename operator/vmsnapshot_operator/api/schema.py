"""Generate the CustomResourceDefinitions from the models: the models are the only source, `crds/*.yaml` follow.

Kubernetes wants structural schemas: no `$ref`, no `anyOf` with null, a type everywhere. What pydantic writes is turned into
that; defaults of parents are filled in, since a nested default is not applied where its parent is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from vmsnapshot_operator.api.hypervisor import HypervisorSpec, HypervisorStatus
from vmsnapshot_operator.api.meta import GROUP, VERSION
from vmsnapshot_operator.api.storage_driver_class import StorageDriverClassSpec, StorageDriverClassStatus
from vmsnapshot_operator.api.vmsnapshot import VMSnapshotSpec, VMSnapshotStatus
from vmsnapshot_operator.api.vmsnapshot_content import VMSnapshotContentSpec, VMSnapshotContentStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of `kubectl get`; `wide`: only with -o wide."""

    name: str
    path: str
    type: str = "string"
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of ours."""

    kind: str
    plural: str
    namespaced: bool
    short: tuple[str, ...]
    spec: type[BaseModel]
    status: type[BaseModel]
    columns: tuple[Column, ...]
    about: str


def _condition(name: str) -> str:
    return f'.status.conditions[?(@.type=="{name}")].status'


_READY = Column(name="Ready", path=_condition("Ready"))
_AGE = Column(name="Age", path=".metadata.creationTimestamp", type="date")
_MESSAGE = Column(name="Message", path='.status.conditions[?(@.type=="Stalled")].message', wide=True)

KINDS = (
    Kind(
        kind="Hypervisor", plural="hypervisors", namespaced=False, short=("vmhyp",), spec=HypervisorSpec, status=HypervisorStatus,
        about="Where VMs live, and which namespaces may snapshot which of them.",
        columns=(
            Column(name="Domains", path=".status.domains", type="integer"), _READY, _AGE,
            Column(name="Libvirt", path=".status.libvirtVersion", wide=True),
            Column(name="Held", path=".status.heldDomains", wide=True), _MESSAGE,
        ),
    ),
    Kind(
        kind="StorageDriverClass", plural="storagedriverclasses", namespaced=False, short=("sdc",),
        spec=StorageDriverClassSpec, status=StorageDriverClassStatus,
        about="How a storage driver is registered: its parameters, and the disks that it serves.",
        columns=(
            Column(name="Driver", path=".spec.driver"), Column(name="Priority", path=".spec.priority", type="integer"),
            Column(name="Cut", path=".status.capabilities.cut"), _READY, _AGE,
            Column(name="Atomic", path=".status.capabilities.atomic", type="boolean", wide=True), _MESSAGE,
        ),
    ),
    Kind(
        kind="VMSnapshot", plural="vmsnapshots", namespaced=True, short=("vmsnap",), spec=VMSnapshotSpec, status=VMSnapshotStatus,
        about="One consistent snapshot of a VM whose disks may lie on several storage systems.",
        columns=(
            Column(name="Domain", path=".spec.source.domain"), Column(name="Phase", path=".status.phase"),
            Column(name="Consistency", path=".status.consistency"),
            Column(name="Frozen ms", path=".status.quiesce.frozenMilliseconds", type="integer"), _READY, _AGE,
            Column(name="Method", path=".status.quiesce.method", wide=True),
            Column(name="Cut at", path=".status.creationTime", wide=True),
            Column(name="Content", path=".status.contentName", wide=True), _MESSAGE,
        ),
    ),
    Kind(
        kind="VMSnapshotContent", plural="vmsnapshotcontents", namespaced=False, short=("vmsnapcontent",),
        spec=VMSnapshotContentSpec, status=VMSnapshotContentStatus,
        about="What is really held of a VMSnapshot, and the evidence. Written by the operator alone.",
        columns=(
            Column(name="Namespace", path=".spec.vmSnapshotRef.namespace"), Column(name="VMSnapshot", path=".spec.vmSnapshotRef.name"),
            Column(name="Domain", path=".spec.source.domain"), Column(name="Consistency", path=".spec.consistency"),
            Column(name="Ready", path=".spec.ready", type="boolean"), _AGE,
            Column(name="Attempt", path=".spec.attempt", type="integer", wide=True),
            Column(name="Policy", path=".spec.deletionPolicy", wide=True),
        ),
    ),
)


def crd_documents() -> dict[str, str]:
    """Return the text of each file by its name; the same text each time."""
    return {f"{GROUP}_{k.plural}.yaml": _text(_crd(k)) for k in KINDS}


def write(folder: Path) -> None:
    """Write one file per kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in crd_documents().items():
        (folder / name).write_text(text)


def check(folder: Path) -> list[str]:
    """Return the names of files that are missing, differ, or do not belong there."""
    wanted = crd_documents()
    present = {p.name: p.read_text() for p in folder.glob("*.yaml")}
    return sorted(n for n in wanted.keys() | present.keys() if wanted.get(n) != present.get(n))


def _text(document: Mapping[str, Any]) -> str:
    head = "# Generated from the models by `make generate`; a test fails if it differs.\n"
    return head + yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True, width=120)


def _crd(kind: Kind) -> dict[str, Any]:
    columns = [
        {"name": c.name, "type": c.type, "jsonPath": c.path} | ({"priority": 1} if c.wide else {}) for c in kind.columns
    ]
    spec, status = structural(kind.spec), structural(kind.status)
    status["default"] = {"observedGeneration": -1}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.kind, "listKind": f"{kind.kind}List", "plural": kind.plural, "singular": kind.kind.lower(),
                "shortNames": list(kind.short), "categories": ["vmsnapshot"],
            },
            "scope": "Namespaced" if kind.namespaced else "Cluster",
            "versions": [
                {
                    "name": VERSION, "served": True, "storage": True, "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {
                        "openAPIV3Schema": {
                            "type": "object", "description": kind.about, "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
                                "spec": spec, "status": status,
                            },
                        }
                    },
                }
            ],
        },
    }


def structural(model: type[BaseModel]) -> dict[str, Any]:
    """Return the structural schema of a model."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    definitions = schema.pop("$defs", {})
    result = _convert(schema, definitions)
    assert isinstance(result, dict), "a model is an object"  # noqa: S101 - for the type checker
    return result


_KEPT = (
    "type", "description", "enum", "pattern", "format", "minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems",
    "maxProperties", "required",
)


def _convert(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        target = definitions[schema["$ref"].rsplit("/", 1)[1]]
        # What stands beside a reference (a description, a default) speaks of this place and wins.
        schema = {**target, **{k: v for k, v in schema.items() if k != "$ref"}}
    if "allOf" in schema:
        merged: dict[str, Any] = {}
        for part in schema["allOf"]:
            merged |= definitions[part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
        schema = {**merged, **{k: v for k, v in schema.items() if k != "allOf"}}
    if "anyOf" in schema:
        (present,) = [s for s in schema["anyOf"] if s.get("type") != "null"]
        schema = {**present, **{k: v for k, v in schema.items() if k not in ("anyOf", "default")}}
        return _convert(schema, definitions)
    result: dict[str, Any] = {k: schema[k] for k in _KEPT if k in schema}
    result |= {k: v for k, v in schema.items() if k.startswith("x-kubernetes-")}
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if schema.get("type") == "integer":
        result["format"] = "int64"
    if "properties" in schema:
        result["properties"] = {k: _convert(v, definitions) for k, v in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), Mapping):
        result["additionalProperties"] = _convert(schema["additionalProperties"], definitions)
    if "items" in schema:
        result["items"] = _convert(schema["items"], definitions)
    if "default" in schema and schema["default"] not in (None, "", []):
        # A parent's default names the defaults inside of it: rules are held against it as it is written here.
        given = schema["default"]
        full = {k: v for k, v in given.items() if v not in (None, [], {}, "")} if isinstance(given, Mapping) else given
        result["default"] = full
    return result
