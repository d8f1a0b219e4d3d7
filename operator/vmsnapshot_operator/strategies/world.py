"""What a workflow works with: the live connections of this process, and what it remembers between two looks at an object.

Everything in `Memory` may be lost at any moment without harm: safety rests on names, journals and contents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from vmsnapshot_operator.core.effects import Failure, RecordedGroup, SnapshotStrategy
from vmsnapshot_operator.core.evidence import WindowOutcome
from vmsnapshot_operator.core.planning import OverlaySettings, StorageClass
from vmsnapshot_operator.core.volumes import Layer, Seconds, VolumeId
from vmsnapshot_operator.drivers.host import DriverHost, Slot
from vmsnapshot_operator.hypervisors.domains import Hypervisor
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.kube.events import Events
from vmsnapshot_operator.kube.lease import Leadership
from vmsnapshot_operator.plan.access import AccessRule
from vmsnapshot_operator.telemetry.metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveHypervisor:
    """A Hypervisor object with its connections. `problem`: why it cannot be used; `client` is then None."""

    name: str
    access: tuple[AccessRule, ...] = ()
    overlay: OverlaySettings | None = None
    client: Hypervisor | None = None
    problem: str = ""


class LiveClasses(Protocol):
    """The StorageDriverClass objects with the processes that host their drivers."""

    def all(self) -> tuple[StorageClass, ...]:
        """All classes as the planner sees them."""
        ...

    def host(self, class_name: str) -> DriverHost | None:
        """The host of a class's driver, or None while there is none."""
        ...

    async def host_of_record(self, group: RecordedGroup) -> DriverHost:
        """A host for what was cut with these parameters, even if the class was changed or deleted since."""
        ...

    def note_cut(self, class_name: str, seconds: float) -> None:
        """A group was cut in so long: kept for the class's status."""
        ...


class LiveHypervisors(Protocol):
    """The Hypervisor objects with their connections."""

    def get(self, name: str) -> LiveHypervisor | None:
        """The hypervisor of this name, or None."""
        ...


@dataclass(slots=True)
class Prepared:
    """An attempt that was prepared and not yet tried: it owns the reserved driver processes.

    `overlays`: their paths; `targets`: by class, the volumes into which the hypervisor is to copy; `since`: of which disks (by target) only
    what changed, and since which checkpoint; `told`: by class, what is to be said of that.
    """

    attempt: int
    slots: Mapping[str, Slot]
    stack: AsyncExitStack
    overlays: Mapping[VolumeId, str] = field(default_factory=dict)
    targets: Mapping[str, Mapping[VolumeId, Layer]] = field(default_factory=dict)
    since: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)


class Listening(NamedTuple):
    """For which attempt this process hears how the hypervisor's copy ends, since when, and on which endpoint the copy was begun."""

    attempt: int
    since: Seconds
    endpoint: str


@dataclass(slots=True)
class Memory:
    """What this process remembers of one VMSnapshot between two looks, while it is the leader (`term`, see `kube.lease`).

    `whole`: the attempt whose copy by the hypervisor was proved whole. `copied` by class and `committed` by disk: bytes done and to do of
    what is under way.
    """

    since: Seconds
    prepared: Prepared | None = None
    outcome: WindowOutcome | None = None
    broken: Failure | None = None
    agent_failed: str = ""
    listening: Listening | None = None
    whole: int | None = None
    copied: dict[str, tuple[int, int]] = field(default_factory=dict)
    committed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trouble: str = ""
    retry_at: Seconds | None = None
    failures: int = 0
    term: int = 0

    async def enter(self, term: int) -> None:
        """Forget what was prepared or taken in an earlier term: the leader of the meantime may have rolled it back."""
        if term != self.term:
            await self.drop_prepared()
            self.outcome = None
            self.term = term

    async def drop_prepared(self) -> None:
        """Give the reserved driver processes back."""
        prepared, self.prepared = self.prepared, None
        if prepared is not None:
            await prepared.stack.aclose()


def clock() -> Seconds:
    """Read the clock that is never set, for all that this process measures by itself."""
    return Seconds(time.clock_gettime(time.CLOCK_BOOTTIME))


def now() -> datetime:
    """Read this machine's wall clock, for people; nothing is decided by it."""
    return datetime.now(UTC)


@dataclass(slots=True, kw_only=True)
class World:
    """The surroundings of all workflows of one process.

    `known` tells whether a VMSnapshot of this UID exists and its content, `uids` those of all VMSnapshots; `lost`, by class and UID, what was not found on
    storage although it is on record; `kept`, by path, why an overlay is never committed.
    """

    cluster: Cluster
    events: Events
    installation: str
    leadership: Leadership
    guardian: GuardianLink | None
    hypervisors: LiveHypervisors
    classes: LiveClasses
    metrics: Metrics
    strategies: Mapping[str, SnapshotStrategy] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)
    lost: dict[str, Mapping[str, str]] = field(default_factory=dict)
    known: Callable[[str], bool] = lambda _uid: True
    uids: Callable[[], frozenset[str]] = frozenset
    kept: dict[str, str] = field(default_factory=dict)

    def now(self) -> datetime:
        """The time at the API server, in which deadlines are given."""
        return self.cluster.client.clock.now()

    def memory(self, uid: str) -> Memory:
        """What is remembered of this object; made at first sight."""
        if uid not in self.memories:
            self.memories[uid] = Memory(since=clock())
        return self.memories[uid]

    def lost_of(self, uid: str) -> str:
        """What a look at the storages did not find of a VMSnapshot that is Ready; empty if all was there."""
        return "; ".join(
            f'class "{c}": of disk {f[uid]} the storage does not hold what was cut any more'
            for c, f in sorted(self.lost.items())
            if uid in f
        )

    def claim(self, domain: str, uid: str) -> bool:
        """Take the one operation that a domain may have; True if it is this object's now."""
        if self.claims.setdefault(domain, uid) != uid:
            return False
        for other in [d for d, holder in self.claims.items() if holder == uid and d != domain]:
            del self.claims[other]  # the VM was defined anew since the last attempt: another UUID
        return True

    def release(self, uid: str) -> None:
        """Give back what `claim` took."""
        for domain in [d for d, holder in self.claims.items() if holder == uid]:
            del self.claims[domain]

    async def forget(self, uid: str) -> None:
        """The object is gone: free all that was kept for it."""
        memory = self.memories.get(uid)
        if memory is not None:
            self.release(uid)
            await memory.drop_prepared()
            self.memories.pop(uid, None)
