"""An API server in memory, as far as our client asks it: objects by path, resource versions, conflicts, failures on demand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vmsnapshot_operator.errors import ConflictError, KubeError
from vmsnapshot_operator.kube.client import Client

Hook = Callable[[str, str], None]


class FakeClient(Client):
    """Stands in for `Client`. `before` is called with method and path ahead of each request, and may raise or change things."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Hook = lambda _method, _path: None
        self._versions = itertools.count(1)

    def put(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Store an object as if somebody else had written it."""
        stored = copy.deepcopy(dict(body))
        stored["metadata"] = {**stored["metadata"], "resourceVersion": str(next(self._versions))}
        stored["metadata"].setdefault("uid", f"uid-{stored['metadata']['resourceVersion']}")
        self.objects[path] = stored
        return copy.deepcopy(stored)

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        self._note("GET", path)
        return copy.deepcopy(self.objects.get(path))

    async def apply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self._note("APPLY", path)
        path = path.removesuffix("/status")
        found = self._found(path)
        if (
            body["metadata"].get("resourceVersion", found["metadata"]["resourceVersion"])
            != found["metadata"]["resourceVersion"]
        ):
            raise ConflictError("the object has been modified")
        return self.put(path, {**found, "status": dict(body["status"])})

    async def json_patch(self, path: str, operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        self._note("PATCH", path)
        found = copy.deepcopy(self._found(path.removesuffix("/status")))
        for operation in operations:
            *parents, last = operation["path"].strip("/").split("/")
            place = found
            for key in parents:
                place = place[key]
            if operation["op"] == "test":
                if place.get(last) != operation["value"]:
                    raise ConflictError("a test of the patch does not hold")
            else:
                place[last] = operation["value"]
        return self.put(path.removesuffix("/status"), found)

    async def request(self, method: str, path: str, body: Any = None, **_: Any) -> dict[str, Any]:
        self._note(method, path)
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                raise ConflictError(f"{path} already exists")
            return self.put(path, body)
        found = self._found(path)
        if method == "PUT":
            if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
                raise ConflictError("the object has been modified")
            return self.put(path, {**body, "metadata": {**found["metadata"], **body["metadata"]}})
        if method == "DELETE":
            wanted = (body or {}).get("preconditions", {}).get("uid")
            if wanted not in (None, found["metadata"]["uid"]):
                raise ConflictError("the UID in the precondition is another")
            return self.objects.pop(path)
        raise AssertionError(f"{method} is not known here")

    def _found(self, path: str) -> dict[str, Any]:
        if path not in self.objects:
            raise KubeError(f"{path} not found", reason="NotFound")
        return self.objects[path]

    def _note(self, method: str, path: str) -> None:
        self.requests.append((method, path))
        self.before(method, path)
