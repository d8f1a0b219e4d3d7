"""What users and administrators write becomes the core's types, or is refused in plain words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.planning import Match, OverlaySettings, Policy
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.kube import distill
from vmsnapshot_operator.plan.access import may_use


def _snapshot(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "vmsnapshot.io/v1alpha1",
        "kind": "VMSnapshot",
        "metadata": {
            "name": "backup",
            "namespace": "team-a",
            "uid": "u-1",
            "generation": 3,
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {"source": {"hypervisorName": "lab", "domain": "demo"}, **spec},
    }


def test_a_short_request_has_the_defaults() -> None:
    request = distill.request(_snapshot())
    assert (request.uid, request.namespace, request.name, request.generation) == ("u-1", "team-a", "backup", 3)
    assert request.created == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (request.policy, request.method, request.strategy) == (Policy.PREFER, "Auto", "Auto")
    assert (request.deadline_seconds, request.ready_deadline_seconds, request.ttl_seconds) == (600, 86400, None)
    assert (request.retain, request.dry_run) == (False, False)


def test_a_full_request() -> None:
    request = distill.request(
        _snapshot(
            quiesce={"policy": "Require", "method": "GuestAgent", "maxFrozenSeconds": 5, "mountpoints": ["/", "/data"]},
            strategyName="Storage",
            volumes={"exclude": ["vdb"]},
            deadlineSeconds=10,
            readyDeadlineSeconds=20,
            deletionPolicy="Retain",
            ttlSeconds=30,
            dryRun=True,
        )
    )
    assert (request.policy, request.method, request.max_frozen_seconds) == (Policy.REQUIRE, "GuestAgent", 5)
    assert (request.mountpoints, request.strategy, request.exclude) == (("/", "/data"), "Storage", ("vdb",))
    assert (request.deadline_seconds, request.ready_deadline_seconds, request.ttl_seconds) == (10, 20, 30)
    assert (request.retain, request.dry_run) == (True, True)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"source": {}}, "source"),
        ({"source": {"hypervisorName": "lab"}}, "source.domain"),
        ({"deadlineSeconds": "soon"}, "deadlineSeconds"),
        ({"quiesce": {"policy": "Maybe"}}, "quiesce.policy"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_field(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(RefusedError) as caught:
        distill.request(_snapshot(**spec))
    assert 'VMSnapshot "backup"' in caught.value.message
    assert field in caught.value.message
    assert "soon" not in caught.value.message, "what was found may be a secret in the wrong place"


def test_a_storage_class() -> None:
    found = distill.storage_class(
        {
            "metadata": {"name": "fast"},
            "spec": {
                "driver": "libvirt-volume",
                "priority": 5,
                "match": [
                    {"type": "file", "pool": "fast"},
                    {"type": "network", "protocol": "rbd", "sourcePattern": "rbd/*", "format": "raw"},
                ],
                "parameters": {"pool": "fast"},
                "secretName": "s",
                "allowUnderFreeze": True,
            },
        }
    )
    assert (found.name, found.driver, found.priority, found.secret_name) == ("fast", "libvirt-volume", 5, "s")
    assert found.match == (
        Match(type="file", pool="fast"),
        Match(type="network", protocol="rbd", source_pattern="rbd/*", format="raw"),
    )
    assert (dict(found.parameters), found.allow_under_freeze) == ({"pool": "fast"}, True)
    assert (found.ready, found.capabilities) == (None, None)


def test_a_bad_storage_class_is_refused() -> None:
    with pytest.raises(RefusedError, match=r'StorageDriverClass "fast".*match'):
        distill.storage_class({"metadata": {"name": "fast"}, "spec": {"driver": "x"}})


def _hypervisor(**spec: Any) -> dict[str, Any]:
    endpoints = [{"transport": "unix", "socketPath": "/run/sock"}, {"transport": "tls", "host": "h1", "port": 1}]
    return {"metadata": {"name": "lab"}, "spec": {"libvirt": {"endpoints": endpoints}, **spec}}


def test_a_hypervisor_without_access_is_for_nobody() -> None:
    found = distill.hypervisor(_hypervisor())
    assert found.endpoints == (
        Endpoint(driver="qemu", transport="unix", socket_path="/run/sock"),
        Endpoint(driver="qemu", transport="tls", host="h1", port=1),
    )
    assert (found.name, found.secret_name, found.access, found.overlay) == ("lab", "", (), None)
    assert not may_use(found.access, {"kubernetes.io/metadata.name": "team-a"}, "demo")


def test_access_by_labels_and_expressions() -> None:
    selector = {
        "matchLabels": {"kubernetes.io/metadata.name": "team-a"},
        "matchExpressions": [{"key": "stage", "operator": "NotIn", "values": ["test"]}],
    }
    found = distill.hypervisor(_hypervisor(access=[{"namespaceSelector": selector, "domains": ["demo-*"]}]))
    labels = {"kubernetes.io/metadata.name": "team-a"}
    assert may_use(found.access, labels, "demo-1")
    assert not may_use(found.access, labels, "other")
    assert not may_use(found.access, {**labels, "stage": "test"}, "demo-1")
    assert not may_use(found.access, {"kubernetes.io/metadata.name": "team-b"}, "demo-1")


@pytest.mark.parametrize("selector", [{}, {"matchLabels": {}}, {"matchExpressions": []}])
def test_an_empty_selector_does_not_mean_everybody(selector: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"spec\.access\[0\]\.namespaceSelector is empty"):
        distill.hypervisor(_hypervisor(access=[{"namespaceSelector": selector, "domains": ["*"]}]))


def test_overlay_and_secret_of_a_hypervisor() -> None:
    body = _hypervisor(overlay={"poolName": "over", "minFreeBytes": 7})
    body["spec"]["libvirt"]["credentialsSecretName"] = "tls"
    found = distill.hypervisor(body)
    assert (found.overlay, found.secret_name) == (OverlaySettings(pool="over", min_free_bytes=7), "tls")
