"""What the operator tells fits the schema: a status with a field that is not declared would be refused as a whole."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.api.vmsnapshot import VMSnapshotStatus
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, SnapshotRequest
from vmsnapshot_operator.core.effects import Condition, Failure, Observation, Record, RecordedGroup, Verdict
from vmsnapshot_operator.core.evidence import Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.planning import Excluded, Plan, PlannedGroup, PlannedVolume, QuiesceChoice, Request
from vmsnapshot_operator.core.volumes import Consistency, Handle, Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.kube import conditions as kube_conditions
from vmsnapshot_operator.plan import conditions, report

NOW = datetime(2026, 1, 5, 10, tzinfo=UTC)
LONG = "x" * 5000
LAYER = Layer(kind=SourceKind.FILE, source="/vm/a.raw", format="raw")
VOLUME = Volume(id=volume_id(LAYER), label="vda", writable=LAYER, size_bytes=2**40)
CAPABILITIES = Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True)
REQUEST = Request(uid="u", namespace="team-a", name="a", generation=1, created=NOW, hypervisor="lab", domain="demo")
PLAN = Plan(
    vm_name="demo",
    vm_uuid="3f1c2d9e-8a51-4c11-9d6f-0d1f2a3b4c5d",
    endpoint="kvm1",
    run_id=7,
    power="Running",
    strategy="Storage",
    strategy_reason=LONG,
    quiesce=QuiesceChoice(
        method="GuestAgent", reason=LONG, budget=Seconds(29.6), expected_filesystems=1, holds_vm=True
    ),
    volumes=(PlannedVolume(target="vda", volume=VOLUME, class_name="files", reason=LONG, covered=True),),
    groups=(
        PlannedGroup(
            class_name="files",
            driver="libvirt-volume",
            parameters={},
            secret_name="",
            capabilities=CAPABILITIES,
            volumes=(VOLUME,),
        ),
    ),
    excluded=(Excluded(name="sda", rule="RemovableMedia", message=LONG),),
    notes=(LONG,),
)


def taken() -> Record:
    """A snapshot with all that can be told of one."""
    result = CutResult(handles={VOLUME.id: Handle("/vm/vms-a.raw")}, atomic=True)
    name = names.request_name("abc234", "u", 1, "files", [VOLUME.id])
    request = SnapshotRequest(name=name, volumes=(VOLUME,), timeout=Seconds(60))
    group = RecordedGroup(
        class_name="files",
        driver="libvirt-volume",
        parameters={},
        secret_name="",
        request=request,
        result=result,
        cut_milliseconds=4,
    )
    evidence = Evidence(
        method="GuestAgent",
        still_from=Seconds(0.1),
        still_until=Seconds(0.2),
        frozen_time=NOW,
        thawed_time=NOW + timedelta(milliseconds=245),
        frozen_milliseconds=245,
        frozen=1,
        thawed=1,
        same_vm=True,
    )
    outcome = WindowOutcome(
        attempt=1,
        evidence=evidence,
        groups={"files": GroupOutcome(class_name="files", result=result)},
        free=True,
        cut_time=NOW,
    )
    return Record(
        name="vmsnapcontent-u",
        attempt=1,
        plan=PLAN,
        groups={"files": group},
        outcome=outcome,
        verdicts={VOLUME.id: Verdict(consistency=Consistency.FILESYSTEM, why=LONG)},
        ready=True,
        ready_time=NOW,
    )


def undeclared(declared: dict[str, Any], value: Any, path: str = "") -> list[str]:
    """Fields of a value that a structural schema does not know."""
    if isinstance(value, list):
        return [u for each in value for u in undeclared(declared["items"], each, f"{path}[]")]
    if not isinstance(value, dict):
        return []
    known = declared.get("properties", {})
    inner = [u for k, v in value.items() if k in known for u in undeclared(known[k], v, f"{path}.{k}")]
    return [f"{path}.{k}" for k in value if k not in known] + inner


def seen(**facts: Any) -> Observation:
    return Observation(request=REQUEST, **facts)


STATES: dict[str, tuple[Observation, tuple[Condition, ...]]] = {
    "planning": (first := seen(), conditions.in_progress(first, "Planning")),
    "planned": (plan := seen(plan=PLAN), conditions.dry_run(plan)),
    "refused": (first, conditions.refused(first, Failure(reason="DomainNotFound", message=LONG))),
    "ready": (done := seen(record=taken()), conditions.ready(done, taken())),
    "failed": (
        lost := seen(
            record=taken(),
            held={"files": frozenset({"vms-a", "vms-b"})},
            unlisted={"ceph": LONG},
            trouble=LONG,
            deleting=True,
        ),
        conditions.failed(lost, taken(), Failure(reason="CutFailed", message=LONG)),
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_status_is_declared_and_within_bounds(state: str) -> None:
    observation, decided = STATES[state]
    status = report.status(observation, decided) | {"observedGeneration": 1}
    status["conditions"] = kube_conditions.merge((), decided, 1, NOW)
    crd = schema.crd(next(k for k in schema.KINDS if k.name == "VMSnapshot"))
    declared = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    assert undeclared(declared, status) == []
    read = VMSnapshotStatus.from_body(status)
    assert read.observed_generation == 1
    assert len(read.conditions) == len(decided)


def test_what_is_not_declared_is_found() -> None:
    declared = {"properties": {"a": {"items": {"properties": {"b": {}}}}}}
    assert undeclared(declared, {"a": [{"b": 1, "c": 2}], "d": 3}) == [".d", ".a[].c"]
