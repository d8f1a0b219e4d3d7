"""`Hypervisor`: where VMs live, and who may snapshot which of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.base import Bytes, Count, Model, Name, Target, Word, rules
from vmsnapshot_operator.api.conditions import Status

Host = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:-]+$")]
Path = Annotated[str, Field(min_length=1, max_length=107, pattern=r"^/[^\s]*$")]


class Endpoint(Model):
    """One libvirt daemon. The URI is composed from these fields: a URI could name commands or switch verification off."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.transport != 'unix' || !has(self.host)", "transport unix takes no host: use socketPath, or another transport"),
            ("self.transport != 'unix' || !has(self.port)", "transport unix takes no port"),
            ("self.transport == 'unix' || has(self.host)", "transports tls, tcp and ssh need a host"),
            ("self.transport == 'unix' || !has(self.socketPath)", "socketPath goes with transport unix only"),
        )
    )
    driver: Annotated[Literal["qemu", "test"], Field(description="libvirt's driver; test is for trying things out.")] = "qemu"
    transport: Annotated[Literal["unix", "tls", "tcp", "ssh"], Field(description="How to reach the daemon.")] = "unix"
    host: Annotated[Host | None, Field(description="Host name or address, for tls, tcp and ssh.")] = None
    port: Annotated[int | None, Field(ge=1, le=65535, description="Port; libvirt's own by default.")] = None
    socket_path: Annotated[Path | None, Field(description="Socket for unix; /run/libvirt/libvirt-sock by default.")] = None


class Libvirt(Model):
    """How to reach libvirt."""

    endpoints: Annotated[
        list[Endpoint],
        Field(
            min_length=1, max_length=64,
            description="Several endpoints are one pool of hosts between which VMs may migrate: a VM is looked up on all.",
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ]
    credentials_secret_name: Annotated[
        Name | None,
        Field(description="Secret in the operator's own namespace: TLS client certificate, SSH key and known hosts, or user and password."),
    ] = None


class Requirement(Model):
    """One expression of a label selector."""

    key: Annotated[str, Field(min_length=1, max_length=317)]
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Annotated[list[Annotated[str, Field(max_length=63)]], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "atomic"})] = []


class NamespaceSelector(Model):
    """Namespaces by their labels; kubernetes.io/metadata.name is the one that a tenant cannot edit."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "(has(self.matchLabels) && size(self.matchLabels) > 0) || (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
                "an empty selector would mean every namespace; name them, or write matchExpressions with operator Exists",
            )
        )
    )
    match_labels: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)] = {}
    match_expressions: Annotated[list[Requirement], Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "atomic"})] = []


class Access(Model):
    """Who may snapshot what."""

    namespace_selector: Annotated[NamespaceSelector, Field(description="Namespaces that may.")]
    domains: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=253)]],
        Field(
            min_length=1, max_length=256, description="Names of domains, as globs (vm-*).",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ]


class Overlay(Model):
    """Where overlays of the quiesce method HypervisorSnapshot go."""

    pool_name: Annotated[Target, Field(description="libvirt storage pool.")]
    min_free_bytes: Annotated[Bytes, Field(description="Free space that must be left in it.")] = 1 << 30


class HypervisorSpec(Model):
    """Where VMs live."""

    libvirt: Libvirt
    access: Annotated[
        list[Access],
        Field(
            max_length=256, description="Which namespaces may snapshot which domains. Empty: nobody.",
            json_schema_extra={"x-kubernetes-list-type": "atomic"},
        ),
    ] = []
    overlay: Annotated[Overlay | None, Field(description="Where overlays go; without it no VM is snapshotted through one.")] = None


class HypervisorStatus(Status):
    """What was seen of it."""

    libvirt_version: Word = ""
    hypervisor_version: Word = ""
    domains: Annotated[Count, Field(description="Domains seen on all endpoints.")] = 0
    held_domains: Annotated[
        list[Annotated[str, Field(max_length=253)]],
        Field(max_length=256, description="Domains still held by us, found by the sweep.", json_schema_extra={"x-kubernetes-list-type": "set"}),
    ] = []
    guardians: Annotated[Count, Field(description="Guardian layers that answered.")] = 0
