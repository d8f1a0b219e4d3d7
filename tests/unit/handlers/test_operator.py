"""Which objects an event has looked at."""

from __future__ import annotations

from typing import Any

from tests.unit.handlers import fakes
from vmsnapshot_operator.api.meta import LABEL_SAFETY_OF, content_name, label_of
from vmsnapshot_operator.handlers.contents import Contents
from vmsnapshot_operator.handlers.operator import RESTORES, SNAPSHOTS, Operator, Options


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
