"""Which objects an event has looked at."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.handlers import fakes
from vmsnapshot_operator.api.meta import FINALIZER, LABEL_SAFETY_OF, content_name, label_of
from vmsnapshot_operator.errors import KubeUnavailableError
from vmsnapshot_operator.handlers.contents import Contents
from vmsnapshot_operator.handlers.operator import CLASSES, CONTENTS, HYPERVISORS, RESTORES, SNAPSHOTS, Operator, Options
from vmsnapshot_operator.handlers.queue import RESYNC_SECONDS


def event(name: str, namespace: str = "team-a", **labels: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": labels}
    meta["creationTimestamp"] = "2026-01-01T12:00:00Z"
    return {"type": "MODIFIED", "object": {"metadata": meta}}


def test_a_restore_is_looked_at_when_its_safety_snapshot_changes(monkeypatch: Any) -> None:
    operator = Operator(Options(namespace="ns"))
    long = "r" * 62 + "-0123456789"
    for name in ("back", "other", long):
        operator.seen(RESTORES, event(name))
    operator.seen(RESTORES, event("back", "team-b"))
    looked: list[tuple[str, str, str]] = []
    monkeypatch.setattr(operator, "_add", lambda key: looked.append((key.kind, key.namespace, key.name)))
    operator.seen(SNAPSHOTS, event("s", **{LABEL_SAFETY_OF: "back"}))
    assert looked == [(RESTORES, "team-a", "back"), (SNAPSHOTS, "team-a", "s")]
    looked.clear()
    operator.seen(SNAPSHOTS, event("s", **{LABEL_SAFETY_OF: label_of(long)}))
    assert (RESTORES, "team-a", long) in looked
    assert len(label_of(long)) <= 63
    assert not label_of(long).endswith("-"), "a label ends with a letter or a digit"
    looked.clear()
    operator.seen(SNAPSHOTS, event("plain"))
    assert looked == [(SNAPSHOTS, "team-a", "plain")]


def test_a_snapshot_whose_content_is_lost_is_not_known_so_that_its_overlays_are_committed() -> None:
    operator = Operator(Options(namespace="ns"))
    operator.seen(SNAPSHOTS, event("s"))
    operator._contents = contents = Contents(
        fakes.world(installation="abc123"), exists=lambda _: True, wake=lambda _: None
    )
    assert not operator._is_known("uid-s")
    contents._known[content_name("uid-s")] = None  # type: ignore[assignment]  # its name alone counts
    assert operator._is_known("uid-s")
    assert not operator._is_known("uid-other")


def test_a_restore_that_was_begun_is_told_to_the_scan_for_orphans() -> None:
    operator = Operator(Options(namespace="ns"))
    begun = event("r")
    begun["object"]["metadata"]["finalizers"] = [FINALIZER]
    operator.seen(RESTORES, begun)
    operator.seen(RESTORES, event("waiting"))
    assert operator._known().restores == {"uid-r"}
    operator.seen(RESTORES, event("r"))
    assert not operator._known().restores, "it has come to its end"


class Listing:
    """A cluster whose objects are these; `told` is what a watch tells while it is asked."""

    def __init__(self, *there: str) -> None:
        self.there, self.down, self.asked = frozenset(there), True, 0
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.operator: Operator | None = None

    async def uids(self) -> frozenset[str]:
        self.asked += 1
        if self.down:
            raise KubeUnavailableError("the API server does not answer")
        assert self.operator is not None
        for kind, each in self.told:
            self.operator.seen(kind, each)
        return self.there


@pytest.mark.looptime
async def test_a_deletion_that_the_watch_has_missed_is_learnt(monkeypatch: Any) -> None:
    operator = Operator(Options(namespace="ns"))
    kinds = (SNAPSHOTS, RESTORES, CLASSES, HYPERVISORS)
    for kind in kinds:
        for name in ("gone", "there", "again"):
            operator.seen(kind, event(f"{name}-{kind}"))
    cluster = Listing(*(f"uid-there-{kind}" for kind in kinds), *(f"new-{kind}" for kind in kinds))
    cluster.operator = operator
    for kind in kinds:
        anew = event(f"again-{kind}")
        anew["object"]["metadata"]["uid"] = f"new-{kind}"
        cluster.told += [(kind, anew), (kind, event(f"made-meanwhile-{kind}"))]
    looked: set[tuple[str, str]] = set()
    monkeypatch.setattr(operator, "_add", lambda key: looked.add((key.kind, key.name)))
    task = asyncio.create_task(operator._list_again(cluster))  # type: ignore[arg-type]  # a stand-in
    await asyncio.sleep(RESYNC_SECONDS + 1)
    assert cluster.asked == 1
    assert len(operator._watched()) == 12, "nobody is forgotten while nobody can be asked"
    cluster.down = False
    looked.clear()
    await asyncio.sleep(RESYNC_SECONDS)
    task.cancel()
    for kind in kinds:
        left = {k.uid for k in operator._watched() if k.kind == kind}
        assert left == {f"uid-there-{kind}", f"new-{kind}", f"uid-made-meanwhile-{kind}"}
        assert (kind, f"gone-{kind}") in looked, "what it leaves is seen to"
    assert (CONTENTS, content_name(f"uid-gone-{SNAPSHOTS}")) in looked
    assert not operator._is_known(f"uid-gone-{SNAPSHOTS}")
    assert set(operator._unfinished._known) == {
        f"uid-there-{SNAPSHOTS}",
        f"new-{SNAPSHOTS}",
        f"uid-made-meanwhile-{SNAPSHOTS}",
    }
