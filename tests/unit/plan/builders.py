"""Small facts to build plans, machines and observations from; every test says only what matters to it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from vmsnapshot_operator.core.driver import Capabilities, CutKind, Fit
from vmsnapshot_operator.core.machine import Agent, AgentState, Disk, FileSystem, Machine, PowerState
from vmsnapshot_operator.core.planning import Match, OverlayRoom, Plan, Policy, Refusal, Request, StorageClass
from vmsnapshot_operator.core.volumes import Layer, SourceKind, volume_id
from vmsnapshot_operator.plan.planner import make_plan

CREATED = datetime(2026, 1, 1, tzinfo=UTC)
UID = "0b6f7d1e-0000-4000-8000-000000000001"
INSTALLATION = "abcdef"


def at(seconds: float) -> datetime:
    """A moment so long after the request was created."""
    return CREATED + timedelta(seconds=seconds)


def file_layer(name: str, **changes: Any) -> Layer:
    """A raw file in the pool `reflink`."""
    return replace(Layer(kind=SourceKind.FILE, source=f"/pool/{name}.raw", format="raw", pool="reflink"), **changes)


def rbd_layer(name: str, **changes: Any) -> Layer:
    """An RBD image in the pool `vms`."""
    layer = Layer(
        kind=SourceKind.NETWORK, source=f"vms/{name}", format="raw", protocol="rbd", pool="vms", hosts=("mon:6789",)
    )
    return replace(layer, **changes)


def disk(target: str, layer: Layer | None = None, **changes: Any) -> Disk:
    """A disk of 64 MiB."""
    found = layer if layer is not None else file_layer(target)
    return replace(Disk(target=target, layers=(found,), size_bytes=64 << 20, cache="none"), **changes)


DISKS = (disk("vda"), disk("vdb"), disk("vdc", rbd_layer("c")))


def agent(targets: tuple[str, ...] = ("vda", "vdb", "vdc"), **changes: Any) -> Agent:
    """A thawed agent that lists one file system on each of these disks."""
    systems = tuple(FileSystem(mountpoint=f"/mnt/{t}", device=t, type="ext4", targets=(t,)) for t in targets)
    return replace(Agent(state=AgentState.THAWED, filesystems=systems), **changes)


def machine(**changes: Any) -> Machine:
    """A running VM with three disks on two storage systems and a good agent."""
    found = Machine(
        name="demo",
        uuid="6dd6ed9d-0000-4000-8000-000000000002",
        endpoint="host",
        run_id=7,
        power=PowerState.RUNNING,
        disks=DISKS,
        agent=agent(),
    )
    return replace(found, **changes)


def storage_class(name: str, match: Match, **changes: Any) -> StorageClass:
    """A class that is ready and cuts in an instant."""
    found = StorageClass(
        name=name,
        driver=f"driver-{name}",
        match=(match,),
        ready=True,
        capabilities=Capabilities(cut=CutKind.INSTANT, atomic=False, revert=True),
    )
    return replace(found, **changes)


FILES = storage_class("files", Match(type="file", pool="reflink"))
CEPH = storage_class(
    "ceph",
    Match(protocol="rbd"),
    capabilities=Capabilities(cut=CutKind.INSTANT, atomic=True, revert=True),
)
CLASSES = (FILES, CEPH)
BACKUP = replace(FILES, capabilities=Capabilities(cut=CutKind.HYPERVISOR, atomic=True, revert=True))
ROOM = OverlayRoom(pool="overlays", min_free_bytes=1 << 30, free_bytes=4 << 30)


def request(**changes: Any) -> Request:
    """A request with the defaults of the API."""
    found = Request(
        uid=UID, namespace="team-a", name="snap", generation=1, created=CREATED, hypervisor="lab", domain="demo"
    )
    return replace(found, **changes)


def fits(found: Machine, classes: tuple[StorageClass, ...] = CLASSES) -> dict[Any, dict[str, Fit]]:
    """Every driver says yes to every volume."""
    yes = Fit(ok=True, reason="Fits")
    return {volume_id(d.layers[0]): {c.name: yes for c in classes} for d in found.disks if d.layers}


def planned(
    asked: Request | None = None,
    found: Machine | None = None,
    classes: tuple[StorageClass, ...] = CLASSES,
    **options: Any,
) -> Plan | Refusal:
    """Plan with all drivers willing."""
    seen = found if found is not None else machine()
    return make_plan(asked if asked is not None else request(), seen, classes, fits(seen, classes), **options)


def plan(asked: Request | None = None, found: Machine | None = None, **options: Any) -> Plan:
    """A plan that is not refused."""
    made = planned(asked, found, **options)
    assert isinstance(made, Plan), made
    return made


def refusal(asked: Request | None = None, found: Machine | None = None, **options: Any) -> Refusal:
    """A plan that is refused."""
    made = planned(asked, found, **options)
    assert isinstance(made, Refusal), made
    return made


NEVER = request(policy=Policy.NEVER)
REQUIRE = request(policy=Policy.REQUIRE)
