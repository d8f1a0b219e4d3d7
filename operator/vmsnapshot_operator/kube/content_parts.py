"""Part by part, between a `Record` and the spec of a VMSnapshotContent. Pure; nothing that later decisions need is lost.

Not: whether what is read may be trusted (`kube.contents`). Readings of a monotonic clock mean nothing outside the process
that took them: they are kept in milliseconds since the first reading of the window, rounded so that no cut seems to lie
further inside the stillness than it did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vmsnapshot_operator.api.conditions import Reasoned
from vmsnapshot_operator.api.vmsnapshot import DeletionPolicy
from vmsnapshot_operator.api.vmsnapshot_content import (
    ContentCapabilities,
    ContentEvidence,
    ContentExcluded,
    ContentGroup,
    ContentLayer,
    ContentOutcome,
    ContentQuiesce,
    ContentSource,
    ContentStrategy,
    ContentVolume,
    SnapshotRef,
    VMSnapshotContentSpec,
)
from vmsnapshot_operator.core.driver import Capabilities, CutResult, Hold, SnapshotRequest
from vmsnapshot_operator.core.effects import Failure, Record, RecordedGroup, Verdict
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import Excluded, Plan, PlannedGroup, PlannedVolume, QuiesceChoice, Request
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, Volume, VolumeId
from vmsnapshot_operator.plan.next_effect import PREPARE_TIMEOUT
from vmsnapshot_operator.plan.report import clip
from vmsnapshot_operator.plan.verdict import overall

MAX_DEFINITION = 262_144
_MAX_NOTES, _MAX_EVIDENCE_NOTES = 64, 32
_MAX_READING = 86_400_000
_MAX_WORD = 255


# --- to the object ----------------------------------------------------------------------------------------------------


def to_spec(record: Record, request: Request, installation: str) -> VMSnapshotContentSpec:
    """Return all that is kept of a record. Texts for people are cut to what the schema allows, nothing else is."""
    plan, outcome = record.plan, record.outcome
    notes, definition = [clip(n) for n in plan.notes], plan.definition
    if len(definition) > MAX_DEFINITION:
        notes.append(f"the VM's definition is too long to be kept ({len(definition)} characters)")
        definition = ""
    volumes = tuple(_volume(v, record) for v in plan.volumes)
    whole = bool(record.verdicts) and all(v.handle is not None and v.consistency is not None for v in volumes)
    return VMSnapshotContentSpec(
        vm_snapshot_ref=SnapshotRef(namespace=request.namespace, name=request.name, uid=request.uid),
        installation=installation,
        attempt=record.attempt,
        deletion_policy=DeletionPolicy.RETAIN if request.retain else DeletionPolicy.DELETE,
        source=ContentSource(
            hypervisor_name=request.hypervisor,
            domain_name=plan.vm_name,
            domain_uuid=plan.vm_uuid,
            endpoint=plan.endpoint,
            run_id=plan.run_id,
            power_state=PowerState(plan.power),
        ),
        strategy=ContentStrategy(name=plan.strategy, reason=clip(plan.strategy_reason)),
        quiesce=ContentQuiesce(
            method=str(plan.quiesce.method),
            reason=clip(plan.quiesce.reason),
            budget_seconds=math.ceil(plan.quiesce.budget),
            mountpoints=plan.quiesce.mountpoints,
            expected_filesystems=plan.quiesce.expected_filesystems,
            holdsVM=plan.quiesce.holds_vm,
            overlay_pool_name=plan.quiesce.overlay_pool or None,
            collapsed=record.collapsed,
        ),
        groups=tuple(_group(g, record) for g in plan.groups),
        volumes=volumes,
        excluded=tuple(ContentExcluded(name=e.name, rule=e.rule, message=clip(e.message)) for e in plan.excluded),
        notes=tuple(notes[-_MAX_NOTES:]),
        domain_xml=definition,
        evidence=_evidence(outcome) if outcome is not None else None,
        outcome=_outcome(outcome) if outcome is not None else None,
        # Of a failed snapshot nothing is claimed as a whole, whatever its parts have.
        consistency=overall(record.verdicts) if whole and record.taken and outcome and outcome.cut_time else None,
        ready_time=record.ready_time if record.ready else None,
        failure=_failure(record.failure) if record.failure is not None else None,
    )


def _failure(failure: Failure) -> Reasoned:
    return Reasoned(reason=clip(failure.reason, _MAX_WORD), message=clip(failure.message))


def _volume(planned: PlannedVolume, record: Record) -> ContentVolume:
    volume = planned.volume
    result = record.groups[planned.class_name].result
    found = record.verdicts.get(volume.id)
    return ContentVolume(
        target=planned.target,
        id=volume.id,
        class_name=planned.class_name,
        reason=clip(planned.reason),
        size_bytes=volume.size_bytes,
        writable=_layer(volume.writable),
        backing=tuple(_layer(b) for b in volume.backing),
        unsafe=planned.unsafe,
        covered=planned.covered,
        handle=result.handles.get(volume.id) if result is not None else None,
        consistency=found.consistency if found is not None else None,
        consistency_reason=clip(found.why) if found is not None else None,
    )


def _layer(layer: Layer) -> ContentLayer:
    return ContentLayer(
        kind=layer.kind,
        source=layer.source,
        format=layer.format,
        protocol=layer.protocol,
        pool=layer.pool,
        hosts=layer.hosts,
        fingerprint=layer.fingerprint,
    )


def _group(planned: PlannedGroup, record: Record) -> ContentGroup:
    kept, can = record.groups[planned.class_name], planned.capabilities
    outcome = record.outcome.groups.get(planned.class_name) if record.outcome is not None else None
    bracket, zero = outcome.bracket if outcome is not None else None, _zero(record.outcome)
    result = kept.result
    return ContentGroup(
        class_name=planned.class_name,
        driver=kept.driver,
        parameters=dict(kept.parameters),
        secret_name=kept.secret_name or None,
        capabilities=ContentCapabilities(
            cut=can.cut,
            atomic=can.atomic,
            revert=can.revert,
            revert_newest_only=can.revert_newest_only,
            clone=can.clone,
            incremental=can.incremental,
            handle_format=can.handle_format,
        ),
        request_name=kept.request.name,
        atomic=result.atomic if result is not None else None,
        hold=result.hold if result is not None else None,
        group_handle=result.group if result is not None else None,
        cut_milliseconds=kept.cut_milliseconds,
        cut_start_milliseconds=_reading(bracket.start, zero, up=False) if bracket is not None else None,
        cut_end_milliseconds=_reading(bracket.end, zero, up=True) if bracket is not None else None,
        reason=clip(outcome.reason, _MAX_WORD) if outcome is not None else "",
        message=clip(outcome.message) if outcome is not None else "",
    )


def _evidence(outcome: WindowOutcome) -> ContentEvidence:
    seen, zero = outcome.evidence, _zero(outcome)
    return ContentEvidence(
        method=str(seen.method),
        still_from_milliseconds=_reading(seen.still_from, zero, up=True) if seen.still_from is not None else None,
        still_until_milliseconds=_reading(seen.still_until, zero, up=False) if seen.still_until is not None else None,
        frozen_time=seen.frozen_time,
        thawed_time=seen.thawed_time,
        frozen_milliseconds=min(_MAX_READING, max(0, seen.frozen_milliseconds)),
        covered_volumes=tuple(sorted(seen.covered)),
        unwritten_volumes=tuple(sorted(seen.unwritten)),
        filesystems_frozen=max(0, seen.frozen),
        filesystems_thawed=max(0, seen.thawed),
        freed_by_other=seen.freed_by_other,
        sameVM=seen.same_vm,
        shut_down_from_within=seen.shut_down_from_within,
        notes=tuple(clip(n) for n in seen.notes[-_MAX_EVIDENCE_NOTES:]),
    )


def _outcome(outcome: WindowOutcome) -> ContentOutcome:
    return ContentOutcome(
        cut_time=outcome.cut_time,
        free=outcome.free,
        interrupted=outcome.interrupted,
        fallback=outcome.fallback,
        reason=clip(outcome.reason, _MAX_WORD),
        message=clip(outcome.message),
    )


def _zero(outcome: WindowOutcome | None) -> float:
    """The first reading of the window, from which the others are counted."""
    if outcome is None:
        return 0.0
    brackets = [g.bracket for g in outcome.groups.values() if g.bracket is not None]
    readings = [outcome.evidence.still_from, outcome.evidence.still_until, *(b.start for b in brackets)]
    return min((r for r in readings if r is not None), default=0.0)


def _reading(moment: float, zero: float, *, up: bool) -> int:
    """Whole milliseconds since `zero`. By way of nanoseconds: else 1.001 s would be 1000 ms for the noise of its last bit."""
    nanoseconds = round((moment - zero) * 1_000_000_000)
    rounded = -(-nanoseconds // 1_000_000) if up else nanoseconds // 1_000_000
    return min(_MAX_READING, max(0, rounded))


# --- and back ---------------------------------------------------------------------------------------------------------


def to_record(spec: VMSnapshotContentSpec, name: str, version: str) -> Record:
    """Return the record that was kept; `version` is what was read."""
    plan = _plan(spec)
    groups = {k.class_name: _group_back(k, p, spec.volumes) for k, p in zip(spec.groups, plan.groups, strict=True)}
    return Record(
        name=name,
        attempt=spec.attempt,
        plan=plan,
        groups=groups,
        outcome=_outcome_back(spec, groups),
        verdicts={
            VolumeId(v.id): Verdict(consistency=v.consistency, why=v.consistency_reason or "")
            for v in spec.volumes
            if v.consistency is not None
        },
        failure=Failure(reason=spec.failure.reason, message=spec.failure.message) if spec.failure is not None else None,
        ready=spec.ready_time is not None,
        ready_time=spec.ready_time,
        retain=spec.deletion_policy is DeletionPolicy.RETAIN,
        collapsed=spec.quiesce.collapsed,
        version=version,
    )


def _plan(spec: VMSnapshotContentSpec) -> Plan:
    volumes = tuple(_volume_back(v) for v in spec.volumes)
    return Plan(
        vm_name=spec.source.domain_name,
        vm_uuid=spec.source.domain_uuid,
        endpoint=spec.source.endpoint,
        run_id=spec.source.run_id,
        power=spec.source.power_state,
        strategy=spec.strategy.name,
        strategy_reason=spec.strategy.reason,
        quiesce=QuiesceChoice(
            method=spec.quiesce.method,
            reason=spec.quiesce.reason,
            budget=Seconds(float(spec.quiesce.budget_seconds)),
            mountpoints=spec.quiesce.mountpoints,
            expected_filesystems=spec.quiesce.expected_filesystems,
            holds_vm=spec.quiesce.holds_vm,
            overlay_pool=spec.quiesce.overlay_pool_name or "",
        ),
        volumes=volumes,
        groups=tuple(_planned_group(g, volumes) for g in spec.groups),
        excluded=tuple(Excluded(name=e.name, rule=e.rule, message=e.message) for e in spec.excluded),
        notes=spec.notes,
        definition=spec.domain_xml,
    )


def _planned_group(kept: ContentGroup, volumes: Sequence[PlannedVolume]) -> PlannedGroup:
    can = kept.capabilities
    return PlannedGroup(
        class_name=kept.class_name,
        driver=kept.driver,
        parameters=dict(kept.parameters),
        secret_name=kept.secret_name or "",
        capabilities=Capabilities(
            cut=can.cut,
            atomic=can.atomic,
            revert=can.revert,
            revert_newest_only=can.revert_newest_only,
            clone=can.clone,
            incremental=can.incremental,
            handle_format=can.handle_format,
        ),
        volumes=tuple(v.volume for v in volumes if v.class_name == kept.class_name),
    )


def _volume_back(kept: ContentVolume) -> PlannedVolume:
    return PlannedVolume(
        target=kept.target,
        volume=Volume(
            id=VolumeId(kept.id),
            label=kept.target,
            writable=to_layer(kept.writable),
            backing=tuple(to_layer(b) for b in kept.backing),
            size_bytes=kept.size_bytes,
        ),
        class_name=kept.class_name,
        reason=kept.reason,
        unsafe=kept.unsafe,
        covered=kept.covered,
    )


def to_layer(kept: ContentLayer) -> Layer:
    """Return one image of a disk's chain."""
    return Layer(
        kind=kept.kind,
        source=kept.source,
        format=kept.format,
        protocol=kept.protocol,
        pool=kept.pool,
        hosts=kept.hosts,
        fingerprint=kept.fingerprint,
    )


def _group_back(kept: ContentGroup, planned: PlannedGroup, volumes: Sequence[ContentVolume]) -> RecordedGroup:
    mine = [v for v in volumes if v.class_name == kept.class_name]
    result = CutResult(
        handles={VolumeId(v.id): Handle(v.handle) for v in mine if v.handle is not None},
        atomic=bool(kept.atomic),
        hold=kept.hold if kept.hold is not None else Hold.NOTHING,
        group=Handle(kept.group_handle) if kept.group_handle is not None else None,
    )
    return RecordedGroup(
        class_name=kept.class_name,
        driver=kept.driver,
        parameters=dict(kept.parameters),
        secret_name=kept.secret_name or "",
        # A deadline is the caller's of each call; the object keeps none.
        request=SnapshotRequest(name=kept.request_name, volumes=planned.volumes, timeout=PREPARE_TIMEOUT),
        result=result if kept.atomic is not None else None,
        cut_milliseconds=kept.cut_milliseconds,
    )


def _outcome_back(spec: VMSnapshotContentSpec, groups: Mapping[str, RecordedGroup]) -> WindowOutcome | None:
    kept, seen = spec.outcome, spec.evidence
    if kept is None or seen is None:
        return None
    return WindowOutcome(
        attempt=spec.attempt,
        evidence=Evidence(
            method=seen.method,
            still_from=_seconds(seen.still_from_milliseconds),
            still_until=_seconds(seen.still_until_milliseconds),
            frozen_time=seen.frozen_time,
            thawed_time=seen.thawed_time,
            frozen_milliseconds=seen.frozen_milliseconds,
            covered=frozenset(VolumeId(v) for v in seen.covered_volumes),
            unwritten=frozenset(VolumeId(v) for v in seen.unwritten_volumes),
            frozen=seen.filesystems_frozen,
            thawed=seen.filesystems_thawed,
            freed_by_other=seen.freed_by_other,
            same_vm=seen.same_vm,
            shut_down_from_within=seen.shut_down_from_within,
            notes=seen.notes,
        ),
        groups={
            g.class_name: GroupOutcome(
                class_name=g.class_name,
                bracket=_bracket(g),
                result=groups[g.class_name].result,
                reason=g.reason,
                message=g.message,
            )
            for g in spec.groups
        },
        free=kept.free,
        cut_time=kept.cut_time,
        interrupted=kept.interrupted,
        fallback=kept.fallback,
        reason=kept.reason,
        message=kept.message,
    )


def _bracket(kept: ContentGroup) -> Bracket | None:
    start, end = _seconds(kept.cut_start_milliseconds), _seconds(kept.cut_end_milliseconds)
    return Bracket(start=start, end=end) if start is not None and end is not None else None


def _seconds(reading: int | None) -> Seconds | None:
    return Seconds(reading / 1000) if reading is not None else None
