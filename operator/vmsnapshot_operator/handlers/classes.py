"""Keep one driver process per StorageDriverClass, and each class's status true.

Not: what a driver does (`drivers`), nor which class is chosen (`plan.grouping`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vmsnapshot_operator.core.effects import Condition, RecordedGroup
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import DriverError, DriverUnavailableError, KubeError, RefusedError, SnapshotError
from vmsnapshot_operator.kube import conditions, distill
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.strategies.world import now

log = logging.getLogger(__name__)

PROBE_TIMEOUT = Seconds(20.0)
PROBE_EVERY = Seconds(300.0)
"""A probe writes to the storage system: often enough to show a broken class, too seldom to be felt."""

RETRY_EVERY = Seconds(5.0)

DEFAULT_CUTS = 4
"""Requests of one class at once, where the class does not say: each has a process of its own."""


@dataclass(slots=True)
class _Live:
    """One class with its process. `key` changes when the process must be another one."""

    cls: StorageClass
    key: str = ""
    host: DriverHost | None = None


class Classes:
    """All classes of this process; see `strategies.world.LiveClasses`."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._live: dict[str, _Live] = {}
        self._adhoc: dict[str, DriverHost] = {}

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
        same = (
            live is not None and live.cls.driver == group.driver and dict(live.cls.parameters) == dict(group.parameters)
        )
        if live is not None and same:
            if live.host is None:
                raise DriverUnavailableError(f'class "{group.class_name}": its driver has not started yet')
            return live.host
        key = _key(group.driver, group.parameters, {"secret": group.secret_name})
        if key not in self._adhoc:
            self._adhoc[key] = await self._start(
                f"{group.class_name} (as recorded)", group.driver, group.parameters, group.secret_name
            )
        return self._adhoc[key]

    def expect(self, body: Mapping[str, Any]) -> None:
        """Note a class at once: until its driver has answered, plans wait for it instead of passing it by."""
        try:
            cls = distill.storage_class(body)
        except RefusedError:
            return
        if cls.name not in self._live:
            self._live[cls.name] = _Live(cls)

    async def reconcile(self, body: Mapping[str, Any]) -> float:
        """Start or replace the class's process if need be, probe it, write status; return seconds until the next look."""
        name = body["metadata"]["name"]
        try:
            cls = distill.storage_class(body)
        except RefusedError as error:
            await self.remove(name)
            await self._report(body, None, error)
            return RETRY_EVERY
        live = self._live.setdefault(name, _Live(cls))
        try:
            live.cls = replace(cls, ready=live.cls.ready, problem=live.cls.problem, capabilities=live.cls.capabilities)
            credentials = await self._credentials(cls.secret_name)
            key = _key(cls.driver, cls.parameters, credentials) + f"/{cls.max_concurrent_cuts}"
            if live.host is None or live.key != key:
                await _close(live.host)
                live.host = None
                live.host = await self._launch(
                    name, cls.driver, cls.parameters, credentials, cls.max_concurrent_cuts or DEFAULT_CUTS
                )
                live.key = key
            capabilities = await live.host.capabilities(timeout=PROBE_TIMEOUT)
            live.cls = replace(cls, ready=True, problem="", capabilities=capabilities)
            await self._report(body, live.cls, None)
        except SnapshotError as error:
            live.cls = replace(cls, ready=False, problem=error.message, capabilities=None)
            await self._report(body, live.cls, error)
            return RETRY_EVERY
        return PROBE_EVERY

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

    async def _start(self, name: str, driver: str, parameters: Mapping[str, str], secret_name: str) -> DriverHost:
        return await self._launch(name, driver, parameters, await self._credentials(secret_name))

    async def _launch(
        self,
        name: str,
        driver: str,
        parameters: Mapping[str, str],
        credentials: Mapping[str, str],
        most: int = DEFAULT_CUTS,
    ) -> DriverHost:
        host = DriverHost(name, driver, parameters, credentials, max_workers=most)
        try:
            await host.start()
        except DriverError:
            await host.close()
            raise
        return host

    async def _report(self, body: Mapping[str, Any], cls: StorageClass | None, error: SnapshotError | None) -> None:
        ready = error is None
        reason = "Ready" if error is None else error.reason
        message = "the driver answers" if error is None else clip(error.message)
        old = body.get("status") or {}
        decided = (
            Condition(type="Ready", status=ready, reason=reason, message=message),
            Condition(type="Reconciling", status=False, reason=reason),
            Condition(type="Stalled", status=not ready, reason=reason, message="" if ready else message),
        )
        status: dict[str, Any] = {
            "observedGeneration": body["metadata"].get("generation", 0),
            "conditions": conditions.merge(
                old.get("conditions") or (), decided, body["metadata"].get("generation", 0), now()
            ),
        }
        if cls is not None and cls.capabilities is not None:
            c = cls.capabilities
            status["capabilities"] = {
                "cut": c.cut,
                "atomic": c.atomic,
                "revert": c.revert,
                "revertNewestOnly": c.revert_newest_only,
                "clone": c.clone,
            }
        if conditions.changed(old, status):
            await self._cluster.write_class_status(body, status)


async def _close(host: DriverHost | None) -> None:
    if host is not None:
        await host.close()


def _key(driver: str, parameters: Mapping[str, str], credentials: Mapping[str, str]) -> str:
    """A digest of what makes a process another one; credentials go in as a digest and come out of nowhere."""
    text = json.dumps([driver, sorted(parameters.items()), sorted(credentials.items())])
    return hashlib.sha256(text.encode()).hexdigest()
