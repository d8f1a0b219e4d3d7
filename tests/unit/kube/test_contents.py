"""A record survives being kept in a VMSnapshotContent, and a content that was changed by another hand is never used."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kube.records import INSTALLATION, REQUEST, example, intent
from vmsnapshot_operator.api.vmsnapshot_content import VMSnapshotContent
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Hold
from vmsnapshot_operator.core.effects import Failure, Record
from vmsnapshot_operator.core.evidence import Bracket, Evidence, GroupOutcome, WindowOutcome
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import (
    Excluded,
    Plan,
    PlannedGroup,
    PlannedVolume,
    QuiesceChoice,
)
from vmsnapshot_operator.core.volumes import NVRAM, Consistency, Handle, Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.kube.content_parts import MAX_DEFINITION
from vmsnapshot_operator.plan import verdict

# An example is large, and takes long on a busy machine without anything being wrong.
several = settings(max_examples=25, deadline=None)

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=30)
words = st.from_regex(r"[A-Z][A-Za-z]{0,12}", fullmatch=True)
slugs = st.from_regex(r"[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)
moments = st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone comes with `timezones`
counts = st.integers(0, 1000)
milliseconds = st.integers(0, 600_000)
layers = st.builds(
    Layer,
    kind=st.sampled_from(SourceKind),
    source=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1, max_size=40),
    format=slugs,
    protocol=st.sampled_from(["", "rbd"]),
    pool=st.one_of(st.just(""), slugs),
    hosts=st.lists(slugs, max_size=3).map(tuple),
    fingerprint=texts,
)
capabilities = st.builds(
    Capabilities,
    cut=st.sampled_from(CutKind),
    atomic=st.booleans(),
    revert=st.booleans(),
    revert_newest_only=st.booleans(),
    clone=st.booleans(),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    classes = draw(st.lists(slugs, min_size=1, max_size=3, unique=True).map(sorted))
    writables = draw(st.lists(layers, min_size=len(classes), max_size=6, unique_by=volume_id))
    volumes = []
    last = len(writables) - 1 if len(writables) > 1 and draw(st.booleans()) else None
    for i, writable in enumerate(writables):
        target = NVRAM if i == last else f"vd{chr(ord('a') + i)}"
        volume = Volume(
            id=volume_id(writable),
            label=target,
            writable=writable,
            backing=tuple(draw(st.lists(layers, max_size=2))),
            size_bytes=draw(st.integers(0, 2**50)),
        )
        class_name = classes[i] if i < len(classes) else draw(st.sampled_from(classes))
        volumes.append(
            PlannedVolume(
                target=target,
                volume=volume,
                class_name=class_name,
                reason=draw(texts),
                unsafe=draw(st.booleans()),
                covered=draw(st.booleans()),
            )
        )
    groups = tuple(
        PlannedGroup(
            class_name=c,
            driver=draw(slugs),
            parameters=draw(st.dictionaries(slugs, texts, max_size=3)),
            secret_name=draw(st.one_of(st.just(""), slugs)),
            capabilities=draw(capabilities),
            volumes=tuple(v.volume for v in volumes if v.class_name == c),
        )
        for c in classes
    )
    return Plan(
        vm_name=draw(slugs),
        vm_uuid=draw(st.uuids()).hex,
        endpoint=draw(texts),
        run_id=draw(st.integers(-1, 10_000)),
        power=draw(st.sampled_from(PowerState)),
        strategy=draw(words),
        strategy_reason=draw(texts),
        quiesce=QuiesceChoice(
            method=draw(words),
            reason=draw(texts),
            budget=Seconds(float(draw(st.integers(1, 600)))),
            mountpoints=tuple(draw(st.lists(st.just("/").flatmap(lambda s: slugs.map(lambda n: s + n)), max_size=3))),
            expected_filesystems=draw(counts),
            holds_vm=draw(st.booleans()),
        ),
        volumes=tuple(volumes),
        groups=groups,
        excluded=tuple(draw(st.lists(st.builds(Excluded, name=slugs, rule=words, message=texts), max_size=2))),
        notes=tuple(draw(st.lists(texts, max_size=3))),
        definition=draw(texts),
    )


intents = st.builds(intent, plans(), st.integers(1, names.MAX_ATTEMPT))


@st.composite
def outcomes(draw: st.DrawFn, record: Record, *, whole: bool) -> WindowOutcome:
    """A window in readings of whole milliseconds since its first one, as a content tells it."""
    groups = {}
    for group in record.plan.groups:
        start = draw(milliseconds)
        cut = whole or draw(st.booleans())
        result = CutResult(
            handles={v.id: Handle(draw(texts.filter(bool))) for v in group.volumes},
            atomic=draw(st.booleans()),
            hold=draw(st.sampled_from(Hold)),
            group=draw(st.none() | texts.filter(bool).map(Handle)),
        )
        groups[group.class_name] = GroupOutcome(
            class_name=group.class_name,
            bracket=Bracket(start=Seconds(start / 1000), end=Seconds((start + draw(milliseconds)) / 1000))
            if cut
            else None,
            result=result if cut else None,
            reason="" if cut else draw(words),
            message="" if cut else draw(texts),
        )
    still_until = draw(milliseconds)
    evidence = Evidence(
        method=record.plan.quiesce.method,
        still_from=Seconds(0.0),
        still_until=Seconds(still_until / 1000),
        frozen_time=draw(st.none() | moments),
        thawed_time=draw(st.none() | moments),
        frozen_milliseconds=draw(milliseconds),
        covered=frozenset(draw(st.lists(st.sampled_from([v.volume.id for v in record.plan.volumes])))),
        unwritten=frozenset(draw(st.lists(st.sampled_from([v.volume.id for v in record.plan.volumes])))),
        frozen=draw(counts),
        thawed=draw(counts),
        freed_by_other=draw(st.booleans()),
        same_vm=draw(st.booleans()),
        shut_down_from_within=draw(st.booleans()),
        notes=tuple(draw(st.lists(texts, max_size=2))),
    )
    return WindowOutcome(
        attempt=record.attempt,
        evidence=evidence,
        groups=groups,
        free=draw(st.booleans()),
        cut_time=draw(moments),
        reason="" if whole else draw(words),
        message=draw(texts),
        interrupted=draw(st.booleans()),
        fallback=draw(st.booleans()),
    )


@st.composite
def taken(draw: st.DrawFn) -> Record:
    """What is written after a window that succeeded, settled or not."""
    record = draw(intents)
    outcome = draw(outcomes(record, whole=True))
    ready_time = draw(st.none() | moments)
    return replace(
        record,
        outcome=outcome,
        groups={
            c: replace(g, result=outcome.groups[c].result, cut_milliseconds=draw(milliseconds))
            for c, g in record.groups.items()
        },
        verdicts=verdict.judge(record.plan, outcome),
        ready=ready_time is not None,
        ready_time=ready_time,
    )


@st.composite
def failed(draw: st.DrawFn) -> Record:
    """What is written when there will be no snapshot, after a window or without one."""
    record = draw(intents)
    failure = Failure(reason=draw(words), message=draw(texts))
    if draw(st.booleans()):
        return replace(record, failure=failure)
    outcome = draw(outcomes(record, whole=False))
    return replace(record, outcome=outcome, failure=failure)


def keep(record: Record, version: str = "7") -> dict[str, Any]:
    """Write a record and let the API server give it back."""
    body = json.loads(json.dumps(contents.to_body(record, REQUEST, INSTALLATION)))
    body["metadata"] |= {"resourceVersion": version, "uid": "u", "managedFields": []}
    VMSnapshotContent.from_body(body)
    return dict(body)


def read(body: dict[str, Any]) -> Record:
    return contents.from_body(body, REQUEST, INSTALLATION)


@several
@given(intents | taken())
def test_a_round_trip_loses_nothing(record: Record) -> None:
    assert read(keep(record)) == replace(record, version="7")


@several
@given(failed())
def test_a_failure_keeps_all_but_the_handles_that_nobody_will_use(record: Record) -> None:
    back = read(keep(record))
    outcome = record.outcome
    if outcome is not None:
        groups = {c: replace(g, result=None) for c, g in outcome.groups.items()}
        outcome = replace(outcome, groups=groups)
    assert back == replace(record, version="7", outcome=outcome)
    assert not back.taken


@several
@given(taken(), st.integers(0, 10**6), st.data())
def test_rounding_never_claims_more(record: Record, boot: int, data: st.DataObject) -> None:
    """Readings with fractions, of any origin: judged again after a round trip, no volume gets better than it was."""
    outcome = record.outcome
    assert outcome is not None
    shift = lambda t: Seconds(boot + t + data.draw(st.integers(0, 2000)) / 1e6)  # noqa: E731 - one line, used thrice
    evidence = replace(outcome.evidence, still_from=shift(0.0), still_until=shift(outcome.evidence.still_until or 0.0))
    groups = {
        c: replace(g, bracket=Bracket(start=(s := shift(g.bracket.start)), end=Seconds(max(s, shift(g.bracket.end)))))
        for c, g in outcome.groups.items()
        if g.bracket is not None
    }
    precise = replace(outcome, evidence=evidence, groups=groups)
    back = read(keep(replace(record, outcome=precise))).outcome
    assert back is not None
    before, after = verdict.judge(record.plan, precise), verdict.judge(record.plan, back)
    assert all(after[v].consistency <= before[v].consistency for v in before)
    assert back.evidence.still_from is not None
    assert back.evidence.still_from < 1.0, "readings of a dead process's clock must not look like ours"


@pytest.mark.parametrize("boot", [0, 1_000_000])
def test_whole_milliseconds_stay_what_they_are(boot: int) -> None:
    record = example()
    assert record.outcome is not None
    for ms in (1, 3, 7, 1001, 1009, 2005, 599_999):
        bracket = Bracket(start=Seconds(boot + ms / 1000), end=Seconds(boot + (ms + 1) / 1000))
        groups = {c: replace(g, bracket=bracket) for c, g in record.outcome.groups.items()}
        evidence = replace(
            record.outcome.evidence, still_from=Seconds(float(boot)), still_until=Seconds(boot + (ms + 2) / 1000)
        )
        spec = keep(replace(record, outcome=replace(record.outcome, groups=groups, evidence=evidence)))["spec"]
        assert (spec["evidence"]["stillFromMilliseconds"], spec["evidence"]["stillUntilMilliseconds"]) == (0, ms + 2)
        assert {(g["cutStartMilliseconds"], g["cutEndMilliseconds"]) for g in spec["groups"]} == {(ms, ms + 1)}


@several
@given(taken())
def test_stillness_that_never_was_does_not_come_back(record: Record) -> None:
    outcome = record.outcome
    assert outcome is not None
    never = replace(outcome, evidence=replace(outcome.evidence, still_from=None, still_until=None))
    back = read(keep(replace(record, outcome=never, verdicts=verdict.judge(record.plan, never)))).outcome
    assert back is not None
    assert back.evidence.still_from is None
    assert back.evidence.still_until is None


def _spec(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda body: change(body["spec"])


def _swap_sources(spec: dict[str, Any]) -> None:
    spec["volumes"][0]["writable"]["source"] = "/somebody-elses"


def _take_name_of_another(spec: dict[str, Any]) -> None:
    members = [v["id"] for v in spec["volumes"] if v["className"] == "fast"]
    spec["groups"][0]["requestName"] = names.request_name(INSTALLATION, "another-uid", 1, "fast", members)


def _rename_class(spec: dict[str, Any]) -> None:
    spec["groups"][0]["className"] = "other"
    for volume in spec["volumes"]:
        volume["className"] = volume["className"].replace("fast", "other")


def _move_volume(spec: dict[str, Any]) -> None:
    spec["volumes"][1]["className"] = "slow"


def _add_volume(spec: dict[str, Any]) -> None:
    layer = Layer(kind=SourceKind.FILE, source="/theirs", format="raw")
    spec["volumes"].append({**spec["volumes"][0], "target": "vdz", "id": volume_id(layer)})
    spec["volumes"][-1]["writable"] = {"kind": "file", "source": "/theirs", "format": "raw"}


def _volume_twice(spec: dict[str, Any]) -> None:
    spec["volumes"].append({**spec["volumes"][0], "target": "vdz"})


FORGERIES = {
    "another attempt": _spec(lambda s: s.update(attempt=2)),
    "another source": _spec(_swap_sources),
    "the name of another object's cut": _spec(_take_name_of_another),
    "another class": _spec(_rename_class),
    "a volume moved to another class": _spec(_move_volume),
    "a volume more": _spec(_add_volume),
    "a volume less": _spec(lambda s: s["volumes"].pop(0)),
    "a volume twice": _spec(_volume_twice),
    "a group less": _spec(lambda s: s["groups"].pop()),
    "a group without volumes": _spec(lambda s: s["groups"].append({**s["groups"][0], "className": "third"})),
    "nothing at all": lambda b: b["spec"].pop("volumes"),
    "nonsense": _spec(lambda s: s.update(attempt="one")),
    "an unknown kind of source": _spec(lambda s: s["volumes"][0]["writable"].update(kind="tape")),
}

STRANGERS = {
    "another namespace": _spec(lambda s: s["vmSnapshotRef"].update(namespace="team-b")),
    "another object": _spec(lambda s: s["vmSnapshotRef"].update(name="other")),
    "another incarnation": _spec(lambda s: s["vmSnapshotRef"].update(uid="0")),
    "no object": _spec(lambda s: s.pop("vmSnapshotRef")),
    "nothing to read": lambda b: b.pop("spec"),
    "another installation": _spec(lambda s: s.update(installation="zzz234")),
    "another name": lambda b: b["metadata"].update(name="vmsnapcontent-other"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("done", [True, False])
def test_a_forged_content_is_never_used(forgery: str, done: bool) -> None:
    body = keep(example(done=done))
    assert read(copy.deepcopy(body)).problem == ""
    FORGERIES[forgery](body)
    record = read(body)
    assert "cannot be trusted" in record.problem
    assert not record.foreign
    assert not record.taken
    assert (record.plan.volumes, record.plan.groups, record.groups) == ((), (), {}), (
        "nothing that it names may be reached"
    )


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_content_of_somebody_else_is_foreign(stranger: str) -> None:
    body = keep(example())
    STRANGERS[stranger](body)
    record = read(body)
    assert record.foreign
    assert "cannot be trusted" in record.problem
    assert record.groups == {}


def test_it_replaces_only_what_was_read() -> None:
    record = example()
    assert "resourceVersion" not in contents.to_body(record, REQUEST, INSTALLATION)["metadata"]
    again = contents.to_body(replace(record, version="12"), REQUEST, INSTALLATION)
    assert again["metadata"]["resourceVersion"] == "12"


def test_texts_are_cut_to_what_the_schema_allows_and_a_long_definition_is_told() -> None:
    record = example()
    plan = replace(record.plan, notes=("n" * 5000,), strategy_reason="r" * 5000, definition="x" * (MAX_DEFINITION + 1))
    back = read(keep(replace(record, plan=plan)))
    assert back.problem == ""
    assert back.plan.definition == ""
    assert back.plan.notes[-1] == f"the VM's definition is too long to be kept ({MAX_DEFINITION + 1} characters)"
    assert len(back.plan.strategy_reason) == 1024


def test_what_does_not_fit_is_refused_and_never_cut_short() -> None:
    record = example()
    group = record.groups["slow"]
    assert group.result is not None
    handles = {v: Handle("h" * 5000) for v in group.result.handles}
    long = replace(group, result=replace(group.result, handles=handles))
    with pytest.raises(RefusedError, match="cannot be written down") as caught:
        contents.to_body(replace(record, groups={**record.groups, "slow": long}), REQUEST, INSTALLATION)
    assert "hhh" not in caught.value.message


def test_a_consistency_is_claimed_only_of_what_was_taken_whole() -> None:
    record = example()
    assert keep(record)["spec"]["consistency"] == "Crash"
    assert "consistency" not in keep(replace(record, failure=Failure(reason="Lost", message="")))["spec"]
    group = record.groups["slow"]
    assert group.result is not None
    lost = replace(group, result=replace(group.result, handles={}))
    assert "consistency" not in keep(replace(record, groups={**record.groups, "slow": lost}))["spec"]


def test_what_was_said_of_volumes_comes_back() -> None:
    back = read(keep(example()))
    assert {v.consistency for v in back.verdicts.values()} == {Consistency.CRASH}
    assert back.taken
    assert math.isclose(back.plan.quiesce.budget, 30.0)
