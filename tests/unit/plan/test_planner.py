"""What a plan is made of, and what is refused, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.plan import builders as b
from vmsnapshot_operator.core.driver import Capabilities, CutKind, Fit
from vmsnapshot_operator.core.machine import (
    Agent,
    AgentState,
    Device,
    DeviceKind,
    DiskDevice,
    FileSystem,
    Machine,
    PowerState,
)
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import (
    THAW_TIMEOUT,
    Match,
    Method,
    OverlayRoom,
    Patience,
    Plan,
    Policy,
    Refusal,
)
from vmsnapshot_operator.core.volumes import volume_id
from vmsnapshot_operator.plan import definition, disks
from vmsnapshot_operator.plan.access import AccessRule, Requirement, may_use, not_found
from vmsnapshot_operator.plan.planner import make_plan
from vmsnapshot_operator.plan.quiescing import WINDOWS_THAW, coverage


def test_volumes_are_grouped_by_their_class() -> None:
    made = b.plan()
    assert {g.class_name: [v.label for v in g.volumes] for g in made.groups} == {
        "files": ["vda", "vdb"],
        "ceph": ["vdc"],
    }
    assert made.quiesce.method == Method.GUEST_AGENT
    assert all(v.covered for v in made.volumes)
    assert made.quiesce.expected_filesystems == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shareable": True}, "shareable"),
        ({"transient": True}, "transient"),
        ({"encrypted": True}, "encrypted"),
        ({"layers": ()}, "no source"),
        ({"device": DiskDevice.LUN}, "passed-through LUN"),
        ({"in_block_job": True}, "block job"),
    ],
)
def test_disks_that_cannot_be_cut_are_refused_by_name(change: dict[str, object], words: str) -> None:
    bad = replace(b.disk("vdb"), **change)  # type: ignore[arg-type]  # fields of Disk
    told = b.refusal(found=b.machine(disks=(b.DISKS[0], bad, b.DISKS[2])))
    assert told.reason == "UnsupportedDisk"
    assert "vdb" in told.message
    assert words in told.message
    excluded = b.plan(b.request(exclude=("vdb",)), b.machine(disks=(b.DISKS[0], bad, b.DISKS[2])))
    assert {e.name: e.rule for e in excluded.excluded} == {"vdb": "ByRequest"}


@pytest.mark.parametrize("kind", [DeviceKind.HOSTDEV, DeviceKind.FILESYSTEM, DeviceKind.PMEM])
def test_devices_that_bear_state_are_refused_unless_excluded(kind: DeviceKind) -> None:
    found = b.machine(devices=(Device(kind=kind, name="thing"),))
    assert "thing" in b.refusal(found=found).message
    assert b.plan(b.request(exclude=("thing",)), found).excluded[0].rule == "ByRequest"


@pytest.mark.parametrize("kind", [DeviceKind.NVRAM, DeviceKind.TPM])
def test_nvram_and_tpm_are_listed_as_left_out(kind: DeviceKind) -> None:
    made = b.plan(found=b.machine(devices=(Device(kind=kind, name="it"),)))
    assert [e.name for e in made.excluded] == ["it"]
    assert any("not captured" in n for n in made.notes)


@pytest.mark.parametrize("change", [{"device": DiskDevice.CDROM}, {"device": DiskDevice.FLOPPY}, {"read_only": True}])
def test_what_the_vm_cannot_write_is_left_out_by_rule(change: dict[str, object]) -> None:
    extra = replace(b.disk("sda"), **change)  # type: ignore[arg-type]  # fields of Disk
    made = b.plan(found=b.machine(disks=(*b.DISKS, extra)))
    assert [e.name for e in made.excluded] == ["sda"]


def test_an_excluded_target_that_is_not_there_is_refused_with_those_that_are() -> None:
    told = b.refusal(b.request(exclude=("vdz",)))
    assert told.reason == "ExcludedTargetNotFound"
    assert "vdz" in told.message
    assert "vda, vdb, vdc" in told.message


def test_nothing_left_to_cut_is_refused() -> None:
    assert b.refusal(b.request(exclude=("vda", "vdb", "vdc"))).reason == "NoVolumes"


def test_a_disk_without_a_class_is_refused_naming_every_disk() -> None:
    told = b.refusal(classes=(b.FILES,))
    assert told.reason == "NoClassForDisk"
    for target in ("vda", "vdb", "vdc"):
        assert f"disk {target}" in told.message


def test_a_tie_is_refused_and_a_higher_priority_wins() -> None:
    twin = replace(b.FILES, name="twin")
    told = b.refusal(classes=(*b.CLASSES, twin))
    assert told.reason == "ClassTie"
    assert "files, twin" in told.message
    made = b.plan(classes=(*b.CLASSES, replace(twin, priority=1)))
    assert {g.class_name for g in made.groups} == {"twin", "ceph"}
    assert "files" in made.volumes[0].reason


@pytest.mark.parametrize(("ready", "patience"), [(False, Patience.SETTLE), (None, Patience.WAIT)])
def test_a_class_that_is_not_ready(ready: bool | None, patience: Patience) -> None:
    told = b.refusal(classes=(b.FILES, replace(b.CEPH, ready=ready, problem="no monitor answers")))
    assert told.reason == "ClassNotReady"
    assert told.patience is patience
    assert "ceph" in told.message


def test_a_driver_that_declines_is_passed_by_with_its_reason() -> None:
    better = replace(b.FILES, name="better", priority=9)
    found = b.machine()
    answers = b.fits(found, (*b.CLASSES, better))
    for volume in (volume_id(b.DISKS[0].layers[0]), volume_id(b.DISKS[1].layers[0])):
        answers[volume]["better"] = Fit(ok=False, reason="FormatNotServed", message="raw only")
    made = make_plan(b.request(), found, (*b.CLASSES, better), answers)
    assert isinstance(made, Plan)
    assert made.volumes[0].class_name == "files"
    assert "FormatNotServed: raw only" in made.volumes[0].reason


COPYING = replace(b.FILES, capabilities=Capabilities(cut=CutKind.COPY, atomic=False, revert=True))


@pytest.mark.parametrize("policy", list(Policy))
def test_a_copying_class_gets_overlays(policy: Policy) -> None:
    made = b.plan(b.request(policy=policy), classes=(COPYING, b.CEPH), room=b.ROOM)
    assert (made.quiesce.method, made.quiesce.overlay_pool) == (Method.HYPERVISOR_SNAPSHOT, "overlays")
    assert made.quiesce.expected_filesystems == (0 if policy is Policy.NEVER else 3)
    assert '"files" (Copy) cannot cut in an instant' in made.quiesce.reason


def test_overlays_without_an_agent() -> None:
    silent = b.machine(agent=None)
    made = b.plan(found=silent, classes=(COPYING, b.CEPH), room=b.ROOM)
    assert (made.quiesce.method, made.quiesce.expected_filesystems) == (Method.HYPERVISOR_SNAPSHOT, 0)
    refused = b.refusal(b.request(policy=Policy.REQUIRE), silent, classes=(COPYING, b.CEPH), room=b.ROOM)
    assert refused.reason == "AgentAbsent"


MANY = tuple(b.file_layer(f"below-{n}") for n in range(15))


@pytest.mark.parametrize(
    ("found", "room", "told"),
    [
        (b.machine(), None, "spec.overlay.poolName"),
        (b.machine(), replace(b.ROOM, free_bytes=None, problem="there is no such pool"), "there is no such pool"),
        (b.machine(), replace(b.ROOM, free_bytes=1), "minFreeBytes"),
        (b.machine(persistent=False), b.ROOM, "transient"),
        (
            b.machine(disks=(replace(b.DISKS[0], layers=(b.DISKS[0].layers[0], *MANY)), *b.DISKS[1:])),
            b.ROOM,
            "16 layers",
        ),
    ],
)
def test_where_no_overlay_can_be_made(found: Machine, room: OverlayRoom | None, told: str) -> None:
    for asked, classes in (
        (b.request(), (COPYING, b.CEPH)),
        (b.request(method=Method.HYPERVISOR_SNAPSHOT), b.CLASSES),
        (b.request(policy=Policy.NEVER), (COPYING, b.CEPH)),
    ):
        refused = b.refusal(asked, found, classes=classes, room=room)
        assert refused.reason == "OverlayNotAvailable"
        assert told in refused.message


def test_a_copying_class_under_another_method_is_refused() -> None:
    for method in (Method.GUEST_AGENT, Method.PAUSE):
        refused = b.refusal(b.request(method=method), classes=(COPYING, b.CEPH), room=b.ROOM)
        assert refused.reason == "OverlayNotAvailable"
        assert "use Auto" in refused.message


def test_a_copying_class_and_a_vm_that_does_not_run() -> None:
    off = b.machine(power=PowerState.SHUT_OFF, agent=None)
    assert b.plan(found=off, classes=(COPYING, b.CEPH)).quiesce.method == Method.NONE
    paused = b.machine(power=PowerState.PAUSED, agent=None)
    assert b.refusal(found=paused, classes=(COPYING, b.CEPH), room=b.ROOM).reason == "VMPaused"


ALL = replace(b.BACKUP, match=(Match(type="file"), Match(protocol="rbd")))


def test_where_the_hypervisor_copies_the_guest_is_frozen_as_for_an_instant_cut() -> None:
    made = b.plan(b.REQUIRE, classes=(b.BACKUP, b.CEPH))
    assert (made.quiesce.method, made.quiesce.overlay_pool) == (Method.GUEST_AGENT, "")
    assert b.plan(b.NEVER, classes=(ALL,)).quiesce.method == Method.NONE
    paused = b.machine(power=PowerState.PAUSED, agent=None)
    assert b.plan(found=paused, classes=(ALL,)).quiesce.method == Method.NONE


def test_where_the_hypervisor_copies_there_are_no_overlays() -> None:
    slow = replace(b.CEPH, capabilities=Capabilities(cut=CutKind.COPY, atomic=False, revert=True))
    for asked, classes in (
        (b.request(), (b.BACKUP, slow)),
        (b.request(method=Method.HYPERVISOR_SNAPSHOT), (b.BACKUP, b.CEPH)),
    ):
        refused = b.refusal(asked, classes=classes, room=b.ROOM)
        assert refused.reason == "OverlayNotAvailable"
        assert '"files" (Hypervisor) has the hypervisor copy' in refused.message


def test_what_the_hypervisor_would_copy_of_a_vm_that_is_off() -> None:
    off = b.machine(power=PowerState.SHUT_OFF, agent=None, disks=b.DISKS[:2])
    assert b.plan(found=off, classes=(ALL,)).quiesce.method == Method.NONE
    for unable in (
        b.DISKS[2],
        b.disk("vdx", b.file_layer("x", format="qcow2")),
        b.disk("vdx", b.file_layer("x", pool="")),
    ):
        found = replace(off, disks=(*off.disks, unable))
        refused = b.refusal(found=found, classes=(ALL,))
        assert refused.reason == "BackupNeedsRunningVM"
        assert f"disk {unable.target} is no raw volume" in refused.message


def test_a_copy_that_is_under_way_is_waited_for_whoever_it_is_of() -> None:
    for files in ((), ("/backups/vda",)):
        told = b.refusal(found=b.machine(copied_into=files))
        assert (told.reason, told.patience) == ("BackupRunning", Patience.WAIT)
        assert all(f in told.message for f in files)


def test_a_vm_whose_disks_are_being_set_back_is_waited_for() -> None:
    """Its definition has no disks then, and would be refused for good."""
    text = (Path(__file__).parent / "domains" / "rbd.xml").read_text()
    marker = Marker(installation="abc234", restore="team-a/undo", restore_uid="u1", snapshot_uid="u2")
    gated = definition.gated(text, Gate(marker=marker, targets=("vda", "vdb", "vdc"), autostart=False))
    told = b.refusal(found=b.machine(definition=gated, disks=()))
    assert (told.reason, told.patience) == ("VMBusy", Patience.WAIT)
    assert "VMRestore team-a/undo" in told.message
    assert b.plan(found=b.machine(definition=text)).volumes


def test_a_remote_class_prefers_overlays() -> None:
    remote = replace(b.FILES, allow_under_freeze=True)
    remote = replace(remote, capabilities=Capabilities(cut=CutKind.REMOTE, atomic=False, revert=True))
    assert b.plan(classes=(remote, b.CEPH), room=b.ROOM).quiesce.method == Method.HYPERVISOR_SNAPSHOT


def test_a_remote_class_may_cut_under_the_freeze_where_its_administrator_allows_it() -> None:
    remote = replace(b.FILES, capabilities=Capabilities(cut=CutKind.REMOTE, atomic=False, revert=True))
    assert b.refusal(classes=(remote, b.CEPH)).reason == "OverlayNotAvailable"
    assert b.plan(classes=(replace(remote, allow_under_freeze=True), b.CEPH)).quiesce.method == Method.GUEST_AGENT


def test_cache_unsafe_claims_nothing_and_is_refused_by_require() -> None:
    found = b.machine(disks=(replace(b.DISKS[0], cache="unsafe"), *b.DISKS[1:]))
    assert b.plan(found=found).volumes[0].unsafe
    assert b.refusal(b.REQUIRE, found).reason == "PolicyNotMet"


def test_migrating_is_waited_for() -> None:
    told = b.refusal(found=b.machine(migrating=True))
    assert (told.reason, told.patience) == ("VMMigrating", Patience.WAIT)


# --- the quiesce method: policy, agent, power ------------------------------------------------------------------------

BAD_AGENTS = {
    None: "AgentAbsent",
    AgentState.ABSENT: "AgentAbsent",
    AgentState.SILENT: "AgentSilent",
    AgentState.UNSUPPORTED: "AgentTooOld",
}


@pytest.mark.parametrize("state", list(BAD_AGENTS))
def test_without_a_usable_agent(state: AgentState | None) -> None:
    found = b.machine(agent=Agent(state=state) if state is not None else None)
    assert b.refusal(b.REQUIRE, found).reason == BAD_AGENTS[state]
    fallback = b.plan(found=found).quiesce
    assert fallback.method == Method.PAUSE
    assert "falls back" in fallback.reason
    assert b.plan(b.NEVER, found).quiesce.method == Method.NONE


@pytest.mark.parametrize("policy", [Policy.REQUIRE, Policy.PREFER])
def test_frozen_by_somebody_else_is_left_alone(policy: Policy) -> None:
    told = b.refusal(b.request(policy=policy), b.machine(agent=Agent(state=AgentState.FROZEN)))
    assert (told.reason, told.patience) == ("AlreadyFrozen", Patience.WAIT)


def test_an_agent_that_failed_before_is_not_used_again() -> None:
    assert b.plan(failed_before="hook failed").quiesce.method == Method.PAUSE
    assert b.refusal(b.REQUIRE, failed_before="hook failed").reason == "FreezeFailed"


@pytest.mark.parametrize(
    ("power", "within", "policy", "expected"),
    [
        (PowerState.SHUT_OFF, True, Policy.REQUIRE, Method.NONE),
        (PowerState.SHUT_OFF, False, Policy.REQUIRE, "VMNotCleanlyShutDown"),
        (PowerState.SHUT_OFF, False, Policy.PREFER, Method.NONE),
        (PowerState.PAUSED, False, Policy.REQUIRE, "VMPaused"),
        (PowerState.PAUSED, False, Policy.PREFER, Method.NONE),
        (PowerState.CRASHED, False, Policy.PREFER, "VMStateUnsupported"),
        (PowerState.SUSPENDED, False, Policy.NEVER, "VMStateUnsupported"),
    ],
)
def test_power_states(power: PowerState, within: bool, policy: Policy, expected: str) -> None:
    made = b.planned(b.request(policy=policy), b.machine(power=power, shut_down_from_within=within, agent=None))
    assert (made.reason if isinstance(made, Refusal) else made.quiesce.method) == expected


def test_methods_asked_for() -> None:
    assert b.plan(b.request(method=Method.PAUSE)).quiesce.method == Method.PAUSE
    assert b.plan(b.request(method=Method.GUEST_AGENT)).quiesce.method == Method.GUEST_AGENT
    made = b.plan(b.request(method=Method.HYPERVISOR_SNAPSHOT), room=b.ROOM)
    assert (made.quiesce.method, made.quiesce.expected_filesystems) == (Method.HYPERVISOR_SNAPSHOT, 3)
    assert b.refusal(b.request(method=Method.PAUSE, policy=Policy.REQUIRE)).reason == "PolicyNotMet"


def test_budgets() -> None:
    assert b.plan().quiesce.budget == 30
    assert b.plan(found=b.machine(agent=b.agent(os_id="mswindows"))).quiesce.budget == 8
    assert b.plan(b.request(max_frozen_seconds=3)).quiesce.budget == 3


@pytest.mark.parametrize("method", [Method.GUEST_AGENT, Method.HYPERVISOR_SNAPSHOT])
def test_windows_may_end_its_shadow_copy_slowly(method: str) -> None:
    request = b.request(method=method)
    assert b.plan(request, room=b.ROOM).quiesce.thaw_timeout == THAW_TIMEOUT
    found = b.machine(agent=b.agent(os_id="mswindows"))
    assert b.plan(request, found=found, room=b.ROOM).quiesce.thaw_timeout == WINDOWS_THAW


def test_disks_without_a_file_system_are_not_covered_and_refused_by_require() -> None:
    found = b.machine(agent=b.agent(("vda", "vdc")))
    made = b.plan(found=found)
    assert [v.target for v in made.volumes if not v.covered] == ["vdb"]
    assert "vdb" in b.refusal(b.REQUIRE, found).message


def _mounted(*found: tuple[str, str, tuple[str, ...]]) -> Agent:
    systems = tuple(FileSystem(mountpoint=m, device=m, type=t, targets=x) for m, t, x in found)
    return Agent(state=AgentState.THAWED, filesystems=systems)


def test_a_file_system_that_cannot_be_frozen_uncovers_its_disk_alone() -> None:
    found = coverage(_mounted(("/", "ext4", ("vda",)), ("/boot/efi", "vfat", ("vda",)), ("/srv", "xfs", ("vdb",))), ())
    assert found.covered == {"vdb"}
    assert found.filesystems == 2


def test_what_lies_on_no_disk_of_the_vm_is_counted_and_cannot_stand_in_for_one_that_was_missed() -> None:
    found = coverage(_mounted(("/", "ext4", ("vda",)), ("/remote", "ext4", ())), ())
    assert (found.covered, found.filesystems) == ({"vda"}, 2)


def test_a_file_system_that_is_only_read_needs_no_freeze() -> None:
    found = coverage(_mounted(("/", "ext4", ("vda",)), ("/media", "iso9660", ("vda",))), ())
    assert (found.covered, found.filesystems) == ({"vda"}, 1)


def test_with_mountpoints_what_may_lie_anywhere_uncovers_all() -> None:
    found = coverage(_mounted(("/", "ext4", ("vda",)), ("/loop", "ext4", ())), ("/",))
    assert found.covered == frozenset()


def test_windows_freezes_all_volumes_whatever_their_type() -> None:
    agent = replace(_mounted(("C:", "NTFS", ("vda",))), os_id="mswindows")
    assert coverage(agent, ()).covered == {"vda"}


def test_mountpoints() -> None:
    made = b.plan(b.request(mountpoints=("/mnt/vda",)))
    assert [v.target for v in made.volumes if v.covered] == ["vda"]
    assert made.quiesce.expected_filesystems == 1
    assert b.refusal(b.request(mountpoints=("/srv",))).reason == "MountpointNotFound"


# --- access -----------------------------------------------------------------------------------------------------------

NAME = Requirement(key="kubernetes.io/metadata.name", operator="In", values=("team-a",))


@pytest.mark.parametrize(
    ("rules", "labels", "domain", "allowed"),
    [
        ((), {"kubernetes.io/metadata.name": "team-a"}, "demo", False),
        (
            (AccessRule(namespace=(NAME,), domains=("demo*",)),),
            {"kubernetes.io/metadata.name": "team-a"},
            "demo-1",
            True,
        ),
        (
            (AccessRule(namespace=(NAME,), domains=("demo*",)),),
            {"kubernetes.io/metadata.name": "team-b"},
            "demo-1",
            False,
        ),
        ((AccessRule(namespace=(NAME,), domains=("web",)),), {"kubernetes.io/metadata.name": "team-a"}, "demo", False),
        ((AccessRule(namespace=(NAME,), domains=("*",)),), {}, "demo", False),
    ],
)
def test_access(rules: tuple[AccessRule, ...], labels: dict[str, str], domain: str, allowed: bool) -> None:
    assert may_use(rules, labels, domain) is allowed


def test_a_forbidden_domain_reads_like_a_missing_one() -> None:
    assert not_found("demo", "lab", "team-a").reason == "DomainNotFound"


def test_matching_is_by_all_parts_that_are_given() -> None:
    other = replace(b.FILES, match=(Match(type="file", pool="other"), Match(type="file", source_pattern="/pool/*")))
    assert b.plan(classes=(other, b.CEPH)).volumes[0].class_name == "files"
    none = replace(b.FILES, match=(Match(type="file", pool="reflink", format="qcow2"),))
    assert b.refusal(classes=(none, b.CEPH)).reason == "NoClassForDisk"


def test_a_disk_that_came_after_the_plan_is_found() -> None:
    made = b.plan(b.request(exclude=("vdb",)))
    new = b.disk("vdx")
    drive = b.disk("sda", device=DiskDevice.CDROM)
    assert disks.unplanned(made, b.DISKS) == []
    assert disks.unplanned(made, (*b.DISKS, new, drive)) == ["vdx"]
