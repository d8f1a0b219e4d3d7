"""Everything that the operator may do at the API server: one table, the same as the chart's RBAC (a test compares them).

Not what it does with it. A permission that stands here without a request that needs it is one too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vmsnapshot_operator.api.meta import GROUP
from vmsnapshot_operator.kube.cluster import INSTALLATION
from vmsnapshot_operator.kube.lease import NAME as LEASE


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Permission:
    """One verb on one resource (`subresource` and `name` may be empty). `own`: in the operator's own namespace only."""

    group: str
    resource: str
    verb: str
    subresource: str = ""
    name: str = ""
    own: bool = False

    def __str__(self) -> str:
        """Say it as `kubectl auth can-i` takes it."""
        where = f"{self.resource}.{self.group}" if self.group else self.resource
        where += f"/{self.name}" if self.name else ""
        return f"{self.verb} {where}" + (f" --subresource={self.subresource}" if self.subresource else "")


def needed() -> tuple[Permission, ...]:
    """Return all permissions, each once."""
    return tuple(_rows())


def _rows() -> Iterator[Permission]:
    # What administrators write: read, and tell how it is.
    for resource in ("hypervisors", "storagedriverclasses"):
        yield from _verbs(GROUP, resource, "get list watch")
        yield Permission(group=GROUP, resource=resource, verb="patch", subresource="status")
    # What tenants write: patch is for the finalizer, delete for ttlSeconds, create for the safety snapshot of a restore.
    yield from _verbs(GROUP, "vmsnapshots", "get list watch create patch delete")
    yield Permission(group=GROUP, resource="vmsnapshots", verb="patch", subresource="status")
    # The way back: patch is for the finalizer.
    yield from _verbs(GROUP, "vmrestores", "get list watch patch")
    yield Permission(group=GROUP, resource="vmrestores", verb="patch", subresource="status")
    # What is really held: written by the operator alone.
    yield from _verbs(GROUP, "vmsnapshotcontents", "get list watch create update delete")
    yield Permission(group=GROUP, resource="vmsnapshotcontents", verb="patch", subresource="status")
    # The labels by which a Hypervisor says which namespaces may snapshot which VMs.
    yield Permission(group="", resource="namespaces", verb="get")
    # Watching begins when a kind is installed, and `doctor` compares the schemas.
    yield from _verbs("apiextensions.k8s.io", "customresourcedefinitions", "list watch")
    # An event lies in the namespace of what it is about.
    yield Permission(group="events.k8s.io", resource="events", verb="create")
    # Credentials, by the names that Hypervisors and StorageDriverClasses give; never a list.
    yield Permission(group="", resource="secrets", verb="get", own=True)
    # The id of this installation, made once. What is created cannot be restricted by its name.
    yield Permission(group="", resource="configmaps", verb="get", name=INSTALLATION, own=True)
    yield Permission(group="", resource="configmaps", verb="create", own=True)
    # Who of several instances acts.
    yield Permission(group="coordination.k8s.io", resource="leases", verb="get", name=LEASE, own=True)
    yield Permission(group="coordination.k8s.io", resource="leases", verb="update", name=LEASE, own=True)
    yield Permission(group="coordination.k8s.io", resource="leases", verb="create", own=True)


def _verbs(group: str, resource: str, verbs: str) -> Iterator[Permission]:
    return (Permission(group=group, resource=resource, verb=v) for v in verbs.split())
