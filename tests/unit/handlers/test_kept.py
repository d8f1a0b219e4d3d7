"""Kept overlays stay visible, rubbish goes, and a pool that hangs delays nobody; on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.handlers import fakes
from tests.unit.handlers.test_hypervisors import BODY, OURS, Lab, lab, sighting  # noqa: F401 - the fixture
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.handlers import kept
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint

pytestmark = pytest.mark.looptime

PATH = "/pool/" + names.overlay_name(OURS, "u", 1, VolumeId("v"))
RUBBISH = OverlayFile(path=PATH, endpoint="host", pristine=True, genuine=True)
USED = OverlayFile(path=PATH, endpoint="host", domain="vm1")


async def looked(lab: Lab, body: dict[str, Any] | None = None) -> None:  # noqa: F811
    """Look, let the task come to its end, and look again so that status tells of it."""
    await lab.look(body)
    await asyncio.sleep(1)
    await lab.look(body)


def entries(lab: Lab) -> list[dict[str, Any]]:  # noqa: F811
    return list(lab.status.get("keptOverlays") or ())


async def test_one_on_which_a_vm_runs_is_told_as_long_as_it_is_there(lab: Lab) -> None:  # noqa: F811
    lab.client.files = (USED,)
    lab.world.kept[PATH] = "its base has changed since the switch"
    await looked(lab)
    (entry,) = entries(lab)
    assert (entry["path"], entry["domain"], entry["endpoint"]) == (PATH, "vm1", "host")
    assert "nobody commits it (its base has changed since the switch)" in entry["message"]
    assert lab.metric("vmsnapshot_kept_overlays") == 1
    assert sum("OverlayKept" in e for e in lab.events) == 1
    await asyncio.sleep(kept.LOOK_EVERY)
    await looked(lab)
    assert sum("OverlayKept" in e for e in lab.events) == 1, "said once, and shown all the time"
    lab.client.files = ()
    await asyncio.sleep(kept.LOOK_EVERY)
    await looked(lab)
    assert not entries(lab)
    assert lab.metric("vmsnapshot_kept_overlays") == 0


async def test_since_when_and_why_outlive_the_operator(lab: Lab) -> None:  # noqa: F811
    lab.client.files = (USED,)
    told = {
        "path": PATH,
        "endpoint": "host",
        "domain": "vm1",
        "sinceTime": "2026-01-01T00:00:00Z",
        "message": "its base has changed",
    }
    body = {**BODY, "status": {"keptOverlays": [told]}}
    await looked(lab, body)
    assert entries(lab) == [told]
    lab.client.files = (replace(USED, domain="vm2"),)
    await asyncio.sleep(kept.LOOK_EVERY)
    await looked(lab, body)
    assert entries(lab)[0]["sinceTime"] != told["sinceTime"], "that is another matter"


async def test_before_the_first_look_what_was_told_stays(lab: Lab) -> None:  # noqa: F811
    told = {"path": PATH, "endpoint": "host", "sinceTime": "2026-01-01T00:00:00Z", "message": "m"}
    lab.client.hangs = 3600.0
    await lab.look({**BODY, "status": {"keptOverlays": [told]}})
    assert entries(lab) == [told]


async def test_one_that_was_just_kept_is_looked_for_at_once(lab: Lab) -> None:  # noqa: F811
    await looked(lab)
    lab.client.files = (USED,)
    lab.world.kept[PATH] = "its base has changed"
    await looked(lab)
    assert len(entries(lab)) == 1


async def test_rubbish_is_removed_and_said(lab: Lab) -> None:  # noqa: F811
    lab.client.files = (RUBBISH,)
    await looked(lab)
    assert lab.client.removed == [PATH]
    assert any("OrphanRemoved" in e and PATH in e for e in lab.events)
    assert not entries(lab)


@pytest.mark.parametrize("who", ["watch", "API server", "claim", "journal"])
async def test_what_somebody_knows_is_not_removed(lab: Lab, who: str) -> None:  # noqa: F811
    lab.client.files = (RUBBISH,)
    match who:
        case "watch":
            lab.world.uids = lambda: frozenset({"u"})
        case "API server":
            lab.cluster.snapshots[("ns", "name")] = {"metadata": {"uid": "u"}}
        case "claim":
            lab.world.claims["vm"] = "u"
        case "journal":
            lab.client.sightings = [sighting(1, installation="zzzzzz", overlays={"v": PATH})]
    await looked(lab)
    assert not lab.client.removed
    assert not entries(lab)


async def test_without_the_api_server_nothing_is_removed(lab: Lab) -> None:  # noqa: F811
    lab.client.files = (RUBBISH,)
    lab.cluster.down = True
    await looked(lab)
    assert not lab.client.removed


async def test_a_host_that_does_not_answer_is_not_taken_for_empty(lab: Lab) -> None:  # noqa: F811
    lab.client.files = (USED,)
    await looked(lab)
    lab.client.files, lab.client.silent = (), {"host": "host does not answer"}
    await asyncio.sleep(kept.LOOK_EVERY)
    await looked(lab)
    assert len(entries(lab)) == 1


async def test_one_that_cannot_be_removed_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    async def refused(_file: OverlayFile) -> None:
        raise HypervisorError("the pool is read-only")

    monkeypatch.setattr(lab.client, "remove_overlay", refused)
    lab.client.files = (RUBBISH,)
    await looked(lab)
    assert "could not be removed yet: the pool is read-only" in entries(lab)[0]["message"]


async def test_a_pool_that_hangs_delays_no_sweep(lab: Lab) -> None:  # noqa: F811
    lab.client.hangs = 3600.0
    start = asyncio.get_running_loop().time()
    lab.client.sightings = [sighting(1)]
    await lab.look()
    assert lab.tries == ["vm1"]
    assert asyncio.get_running_loop().time() == start
    await lab.hypervisors.close()


async def test_a_standby_touches_nothing(lab: Lab) -> None:  # noqa: F811
    lab.world.leadership.leader = False  # type: ignore[attr-defined]  # a stand-in
    lab.client.files = (RUBBISH,)
    await looked(lab)
    assert not lab.client.removed


CHECKPOINT = Checkpoint("vm1", names.checkpoint_name(names.request_name(OURS, "u", 1, "c", ()), VolumeId("v")))


@pytest.mark.parametrize(
    ("watched", "there", "off", "leader", "gone"),
    [
        ((), (), False, True, True),
        (("u",), ("u",), False, True, False),
        ((), ("u",), False, True, False),
        ((), (), True, True, False),
        ((), (), False, False, False),
    ],
)
async def test_a_checkpoint_that_no_snapshot_needs_is_removed(
    lab: Lab,  # noqa: F811
    watched: tuple[str, ...],
    there: tuple[str, ...],
    off: bool,
    leader: bool,
    gone: bool,
) -> None:
    stranger = Checkpoint("vm1", "backup-of-monday")
    lab.client.seen, lab.client.off = (CHECKPOINT, stranger), off
    lab.world.uids = lambda: frozenset(watched)
    lab.cluster.snapshots = {("a", u): {"metadata": {"uid": u}} for u in there}
    lab.world.leadership = fakes.FakeLeadership(leader)  # type: ignore[assignment]  # a stand-in
    await looked(lab)
    assert lab.client.seen == ((stranger,) if gone else (CHECKPOINT, stranger))


async def test_checkpoints_that_cannot_be_looked_at_delay_no_overlay(lab: Lab) -> None:  # noqa: F811
    async def hang(_prefix: str) -> tuple[Checkpoint, ...]:
        await asyncio.sleep(3600)
        return ()

    lab.client.all_checkpoints = hang  # type: ignore[method-assign]  # a stand-in
    lab.client.files = (USED,)
    await looked(lab)
    assert entries(lab)
