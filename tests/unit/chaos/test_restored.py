"""What the judge says of VMs that were set back, without one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import restored, rules
from tests.chaos.seen import Allowed, World
from tests.proof import Truth

HELD = Truth({"vda": 7, "vdb": 7}, {"vda": "clean", "vdb": "clean"})


def told(uid: str, reason: str = "", **status: str) -> dict[str, Any]:
    listed = [{"type": t, "status": s, "reason": reason} for t, s in status.items()]
    meta = {"name": f"r-{uid}", "namespace": "team-a", "uid": uid}
    return {"kind": "VMRestore", "metadata": meta, "spec": {}, "status": {"conditions": listed}}


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (HELD, []),
        (Truth({"vda": 7, "vdb": 9}, HELD.fsck), ["the disks hold"]),
        (Truth({"vda": 7}, {"vda": "clean"}), ["the disks hold"]),
        (Truth(HELD.records, {"vda": "clean", "vdb": "exit 4"}), ["its file systems are clean"]),
    ],
)
def test_disks_are_what_the_snapshot_holds(now: Truth, words: list[str]) -> None:
    found = list(restored.unlike(now, HELD))
    assert len(found) == len(words)
    assert all(w in f for w, f in zip(words, found, strict=True))


def test_a_file_that_is_replaced_beneath_a_process_is_seen(tmp_path: Path) -> None:
    disks = [tmp_path / "vda", tmp_path / "vdb"]
    with disks[0].open("w"), disks[1].open("w"):
        paths = [str(d) for d in disks]
        assert restored.unlinked(os.getpid(), paths) == []
        disks[1].unlink()
        disks[1].touch()
        assert restored.unlinked(os.getpid(), paths) == [str(disks[1])]
    assert restored.unlinked(os.getpid(), paths) == []


def test_a_disk_that_was_plugged_in_is_of_no_restore() -> None:
    held = Truth({**HELD.records, "vdx": 0}, {**HELD.fsck, "vdx": "exit 4"})
    assert list(restored.unlike(HELD, held)) == []


@pytest.mark.parametrize(
    ("done", "bodies", "kinds"),
    [
        ("a", [told("a", Ready="True")], []),
        ("b", [told("a", Ready="True"), told("b", Ready="True")], []),
        ("b", [told("a", Ready="True")], ["lied"]),
        (None, [told("a", Ready="True")], ["lied"]),
        ("z", [told("a", "DeadlineExceeded", Stalled="True")], []),
        ("a", [told("a", "NoSpace", Stalled="True")], ["lied"]),
        ("a", [told("a", "AgentSilent", Stalled="True")], []),
        (None, [], []),
    ],
)
def test_the_mark_is_of_one_that_is_ready(done: str | None, bodies: list[dict[str, Any]], kinds: list[str]) -> None:
    assert [f.kind for f in restored.of_marker("domain x", done, bodies)] == kinds


def test_a_restore_that_has_not_ended_is_stuck_unless_it_is_allowed() -> None:
    world = World(
        objects=(
            told("a", "Restoring", Reconciling="True", Ready="False"),
            told("b", Reconciling="False", Ready="True"),
            told("c", "NoSpace", Reconciling="False", Stalled="True", Ready="False"),
        )
    )
    down = Allowed(operator_down=True)
    assert [(f.kind, f.subject) for f in rules.findings(world, down)] == [("stuck", "VMRestore team-a/r-a")]
    allowed = Allowed(operator_down=True, under_way=frozenset({"team-a/r-a"}))
    assert rules.findings(world, allowed) == []
