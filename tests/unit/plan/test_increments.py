"""What a copy may begin with: only with what is on record as whole, of the very same disk. And which checkpoints are left over."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Hold, SnapshotRequest
from vmsnapshot_operator.core.effects import Failure, Record, RecordedGroup
from vmsnapshot_operator.core.planning import PlannedGroup
from vmsnapshot_operator.core.volumes import Handle, Seconds, Volume, volume_id
from vmsnapshot_operator.plan import increments
from vmsnapshot_operator.plan.increments import Earlier
from vmsnapshot_operator.plan.orphans import Kept

CAN = Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True, clone=True, incremental=True)


def disk(**changes: Any) -> Volume:
    layer = b.file_layer("a", format="qcow2")
    return replace(Volume(id=volume_id(layer), label="vda", writable=layer, size_bytes=64), **changes)


def planned(volume: Volume, **changes: Any) -> PlannedGroup:
    made = PlannedGroup(
        class_name="copies",
        driver="libvirt-backup",
        parameters={"poolName": "p"},
        secret_name="",
        capabilities=CAN,
        volumes=(volume,),
    )
    return replace(made, **changes)


def taken(volume: Volume, minutes: int = 0, **changes: Any) -> Record:
    """A snapshot of that disk that is on record as restorable."""
    uid = f"0b6f7d1e-0000-4000-8000-0000000000{minutes:02}"
    request = names.request_name(b.INSTALLATION, uid, 1, "copies", [volume.id])
    group = RecordedGroup(
        class_name="copies",
        driver="libvirt-backup",
        parameters={"poolName": "p"},
        secret_name="",
        request=SnapshotRequest(name=request, volumes=(volume,), timeout=Seconds(1.0)),
        result=CutResult(handles={volume.id: Handle(f"/p/{request}-x")}, atomic=True, hold=Hold.JOB),
    )
    record = records.example()
    assert record.outcome is not None
    found = replace(
        record,
        name=f"content-{minutes}",
        plan=replace(record.plan, groups=(planned(volume),)),
        groups={"copies": group},
        ready=True,
        outcome=replace(record.outcome, cut_time=b.CREATED + timedelta(minutes=minutes)),
    )
    return replace(found, **changes)


def only(record: Record, **changes: Any) -> Record:
    """The same with another group."""
    return replace(record, groups={"copies": replace(record.groups["copies"], **changes)})


def test_the_newest_is_begun_with() -> None:
    volume = disk()
    older, newer = taken(volume, 1), taken(volume, 2)
    found, why = increments.choose(planned(volume), 1, [newer, older])
    result = newer.groups["copies"].result
    assert result is not None
    assert not why
    assert found[volume.id] == Earlier(
        handle=result.handles[volume.id],
        checkpoint=names.checkpoint_name(newer.groups["copies"].request.name, volume.id),
        time=b.CREATED + timedelta(minutes=2),
    )


BELOW = b.file_layer("below", format="qcow2", fingerprint="1")


@pytest.mark.parametrize(
    ("then", "now", "word"),
    [
        (disk(), disk(writable=b.file_layer("a", format="raw")), "raw keeps no bitmap"),
        (disk(), disk(size_bytes=65), "another format or size"),
        (disk(), disk(backing=(BELOW,)), "images beneath"),
        (disk(backing=(BELOW,)), disk(backing=(replace(BELOW, fingerprint="2"),)), "images beneath"),
        (
            disk(backing=(replace(BELOW, fingerprint=""),)),
            disk(backing=(replace(BELOW, fingerprint=""),)),
            "nobody can say",
        ),
        (disk(), disk(id="another"), "no earlier copy"),
    ],
)
def test_a_disk_that_may_differ_by_more_than_its_bitmap_tells_is_copied_whole(
    then: Volume, now: Volume, word: str
) -> None:
    found, why = increments.choose(planned(now), 1, [taken(then)])
    assert not found
    assert word in why[now.id]


def test_the_same_images_beneath_do_no_harm() -> None:
    volume = disk(backing=(BELOW,))
    assert increments.choose(planned(volume), 1, [taken(volume)])[0]


@pytest.mark.parametrize(
    "record",
    [
        taken(disk(), ready=False),
        taken(disk(), problem="forged"),
        taken(disk(), failure=Failure(reason="Deleting", message="what it holds is being deleted")),
        only(taken(disk()), parameters={"poolName": "another"}),
        only(taken(disk()), driver="another"),
        only(taken(disk()), result=None),
        only(taken(disk()), result=CutResult(handles={disk().id: Handle("/p/x")}, atomic=True, hold=Hold.BASE)),
        only(taken(disk()), result=CutResult(handles={}, atomic=True, hold=Hold.JOB)),
    ],
)
def test_what_is_not_on_record_as_whole_is_nothing_to_begin_with(record: Record) -> None:
    found, why = increments.choose(planned(disk()), 1, [record])
    assert not found
    assert "no earlier copy" in why[disk().id]


def test_a_second_attempt_copies_all() -> None:
    found, why = increments.choose(planned(disk()), 2, [taken(disk())])
    assert not found
    assert "attempt 2" in why[disk().id]


def test_the_checkpoints_of_older_snapshots_are_superseded() -> None:
    first, second, third = (taken(disk(), n) for n in (1, 2, 3))
    names_of = [increments.of_record(r) for r in (first, second, third)]
    assert increments.superseded(third, [first, second]) == [names_of[1], names_of[0]]
    assert increments.superseded(first, [second, third]) == [], "a later one's are needed"
    assert increments.superseded(only(third, result=None), [first]) == []


def test_only_disks_that_remember_have_checkpoints() -> None:
    raw = disk(writable=b.file_layer("a", format="raw"))
    assert increments.of_record(taken(raw)) == {}
    record = taken(disk())
    named = names.checkpoint_name("vms-abcdef-aaaaaaaaaa-01-bbbbbb", disk().id)
    assert increments.of_record(record, {"copies": {named[: names.LENGTH]}}) == {named: "vda"}
    assert increments.of_record(record, {}) == {}


def checkpoint(uid: str = b.UID, attempt: int = 1, installation: str = b.INSTALLATION) -> str:
    return names.checkpoint_name(names.request_name(installation, uid, attempt, "copies", [disk().id]), disk().id)


def kept(attempt: int = 1, **changes: Any) -> Kept:
    name = checkpoint(attempt=attempt)[: names.LENGTH]
    return replace(Kept(name="c", uid=b.UID, attempt=attempt, names=frozenset({name})), **changes)


@pytest.mark.parametrize(
    ("name", "contents", "snapshots", "is_left"),
    [
        (checkpoint(), (), (), True),
        (checkpoint(), (), (b.UID,), False),
        (checkpoint(), (kept(),), (), False),
        (checkpoint(), (kept(2),), (b.UID,), True),
        (checkpoint(attempt=3), (kept(2),), (b.UID,), False),
        (checkpoint(), (kept(2, problem="forged", names=frozenset()),), (b.UID,), False),
        (checkpoint(installation="zzzzzz"), (), (), False),
        ("backup-of-monday", (), (), False),
        (checkpoint()[: names.LENGTH], (), (), False),
    ],
)
def test_what_no_snapshot_needs_is_left_over(
    name: str, contents: tuple[Kept, ...], snapshots: tuple[str, ...], is_left: bool
) -> None:
    assert increments.left(b.INSTALLATION, [name], contents, snapshots) == (
        frozenset({name}) if is_left else frozenset()
    )
