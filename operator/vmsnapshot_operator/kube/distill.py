"""From the objects that users and administrators write to the core's own types. Pure.

The schema has refused bad input already; what an older schema or a hand in the database let through is refused here in plain
words, before anything is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from vmsnapshot_operator.api.hypervisor import AccessRule as AccessGiven
from vmsnapshot_operator.api.hypervisor import Endpoint as EndpointGiven
from vmsnapshot_operator.api.hypervisor import HypervisorSpec, Overlay
from vmsnapshot_operator.api.model import Model
from vmsnapshot_operator.api.storage_driver_class import Match as MatchGiven
from vmsnapshot_operator.api.storage_driver_class import StorageDriverClassSpec
from vmsnapshot_operator.api.vmrestore import Mode, RunningVM, VMRestoreSpec
from vmsnapshot_operator.api.vmsnapshot import DeletionPolicy, VMSnapshotSpec
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.planning import Match, OverlaySettings, Request, StorageClass
from vmsnapshot_operator.core.restoring import RestoreRequest
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.plan.access import AccessRule, Requirement

M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorSettings:
    """A Hypervisor object: where its VMs live, the Secret that opens it, and who may snapshot what."""

    name: str
    endpoints: tuple[Endpoint, ...]
    secret_name: str = ""
    access: tuple[AccessRule, ...] = ()
    overlay: OverlaySettings | None = None


def request(body: Mapping[str, Any]) -> Request:
    """Return what a VMSnapshot asks for; raises RefusedError."""
    meta = body["metadata"]
    spec = _parse(VMSnapshotSpec, body, "VMSnapshot")
    return Request(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        generation=int(meta.get("generation", 0)),
        created=moment(meta["creationTimestamp"]),
        hypervisor=spec.source.hypervisor_name,
        domain=spec.source.domain,
        policy=spec.quiesce.policy,
        method=spec.quiesce.method,
        max_frozen_seconds=spec.quiesce.max_frozen_seconds,
        mountpoints=spec.quiesce.mountpoints,
        strategy=spec.strategy_name,
        exclude=spec.volumes.exclude,
        deadline_seconds=spec.deadline_seconds,
        ready_deadline_seconds=spec.ready_deadline_seconds,
        retain=spec.deletion_policy is DeletionPolicy.RETAIN,
        ttl_seconds=spec.ttl_seconds,
        dry_run=spec.dry_run,
    )


def restore(body: Mapping[str, Any]) -> RestoreRequest:
    """Return what a VMRestore asks for; raises RefusedError."""
    meta = body["metadata"]
    spec = _parse(VMRestoreSpec, body, "VMRestore")
    return RestoreRequest(
        uid=meta["uid"],
        namespace=meta["namespace"],
        name=meta["name"],
        generation=int(meta.get("generation", 0)),
        created=moment(meta["creationTimestamp"]),
        snapshot=spec.snapshot_name,
        snapshot_uid=spec.snapshot_uid or "",
        new_name=spec.new_vm.name if spec.new_vm is not None and spec.mode is Mode.NEW_VM else "",
        include=spec.volumes.include,
        stop_running=spec.running_vm is RunningVM.STOP,
        start_after=spec.start_after,
        safety=spec.takes_safety_snapshot,
        deadline_seconds=spec.deadline_seconds,
    )


def storage_class(body: Mapping[str, Any]) -> StorageClass:
    """Return a StorageDriverClass as it is registered, whether its driver is ready or not; raises RefusedError."""
    spec = _parse(StorageDriverClassSpec, body, "StorageDriverClass")
    return StorageClass(
        name=body["metadata"]["name"],
        driver=spec.driver,
        priority=spec.priority,
        match=tuple(_match(m) for m in spec.match),
        parameters=dict(spec.parameters),
        secret_name=spec.secret_name or "",
        allow_under_freeze=spec.allow_under_freeze,
        max_concurrent_cuts=spec.max_concurrent_cuts,
    )


def hypervisor(body: Mapping[str, Any]) -> HypervisorSettings:
    """Return where VMs live and who may snapshot them; raises RefusedError."""
    spec = _parse(HypervisorSpec, body, "Hypervisor")
    return HypervisorSettings(
        name=body["metadata"]["name"],
        endpoints=tuple(_endpoint(e) for e in spec.libvirt.endpoints),
        secret_name=spec.libvirt.credentials_secret_name or "",
        access=tuple(_access(i, a) for i, a in enumerate(spec.access)),
        overlay=_overlay(spec.overlay) if spec.overlay is not None else None,
    )


def _overlay(given: Overlay) -> OverlaySettings:
    return OverlaySettings(
        pool=given.pool_name,
        min_free_bytes=given.min_free_bytes,
        bandwidth=given.bandwidth_bytes_per_second or 0,
    )


def moment(text: str) -> datetime:
    """Read a time as Kubernetes writes it; raises ValueError."""
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _parse(model: type[M], body: Mapping[str, Any], kind: str) -> M:
    try:
        return model.from_body(body.get("spec") or {})
    except RefusedError as error:
        raise RefusedError(f'{kind} "{body["metadata"]["name"]}": {error.message}', reason=error.reason) from error


def _match(rule: MatchGiven) -> Match:
    return Match(
        type=rule.type.value if rule.type is not None else "",
        protocol=rule.protocol or "",
        pool=rule.pool or "",
        source_pattern=rule.source_pattern or "",
        format=rule.format or "",
    )


def _endpoint(given: EndpointGiven) -> Endpoint:
    return Endpoint(
        driver=given.driver.value,
        transport=given.transport.value,
        host=given.host or "",
        port=given.port,
        socket_path=given.socket_path or "",
    )


def _access(index: int, access: AccessGiven) -> AccessRule:
    selector = access.namespace_selector
    labels = (Requirement(key=k, operator="In", values=(v,)) for k, v in sorted(selector.match_labels.items()))
    expressions = (
        Requirement(key=e.key, operator=e.operator.value, values=e.values) for e in selector.match_expressions
    )
    requirements = (*labels, *expressions)
    if not requirements:
        # In Kubernetes an empty selector means everything: nobody may give that away by forgetting a line.
        raise RefusedError(
            f"spec.access[{index}].namespaceSelector is empty, which would mean every namespace; name the namespaces",
            reason="InvalidObject",
        )
    return AccessRule(namespace=requirements, domains=access.domains)
