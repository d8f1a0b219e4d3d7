"""The sweep of hypervisors, on a clock that the event loop fakes: who is freed, who is left, and what is said."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.handlers import fakes
from vmsnapshot_operator.api.meta import content_name
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.errors import HypervisorError, HypervisorUnreachableError, KubeError, QuiesceError
from vmsnapshot_operator.handlers import hypervisors
from vmsnapshot_operator.handlers.hypervisors import LOOK_EVERY, RETRY_EVERY, Hypervisors
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref, Sighting
from vmsnapshot_operator.plan.orphans import Place, Proof
from vmsnapshot_operator.strategies.world import World

pytestmark = pytest.mark.looptime

OURS = "abcdef"
BODY = {
    "metadata": {"name": "lab", "uid": "h", "generation": 1},
    "spec": {"libvirt": {"endpoints": [{"driver": "test"}]}},
}


def sighting(number: int = 1, *, installation: str = OURS, owner: str = "u", **changes: Any) -> Sighting:
    journal = Journal(
        installation=installation,
        owner_uid=owner,
        nonce=f"{number:032x}",
        attempt=number,
        method="GuestAgent",
        budget=30.0,
    )
    ref = Ref(uuid=f"00000000-0000-0000-0000-{number:012}", name=f"vm{number}", endpoint="host")
    return Sighting(ref=ref, journal=replace(journal, **changes))


class Lab:
    """Hypervisors over a fake connection, and a `free` that does as it is told by the VM's name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, leader: bool = True) -> None:
        self.client = fakes.FakeClient()
        self.world: World = fakes.world(installation=OURS, leader=leader)
        self.hypervisors = Hypervisors()
        self.tries: list[str] = []
        self.never: dict[str, QuiesceError] = {}
        self.hangs: dict[str, float] = {}

        def to(*_: object) -> fakes.FakeClient:
            return self.client

        async def free(_client: Hypervisor, ref: Ref, _journal: Journal) -> None:
            self.tries.append(ref.name)
            await asyncio.sleep(self.hangs.get(ref.name, 0.0))
            if ref.name in self.never:
                raise self.never[ref.name]
            self.client.sightings = [s for s in self.client.sightings if s.ref != ref]

        monkeypatch.setattr(Hypervisor, "to", to)
        monkeypatch.setattr(hypervisors, "release", free)
        monkeypatch.setattr(hypervisors, "clock", lambda: asyncio.get_running_loop().time())

    async def look(self, body: dict[str, Any] | None = None) -> float:
        return await self.hypervisors.reconcile(body or dict(BODY), self.world)

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.statuses[-1][1]

    @property
    def cluster(self) -> fakes.FakeCluster:
        return self.world.cluster  # type: ignore[return-value]  # a stand-in

    @property
    def events(self) -> list[str]:
        return self.world.events.posted  # type: ignore[attr-defined,no-any-return]  # a stand-in

    def metric(self, name: str) -> float | None:
        return self.world.metrics.registry.get_sample_value(name, {"hypervisor": "lab"})


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


GONE = QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)


async def test_what_is_left_is_freed_at_the_first_look(lab: Lab) -> None:
    lab.client.sightings = [sighting(1), sighting(2)]
    assert await lab.look() == LOOK_EVERY
    assert sorted(lab.tries) == ["vm1", "vm2"]
    assert lab.metric("vmsnapshot_swept_vms_total") == 2
    assert lab.metric("vmsnapshot_still_held_vms") == 0
    assert any("VMFreed" in e and "vm1" in e for e in lab.events)
    assert lab.hypervisors.proven() == {"u": Proof(2, Place("lab", sighting(2).ref.uuid))}


async def test_windows_of_this_process_are_left_to_it_until_they_are_overdue(lab: Lab) -> None:
    open_window = sighting(1)
    lab.world.claims[open_window.ref.uuid] = "u"
    lab.client.sightings = [open_window]
    assert await lab.look() == LOOK_EVERY
    assert not lab.tries
    await asyncio.sleep(40)
    await lab.look()
    assert lab.tries == ["vm1"]


async def test_one_that_hangs_delays_none_of_the_others(lab: Lab) -> None:
    lab.hangs = {f"vm{n}": 3600.0 for n in range(2, 8)}
    lab.client.sightings = [sighting(n) for n in range(1, 8)]
    start = asyncio.get_running_loop().time()
    assert await lab.look() == RETRY_EVERY
    assert asyncio.get_running_loop().time() - start == pytest.approx(hypervisors.PATIENCE)
    assert lab.status["heldDomains"] == [f"vm{n}" for n in range(2, 8)]
    assert lab.metric("vmsnapshot_still_held_vms") == 6
    # A VM that comes to be held meanwhile is freed by the next look; those that hang are not tried twice at once.
    lab.client.sightings.append(sighting(9))
    await lab.look()
    assert lab.tries.count("vm9") == 1
    assert lab.tries.count("vm2") == 1
    await lab.hypervisors.close()


async def test_one_that_fails_is_tried_again_and_said(lab: Lab) -> None:
    lab.never = {"vm1": GONE}
    lab.client.sightings = [sighting(1)]
    for _ in range(3):
        assert await lab.look() == RETRY_EVERY
    assert lab.tries == ["vm1"] * 3
    assert lab.status["heldDomains"] == ["vm1"]
    assert "still held by us: vm1" in lab.status["conditions"][0]["message"]
    assert any("VMStillHeld" in e and "its agent does not answer" in e for e in lab.events)
    assert lab.hypervisors.proven()["u"].attempt == 1, "whoever frees it in the end"
    lab.never = {}
    assert await lab.look() == LOOK_EVERY
    assert "heldDomains" not in lab.status


async def test_what_is_not_ours_or_not_readable_is_left_and_said_once(lab: Lab) -> None:
    unreadable = replace(sighting(2), journal=None, problem="version 9, this program knows 1")
    lab.client.sightings = [sighting(1, installation="zzzzzz"), unreadable]
    for _ in range(3):
        assert await lab.look() == LOOK_EVERY
        await asyncio.sleep(1000)
    assert not lab.tries
    message = lab.status["conditions"][0]["message"]
    assert "zzzzzz" in message
    assert "version 9" in message
    assert len([e for e in lab.events if e.startswith("JournalLeft")]) == 2
    assert lab.metric("vmsnapshot_strange_journals") == 2


async def test_journals_and_overlays_of_ours_are_counted(lab: Lab) -> None:
    overlay = {"vda": "file:/pool/overlay"}
    lab.never = {"vm2": GONE}
    lab.client.sightings = [
        sighting(1),
        sighting(2, overlays=overlay),
        sighting(3, installation="zzzzzz", overlays=overlay),
    ]
    await lab.look()
    assert lab.metric("vmsnapshot_journal_vms") == 2
    assert lab.metric("vmsnapshot_overlay_vms") == 1


async def test_it_is_told_whether_hypervisor_and_guardian_answer(lab: Lab) -> None:
    await lab.look()
    assert lab.metric("vmsnapshot_hypervisor_answers") == 1
    assert lab.metric("vmsnapshot_guardian_answers") == 0, "there is none"
    guardian = fakes.FakeGuardian()
    lab.world.guardian = guardian  # type: ignore[assignment]  # a stand-in
    for followed, answers in (({}, 1), ({"test:///host": True}, 1), ({"test:///host": False}, 0), (None, 0)):
        guardian.followed = followed
        await lab.look()
        assert lab.metric("vmsnapshot_guardian_answers") == answers
    lab.client.problems = {"second": "second: connection refused"}
    await lab.look()
    assert lab.metric("vmsnapshot_hypervisor_answers") == 0, "VMs on the second one are not seen"
    assert lab.status["conditions"][0]["message"] == "second: connection refused"
    lab.client.problems = {}
    await lab.look()
    assert lab.metric("vmsnapshot_hypervisor_answers") == 1
    lab.client.error = HypervisorUnreachableError("connection refused")
    await lab.look()
    assert lab.metric("vmsnapshot_hypervisor_answers") == 0


async def test_a_standby_leaves_the_leaders_windows_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, leader=False)
    lab.client.sightings = [sighting(1)]
    for _ in range(16):
        assert await lab.look() == RETRY_EVERY
        await asyncio.sleep(2)
    assert not lab.tries
    await asyncio.sleep(5)
    await lab.look()
    assert lab.tries == ["vm1"], "no window is as long"
    assert not lab.cluster.statuses


async def test_vms_are_freed_while_the_api_server_is_gone(lab: Lab) -> None:
    body = {**BODY, "spec": {"libvirt": {**BODY["spec"]["libvirt"], "credentialsSecretName": "key"}}}  # type: ignore[dict-item]
    await lab.look(body)
    lab.cluster.down = True
    lab.client.sightings = [sighting(1)]
    await lab.look(body)
    assert lab.tries == ["vm1"]
    assert not lab.client.closed


async def test_vms_are_freed_though_the_secret_is_gone(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**BODY, "spec": {"libvirt": {**BODY["spec"]["libvirt"], "credentialsSecretName": "key"}}}  # type: ignore[dict-item]
    await lab.look(body)

    async def secret(_name: str) -> dict[str, str]:
        raise KubeError("it does not exist", reason="SecretNotFound", retryable=True)

    monkeypatch.setattr(lab.cluster, "secret", secret)
    lab.client.sightings = [sighting(1)]
    assert await lab.look(body) == RETRY_EVERY
    assert lab.tries == ["vm1"]
    assert lab.status["conditions"][0]["reason"] == "SecretNotFound"


async def test_what_was_seen_last_stands_while_nobody_answers(lab: Lab) -> None:
    lab.never = {"vm1": GONE}
    lab.client.sightings = [sighting(1)]
    await lab.look()
    seen = {**BODY, "status": lab.status}
    lab.client.error = HypervisorUnreachableError("host: not connected")
    assert await lab.look(seen) == RETRY_EVERY
    assert (lab.status["heldDomains"], lab.status["domains"]) == (["vm1"], 1)
    assert lab.status["conditions"][0]["status"] == "False"


async def test_one_that_changed_hands_since_it_was_listed_is_left_to_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, now = sighting(1), sighting(2)
    lab.client.sightings = [listed]

    async def read_journal(_ref: Ref) -> Journal | None:
        return now.journal

    monkeypatch.setattr(lab.client, "read_journal", read_journal)
    assert await lab.look() == LOOK_EVERY
    assert not lab.tries


@pytest.mark.parametrize("found", ["none", "another", "on overlays"])
async def test_what_a_migration_left_behind_is_swept_once(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """The VM runs elsewhere, held by nobody or by another one: no look frees it again."""
    left = sighting(1)
    lab.client.sightings = [left]
    assert left.journal is not None
    overlaid = replace(left.journal, phase=Phase.OVERLAID, overlays={"v": "/over"})
    there = {"none": None, "another": sighting(2).journal, "on overlays": overlaid}[found]

    async def read_journal(_ref: Ref) -> Journal | None:
        return there

    monkeypatch.setattr(lab.client, "read_journal", read_journal)
    for _ in range(3):
        assert await lab.look() == LOOK_EVERY
    assert lab.client.left == [(left.ref.endpoint, left.journal.nonce)]
    assert not lab.tries
    assert not lab.events
    assert "heldDomains" not in lab.status


async def test_overlays_of_ours_are_named(lab: Lab) -> None:
    held = sighting(1, overlays={"vda": "/overlay"})
    lab.world.claims[held.ref.uuid] = "u"
    lab.client.sightings = [held, sighting(2, installation="zzzzzz", overlays={"vda": "/theirs"})]
    await lab.look()
    assert lab.status["overlayDomains"] == ["vm1"]


async def test_proofs_are_few(lab: Lab) -> None:
    for number in range(hypervisors.MOST_PROVEN + 10):
        lab.hypervisors._prove(sighting(1, owner=f"u{number}").journal, Place("lab", "vm1"))  # type: ignore[arg-type]
    assert len(lab.hypervisors.proven()) == hypervisors.MOST_PROVEN
    assert "u0" not in lab.hypervisors.proven()


async def test_one_that_is_replaced_is_never_taken_for_one_that_is_gone(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lab.look()
    seen: list[bool] = []

    async def close() -> None:
        seen.append(lab.hypervisors.get("lab") is not None)

    monkeypatch.setattr(lab.client, "close", close)
    spec = {"libvirt": {"endpoints": [{"socketPath": "/another"}]}}
    await lab.look({**BODY, "spec": spec})
    await lab.hypervisors.remove("lab")
    assert seen == [True, False]


async def test_a_vm_that_stands_still_on_overlays_is_freed_whoever_needs_them(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the API server does not answer: nobody works on its snapshot then."""
    committed: list[str] = []

    async def collapse(client: fakes.FakeClient, _ref: Any, journal: Journal, *_: object) -> tuple[()]:
        committed.append(journal.nonce)
        client.sightings = []
        return ()

    monkeypatch.setattr(hypervisors.overlays, "collapse", collapse)
    left = replace(sighting(overlays={"v": "/pool/ovl"}, bases={"v": "then"}, phase=Phase.OVERLAID), stalled=True)
    assert left.journal is not None
    owner = left.journal.owner_uid
    lab.world.uids, lab.world.known = lambda: frozenset({owner}), lambda _: True
    lab.client.sightings = [replace(left, stalled=False)]
    await lab.look()
    assert (committed, lab.metric("vmsnapshot_stalled_vms")) == ([], 0)
    lab.client.sightings, lab.cluster.down = [left], True
    await lab.look()
    assert committed == [left.journal.nonce]
    assert any("VMFreed" in e and "standing still" in e for e in lab.events)
    assert not lab.metric("vmsnapshot_swept_vms_total"), "no operator has ended"
    assert lab.metric("vmsnapshot_stalled_vms") == 0


async def test_vms_that_stand_still_are_counted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    async def collapse(*_: object) -> tuple[()]:
        raise HypervisorError("no room", reason="CommitFailed", retryable=True)

    monkeypatch.setattr(hypervisors.overlays, "collapse", collapse)
    lab.client.sightings = [
        replace(sighting(overlays={"v": "/over"}, bases={"v": "then"}, phase=Phase.OVERLAID), stalled=True)
    ]
    kept = OverlayFile(path=f"/pool/{names.overlays_prefix(OURS)}strange", endpoint="host", domain="vm2", stalled=True)
    lab.client.files = (kept,)
    assert await lab.look() == RETRY_EVERY, "it stands still"
    assert lab.metric("vmsnapshot_stalled_vms") == 1
    assert any("OverlayInUse" in e and "no room" in e for e in lab.events)
    await asyncio.sleep(1)
    await lab.look()
    assert lab.metric("vmsnapshot_stalled_vms") == 2, "one whose overlay no journal tells of, too"


async def test_one_that_another_disk_has_paused_is_left_to_its_snapshot(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[str] = []

    async def collapse(_client: Any, _ref: Any, journal: Journal, *_: object) -> tuple[()]:
        committed.append(journal.nonce)
        return ()

    monkeypatch.setattr(hypervisors.overlays, "collapse", collapse)
    left = replace(sighting(overlays={"v": "/pool/ovl"}, bases={"v": "then"}, phase=Phase.OVERLAID), stalled=True)
    lab.client.sightings, lab.client.elsewhere = [left], {left.ref.name}
    for _ in range(2):
        assert await lab.look() == LOOK_EVERY
        assert (committed, lab.events, lab.metric("vmsnapshot_stalled_vms")) == ([], [], 0)
    lab.client.elsewhere = set()
    await lab.look()
    assert len(committed) == 1


async def test_vms_that_stand_still_are_counted_also_where_the_look_comes_to_nothing(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def collapse(*_: object) -> tuple[()]:
        raise HypervisorError("no room", reason="CommitFailed", retryable=True)

    monkeypatch.setattr(hypervisors.overlays, "collapse", collapse)
    body = {**BODY, "spec": {"libvirt": {**BODY["spec"]["libvirt"], "credentialsSecretName": "key"}}}  # type: ignore[dict-item]
    await lab.look(body)

    async def secret(_name: str) -> dict[str, str]:
        raise KubeError("it does not exist", reason="SecretNotFound", retryable=True)

    monkeypatch.setattr(lab.cluster, "secret", secret)
    still = sighting(overlays={"v": "/over"}, bases={"v": "then"}, phase=Phase.OVERLAID)
    for count, sightings in ((1, [replace(still, stalled=True)]), (0, [])):
        lab.client.sightings = sightings
        await lab.look(body)
        assert lab.metric("vmsnapshot_stalled_vms") == count


@pytest.mark.parametrize(("exists", "on_record"), [(True, True), (True, False), (False, True)])
async def test_overlays_of_a_snapshot_whose_content_the_api_server_has_are_not_committed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, exists: bool, on_record: bool
) -> None:
    committed: list[str] = []
    client: Any = lab.client

    async def collapse(_client: Any, _ref: Any, journal: Journal, *_: object) -> tuple[()]:
        committed.append(journal.nonce)
        return ()

    monkeypatch.setattr(hypervisors.overlays, "collapse", collapse)
    left = sighting(overlays={"v": "/pool/ovl"}, phase=Phase.OVERLAID)
    assert left.journal is not None
    journal, world = left.journal, lab.world
    world.uids = lambda: frozenset({journal.owner_uid} if exists else ())
    if on_record:
        lab.cluster.contents_by_name[content_name(journal.owner_uid)] = {}
    if exists and on_record:
        with pytest.raises(HypervisorError, match="on record after all"):
            await lab.hypervisors._release(client, left.ref, journal, world)
    else:
        await lab.hypervisors._release(client, left.ref, journal, world)
    assert bool(committed) is not (exists and on_record)
