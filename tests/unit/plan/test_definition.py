"""The gate of a restore in place: nobody can start the VM, and nothing of its definition is lost."""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.drivers.process import word
from vmsnapshot_operator.errors import ForeignJournalError, RefusedError
from vmsnapshot_operator.plan import definition
from vmsnapshot_operator.plan import domain_tree as tree

SAMPLES = {p.stem: p.read_text() for p in sorted((Path(__file__).parent / "domains").glob("*.xml"))}
"""Definitions as libvirt 9.0 wrote them, with their secrets."""

MARKER = Marker(
    installation="abc234",
    restore="team-a/undo-upgrade",
    restore_uid="6f1d3c0a-58f2-4a57-9f0e-2d6f4a1b7c33",
    snapshot_uid="0c5f2f4e-9a17-4a35-b0d8-7f6a3a1e2d44",
)
OTHER = Marker(
    installation="abc234",
    restore="team-a/another",
    restore_uid="11111111-58f2-4a57-9f0e-2d6f4a1b7c33",
    snapshot_uid=MARKER.snapshot_uid,
)
GENID = "5f1f7a6e-0000-4000-8000-000000000001"
TARGETS = {"rbd": ("vda", "vdb", "vdc"), "uefi": ("sda",), "devices": ("vda", "vdb", "vdc", "vdd")}


def gate(sample: str, *, autostart: bool = False, marker: Marker = MARKER) -> Gate:
    return Gate(marker=marker, targets=TARGETS[sample], autostart=autostart)


def canonical(text: str) -> str:
    return ET.canonicalize(text, strip_text=True)


def without(text: str, *tags: str) -> str:
    root = tree.parse(text)
    for tag in tags:
        tree.discard(root, tag)
    return canonical(tree.text_of(root))


# --- the gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_no_disk_that_is_restored_can_be_reached_meanwhile(sample: str) -> None:
    made = tree.disks(tree.parse(definition.gated(SAMPLES[sample], gate(sample))))
    for target in TARGETS[sample]:
        disk = made[target]
        assert (disk.get("type"), disk.get("device")) == ("file", "disk")
        (source,) = disk.findall("source")
        assert source.attrib == {"file": f"/dev/null/VMRestore/team-a/undo-upgrade/{target}"}
        assert len(source) == 0
        assert disk.find("auth") is None
        assert disk.find("encryption") is None
        before = tree.disks(tree.parse(SAMPLES[sample]))[target]
        assert disk.find("address").attrib == before.find("address").attrib, "the guest finds it where it was"  # type: ignore[union-attr]
    rest = made.keys() - set(TARGETS[sample])
    for target in rest:
        before = tree.disks(tree.parse(SAMPLES[sample]))[target]
        assert canonical(tree.text_of(made[target])) == canonical(tree.text_of(before))


def test_an_optional_disk_is_not_optional_meanwhile() -> None:
    assert "startupPolicy='optional'" in SAMPLES["devices"]
    made = tree.disks(tree.parse(definition.gated(SAMPLES["devices"], gate("devices"))))
    assert "startupPolicy" not in made["vda"].find("source").attrib  # type: ignore[union-attr]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("autostart", [True, False])
def test_the_gate_says_who_and_keeps_the_true_disks(sample: str, autostart: bool) -> None:
    made = definition.gated(SAMPLES[sample], gate(sample, autostart=autostart))
    assert definition.gate_of(made) == gate(sample, autostart=autostart)
    before = tree.disks(tree.parse(SAMPLES[sample]))
    kept = definition.true_disks(made)
    assert tuple(kept) == TARGETS[sample]
    for target, text in kept.items():
        assert canonical(text) == canonical(tree.text_of(before[target]))
    assert definition.gate_of(SAMPLES[sample]) is None
    assert definition.true_disks(SAMPLES[sample]) == {}
    assert definition.done(made) == ()


@pytest.mark.parametrize("sample", SAMPLES)
def test_twice_is_once(sample: str) -> None:
    made = definition.gated(SAMPLES[sample], gate(sample))
    assert definition.gated(made, gate(sample)) == made
    done = definition.restored(made, MARKER, genid=GENID)
    assert definition.restored(done, MARKER, genid=GENID) == done


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_gate_that_is_opened_again_leaves_nothing(sample: str) -> None:
    made = definition.gated(SAMPLES[sample], gate(sample))
    assert canonical(definition.reopened(made, MARKER)) == canonical(SAMPLES[sample])
    assert definition.reopened(SAMPLES[sample], MARKER) == SAMPLES[sample]


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_that_went_back_says_so_until_another_one_does(sample: str) -> None:
    """Not until another one begins: it may not have said so yet, and would begin again, and undo what the other one does."""
    back = definition.reopened(definition.gated(SAMPLES[sample], gate(sample)), MARKER, why="SnapshotLost")
    assert without(back, "metadata") == without(SAMPLES[sample], "metadata")
    assert definition.went_back(back) == (MARKER, "SnapshotLost")
    assert definition.done(back) == ()
    with pytest.raises(RefusedError, match="went back already"):
        definition.gated(back, gate(sample))
    other = definition.gated(back, gate(sample, marker=OTHER))
    assert definition.went_back(other) == (MARKER, "SnapshotLost")
    done = definition.restored(other, OTHER, genid=GENID)
    assert definition.went_back(done) == (MARKER, "SnapshotLost")
    with pytest.raises(RefusedError, match="went back already"):
        definition.gated(done, gate(sample))
    again = definition.reopened(other, OTHER, why="StorageUnavailable")
    assert definition.went_back(again) == (OTHER, "StorageUnavailable")
    assert definition.went_back(SAMPLES[sample]) is None
    with pytest.raises(RefusedError, match="cannot be read"):
        definition.went_back(back.replace('reason="SnapshotLost"', 'reason="&lt;"'))


@pytest.mark.parametrize(("why", "told"), [("Errno28", "Errno28"), ("noSpace", "noSpace"), ("no word", "WentBack")])
def test_whatever_a_driver_says_the_mark_of_one_that_went_back_can_be_read(why: str, told: str) -> None:
    """Else nobody could set this VM back any more."""
    assert word(why, "WentBack") == told, "what a driver may say"
    back = definition.reopened(definition.gated(SAMPLES["rbd"], gate("rbd")), MARKER, why=why)
    assert definition.went_back(back) == (MARKER, told)


BEGAN = datetime(2026, 1, 2, 3, 5, tzinfo=UTC)


@pytest.mark.parametrize("went_back", [False, True])
@pytest.mark.parametrize(("seconds", "later"), [(-1.0, False), (0.0, True), (60.0, True)])
def test_who_had_the_disks_since_is_known_and_the_gate_is_not_closed_again_over_that(
    went_back: bool, seconds: float, later: bool
) -> None:
    theirs = definition.gated(SAMPLES["rbd"], gate("rbd", marker=OTHER))
    assert definition.later_restore(theirs, MARKER.restore_uid, BEGAN) == OTHER
    assert definition.later_restore(theirs, OTHER.restore_uid, BEGAN) is None
    ended = BEGAN + timedelta(seconds=seconds)
    if went_back:
        text = definition.reopened(theirs, OTHER, why="SnapshotLost", now=ended)
    else:
        text = definition.restored(theirs, OTHER, genid=GENID, now=ended)
    assert definition.later_restore(text, MARKER.restore_uid, BEGAN) == (OTHER if later else None)
    assert definition.later_restore(text, OTHER.restore_uid, BEGAN) is None
    assert definition.later_restore(text.replace('ended="2', 'ended="x'), MARKER.restore_uid, BEGAN) == OTHER
    assert definition.gate_of(definition.gated(text, gate("rbd"))) is not None, "one that begins"
    if later:
        with pytest.raises(RefusedError, match="team-a/another had the VM's disks since"):
            definition.gated(text, gate("rbd"), again_since=BEGAN)
    else:
        assert definition.gate_of(definition.gated(text, gate("rbd"), again_since=BEGAN)) is not None


def test_a_new_vm_was_made_before_anybody_set_it_back() -> None:
    root = tree.parse(SAMPLES["rbd"])
    definition.add_done(root, OTHER)
    assert definition.later_restore(tree.text_of(root), MARKER.restore_uid, BEGAN) is None


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_true_definition_comes_back_with_a_marker(sample: str) -> None:
    done = definition.restored(definition.gated(SAMPLES[sample], gate(sample)), MARKER, genid=GENID)
    assert definition.done(done) == (MARKER,)
    assert definition.gate_of(done) is None
    assert without(done, "metadata", "genid") == without(SAMPLES[sample], "metadata", "genid")


def test_a_guest_with_a_generation_id_learns_that_it_went_back() -> None:
    done = definition.restored(definition.gated(SAMPLES["uefi"], gate("uefi")), MARKER, genid=GENID)
    assert tree.parse(done).findtext("genid") == GENID
    done = definition.restored(definition.gated(SAMPLES["rbd"], gate("rbd")), MARKER, genid=GENID)
    assert tree.parse(done).find("genid") is None, "the machine may be too old for one"


def test_what_others_keep_in_the_metadata_stays() -> None:
    for sample, theirs in (("devices", "<old:y>text</old:y>"), ("uefi", "<libosinfo:os id=")):
        made = definition.gated(SAMPLES[sample], gate(sample))
        assert theirs in made
        assert theirs in definition.restored(made, MARKER, genid=GENID)
    assert "vmsnapshot:journal" in definition.gated(SAMPLES["uefi"], gate("uefi")), (
        "another operation's, not ours to drop"
    )


def go_back(text: str, marker: Marker) -> str:
    """The definition after one restore."""
    return definition.restored(definition.gated(text, gate("rbd", marker=marker)), marker, genid=GENID)


def test_the_last_restores_are_remembered_each_of_them_once() -> None:
    both = go_back(go_back(SAMPLES["rbd"], MARKER), OTHER)
    assert definition.done(both) == (OTHER, MARKER)
    again = replace(MARKER, restore_uid="22222222-58f2-4a57-9f0e-2d6f4a1b7c33")
    assert definition.done(go_back(both, again)) == (again, OTHER), "the same order, created anew"
    text, markers = both, [replace(OTHER, restore=f"team-a/back-{n}") for n in range(20)]
    for marker in markers:
        text = go_back(text, marker)
    assert list(definition.done(text)) == markers[::-1][: definition.DONE_KEPT]
    assert definition.done(definition.gated(text, gate("rbd"))) == definition.done(text), "a gate forgets none"


def test_a_document_with_one_marker_is_read_and_goes_on() -> None:
    """As it was written before more than one was kept; and who knows of one alone reads the last."""
    one = go_back(SAMPLES["rbd"], MARKER)
    (element,) = tree.own(tree.parse(one), "https://vmsnapshot.io/restored/1")
    assert (len(element), element.attrib["uid"]) == (0, MARKER.restore_uid)
    (element,) = tree.own(tree.parse(go_back(one, OTHER)), "https://vmsnapshot.io/restored/1")
    assert element.attrib["uid"] == OTHER.restore_uid
    assert [e.attrib for e in element] == [MARKER.attributes()]
    damaged = go_back(one, OTHER).replace(f'uid="{MARKER.restore_uid}"', 'uid=""')
    with pytest.raises(RefusedError, match="cannot be read"):
        definition.done(damaged)


@pytest.mark.parametrize("later", [(), (OTHER,)])
def test_the_gate_of_a_restore_that_is_done_is_not_closed_again(later: tuple[Marker, ...]) -> None:
    done = go_back(SAMPLES["rbd"], MARKER)
    for marker in later:
        done = go_back(done, marker)
    with pytest.raises(RefusedError, match="done already"):
        definition.gated(done, gate("rbd"))


def test_what_was_changed_meanwhile_stays_but_for_the_disks() -> None:
    made = definition.gated(SAMPLES["rbd"], gate("rbd")).replace("131072</memory>", "262144</memory>")
    done = definition.restored(made, MARKER, genid=GENID)
    assert tree.parse(done).findtext("memory") == "262144"
    assert "demo-vda.raw" in done


# --- refusals --------------------------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[str], object]] = {
    "gated": lambda text: definition.gated(text, gate("rbd")),
    "restored": lambda text: definition.restored(text, MARKER, genid=GENID),
    "reopened": lambda text: definition.reopened(text, MARKER),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_restore_at_work_is_left_alone(call: str) -> None:
    theirs = definition.gated(SAMPLES["rbd"], gate("rbd", marker=OTHER))
    with pytest.raises(ForeignJournalError, match="VMRestore team-a/another of installation abc234 is at work"):
        CALLS[call](theirs)


def test_a_disk_that_the_vm_does_not_have() -> None:
    with pytest.raises(RefusedError, match="the VM has no disk vdx, but vda, vdb, vdc"):
        definition.gated(SAMPLES["rbd"], Gate(marker=MARKER, targets=("vda", "vdx"), autostart=False))


def test_a_gate_of_no_disk_is_none() -> None:
    with pytest.raises(RefusedError, match="keeps nobody from starting"):
        definition.gated(SAMPLES["rbd"], Gate(marker=MARKER, targets=(), autostart=False))


def test_a_vm_that_somebody_defined_anew() -> None:
    with pytest.raises(RefusedError, match="bears no gate"):
        definition.restored(SAMPLES["rbd"], MARKER, genid=GENID)


def test_a_disk_that_was_removed_meanwhile() -> None:
    root = tree.parse(definition.gated(SAMPLES["rbd"], gate("rbd")))
    tree.devices(root).remove(tree.disks(root)["vdb"])
    for call in ("restored", "reopened"):
        with pytest.raises(RefusedError, match="disk vdb was removed from the VM while VMRestore team-a/undo-upgrade"):
            CALLS[call](tree.text_of(root))


def test_cookies_are_no_metadata() -> None:
    disk = "<source protocol='https' name='a'><cookies><cookie name='key'>hunter2</cookie></cookies></source>"
    text = f"<domain><name>a</name><devices><disk type='network'>{disk}<target dev='vda'/></disk></devices></domain>"
    with pytest.raises(RefusedError, match="cookies") as caught:
        definition.gated(text, Gate(marker=MARKER, targets=("vda",), autostart=False))
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.replace('autostart="no"', 'autostart="perhaps"'),
        lambda t: t.replace(' autostart="no"', ""),
        lambda t: t.replace(MARKER.restore, "../../etc/passwd"),
        lambda t: t.replace(f'uid="{MARKER.restore_uid}"', 'uid=""'),
        lambda t: t.replace('installation="abc234"', 'installation="&lt;a&gt;"'),
        lambda t: t.replace("</metadata>", '<x:gate xmlns:x="https://vmsnapshot.io/gate/1"/></metadata>'),
    ],
)
def test_a_gate_that_cannot_be_read_stops_everything(damage: Callable[[str], str]) -> None:
    text = definition.gated(SAMPLES["rbd"], gate("rbd"))
    damaged = damage(text)
    assert damaged != text
    for call in (definition.gate_of, *CALLS.values()):
        with pytest.raises(RefusedError, match="cannot be read") as caught:
            call(damaged)
        assert caught.value.reason == "MarkerUnreadable"


HOSTILE = {
    "nothing": "",
    "no markup": "hello",
    "not closed": "<domain><name>",
    "another root": "<network><name>a</name></network>",
    "entities": '<!DOCTYPE d [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><domain><name>&b;</name><devices/></domain>',
    "a file of the host": '<!DOCTYPE d [<!ENTITY x SYSTEM "file:///etc/passwd">]><domain><name>&x;</name><devices/></domain>',
    "an unknown entity": "<domain><name>&x;</name><devices/></domain>",
    "deep": "<domain>" + "<a>" * 100_000 + "</a>" * 100_000 + "</domain>",
    "long": "<domain>" + " " * tree.LIMIT + "</domain>",
    "no devices": "<domain><name>a</name></domain>",
    "devices twice": "<domain><name>a</name><devices/><devices/></domain>",
    "a target twice": "<domain><name>a</name><devices>"
    + "<disk><source/><target dev='vda'/></disk>" * 2
    + "</devices></domain>",
    "no target": "<domain><name>a</name><devices><disk><source/></disk></devices></domain>",
    "an empty target": "<domain><name>a</name><devices><disk><source/><target/></disk></devices></domain>",
    "a lone surrogate": "<domain><name>\udc80</name><devices/></domain>",
    "a nul": "<domain><name>a\0</name><devices/></domain>",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_definitions_are_refused(what: str) -> None:
    with pytest.raises(RefusedError) as caught:
        definition.gated(HOSTILE[what], gate("rbd"))
    assert caught.value.reason == "DefinitionUnusable"
    assert len(caught.value.message) < 400
    assert "root:" not in caught.value.message


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    for attempt in (text, f"<domain>{text}</domain>", SAMPLES["rbd"].replace("demo", text, 1)):
        with contextlib.suppress(RefusedError):  # any other error fails the test
            definition.gated(attempt, gate("rbd"))


# --- the tree ---------------------------------------------------------------------------------------------------------------

WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\ufffe\uffff"), max_size=12
)
TAGS = st.sampled_from(["a", "b:c", "xmlns:b", "source", "driver", "auth", "alias", "address"])


def elements(depth: int) -> st.SearchStrategy[ET.Element]:
    @st.composite
    def made(draw: st.DrawFn) -> ET.Element:
        element = ET.Element(draw(TAGS), draw(st.dictionaries(TAGS, WORDS, max_size=3)))
        element.text = draw(WORDS)
        for child in draw(st.lists(elements(depth - 1), max_size=2)) if depth else ():
            child.tail = draw(WORDS)
            element.append(child)
        return element

    return made()


@settings(max_examples=40)
@given(elements(2))
def test_what_is_written_is_what_was_read(element: ET.Element) -> None:
    root = ET.Element("domain")
    root.append(element)
    text = tree.text_of(root)
    assert tree.text_of(tree.parse(text)) == text
    assert tree.text_of(tree.copy_of(root)) == text


@settings(max_examples=40)
@given(st.lists(elements(1), max_size=4), st.booleans())
def test_gate_and_back_for_any_disk(children: list[ET.Element], autostart: bool) -> None:
    root = tree.parse("<domain><name>a</name><devices><disk type='block'><target dev='vda'/></disk></devices></domain>")
    disk = tree.disks(root)["vda"]
    disk.extend(c for c in children if c.tag not in ("target", "cookies") and not list(c.iter("cookies")))
    text = tree.text_of(root)
    made = definition.gated(text, Gate(marker=MARKER, targets=("vda",), autostart=autostart))
    assert definition.reopened(made, MARKER) == text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("restore", "team-a"),
        ("restore", "team-a/../b"),
        ("restore", "team-a/b/c"),
        ("restore", "Team/b"),
        ("restore_uid", ""),
        ("restore_uid", "a b"),
        ("snapshot_uid", "x" * 64),
        ("installation", "ABC"),
    ],
)
def test_a_marker_is_of_an_object(field: str, value: str) -> None:
    fields = {f: getattr(MARKER, f) for f in ("installation", "restore", "restore_uid", "snapshot_uid")}
    with pytest.raises(ValueError, match=r"^not "):
        Marker(**fields | {field: value})
