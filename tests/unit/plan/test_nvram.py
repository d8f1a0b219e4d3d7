"""The variables of a VM's firmware: captured where a class can, else left out by name; claimed as far as proved; given back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.kube import records
from tests.unit.plan import builders as b
from tests.unit.plan.test_next_restore import request as restore_request
from tests.unit.plan.test_verdict import outcome
from vmsnapshot_operator.core.driver import Capabilities, CutKind, Fit
from vmsnapshot_operator.core.effects import Record
from vmsnapshot_operator.core.machine import Device, DeviceKind, PowerState
from vmsnapshot_operator.core.planning import Excluded, Match, Patience, Plan, PlannedVolume, Policy, Refusal
from vmsnapshot_operator.core.restoring import RestoreSeen
from vmsnapshot_operator.core.volumes import NVRAM, Consistency, Layer, SourceKind, Volume, volume_id
from vmsnapshot_operator.hypervisors import domain_xml
from vmsnapshot_operator.plan import fingerprints, restore_conditions, restore_plan, verdict
from vmsnapshot_operator.plan.planner import make_plan

LAYER = Layer(kind=SourceKind.FILE, source="/nvram/vars.fd", format="raw", pool="nvram", fingerprint="1/2")
VARIABLES = b.disk(NVRAM, LAYER, size_bytes=131072)
UEFI = b.machine(disks=(*b.DISKS, VARIABLES))
OFF = replace(UEFI, power=PowerState.SHUT_OFF, run_id=-1, agent=None, shut_down_from_within=True)
OVER = b.storage_class("vars", Match(pool="nvram"))
CLASSES = (*b.CLASSES, OVER)


def kind(cut: CutKind) -> Any:
    return replace(OVER, capabilities=Capabilities(cut=cut, atomic=False, revert=True))


# --- what the definition says -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xml", "source", "where"),
    [
        ("<nvram>/n/a.fd</nvram>", "/n/a.fd raw", ""),
        ("<nvram template='/t.fd'> /n/a.fd\n</nvram>", "/n/a.fd raw", ""),
        ("<nvram format='qcow2'>/n/a.qcow2</nvram>", "/n/a.qcow2 qcow2", ""),
        ("<nvram type='file'><source file='/n/a.fd'/></nvram>", "/n/a.fd raw", ""),
        ("<nvram template='/t.fd'/>", "", "does not name"),
        ("<nvram type='network'><source protocol='iscsi' name='a'/></nvram>", "", "storage of type network"),
        ("<nvram type='block'><source dev='/dev/sdx'/></nvram>", "", "storage of type block"),
        ("<varstore path='/n/a.json'/>", "", "varstore"),
        ("<loader readonly='no' type='pflash'>/n/all.fd</loader>", "", "loader"),
    ],
)
def test_where_the_variables_are(xml: str, source: str, where: str) -> None:
    _, (found,) = domain_xml.parse(f"<domain><os>{xml}</os></domain>")
    assert (found.kind, found.name) == (DeviceKind.NVRAM, NVRAM)
    assert (f"{found.file.source} {found.file.format}" if found.file is not None else "") == source
    assert where in found.where
    assert bool(where) == bool(found.where)


def test_a_vm_without_variables_has_none() -> None:
    assert domain_xml.parse("<domain><os><loader readonly='yes'>/code.fd</loader></os></domain>") == ((), ())


# --- planning -----------------------------------------------------------------------------------------------------------


def planned(classes: Any = CLASSES, found: Any = UEFI, **asked: Any) -> Plan:
    made = b.planned(b.request(**asked), found, classes)
    assert isinstance(made, Plan), made
    return made


def told(made: Plan) -> str:
    """Why the variables are left out; they must be, and nothing else."""
    assert NVRAM not in {v.target for v in made.volumes}
    (excluded,) = made.excluded
    assert (excluded.name, excluded.rule) == (NVRAM, "NVRAM")
    assert any(NVRAM in n for n in made.notes)
    return excluded.message


def test_a_class_that_matches_captures_them_beside_the_disks() -> None:
    made = planned()
    assert [(v.target, v.class_name) for v in made.volumes][-1] == (NVRAM, "vars")
    assert [v.target for v in made.disks] == ["vda", "vdb", "vdc"]
    assert made.excluded == ()
    assert made.quiesce == planned(found=b.machine()).quiesce


def test_without_a_class_they_are_left_out_with_a_word_on_what_to_do() -> None:
    message = told(planned(b.CLASSES))
    assert "no StorageDriverClass matches" in message
    assert "/nvram/vars.fd" in message
    assert "add a StorageDriverClass" in message


def test_a_driver_that_declines_leaves_them_out_and_says_why() -> None:
    answers = {**b.fits(UEFI, CLASSES)}
    answers[volume_id(LAYER)] = {"vars": Fit(ok=False, reason="OtherPool", message="is not in the pool nvram")}
    made = make_plan(b.request(), UEFI, CLASSES, answers)
    assert isinstance(made, Plan)
    assert "is not in the pool nvram" in told(made)


@pytest.mark.parametrize("cut", [CutKind.COPY, CutKind.REMOTE, CutKind.HYPERVISOR])
def test_of_a_vm_that_runs_only_an_instant_cut_takes_them(cut: CutKind) -> None:
    assert "cannot cut in an instant" in told(planned((*b.CLASSES, kind(cut))))
    assert planned((*b.CLASSES, kind(cut)), OFF).volumes[-1].target == NVRAM


def test_of_a_vm_that_is_off_the_hypervisor_s_class_takes_what_the_storage_api_can_copy() -> None:
    qcow2 = b.disk(NVRAM, replace(LAYER, format="qcow2"))
    assert "no raw volume" in told(
        planned((*b.CLASSES, kind(CutKind.HYPERVISOR)), replace(OFF, disks=(*b.DISKS, qcow2)))
    )


def test_a_class_that_has_not_answered_yet_is_waited_for() -> None:
    made = b.planned(found=UEFI, classes=(*b.CLASSES, replace(OVER, ready=None, capabilities=None)))
    assert isinstance(made, Refusal)
    assert (made.reason, made.patience) == ("ClassNotReady", Patience.WAIT)


def test_two_classes_that_would_both_take_them_are_a_person_s_matter() -> None:
    made = b.planned(found=UEFI, classes=(*CLASSES, replace(OVER, name="twin")))
    assert isinstance(made, Refusal)
    assert made.reason == "ClassTie"


def test_they_may_be_left_out_on_purpose_and_are_no_snapshot_alone() -> None:
    made = planned(exclude=(NVRAM,))
    assert [(e.name, e.rule) for e in made.excluded] == [(NVRAM, "ByRequest")]
    assert b.refusal(b.request(exclude=("vda", "vdb", "vdc")), UEFI).reason == "NoVolumes"


def test_policy_require_asks_no_file_system_of_them() -> None:
    made = planned(policy=Policy.REQUIRE)
    assert made.volumes[-1].target == NVRAM
    assert not any(NVRAM in n for n in made.notes)


def test_what_no_file_holds_is_left_out_by_rule_and_its_place_is_told() -> None:
    device = Device(kind=DeviceKind.NVRAM, name=NVRAM, where="on storage of type network")
    assert "on storage of type network" in told(planned(b.CLASSES, b.machine(devices=(device,))))


# --- what is claimed ------------------------------------------------------------------------------------------------------


def claims(made: Plan, *, written: bool, **facts: Any) -> dict[str, Consistency]:
    found = verdict.judge(
        made, outcome(made, unwritten=frozenset() if written else frozenset({volume_id(LAYER)}), **facts)
    )
    return {v.target: found[v.volume.id].consistency for v in made.volumes}


def test_what_nobody_wrote_to_is_of_the_moment_of_the_disks() -> None:
    assert set(claims(planned(), written=False).values()) == {Consistency.FILESYSTEM}
    assert claims(planned(), written=False, thawed=2)[NVRAM] is Consistency.PER_VOLUME


def test_a_freeze_of_file_systems_says_nothing_of_variables_that_were_written_to() -> None:
    found = claims(planned(), written=True)
    assert found[NVRAM] is Consistency.PER_VOLUME
    assert {c for t, c in found.items() if t != NVRAM} == {Consistency.FILESYSTEM}


def test_overlays_say_nothing_of_them_either() -> None:
    slow = replace(b.FILES, capabilities=Capabilities(cut=CutKind.COPY, atomic=False, revert=True))
    made = b.planned(found=UEFI, classes=(slow, b.CEPH, OVER), room=b.ROOM)
    assert isinstance(made, Plan)
    assert made.quiesce.method == "HypervisorSnapshot"
    assert claims(made, written=True)[NVRAM] is Consistency.PER_VOLUME
    assert claims(made, written=False)[NVRAM] is Consistency.FILESYSTEM


def test_a_pause_or_a_vm_that_is_off_holds_them_as_it_holds_the_disks() -> None:
    paused = planned(method="Pause")
    assert set(claims(paused, written=True).values()) == {Consistency.CRASH}
    assert claims(paused, written=True, end=4.5)[NVRAM] is Consistency.PER_VOLUME
    assert set(claims(planned(found=OFF), written=True, shut_down_from_within=True).values()) == {
        Consistency.FILESYSTEM
    }


def test_nothing_is_claimed_of_variables_of_another_vm() -> None:
    assert claims(planned(), written=False, same_vm=False)[NVRAM] is Consistency.UNKNOWN


def test_variables_take_nothing_from_disks_that_are_one_instant() -> None:
    alone = replace(UEFI, disks=(b.DISKS[2], VARIABLES))
    found = claims(planned(found=alone, policy=Policy.NEVER), written=True, still_from=None, atomic=True)
    assert found == {"vdc": Consistency.CRASH, NVRAM: Consistency.PER_VOLUME}


@pytest.mark.parametrize(
    ("then", "now", "same"), [("1/2", "1/2", True), ("1/2", "1/3", False), ("", "", False), ("1/2", "", False)]
)
def test_only_the_storage_s_own_word_says_that_nobody_wrote(then: str, now: str, same: bool) -> None:
    before = b.disk(NVRAM, replace(LAYER, fingerprint=then))
    made = planned(found=replace(UEFI, disks=(*b.DISKS, before)))
    after = (*b.DISKS, b.disk(NVRAM, replace(LAYER, fingerprint=now)))
    assert fingerprints.unwritten(made.volumes, after) == ({volume_id(LAYER)} if same else frozenset())


# --- the way back ---------------------------------------------------------------------------------------------------------

RECORD = records.example()
HELD = PlannedVolume(
    target=NVRAM,
    volume=Volume(id=volume_id(LAYER), label=NVRAM, writable=LAYER, size_bytes=131072),
    class_name="fast",
    reason="",
)


def holding() -> Record:
    """The record of a snapshot that holds the variables, too."""
    plan = replace(RECORD.plan, volumes=(*RECORD.plan.volumes, HELD))
    return replace(RECORD, plan=plan)


def lacking() -> Record:
    """That of one that says that it does not, as all did of an earlier release."""
    return replace(RECORD, plan=replace(RECORD.plan, excluded=(Excluded(name=NVRAM, rule="NVRAM"),)))


def said(record: Record, *include: str, new: str = "") -> str:
    request = restore_request(include=include, new_name=new)
    volumes = restore_plan.wanted(request, record)
    assert not isinstance(volumes, Refusal)
    return "; ".join(restore_plan.notes(record, volumes, in_place=request.in_place))


def test_what_becomes_of_variables_that_are_not_restored_is_said() -> None:
    assert "stay as they are: the snapshot does not hold them" in said(lacking())
    assert "begin anew: the snapshot does not hold them" in said(lacking(), new="other")
    assert "stay as they are: they are not asked for" in said(holding(), "vda", "vdb", "vdc")
    assert said(holding()) == ""
    assert said(RECORD) == ""


def test_it_is_still_said_when_the_restore_is_done() -> None:
    done = restore_conditions.ready(RestoreSeen(request=restore_request(), record=lacking()))
    assert "stay as they are" in next(c.message for c in done if c.type == "Planned")


def test_the_gate_takes_disks_even_where_only_the_variables_are_set_back() -> None:
    record = holding()
    every = restore_plan.make(record, record.plan.volumes, {})
    assert (every.targets, every.gate) == (("vda", "vdb", "vdc", NVRAM), ("vda", "vdb", "vdc"))
    assert restore_plan.make(record, (HELD,), {}).gate == ("vda", "vdb", "vdc")
    assert restore_plan.make(record, record.plan.volumes[:1], {}).gate == ("vda",)


def test_variables_alone_make_no_new_vm() -> None:
    record = holding()
    refused = restore_plan.refuse_clone(restore_plan.make(record, (HELD,), {}), record)
    assert refused is not None
    assert refused.reason == "NoVolumes"


def test_variables_of_another_size_are_those_of_another_firmware() -> None:
    assert not isinstance(restore_plan.onto((HELD,), (VARIABLES,)), Refusal)
    other = restore_plan.onto((HELD,), (replace(VARIABLES, size_bytes=540672),))
    assert isinstance(other, Refusal)
    assert "another firmware" in other.message
