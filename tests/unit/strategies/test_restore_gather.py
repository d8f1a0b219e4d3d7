"""What a restore finds of itself in the world, whatever became of its snapshot; and what a safety snapshot is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from tests.unit.handlers import fakes
from tests.unit.kube import records
from tests.unit.plan import builders as b
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.driver import Capabilities, CutKind, Fit
from vmsnapshot_operator.core.effects import Failure, Record
from vmsnapshot_operator.core.machine import Disk, Machine, PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.planning import Patience, Request
from vmsnapshot_operator.core.restoring import (
    Clone,
    CloseGate,
    GoBack,
    HandOver,
    LetGo,
    RemoveClones,
    Rest,
    RestoreDecision,
    RestoreEffect,
    RestoreRequest,
    RestoreSeen,
    Revert,
    Safety,
    Stop,
    TakeSafety,
)
from vmsnapshot_operator.core.volumes import NVRAM, Seconds, volume_id
from vmsnapshot_operator.errors import (
    ConflictError,
    DomainGoneError,
    DriverError,
    ForeignJournalError,
    HypervisorError,
    HypervisorUnreachableError,
    RefusedError,
)
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.definitions import Defined
from vmsnapshot_operator.hypervisors.domains import Gated, Ref
from vmsnapshot_operator.kube import contents
from vmsnapshot_operator.plan import definition, next_restore, restore_plan, restore_report
from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.access import AccessRule
from vmsnapshot_operator.plan.new_definition import Identity
from vmsnapshot_operator.strategies import restore_apply, restore_gather, restore_search
from vmsnapshot_operator.strategies.restore_gather import Memory
from vmsnapshot_operator.strategies.world import LiveHypervisor, World


def disks_of(record: Record) -> tuple[Disk, ...]:
    """The VM's disks, as they are on record."""
    return tuple(Disk(target=v.target, layers=(v.volume.writable,), size_bytes=1) for v in record.plan.volumes)


_REQUEST = RestoreRequest(uid="r1", namespace="team-a", name="back", generation=1, created=b.CREATED, snapshot="snap")


@pytest.mark.parametrize(
    ("power", "now", "safety"),
    [
        (PowerState.SHUT_OFF, "1", Safety.READY),
        (PowerState.SHUT_OFF, "2", Safety.FAILED),
        (PowerState.RUNNING, "2", Safety.READY),
    ],
)
def test_a_vm_that_ran_after_its_safety_snapshot_is_found_by_its_disks(
    power: PowerState, now: str, safety: Safety
) -> None:
    record = records.example()
    first = record.plan.volumes[0]
    layer = replace(first.volume.writable, fingerprint="1")
    taken = replace(first, volume=replace(first.volume, writable=layer))
    record = replace(record, plan=replace(record.plan, volumes=(taken,)))
    seen = RestoreSeen(request=_REQUEST, safety=Safety.READY, safety_record=record)
    machine = b.machine(power=power, disks=(b.disk("vda", replace(layer, fingerprint=now)),))
    judged = restore_gather._judge_safety(seen, machine)
    assert judged.safety is safety
    assert ("vda was written to" in judged.safety_message) is (safety is Safety.FAILED)


@pytest.mark.parametrize("lacks", [True, False])
def test_one_that_lacks_what_is_set_back_is_none(lacks: bool) -> None:
    """As the firmware's variables, whose class is gone by now: they are left out where no class takes them."""
    record = records.example()
    plan = restore_plan.make(record, record.plan.volumes, {v.target: v.volume for v in record.plan.volumes})
    held = record.plan.volumes[1:] if lacks else record.plan.volumes
    safety = replace(record, plan=replace(record.plan, volumes=held))
    seen = RestoreSeen(request=_REQUEST, plan=plan, safety=Safety.READY, safety_record=safety)
    judged = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=disks_of(record)))
    assert judged.safety is (Safety.FAILED if lacks else Safety.READY)
    assert ("does not hold vda" in judged.safety_message) is lacks


@pytest.mark.parametrize("target", ["vda", "vdc"])
def test_one_that_nobody_could_go_back_to_is_none(target: str) -> None:
    record = records.example()
    volumes = tuple(v for v in record.plan.volumes if v.target == target)
    plan = restore_plan.make(record, volumes, {v.target: v.volume for v in volumes})
    slow = replace(record.plan.groups[1].capabilities, revert=False)
    groups = (record.plan.groups[0], replace(record.plan.groups[1], capabilities=slow))
    safety = replace(record, plan=replace(record.plan, groups=groups))
    seen = RestoreSeen(request=_REQUEST, plan=plan, safety=Safety.READY, safety_record=safety)
    judged = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=disks_of(record)))
    assert judged.safety is (Safety.FAILED if target == "vdc" else Safety.READY)
    assert ("class slow took it and cannot set disks back" in judged.safety_message) is (target == "vdc")


def test_one_whose_disks_show_no_more_whether_the_vm_ran_is_not_taken_for_the_latest() -> None:
    record = records.example()
    first = record.plan.volumes[0]
    layer = replace(first.volume.writable, fingerprint="1")
    known = replace(first, volume=replace(first.volume, writable=layer))
    safety = replace(record, plan=replace(record.plan, volumes=(known, *record.plan.volumes[1:])))
    seen = RestoreSeen(request=_REQUEST, safety=Safety.READY, safety_record=safety)
    blind, *rest = disks_of(record)
    gone = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=tuple(rest)))
    assert (gone.safety, "disk vda was taken from the VM" in gone.safety_message) == (Safety.FAILED, True)
    unseen = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=(blind, *rest)))
    assert unseen.refusal is not None, "it is waited for: the pool may be active again"
    assert (unseen.refusal.patience, "pool-refresh" in unseen.refusal.message) == (Patience.WAIT, True)
    still = replace(blind, layers=(replace(blind.layers[0], fingerprint="1"),))
    good = restore_gather._judge_safety(seen, b.machine(power=PowerState.SHUT_OFF, disks=(still, *rest)))
    assert (good.safety, good.refusal) == (Safety.READY, None)


# --- a snapshot that is gone, or of which nothing is on record any more ------------------------------------------------------

UID = "6f1d3c0a-58f2-4a57-9f0e-2d6f4a1b7c33"
MARKER = Marker(
    installation=records.INSTALLATION, restore="team-a/back", restore_uid=UID, snapshot_uid=records.REQUEST.uid
)
SAFETY = replace(records.REQUEST, name=f"back-safety-{UID[:8]}", uid="7b0c2f5e-0f7e-4e0a-9f83-0d3c0e0a0002")
XML = """<domain type='kvm'><name>demo</name><uuid>u</uuid><devices>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/a'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/b'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/c'/><target dev='vdc' bus='virtio'/></disk>
</devices></domain>"""


def gated(*targets: str, marker: Marker = MARKER) -> str:
    gate = Gate(marker=marker, targets=targets or ("vda", "vdb", "vdc"), autostart=False)
    return definition.gated(XML, gate)


def new_vm(marker: Marker = MARKER) -> str:
    root = tree.parse(XML.replace(">demo<", ">copy<"))
    definition.add_done(root, marker)
    return tree.text_of(root)


def content_of(asked: Request, **changes: Any) -> dict[str, Any]:
    record = records.example()
    if asked.uid != records.REQUEST.uid:
        requests = requests_of(record, asked)
        record = replace(record, groups=requests)
    record = replace(record, name=contents.name_for(asked.uid), ready=True, ready_time=b.CREATED, **changes)
    return contents.to_body(record, asked, records.INSTALLATION)


def requests_of(record: Record, asked: Request) -> dict[str, Any]:
    """The same groups, held under the names of another VMSnapshot."""
    made = {}
    for name, group in record.groups.items():
        request_name = names.request_name(
            records.INSTALLATION, asked.uid, 1, name, [v.id for v in group.request.volumes]
        )
        made[name] = replace(group, request=replace(group.request, name=request_name))
    return made


def snapshot_body(asked: Request) -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": asked.namespace,
            "name": asked.name,
            "uid": asked.uid,
            "generation": 1,
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {"source": {"hypervisorName": "lab", "domain": "demo"}},
    }


class Reverting(fakes.FakeHost):
    """A driver that sets back whatever it is asked to."""

    async def revert(self, _cut: Any, _onto: Any, **_: Any) -> None:
        """Nothing to do."""


class Client(fakes.FakeClient):
    """All of its VMs are so; if nothing is said, off, and without the disks of the snapshot: nothing can begin."""

    machine = b.machine(power=PowerState.SHUT_OFF)

    async def describe(self, _ref: Ref, *, ask_agent: bool) -> Machine:
        assert not ask_agent
        return replace(self.machine, power=self.described or self.machine.power)

    elsewhere: str = ""
    """Another endpoint that defines each of its VMs as well, and runs it from that."""
    described: PowerState | None = None

    async def places(self, ref: Ref) -> tuple[Ref, ...]:
        return (ref, replace(ref, endpoint=self.elsewhere)) if self.elsewhere else (ref,)


NOW = datetime(2026, 1, 2, 3, 6, tzinfo=UTC)
"""After the scene's restore has begun."""


@dataclass
class Scene:
    """One VMRestore whose gate is closed, a snapshot, a safety snapshot, and hypervisors; tests take parts of it away."""

    world: World
    spec: dict[str, Any] = field(default_factory=lambda: {"snapshotName": "backup", "mode": "InPlace"})
    status: dict[str, Any] = field(
        default_factory=lambda: {"startTime": "2026-01-02T03:05:00Z", "hypervisorName": "lab"}
    )
    finalizers: list[str] = field(default_factory=lambda: [restore_gather.FINALIZER])
    deleting: bool = False
    memory: Memory = field(default_factory=lambda: Memory(since=Seconds(restore_gather.clock() - 60.0)))
    live: dict[str, LiveHypervisor] = field(default_factory=dict)
    domains: dict[tuple[str, str], str] = field(default_factory=dict)
    uuids: dict[str, str] = field(default_factory=dict)
    saved: bool = False
    power: PowerState = PowerState.SHUT_OFF

    @property
    def cluster(self) -> fakes.FakeCluster:
        return cast("fakes.FakeCluster", self.world.cluster)

    @property
    def classes(self) -> fakes.FakeClasses:
        return cast("fakes.FakeClasses", self.world.classes)

    def add(self, hypervisor: str, **domains: str) -> Client:
        """A hypervisor with domains by name, each by its definition; those with a gate are found by it."""
        client = Client()
        client.gated = tuple(
            Gated(ref=Ref(uuid=f"uuid of {n}", name=n, endpoint=hypervisor), definition=x)
            for n, x in domains.items()
            if "gate" in x
        )
        rule = AccessRule(namespace=(), domains=("*",))
        self.live[hypervisor] = LiveHypervisor(name=hypervisor, access=(rule,), client=cast("Any", client))
        self.cluster.hypervisors = tuple(sorted({*self.cluster.hypervisors, hypervisor}))
        for name, xml in domains.items():
            for key in (name, self.uuids.get(name, f"uuid of {name}"), *(["u"] if name == "demo" else [])):
                self.domains[hypervisor, key] = xml
        return client

    def get(self, name: str) -> LiveHypervisor | None:
        return self.live.get(name)

    @property
    def body(self) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "namespace": "team-a",
            "name": "back",
            "uid": UID,
            "generation": 1,
            "creationTimestamp": b.CREATED.isoformat(),
            "finalizers": self.finalizers,
        }
        if self.deleting:
            meta["deletionTimestamp"] = b.CREATED.isoformat()
        return {"kind": "VMRestore", "metadata": meta, "spec": self.spec, "status": self.status}

    async def seen(self) -> RestoreSeen:
        return await restore_gather.gather(self.world, self.body, self.memory)

    async def decided(self) -> RestoreDecision:
        return next_restore.decide(await self.seen(), b.CREATED)

    async def next(self) -> RestoreEffect:
        return (await self.decided()).effect


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(world=fakes.world(installation=records.INSTALLATION, classes=fakes.FakeClasses()))
    made.world.hypervisors = made
    clock = type("Clock", (), {"now": staticmethod(lambda: NOW)})
    cast("Any", made.cluster).client = type("Client", (), {"clock": clock})
    for asked in (records.REQUEST, SAFETY):
        made.cluster.snapshots["team-a", asked.name] = snapshot_body(asked)
        made.cluster.contents_by_name[contents.name_for(asked.uid)] = content_of(asked)

    async def look(client: Any, domain: str) -> tuple[Defined, ...]:
        hypervisor = next(n for n, live in made.live.items() if live.client is client)
        if client.error is not None:
            raise client.error
        xml = made.domains.get((hypervisor, domain))
        if xml is None:
            return ()
        name = next(n for h, n in made.domains if (h, made.domains[h, n]) == (hypervisor, xml))
        found = Defined(
            ref=Ref(uuid=made.uuids.get(name, f"uuid of {name}"), name=name, endpoint=hypervisor),
            xml=xml,
            power=made.power or client.machine.power,
            persistent=True,
            autostart=False,
            managed_save=made.saved,
            agent_channel=False,
        )
        return (found,)

    async def look_first(client: Any, domain: str) -> tuple[Defined, ...]:
        seen = await look(client, domain)
        if not client.elsewhere:
            return seen
        there = {"ref": replace(seen[0].ref, endpoint=client.elsewhere), "xml": XML, "power": PowerState.RUNNING}
        return (replace(seen[0], **there),)  # type: ignore[arg-type]  # its fields

    async def look_on(client: Any, ref: Ref) -> Defined | None:
        return next(iter(await look(client, ref.uuid)), None)

    monkeypatch.setattr(definitions, "look", look_first)
    monkeypatch.setattr(definitions, "look_everywhere", look)
    monkeypatch.setattr(definitions, "look_on", look_on)
    return made


def _no_snapshot(scene: Scene) -> None:
    del scene.cluster.snapshots["team-a", "backup"]


def _no_content(scene: Scene) -> None:
    del scene.cluster.contents_by_name[contents.name_for(records.REQUEST.uid)]


def _forged_content(scene: Scene) -> None:
    scene.cluster.contents_by_name[contents.name_for(records.REQUEST.uid)]["spec"]["attempt"] = 7


def _another_snapshot(scene: Scene) -> None:
    """It was deleted, and somebody made another one of its name."""
    other = replace(records.REQUEST, uid="8b0c2f5e-0f7e-4e0a-9f83-0d3c0e0a0003")
    scene.cluster.snapshots["team-a", "backup"] = snapshot_body(other)
    scene.cluster.contents_by_name[contents.name_for(other.uid)] = content_of(other)


def _no_access(scene: Scene) -> None:
    scene.live["lab"] = replace(scene.live["lab"], access=())


LOST = pytest.mark.parametrize(
    "lose", [_no_snapshot, _no_content, _forged_content, _another_snapshot, _no_access], ids=lambda f: f.__name__
)


@LOST
@pytest.mark.parametrize("deleting", [False, True])
async def test_a_closed_gate_is_found_and_brought_back(
    scene: Scene, lose: Callable[[Scene], None], deleting: bool
) -> None:
    scene.add("lab", demo=gated())
    scene.add("another", stranger=XML)
    lose(scene)
    scene.deleting = deleting
    seen = await scene.seen()
    assert seen.gated
    assert (seen.vm_name, seen.hypervisor, seen.safety) == ("demo", "lab", Safety.READY)
    assert isinstance(await scene.next(), GoBack)


@LOST
@pytest.mark.parametrize("deleting", [False, True])
async def test_a_closed_gate_without_a_way_back_is_never_let_go(
    scene: Scene, lose: Callable[[Scene], None], deleting: bool
) -> None:
    scene.add("lab", demo=gated())
    lose(scene)
    scene.deleting = deleting
    scene.cluster.contents_by_name.pop(contents.name_for(SAFETY.uid))
    made = await scene.decided()
    assert isinstance(made.effect, Rest)
    assert {c.type: c.reason for c in made.conditions}["Reconciling"] == "Blocked"


async def test_it_is_found_by_its_own_marker_alone(scene: Scene) -> None:
    scene.add("lab", demo=gated(marker=replace(MARKER, restore_uid="another")))
    scene.add("other", elsewhere=gated())
    scene.status = {}  # whatever a tenant writes there
    _no_snapshot(scene)
    seen = await scene.seen()
    assert (seen.hypervisor, seen.vm_name, seen.gated) == ("other", "elsewhere", True)


@LOST
async def test_without_a_gate_it_ends(scene: Scene, lose: Callable[[Scene], None]) -> None:
    """It went back, and the process died before it said so."""
    scene.add("lab", demo=XML)
    lose(scene)
    made = next_restore.decide(await scene.seen(), b.at(7200))
    assert isinstance(made.effect, LetGo)
    assert {c.type: c.status for c in made.conditions}["Stalled"] is True
    scene.deleting = True
    assert isinstance(await scene.next(), LetGo)


@pytest.mark.parametrize("how", ["silent", "unreadable", "not connected", "not seen yet"])
async def test_a_gate_that_may_be_where_nobody_can_look_is_waited_for(scene: Scene, how: str) -> None:
    client = scene.add("lab", demo=XML)
    match how:
        case "silent":
            client.gates_silent = {"second": "second does not answer"}
        case "unreadable":
            client.gated = (
                Gated(ref=Ref(uuid="x", name="x", endpoint="lab"), definition="", problem="it cannot be seen"),
            )
        case "not connected":
            scene.live["lab"] = LiveHypervisor(name="lab", problem="it is being connected to")
        case "not seen yet":
            del scene.live["lab"]
    _no_snapshot(scene)
    scene.deleting = True
    made = await scene.decided()
    assert isinstance(made.effect, Rest)
    assert {c.type: c.reason for c in made.conditions}["Reconciling"] == "HypervisorUnreachable"


async def test_nothing_is_looked_for_where_nothing_was_begun_or_all_has_ended(scene: Scene) -> None:
    client = scene.add("lab", demo=XML)
    client.gates_silent = {"second": "second does not answer"}
    _no_snapshot(scene)
    scene.finalizers, scene.status = [], {}
    assert not (await scene.seen()).problem
    ended = [{"type": "Ready", "status": "True", "reason": "Ready"}]
    scene.status = {"startTime": "2026-01-02T03:05:00Z", "conditions": ended}
    assert not (await scene.seen()).problem


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("lose", [None, _no_snapshot])
async def test_a_hypervisor_object_that_is_gone(
    scene: Scene, lose: Callable[[Scene], None] | None, begun: bool
) -> None:
    scene.status = {"hypervisorName": "lab"} | ({"startTime": "2026-01-02T03:05:00Z"} if begun else {})
    if lose is not None:
        lose(scene)
    made = await scene.decided()
    assert isinstance(made.effect, Rest) or lose is not None
    scene.deleting = True
    made = await scene.decided()
    assert isinstance(made.effect, Rest if begun else LetGo)
    assert {c.type: c.reason for c in made.conditions}["Reconciling"] == ("HypervisorNotFound" if begun else "Deleting")


async def test_a_marker_that_cannot_be_read_is_not_taken_for_none(scene: Scene) -> None:
    scene.add("lab", demo=gated().replace(f'uid="{UID}"', f'uid="{UID}!"'))
    made = await scene.decided()
    assert isinstance(made.effect, Rest)
    assert {c.type: c.reason for c in made.conditions}["Reconciling"] == "MarkerUnreadable"
    scene.deleting = True
    assert isinstance(await scene.next(), Rest)
    scene.finalizers, scene.deleting = [], False
    seen = await scene.seen()
    assert seen.refusal is not None
    assert seen.refusal.reason == "MarkerUnreadable"


async def test_what_is_about_to_be_begun_is_told_before(scene: Scene) -> None:
    scene.add("lab", demo=XML)
    seen = await scene.seen()

    def status(effect: RestoreEffect) -> dict[str, Any]:
        conditions = next_restore.decide(seen, b.CREATED).conditions
        return restore_report.status(seen, RestoreDecision(effect=effect, conditions=conditions), {}, b.CREATED)

    assert "startTime" not in status(Rest())
    told = status(CloseGate(("vda",)))
    assert "startTime" in told
    assert told["hypervisorName"] == "lab"


# --- everything is checked before anything is touched ----------------------------------------------------------------------


class Driver(fakes.FakeHost):
    """A class's process that answers so for each disk."""

    answer = Fit(ok=True, reason="Fits")

    async def capabilities(self, **_: Any) -> Capabilities:
        return Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True, clone=True)

    async def check_revert(self, _cut: Any, onto: Any, **_: Any) -> tuple[Fit, ...]:
        return tuple(self.answer for _ in onto)


@pytest.fixture
def fresh(scene: Scene) -> Scene:
    """A VM that has the disks of the snapshot, and a VMRestore that has not begun."""
    client = scene.add("lab", demo=XML)
    scene.status, scene.spec["runningVM"] = {}, "Stop"
    del scene.cluster.snapshots["team-a", SAFETY.name]
    scene.classes.by_name = {"fast": Driver(), "slow": Driver()}
    client.machine = b.machine(power=PowerState.RUNNING, disks=disks_of(records.example()))  # type: ignore[attr-defined]
    return scene


def switch_off(scene: Scene) -> None:
    client = cast("Any", scene.live["lab"].client)
    client.machine = replace(client.machine, power=PowerState.SHUT_OFF)


async def test_a_vm_that_runs_is_stopped_when_nothing_else_is_in_the_way(fresh: Scene) -> None:
    for host in fresh.classes.by_name.values():
        host.answer = Fit(ok=False, reason="InUse", message="QEMU has it open")  # type: ignore[attr-defined]
    assert isinstance(await fresh.next(), Stop)
    switch_off(fresh)
    seen = await fresh.seen()
    assert seen.refusal is not None, "somebody else has it"
    assert (seen.refusal.reason, seen.refusal.patience) == ("InUse", Patience.WAIT)


def _lost(scene: Scene) -> None:
    scene.classes.by_name["slow"].answer = Fit(ok=False, reason="SnapshotLost", message="it is gone")  # type: ignore[attr-defined]


def _saved(scene: Scene) -> None:
    scene.saved = True


def _plugged_live_only(scene: Scene) -> None:
    """The disk is in the VM that runs, and not in its definition: the gate could not be closed there."""
    root = tree.parse(XML)
    tree.devices(root).remove(tree.disks(root)["vdb"])
    scene.add("lab", demo=tree.text_of(root))


def _with_cookies(scene: Scene) -> None:
    scene.add("lab", demo=XML.replace("<source file='/a'/>", "<source file='/a'><cookies/></source>"))


def _capable(scene: Scene, **can: bool) -> None:
    record = records.example()
    groups = tuple(replace(g, capabilities=replace(g.capabilities, **can)) for g in record.plan.groups)
    body = content_of(records.REQUEST, plan=replace(record.plan, groups=groups))
    scene.cluster.contents_by_name[contents.name_for(records.REQUEST.uid)] = body


def _cannot_revert(scene: Scene) -> None:
    _capable(scene, revert=False)


def _newest_only(scene: Scene) -> None:
    _capable(scene, revert_newest_only=True)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_lost, "SnapshotLost"),
        (_saved, "VMSaved"),
        (_plugged_live_only, "DefinitionUnusable"),
        (_with_cookies, "DefinitionUnusable"),
        (_cannot_revert, "RevertNotSupported"),
        (_newest_only, "NewerSnapshots"),
    ],
)
async def test_what_cannot_be_done_is_found_out_before_the_vm_is_stopped(
    fresh: Scene, spoil: Callable[[Scene], None], reason: str
) -> None:
    machine = cast("Any", fresh.live["lab"].client).machine
    spoil(fresh)
    cast("Any", fresh.live["lab"].client).machine = machine
    made = await fresh.decided()
    assert isinstance(made.effect, LetGo)
    told = {c.type: (c.status, c.reason) for c in made.conditions}
    assert told["Stalled"] == (True, reason)
    assert "was shut down" not in {c.type: c.message for c in made.conditions}["Stalled"]


async def test_what_counts_is_the_power_that_the_checks_saw(fresh: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was started between two looks: what is checked of a VM that is off was not."""
    client = cast("Any", fresh.live["lab"].client)
    running = client.machine

    async def describe(_ref: Ref, *, ask_agent: bool) -> Machine:
        assert not ask_agent
        return cast("Machine", running)

    switch_off(fresh)
    monkeypatch.setattr(client, "describe", describe)
    assert (await fresh.seen()).power is PowerState.RUNNING
    assert isinstance(await fresh.next(), Stop)


@pytest.mark.parametrize("anew", [True, False])
async def test_a_restore_after_which_there_was_another_one_is_done_all_the_same(scene: Scene, anew: bool) -> None:
    """This very object, or one that a tool created anew: neither sets the VM back once more."""
    mine = replace(MARKER, restore_uid="before") if anew else MARKER
    other = replace(MARKER, restore="team-a/other", restore_uid="other")
    text = XML
    for marker in (mine, other):
        closed = definition.gated(text, Gate(marker=marker, targets=("vda",), autostart=False))
        text = definition.restored(closed, marker, genid="")
    scene.add("lab", demo=text)
    scene.spec["snapshotUID"] = records.REQUEST.uid
    told = {c.type: c.reason for c in (await scene.decided()).conditions}
    assert told["Ready"] == ("AlreadyRestored" if anew else "Ready")


async def test_without_a_safety_snapshot_the_newest_may_be_gone_back_to(fresh: Scene) -> None:
    _newest_only(fresh)
    fresh.spec["safetySnapshot"] = False
    assert isinstance(await fresh.next(), Stop)


async def test_what_fails_after_the_vm_was_stopped_says_that_it_is_off(
    fresh: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stop(*_: Any) -> bool:
        switch_off(fresh)
        return True

    monkeypatch.setattr(definitions, "stop", stop)
    seen = await fresh.seen()
    await restore_apply.apply(fresh.world, next_restore.decide(seen, b.CREATED).effect, seen, fresh.body, fresh.memory)
    assert isinstance(await fresh.next(), TakeSafety)
    _lost(fresh)
    told = {c.type: c for c in (await fresh.decided()).conditions}
    assert told["Stalled"].reason == "SnapshotLost"
    assert "the VM was shut down for this (spec.runningVM is Stop) and is off" in told["Stalled"].message


async def test_a_new_vm_that_could_not_be_defined_is_refused_before_anything_is_cloned(fresh: Scene) -> None:
    fresh.spec = {"snapshotName": "backup", "mode": "NewVM", "newVM": {"name": "copy"}}
    _capable(fresh, clone=True)
    name = contents.name_for(records.REQUEST.uid)
    record = contents.from_body(fresh.cluster.contents_by_name[name], records.REQUEST, records.INSTALLATION)
    for definition_xml, reason in (
        (XML, ""),
        (XML.replace("<devices>", "<os><loader readonly='no'>/fw</loader></os><devices>"), "DefinitionUnusable"),
        (XML.replace("<source file='/a'/>", "<source file='/a'><slices/></source>"), "DefinitionUnusable"),
    ):
        plan = replace(record.plan, definition=definition_xml)
        fresh.cluster.contents_by_name[name] = content_of(records.REQUEST, plan=plan)
        made = await fresh.decided()
        if reason:
            assert {c.type: c.reason for c in made.conditions if c.status}["Stalled"] == reason
        else:
            assert isinstance(made.effect, Clone)


# --- the clones of a new VM without a record ------------------------------------------------------------------------------

CLONE = names.request_name(records.INSTALLATION, UID, 1, "fast", ())


@pytest.fixture
def copy(scene: Scene) -> Scene:
    """A new VM whose clones are on storage; the snapshot's record is gone."""
    scene.spec = {"snapshotName": "backup", "mode": "NewVM", "newVM": {"name": "copy"}}
    scene.cluster.classes = ("fast", "slow")
    scene.classes.by_name = {"fast": fakes.FakeHost(held={CLONE}), "slow": fakes.FakeHost()}
    return scene


@LOST
@pytest.mark.parametrize("deleting", [False, True])
async def test_clones_of_a_vm_that_will_not_be_are_removed(
    copy: Scene, lose: Callable[[Scene], None], deleting: bool
) -> None:
    copy.add("lab", demo=XML)
    lose(copy)
    copy.deleting = deleting
    seen = await copy.seen()
    effect = next_restore.decide(seen, b.at(7200)).effect
    assert effect == RemoveClones(frozenset({CLONE}))
    await restore_apply.apply(copy.world, effect, seen, copy.body, copy.memory)
    assert isinstance(next_restore.decide(await copy.seen(), b.at(7200)).effect, LetGo)


@LOST
@pytest.mark.parametrize("deleting", [False, True])
async def test_clones_that_are_a_vms_disks_are_handed_over(
    copy: Scene, lose: Callable[[Scene], None], deleting: bool
) -> None:
    copy.add("lab", copy=new_vm())
    lose(copy)
    copy.deleting = deleting
    assert await copy.next() == HandOver(frozenset({CLONE}))


async def test_a_name_that_several_vms_have_is_taken(copy: Scene) -> None:
    copy.add("lab", demo=XML).error = DomainGoneError('there are several domains "copy"', ambiguous=True)
    assert {c.type: c.reason for c in (await copy.decided()).conditions}["Reconciling"] == "NameTaken"
    copy.finalizers, copy.status = [], {}
    seen = await copy.seen()
    assert seen.refusal is not None
    assert seen.refusal.reason == "NameTaken"


async def test_clones_stay_while_their_vm_may_be_defined_where_nobody_can_look(copy: Scene) -> None:
    copy.add("lab", copy=new_vm()).error = HypervisorUnreachableError("lab does not answer")
    _no_snapshot(copy)
    copy.deleting = True
    assert isinstance(await copy.next(), Rest)
    copy.cluster.hypervisors = ()  # the object is deleted; that the VM was there is in status
    assert isinstance(await copy.next(), Rest)


async def test_clones_that_a_vm_uses_are_not_removed_and_it_is_named(copy: Scene) -> None:
    client = copy.add("lab", demo=XML)
    copy.add("another", renamed=XML)
    copy.live["another"].client.disks = {f"/pool/{CLONE}-1.img": "renamed"}  # type: ignore[union-attr, misc]
    _no_snapshot(copy)
    seen = await copy.seen()
    effect = next_restore.decide(seen, b.at(7200)).effect
    with pytest.raises(DriverError, match=f"VM renamed has {CLONE} among its disks"):
        await restore_apply.apply(copy.world, effect, seen, copy.body, copy.memory)
    copy.live["another"].client.disks = {}  # type: ignore[union-attr, misc]
    client.silent = {"host": "host does not answer"}
    with pytest.raises(HypervisorUnreachableError, match="host does not answer"):
        await restore_apply.apply(copy.world, effect, seen, copy.body, copy.memory)
    assert copy.classes.by_name["fast"].held == {CLONE}


@pytest.mark.parametrize("marked", [True, False])
async def test_a_new_vm_is_found_by_its_uuid_whatever_it_is_called_and_whoever_defined_it_anew(
    copy: Scene, marked: bool
) -> None:
    copy.uuids["renamed"] = Identity(name="copy", seed=UID).uuid
    copy.add("lab", demo=XML, renamed=new_vm() if marked else XML.replace(">demo<", ">renamed<"))
    assert await copy.next() == HandOver(frozenset({CLONE}))


async def test_a_class_whose_driver_does_not_run_is_named(copy: Scene) -> None:
    copy.add("lab", demo=XML)
    _no_snapshot(copy)
    copy.classes.by_name.pop("slow")
    made = await copy.decided()
    assert isinstance(made.effect, Rest)
    assert 'class "slow"' in {c.type: c.message for c in made.conditions}["Reconciling"]


# --- the way back ---------------------------------------------------------------------------------------------------------


async def test_going_back_sets_back_what_the_gate_took_and_nothing_else(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene.add("lab", demo=gated("vda", "vdc"))
    _no_snapshot(scene)
    reverted: list[str] = []
    opened: list[str] = []

    class Host(fakes.FakeHost):
        async def revert(self, _cut: Any, onto: Any, **_: Any) -> None:
            reverted.extend(v.label for v in onto)

    async def redefine(_client: Any, _ref: Ref, change: Callable[[str], str], **_: Any) -> None:
        opened.append(change(gated("vda", "vdc")))

    scene.classes.by_name = {"fast": Host(), "slow": Host()}
    monkeypatch.setattr(definitions, "redefine", redefine)
    seen = await scene.seen()
    effect = next_restore.decide(seen, b.CREATED).effect
    await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)
    assert sorted(reverted) == ["vda", "vdc"]
    assert definition.gate_of(opened[0]) is None
    assert definition.done(opened[0]) == ()
    assert definition.went_back(opened[0]) == (MARKER, "SnapshotNotFound")
    assert scene.memory.broken is not None
    assert scene.memory.broken.reason == "SnapshotNotFound"


HALF_DONE = {"type": "VolumesRestored", "status": "False", "reason": "HalfDone"}


@LOST
async def test_one_that_went_back_is_known_although_the_process_died_before_it_said_so(
    scene: Scene, lose: Callable[[Scene], None]
) -> None:
    scene.add("lab", demo=definition.reopened(gated(), MARKER, why="SnapshotLost"))
    scene.status |= {"vm": {"name": "demo", "uuid": "uuid of demo"}, "conditions": [HALF_DONE]}
    lose(scene)
    made = await scene.decided()
    told = {c.type: c for c in made.conditions}
    assert isinstance(made.effect, LetGo)
    assert told["VolumesRestored"].reason == "WentBack"
    assert told["Stalled"].status is True


@LOST
async def test_one_whose_gate_is_nowhere_is_not_called_one_that_was_not_begun(
    scene: Scene, lose: Callable[[Scene], None]
) -> None:
    scene.add("lab", demo=XML)
    scene.status |= {"vm": {"name": "demo", "uuid": "uuid of demo"}, "conditions": [HALF_DONE]}
    lose(scene)
    told = {c.type: c for c in (await scene.decided()).conditions}
    assert (told["VolumesRestored"].reason, told["Stalled"].reason) == ("HalfDone", "HalfDone")
    assert SAFETY.name in told["Stalled"].message


@pytest.mark.parametrize("at", ["gate", "done", "went back", "before"])
async def test_one_whose_gate_was_defined_away_undoes_nothing_that_another_restore_did_since(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    other = replace(MARKER, restore="team-a/other", restore_uid="other")
    moment = NOW - timedelta(minutes=2) if at == "before" else NOW
    theirs = gated(marker=other)
    if at == "went back":
        theirs = definition.reopened(theirs, other, why="SnapshotLost", now=moment)
    elif at != "gate":
        theirs = definition.restored(theirs, other, genid="", now=moment)
    scene.status["conditions"] = [HALF_DONE]
    plan = restore_plan.make(records.example(), (v := records.example().plan.volumes), {t.target: t.volume for t in v})
    scene.add("lab", demo=theirs)
    seen = replace(await scene.seen(), plan=plan, refusal=None)
    assert seen.overtaken_by == ("" if at == "before" else "team-a/other")
    effect = next_restore.decide(seen, b.CREATED).effect
    assert isinstance(effect, CloseGate if at == "before" else LetGo)

    async def redefine(_client: Any, _ref: Ref, change: Callable[[str], str], **_: Any) -> None:
        change(theirs)

    async def set_autostart(*_: Any, **__: Any) -> None:
        return

    monkeypatch.setattr(definitions, "redefine", redefine)
    monkeypatch.setattr(definitions, "set_autostart", set_autostart)
    closing = restore_apply.apply(scene.world, CloseGate(plan.gate), seen, scene.body, scene.memory)
    if at == "before":
        await closing
    else:
        with pytest.raises((RefusedError, ForeignJournalError)):  # it was decided upon before that
            await closing


async def test_marks_say_when(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    async def redefine(_client: Any, _ref: Ref, change: Callable[[str], str], **_: Any) -> None:
        opened.append(change(gated()))

    monkeypatch.setattr(definitions, "redefine", redefine)
    scene.classes.by_name = {"fast": Reverting(), "slow": Reverting()}
    scene.add("lab", demo=gated())
    seen = await scene.seen()
    assert seen.plan is not None
    why = Failure(reason="SnapshotLost", message="it is gone")
    for effect in (Revert(seen.plan.groups), GoBack(why)):
        await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)
    assert [definition.later_restore(text, "other", NOW) for text in opened] == [MARKER, MARKER]


async def test_what_was_told_of_half_done_disks_is_not_forgotten_while_nobody_can_look(scene: Scene) -> None:
    scene.add("lab", demo=XML).error = HypervisorUnreachableError("lab does not answer")
    scene.status["conditions"] = [HALF_DONE]
    made = await scene.decided()
    assert isinstance(made.effect, Rest)
    assert {c.type: c.reason for c in made.conditions}["VolumesRestored"] == "HalfDone"


async def test_what_is_judged_and_what_is_decided_upon_are_of_one_look(scene: Scene) -> None:
    """It was started between two of them: then nothing was asked that is asked of one that is off."""
    scene.add("lab", demo=XML).described = PowerState.RUNNING
    assert (await scene.seen()).power is PowerState.RUNNING


# --- a VM that could run, or does ------------------------------------------------------------------------------------------


@LOST
@pytest.mark.parametrize("how", ["runs", "defined elsewhere"])
async def test_no_disk_is_set_back_beneath_a_vm_that_runs_or_could(
    scene: Scene, lose: Callable[[Scene], None], how: str
) -> None:
    client = scene.add("lab", demo=gated())
    lose(scene)
    seen = await scene.seen()
    effect = next_restore.decide(seen, b.CREATED).effect
    assert isinstance(effect, GoBack)
    if how == "runs":
        scene.power = PowerState.RUNNING
    else:
        client.elsewhere = "another"
    made = await scene.decided()
    assert isinstance(made.effect, Rest)
    reason = "VMRunning" if how == "runs" else "DomainAmbiguous"
    assert {c.type: c.reason for c in made.conditions}["Reconciling"] == reason
    assert {c.type: c.reason for c in made.conditions}["VolumesRestored"] == "HalfDone"
    with pytest.raises(HypervisorError) as caught:  # it was decided upon before that
        await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)
    assert caught.value.reason == reason
    assert scene.classes.by_name == {}, "no driver was asked"


@pytest.mark.parametrize("closing", [False, True])
async def test_the_gate_is_moved_by_the_leader_alone_and_taken_back_if_it_came_too_late(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, closing: bool
) -> None:
    asked: dict[str, Any] = {}

    async def redefine(_client: Any, _ref: Ref, _change: Any, **options: Any) -> None:
        asked.update(options)

    async def set_autostart(_client: Any, _ref: Ref, *, on: bool) -> None:
        assert not on

    monkeypatch.setattr(definitions, "redefine", redefine)
    monkeypatch.setattr(definitions, "set_autostart", set_autostart)
    scene.classes.by_name = {"fast": Reverting(), "slow": Reverting()}
    scene.add("lab", demo=XML if closing else gated())
    record = records.example()
    plan = restore_plan.make(record, record.plan.volumes, {v.target: v.volume for v in record.plan.volumes})
    seen = replace(await scene.seen(), plan=plan)
    effect = CloseGate(plan.gate) if closing else Revert(plan.groups)
    await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)
    assert asked.get("take_back", False) is closing
    assert asked["permit"]() == ""
    monkeypatch.setattr(scene.world.leadership, "is_leader", lambda *_: False)
    assert "another instance" in asked["permit"]()


@pytest.mark.parametrize("back", [False, True])
async def test_no_disk_is_set_back_once_the_gate_is_gone(scene: Scene, back: bool) -> None:
    scene.add("lab", demo=gated())
    seen = await scene.seen()
    assert seen.plan is not None
    scene.add("lab", demo=XML)
    effect = GoBack(Failure(reason="SnapshotLost", message="it is gone")) if back else Revert(seen.plan.groups)
    with pytest.raises(ConflictError, match="does not bear the gate"):
        await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)


async def test_a_safety_snapshot_that_lacks_a_disk_opens_nothing(scene: Scene) -> None:
    scene.add("lab", demo=gated().replace("/b'", "/elsewhere'").replace('"/b"', '"/elsewhere"'))
    _no_snapshot(scene)
    seen = await scene.seen()
    effect = GoBack(Failure(reason="SnapshotLost", message="it is gone"))
    with pytest.raises(restore_apply.RefusedError, match="lacks 1 of the 3 disks"):
        await restore_apply.apply(scene.world, effect, seen, scene.body, scene.memory)


async def test_a_gate_on_the_vm_that_it_began_with_is_found_although_the_snapshot_is_of_another_one_now(
    scene: Scene,
) -> None:
    scene.add("lab", demo=XML, elder=gated())
    _another_snapshot(scene)
    scene.status["vm"] = {"name": "elder", "uuid": "uuid of elder"}
    seen = await scene.seen()
    assert (seen.gated, seen.vm_name) == (True, "elder")
    assert isinstance(await scene.next(), GoBack)


@pytest.mark.parametrize(("include", "with_nvram"), [((), True), (("vda",), False), (("vda", NVRAM), True)])
async def test_the_variables_of_the_firmware_go_back_if_they_were_asked_for(
    scene: Scene, include: tuple[str, ...], with_nvram: bool
) -> None:
    """They are no disk, so the gate does not name them."""
    scene.add("lab", demo=gated("vda"))
    scene.spec["volumes"] = {"include": list(include)}
    _no_snapshot(scene)
    seen = await scene.seen()
    safety = records.example()
    layer = replace(safety.plan.volumes[0].volume.writable, source="/nvram")
    volume = replace(safety.plan.volumes[0].volume, id=volume_id(layer), label=NVRAM, writable=layer)
    more = replace(safety.plan.volumes[0], target=NVRAM, volume=volume)
    safety = replace(safety, plan=replace(safety.plan, volumes=(*safety.plan.volumes, more)))
    found = await restore_search.find(scene.world, seen.request, "lab", seen.vm_uuid)
    touched = restore_apply._touched(seen, found, safety)
    assert (volume.id in touched) is with_nvram
    assert safety.plan.volumes[0].volume.id in touched
    assert len(touched) == 1 + with_nvram
