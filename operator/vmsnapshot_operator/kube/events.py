"""Events about our objects, for people: best effort, and never a flood."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import KubeError
from vmsnapshot_operator.kube.client import Resource
from vmsnapshot_operator.kube.cluster import Cluster

log = logging.getLogger(__name__)

CONTROLLER = "vmsnapshot.io/operator"
QUIET_SECONDS = Seconds(600.0)
"""So long the same event about the same object is not posted again."""

EVENTS = Resource("events.k8s.io", "v1", "events", "Event", namespaced=True)

_TIMEOUT = Seconds(3.0)
_MAX_NOTE = 1024  # bytes; the API server refuses more
_MAX_WORD = 128
_MAX_REMEMBERED = 4096


class Events:
    """Posts events as one instance of the operator; `clock` reads seconds that never go back."""

    def __init__(self, cluster: Cluster, *, instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._instance = instance[:_MAX_WORD]
        self._clock = clock
        self._posted: dict[tuple[str, str, str], float] = {}

    async def emit(self, body: Mapping[str, Any], type: str, reason: str, message: str) -> None:  # noqa: A002 - Kubernetes's own word
        """Post one event (`type` Normal or Warning) unless the same one was posted lately; a failure is only logged."""
        key = (str(body["metadata"]["uid"]), reason, message)
        if not self._is_news(key):
            return
        event = compose(body, type, reason, message, instance=self._instance, moment=datetime.now(UTC))
        path = EVENTS.path(namespace=event["metadata"]["namespace"])
        try:
            await self._cluster.client.request("POST", path, event, timeout=_TIMEOUT)
        except KubeError as error:
            self._posted.pop(key, None)
            log.info("event %s about %s was not posted: %s", reason, body["metadata"]["name"], error.message)

    def _is_news(self, key: tuple[str, str, str]) -> bool:
        moment = self._clock()
        if len(self._posted) >= _MAX_REMEMBERED:
            self._posted = {k: t for k, t in self._posted.items() if moment - t < QUIET_SECONDS}
        last = self._posted.get(key)
        known = last is not None and moment - last < QUIET_SECONDS
        if known or len(self._posted) >= _MAX_REMEMBERED:
            return False
        self._posted[key] = moment
        return True


def compose(
    body: Mapping[str, Any],
    type: str,  # noqa: A002 - Kubernetes's own word
    reason: str,
    message: str,
    *,
    instance: str,
    moment: datetime,
) -> dict[str, Any]:
    """Return the Event object; events about cluster-scoped objects live in namespace `default`."""
    meta = body["metadata"]
    namespace = meta.get("namespace") or "default"
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {"name": f"{meta['name'][:200]}.{secrets.token_hex(8)}", "namespace": namespace},
        "eventTime": moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "type": type,
        "reason": reason[:_MAX_WORD],
        "action": reason[:_MAX_WORD],
        "note": message.encode()[:_MAX_NOTE].decode(errors="ignore"),
        "regarding": {
            "apiVersion": body["apiVersion"],
            "kind": body["kind"],
            "namespace": meta.get("namespace", ""),
            "name": meta["name"],
            "uid": meta["uid"],
            "resourceVersion": meta.get("resourceVersion", ""),
        },
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
    }
