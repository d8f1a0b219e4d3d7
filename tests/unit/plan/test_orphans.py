"""Whose the names on a storage system are: nothing is removed on the word of a name alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.plan import builders as b
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.plan import orphans
from vmsnapshot_operator.plan.orphans import Findings, Kept, Listing, Place, Proof

VM = Place("lab", "the VM's UUID")
UIDS = tuple(f"0b6f7d1e-0000-4000-8000-00000000000{n}" for n in range(4))


def name(uid: str = b.UID, attempt: int = 1, class_name: str = "files", installation: str = b.INSTALLATION) -> str:
    return names.request_name(installation, uid, attempt, class_name, [VolumeId("v")])


def kept(uid: str = b.UID, attempt: int = 1, **changes: object) -> Kept:
    found = Kept(
        name=f"vmsnapcontent-{uid}",
        uid=uid,
        attempt=attempt,
        names=frozenset({name(uid, attempt), name(uid, attempt, "ceph")}),
    )
    return replace(found, **changes)  # type: ignore[arg-type]  # fields of Kept


def listing(*listed: str, **facts: object) -> Listing:
    return Listing(installation=b.INSTALLATION, listed=listed, **facts)  # type: ignore[arg-type]  # fields of Listing


def only(seen: Listing) -> orphans.Orphan:
    [found] = orphans.judge(seen).orphans
    return found


def test_what_a_content_records_is_held_by_whatever_class_it_is_listed() -> None:
    seen = listing(name(), name(class_name="ceph"), contents=(kept(),))
    assert orphans.judge(seen) == Findings(held=2)
    assert not orphans.unexplained(seen)


def test_a_name_alone_proves_nothing() -> None:
    found = only(listing(name()))
    assert not found.removable
    assert "no VMSnapshot or VMSnapshotContent knows it" in found.why


def test_what_somebody_else_named_like_ours_is_reported_and_left() -> None:
    prefix = names.installation_prefix(b.INSTALLATION)
    for strange in (
        prefix,
        f"{prefix}my-own-backup",
        name() + "x",
        name().upper().lower() + "-1",
        f"{prefix}../../etc",
    ):
        # Not even a journal and a content of that object make a name ours that we would not give.
        found = only(listing(strange, contents=(kept(attempt=9),), journals={b.UID: Proof(9, VM)}))
        assert not found.removable
        assert "somebody else made it" in found.why


def test_other_installations_are_not_even_counted() -> None:
    assert orphans.judge(listing(name(installation="zzzzzz"), "backup-of-monday")) == Findings()


def test_an_attempt_older_than_what_is_on_record_is_removed() -> None:
    seen = listing(name(attempt=1), name(attempt=2), contents=(kept(attempt=2),))
    found = only(seen)
    assert (found.name, found.removable) == (name(attempt=1), True)
    assert "attempt 1" in found.why
    assert "attempt 2" in found.why


def test_a_later_attempt_than_on_record_is_reported() -> None:
    found = only(listing(name(attempt=3), contents=(kept(attempt=2),)))
    assert not found.removable
    assert "does not record" in found.why


def test_another_group_of_the_attempt_on_record_is_reported() -> None:
    assert not only(listing(name(class_name="strange"), contents=(kept(),))).removable


def test_a_forged_content_proves_nothing() -> None:
    forged = kept(attempt=5, problem="changed by another hand")
    found = only(listing(name(attempt=1), contents=(forged,)))
    assert not found.removable
    assert "cannot be trusted" in found.why


def test_a_journal_proves_what_it_names_and_what_came_before() -> None:
    seen = listing(name(attempt=1), name(attempt=2), name(attempt=3), journals={b.UID: Proof(2, VM)})
    found = {o.name: o.removable for o in orphans.judge(seen).orphans}
    assert found == {name(attempt=1): True, name(attempt=2): True, name(attempt=3): False}
    assert {(o.uid, o.vm) for o in orphans.judge(seen).removable} == {(b.UID, VM)}


def test_a_vmsnapshot_that_lost_its_content_keeps_its_cut() -> None:
    found = only(listing(name(), snapshots=frozenset({b.UID}), journals={b.UID: Proof(1, VM)}))
    assert not found.removable
    assert "deleting that VMSnapshot" in found.why


def test_an_attempt_under_way_is_left_alone() -> None:
    seen = listing(name(attempt=1), contents=(kept(attempt=2),), busy=frozenset({b.UID}))
    assert orphans.judge(seen) == Findings(held=1)


CONTENTS = st.lists(
    st.builds(
        kept,
        uid=st.sampled_from(UIDS),
        attempt=st.integers(1, 4),
        problem=st.sampled_from(["", "forged"]),
    ),
    max_size=4,
    unique_by=lambda k: k.uid,
)
LISTED = st.lists(
    st.one_of(
        st.builds(
            name, uid=st.sampled_from(UIDS), attempt=st.integers(1, 5), class_name=st.sampled_from(["files", "x"])
        ),
        st.builds(name, uid=st.sampled_from(UIDS), installation=st.just("zzzzzz")),
        st.text("abcdefvms-0123", max_size=40).map(lambda t: names.installation_prefix(b.INSTALLATION) + t),
        st.text(max_size=12),
    ),
    max_size=12,
)
SEEN = st.builds(
    Listing,
    installation=st.just(b.INSTALLATION),
    listed=LISTED.map(tuple),
    contents=CONTENTS.map(tuple),
    snapshots=st.frozensets(st.sampled_from(UIDS)),
    busy=st.frozensets(st.sampled_from(UIDS)),
    journals=st.dictionaries(st.sampled_from(UIDS), st.builds(Proof, st.integers(1, 5), st.just(VM))),
)


@given(SEEN)
def test_nothing_is_removed_without_proof(seen: Listing) -> None:
    found = orphans.judge(seen)
    for orphan in found.removable:
        assert orphan.name in seen.listed
        assert names.is_ours(orphan.name, b.INSTALLATION)
        attempt = names.attempt_of(orphan.name)
        assert attempt is not None
        [uid] = [u for u in UIDS if orphan.name.startswith(names.object_prefix(b.INSTALLATION, u))]
        assert uid not in seen.busy
        contents = [k for k in seen.contents if k.uid == uid]
        if contents:
            assert not contents[0].problem
            assert attempt < contents[0].attempt
            assert orphan.name not in contents[0].names
        else:
            assert uid not in seen.snapshots
            assert attempt <= seen.journals[uid].attempt


@given(SEEN)
def test_what_is_ours_is_either_known_or_told(seen: Listing) -> None:
    found = orphans.judge(seen)
    prefix = names.installation_prefix(b.INSTALLATION)
    told = {o.name for o in found.orphans}
    assert found.held == len({n for n in seen.listed if n.startswith(prefix)})
    assert told <= set(seen.listed)
    assert orphans.unexplained(seen) is bool(told)
    for each in set(seen.listed) - told:
        known = any(each in k.names for k in seen.contents)
        busy = any(each.startswith(names.object_prefix(b.INSTALLATION, u)) for u in seen.busy)
        assert known or busy or not each.startswith(prefix)


@given(SEEN, st.sampled_from(UIDS))
def test_knowing_more_never_removes_more_of_others(seen: Listing, uid: str) -> None:
    # A VMSnapshot that turns out to exist, or to be busy, only ever protects what is its own.
    before = {o.name for o in orphans.judge(seen).removable}
    after = {o.name for o in orphans.judge(replace(seen, busy=seen.busy | {uid})).removable}
    assert after <= before
