"""One request to the API server: how we authenticate, how long it may take, which of our errors says what went wrong.

Not which objects exist (`kube.cluster`). Objects go in and come out as plain dicts: nothing of them is lost on the way.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import aiohttp
import yaml
from kubernetes.aio import config as _untyped_config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from vmsnapshot_operator.api.meta import FIELD_MANAGER
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, KubeError, KubeUnavailableError
from vmsnapshot_operator.kube.clock import ServerClock

log = logging.getLogger(__name__)

config: Any = _untyped_config  # the generated client publishes types for a part of itself only

REQUEST_TIMEOUT = Seconds(15.0)
"""Longer than a healthy API server ever needs for one of our small objects."""

APPLY = "application/apply-patch+yaml"
JSON_PATCH = "application/json-patch+json"

_NOT_FOUND, _UNAUTHORIZED, _FORBIDDEN, _CONFLICT, _GONE, _INVALID, _TOO_MANY = 404, 401, 403, 409, 410, 422, 429
_UNAVAILABLE = (408, _TOO_MANY)
_SERVER_ERROR = 500
_MAX_REASON = 500


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as its path says it. `namespaced` kinds are addressed with a namespace."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        """What stands in `apiVersion`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def everywhere(self) -> str:
        """The path of the collection in all namespaces."""
        base = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        return "/".join([*base, self.plural])

    def path(self, name: str | None = None, namespace: str = "", subresource: str = "") -> str:
        """Return the path of the collection, of one object, or of a subresource of it."""
        parts = ["/apis", self.group, self.version] if self.group else ["/api", self.version]
        if self.namespaced:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        if name is not None:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/".join(parts)


class Client:
    """A connection pool to one API server. An async context manager; owns its connections.

    Built from a kubeconfig, or without one from what a pod finds in its file system. Every request ends within
    REQUEST_TIMEOUT or the caller's own deadline (seconds).
    """

    def __init__(self, kubeconfig: Path | None = None) -> None:
        self._kubeconfig = kubeconfig
        self._api: Any = None
        self._last_answer: Seconds | None = None
        self.clock = ServerClock()

    @property
    def last_answer(self) -> Seconds | None:
        """When the API server last answered anything at all (`time.monotonic`); None before the first time."""
        return self._last_answer

    async def __aenter__(self) -> Self:
        self._api = ApiClient(await self._configuration())
        self._api.user_agent = FIELD_MANAGER
        return self

    async def __aexit__(self, *_: object) -> None:
        api, self._api = self._api, None
        if api is not None:
            await api.close()

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any] | None:
        """Read an object or a list; None if it does not exist. Raises KubeError."""
        try:
            return await self.request("GET", path, query=query)
        except KubeError as error:
            if error.reason == "NotFound":
                return None
            raise

    async def apply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply under our field manager, with force. Raises KubeError; ConflictError if the uid is another's."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self.request("PATCH", path, body, query=query, content_type=APPLY)

    async def json_patch(self, path: str, operations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Apply a JSON patch; raises ConflictError also when one of its `test` operations does not hold."""
        try:
            query = {"fieldManager": FIELD_MANAGER}
            return await self.request("PATCH", path, list(operations), query=query, content_type=JSON_PATCH)
        except KubeError as error:
            # A test that does not hold is answered by 422 Invalid, as if the patch were malformed.
            if error.reason == "Invalid":
                raise ConflictError(error.message) from error
            raise

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        query: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        timeout: Seconds = REQUEST_TIMEOUT,  # noqa: ASYNC109 - each request has a deadline of its own, in one place
    ) -> dict[str, Any]:
        """Send one request and return the object it answers with.

        Raises ConflictError (409), KubeUnavailableError (no answer, 5xx, 429), KubeError with reason `NotFound`,
        `Forbidden`, `Unauthorized`, `Invalid` or `KubernetesError` otherwise.
        """
        what = f"{method} {path}"
        try:
            async with asyncio.timeout(timeout):
                status, data = await self._send(method, path, body, query, content_type)
                if status == _UNAUTHORIZED:
                    # A token in a file, or one made by a program, may have been renewed since we read it.
                    await self._renew()
                    status, data = await self._send(method, path, body, query, content_type)
        except TimeoutError as error:
            raise KubeUnavailableError(f"the API server did not answer {what} within {timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise KubeUnavailableError(f"the API server cannot be reached ({what}): {error}") from error
        self._last_answer = Seconds(time.monotonic())
        return _answer(what, status, data)

    async def _send(
        self, method: str, path: str, body: object, query: Mapping[str, str] | None, content_type: str
    ) -> tuple[int, bytes]:
        api = self._open()
        headers = {"Accept": "application/json", "Content-Type": content_type}
        _, url, headers, _, _ = await api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            auth_settings=["BearerToken"],
        )
        # The deadline is the caller's (asyncio.timeout); without this the library would set one of five minutes.
        answer = await api.call_api(
            method, url, headers, body, _request_timeout=aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_TIMEOUT)
        )
        if answer.status < _SERVER_ERROR:  # else it may be a proxy's own answer, by its own clock
            self.clock.note(answer.getheader("Date"))
        return int(answer.status), await answer.read()

    async def _renew(self) -> None:
        api = self._open()
        fresh = await self._configuration()
        api.configuration.api_key = fresh.api_key

    async def _configuration(self) -> Configuration:
        configuration = Configuration()
        try:
            if self._kubeconfig is not None:
                await config.load_kube_config(
                    config_file=str(self._kubeconfig), client_configuration=configuration, persist_config=False
                )
            else:
                config.load_incluster_config(client_configuration=configuration)
        # The library checks little: of a file that is no kubeconfig it says so by whatever Python raises.
        except (config.ConfigException, OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
            where = f"kubeconfig {self._kubeconfig}" if self._kubeconfig is not None else "the pod's ServiceAccount"
            raise KubeError(f"{where} cannot be used: {error}", reason="KubeconfigInvalid") from error
        return configuration

    def _open(self) -> Any:
        if self._api is None:
            raise KubeError("the connection to the API server is closed", reason="Closed")
        return self._api


def _answer(what: str, status: int, data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data) if data else {}
    except ValueError:
        body = {"message": data[:_MAX_REASON].decode(errors="replace")}
    if not isinstance(body, dict):
        raise KubeError(f"the API server answered {what} with something that is no object")
    if status < 400:  # noqa: PLR2004 - HTTP's own border between success and failure
        return body
    text = str(body.get("message") or f"HTTP status {status}")[:_MAX_REASON]
    message = f"the API server refused {what}: {text}"
    if status == _NOT_FOUND:
        raise KubeError(message, reason="NotFound")
    if status in (_CONFLICT, _GONE):
        raise ConflictError(message)
    if status == _INVALID:
        raise KubeError(message, reason="Invalid")
    if status == _FORBIDDEN:
        raise KubeError(f"{message}; check the operator's RBAC", reason="Forbidden", retryable=True)
    if status == _UNAUTHORIZED:
        raise KubeError(f"{message}; check the operator's credentials", reason="Unauthorized", retryable=True)
    if status >= _SERVER_ERROR or status in _UNAVAILABLE:
        raise KubeUnavailableError(message)
    raise KubeError(message)
