"""A gate that nobody opens is told as long as it is there: in status, as an event, as a metric, and by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.handlers.test_hypervisors import BODY, OURS, Lab, lab  # noqa: F401 - the fixture
from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.hypervisors.domains import Gated, Ref
from vmsnapshot_operator.plan import definition

pytestmark = pytest.mark.looptime

XML = """<domain type='kvm'><name>vm1</name><devices>
<disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk></devices></domain>"""


def gated(*, installation: str = OURS, uid: str = "r1", name: str = "vm1") -> Gated:
    marker = Marker(installation=installation, restore="team-a/back", restore_uid=uid, snapshot_uid="s1")
    xml = definition.gated(XML, Gate(marker=marker, targets=("vda",), autostart=False))
    return Gated(ref=Ref(uuid=f"u-{name}", name=name, endpoint="host"), definition=xml)


def entries(lab: Lab) -> list[dict[str, Any]]:  # noqa: F811
    return list(lab.status.get("leftGates") or ())


def restore(lab: Lab, uid: str = "r1", *, finalizers: tuple[str, ...] = (FINALIZER,)) -> None:  # noqa: F811
    body = {"metadata": {"uid": uid, "finalizers": list(finalizers)}}
    lab.cluster.restores["team-a", "back"] = body


async def test_one_whose_restore_is_gone_is_told_as_long_as_it_is_there(lab: Lab) -> None:  # noqa: F811
    lab.client.gated = (gated(),)
    for _ in range(3):
        await lab.look()
    (entry,) = entries(lab)
    assert (entry["domain"], entry["endpoint"], entry["restore"]) == ("vm1", "host", "team-a/back")
    assert "disks vda and is gone: the VM cannot be started" in entry["message"]
    assert lab.metric("vmsnapshot_left_gates") == 1
    assert sum("GateLeft" in e and "vm1" in e for e in lab.events) == 1, "said once, and shown all the time"
    lab.client.gated = ()
    await lab.look()
    assert not entries(lab)
    assert lab.metric("vmsnapshot_left_gates") == 0


async def test_one_whose_restore_is_at_work_is_nobodys_business(lab: Lab) -> None:  # noqa: F811
    lab.client.gated = (gated(),)
    restore(lab)
    await lab.look()
    assert not entries(lab)
    assert lab.metric("vmsnapshot_left_gates") == 0


@pytest.mark.parametrize("how", ["another of its name", "let go"])
async def test_one_whose_restore_is_not_what_it_was_is_told(lab: Lab, how: str) -> None:  # noqa: F811
    lab.client.gated = (gated(),)
    if how == "let go":
        restore(lab, finalizers=("example.com/hold",))
    else:
        restore(lab, uid="another")
    await lab.look()
    assert len(entries(lab)) == 1


async def test_one_of_another_installation_is_that_ones_business(lab: Lab) -> None:  # noqa: F811
    lab.client.gated = (gated(installation="zzzzzz"),)
    await lab.look()
    assert not entries(lab)


async def test_one_that_cannot_be_read_is_told(lab: Lab) -> None:  # noqa: F811
    ref = Ref(uuid="u", name="vm2", endpoint="host")
    broken = gated().definition.replace('uid="r1"', 'uid=""')
    lab.client.gated = (Gated(ref=ref, definition=broken),)
    await lab.look()
    (entry,) = entries(lab)
    assert "restore" not in entry
    assert "its gate cannot be read" in entry["message"]


async def test_since_when_outlives_the_operator(lab: Lab) -> None:  # noqa: F811
    lab.client.gated = (gated(),)
    told = {"domain": "vm1", "endpoint": "host", "restore": "team-a/back", "sinceTime": "2026-01-01T00:00:00Z"}
    await lab.look({**BODY, "status": {"leftGates": [told]}})
    assert entries(lab)[0]["sinceTime"] == told["sinceTime"]


@pytest.mark.parametrize("how", ["host", "domain", "API server"])
async def test_what_cannot_be_seen_is_not_taken_for_gone(lab: Lab, how: str) -> None:  # noqa: F811
    lab.client.gated = (gated(),)
    await lab.look()
    match how:
        case "host":
            lab.client.gated, lab.client.gates_silent = (), {"host": "host does not answer"}
        case "domain":
            lab.client.gated = (Gated(ref=gated().ref, definition="", problem="it cannot be asked"),)
        case "API server":
            lab.cluster.down = True
    await lab.look()
    assert len(entries(lab)) == 1
    assert lab.metric("vmsnapshot_left_gates") == 1


async def test_before_the_first_answer_what_was_told_stays(lab: Lab) -> None:  # noqa: F811
    told = {"domain": "vm1", "endpoint": "host", "sinceTime": "2026-01-01T00:00:00Z", "message": "m"}
    lab.client.gates_silent = {"host": "host does not answer"}
    await lab.look({**BODY, "status": {"leftGates": [told]}})
    assert entries(lab) == [told]


async def test_a_standby_tells_nothing(lab: Lab) -> None:  # noqa: F811
    lab.world.leadership.leader = False  # type: ignore[attr-defined]  # a stand-in
    lab.client.gated = (gated(),)
    await lab.look()
    assert not lab.events
