"""Records of one snapshot, as they are kept in its content."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult
from vmsnapshot_operator.core.effects import Record, RecordedGroup
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Plan, PlannedGroup, PlannedVolume, Policy, QuiesceChoice, Request
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import verdict
from vmsnapshot_operator.plan.next_effect import requests_for

INSTALLATION = "abc234"
REQUEST = Request(
    uid="6b0c2f5e-0f7e-4e0a-9f83-0d3c0e0a0001",
    namespace="team-a",
    name="backup",
    generation=1,
    created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    hypervisor="lab",
    domain="demo",
    policy=Policy.PREFER,
)


def intent(plan: Plan, attempt: int) -> Record:
    """What is written before the first cut of an attempt."""
    requests = requests_for(plan, INSTALLATION, REQUEST.uid, attempt)
    return Record(
        name=contents.name_for(REQUEST.uid),
        attempt=attempt,
        plan=plan,
        groups={
            g.class_name: RecordedGroup(
                class_name=g.class_name,
                driver=g.driver,
                parameters=g.parameters,
                secret_name=g.secret_name,
                request=requests[g.class_name],
            )
            for g in plan.groups
        },
    )


def example(*, done: bool = True) -> Record:
    """Three disks by two classes."""

    def volume(target: str, source: str, class_name: str) -> PlannedVolume:
        layer = Layer(kind=SourceKind.FILE, source=source, format="raw")
        made = Volume(id=volume_id(layer), label=target, writable=layer, size_bytes=1)
        return PlannedVolume(target=target, volume=made, class_name=class_name, reason="the only class that matches")

    volumes = (volume("vda", "/a", "fast"), volume("vdb", "/b", "fast"), volume("vdc", "/c", "slow"))
    groups = tuple(
        PlannedGroup(
            class_name=c,
            driver="libvirt-volume",
            parameters={},
            secret_name="",
            capabilities=Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True),
            volumes=tuple(v.volume for v in volumes if v.class_name == c),
        )
        for c in ("fast", "slow")
    )
    plan = Plan(
        vm_name="demo",
        vm_uuid="u",
        endpoint="",
        run_id=1,
        power=PowerState.RUNNING,
        strategy="Storage",
        strategy_reason="",
        quiesce=QuiesceChoice(method="Pause", reason="", budget=Seconds(30.0), holds_vm=True),
        volumes=volumes,
        groups=groups,
    )
    record = intent(plan, 1)
    if not done:
        return record
    results = {
        g.class_name: CutResult(handles={v.id: Handle(f"h-{v.label}") for v in g.volumes}, atomic=True) for g in groups
    }
    bracket = Bracket(start=Seconds(0.001), end=Seconds(0.002))
    outcome = WindowOutcome(
        attempt=1,
        evidence=Evidence(method="Pause", still_from=Seconds(0.0), still_until=Seconds(0.01), same_vm=True),
        groups={c: GroupOutcome(class_name=c, bracket=bracket, result=r) for c, r in results.items()},
        free=True,
        cut_time=REQUEST.created,
    )
    return replace(
        record,
        outcome=outcome,
        groups={c: replace(g, result=results[c], cut_milliseconds=1) for c, g in record.groups.items()},
        verdicts=verdict.judge(plan, outcome),
    )
