"""Who of several instances acts: a Lease in the operator's namespace, held by one of them at a time.

An instance believes in its lease only as long as every other one must respect it, by a clock that goes on while the process
is stopped or the machine sleeps. Not: what needs the lease (`strategies`, `handlers`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Any

from vmsnapshot_operator.errors import KubeError
from vmsnapshot_operator.kube.client import Resource
from vmsnapshot_operator.kube.cluster import Cluster

log = logging.getLogger(__name__)

LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease", namespaced=True)
NAME = "vmsnapshot-operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """In seconds. `lease`: how long others wait for a silent holder; `request`: one renewal's deadline; `retry`: between tries."""

    lease: float = 15.0
    request: float = 10.0
    retry: float = 2.0


class Step(Enum):
    """What to do with the lease as it was found."""

    CREATE = auto()
    TAKE = auto()
    RENEW = auto()
    WAIT = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Another's lease as we first saw it: `version` changes with each renewal, `since` is our own clock's reading."""

    version: str
    since: float


def choose(lease: Mapping[str, Any] | None, identity: str, seen: Seen | None, now: float) -> Step:
    """Decide from the Lease object, and from how long it has not changed by our own clock. Pure.

    Another's clock is never trusted: its times serve for nothing but telling one renewal from the next.
    """
    if lease is None:
        return Step.CREATE
    spec = lease.get("spec") or {}
    holder = spec.get("holderIdentity") or ""
    if holder == identity:
        return Step.RENEW
    if not holder:
        return Step.TAKE
    silent = now - seen.since if seen is not None and seen.version == lease["metadata"]["resourceVersion"] else 0.0
    return Step.TAKE if silent > float(spec.get("leaseDurationSeconds") or 0) else Step.WAIT


def boottime() -> float:
    """Read CLOCK_BOOTTIME: it is never set, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leadership:
    """One instance's share in the lease. `run` is its only writer; `is_leader` may be asked at any moment.

    `term`: how often this instance has come to hold it. Between two terms somebody else may have acted.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        identity: str,
        durations: Durations = Durations(),
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._cluster = cluster
        self._identity = identity
        self._durations = durations
        self._clock = clock
        self._path = LEASES.path(NAME, cluster.namespace)
        self._lease: Mapping[str, Any] | None = None
        self._seen: Seen | None = None
        self._valid_until: float | None = None
        self._promises: dict[object, float] = {}
        self._turn = asyncio.Lock()
        self._trouble = ""
        self.term = 0

    def is_leader(self, margin_seconds: float = 0.0) -> bool:
        """Tell whether nobody else can hold the lease for at least `margin_seconds` from now."""
        return self._valid_until is not None and self._clock() + margin_seconds < self._valid_until

    @asynccontextmanager
    async def outlasting(self, seconds: float) -> AsyncIterator[bool]:
        """Make the lease outlast what is done inside, `seconds` at most; yields whether it does.

        One request to the API server at the beginning, if need be. While inside, the lease is not given back, so that nobody
        else begins before the time is over even if this process ends.
        """
        promise = object()
        try:
            if self.is_leader():
                self._promises[promise] = self._clock() + seconds
                if not self.is_leader(seconds):
                    await self._try()
            yield self.is_leader(seconds)
        finally:
            self._promises.pop(promise, None)

    async def run(self) -> None:
        """Acquire and renew until cancelled; then give the lease back, unless something inside `outlasting` still needs it."""
        try:
            while True:
                await self._try()
                await asyncio.sleep(self._durations.retry)
        finally:
            await self._release()

    async def _try(self) -> None:
        """One try to acquire or renew. Failures leave what we hold to run out by itself."""
        async with self._turn:
            was = self.is_leader()
            try:
                async with asyncio.timeout(self._durations.request):
                    await self._step()
                self._trouble = ""
            except (KubeError, TimeoutError) as error:
                if str(error) != self._trouble:
                    log.warning("the lease %s was not renewed: %s", NAME, error)
                self._trouble = str(error)
                self._lease = (
                    None  # whether the request had an effect is unknown, or somebody else wrote: read it again
                )
            if was and not self.is_leader():
                log.warning("this instance (%s) lost the lease", self._identity)
            elif self.is_leader() and not was:
                log.info("this instance (%s) is the leader now", self._identity)

    async def _step(self) -> None:
        # Our own lease is known as we wrote it last; another's has to be read.
        if self._lease is None or not self._held():
            self._lease = await self._cluster.client.get(self._path)
        step = choose(self._lease, self._identity, self._seen, self._clock())
        if step is Step.WAIT:
            self._valid_until = None
            self._look(self._lease)
            return
        # Read before the request is sent: others count from when they see the renewal, which is later.
        sent = self._clock()
        duration = self._duration(sent)
        body = self._body(step, duration)
        if self._valid_until is not None:
            # If the answer gets lost, others may count by a shorter duration than the last one.
            self._valid_until = min(self._valid_until, sent + duration)
        if step is Step.CREATE:
            path = LEASES.path(namespace=self._cluster.namespace)
            self._lease = await self._cluster.client.request("POST", path, body)
        else:
            self._lease = await self._cluster.client.request("PUT", self._path, body)
        self._valid_until = sent + duration
        if step is not Step.RENEW:
            self.term += 1

    def _held(self) -> bool:
        return ((self._lease or {}).get("spec") or {}).get("holderIdentity") == self._identity

    def _look(self, lease: Mapping[str, Any] | None) -> None:
        version = str((lease or {}).get("metadata", {}).get("resourceVersion", ""))
        if self._seen is None or self._seen.version != version:
            self._seen = Seen(version=version, since=self._clock())

    def _duration(self, now: float) -> int:
        """Whole seconds, as the API wants them; long enough for all that was promised."""
        return math.ceil(
            max([self._durations.lease, *(p - now + self._durations.retry for p in self._promises.values())])
        )

    def _body(self, step: Step, duration: int) -> dict[str, Any]:
        moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = dict((self._lease or {}).get("spec") or {})
        changes = int(before.get("leaseTransitions") or 0)
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": duration,
            "renewTime": moment,
            "acquireTime": before.get("acquireTime") if step is Step.RENEW else moment,
            "leaseTransitions": changes if step is Step.RENEW else changes + 1,
        }
        meta = {"name": NAME, "namespace": self._cluster.namespace}
        if self._lease is not None:
            meta["resourceVersion"] = self._lease["metadata"]["resourceVersion"]
        return {"apiVersion": LEASES.api_version, "kind": LEASES.kind, "metadata": meta, "spec": spec}

    async def _release(self) -> None:
        """Let another instance begin at once, if nothing of ours is under way."""
        mine, self._valid_until = self.is_leader(), None
        if not mine or self._promises or self._lease is None:
            return
        body = self._body(Step.RENEW, 1)
        body["spec"]["holderIdentity"] = ""
        try:
            async with asyncio.timeout(self._durations.request):
                await self._cluster.client.request("PUT", self._path, body)
        except (KubeError, TimeoutError) as error:
            log.info("the lease was not given back, it runs out by itself: %s", error)
