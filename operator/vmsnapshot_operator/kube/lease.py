"""Who of several instances acts: a Lease in the operator's namespace, held by one of them at a time.

An instance believes in its lease only as long as every other one must respect it, by a clock that goes on while the process
is stopped or the machine sleeps. Not: what needs the lease (`strategies`, `handlers`).

Why never two act. The holder counts `lease` seconds from before it sent the renewal that was answered; any other counts them from
after it has read that renewal, which is later, and takes it over only if the object is still the one that it read. So the
holder's time is over, by its own clock, before another's begins, whatever their wall clocks say. Who acts under it stops a margin
sooner still (`strategies.window.LEASE_MARGIN`), also what it has told other processes to do.

Why another takes over within 15 s of the holder's death. Let q be the longest that the API server takes to answer. The holder's last
renewal was stored at 0, and it dies then or later. The other one looks every `retry` seconds, so it has read this renewal at
retry + 2q at the latest (the look before was sent just before 0, and answered at q; the next is sent `retry` later, and answered after q). It
wakes when `lease` seconds of silence are over, not at its next regular look, reads once more (q), and takes the lease (q):

    retry + 2q + lease + 2q  =  1 + 10 + 4q  <  15 s   as long as q < 1 s

A holder that dies in the middle of a window is no exception: no renewal is ever for longer than `lease`. A VM that it left frozen
does not wait for this: the guardian beside it frees the VM, and whoever takes over finds what is left.
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
_TICK = 0.02
"""What is waited for after a moment, so that it is over by any rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """In seconds. `lease`: how long others wait for a silent holder; `request`: one renewal's deadline; `retry`: between tries.

    With these, a renewal may come to nothing by a time-out, and the next one still has all of its own time before the lease is over. Before
    what needs the lease is ended, a margin sooner, it has some 1 s.
    """

    lease: float = 10.0
    request: float = 4.0
    retry: float = 1.0

    @classmethod
    def of(cls, lease: float) -> Durations:
        """A renewal's deadline in the same proportion; `retry` as it is, since what another's take-over lasts grows with it."""
        return cls(lease=lease, request=0.4 * lease)


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

    def is_over(self, lease: Mapping[str, Any], now: float) -> bool:
        """Whether its holder has been silent for longer than it said others must wait."""
        return lease["metadata"]["resourceVersion"] == self.version and now > self.until(lease)

    def until(self, lease: Mapping[str, Any]) -> float:
        """When that will be so, if nothing happens."""
        return self.since + float((lease.get("spec") or {}).get("leaseDurationSeconds") or 0)


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
    return Step.TAKE if seen is not None and seen.is_over(lease, now) else Step.WAIT


def boottime() -> float:
    """Read CLOCK_BOOTTIME: it is never set, and goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Leadership:
    """One instance's share in the lease. `run` is its only writer; `is_leader` may be asked at any moment.

    `term`: how often this instance has come to hold it. Between two terms somebody else may have acted. `told` is called with
    `until` after each try to renew it.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        identity: str,
        durations: Durations = Durations(),
        clock: Callable[[], float] = boottime,
        told: Callable[[float], None] = lambda _until: None,
    ) -> None:
        self._told = told
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
        until = self._valid_until  # read once: threads ask as well, and `run` may write meanwhile
        return until is not None and self._clock() + margin_seconds < until

    @property
    def until(self) -> float:
        """Until when nobody else can hold it, as the clock reads then; without a renewal meanwhile. In the past if it is not held."""
        until = self._valid_until  # as above
        return until if until is not None else -math.inf

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
                await asyncio.sleep(self._pause())
        finally:
            await self._release()

    def _pause(self) -> float:
        """Seconds until the next try: another's lease is taken as soon as it is over."""
        if self._seen is None or self._lease is None or self._held():
            return self._durations.retry
        return min(self._durations.retry, max(0.0, self._seen.until(self._lease) - self._clock()) + _TICK)

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
            self._told(self.until)
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
