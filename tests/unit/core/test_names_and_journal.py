"""Names on storage and the journal in a domain: safety rests on both."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.core.volumes import Consistency, Layer, SourceKind, VolumeId, volume_id

TEXT = st.text(min_size=1, max_size=40)
ATTEMPTS = st.integers(1, names.MAX_ATTEMPT)
IDS = st.lists(TEXT.map(VolumeId), min_size=1, max_size=4)


@given(TEXT, TEXT, ATTEMPTS, TEXT, IDS)
def test_names_fit_every_storage_and_tell_their_parts(
    seed: str, uid: str, attempt: int, cls: str, ids: list[VolumeId]
) -> None:
    installation = names.installation_id(seed)
    name = names.request_name(installation, uid, attempt, cls, ids)
    assert re.fullmatch(r"[a-z0-9-]{31}", name)
    assert len(f"{name}-{names.member(ids[0])}") == 40
    assert name.startswith(names.object_prefix(installation, uid))
    assert name.startswith(names.installation_prefix(installation))
    assert names.attempt_of(name) == attempt
    assert names.is_ours(name, installation)
    assert name == names.request_name(installation, uid, attempt, cls, reversed(ids))


@given(TEXT, ATTEMPTS, ATTEMPTS)
def test_no_attempt_has_the_name_of_another(uid: str, one: int, other: int) -> None:
    made = [names.request_name("abcdef", uid, a, "class", [VolumeId("v")]) for a in (one, other)]
    assert (made[0] == made[1]) is (one == other)


def test_two_installations_never_see_each_other() -> None:
    one, other = names.installation_id("one"), names.installation_id("other")
    name = names.request_name(one, "uid", 1, "class", [VolumeId("v")])
    assert not names.is_ours(name, other)
    assert not name.startswith(names.installation_prefix(other))


@pytest.mark.parametrize("attempt", [0, -1, names.MAX_ATTEMPT + 1])
def test_impossible_attempts(attempt: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        names.request_name("abcdef", "uid", attempt, "class", [VolumeId("v")])


def test_strange_names_are_not_ours() -> None:
    for name in ("", "vms-", "disk1", "vms-abcdef-short-01-abcdef", "vms-probe-1-2"):
        assert names.attempt_of(name) is None
        assert not names.is_ours(name, "abcdef")


PLAIN = st.text(st.characters(categories=("L", "N", "P", "S"), max_codepoint=0x2FFF), max_size=30)


@given(
    PLAIN,
    PLAIN,
    st.integers(1, 1295),
    st.floats(0.001, 600),
    st.lists(PLAIN, max_size=3),
    st.dictionaries(PLAIN, PLAIN, max_size=2),
)
def test_a_journal_comes_back_as_it_was(
    installation: str, owner: str, attempt: int, budget: float, members: list[str], overlays: dict[str, str]
) -> None:
    journal = Journal(
        installation=installation,
        owner_uid=owner,
        nonce="0123456789abcdef" * 2,
        attempt=attempt,
        method="GuestAgent",
        budget=round(max(budget, 0.001), 3),
        members=tuple(members),
        overlays=overlays,
    )
    assert journals.from_xml(journals.to_xml(journal)) == journal


GOOD = journals.to_xml(
    Journal(installation="abcdef", owner_uid="u", nonce="0" * 32, attempt=1, method="Pause", budget=30)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<journal",
        "<journal/>",
        GOOD.replace('version="1"', 'version="2"'),
        GOOD.replace('version="1"', 'version="x"'),
        GOOD.replace('budget="30.000"', 'budget="0"'),
        GOOD.replace('budget="30.000"', 'budget="nan"'),
        GOOD.replace('budget="30.000"', 'budget="1e9"'),
        GOOD.replace("0" * 32, "short"),
        GOOD.replace('"members": []', '"members": 3'),
        GOOD.replace('"overlays": {}', '"overlays": []'),
    ],
)
def test_a_journal_that_cannot_be_understood_is_said_to_be_so(text: str) -> None:
    assert journals.from_xml(GOOD).method == "Pause"
    with pytest.raises(UnreadableJournalError):
        journals.from_xml(text)


def test_a_volume_is_its_writable_layer() -> None:
    layer = Layer(kind=SourceKind.FILE, source="/a", format="raw")
    assert volume_id(layer) == volume_id(Layer(kind=SourceKind.FILE, source="/a", format="qcow2", pool="p"))
    assert volume_id(layer) != volume_id(Layer(kind=SourceKind.BLOCK, source="/a", format="raw"))
    assert volume_id(layer) != volume_id(Layer(kind=SourceKind.FILE, source="/b", format="raw"))


def test_words_of_consistency() -> None:
    assert [c.word for c in sorted(Consistency)] == ["Unknown", "PerVolume", "Crash", "Filesystem", "Application"]
    assert all(Consistency.from_word(c.word) is c for c in Consistency)
    with pytest.raises(ValueError, match="not a consistency"):
        Consistency.from_word("crash")
