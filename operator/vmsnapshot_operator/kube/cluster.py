"""The objects that this operator reads and writes, one method per thing it does to them.

Not how a request is sent (`kube.client`), nor what stands in the objects (`kube.distill`, `kube.contents`).
"""

from __future__ import annotations

import base64
import binascii
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from vmsnapshot_operator.api.meta import FIELD_MANAGER, FINALIZER, GROUP, VERSION
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import ConflictError, KubeError
from vmsnapshot_operator.kube import conditions
from vmsnapshot_operator.kube.client import Client, Resource

log = logging.getLogger(__name__)

INSTALLATION = "vmsnapshot-installation"
"""Name of the ConfigMap, in the operator's namespace, that holds the seed of the installation id."""

SNAPSHOTS = Resource(GROUP, VERSION, "vmsnapshots", "VMSnapshot", namespaced=True)
RESTORES = Resource(GROUP, VERSION, "vmrestores", "VMRestore", namespaced=True)
CONTENTS = Resource(GROUP, VERSION, "vmsnapshotcontents", "VMSnapshotContent", namespaced=False)
CLASSES = Resource(GROUP, VERSION, "storagedriverclasses", "StorageDriverClass", namespaced=False)
HYPERVISORS = Resource(GROUP, VERSION, "hypervisors", "Hypervisor", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
SECRETS = Resource("", "v1", "secrets", "Secret", namespaced=True)
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap", namespaced=True)

_TRIES = 5
_PAGE = 100  # contents hold the definition of a VM each


class Cluster:
    """The API server as one installation of the operator sees it. An async context manager; owns its connections.

    `namespace` is the operator's own: its Lease, its installation id and all credentials live there. `on_secret` is handed
    each value of a Secret as it is read, so that logs can hide it. Every method may raise KubeUnavailableError (no answer in
    time) and KubeError (refused, with the reason); more is said where it is so.
    """

    def __init__(
        self,
        *,
        namespace: str,
        kubeconfig: Path | None = None,
        on_secret: Callable[[Iterable[str]], None] = lambda _values: None,
    ) -> None:
        self.namespace = namespace
        self.client = Client(kubeconfig)
        self._on_secret = on_secret

    async def __aenter__(self) -> Self:
        await self.client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.__aexit__()

    @property
    def last_answer(self) -> Seconds | None:
        """When the API server last answered (`time.monotonic`); None before the first time."""
        return self.client.last_answer

    # --- VMSnapshot ---------------------------------------------------------------------------------------------------

    async def snapshot(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Return a VMSnapshot, or None."""
        return await self.client.get(SNAPSHOTS.path(name, namespace))

    async def write_snapshot_status(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Make `status` the whole status of this very object (its uid) and return it; ConflictError if it is gone."""
        return await self._write_status(SNAPSHOTS, body, status)

    async def add_finalizer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Put our finalizer on this very object; ConflictError if it is gone or being deleted."""
        current: Mapping[str, Any] | None = body
        for _ in range(_TRIES):
            if current is None or _uid(current) != _uid(body):
                raise ConflictError(f"{_name(body)} is gone; looking again")
            found = list(current["metadata"].get("finalizers") or ())
            if FINALIZER in found:
                return dict(current)
            if current["metadata"].get("deletionTimestamp"):
                raise ConflictError(f"{_name(body)} is being deleted and takes no finalizer any more; looking again")
            try:
                return await self._patch_finalizers(current, [*found, FINALIZER])
            except ConflictError:
                current = await self._again(body)
        raise ConflictError(f"{_name(body)} changes faster than its finalizer can be set")

    async def remove_finalizer(self, body: Mapping[str, Any]) -> None:
        """Take our finalizer off this very object; an object that is gone is success."""
        # A body read before the finalizer was set does not show it: only a fresh one can say that it is not there.
        held = FINALIZER in (body["metadata"].get("finalizers") or ())
        current: Mapping[str, Any] | None = body if held else await self._again(body)
        for _ in range(_TRIES):
            if current is None or _uid(current) != _uid(body):
                return
            found = list(current["metadata"].get("finalizers") or ())
            if FINALIZER not in found:
                return
            try:
                await self._patch_finalizers(current, [f for f in found if f != FINALIZER])
            except ConflictError:
                current = await self._again(body)
            except KubeError as error:
                if error.reason != "NotFound":
                    raise
                return
            else:
                return
        raise ConflictError(f"{_name(body)} changes faster than its finalizer can be removed")

    async def delete_snapshot(self, body: Mapping[str, Any]) -> None:
        """Delete this very object; one that is gone is success."""
        meta = body["metadata"]
        await self._delete(SNAPSHOTS.path(meta["name"], meta["namespace"]), meta["uid"])

    async def create_snapshot(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create a VMSnapshot; ConflictError if one of this name exists."""
        path = SNAPSHOTS.path(None, body["metadata"]["namespace"])
        return await self.client.request("POST", path, body, query={"fieldManager": FIELD_MANAGER})

    # --- VMRestore ----------------------------------------------------------------------------------------------------

    async def restore(self, namespace: str, name: str) -> dict[str, Any] | None:
        """Return a VMRestore, or None."""
        return await self.client.get(RESTORES.path(name, namespace))

    async def restores_of(self, namespace: str, snapshot: str) -> tuple[str, ...]:
        """Return the names of the VMRestores that are under way with this VMSnapshot, or may need it to go back to."""
        found = await self.client.request("GET", RESTORES.path(None, namespace))
        return tuple(
            str(body["metadata"]["name"])
            for body in found.get("items") or ()
            if has_finalizer(body)
            and snapshot in (body["spec"].get("snapshotName"), (body.get("status") or {}).get("safetySnapshotName"))
        )

    async def write_restore_status(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Make `status` the whole status of this very object (its uid) and return it; ConflictError if it is gone."""
        return await self._write_status(RESTORES, body, status)

    async def restores_under_way(self) -> frozenset[str]:
        """Return the UIDs of the VMRestores of all namespaces that have begun and not come to their end, as they are now."""
        return frozenset([_uid(body) async for body in self._all(RESTORES) if has_finalizer(body)])

    # --- VMSnapshotContent --------------------------------------------------------------------------------------------

    async def content(self, name: str) -> dict[str, Any] | None:
        """Return a VMSnapshotContent, or None."""
        return await self.client.get(CONTENTS.path(name))

    async def create_content(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Create a VMSnapshotContent; ConflictError if one of this name exists."""
        query = {"fieldManager": FIELD_MANAGER}
        return await self.client.request("POST", CONTENTS.path(), body, query=query)

    async def replace_content(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Replace a VMSnapshotContent; ConflictError if it is no longer the one that `metadata.resourceVersion` names."""
        meta = body["metadata"]
        if not meta.get("resourceVersion"):
            raise ConflictError(f"VMSnapshotContent {meta['name']} was not read before it was to be replaced")
        path = CONTENTS.path(meta["name"])
        try:
            return await self.client.request("PUT", path, body, query={"fieldManager": FIELD_MANAGER})
        except KubeError as error:
            if error.reason == "NotFound":
                raise ConflictError(f"VMSnapshotContent {meta['name']} is gone; looking again") from error
            raise

    async def write_content_status(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Make `status` the whole status of this very object; ConflictError if it is gone."""
        return await self._write_status(CONTENTS, body, status)

    async def delete_content(self, name: str, uid: str | None) -> None:
        """Delete a VMSnapshotContent (this very one if `uid` is given); one that is gone is success."""
        await self._delete(CONTENTS.path(name), uid)

    async def contents(self) -> AsyncIterator[dict[str, Any]]:
        """Go through all VMSnapshotContents as they are now. Raises ConflictError if they change too fast for one pass."""
        async for body in self._all(CONTENTS):
            yield body

    async def snapshot_uids(self) -> frozenset[str]:
        """Return the UIDs of all VMSnapshots of all namespaces as they are now."""
        return frozenset([_uid(body) async for body in self._all(SNAPSHOTS)])

    # --- the other kinds ----------------------------------------------------------------------------------------------

    async def write_class_status(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Make `status` the whole status of this very StorageDriverClass; ConflictError if it is gone."""
        return await self._write_status(CLASSES, body, status)

    async def write_hypervisor_status(self, body: Mapping[str, Any], status: Mapping[str, Any]) -> dict[str, Any]:
        """Make `status` the whole status of this very Hypervisor; ConflictError if it is gone."""
        return await self._write_status(HYPERVISORS, body, status)

    async def namespace_labels(self, name: str) -> dict[str, str]:
        """Return the labels of a namespace; none if it does not exist."""
        body = await self.client.get(NAMESPACES.path(name))
        return dict((body or {}).get("metadata", {}).get("labels") or {})

    async def secret(self, name: str) -> dict[str, str]:
        """Return a Secret of the operator's own namespace, decoded. Raises KubeError; values never stand in its text."""
        where = f'Secret "{name}" in namespace "{self.namespace}"'
        body = await self.client.get(SECRETS.path(name, self.namespace))
        if body is None:
            raise KubeError(f"{where} does not exist; create it there", reason="SecretNotFound", retryable=True)
        values = {}
        for key, value in (body.get("data") or {}).items():
            try:
                values[key] = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                # The error's own text quotes the value.
                raise KubeError(f"{where}: key {key} is not text in UTF-8", reason="SecretInvalid") from None
        self._on_secret(values.values())
        return values

    async def installation(self) -> str:
        """Return the id of this installation, made at its first start and kept for good.

        Raises KubeError if the ConfigMap that keeps it was emptied: another id would disown all that storage holds.
        """
        found = await self.known_installation()
        if found is None:
            return self._installation_of(await self._first_start())
        return found

    async def known_installation(self) -> str | None:
        """Return the id of this installation, or None if it was never started; raises as `installation`."""
        body = await self.client.get(CONFIG_MAPS.path(INSTALLATION, self.namespace))
        return self._installation_of(body) if body is not None else None

    async def hypervisor_names(self) -> tuple[str, ...]:
        """Return the names of all Hypervisor objects."""
        return tuple([str(body["metadata"]["name"]) async for body in self._all(HYPERVISORS)])

    async def class_names(self) -> tuple[str, ...]:
        """Return the names of all StorageDriverClass objects."""
        return tuple([str(body["metadata"]["name"]) async for body in self._all(CLASSES)])

    async def uids(self) -> frozenset[str]:
        """Return the UIDs of all VMSnapshots, VMRestores, StorageDriverClasses and Hypervisors as they are now."""
        kinds = (SNAPSHOTS, RESTORES, CLASSES, HYPERVISORS)
        return frozenset([_uid(body) for kind in kinds async for body in self._all(kind)])

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _all(self, resource: Resource) -> AsyncIterator[dict[str, Any]]:
        query = {"limit": str(_PAGE)}
        while True:
            page = await self.client.request("GET", resource.everywhere, query=query)
            for body in page.get("items") or ():
                yield body
            if not (token := (page.get("metadata") or {}).get("continue")):
                return
            query["continue"] = str(token)

    def _installation_of(self, body: Mapping[str, Any]) -> str:
        seed = str((body.get("data") or {}).get("seed") or "")
        if not seed:
            raise KubeError(
                f'ConfigMap "{INSTALLATION}" in namespace "{self.namespace}" holds no seed: restore it from a backup. With'
                " another one, what the storage systems hold of this installation would no longer be known as ours",
                reason="InstallationLost",
            )
        return names.installation_id(seed)

    async def _first_start(self) -> dict[str, Any]:
        body = {
            "apiVersion": CONFIG_MAPS.api_version,
            "kind": CONFIG_MAPS.kind,
            "metadata": {"name": INSTALLATION, "namespace": self.namespace},
            "immutable": True,
            "data": {"seed": secrets.token_hex(16)},
        }
        try:
            return await self.client.request("POST", CONFIG_MAPS.path(namespace=self.namespace), body)
        except ConflictError:
            # Another instance was faster, and its seed counts.
            found = await self.client.get(CONFIG_MAPS.path(INSTALLATION, self.namespace))
            if found is None:
                raise
            return found

    async def _write_status(
        self, resource: Resource, body: Mapping[str, Any], status: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Apply a status to exactly this object.

        The API server ignores `metadata.uid` when a status is applied; `metadata.resourceVersion` it respects, and no two
        objects ever share one, so that a re-created object is never written.
        """
        what, current = f"{resource.kind} {_name(body)}", body
        for _ in range(_TRIES):
            try:
                return await self._apply_status(resource, current, status)
            except ConflictError:
                found = await self.client.get(_path(resource, body))
            except KubeError as error:
                if error.reason != "NotFound":
                    raise
                found = None
            if found is None or _uid(found) != _uid(body):
                raise ConflictError(f"{what} is gone; looking again")
            current = found
        raise ConflictError(f"{what} changes faster than its status can be written")

    async def _apply_status(
        self, resource: Resource, body: Mapping[str, Any], status: Mapping[str, Any]
    ) -> dict[str, Any]:
        path = _path(resource, body, "status")
        identity = {k: v for k, v in body["metadata"].items() if k in ("name", "namespace", "resourceVersion")}
        wanted = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": identity, "status": status}
        written = await self.client.apply(path, wanted)
        if not _edited_by_others(written, status):
            return written
        # Applying overrides what others changed, but leaves what they added: theirs, until it is taken away.
        log.warning("%s %s: somebody else wrote into its status; removed", resource.kind, _name(body))
        operations = [*_exactly(written), {"op": "replace", "path": "/status", "value": dict(status)}]
        return await self.client.json_patch(path, operations)

    async def _patch_finalizers(self, body: Mapping[str, Any], finalizers: Sequence[str]) -> dict[str, Any]:
        operations = [*_exactly(body), {"op": "add", "path": "/metadata/finalizers", "value": list(finalizers)}]
        return await self.client.json_patch(_path(_tenants(body), body), operations)

    async def _again(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        return await self.client.get(_path(_tenants(body), body))

    async def _delete(self, path: str, uid: str | None) -> None:
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        try:
            await self.client.request("DELETE", path, options)
        except ConflictError:
            found = await self.client.get(path)
            if found is not None and (uid is None or _uid(found) == uid):
                raise
            # Else another object bears the name now: the one that was meant is gone.
        except KubeError as error:
            if error.reason != "NotFound":
                raise


def has_finalizer(body: Mapping[str, Any]) -> bool:
    """Tell whether an object bears our finalizer: we have begun with it, and not come to its end."""
    return FINALIZER in (body["metadata"].get("finalizers") or ())


def _uid(body: Mapping[str, Any]) -> str:
    return str(body["metadata"].get("uid", ""))


def _name(body: Mapping[str, Any]) -> str:
    meta = body["metadata"]
    return "/".join(str(meta[k]) for k in ("namespace", "name") if k in meta)


def _tenants(body: Mapping[str, Any]) -> Resource:
    """The kind of an object that bears our finalizer."""
    return RESTORES if body.get("kind") == RESTORES.kind else SNAPSHOTS


def _path(resource: Resource, body: Mapping[str, Any], subresource: str = "") -> str:
    return resource.path(body["metadata"]["name"], body["metadata"].get("namespace", ""), subresource)


def _edited_by_others(written: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Tell whether the status holds more than we wrote, and somebody else owns a part of it (not merely a default)."""
    owners = written["metadata"].get("managedFields") or ()
    ours = (FIELD_MANAGER, "Apply")
    others = any(
        (o.get("manager"), o.get("operation")) != ours and "f:status" in (o.get("fieldsV1") or {}) for o in owners
    )
    return others and conditions.changed(written.get("status") or {}, status)


def _exactly(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tests of a JSON patch that hold only while the object is the one that was read."""
    return [{"op": "test", "path": f"/metadata/{k}", "value": body["metadata"][k]} for k in ("uid", "resourceVersion")]
