"""What guests answer that are not like the demo's: Windows, a part of the file systems, hooks and kernels that refuse.

No Windows runs here: an agent in a Linux guest answers as qemu-ga on Windows does, and freezes what it says it freezes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import proof
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import TENANT, Stack, conditions, until

TWO = {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="rbd")}
REQUIRE = {"policy": "Require"}
LAPSED = "limited up to 10 seconds"


@pytest.fixture(scope="module")
def windows(lab: Lab, stack: Stack) -> Iterator[Guest]:
    """A guest over two storage systems whose agent answers as on Windows."""
    guest = lab.guest("demo-windows", TWO, memory_mib=96, append="agent=windows")
    yield guest
    guest.remove()


@pytest.fixture
def snapshot(stack: Stack, fresh: Callable[[str], str]) -> Iterator[Callable[..., str]]:
    """Create VMSnapshots of any guest; they are deleted at the end of the test."""
    made: list[str] = []

    def create(guest: Guest, **spec: object) -> str:
        made.append(stack.snapshot(fresh("guest"), guest.name, **spec))
        return made[-1]

    yield create
    for name in made:
        stack.delete(name, namespace=TENANT)


@contextmanager
def told(guest: Guest, file: str, text: str = "") -> Iterator[None]:
    """The agent or the hook in the guest reads this file."""
    guest.control(["sh", "-c", f'echo "{text}" > {file}'])
    try:
        yield
    finally:
        guest.control(["rm", "-f", file])


def _claims(body: dict[str, Any]) -> dict[str, str]:
    return {v["target"]: v["consistency"] for v in body["status"]["volumes"]}


def _proof(lab: Lab, stack: Stack, name: str, into: Path) -> proof.Truth:
    content = stack.content(name)
    assert content is not None
    return proof.read(lab, content, into)


# --- Windows --------------------------------------------------------------------------------------------------------------


def test_windows_is_held_for_eight_seconds_at_most(
    lab: Lab, stack: Stack, windows: Guest, snapshot: Callable[..., str], tmp_path: Path
) -> None:
    name = snapshot(windows, quiesce=REQUIRE)
    status = stack.wait(name)["status"]
    assert status["quiesce"]["budgetSeconds"] == 8
    assert status["consistency"] == "Filesystem"
    found = _proof(lab, stack, name, tmp_path)
    assert found.one_instant, found.records
    assert found.clean, found.fsck


def test_writes_that_windows_let_go_by_itself_are_not_claimed(
    stack: Stack, windows: Guest, snapshot: Callable[..., str]
) -> None:
    """VSS lets the writes go when its time is up, and the agent says `frozen` all the same: only the thaw's error tells."""
    with told(windows, "/run/vss-limit", "1"):
        body = stack.wait(snapshot(windows))
    assert set(_claims(body).values()) == {"PerVolume"}
    assert all(LAPSED in v["consistencyReason"] for v in body["status"]["volumes"]), body["status"]["volumes"]
    until("the guest is thawed", lambda: windows.freeze_status() == "thawed")


def test_writes_that_windows_let_go_by_itself_are_too_little_for_require(
    stack: Stack, windows: Guest, snapshot: Callable[..., str]
) -> None:
    with told(windows, "/run/vss-limit", "1"):
        body = stack.wait(snapshot(windows, quiesce=REQUIRE), "Stalled")
    assert LAPSED in conditions(body)["Stalled"]["message"]
    until("the guest is thawed", lambda: windows.freeze_status() == "thawed")


def test_windows_that_ends_its_shadow_copy_slowly_is_believed(
    lab: Lab, stack: Stack, windows: Guest, snapshot: Callable[..., str], tmp_path: Path
) -> None:
    with told(windows, "/run/vss-slow", "7000"):
        name = snapshot(windows, quiesce=REQUIRE)
        assert stack.wait(name)["status"]["consistency"] == "Filesystem"
    assert _proof(lab, stack, name, tmp_path).one_instant


# --- refusals of the guest ------------------------------------------------------------------------------------------------


def test_what_the_guest_says_when_it_refuses_is_told(
    stack: Stack, windows: Guest, snapshot: Callable[..., str]
) -> None:
    """As SELinux makes the agent say where a mounted directory may not be opened (harvester#6497)."""
    words = "failed to open /.snapshots: Permission denied"
    with told(windows, "/run/vss-refuse", words):
        found = conditions(stack.wait(snapshot(windows, quiesce=REQUIRE), "Stalled"))
        assert (found["Stalled"]["reason"], words in found["Stalled"]["message"]) == ("FreezeFailed", True), found
        prefer = stack.wait(snapshot(windows))["status"]
    assert (prefer["consistency"], prefer["quiesce"]["method"]) == ("Crash", "Pause")
    assert words in prefer["quiesce"]["reason"]


def test_a_hook_that_fails_at_the_thaw_leaves_nothing_frozen_and_claims_less(
    stack: Stack, lab: Lab, snapshot: Callable[..., str]
) -> None:
    demo = lab.guest("demo")
    demo.fail_hook(when="thaw")
    try:
        body = stack.wait(snapshot(demo))
        assert demo.freeze_status() == "thawed"
    finally:
        demo.fail_hook(fail=False, when="thaw")
    assert set(_claims(body).values()) == {"PerVolume"}
    assert all("thaw ended with an error" in v["consistencyReason"] for v in body["status"]["volumes"])


# --- a part of the file systems -------------------------------------------------------------------------------------------


def test_only_what_was_frozen_is_claimed(lab: Lab, stack: Stack, snapshot: Callable[..., str], tmp_path: Path) -> None:
    name = snapshot(lab.guest("demo"), quiesce={"mountpoints": ["/mnt/vda"]})
    body = stack.wait(name)
    assert _claims(body) == {"vda": "Filesystem", "vdb": "PerVolume", "vdc": "PerVolume"}
    assert body["status"]["consistency"] == "PerVolume"
    assert _proof(lab, stack, name, tmp_path).fsck["vda"] == proof.CLEAN


def test_require_accepts_no_part(stack: Stack, lab: Lab, snapshot: Callable[..., str]) -> None:
    name = snapshot(lab.guest("demo"), quiesce={"policy": "Require", "mountpoints": ["/mnt/vda"]})
    found = conditions(stack.wait(name, "Stalled"))
    assert found["Planned"]["status"] == "False"
    assert all(t in found["Planned"]["message"] for t in ("vdb", "vdc"))
    assert stack.content(name) is None


def test_a_mountpoint_that_the_guest_has_not_is_refused_with_those_it_has(
    stack: Stack, lab: Lab, snapshot: Callable[..., str]
) -> None:
    found = conditions(stack.wait(snapshot(lab.guest("demo"), quiesce={"mountpoints": ["/srv"]}), "Stalled"))
    assert found["Planned"]["reason"] == "MountpointNotFound"
    assert "/mnt/vdc" in found["Planned"]["message"]
