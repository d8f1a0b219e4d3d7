"""The models: read from what the API server sends, written as it takes it, and agreeing with the core's words."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from vmsnapshot_operator.api import meta
from vmsnapshot_operator.api.conditions import Condition, ConditionType
from vmsnapshot_operator.api.hypervisor import Hypervisor
from vmsnapshot_operator.api.storage_driver_class import CapabilitiesReport, StorageDriverClass
from vmsnapshot_operator.api.vmrestore import Mode, VMRestore, VMRestoreSpec
from vmsnapshot_operator.api.vmsnapshot import Quiesce, VMSnapshot, VMSnapshotSpec, VMSnapshotStatus
from vmsnapshot_operator.api.vmsnapshot_content import ContentGroup, VMSnapshotContent
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities
from vmsnapshot_operator.core.planning import Policy
from vmsnapshot_operator.core.volumes import Consistency
from vmsnapshot_operator.errors import RefusedError

SNAPSHOT: dict[str, Any] = {
    "apiVersion": meta.API_VERSION,
    "kind": "VMSnapshot",
    "metadata": {"name": "a", "namespace": "team-a", "uid": "u", "generation": 1, "managedFields": [{"manager": "x"}]},
    "spec": {"source": {"hypervisorName": "lab", "domain": "demo"}},
}


def with_spec(**changes: Any) -> dict[str, Any]:
    body = copy.deepcopy(SNAPSHOT)
    body["spec"] |= changes
    return body


def test_defaults_are_the_schemas() -> None:
    spec = VMSnapshot.from_body(SNAPSHOT).spec
    assert spec.quiesce == Quiesce(policy=Policy.PREFER, method="Auto")
    assert spec.to_body() == {
        "source": {"hypervisorName": "lab", "domain": "demo"},
        "quiesce": {"policy": "Prefer", "method": "Auto", "mountpoints": []},
        "strategyName": "Auto",
        "volumes": {"exclude": []},
        "deadlineSeconds": 600,
        "readyDeadlineSeconds": 86400,
        "deletionPolicy": "Delete",
        "dryRun": False,
    }


def test_fields_are_camel_case_on_the_wire_and_snake_case_here() -> None:
    spec = VMSnapshotSpec.from_body(with_spec(deadlineSeconds=5)["spec"])
    assert spec.deadline_seconds == 5
    assert spec.to_body()["deadlineSeconds"] == 5
    with pytest.raises(RefusedError):
        VMSnapshotSpec.from_body(with_spec(dead_line_seconds=5)["spec"])


def test_a_model_cannot_be_changed() -> None:
    spec = VMSnapshot.from_body(SNAPSHOT).spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.dry_run = True  # type: ignore[misc]  # that is what is tried


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadlineSeconds", "5"),
        ("deadlineSeconds", 5.0),
        ("deadlineSeconds", True),
        ("dryRun", "true"),
        ("dryRun", 1),
        ("strategyName", 5),
    ],
)
def test_values_are_taken_as_they_are(field: str, value: object) -> None:
    with pytest.raises(RefusedError, match=field):
        VMSnapshot.from_body(with_spec(**{field: value}))


def test_a_refusal_names_the_fields_and_hides_the_values() -> None:
    body = with_spec(source={"hypervisorName": "UPPER", "domain": ""}, unknown="hunter2")
    with pytest.raises(RefusedError) as caught:
        VMSnapshot.from_body(body)
    assert caught.value.reason == "InvalidObject"
    for field in ("spec.source.hypervisorName", "spec.source.domain", "spec.unknown"):
        assert field in caught.value.message
    assert "hunter2" not in caught.value.message
    assert "UPPER" not in caught.value.message
    assert caught.value.__cause__ is None, "the library's own error repeats the values"


def test_an_unknown_field_in_status_is_of_a_later_version() -> None:
    body = SNAPSHOT | {
        "status": {"observedGeneration": 3, "weather": "fine", "quiesce": {"method": "Pause", "mood": "good"}}
    }
    status = VMSnapshot.from_body(body).status
    assert status.observed_generation == 3
    assert status.quiesce is not None
    assert status.quiesce.method == "Pause"


def test_a_fresh_status_is_behind() -> None:
    assert VMSnapshot.from_body(SNAPSHOT).status.observed_generation == -1


@pytest.mark.parametrize("consistency", Consistency)
def test_consistency_is_spelled_as_the_core_does(consistency: Consistency) -> None:
    status = VMSnapshotStatus(consistency=consistency)
    assert status.to_body()["consistency"] == consistency.word
    assert VMSnapshotStatus.from_body({"consistency": consistency.word}).consistency is consistency
    allowed = VMSnapshotStatus.model_json_schema()["properties"]["consistency"]["anyOf"][0]["enum"]
    assert sorted(allowed) == sorted(c.word for c in Consistency)


def test_an_unknown_consistency_is_refused() -> None:
    with pytest.raises(RefusedError, match="consistency"):
        VMSnapshotStatus.from_body({"consistency": "Perfect"})


def test_times_are_written_in_utc() -> None:
    moment = datetime(2026, 1, 5, 12, 0, 0, 250_000, tzinfo=timezone(timedelta(hours=2)))
    status = VMSnapshotStatus(creation_time=moment)
    assert status.to_body()["creationTime"] == "2026-01-05T10:00:00.250000Z"
    assert VMSnapshotStatus.from_body(status.to_body()).creation_time == moment
    with pytest.raises(ValidationError):
        VMSnapshotStatus(creation_time=datetime(2026, 1, 5))  # noqa: DTZ001 - that is what is tried


def test_a_request_name_is_one_of_ours() -> None:
    name = names.request_name("abc234", "uid", names.MAX_ATTEMPT, "ceph", [])
    capabilities = {"cut": "Instant", "atomic": True, "revert": True, "revertNewestOnly": False, "clone": True}
    group = {"className": "ceph", "driver": "ceph-rbd", "capabilities": capabilities, "requestName": name}
    assert ContentGroup.from_body(group).request_name == name
    with pytest.raises(RefusedError, match="requestName"):
        ContentGroup.from_body(group | {"requestName": "vms-" + name})


def test_conditions_have_kubernetes_own_form() -> None:
    told = {
        "type": ConditionType.READY,
        "status": "True",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-05T10:00:00Z",
        "reason": "Ready",
        "message": "",
    }
    condition = Condition.from_body(told)
    assert condition.last_transition_time == datetime(2026, 1, 5, 10, tzinfo=UTC)
    with pytest.raises(RefusedError):
        Condition.from_body(told | {"status": "Maybe"})
    with pytest.raises(RefusedError):
        Condition.from_body(told | {"reason": "not one word"})


def test_capabilities_are_those_of_the_core() -> None:
    assert set(CapabilitiesReport.model_fields) == set(Capabilities.__slots__)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (Hypervisor, "spec"),
        (StorageDriverClass, "spec"),
        (VMSnapshot, "spec"),
        (VMSnapshotContent, "spec"),
        (VMRestore, "spec"),
    ],
)
def test_an_object_without_a_spec_is_refused(model: type[Hypervisor], field: str) -> None:
    with pytest.raises(RefusedError, match=field):
        model.from_body({"apiVersion": meta.API_VERSION, "kind": model.__name__, "metadata": {"name": "a"}})


@pytest.mark.parametrize(
    ("mode", "asked", "taken"),
    [
        (Mode.IN_PLACE, None, True),
        (Mode.IN_PLACE, True, True),
        (Mode.IN_PLACE, False, False),
        (Mode.NEW_VM, None, False),
        (Mode.NEW_VM, False, False),
    ],
)
def test_a_safety_snapshot_is_of_what_a_restore_changes(mode: Mode, asked: bool | None, taken: bool) -> None:
    assert VMRestoreSpec(snapshot_name="a", mode=mode, safety_snapshot=asked).takes_safety_snapshot is taken


def test_bodies_of_other_mappings_are_read() -> None:
    class View(dict[str, Any]):
        """What a client may hand out instead of a plain dict."""

    assert VMSnapshot.from_body(View(SNAPSHOT)).metadata.name == "a"


def test_names_of_the_group() -> None:
    assert meta.FINALIZER == "vmsnapshot.io/cleanup"
    assert meta.content_name("u") == "vmsnapcontent-u"
    assert yaml.safe_load(f"x: {meta.API_VERSION}") == {"x": "vmsnapshot.io/v1alpha1"}
    assert get_args(Condition.model_fields["status"].annotation) == ("True", "False", "Unknown")
