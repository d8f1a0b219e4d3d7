"""The operator as a whole: what is started in which order, and ended in the other. Kopf watches; our queue works.

Kopf's event handlers are not retried and must not block, so each of them only puts a key into the keyed queue.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import kopf

from vmsnapshot_operator.api.meta import GROUP, LABEL_SAFETY_OF, VERSION, content_name, label_of
from vmsnapshot_operator.drivers.fence import Fence
from vmsnapshot_operator.errors import KubeError
from vmsnapshot_operator.handlers.classes import Classes
from vmsnapshot_operator.handlers.contents import Contents
from vmsnapshot_operator.handlers.hypervisors import Hypervisors
from vmsnapshot_operator.handlers.orphans import Known, OrphanScan
from vmsnapshot_operator.handlers.queue import RESYNC_SECONDS, WorkQueue
from vmsnapshot_operator.handlers.reconcile import Reconciler
from vmsnapshot_operator.handlers.restores import Restores
from vmsnapshot_operator.handlers.unfinished import Doing, Unfinished
from vmsnapshot_operator.hypervisors.calls import left_behind
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink
from vmsnapshot_operator.kube.cluster import Cluster, has_finalizer
from vmsnapshot_operator.kube.events import Events
from vmsnapshot_operator.kube.lease import Durations, Leadership
from vmsnapshot_operator.quiesce import base as quiesce
from vmsnapshot_operator.strategies import registry
from vmsnapshot_operator.strategies.window import LEASE_LOOK, LEASE_MARGIN
from vmsnapshot_operator.strategies.world import World
from vmsnapshot_operator.telemetry import logs
from vmsnapshot_operator.telemetry.health import Heartbeats
from vmsnapshot_operator.telemetry.http import TelemetryServer
from vmsnapshot_operator.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

SNAPSHOTS, CONTENTS, RESTORES = "vmsnapshots", "vmsnapshotcontents", "vmrestores"
CLASSES, HYPERVISORS = "storagedriverclasses", "hypervisors"
WORKERS = 64
"""Looks at objects at once. They wait far more than they work, some for an agent or a storage that hangs: those must not be all
of them. What they ask is bounded per host and per class."""
BEAT_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the operator is run. `guardian_socket` empty: no VM is ever frozen or paused. `lease_seconds`: see `kube.lease`."""

    namespace: str
    kubeconfig: Path | None = None
    guardian_socket: Path | None = None
    telemetry_port: int = 8080
    telemetry_host: str = "0.0.0.0"  # noqa: S104 - probes and scrapes come from outside the pod
    identity: str = ""
    lease_seconds: float = 10.0


class Key(NamedTuple):
    """What the queue works on."""

    kind: str
    namespace: str
    name: str
    uid: str


class Operator:
    """Everything that lives as long as the process. `start` and `stop` are called by kopf."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stack = AsyncExitStack()
        self._bodies: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._snapshots: set[Key] = set()
        self._restoring: dict[Key, bool] = {}  # whether it bears our finalizer
        self._early: list[Key] = []
        self._world: World | None = None
        self._reconciler: Reconciler | None = None
        self._restores: Restores | None = None
        self._queue: WorkQueue[Key] | None = None
        self._classes: Classes | None = None
        self._contents: Contents | None = None
        self._hypervisors = Hypervisors()
        self._unfinished = Unfinished()
        self.heartbeats = Heartbeats()

    async def start(self) -> None:
        """Connect to everything; raises SnapshotError when the API server cannot be used."""
        options = self._options
        identity = options.identity or f"{os.uname().nodename}-{os.getpid()}"
        cluster = await self._stack.enter_async_context(
            Cluster(namespace=options.namespace, kubeconfig=options.kubeconfig, on_secret=logs.hide)
        )
        metrics = Metrics()
        telemetry = TelemetryServer(metrics, self.heartbeats, host=options.telemetry_host, port=options.telemetry_port)
        await self._stack.enter_async_context(telemetry)
        installation = await cluster.installation()
        fence = Fence()
        self._stack.callback(fence.close)
        leadership = Leadership(
            cluster,
            identity=identity,
            durations=Durations.of(options.lease_seconds),
            told=lambda until: fence.tell(
                until - LEASE_MARGIN / 2
            ),  # where it lives, this process has ended them before
        )
        guardian = GuardianLink(options.guardian_socket) if options.guardian_socket is not None else None
        if guardian is not None:
            self._stack.push_async_callback(guardian.close)
        self._classes = Classes(cluster, leading=leadership.is_leader, fence=fence.fd)
        self._stack.push_async_callback(self._classes.close)
        self._stack.push_async_callback(self._hypervisors.close)
        self._world = World(
            cluster=cluster,
            events=Events(cluster, instance=identity),
            installation=installation,
            leadership=leadership,
            guardian=guardian,
            hypervisors=self._hypervisors,
            classes=self._classes,
            metrics=metrics,
        )
        self._contents = Contents(
            self._world,
            exists=lambda o: Key(SNAPSHOTS, o.namespace, o.name, o.uid) in self._snapshots,
            wake=lambda n: self._add(Key(CONTENTS, "", n, "")),
        )
        self._world.known = self._is_known
        self._world.uids = lambda: frozenset(k.uid for k in self._snapshots)
        self._world.strategies = registry.load(self._world)
        await asyncio.to_thread(quiesce.load)
        self._reconciler = Reconciler(self._world, lambda ns, n, uid: self._add(Key(SNAPSHOTS, ns, n, uid)))
        self._restores = Restores(self._world, lambda ns, n, uid: self._add(Key(RESTORES, ns, n, uid)))
        # Ended after the reconciler, whose windows need the lease to the last.
        self._keep(asyncio.create_task(leadership.run()))
        self._stack.push_async_callback(self._reconciler.close)
        self._stack.push_async_callback(self._restores.close)
        self._stack.push_async_callback(self._contents.close)
        self._queue = WorkQueue(self._work, workers=WORKERS, resync=self._all)
        metrics.watch_queue(lambda: self._queue.depth if self._queue is not None else 0)
        metrics.watch_leadership(leadership.is_leader)
        metrics.watch_left_behind(left_behind)
        metrics.watch_unfinished(
            {doing: partial(self._oldest, doing) for doing in Doing}, leftovers=self._unfinished.leftovers
        )
        scan = OrphanScan(
            self._world,
            self._classes,
            known=self._known,
            proven=self._hypervisors.proven,
            told=self._look_at_class,
            lost=self._look_at_snapshots,
        )
        for task in (
            self._queue.run(),
            self._beat(metrics),
            scan.run(),
            self._fence(leadership),
            self._list_again(cluster),
        ):
            self._keep(asyncio.create_task(task))
        for key in self._early:
            self._queue.add(key)
        self._early.clear()
        log.info("installation %s, instance %s", installation, identity)

    async def stop(self) -> None:
        """End everything, windows first: no guest is left frozen by a shutdown."""
        await self._stack.aclose()

    def seen(self, kind: str, event: Mapping[str, Any]) -> None:
        """Take one event of a watch."""
        body: Mapping[str, Any] = event["object"]
        self.heartbeats.beat(f"watch {kind}")
        meta = body["metadata"]
        key = Key(kind, meta.get("namespace", ""), meta["name"], meta["uid"])
        gone = event.get("type") == "DELETED"
        if kind == CONTENTS:
            if self._contents is not None:
                (self._contents.gone(key.name) if gone else self._contents.seen(body))
            self._add(Key(CONTENTS, "", key.name, ""))
            ref = (body.get("spec") or {}).get("vmSnapshotRef") or {}
            key = Key(SNAPSHOTS, ref.get("namespace", ""), ref.get("name", ""), ref.get("uid", ""))
            if key not in self._snapshots:
                return
        elif gone:
            self._gone(key)
        elif kind == RESTORES:
            self._restoring[key] = has_finalizer(body)
        elif kind == SNAPSHOTS:
            self._snapshots.add(key)
            self._unfinished.seen(body)
        else:
            self._bodies[(kind, key.name)] = _plain(body)
            if kind == CLASSES and self._classes is not None:
                self._classes.expect(body)
            elif kind == HYPERVISORS:
                self._hypervisors.expect(body)
        if kind == SNAPSHOTS and (label := (meta.get("labels") or {}).get(LABEL_SAFETY_OF)):
            self._wake_restores(key.namespace, label)
        self._add(key)

    def _gone(self, key: Key) -> None:
        """Forget an object that was deleted; the queue sees to what it leaves."""
        if key.kind == RESTORES:
            self._restoring.pop(key, None)
        elif key.kind == SNAPSHOTS:
            self._snapshots.discard(key)
            self._unfinished.gone(key.uid)
            self._add(Key(CONTENTS, "", content_name(key.uid), ""))
        else:
            self._bodies.pop((key.kind, key.name), None)

    def _watched(self) -> frozenset[Key]:
        """All objects that are known by a watch alone. Of a content, its own look finds out that it is gone."""
        others = (Key(kind, "", name, body["metadata"]["uid"]) for (kind, name), body in self._bodies.items())
        return frozenset((*self._snapshots, *self._restoring, *others))

    async def _forget_missed(self, cluster: Cluster) -> None:
        """Forget what is gone although no watch has told it: one that began anew shows what is there, and nothing else."""
        before = self._watched()
        there = await cluster.uids()
        for key in before & self._watched():
            if key.uid not in there:
                log.warning("%s %s is gone, and the watch did not tell it", key.kind, key.name)
                self._gone(key)
                self._add(key)

    async def _list_again(self, cluster: Cluster) -> None:
        while True:
            await asyncio.sleep(RESYNC_SECONDS)
            try:
                await self._forget_missed(cluster)
            except KubeError as error:
                log.info("whether a watch has missed a deletion is not known: %s", error.message)

    def _wake_restores(self, namespace: str, label: str) -> None:
        """A restore goes on as soon as its safety snapshot is there."""
        for key in self._restoring:
            if key.namespace == namespace and label_of(key.name) == label:
                self._add(key)

    def _all(self) -> list[Key]:
        """Everything that is looked at again now and then, whether anything happened to it or not."""
        kept = self._contents.names() if self._contents is not None else ()
        return [*self._snapshots, *self._restoring, *(Key(CONTENTS, "", n, "") for n in kept)]

    def _is_known(self, uid: str) -> bool:
        """Whether a VMSnapshot of this UID exists, and what is on record of it: without its content nobody goes on with it."""
        kept = self._contents.names() if self._contents is not None else ()
        return any(k.uid == uid for k in self._snapshots) and content_name(uid) in kept

    def _known(self) -> Known:
        kept = self._contents.kept() if self._contents is not None else ()
        return Known(
            contents=kept,
            snapshots=frozenset(k.uid for k in self._snapshots),
            restores=frozenset(k.uid for k, begun in self._restoring.items() if begun),
        )

    def _oldest(self, doing: Doing) -> float:
        return self._unfinished.oldest(doing, self._world.now()) if self._world is not None else 0.0

    def _look_at_class(self, name: str) -> None:
        if (body := self._bodies.get((CLASSES, name))) is not None:
            self._add(Key(CLASSES, "", name, body["metadata"]["uid"]))

    def _look_at_snapshots(self, uids: AbstractSet[str]) -> None:
        for key in [k for k in self._snapshots if k.uid in uids]:
            self._add(key)

    def _add(self, key: Key) -> None:
        if self._queue is None:
            self._early.append(key)
        else:
            self._queue.add(key)

    async def _work(self, key: Key) -> float | None:
        assert self._world is not None, "the queue runs after start"  # noqa: S101 - for the type checker
        assert self._classes is not None, "the queue runs after start"  # noqa: S101 - for the type checker
        assert self._reconciler is not None, "the queue runs after start"  # noqa: S101 - for the type checker
        if key.kind == SNAPSHOTS:
            return await self._reconciler.reconcile(key.namespace, key.name, key.uid)
        if key.kind == RESTORES:
            assert self._restores is not None, "the queue runs after start"  # noqa: S101 - for the type checker
            return await self._restores.reconcile(key.namespace, key.name, key.uid)
        if key.kind == CONTENTS:
            assert self._contents is not None, "the queue runs after start"  # noqa: S101 - for the type checker
            return await self._contents.reconcile(key.name)
        body = self._bodies.get((key.kind, key.name))
        if key.kind == CLASSES:
            if body is not None:
                return await self._classes.reconcile(body)
            await self._classes.remove(key.name)
        elif body is not None:
            return await self._hypervisors.reconcile(body, self._world)
        else:
            await self._hypervisors.remove(key.name)
            self.heartbeats.forget(f"hypervisor {key.name}")
            self._world.metrics.forget_hypervisor(key.name)
        return None

    def _keep(self, task: asyncio.Task[None]) -> None:
        """Own a task: it is cancelled at the end, and its failure ends the process rather than go unseen."""

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(end)
        task.add_done_callback(_fatal)

    async def _fence(self, leadership: Leadership) -> None:
        """End what is under way whenever another instance may be about to take over."""
        while True:
            # Whenever that is so, not once: what was begun right before is under way only now.
            if not leadership.is_leader(LEASE_MARGIN):
                if self._reconciler is not None:
                    self._reconciler.fence()
                if self._restores is not None:
                    self._restores.fence()
            await asyncio.sleep(LEASE_LOOK)

    async def _beat(self, metrics: Metrics) -> None:
        """Heartbeats: the loop and the queue run, each hypervisor's connection answers."""
        while True:
            if self._queue is not None and self._queue.alive:
                self.heartbeats.beat("queue")
            if self._world is not None:
                self.heartbeats.note("api server", self._world.cluster.last_answer)
            for name, client in self._hypervisors.clients().items():
                self.heartbeats.note(f"hypervisor {name}", client.last_answer or None)
            if self._classes is not None:
                metrics.driver_workers({n: len(h.pids) for n, h in self._classes.hosts().items()})
            await asyncio.sleep(BEAT_SECONDS)


def _plain(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Copy a watched object out of kopf's hands."""
    return dict(body)


def _fatal(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("a part of the operator ended: %s", error, exc_info=error)
        os._exit(1)  # the guardian frees what is held; the pod is restarted


def wire(operator: Operator) -> kopf.OperatorRegistry:
    """Return kopf's registry with our handlers: one line each."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def startup(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.watching.server_timeout = 300
        settings.networking.request_timeout, settings.networking.connect_timeout = 60.0, 15.0
        settings.persistence.finalizer = f"{GROUP}/kopf"
        # A watch without even a bookmark, of which the API server sends one a minute, is dead: see `telemetry.health`.
        settings.watching.inactivity_timeout = 70.0
        await operator.start()

    @kopf.on.cleanup(registry=registry)
    async def cleanup(**_: Any) -> None:
        await operator.stop()

    for kind in (HYPERVISORS, CLASSES, SNAPSHOTS, CONTENTS, RESTORES):
        # Asynchronous: kopf runs other handlers in threads, and the queue belongs to the event loop.
        async def handler(event: Any, kind: str = kind, **_: Any) -> None:
            operator.seen(kind, event)

        kopf.on.event(GROUP, VERSION, kind, id=kind, registry=registry)(handler)
    return registry


def run(options: Options) -> None:
    """Run until a signal comes."""
    operator = Operator(options)
    registry = wire(operator)

    @kopf.on.login(registry=registry)
    def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        if options.kubeconfig is not None:
            os.environ["KUBECONFIG"] = str(options.kubeconfig)
            return kopf.login_with_kubeconfig(**kwargs)
        return kopf.login_with_service_account(**kwargs)

    kopf.run(registry=registry, standalone=True, clusterwide=True)
