"""The API server, spoken to directly: a kubectl takes most of its time, and of a processor, to start.

For what is asked often. Not for what a user would do by kubectl and what a test is about.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kubernetes import config
from kubernetes.config import ConfigException

from tests.lab.errors import LabError

SECONDS = 20.0
_NOT_FOUND, _REFUSED = 404, 400
_APPLY = "application/apply-patch+yaml"
_GROUP = "vmsnapshot.io/v1alpha1"
_PLURALS = {
    "VMSnapshot": "vmsnapshots",
    "VMRestore": "vmrestores",
    "VMSnapshotContent": "vmsnapshotcontents",
    "Hypervisor": "hypervisors",
    "StorageDriverClass": "storagedriverclasses",
}


def path(resource: str, name: str = "", namespace: str = "") -> str:
    """The path of an object of our group, or of all of them."""
    within = f"/namespaces/{namespace}" if namespace else ""
    return f"/apis/{_GROUP}{within}/{resource.partition('.')[0]}{'/' if name else ''}{name}"


def path_of(document: Mapping[str, Any]) -> str | None:
    """The path of an object of our group; None for any other."""
    if document.get("apiVersion") != _GROUP or document.get("kind") not in _PLURALS:
        return None
    meta = document["metadata"]
    return path(_PLURALS[document["kind"]], meta["name"], meta.get("namespace", ""))


class Api:
    """One API server as the user of a kubeconfig. May be used by several threads. Every method raises LabError if it does not answer,
    or refuses.
    """

    def __init__(self, kubeconfig: Path) -> None:
        try:
            self._client: Any = config.new_client_from_config(str(kubeconfig))
        except (ConfigException, OSError) as error:
            raise LabError(f"{kubeconfig} cannot be used: {error}") from error

    def get(self, where: str) -> dict[str, Any] | None:
        """An object or a list; None if there is none."""
        return self._ask("GET", where)

    def items(self, where: str) -> list[dict[str, Any]]:
        """The objects of a list, each with its kind as `kubectl get` tells it."""
        found = self.get(where) or {}
        kind, version = str(found.get("kind", "")).removesuffix("List"), found.get("apiVersion")
        return [{"apiVersion": version, "kind": kind} | item for item in found.get("items", ())]

    def apply(self, where: str, document: Mapping[str, Any]) -> None:
        """Apply an object on the server's side, as kubectl does."""
        query = urlencode({"fieldManager": "kubectl", "force": "true"})
        self._ask("PATCH", f"{where}?{query}", json.dumps(document), _APPLY)

    def delete(self, where: str) -> None:
        """Delete an object; nothing happens if there is none."""
        self._ask("DELETE", where, json.dumps({"propagationPolicy": "Background"}))

    def _ask(
        self, method: str, where: str, body: str | None = None, content_type: str = "application/json"
    ) -> dict[str, Any] | None:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        _, url, headers, _, _ = self._client.param_serialize(
            method, where, header_params=headers, auth_settings=["BearerToken"]
        )
        try:
            answer = self._client.rest_client.pool_manager.request(
                method, url, body=body, headers=headers, timeout=SECONDS
            )
        except urllib3.exceptions.HTTPError as error:
            raise LabError(f"the API server does not answer {method} {where}: {error}") from error
        if answer.status == _NOT_FOUND:
            return None
        if answer.status >= _REFUSED:
            said = answer.data.decode(errors="replace")[:1000]
            raise LabError(f"the API server refuses {method} {where}: {answer.status}: {said}")
        return dict(json.loads(answer.data))


def of(kubeconfig: Path) -> Api:
    """The API server of a kubeconfig, as its file is now; connections are kept."""
    return _of(kubeconfig, kubeconfig.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _of(kubeconfig: Path, _changed: int) -> Api:
    return Api(kubeconfig)
