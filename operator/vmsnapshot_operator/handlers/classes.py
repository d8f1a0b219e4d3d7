"""Keep one driver process per StorageDriverClass, and each class's status true.

Not: what a driver does (`drivers`), nor which class is chosen (`plan.grouping`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vmsnapshot_operator.core.effects import Condition, RecordedGroup
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import DriverError, DriverUnavailableError, KubeError, RefusedError, SnapshotError
from vmsnapshot_operator.kube import conditions, distill
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.plan import class_report
from vmsnapshot_operator.plan.orphans import Findings
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.strategies.world import now

log = logging.getLogger(__name__)

PROBE_TIMEOUT = Seconds(20.0)
PROBE_EVERY = Seconds(300.0)
"""A probe writes to the storage system: often enough to show a broken class, too seldom to be felt."""

RETRY_EVERY = Seconds(5.0)

DEFAULT_CUTS = 4
"""Requests of one class at once, where the class does not say: each has a process of its own."""


LOOK_EVERY = Seconds(60.0)
"""Between two looks at what changed of itself: no measurement or finding is written more often than that."""

SAMPLES = 256
"""So many of the latest cuts make a class's latency."""


@dataclass(slots=True)
class _Live:
    """One class with its process. `key` changes when the process must be another one.

    `given`: the class as it was when last probed; `probe_at`, `told_at`: readings of the loop's clock.
    """

    cls: StorageClass
    body: Mapping[str, Any] | None = None
    key: str = ""
    host: DriverHost | None = None
    given: StorageClass | None = None
    error: SnapshotError | None = None
    probe_at: float = 0.0
    told_at: float = -math.inf
    found: Findings | None = None
    cuts: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


_NO_CLASS = StorageClass(name="", driver="", match=())
"""Stands for an object that cannot be understood."""


class Classes:
    """All classes of this process; see `strategies.world.LiveClasses`."""

    def __init__(self, cluster: Cluster, *, leading: Callable[[], bool], fence: int = -1) -> None:
        self._fence = fence
        self._cluster = cluster
        self._leading = leading
        self._live: dict[str, _Live] = {}
        self._adhoc: dict[str, DriverHost] = {}
        self._starting: dict[str, asyncio.Lock] = {}

    def all(self) -> tuple[StorageClass, ...]:
        """All classes as the planner sees them."""
        return tuple(live.cls for _, live in sorted(self._live.items()))

    def host(self, class_name: str) -> DriverHost | None:
        """The host of a class's driver, or None."""
        live = self._live.get(class_name)
        return live.host if live is not None else None

    def hosts(self) -> Mapping[str, DriverHost]:
        """All hosts by class name."""
        return {n: live.host for n, live in self._live.items() if live.host is not None}

    async def host_of_record(self, group: RecordedGroup) -> DriverHost:
        """Return a host for these parameters: the class's own if it is unchanged, else one made from the record.

        Raises DriverUnavailableError.
        """
        live = self._live.get(group.class_name)
        if live is not None and self.serves(group):
            if live.host is None:
                raise DriverUnavailableError(f'class "{group.class_name}": its driver has not started yet')
            return live.host
        credentials = await self._credentials(group.secret_name)
        key = _key(group.driver, group.parameters, credentials)
        async with self._starting.setdefault(key, asyncio.Lock()):
            if key not in self._adhoc:
                name = f"{group.class_name} (as recorded)"
                self._adhoc[key] = await self._launch(name, group.driver, group.parameters, credentials)
        return self._adhoc[key]

    def serves(self, group: RecordedGroup) -> bool:
        """Whether the class is as it was when this was recorded."""
        live = self._live.get(group.class_name)
        return (
            live is not None and live.cls.driver == group.driver and dict(live.cls.parameters) == dict(group.parameters)
        )

    def expect(self, body: Mapping[str, Any]) -> None:
        """Note a class at once: until its driver has answered, plans wait for it instead of passing it by."""
        try:
            cls = distill.storage_class(body)
        except RefusedError:
            return
        if cls.name not in self._live:
            self._live[cls.name] = _Live(cls)

    def note_cut(self, class_name: str, seconds: float) -> None:
        """A group of this class was cut in so long."""
        if (live := self._live.get(class_name)) is not None:
            live.cuts.append(seconds)

    def note_findings(self, class_name: str, found: Findings) -> None:
        """The storage of this class was scanned; the next look tells it."""
        if (live := self._live.get(class_name)) is not None:
            live.found = found

    def body(self, class_name: str) -> Mapping[str, Any] | None:
        """The object as it was last seen, to post events about."""
        live = self._live.get(class_name)
        return live.body if live is not None else None

    async def reconcile(self, body: Mapping[str, Any]) -> float:
        """Start, replace or probe the class's process if need be, write status; return seconds until the next look."""
        name = body["metadata"]["name"]
        try:
            cls = distill.storage_class(body)
        except RefusedError as error:
            await self.remove(name)
            live = _Live(_NO_CLASS, body=body, error=error)
        else:
            live = self._live.setdefault(name, _Live(cls))
            live.body = body
            await self._probe(live, cls)
        await self._tell(body, live)
        if live.error is not None or not self._leading():
            return RETRY_EVERY
        return LOOK_EVERY

    async def _probe(self, live: _Live, cls: StorageClass) -> None:
        """Find out whether the driver works, unless that was done lately for the same class with the same Secret."""
        clock = asyncio.get_running_loop().time
        try:
            credentials = await self._credentials(cls.secret_name)
            key = _key(cls.driver, cls.parameters, credentials) + f"/{cls.max_concurrent_cuts}"
            same = live.given == cls and live.key == key and live.host is not None
            if same and live.error is None and clock() < live.probe_at:
                return
            live.given = cls
            live.cls = replace(cls, ready=live.cls.ready, problem=live.cls.problem, capabilities=live.cls.capabilities)
            if live.host is None or live.key != key:
                await _close(live.host)
                live.host = None
                live.host = await self._launch(
                    cls.name, cls.driver, cls.parameters, credentials, cls.max_concurrent_cuts or DEFAULT_CUTS
                )
                live.key = key
            capabilities = await live.host.capabilities(timeout=PROBE_TIMEOUT)
            live.cls = replace(cls, ready=True, problem="", capabilities=capabilities)
            live.error = None
        except SnapshotError as error:
            live.cls = replace(cls, ready=False, problem=error.message, capabilities=None)
            live.error = error
        live.probe_at = clock() + PROBE_EVERY

    async def remove(self, name: str) -> None:
        """End the process of a class that is gone; what it cut can still be reached by its record."""
        live = self._live.pop(name, None)
        if live is not None:
            await _close(live.host)

    async def close(self) -> None:
        """End all processes."""
        for name in list(self._live):
            await self.remove(name)
        for host in self._adhoc.values():
            await _close(host)
        self._adhoc.clear()

    async def _credentials(self, secret_name: str) -> Mapping[str, str]:
        if not secret_name:
            return {}
        try:
            return await self._cluster.secret(secret_name)
        except KubeError as error:
            raise DriverUnavailableError(f"spec.secretName: {error.message}", reason="SecretNotFound") from error

    async def _launch(
        self,
        name: str,
        driver: str,
        parameters: Mapping[str, str],
        credentials: Mapping[str, str],
        most: int = DEFAULT_CUTS,
    ) -> DriverHost:
        host = DriverHost(name, driver, parameters, credentials, max_workers=most, fence=self._fence)
        try:
            await host.start()
        except DriverError:
            await host.close()
            raise
        return host

    async def _tell(self, body: Mapping[str, Any], live: _Live) -> None:
        """Write status if there is news, and news of numbers alone not more often than each minute.

        Only the leader writes: instances that have seen different cuts would write in turn.
        """
        if not self._leading():
            return
        moment = asyncio.get_running_loop().time()
        old = body.get("status") or {}
        decided, error = self._conditions(live), live.error
        generation = body["metadata"].get("generation", 0)
        status: dict[str, Any] = {
            "observedGeneration": generation,
            "conditions": conditions.merge(old.get("conditions") or (), decided, generation, now()),
            "capabilities": class_report.capabilities(live.cls.capabilities)
            if error is None and live.cls.capabilities is not None
            else None,
        }
        # What this process has not seen yet is left as its predecessor wrote it.
        numbers = {k: old.get(k) for k in ("cutMilliseconds", "snapshotsHeld", "orphans", "orphansFound")}
        known = {k: v for k, v in (status | numbers).items() if v is not None}
        if (measured := class_report.latency(live.cuts)) is not None:
            numbers["cutMilliseconds"] = measured
        if live.found is not None:
            numbers |= class_report.findings(live.found)
        status = {k: v for k, v in (status | numbers).items() if v is not None}
        urgent = conditions.changed(old, known)
        if urgent or (conditions.changed(old, status) and moment - live.told_at >= LOOK_EVERY - 1.0):
            await self._cluster.write_class_status(body, status)
            live.told_at = moment

    @staticmethod
    def _conditions(live: _Live) -> tuple[Condition, ...]:
        error = live.error
        ready = error is None
        reason = "Ready" if error is None else error.reason
        message = "the driver answers" if error is None else clip(error.message)
        return (
            Condition(type="Ready", status=ready, reason=reason, message=message),
            Condition(type="Reconciling", status=False, reason=reason),
            Condition(type="Stalled", status=not ready, reason=reason, message="" if ready else message),
        )


async def _close(host: DriverHost | None) -> None:
    if host is not None:
        await host.close()


def _key(driver: str, parameters: Mapping[str, str], credentials: Mapping[str, str]) -> str:
    """A digest of what makes a process another one; credentials go in as a digest and come out of nowhere."""
    text = json.dumps([driver, sorted(parameters.items()), sorted(credentials.items())])
    return hashlib.sha256(text.encode()).hexdigest()
