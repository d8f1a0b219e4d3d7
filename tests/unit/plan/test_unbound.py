"""What becomes of a content whose VMSnapshot is gone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.kube import records
from vmsnapshot_operator.core.effects import Failure
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan import unbound
from vmsnapshot_operator.plan.next_effect import requests_for
from vmsnapshot_operator.plan.unbound import Ask, Drop, Nothing, Remove, Seen

UID = records.REQUEST.uid
RECORD = replace(records.example(), ready=True)
GONE = Seen(
    record=RECORD,
    uid=UID,
    owner=f"team-a/backup (uid {UID})",
    owner_exists=False,
    missing_for=unbound.GRACE,
    installation=records.INSTALLATION,
)


def name(attempt: int = 1, class_name: str = "fast") -> str:
    return requests_for(RECORD.plan, records.INSTALLATION, UID, attempt)[class_name].name


def held(**names: set[str]) -> dict[str, frozenset[str]]:
    return {"fast": frozenset(), "slow": frozenset()} | {c: frozenset(n) for c, n in names.items()}


def reason(seen: Seen) -> str:
    told = unbound.decide(seen).told
    return told.conditions[0].reason if told is not None else ""


def test_it_is_asked_then_removed_then_dropped() -> None:
    assert isinstance(unbound.decide(GONE).effect, Ask)
    left = held(fast={name()}, slow={name(class_name="slow")})
    assert unbound.decide(replace(GONE, held=left)).effect == Remove(left)
    assert isinstance(unbound.decide(replace(GONE, held=held())).effect, Drop)


def test_earlier_attempts_go_as_well_and_later_ones_never() -> None:
    later = replace(GONE, record=replace(RECORD, attempt=2), held=held(fast={name(1), name(2), name(3)}))
    assert unbound.decide(later).effect == Remove({"fast": frozenset({name(1), name(2)})})
    assert isinstance(unbound.decide(replace(later, held=held(fast={name(3)}))).effect, Drop)


def test_what_is_not_its_own_is_never_removed() -> None:
    strange = held(fast={"vms-abc234-aaaaaaaaaa-01-aaaaaa", "backup", name() + "x"})
    assert isinstance(unbound.decide(replace(GONE, held=strange)).effect, Drop)


def test_retained_is_kept_and_said() -> None:
    seen = replace(GONE, record=replace(RECORD, retain=True), held=held(fast={name()}))
    assert unbound.decide(seen).effect == Nothing()
    assert reason(seen) == "Retained"
    failed = replace(RECORD, retain=True, failure=Failure(reason="CutFailed", message="no"))
    assert isinstance(unbound.decide(replace(GONE, record=failed)).effect, Ask), (
        "there is nothing to retain of a failure"
    )


def test_what_came_from_a_backup_is_not_touched() -> None:
    seen = replace(GONE, whole=True, held=held(fast={name()}), namesake="another")
    assert unbound.decide(seen).effect == Nothing()
    assert reason(seen) == "RestoredFromBackup"
    told = unbound.decide(seen).told
    assert told is not None
    assert "uid another" in told.conditions[0].message


def test_a_forged_one_is_never_acted_upon() -> None:
    seen = replace(GONE, record=replace(RECORD, problem="changed by another hand"), held=held(fast={name()}))
    assert unbound.decide(seen).effect == Nothing()
    assert reason(seen) == "ContentNotBound"


def test_another_installations_is_not_even_told() -> None:
    seen = replace(GONE, record=replace(RECORD, problem="theirs", foreign=True))
    assert unbound.decide(seen) == unbound.Decision(Nothing())


def test_nothing_happens_before_the_grace_is_over_or_while_it_is_under_way() -> None:
    for change in ({"missing_for": Seconds(unbound.GRACE - 0.1)}, {"busy": True}, {"leader": False}):
        decision = unbound.decide(replace(GONE, held=held(fast={name()}), **change))  # type: ignore[arg-type]
        assert isinstance(decision.effect, Nothing)
        assert decision.told is None


def test_a_storage_that_does_not_answer_or_delete_is_waited_for() -> None:
    silent = replace(GONE, held={"fast": frozenset()}, unlisted={"slow": "it does not answer"})
    assert isinstance(unbound.decide(silent).effect, Nothing)
    assert reason(silent) == "StorageUnavailable"
    stuck = replace(GONE, held=held(fast={name()}), trouble="the pool is read-only")
    assert isinstance(unbound.decide(stuck).effect, Nothing)
    assert "read-only" in str(unbound.decide(stuck).told)
    both = replace(silent, held={"fast": frozenset({name()})})
    assert isinstance(unbound.decide(both).effect, Remove), "what answers is cleaned first"


def test_a_bound_one_is_told_when_it_is_finished() -> None:
    bound = replace(GONE, owner_exists=True, missing_for=Seconds(0.0))
    assert reason(bound) == "Ready"
    assert unbound.decide(replace(bound, record=replace(RECORD, ready=False))).told is None
    failed = replace(bound, record=replace(RECORD, failure=Failure(reason="CutFailed", message="no")))
    told = unbound.decide(failed).told
    assert told is not None
    assert (told.ready, told.conditions[0].reason, told.conditions[2].status) == (False, "CutFailed", True)


@given(
    st.builds(
        replace,
        st.just(GONE),
        owner_exists=st.booleans(),
        whole=st.booleans(),
        busy=st.booleans(),
        leader=st.booleans(),
        missing_for=st.floats(0, 100).map(Seconds),
        trouble=st.sampled_from(["", "no"]),
        unlisted=st.sampled_from([{}, {"slow": "hangs"}]),
        held=st.sampled_from([None, held(), held(fast={name()}), held(fast={name(2)}, slow={"x"})]),
        record=st.builds(
            replace,
            st.just(RECORD),
            retain=st.booleans(),
            problem=st.sampled_from(["", "forged"]),
            foreign=st.booleans(),
        ),
    )
)
def test_only_an_intact_content_of_ours_that_says_delete_and_is_alone_is_acted_upon(seen: Seen) -> None:
    effect = unbound.decide(seen).effect
    if isinstance(effect, Nothing):
        return
    assert not any((seen.owner_exists, seen.whole, seen.busy, seen.record.problem, seen.record.foreign))
    assert seen.leader
    assert not seen.record.retain
    assert seen.missing_for >= unbound.GRACE
    if isinstance(effect, Drop):
        assert seen.held is not None
        assert not seen.unlisted
        assert name() not in {n for found in seen.held.values() for n in found}
