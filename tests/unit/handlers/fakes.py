"""Stand-ins for what the handlers work with: a cluster, a class's process, a hypervisor; and a world made of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.driver import CutResult
from vmsnapshot_operator.core.effects import RecordedGroup
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.errors import ConflictError, DriverError, GuardianError, KubeUnavailableError, SnapshotError
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint
from vmsnapshot_operator.hypervisors.domains import Gated, Ref, Sighting
from vmsnapshot_operator.strategies.world import World
from vmsnapshot_operator.telemetry.metrics import Metrics


@dataclass
class FakeEvents:
    """Events that were posted, as `reason: message`."""

    posted: list[str] = field(default_factory=list)

    async def emit(self, _body: Mapping[str, Any], _type: str, reason: str, message: str) -> None:
        self.posted.append(f"{reason}: {message}")


@dataclass
class FakeLeadership:
    leader: bool = True
    term: int = 1
    left: float = 10.0

    def is_leader(self, margin_seconds: float = 0.0) -> bool:
        return self.leader and margin_seconds < self.left


@dataclass
class FakeCluster:
    """Objects by name; statuses that were written. `down`: the API server does not answer."""

    contents_by_name: dict[str, dict[str, Any]] = field(default_factory=dict)
    snapshots: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    statuses: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    deleted: list[tuple[str, str | None]] = field(default_factory=list)
    lists: int = 0
    down: bool = False
    restores: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    hypervisors: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    async def restore(self, namespace: str, name: str) -> dict[str, Any] | None:
        self._ask()
        return self.restores.get((namespace, name))

    async def hypervisor_names(self) -> tuple[str, ...]:
        self._ask()
        return self.hypervisors

    async def class_names(self) -> tuple[str, ...]:
        self._ask()
        return self.classes

    async def namespace_labels(self, name: str) -> dict[str, str]:
        self._ask()
        return {"kubernetes.io/metadata.name": name}

    def _ask(self) -> None:
        if self.down:
            raise KubeUnavailableError("the API server cannot be reached")

    async def content(self, name: str) -> dict[str, Any] | None:
        self._ask()
        return self.contents_by_name.get(name)

    async def contents(self) -> AsyncIterator[dict[str, Any]]:
        self._ask()
        self.lists += 1
        for body in list(self.contents_by_name.values()):
            yield body

    async def snapshot(self, namespace: str, name: str) -> dict[str, Any] | None:
        self._ask()
        return self.snapshots.get((namespace, name))

    async def snapshot_uids(self) -> frozenset[str]:
        self._ask()
        return frozenset(b["metadata"]["uid"] for b in self.snapshots.values())

    async def restores_under_way(self) -> frozenset[str]:
        self._ask()
        return frozenset(b["metadata"]["uid"] for b in self.restores.values() if b["metadata"].get("finalizers"))

    async def delete_content(self, name: str, uid: str | None) -> None:
        self._ask()
        self.deleted.append((name, uid))
        self.contents_by_name.pop(name, None)

    async def secret(self, _name: str) -> dict[str, str]:
        self._ask()
        return {"username": "u"}

    async def _write(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        self._ask()
        name = body["metadata"]["name"]
        self.statuses.append((name, dict(status)))
        if name in self.contents_by_name:
            self.contents_by_name[name] = {**self.contents_by_name[name], "status": dict(status)}
        return {**body, "status": dict(status)}

    write_content_status = write_class_status = write_hypervisor_status = write_snapshot_status = _write
    write_restore_status = _write

    async def replace_content(self, _body: Mapping[str, Any]) -> dict[str, Any]:
        raise ConflictError("not in these tests")


@dataclass
class FakeHost:
    """A class's process: what storage holds; `hangs`: it answers only after so many seconds, `broken`: not at all."""

    held: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    hangs: float = 0.0
    broken: str = ""
    undeletable: set[str] = field(default_factory=set)
    lists: list[float] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    async def list(self, prefix: str, *, timeout: float) -> tuple[str, ...]:  # noqa: ASYNC109 - as the real one
        self.lists.append(asyncio.get_running_loop().time())
        await self._answer(timeout)
        return tuple(sorted(n for n in self.held if n.startswith(prefix)))

    async def missing(self, cuts: Sequence[CutResult], *, timeout: float) -> frozenset[str]:  # noqa: ASYNC109 - as the real one
        await self._answer(timeout)
        return frozenset(h for c in cuts for h in c.handles.values() if h in self.gone)

    async def delete(self, name: str, *, timeout: float) -> None:  # noqa: ASYNC109 - as the real one
        await self._answer(timeout)
        if name in self.undeletable:
            raise DriverError("the pool is read-only")
        self.deleted.append(name)
        self.held.discard(name)

    async def _answer(self, timeout: float) -> None:  # noqa: ASYNC109 - as the real one
        if self.hangs > timeout:
            await asyncio.sleep(timeout)
            raise DriverError("did not answer in time", retryable=True)
        await asyncio.sleep(self.hangs)
        if self.broken:
            raise DriverError(self.broken)


@dataclass
class FakeClasses:
    """Classes that have nothing but a process each."""

    by_name: dict[str, FakeHost] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    known: tuple[StorageClass, ...] = ()

    def all(self) -> tuple[StorageClass, ...]:
        return self.known

    def host(self, name: str) -> FakeHost | None:
        return self.by_name.get(name)

    def hosts(self) -> dict[str, FakeHost]:
        return dict(self.by_name)

    async def host_of_record(self, group: RecordedGroup) -> FakeHost:
        return self.by_name[group.class_name]

    def serves(self, group: RecordedGroup) -> bool:
        return group.parameters.get("edited") is None

    def note_findings(self, name: str, found: Any) -> None:
        self.found[name] = found

    def body(self, name: str) -> dict[str, Any]:
        return {"metadata": {"name": name}}


@dataclass
class FakeGuardian:
    """A guardian that follows these libvirts; None: it does not answer."""

    followed: dict[str, bool] | None = None
    folder: Path = Path("run")

    async def ping(self) -> dict[str, bool]:
        if self.followed is None:
            raise GuardianError("the guardian does not answer")
        return self.followed


@dataclass
class FakeClient:
    """A hypervisor whose VMs bear these journals."""

    sightings: list[Sighting] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    error: SnapshotError | None = None
    closed: bool = False
    uris: tuple[str, ...] = ("test:///host",)
    files: tuple[OverlayFile, ...] = ()
    silent: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    hangs: float = 0.0
    elsewhere: set[str] = field(default_factory=set)  # VMs that stand still by another disk than one with an overlay
    left: list[tuple[str, str]] = field(default_factory=list)
    gated: tuple[Gated, ...] = ()
    gates_silent: dict[str, str] = field(default_factory=dict)
    seen: tuple[Checkpoint, ...] = ()
    off: bool = False

    async def clear_left(self, ref: Ref, nonce: str) -> None:
        self.left.append((ref.endpoint, nonce))
        self.sightings = [s for s in self.sightings if s.ref != ref or s.journal is None or s.journal.nonce != nonce]

    async def all_checkpoints(self, prefix: str) -> tuple[Checkpoint, ...]:
        if self.error is not None:
            raise self.error
        return tuple(c for c in self.seen if c.name.startswith(prefix))

    def overlays(self, _ref: Ref) -> FakeClient:
        return self

    async def stalled(self, overlays: Mapping[str, str]) -> bool:
        held = (s for s in self.sightings if s.journal is not None and s.journal.overlays == overlays)
        return any(s.stalled and s.ref.name not in self.elsewhere for s in held)

    async def find(self, domain: str) -> Ref:
        return Ref(uuid=domain, name=domain, endpoint="host")

    def checkpoints(self, _ref: Ref) -> FakeClient:
        return self

    async def remove(self, asked: Mapping[str, str]) -> frozenset[str]:
        if self.off:
            return frozenset(asked)
        self.seen = tuple(c for c in self.seen if c.name not in asked)
        return frozenset()

    disks: dict[str, str] = field(default_factory=dict)

    async def users(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        return {n: d for n in names for path, d in self.disks.items() if n in path}, self.silent

    async def gates(self) -> tuple[tuple[Gated, ...], dict[str, str]]:
        return self.gated, self.gates_silent

    async def overlay_files(self, prefix: str, pool: str = "") -> tuple[tuple[OverlayFile, ...], dict[str, str]]:
        await asyncio.sleep(self.hangs)
        return tuple(f for f in self.files if f.name.startswith(prefix)), self.silent

    async def remove_overlay(self, file: OverlayFile) -> None:
        if self.error is not None:
            raise self.error
        self.removed.append(file.path)
        self.files = tuple(f for f in self.files if f.path != file.path)

    async def sweep(self) -> list[Sighting]:
        if self.error is not None:
            raise self.error
        return list(self.sightings)

    async def reach(self) -> None:
        return

    async def read_journal(self, ref: Ref) -> Journal | None:
        return next((s.journal for s in self.sightings if s.ref == ref), None)

    async def about(self) -> dict[str, Any]:
        return {"domains": 1}

    async def close(self) -> None:
        self.closed = True


def world(*, installation: str, classes: FakeClasses | None = None, leader: bool = True) -> World:
    """A world of stand-ins; its parts are reached by `world.cluster` and so on."""
    return World(
        cluster=FakeCluster(),  # type: ignore[arg-type]  # a stand-in, as all of these
        events=FakeEvents(),  # type: ignore[arg-type]
        installation=installation,
        leadership=FakeLeadership(leader),  # type: ignore[arg-type]
        guardian=None,
        hypervisors=None,  # type: ignore[arg-type]
        classes=classes,  # type: ignore[arg-type]
        metrics=Metrics(),
    )
