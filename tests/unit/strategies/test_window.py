"""The order of things in the window: whatever fails in it, the VM is freed before anything is told, removed or disarmed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.unit.handlers import fakes
from tests.unit.plan import builders as b
from tests.unit.quiesce.fake_libvirt import REF, as_any
from vmsnapshot_operator.core.driver import CutResult, Hold, SnapshotRequest
from vmsnapshot_operator.core.effects import TakeWindow
from vmsnapshot_operator.core.evidence import Evidence, Window, WindowOutcome
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Disk, Machine, not_at
from vmsnapshot_operator.core.planning import Policy
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, VolumeId
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DriverError,
    DriverTimeoutError,
    GuardianError,
    HypervisorError,
    QuiesceError,
)
from vmsnapshot_operator.plan import next_effect
from vmsnapshot_operator.quiesce.base import OpenWindow
from vmsnapshot_operator.strategies import window
from vmsnapshot_operator.strategies.world import Prepared

pytestmark = pytest.mark.looptime

HOLD = ["lease", "journal", "arm", "freeze"]
LET_GO = ["thaw", "disarm", "clear"]


@dataclass
class Scene:
    """A VM, its guardian and its quiescer. `log`: what was done to them, in order. `stuck`: nobody can thaw the guest."""

    log: list[str] = field(default_factory=list)
    ahead: float = 0.0
    stuck: bool = False
    refusing: bool = False
    deaf: bool = False
    uris: Sequence[str] = ()
    name: str = "lab"
    until: float = 3600.0
    by_job: tuple[str, ...] = ()
    since: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    job_error: HypervisorError | None = None
    begin_takes: float = 0.2
    disks_after: tuple[Disk, ...] = b.DISKS
    permit: Callable[[], str] = str
    busy: bool = False
    late: bool = False
    rest: bool = False
    journal_after: Journal | None = None

    def targets(self, effect: TakeWindow) -> dict[str, dict[VolumeId, Layer]]:
        """The files of the classes whose disks the hypervisor copies."""
        return {c: {v.id: b.file_layer(f"copy-{v.label}") for v in effect.requests[c].volumes} for c in self.by_job}

    async def window(self, _ref: object) -> Scene:
        return self

    async def prepare_backup(
        self, targets: Mapping[str, Layer], planned: Mapping[str, VolumeId], since: Mapping[str, str]
    ) -> str:
        assert not_at(planned, b.machine().disks) == []
        assert planned.keys() == targets.keys()
        if self.busy:
            raise HypervisorError("it copies already", reason="BackupRunning", retryable=True)
        self.log.append("describe")
        after = {t: f" since {c}" for t, c in since.items()}
        return ", ".join(f"{t} to {layer.source}{after.get(t, '')}" for t, layer in targets.items())

    async def begin_backup(self, described: str, timeout: Seconds, permit: Callable[[], str]) -> None:  # noqa: ASYNC109
        assert (permit(), timeout > 0) == ("", True)
        self.permit = permit
        await asyncio.sleep(min(timeout, self.begin_takes))
        if self.begin_takes > timeout:
            raise CallTimeoutError("it did not return")
        if self.job_error is not None:
            raise self.job_error
        self.log.append(f"begin {described}")

    @asynccontextmanager
    async def outlasting(self, _seconds: float) -> AsyncIterator[bool]:
        self.log.append("lease")
        yield True

    def is_leader(self, _margin_seconds: float = 0.0) -> bool:
        return True

    def uri(self, _ref: object) -> str:
        return "qemu:///system"

    async def write_journal(self, *_: object) -> None:
        self.log.append("journal")

    async def clear_journal(self, *_: object) -> None:
        self.log.append("clear")

    def freed(self, _nonce: str) -> None:
        return

    async def describe(self, *_: object, **__: object) -> Machine:
        return b.machine(disks=self.disks_after, journal=self.journal_after)

    async def arm(self, *_: object) -> None:
        if self.deaf:
            raise GuardianError("it does not answer")
        self.log.append("arm")

    async def disarm(self, _nonce: str, *, late: bool) -> None:
        self.log.append("left to look on" if late else "disarm")

    def order_may_come(self, _ref: object) -> bool:
        return self.late

    @asynccontextmanager
    async def still(self, _journal: Journal) -> AsyncIterator[Window]:
        opened = OpenWindow(Evidence(method="GuestAgent", frozen=3))
        opened.ask()
        if self.refusing:
            raise QuiesceError("the hook failed", reason="FreezeFailed", free=True)
        self.log.append("freeze")
        opened.rest = self.rest
        opened.stands()
        try:
            yield opened
        finally:
            opened.ending()
            await asyncio.sleep(0.1)  # an agent takes its time
            self.log.append("thaw")
            if not self.stuck:
                opened.ended()


@dataclass
class Slot:
    """A driver's process. `error`: its answer; `takes`: seconds until it answers; `until`: what the clock says by then."""

    name: str
    scene: Scene
    error: DriverError | None = None
    takes: float = 0.01
    until: float = 0.0
    alive: bool = True

    async def cut(self, request: SnapshotRequest, until: float) -> CutResult:
        try:
            await asyncio.sleep(self.takes)
        except asyncio.CancelledError:
            self.scene.log.append(f"killed {self.name}")
            raise
        if self.error is not None:
            self.scene.ahead = self.until
            raise self.error
        self.scene.log.append(f"cut {self.name}")
        return CutResult(handles={v.id: Handle(f"{request.name}/{v.id}") for v in request.volumes}, atomic=False)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene()
    monkeypatch.setattr(window, "find", lambda _method: lambda _context: made)
    monkeypatch.setattr(window, "clock", lambda: Seconds(asyncio.get_running_loop().time() + made.ahead))
    return made


async def take(
    scene: Scene,
    *,
    policy: Policy = Policy.PREFER,
    metrics: object = None,
    max_frozen_seconds: int = 3,
    overlay_pool: str = "",
    **slots: dict[str, Any],
) -> WindowOutcome:
    """Take the window of a VM of which `files` and `ceph` serve the disks."""
    plan = b.plan(b.request(max_frozen_seconds=max_frozen_seconds, policy=policy))
    plan = replace(plan, quiesce=replace(plan.quiesce, overlay_pool=overlay_pool))
    effect = TakeWindow(1, plan, next_effect.requests_for(plan, b.INSTALLATION, b.UID, 1))
    world = fakes.world(installation=b.INSTALLATION)
    world.leadership = world.guardian = as_any(scene)
    world.metrics = as_any(metrics or world.metrics)
    made = {name: as_any(Slot(name, scene, **slots.get(name, {}))) for name in effect.requests}
    try:
        targets = scene.targets(effect)
        prepared = Prepared(1, made, AsyncExitStack(), targets=targets, since=scene.since, told=scene.told)
        return await window.run(world, effect, b.UID, REF, as_any(scene), prepared)
    finally:
        scene.log.append("told")


async def test_all_goes_well(scene: Scene) -> None:
    outcome = await take(scene)
    assert scene.log == [*HOLD, "cut ceph", "cut files", *LET_GO, "told"]
    assert outcome.ok
    assert outcome.free


OVERLAID = Journal(
    installation=b.INSTALLATION,
    owner_uid=b.UID,
    nonce="0" * 32,
    attempt=1,
    method="HypervisorSnapshot",
    budget=30,
    phase=Phase.OVERLAID,
)


@pytest.mark.parametrize(
    ("journal", "reason"),
    [
        (OVERLAID, ""),
        (replace(OVERLAID, phase=Phase.COLLAPSING), "OverlayFull"),
        (None, "OverlayFull"),
        (replace(OVERLAID, attempt=2), "OverlayFull"),
    ],
)
async def test_what_is_cut_while_overlays_are_committed_is_no_snapshot(
    scene: Scene, journal: Journal | None, reason: str
) -> None:
    """A VM that stands still on overlays without room is brought back at once, whoever cuts its bases just then; and not sent there again."""
    scene.rest, scene.journal_after = True, journal
    outcome = await take(scene, overlay_pool="over")
    assert (outcome.ok, outcome.reason, outcome.interrupted) == (not reason, reason, False)


class Counted:
    """Metrics that ask, while a window is open, whether its VM is held."""

    def __init__(self) -> None:
        self.held: bool | None = None

    @contextmanager
    def window(self, held: Callable[[], bool], *, hypervisor: str) -> Iterator[None]:
        async def ask() -> None:
            await asyncio.sleep(0.005)
            self.held = held()

        asking = asyncio.create_task(ask())
        yield
        assert (asking.done(), hypervisor) == (True, "lab")


@pytest.mark.parametrize(("policy", "held"), [(Policy.PREFER, True), (Policy.NEVER, False)])
async def test_a_vm_that_nothing_holds_is_not_counted_as_held(scene: Scene, policy: Policy, held: bool) -> None:
    metrics = Counted()
    await take(scene, policy=policy, metrics=metrics)
    assert metrics.held is held


@pytest.mark.parametrize(
    ("ceph", "reason", "killed"),
    [
        ({"error": DriverError("the pool is full", reason="StorageFull")}, "StorageFull", "files"),
        ({"takes": 3600.0}, "FrozenTooLong", "ceph"),
    ],
    ids=["fails", "hangs"],
)
async def test_a_cut_that_goes_wrong_frees_the_vm_before_it_is_told(
    scene: Scene, ceph: dict[str, Any], reason: str, killed: str
) -> None:
    outcome = await take(scene, ceph=ceph, files={"takes": 1.0})
    done = ["cut files"] if reason == "FrozenTooLong" else []
    assert scene.log == [*HOLD, *done, f"killed {killed}", *LET_GO, "told"]
    assert (outcome.ok, outcome.free, outcome.reason) == (False, True, reason)
    assert "vdc" in outcome.message


@pytest.mark.parametrize(("now", "reason"), [(2.0, "DriverTimeout"), (3.0, "FrozenTooLong")])
async def test_a_drivers_deadline_that_is_the_windows_is_told_as_such(scene: Scene, now: float, reason: str) -> None:
    """Whichever of the two is noticed first: here the driver's, `now` seconds after the window's begin."""
    outcome = await take(scene, ceph={"error": DriverTimeoutError("no answer"), "until": now}, files={"takes": 2.0})
    assert (outcome.reason, outcome.free) == (reason, True)


async def test_a_vm_that_nobody_can_free_keeps_its_journal_and_its_guardian(scene: Scene) -> None:
    scene.stuck = True
    outcome = await take(scene, ceph={"error": DriverError("the pool is full")}, files={"takes": 1.0})
    assert scene.log == [*HOLD, "killed files", "thaw", "told"]
    assert not outcome.free


async def test_a_vm_that_an_order_of_ours_may_still_hold_is_left_to_the_guardian_to_look_at(scene: Scene) -> None:
    scene.late = True
    await take(scene)
    assert scene.log[-4:-1] == ["thaw", "left to look on", "clear"]


async def test_a_freeze_that_is_refused_lets_nobody_cut(scene: Scene) -> None:
    scene.refusing = True
    outcome = await take(scene)
    assert scene.log == [*HOLD[:-1], *LET_GO[1:], "told"]
    assert (outcome.reason, outcome.fallback, outcome.free) == ("FreezeFailed", True, True)


async def test_nobody_freezes_without_a_guardian(scene: Scene) -> None:
    scene.deaf = True
    outcome = await take(scene)
    assert scene.log == ["lease", "journal", "disarm", "clear", "told"]
    assert (outcome.reason, outcome.interrupted, outcome.free) == ("GuardianNotReady", True, True)


async def test_a_process_that_died_before_the_window_is_found_before_anything_is_touched(scene: Scene) -> None:
    outcome = await take(scene, ceph={"alive": False})
    assert scene.log == ["told"]
    assert (outcome.reason, outcome.interrupted, outcome.free) == ("DriverCrashed", True, True)


async def test_who_is_cancelled_frees_the_vm_first(scene: Scene) -> None:
    task = asyncio.create_task(take(scene, ceph={"takes": 2.0}, files={"takes": 2.0}))
    await asyncio.sleep(1.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(scene.log[4:6]) == ["killed ceph", "killed files"]
    assert [*scene.log[:4], *scene.log[6:]] == [*HOLD, *LET_GO, "told"]


# --- where the hypervisor copies ------------------------------------------------------------------------------------------


async def test_the_hypervisor_begins_its_copy_where_the_others_cut(scene: Scene) -> None:
    scene.by_job = ("files",)
    outcome = await take(scene)
    begun = "begin vda to /pool/copy-vda.raw, vdb to /pool/copy-vdb.raw"
    assert scene.log == ["describe", *HOLD, "cut ceph", begun, *LET_GO, "told"]
    assert (outcome.ok, outcome.free) == (True, True)
    result, bracket = outcome.groups["files"].result, outcome.groups["files"].bracket
    assert result is not None
    assert bracket is not None
    assert (result.hold, result.atomic, bracket.end - bracket.start) == (Hold.JOB, True, pytest.approx(0.2))
    assert set(result.handles.values()) == {"/pool/copy-vda.raw", "/pool/copy-vdb.raw"}


async def test_what_changed_is_copied_since_the_checkpoint_and_told(scene: Scene) -> None:
    scene.by_job, scene.since = ("files",), {"vda": "vms-1"}
    scene.told = {"files": "disk vda: what was written since; disk vdb: all of it"}
    outcome = await take(scene)
    assert "begin vda to /pool/copy-vda.raw since vms-1, vdb to /pool/copy-vdb.raw" in scene.log
    assert outcome.groups["files"].message == scene.told["files"]
    assert (outcome.ok, outcome.reason) == (True, "")


async def test_one_copy_is_begun_for_all_classes(scene: Scene) -> None:
    scene.by_job = ("ceph", "files")
    outcome = await take(scene)
    begun = "begin vdc to /pool/copy-vdc.raw, vda to /pool/copy-vda.raw, vdb to /pool/copy-vdb.raw"
    assert scene.log == ["describe", *HOLD, begun, *LET_GO, "told"]
    assert outcome.ok
    assert outcome.groups["ceph"].bracket == outcome.groups["files"].bracket


@pytest.mark.parametrize("policy", [Policy.PREFER, Policy.NEVER])
async def test_nothing_is_begun_when_the_window_is_over(scene: Scene, policy: Policy) -> None:
    """A call may reach its thread only then."""
    scene.by_job = ("files",)
    assert (await take(scene, policy=policy)).ok
    assert scene.permit() == "the window was over before it was sent"


async def test_a_copy_that_does_not_begin_frees_the_vm_and_is_tried_again(scene: Scene) -> None:
    scene.by_job, scene.job_error = ("files",), HypervisorError("no room")
    outcome = await take(scene, ceph={"takes": 1.0})
    assert scene.log == ["describe", *HOLD, "killed ceph", *LET_GO, "told"]
    assert (outcome.reason, outcome.interrupted, outcome.free) == ("BackupFailed", True, True)
    assert "disk vda, vdb: no room" in outcome.message


@pytest.mark.parametrize(
    ("budget", "held", "reason", "interrupted"), [(20, 5.1, "BackupFailed", True), (3, 3.1, "FrozenTooLong", False)]
)
async def test_a_copy_that_waits_for_another_job_does_not_hold_the_vm_for_long(
    scene: Scene, budget: int, held: float, reason: str, interrupted: bool
) -> None:
    scene.by_job, scene.begin_takes = ("files",), 30.0
    start = asyncio.get_running_loop().time()
    outcome = await take(scene, max_frozen_seconds=budget)
    assert asyncio.get_running_loop().time() - start == pytest.approx(held, abs=0.05)
    assert (outcome.reason, outcome.interrupted, outcome.free) == (reason, interrupted, True)


@pytest.mark.parametrize(("by_job", "reason"), [(("files",), "DiskPlugged"), ((), "")])
async def test_a_disk_in_the_place_of_another_one_is_not_taken_for_it(
    scene: Scene, by_job: tuple[str, ...], reason: str
) -> None:
    """The hypervisor copies what is at a target; drivers cut what they were given."""
    scene.by_job = by_job
    scene.disks_after = (b.disk("vda", b.file_layer("another")), *b.DISKS[1:])
    outcome = await take(scene)
    assert (outcome.reason, outcome.interrupted, outcome.evidence.same_vm) == (reason, bool(reason), False)
    assert "vdb" not in outcome.message


async def test_a_vm_whose_disks_are_copied_already_is_not_touched(scene: Scene) -> None:
    scene.by_job, scene.busy = ("files",), True
    outcome = await take(scene)
    assert scene.log == ["told"]
    assert (outcome.reason, outcome.interrupted, outcome.free) == ("BackupRunning", True, True)
