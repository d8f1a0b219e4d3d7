"""What a plan is: the request distilled, the candidates, the choices with their reasons. Not how it is made (`plan`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from vmsnapshot_operator.core.driver import Capabilities, Fit
from vmsnapshot_operator.core.volumes import Seconds, Volume, VolumeId


class Policy(StrEnum):
    """How much a snapshot needs the VM to stand still."""

    REQUIRE = "Require"
    PREFER = "Prefer"
    NEVER = "Never"


class Method(StrEnum):
    """How the VM is made to stand still; plug-ins add words of their own, so plans carry plain strings."""

    AUTO = "Auto"
    GUEST_AGENT = "GuestAgent"
    HYPERVISOR_SNAPSHOT = "HypervisorSnapshot"
    PAUSE = "Pause"
    NONE = "None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for in a VMSnapshot. Durations in seconds."""

    uid: str
    namespace: str
    name: str
    generation: int
    created: datetime
    hypervisor: str
    domain: str
    policy: Policy = Policy.PREFER
    method: str = Method.AUTO
    max_frozen_seconds: int | None = None
    mountpoints: tuple[str, ...] = ()
    strategy: str = "Auto"
    exclude: tuple[str, ...] = ()
    deadline_seconds: int = 600
    ready_deadline_seconds: int = 86400
    retain: bool = False
    ttl_seconds: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """One way for a class to serve a disk: every part that is not empty must agree with the writable layer."""

    type: str = ""
    protocol: str = ""
    pool: str = ""
    source_pattern: str = ""
    format: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageClass:
    """A StorageDriverClass as the planner sees it. `ready` is None while its driver has not answered yet."""

    name: str
    driver: str
    priority: int = 0
    match: tuple[Match, ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    secret_name: str = ""
    allow_under_freeze: bool = False
    max_concurrent_cuts: int | None = None
    ready: bool | None = None
    problem: str = ""
    capabilities: Capabilities | None = None


class Patience(StrEnum):
    """How long a refusal may still be overcome by the world changing on its own."""

    SETTLE = "Settle"  # a few seconds: objects applied together arrive in any order
    WAIT = "Wait"  # until the deadline of the snapshot: something is busy or down


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why it cannot be done as things are; nothing was touched."""

    reason: str
    message: str
    patience: Patience = Patience.SETTLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """A disk or device left out, and by which rule."""

    name: str
    rule: str
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedVolume:
    """One volume with the class chosen for it, and why not the others. `unsafe`: its cache ignores flushes."""

    target: str
    volume: Volume
    class_name: str
    reason: str
    unsafe: bool = False
    covered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGroup:
    """The volumes of one operation that one class serves: the unit of a cut."""

    class_name: str
    driver: str
    parameters: Mapping[str, str]
    secret_name: str
    capabilities: Capabilities
    volumes: tuple[Volume, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlaySettings:
    """How overlays are kept on a hypervisor: `pool` of libvirt, bytes that must stay free there, bytes per second of a commit (0: any)."""

    pool: str
    min_free_bytes: int
    bandwidth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayRoom:
    """Where overlays of a hypervisor are kept. `free_bytes`: room there now; None, with the `problem`, if nobody can say."""

    pool: str
    min_free_bytes: int
    free_bytes: int | None = None
    problem: str = ""


THAW_TIMEOUT = Seconds(5.0)
"""What a healthy agent needs to thaw is a tenth of a second; a hung one is asked again after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuiesceChoice:
    """The chosen method, why, and how long the VM may be held (`budget`, seconds).

    `expected_filesystems`: how many the agent would freeze; 0: no freeze is sent. `overlay_pool`: where the overlays are made.
    `thaw_timeout`: so long one thaw may take to answer (seconds); the guest is free long before it does.
    """

    method: str
    reason: str
    budget: Seconds
    mountpoints: tuple[str, ...] = ()
    expected_filesystems: int = 0
    holds_vm: bool = False
    overlay_pool: str = ""
    thaw_timeout: Seconds = THAW_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All choices for one snapshot of one VM, as things are now."""

    vm_name: str
    vm_uuid: str
    endpoint: str
    run_id: int
    power: str
    strategy: str
    strategy_reason: str
    quiesce: QuiesceChoice
    volumes: tuple[PlannedVolume, ...]
    groups: tuple[PlannedGroup, ...]
    excluded: tuple[Excluded, ...] = ()
    notes: tuple[str, ...] = ()
    definition: str = ""

    @property
    def disks(self) -> tuple[PlannedVolume, ...]:
        """The volumes that are disks."""
        return tuple(v for v in self.volumes if not v.volume.is_nvram)

    @property
    def membership(self) -> tuple[tuple[str, tuple[VolumeId, ...]], ...]:
        """What is cut by whom: if it differs at two moments, they are two plans."""
        return tuple((g.class_name, tuple(v.id for v in g.volumes)) for g in self.groups)


Candidates = Mapping[VolumeId, Mapping[str, Fit]]
"""For each volume: what each matching class's driver answered."""
