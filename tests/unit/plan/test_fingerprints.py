"""What betrays that somebody wrote to an image which had to stand still."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core.machine import Disk
from vmsnapshot_operator.core.planning import PlannedVolume, Refusal
from vmsnapshot_operator.plan import fingerprints, restore_plan


def planned(fingerprint: str) -> PlannedVolume:
    """The first disk of a snapshot."""
    volume = records.example().plan.volumes[0]
    layer = replace(volume.volume.writable, fingerprint=fingerprint)
    return replace(volume, volume=replace(volume.volume, writable=layer))


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ("4096/1", "4096/1", False),
        ("4096/1", "4096/2", True),
        ("8192/1", "4096/1", False),  # the file system took back what it had set aside
        ("", "4096/2", False),
        ("4096/1", "", False),
    ],
)
def test_a_disk_of_a_vm_that_is_off(then: str, now: str, *, told: bool) -> None:
    disk = Disk(target="vdz", layers=(planned(now).volume.writable,))
    assert fingerprints.written_to([planned(then)], [disk]) == (["vda"] if told else [])
    assert fingerprints.written_to([planned(then)], []) == [], "a disk that is not there is told elsewhere"
    assert fingerprints.unseen([planned(then)], [disk]) == (["vda"] if then and not now else [])
    certain = bool(then and now) and not told
    assert fingerprints.unwritten([planned(then)], [disk]) == ({planned(then).volume.id} if certain else set())


def test_a_disk_is_missing_unless_it_is_plugged_in_anywhere() -> None:
    there = planned("1")
    assert fingerprints.missing([there], [Disk(target="vdz", layers=(there.volume.writable,))]) == []
    other = replace(there.volume.writable, source="/another")
    for disks in ([], [Disk(target="vda")], [Disk(target="vda", layers=(other,))]):
        assert fingerprints.missing([there], disks) == ["vda"]


@pytest.mark.parametrize(("now", "fits"), [("1", True), ("2", False)])
def test_nothing_is_set_back_onto_a_layer_that_was_written_to(now: str, *, fits: bool) -> None:
    then = planned("")
    base = b.file_layer("base", fingerprint="1")
    then = replace(then, volume=replace(then.volume, backing=(base,)))
    disk = Disk(target="vda", layers=(then.volume.writable, replace(base, fingerprint=now)), size_bytes=1)
    found = restore_plan.onto([then], [disk])
    assert isinstance(found, Refusal) is not fits
    if isinstance(found, Refusal):
        assert found.reason == "DisksChanged"
        assert "/pool/base.raw, which was written to" in found.message
