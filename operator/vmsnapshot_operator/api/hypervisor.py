"""Hypervisor: where VMs live, and who may snapshot them. Not how a connection is made (`hypervisors`)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from vmsnapshot_operator.api.conditions import Conditional
from vmsnapshot_operator.api.model import (
    AGE,
    LIST_TYPE,
    PATTERN_MESSAGE,
    Bytes,
    Column,
    Count,
    Kind,
    Message,
    Model,
    Name,
    Object,
    ObjectName,
    Path,
    Report,
    Time,
    Trimmed,
    Word,
    message_column,
    ready_column,
    rule,
    rules,
)


class LibvirtDriver(StrEnum):
    """Which of libvirt's drivers."""

    QEMU = "qemu"
    TEST = "test"


class Transport(StrEnum):
    """How libvirt is reached."""

    UNIX = "unix"
    TLS = "tls"
    TCP = "tcp"
    SSH = "ssh"


Host = Annotated[
    str,
    Field(
        max_length=253,
        pattern=r"^([A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)$",
        json_schema_extra={
            PATTERN_MESSAGE: "must be a host name or an IP address alone, without scheme, user, port or brackets"
        },
    ),
]

SocketPath = Annotated[
    str,
    Field(
        max_length=107,
        pattern=r"^/[^\x00-\x1f]*$",
        json_schema_extra={PATTERN_MESSAGE: "must be an absolute path, as /run/libvirt/libvirt-sock"},
    ),
]
"""Of a Unix socket: Linux takes no more than 107 characters."""


# An endpoint's defaults are ours alone: items of a list have none in the schema (see there).
_DRIVER = "(has(self.driver) ? self.driver : 'qemu')"
_TRANSPORT = "(has(self.transport) ? self.transport : 'unix')"


class Endpoint(Model):
    """One libvirt daemon. The libvirt URI is composed from these fields: one from a user could name commands, or switch verification off."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"{_DRIVER} != 'test' || ({_TRANSPORT} == 'unix' && !has(self.host) && !has(self.port) && !has(self.socketPath))",
                "driver test is libvirt's built-in double, without any daemon: leave transport, host, port and socketPath out,"
                " or use driver qemu",
                path=".driver",
            ),
            rule(
                f"{_DRIVER} == 'test' || {_TRANSPORT} != 'unix' || (!has(self.host) && !has(self.port))",
                "transport unix is a socket of this machine and takes no host or port: leave them out, or use transport tls,"
                " tcp or ssh",
                path=".transport",
            ),
            rule(f"{_TRANSPORT} == 'unix' || has(self.host)", "transports tls, tcp and ssh need a host", path=".host"),
            rule(
                f"{_DRIVER} == 'test' || {_TRANSPORT} == 'unix' || !has(self.socketPath)",
                "socketPath goes with transport unix only: leave it out, or use transport unix",
                path=".socketPath",
            ),
        )
    )

    driver: LibvirtDriver = LibvirtDriver.QEMU
    """qemu: QEMU and KVM, if nothing is said. test: libvirt's built-in double, which takes no snapshots."""
    transport: Transport = Transport.UNIX
    """How it is reached; unix if nothing is said. tls verifies both sides by certificates, ssh by key and known hosts; tcp protects nothing."""
    host: Host | None = None
    """Name or address of the machine, for tls, tcp and ssh."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port, if it is not the usual one of the transport (tls 16514, tcp 16509, ssh 22)."""
    socket_path: SocketPath | None = None
    """For unix: the daemon's socket, if it is not /run/libvirt/libvirt-sock."""


class Libvirt(Model):
    """How the hypervisor is reached."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.endpoints.all(e, self.endpoints.exists_one(o, o == e))",
                "two endpoints are the same: leave one out",
                path=".endpoints",
            ),
            rule(
                "self.endpoints.all(e, has(e.driver) && e.driver == 'test') || !self.endpoints.exists(e, has(e.driver) && e.driver == 'test')",
                "all endpoints need the same driver, since VMs migrate between them: make another Hypervisor for the others",
                path=".endpoints",
            ),
            rule(
                "has(self.credentialsSecretName) || !self.endpoints.exists(e, has(e.transport) && e.transport == 'ssh')",
                "transport ssh needs credentialsSecretName: a Secret in the operator's namespace with ssh-privatekey and"
                " known_hosts",
                path=".credentialsSecretName",
            ),
        )
    )

    endpoints: Annotated[
        tuple[Endpoint, ...], Field(min_length=1, max_length=64, json_schema_extra={LIST_TYPE: "atomic"})
    ]
    """The libvirt daemons. Several are one pool of hosts between which VMs may migrate: a VM is looked up on all of them."""
    credentials_secret_name: ObjectName | None = None
    """A Secret in the operator's own namespace: TLS client certificate, SSH key and known hosts, or user and password."""


LABEL_KEY = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"

LabelKey = Annotated[
    str,
    Field(
        max_length=317,
        pattern=LABEL_KEY,
        json_schema_extra={PATTERN_MESSAGE: "must be the key of a label, as kubernetes.io/metadata.name"},
    ),
]

LabelValue = Annotated[
    str,
    Field(
        max_length=63,
        pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$",
        json_schema_extra={PATTERN_MESSAGE: "must be the value of a label: letters, digits, '-', '_' and '.'"},
    ),
]


class SelectorOperator(StrEnum):
    """How a label is compared."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelRequirement(Model):
    """One expression of a label selector."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(self.operator in ['In', 'NotIn']) || (has(self.values) && self.values.size() > 0)",
                "operators In and NotIn need at least one of values",
                path=".values",
            ),
            rule(
                "!(self.operator in ['Exists', 'DoesNotExist']) || !has(self.values) || self.values.size() == 0",
                "operators Exists and DoesNotExist take no values: leave them out",
                path=".values",
            ),
        )
    )

    key: LabelKey
    """Key of the label."""
    operator: SelectorOperator
    """In, NotIn, Exists or DoesNotExist."""
    values: Annotated[tuple[LabelValue, ...], Field(max_length=16, json_schema_extra={LIST_TYPE: "set"})] = ()
    """Values to compare with, for In and NotIn."""


class LabelSelector(Model):
    """Objects by their labels; all parts must agree."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.matchLabels) && self.matchLabels.size() > 0) || (has(self.matchExpressions) && self.matchExpressions.size() > 0)",
                "an empty selector would mean every namespace: name one by matchLabels (kubernetes.io/metadata.name), or say"
                " every one by matchExpressions (key kubernetes.io/metadata.name, operator Exists)",
            )
        )
    )

    match_labels: Annotated[
        dict[str, LabelValue],
        Field(
            max_length=16,
            json_schema_extra=rules(
                rule(
                    f"self.all(k, k.size() <= 317 && k.matches('{LABEL_KEY}'))",
                    "the keys of matchLabels must be those of labels, as kubernetes.io/metadata.name",
                )
            ),
        ),
    ] = Field(default_factory=dict)
    """Labels that must be there with exactly these values."""
    match_expressions: Annotated[
        tuple[LabelRequirement, ...], Field(max_length=16, json_schema_extra={LIST_TYPE: "atomic"})
    ] = ()
    """Expressions that must hold."""


class AccessRule(Model):
    """Which namespaces may snapshot which VMs."""

    namespace_selector: LabelSelector
    """The namespaces. Prefer kubernetes.io/metadata.name: other labels may be the tenant's to edit."""
    domains: Annotated[tuple[Trimmed, ...], Field(min_length=1, max_length=64, json_schema_extra={LIST_TYPE: "set"})]
    """The VMs, by patterns of their names: * is any text, ? any character, [abc] one of these."""


class Overlay(Model):
    """Where overlays are kept while the quiesce method HypervisorSnapshot lets a VM write past its disks."""

    pool_name: Trimmed
    """A libvirt storage pool of each host."""
    min_free_bytes: Bytes = 1 << 30
    """So much must be free there, else no overlay is made; and while one grows, so much must stay free, else it is committed at once."""
    bandwidth_bytes_per_second: Annotated[int, Field(ge=1 << 20, le=1 << 40)] | None = None
    """How fast an overlay is committed at most; without it as fast as the storage can."""


class HypervisorSpec(Model):
    """How the hypervisor is reached, and who may snapshot its VMs."""

    libvirt: Libvirt
    """How the hypervisor is reached."""
    access: Annotated[tuple[AccessRule, ...], Field(max_length=64, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """Which namespaces may snapshot which VMs. Empty: nobody."""
    overlay: Overlay | None = None
    """Where overlays are kept; without it the quiesce method HypervisorSnapshot cannot be used here."""


class GuardianLayer(StrEnum):
    """Where a guardian runs that frees a VM when nobody else does."""

    SIDECAR = "Sidecar"
    SECOND_POD = "SecondPod"
    HOST = "Host"
    GUEST = "Guest"


class KeptOverlay(Report):
    """An overlay that nobody commits or removes any more: its base was changed, or the VM went on without it."""

    path: Path
    """Where it is."""
    endpoint: Name
    """On which endpoint."""
    domain: Name | None = None
    """The VM that has it among its disks; without it none has."""
    since_time: Time
    """Since when that is known."""
    message: Message
    """Why."""


class LeftGate(Report):
    """A VM whose disks a VMRestore has taken, which is gone: nobody gives them back."""

    domain: Name
    """The VM."""
    endpoint: Name
    """On which endpoint."""
    restore: Path | None = None
    """The VMRestore that has taken them, as namespace/name; without it that cannot be read."""
    since_time: Time
    """Since when that is known."""
    message: Message
    """Why."""


class HypervisorStatus(Conditional):
    """What was last seen of the hypervisor."""

    libvirt_version: Word | None = None
    """Version of libvirt."""
    hypervisor_version: Word | None = None
    """Version of the hypervisor itself."""
    domains: Count | None = None
    """How many VMs were seen on all endpoints."""
    held_domains: Annotated[tuple[Name, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """VMs that are still held by us and could not be freed yet (frozen or paused)."""
    overlay_domains: Annotated[tuple[Name, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "set"})] = ()
    """VMs that still write to an overlay of ours."""
    kept_overlays: Annotated[
        tuple[KeptOverlay, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "atomic"})
    ] = ()
    """Overlays of ours that are kept for good: see to them, nobody else does."""
    left_gates: Annotated[tuple[LeftGate, ...], Field(max_length=256, json_schema_extra={LIST_TYPE: "atomic"})] = ()
    """VMs that cannot be started, because a restore has taken their disks and is gone: see to them, nobody else does."""
    guardian_layers: Annotated[
        tuple[GuardianLayer, ...], Field(max_length=8, json_schema_extra={LIST_TYPE: "set"})
    ] = ()
    """Guardians that answered."""


class Hypervisor(Object):
    """A libvirt hypervisor, or a pool of them between which VMs migrate, and who may snapshot which of its VMs."""

    spec: HypervisorSpec
    """How the hypervisor is reached, and who may snapshot its VMs."""
    status: HypervisorStatus = HypervisorStatus()
    """What was last seen of the hypervisor."""


KIND = Kind(
    model=Hypervisor,
    name="Hypervisor",
    plural="hypervisors",
    short_names=("vmhv",),
    namespaced=False,
    columns=(
        Column(name="Domains", type="integer", path=".status.domains", description="VMs seen."),
        ready_column(),
        AGE,
        Column(
            name="Libvirt", type="string", path=".status.libvirtVersion", description="Version of libvirt.", wide=True
        ),
        Column(name="Held", type="string", path=".status.heldDomains", description="VMs still held by us.", wide=True),
        message_column(),
    ),
)
