"""Bringing a VM back onto its own disks that stands still, or whose storage refuses the commit; the rest is seen on real parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from tests.unit.plan.test_collapse import BEGUN, OFF, seen
from vmsnapshot_operator.core.chains import BlockJob, Move, Overlaid
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.planning import OverlaySettings
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.strategies import overlays

pytestmark = pytest.mark.looptime

REF = Ref(uuid="u", name="vm", endpoint="host")
LIMITED = OverlaySettings(pool="over", min_free_bytes=1, bandwidth=1 << 20)


class Client:
    """A hypervisor that shows these looks one after the other, the last one for ever, and notes what is done."""

    def __init__(self, *looks: Overlaid) -> None:
        self.looks, self.done = list(looks), list[object]()

    def overlays(self, _ref: Ref) -> Client:
        return self

    async def look(self, _overlays: object) -> Overlaid:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    async def commit(self, target: str, _overlay: str, bandwidth: int) -> None:
        self.done.append(("commit", target, bandwidth))

    async def unlimit(self, target: str) -> None:
        self.done.append(("unlimit", target))

    async def pivot(self, target: str) -> None:
        self.done.append(("pivot", target))

    async def resume(self) -> None:
        self.done.append("resume")

    async def remove_path(self, _path: str) -> None:
        self.done.append("remove")

    async def read_journal(self, _ref: Ref) -> Journal | None:
        return BEGUN

    async def update_journal(self, _ref: Ref, _journal: Journal) -> bool:
        return True

    async def clear_journal(self, _ref: Ref, _nonce: str) -> None:
        self.done.append("clear")

    async def collapse(self, settings: OverlaySettings | None = LIMITED) -> Sequence[Move]:
        client = cast("Hypervisor", self)
        rulings = await overlays.collapse(client, REF, BEGUN, settings, lambda _: None)
        return [r.move for r in rulings]


def still(**more: Any) -> Overlaid:
    return seen(power=PowerState.PAUSED, stalled=True, **more)


async def test_a_vm_that_stands_still_is_brought_back_without_a_limit_and_goes_on_before_all_else() -> None:
    committing, ready = BlockJob(commit=True), BlockJob(commit=True, ready=True)
    left = still(chain=OFF)
    client = Client(seen(), seen(job=committing), still(job=committing), still(job=ready), left, seen(OFF), GONE)
    assert await client.collapse() == [Move.GONE]
    assert client.done == [
        ("commit", "vda", 1 << 20),
        ("unlimit", "vda"),
        ("pivot", "vda"),
        "resume",
        "remove",
        "remove",
        "clear",
    ]


async def test_a_commit_that_begins_while_the_vm_stands_still_has_no_limit() -> None:
    client = Client(still(), still(job=BlockJob(commit=True, ready=True)), seen(OFF), GONE)
    await client.collapse()
    assert client.done[0] == ("commit", "vda", 0)


async def test_a_sweep_lifts_the_limit_of_what_another_one_began() -> None:
    """It knows of no limit itself."""
    committing = still(job=BlockJob(commit=True))
    client = Client(committing, committing, still(job=BlockJob(commit=True, ready=True)), still(chain=OFF), GONE)
    await client.collapse(None)
    assert client.done == [("unlimit", "vda"), ("pivot", "vda"), "resume", "remove", "clear"]


async def test_a_vm_that_a_person_has_paused_meanwhile_stays_so() -> None:
    paused = seen(OFF, power=PowerState.PAUSED)
    client = Client(still(job=BlockJob(commit=True, ready=True)), replace(paused, missing=frozenset({"v"})))
    await client.collapse()
    assert client.done == [("pivot", "vda"), "clear"]


async def test_a_commit_that_fails_again_and_again_is_told() -> None:
    client = Client(still())
    with pytest.raises(HypervisorError, match="commit of disk vda of vm ends again and again") as caught:
        await client.collapse()
    assert (caught.value.reason, caught.value.retryable) == ("CommitFailed", True)
    assert client.done == [("commit", "vda", 0)] * overlays.MOST_COMMITS


GONE = replace(seen(OFF), missing=frozenset({"v"}))
