"""Our objects on a real API server: what only it can show (managed fields, versions, races, schemas).

The kinds are installed a second time under another group, so that an operator that runs meanwhile does not touch them.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import Lab
from tests.stack import NAMESPACE, Stack, until
from tests.unit.kube import records
from vmsnapshot_operator.errors import ConflictError, KubeError
from vmsnapshot_operator.kube import cluster as cluster_module
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.kube.client import Resource
from vmsnapshot_operator.kube.cluster import FINALIZER, Cluster
from vmsnapshot_operator.kube.events import Events
from vmsnapshot_operator.kube.lease import NAME, Durations, Leadership

GROUP = "kube-test.vmsnapshot.io"
CRDS = Path(__file__).resolve().parent.parent.parent / "crds"
KINDS = ("SNAPSHOTS", "RESTORES", "CONTENTS", "CLASSES", "HYPERVISORS")


@dataclass(frozen=True)
class Place:
    """Where these tests work."""

    lab: Lab
    namespace: str

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """Run kubectl as the administrator."""
        return self.lab.kubectl(*arguments, stdin=stdin)


@pytest.fixture(scope="module")
def place(lab: Lab) -> Iterator[Place]:
    namespace = f"kube-{secrets.token_hex(4)}"
    documents = [_renamed(yaml.safe_load(p.read_text())) for p in sorted(CRDS.glob("*.yaml"))]
    names = [f"customresourcedefinitions/{d['metadata']['name']}" for d in documents]
    try:
        lab.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(documents))
        lab.kubectl("wait", "--for=condition=Established", "--timeout=60s", *names)
        lab.kubectl("create", "namespace", namespace)
        yield Place(lab, namespace)
    finally:
        lab.kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")
        lab.kubectl("delete", "--wait=false", "--ignore-not-found", *names)


def _renamed(document: dict[str, Any]) -> dict[str, Any]:
    """The same kind under another group, without the short names, which are taken."""
    document["metadata"]["name"] = f"{document['spec']['names']['plural']}.{GROUP}"
    document["spec"]["group"] = GROUP
    for taken in ("shortNames", "categories"):
        document["spec"]["names"].pop(taken, None)
    return document


@pytest.fixture(autouse=True)
def _other_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KINDS:
        monkeypatch.setattr(cluster_module, name, replace(getattr(cluster_module, name), group=GROUP))


@pytest.fixture
async def cluster(place: Place) -> AsyncIterator[Cluster]:
    async with Cluster(namespace=place.namespace, kubeconfig=place.lab.kubeconfig) as made:
        yield made


def _resource(name: str) -> Resource:
    found: Resource = getattr(cluster_module, name)
    return found


async def _create(cluster: Cluster, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    resource = _resource(kind)
    meta = {"name": f"a-{secrets.token_hex(4)}"} | ({"namespace": cluster.namespace} if resource.namespaced else {})
    body = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": meta, "spec": spec}
    return await cluster.client.request("POST", resource.path(namespace=cluster.namespace), body)


def _content_body() -> dict[str, Any]:
    body = contents.to_body(records.example(), records.REQUEST, records.INSTALLATION)
    return {**body, "apiVersion": f"{GROUP}/v1alpha1"}


SPECS: dict[str, dict[str, Any]] = {
    "SNAPSHOTS": {"source": {"hypervisorName": "lab", "domain": "demo"}},
    "RESTORES": {"snapshotName": "before", "mode": "InPlace"},
    "CONTENTS": _content_body()["spec"],
    "CLASSES": {"driver": "libvirt-volume", "match": [{"type": "file"}]},
    "HYPERVISORS": {"libvirt": {"endpoints": [{"driver": "test"}]}},
}
WRITERS = {
    "SNAPSHOTS": Cluster.write_snapshot_status,
    "RESTORES": Cluster.write_restore_status,
    "CONTENTS": Cluster.write_content_status,
    "CLASSES": Cluster.write_class_status,
    "HYPERVISORS": Cluster.write_hypervisor_status,
}


def _status(ready: str = "False") -> dict[str, Any]:
    condition = {
        "type": "Ready",
        "status": ready,
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-02T03:04:05Z",
        "reason": "NotYet",
        "message": "",
    }
    return {"observedGeneration": 1, "conditions": [condition]}


@pytest.fixture
async def snapshot(cluster: Cluster) -> dict[str, Any]:
    return await _create(cluster, "SNAPSHOTS", SPECS["SNAPSHOTS"])


async def _read(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    found = await cluster.snapshot(body["metadata"]["namespace"], body["metadata"]["name"])
    assert found is not None
    return found


# --- who we are ---------------------------------------------------------------------------------------------------------


async def test_a_service_account_is_known_to_the_api_server(place: Place) -> None:
    place.kubectl("-n", place.namespace, "create", "serviceaccount", "tester")
    kubeconfig = place.lab.service_account_kubeconfig(place.namespace, "tester")
    review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    async with Cluster(namespace=place.namespace, kubeconfig=kubeconfig) as cluster:
        answer = await cluster.client.request("POST", "/apis/authentication.k8s.io/v1/selfsubjectreviews", review)
        with pytest.raises(KubeError, match="check the operator's RBAC") as caught:
            await cluster.secret("anything")
    assert answer["status"]["userInfo"]["username"] == f"system:serviceaccount:{place.namespace}:tester"
    assert (caught.value.reason, caught.value.retryable) == ("Forbidden", True)


async def test_secret_and_labels(place: Place, cluster: Cluster) -> None:
    place.kubectl("-n", place.namespace, "create", "secret", "generic", "keys", "--from-literal=key=välue")
    assert await cluster.secret("keys") == {"key": "välue"}
    assert (await cluster.namespace_labels(place.namespace))["kubernetes.io/metadata.name"] == place.namespace
    assert await cluster.namespace_labels("no-such-namespace") == {}


# --- status -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_writing_the_same_status_again_changes_nothing(cluster: Cluster, kind: str) -> None:
    body = await _create(cluster, kind, SPECS[kind])
    assert body["status"] == {"observedGeneration": -1}
    first = await WRITERS[kind](cluster, body, _status())
    assert first["status"] == _status()
    again = await WRITERS[kind](cluster, first, _status())
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    stale = await WRITERS[kind](cluster, body, _status())
    assert stale["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    changed = await WRITERS[kind](cluster, first, _status("True"))
    assert changed["status"] == _status("True")
    assert changed["metadata"]["generation"] == 1


async def test_a_status_edited_by_hand_is_healed(place: Place, cluster: Cluster, snapshot: dict[str, Any]) -> None:
    await cluster.write_snapshot_status(snapshot, {**_status(), "phase": "Planning"})
    lie = {
        "status": {
            "phase": "Ready",
            "consistency": "Filesystem",
            "leftovers": [{"className": "fast", "name": "x"}],
            "conditions": [
                *_status("True")["conditions"],
                {**_status()["conditions"][0], "type": "Stalled", "status": "True"},
            ],
        }
    }
    name = f"vmsnapshots.{GROUP}/{snapshot['metadata']['name']}"
    place.kubectl("-n", place.namespace, "patch", name, "--subresource=status", "--type=merge", "-p", json.dumps(lie))
    edited = await _read(cluster, snapshot)
    assert edited["status"]["consistency"] == "Filesystem"
    truth = {**_status(), "phase": "Planning"}
    healed = await cluster.write_snapshot_status(edited, truth)
    assert healed["status"] == truth
    assert (await _read(cluster, snapshot))["status"] == truth
    shorter = await cluster.write_snapshot_status(healed, _status())
    assert shorter["status"] == _status(), "what we no longer say goes, also after healing"


async def test_a_recreated_object_is_never_written(cluster: Cluster, snapshot: dict[str, Any]) -> None:
    await cluster.delete_snapshot(snapshot)
    again = {k: snapshot[k] for k in ("apiVersion", "kind", "spec")}
    again["metadata"] = {k: snapshot["metadata"][k] for k in ("name", "namespace")}
    await cluster.client.request("POST", _resource("SNAPSHOTS").path(namespace=cluster.namespace), again)
    with pytest.raises(ConflictError, match="is gone"):
        await cluster.write_snapshot_status(snapshot, _status("True"))
    with pytest.raises(ConflictError, match="is gone"):
        await cluster.add_finalizer(snapshot)
    await cluster.remove_finalizer(snapshot)
    await cluster.delete_snapshot(snapshot)
    left = await _read(cluster, snapshot)
    assert left["status"] == {"observedGeneration": -1}
    assert "deletionTimestamp" not in left["metadata"]
    await cluster.delete_snapshot(left)
    with pytest.raises(ConflictError, match="is gone"):
        await cluster.write_snapshot_status(left, _status())


# --- finalizer and deletion -----------------------------------------------------------------------------------------------


async def test_the_finalizer_holds_until_it_is_removed(cluster: Cluster, snapshot: dict[str, Any]) -> None:
    held = await cluster.add_finalizer(snapshot)
    assert held["metadata"]["finalizers"] == [FINALIZER]
    await cluster.delete_snapshot(held)
    deleting = await _read(cluster, snapshot)
    assert deleting["metadata"]["deletionTimestamp"]
    written = await cluster.write_snapshot_status(deleting, _status())
    await cluster.remove_finalizer(snapshot)  # an old body, from before the finalizer
    assert await cluster.snapshot(cluster.namespace, snapshot["metadata"]["name"]) is None
    await cluster.remove_finalizer(written)
    await cluster.delete_snapshot(written)


async def test_finalizers_of_others_survive_a_race(place: Place, cluster: Cluster, snapshot: dict[str, Any]) -> None:
    name = f"vmsnapshots.{GROUP}/{snapshot['metadata']['name']}"
    theirs = {"metadata": {"finalizers": ["example.org/theirs"]}}
    place.kubectl("-n", place.namespace, "patch", name, "--type=merge", "-p", json.dumps(theirs))
    held = await cluster.add_finalizer(snapshot)
    assert held["metadata"]["finalizers"] == ["example.org/theirs", FINALIZER]
    await asyncio.gather(*(cluster.add_finalizer(snapshot) for _ in range(5)))
    await cluster.remove_finalizer(held)
    assert (await _read(cluster, snapshot))["metadata"]["finalizers"] == ["example.org/theirs"]
    place.kubectl("-n", place.namespace, "patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":[]}}')


async def test_what_exists_is_told_by_uid(place: Place, cluster: Cluster, snapshot: dict[str, Any]) -> None:
    spec = {"snapshotName": "backup", "mode": "NewVM", "newVM": {"name": "another"}}
    waiting, begun = [await _create(cluster, "RESTORES", spec) for _ in range(2)]
    await cluster.add_finalizer(begun)
    others = [await _create(cluster, kind, SPECS[kind]) for kind in ("CLASSES", "HYPERVISORS")]
    assert await cluster.restores_under_way() == {begun["metadata"]["uid"]}
    made = {body["metadata"]["uid"] for body in (snapshot, waiting, begun, *others)}
    assert made <= await cluster.uids()
    await cluster.remove_finalizer({**begun, "metadata": {**begun["metadata"], "finalizers": [FINALIZER]}})
    await cluster.delete_snapshot(snapshot)
    assert await cluster.restores_under_way() == frozenset()
    assert made - await cluster.uids() == {snapshot["metadata"]["uid"]}


async def test_no_finalizer_for_what_is_being_deleted(place: Place, cluster: Cluster, snapshot: dict[str, Any]) -> None:
    name = f"vmsnapshots.{GROUP}/{snapshot['metadata']['name']}"
    theirs = {"metadata": {"finalizers": ["example.org/theirs"]}}
    place.kubectl("-n", place.namespace, "patch", name, "--type=merge", "-p", json.dumps(theirs))
    await cluster.delete_snapshot(snapshot)
    with pytest.raises(ConflictError, match="being deleted"):
        await cluster.add_finalizer(snapshot)
    place.kubectl("-n", place.namespace, "patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":[]}}')


# --- contents -------------------------------------------------------------------------------------------------------------


async def test_a_record_survives_the_api_server(cluster: Cluster) -> None:
    """From intent through taken to ready, each by one write, with the schema's own rules in between."""

    def body(record: Any) -> dict[str, Any]:
        made = contents.to_body(record, records.REQUEST, records.INSTALLATION)
        return {**made, "apiVersion": f"{GROUP}/v1alpha1"}

    def read(stored: dict[str, Any] | None) -> Any:
        assert stored is not None
        return contents.from_body(stored, records.REQUEST, records.INSTALLATION)

    intent, taken = records.example(done=False), records.example()
    created = read(await cluster.create_content(body(intent)))
    assert created == replace(intent, version=created.version)
    with pytest.raises(ConflictError):
        await cluster.create_content(body(intent))
    kept = read(await cluster.replace_content(body(replace(taken, version=created.version))))
    assert kept == replace(taken, version=kept.version)
    with pytest.raises(ConflictError):
        await cluster.replace_content(body(replace(intent, version=created.version)))
    ready = replace(kept, ready=True, ready_time=records.REQUEST.created)
    await cluster.replace_content(body(ready))
    stored = read(await cluster.content(taken.name))
    assert stored == replace(ready, version=stored.version)
    await cluster.delete_content(taken.name, "another-uid")
    assert await cluster.content(taken.name) is not None
    await cluster.delete_content(taken.name, None)
    await cluster.delete_content(taken.name, None)
    with pytest.raises(ConflictError, match="is gone"):
        await cluster.replace_content(body(ready))


# --- installation, leases, events ---------------------------------------------------------------------------------------------


async def test_instances_that_start_together_agree_on_the_installation(place: Place) -> None:
    async def start() -> str:
        async with Cluster(namespace=place.namespace, kubeconfig=place.lab.kubeconfig) as cluster:
            return await cluster.installation()

    assert len(set(await asyncio.gather(*(start() for _ in range(5))))) == 1


async def test_of_two_instances_one_leads_and_hands_over(place: Place) -> None:
    durations = Durations(lease=8.0, request=2.0, retry=0.2)
    async with (
        Cluster(namespace=place.namespace, kubeconfig=place.lab.kubeconfig) as first,
        Cluster(namespace=place.namespace, kubeconfig=place.lab.kubeconfig) as second,
    ):
        one = Leadership(first, identity="one", durations=durations)
        two = Leadership(second, identity="two", durations=durations)
        loop = asyncio.get_running_loop()

        async def until(leader: Leadership, seconds: float) -> float:
            start = loop.time()
            async with asyncio.timeout(seconds):
                while not leader.is_leader():
                    assert sum(i.is_leader() for i in (one, two)) <= 1
                    await asyncio.sleep(0.02)
            return loop.time() - start

        run_one, run_two = asyncio.create_task(one.run()), None
        try:
            await until(one, 30)
            run_two = asyncio.create_task(two.run())
            async with one.outlasting(16.0) as ours:
                assert ours
                assert one.is_leader(15.0)
                await asyncio.sleep(9.0)  # longer than the lease: it is renewed meanwhile
                assert one.is_leader(2.0)
                assert not two.is_leader()
            lease = await first.client.get(f"/apis/coordination.k8s.io/v1/namespaces/{place.namespace}/leases/{NAME}")
            assert lease is not None
            assert lease["spec"]["holderIdentity"] == "one"
            await asyncio.sleep(0.5)  # one more renewal, now for the usual time
            run_one.cancel()
            await asyncio.wait({run_one})
            assert not one.is_leader()
            assert await until(two, 30) < durations.lease, "it did not have to wait for the lease to run out"
        finally:
            tasks = [t for t in (run_one, run_two) if t is not None]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def test_a_standby_takes_over_from_one_that_was_killed(stack: Stack) -> None:
    def holder() -> str:
        words = ("-n", NAMESPACE, "get", "lease", NAME, "-o", "jsonpath={.spec.holderIdentity}")
        return stack.lab.kubectl(*words).strip()

    stack.start_operator("standby", wait=False)
    try:
        time.sleep(5)  # by then it has seen who leads
        assert holder() == "operator"
        stack.programs.pop("operator").kill()
        # Below 15 s by reckoning; one that waited for two leases would take more than 20.
        until("the standby leads", lambda: holder() == "standby", 19)
    finally:
        stack.programs.pop("standby").stop()
        if "operator" not in stack.programs:
            stack.start_operator()


async def test_events_are_accepted_and_not_repeated(place: Place, cluster: Cluster, snapshot: dict[str, Any]) -> None:
    events = Events(cluster, instance="test")
    storage = await _create(cluster, "CLASSES", SPECS["CLASSES"])
    for _ in range(3):
        await events.emit(snapshot, "Normal", "SnapshotTaken", "3 disks")
    await events.emit(snapshot, "Warning", "CutFailed", "ä" * 3000)
    await events.emit(storage, "Warning", "DriverUnavailable", "it does not start")

    def posted(namespace: str, uid: str) -> list[tuple[str, str, str]]:
        found = json.loads(place.kubectl("-n", namespace, "get", "events.events.k8s.io", "-o", "json"))["items"]
        return sorted(
            (e["type"], e["reason"], e["reportingController"]) for e in found if e["regarding"].get("uid") == uid
        )

    assert posted(place.namespace, snapshot["metadata"]["uid"]) == [
        ("Normal", "SnapshotTaken", "vmsnapshot.io/operator"),
        ("Warning", "CutFailed", "vmsnapshot.io/operator"),
    ]
    assert posted("default", storage["metadata"]["uid"]) == [("Warning", "DriverUnavailable", "vmsnapshot.io/operator")]
