"""The VMSnapshotContent of a VMSnapshot: written from a `Record`, read back into one, and trusted only if it is bound to it.

Not which field is kept where (`kube.content_parts`), nor when it is written (`strategies`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from vmsnapshot_operator.api.meta import (
    API_VERSION,
    LABEL_INSTALLATION,
    LABEL_SNAPSHOT_NAMESPACE,
    LABEL_SNAPSHOT_UID,
    content_name,
)
from vmsnapshot_operator.api.vmsnapshot_content import KIND, VMSnapshotContentSpec
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Plan, QuiesceChoice, Request
from vmsnapshot_operator.core.volumes import Seconds, VolumeId, volume_id
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.kube import content_parts
from vmsnapshot_operator.plan.orphans import Kept, Place
from vmsnapshot_operator.plan.report import clip


class Bound(Protocol):
    """What a content is bound to: one VMSnapshot, by namespace, name and UID."""

    @property
    def namespace(self) -> str:
        """Its namespace."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def uid(self) -> str:
        """Its UID."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The VMSnapshot that a content says it belongs to."""

    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} (uid {self.uid})"


def owner(body: Mapping[str, Any]) -> Owner:
    """Return the VMSnapshot that a content names, whether it exists or not; empty words where it names none."""
    ref = (body.get("spec") or {}).get("vmSnapshotRef")
    given = ref if isinstance(ref, Mapping) else {}
    return Owner(**{k: str(given.get(k, "")) for k in ("namespace", "name", "uid")})


def hypervisor(body: Mapping[str, Any]) -> str:
    """Return the name of the Hypervisor of the VM that a content is of; empty if it names none."""
    source = (body.get("spec") or {}).get("source")
    return str(source.get("hypervisorName", "")) if isinstance(source, Mapping) else ""


def kept(body: Mapping[str, Any], installation: str) -> Kept:
    """Return what a content proves of what the storage holds; `problem` if it proves nothing."""
    bound = owner(body)
    record = from_body(body, bound, installation)
    return Kept(
        name=record.name,
        uid=bound.uid,
        vm=Place(hypervisor(body), record.plan.vm_uuid),
        attempt=record.attempt,
        names=frozenset(g.request.name for g in record.groups.values()),
        ready=tuple(record.groups.values()) if record.ready and record.failure is None else (),
        problem=record.problem,
    )


def name_for(uid: str) -> str:
    """Return the name of the content of the VMSnapshot with this uid."""
    return content_name(uid)


def to_body(record: Record, request: Request, installation: str) -> dict[str, Any]:
    """Return the whole VMSnapshotContent; it replaces only the version that the record was read from, if there was one.

    Raises RefusedError if something of it does not fit the schema, which nobody may cut short (a path, a handle).
    """
    meta: dict[str, Any] = {
        "name": record.name,
        "labels": {
            LABEL_INSTALLATION: installation,
            LABEL_SNAPSHOT_NAMESPACE: request.namespace,
            LABEL_SNAPSHOT_UID: request.uid,
        },
    }
    if record.version:
        meta["resourceVersion"] = record.version
    try:
        spec = content_parts.to_spec(record, request, installation)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors(include_input=False)
        )
        text = f"what would be held cannot be written down, so nothing is taken: {found}"
        raise RefusedError(clip(text), reason="InvalidObject") from None
    return {"apiVersion": API_VERSION, "kind": KIND.name, "metadata": meta, "spec": spec.to_body()}


def from_body(body: Mapping[str, Any], request: Bound, installation: str) -> Record:
    """Return what a content says of this VMSnapshot. Never raises: what cannot be trusted gets a `problem`.

    `foreign` is one that is bound to another object or was written by another installation. A content whose request names do
    not follow from the installation, the object, the attempt, and the class and volumes of each group was changed by another
    hand: its names and handles are never used.
    """
    name = str(body["metadata"].get("name", ""))
    version = str(body["metadata"].get("resourceVersion", ""))
    if stranger := _stranger(body.get("spec") or {}, name, request, installation):
        return _unusable(name, version, stranger, foreign=True)
    try:
        spec = VMSnapshotContentSpec.from_body(body.get("spec") or {})
        _check(spec, request, installation)
        return content_parts.to_record(spec, name, version)
    except RefusedError as error:
        return _unusable(name, version, error.message)


def _unusable(name: str, version: str, why: str, *, foreign: bool = False) -> Record:
    """A record of which nothing can be used: it names no volume, no request and no handle."""
    text = f'VMSnapshotContent "{name}" cannot be trusted, and nothing that it names is used: {why}'
    return Record(name=name, attempt=1, plan=_NO_PLAN, groups={}, problem=clip(text), foreign=foreign, version=version)


_NO_PLAN = Plan(
    vm_name="",
    vm_uuid="",
    endpoint="",
    run_id=-1,
    power=PowerState.UNKNOWN,
    strategy="",
    strategy_reason="",
    quiesce=QuiesceChoice(method="None", reason="", budget=Seconds(0.0)),
    volumes=(),
    groups=(),
)


def _stranger(spec: Mapping[str, Any], name: str, request: Bound, installation: str) -> str:
    """Why it is somebody else's; told apart before the rest is understood, since what is not ours is never deleted."""
    ref = spec.get("vmSnapshotRef")
    bound = (
        tuple(str(ref.get(k, "")) for k in ("namespace", "name", "uid")) if isinstance(ref, Mapping) else ("", "", "")
    )
    if bound != (request.namespace, request.name, request.uid):
        return f"it belongs to VMSnapshot {bound[0]}/{bound[1]} (uid {bound[2]})"
    if name != name_for(request.uid):
        return f"the content of this VMSnapshot would be named {name_for(request.uid)}"
    if spec.get("installation") != installation:
        return f"it was written by installation {spec.get('installation')}, and this is {installation}"
    return ""


def _check(spec: VMSnapshotContentSpec, request: Bound, installation: str) -> None:
    """Raise RefusedError unless all that identifies something on storage follows from the object that it is bound to."""
    for volume in spec.volumes:
        if volume_id(content_parts.to_layer(volume.writable)) != volume.id:
            raise RefusedError(f"the id of disk {volume.target} does not follow from its source")
    ids = [v.id for v in spec.volumes]
    if len(set(ids)) != len(ids):
        raise RefusedError("it names one volume twice")
    classes = [g.class_name for g in spec.groups]
    if sorted(classes) != sorted({v.class_name for v in spec.volumes}):
        raise RefusedError("its groups are not those of its volumes")
    for group in spec.groups:
        members = [VolumeId(v.id) for v in spec.volumes if v.class_name == group.class_name]
        wanted = names.request_name(installation, request.uid, spec.attempt, group.class_name, members)
        if group.request_name != wanted:
            raise RefusedError(
                f"class {group.class_name} is said to hold {group.request_name}, and would hold {wanted}"
            )
