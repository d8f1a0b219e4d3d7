"""What is done to our objects, against an API server in memory: races that a real one would show only sometimes."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.unit.kube.fake_api import FakeClient
from vmsnapshot_operator.core import names
from vmsnapshot_operator.errors import ConflictError, KubeError, KubeUnavailableError
from vmsnapshot_operator.kube.cluster import FINALIZER, Cluster

SNAPSHOT = "/apis/vmsnapshot.io/v1alpha1/namespaces/team-a/vmsnapshots/backup"
CONFIG_MAP = "/api/v1/namespaces/system/configmaps/vmsnapshot-installation"
SECRET = "/api/v1/namespaces/system/secrets/ceph"  # noqa: S105 - a path


@pytest.fixture
def api() -> FakeClient:
    return FakeClient()


@pytest.fixture
def cluster(api: FakeClient) -> Cluster:
    made = Cluster(namespace="system")
    made.client = api
    return made


@pytest.fixture
def body(api: FakeClient) -> dict[str, Any]:
    return api.put(SNAPSHOT, {"metadata": {"name": "backup", "namespace": "team-a"}, "spec": {}})


def _meta(api: FakeClient) -> dict[str, Any]:
    return api.objects[SNAPSHOT]["metadata"]


async def test_the_finalizer_joins_those_of_others(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    body = api.put(SNAPSHOT, {**body, "metadata": {**body["metadata"], "finalizers": ["other/one"]}})
    await cluster.add_finalizer(body)
    assert _meta(api)["finalizers"] == ["other/one", FINALIZER]
    await cluster.remove_finalizer(await cluster.snapshot("team-a", "backup") or {})
    assert _meta(api)["finalizers"] == ["other/one"]


async def test_a_finalizer_that_is_there_is_not_written_again(
    cluster: Cluster, api: FakeClient, body: dict[str, Any]
) -> None:
    there = await cluster.add_finalizer(body)
    api.requests.clear()
    await cluster.add_finalizer(there)
    assert api.requests == []


async def test_a_concurrent_write_is_read_again(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    api.put(SNAPSHOT, {**body, "metadata": {**body["metadata"], "finalizers": ["other/one"]}})
    await cluster.add_finalizer(body)
    assert _meta(api)["finalizers"] == ["other/one", FINALIZER]


async def test_an_object_that_changes_all_the_time_is_a_conflict(
    cluster: Cluster, api: FakeClient, body: dict[str, Any]
) -> None:
    def change(method: str, path: str) -> None:
        if method == "PATCH":
            api.put(path, api.objects[path])

    api.before = change
    with pytest.raises(ConflictError, match="changes faster"):
        await cluster.add_finalizer(body)


async def test_an_object_being_deleted_takes_no_finalizer(
    cluster: Cluster, api: FakeClient, body: dict[str, Any]
) -> None:
    api.put(SNAPSHOT, {**body, "metadata": {**body["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}})
    with pytest.raises(ConflictError, match="being deleted"):
        await cluster.add_finalizer(body)


@pytest.mark.parametrize("method", ["add_finalizer", "write_snapshot_status"])
async def test_a_recreated_object_is_never_written(
    cluster: Cluster, api: FakeClient, body: dict[str, Any], method: str
) -> None:
    other = {"metadata": {"name": "backup", "namespace": "team-a", "uid": "another"}, "spec": {}}
    api.put(SNAPSHOT, other)
    with pytest.raises(ConflictError, match="is gone"):
        await (
            cluster.add_finalizer(body)
            if method == "add_finalizer"
            else cluster.write_snapshot_status(body, {"phase": "X"})
        )
    assert "finalizers" not in _meta(api)
    assert "status" not in api.objects[SNAPSHOT]


async def test_removing_looks_past_a_stale_body(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    await cluster.add_finalizer(body)
    await cluster.remove_finalizer(body)  # read before the finalizer was set
    assert _meta(api)["finalizers"] == []


async def test_removing_from_what_is_gone_is_success(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    held = await cluster.add_finalizer(body)
    del api.objects[SNAPSHOT]
    await cluster.remove_finalizer(held)
    api.put(SNAPSHOT, {"metadata": {"name": "backup", "namespace": "team-a", "finalizers": [FINALIZER]}})
    await cluster.remove_finalizer(held)
    assert _meta(api)["finalizers"] == [FINALIZER], "that is another object's"


async def test_deleting_means_this_very_object(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    api.put(SNAPSHOT, {"metadata": {"name": "backup", "namespace": "team-a", "uid": "another"}})
    await cluster.delete_snapshot(body)
    assert SNAPSHOT in api.objects
    await cluster.delete_snapshot(api.objects[SNAPSHOT])
    assert SNAPSHOT not in api.objects
    await cluster.delete_snapshot(body)


async def test_status_is_written_past_a_concurrent_change(
    cluster: Cluster, api: FakeClient, body: dict[str, Any]
) -> None:
    api.put(SNAPSHOT, {**body, "metadata": {**body["metadata"], "labels": {"a": "b"}}})
    written = await cluster.write_snapshot_status(body, {"phase": "Ready"})
    assert written["status"] == {"phase": "Ready"}
    assert written["metadata"]["labels"] == {"a": "b"}


async def test_a_content_is_replaced_only_as_it_was_read(cluster: Cluster) -> None:
    body = {
        "apiVersion": "vmsnapshot.io/v1alpha1",
        "kind": "VMSnapshotContent",
        "metadata": {"name": "c"},
        "spec": {"attempt": 1},
    }
    with pytest.raises(ConflictError, match="was not read"):
        await cluster.replace_content(body)
    first = await cluster.create_content(body)
    with pytest.raises(ConflictError):
        await cluster.create_content(body)
    await cluster.replace_content({**first, "spec": {"attempt": 2}})
    with pytest.raises(ConflictError):
        await cluster.replace_content({**first, "spec": {"attempt": 3}})
    assert (await cluster.content("c") or {})["spec"] == {"attempt": 2}
    await cluster.delete_content("c", None)
    await cluster.delete_content("c", None)
    with pytest.raises(ConflictError, match="is gone"):
        await cluster.replace_content(first)


def _secret(value: str) -> dict[str, Any]:
    return {"metadata": {"name": "ceph", "namespace": "system"}, "data": {"key": value}}


async def test_a_secret_is_decoded(cluster: Cluster, api: FakeClient) -> None:
    api.put(SECRET, _secret(base64.b64encode("schlüssel".encode()).decode()))
    assert await cluster.secret("ceph") == {"key": "schlüssel"}


async def test_a_secret_that_is_no_text_is_not_quoted(cluster: Cluster, api: FakeClient) -> None:
    api.put(SECRET, _secret(base64.b64encode(b"\xffhidden").decode()))
    with pytest.raises(KubeError) as caught:
        await cluster.secret("ceph")
    assert caught.value.reason == "SecretInvalid"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "hidden" not in caught.value.message


async def test_a_missing_secret_says_where_to_create_it(cluster: Cluster) -> None:
    with pytest.raises(KubeError, match='Secret "ceph" in namespace "system" does not exist') as caught:
        await cluster.secret("ceph")
    assert caught.value.retryable


async def test_read_secrets_are_handed_to_who_hides_them(api: FakeClient) -> None:
    hidden: list[str] = []
    cluster = Cluster(namespace="system", on_secret=hidden.extend)
    cluster.client = api
    api.put(SECRET, _secret(base64.b64encode(b"s3cret").decode()))
    await cluster.secret("ceph")
    assert hidden == ["s3cret"]


async def test_the_installation_stays_the_same(cluster: Cluster, api: FakeClient) -> None:
    first = await cluster.installation()
    assert first == await cluster.installation()
    assert first == names.installation_id(api.objects[CONFIG_MAP]["data"]["seed"])
    assert api.objects[CONFIG_MAP]["immutable"] is True


async def test_of_two_first_starts_one_seed_counts(cluster: Cluster, api: FakeClient) -> None:
    def another_first(method: str, path: str) -> None:
        if method == "POST":
            api.put(CONFIG_MAP, {"metadata": {"name": "vmsnapshot-installation"}, "data": {"seed": "theirs"}})

    api.before = another_first
    assert await cluster.installation() == names.installation_id("theirs")


async def test_an_emptied_installation_is_not_replaced_by_another(cluster: Cluster, api: FakeClient) -> None:
    api.put(CONFIG_MAP, {"metadata": {"name": "vmsnapshot-installation"}, "data": {}})
    with pytest.raises(KubeError) as caught:
        await cluster.installation()
    assert caught.value.reason == "InstallationLost"
    assert api.objects[CONFIG_MAP]["data"] == {}


async def test_a_silent_api_server_is_told_as_such(cluster: Cluster, api: FakeClient, body: dict[str, Any]) -> None:
    def silent(method: str, path: str) -> None:
        raise KubeUnavailableError("no answer")

    api.before = silent
    for call in (
        cluster.remove_finalizer(body),
        cluster.delete_snapshot(body),
        cluster.write_snapshot_status(body, {}),
    ):
        with pytest.raises(KubeUnavailableError):
            await call
