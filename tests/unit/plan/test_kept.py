"""Overlays that no journal tells of: told as long as they are there, removed only if nobody can miss them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.plan import kept
from vmsnapshot_operator.plan.kept import Kept, Seen

OURS, UID = "abcdef", "0b6f7d1e-0000-4000-8000-000000000001"
PATH = "/pool/" + names.overlay_name(OURS, UID, 1, VolumeId("v"))
RUBBISH = OverlayFile(path=PATH, endpoint="one", pristine=True, genuine=True)
WRITTEN = OverlayFile(path=PATH, endpoint="one")
USED = OverlayFile(path=PATH, endpoint="one", domain="demo")


def judge(*files: OverlayFile, **facts: Any) -> tuple[Kept, ...]:
    return kept.judge(Seen(installation=OURS, files=files, **facts))


def test_what_nobody_can_miss_is_removed() -> None:
    (found,) = judge(RUBBISH)
    assert found.removable


@pytest.mark.parametrize(
    ("file", "facts", "why"),
    [
        (USED, {}, "VM demo has it among its disks"),
        (replace(USED, pristine=True, genuine=True), {}, "VM demo has it among its disks"),
        (USED, {"owners": frozenset({UID})}, "VM demo has it among its disks"),
        (WRITTEN, {}, "in this file alone"),
        (WRITTEN, {"owners": frozenset({UID})}, "in this file alone"),
        (replace(RUBBISH, genuine=False), {}, "somebody else made it"),
        (replace(RUBBISH, path=f"/pool/ovl-{OURS}-mine"), {}, "somebody else made it"),
        (RUBBISH, {"silent": {"two": "two does not answer"}}, "is not known: two does not answer"),
    ],
)
def test_what_somebody_may_miss_is_told_and_left(file: OverlayFile, facts: dict[str, Any], why: str) -> None:
    (found,) = judge(file, **facts)
    assert not found.removable
    assert why in found.why


@pytest.mark.parametrize("file", [RUBBISH, WRITTEN, USED])
def test_what_a_journal_tells_of_is_nobodys_business_here(file: OverlayFile) -> None:
    assert judge(file, journaled=frozenset({PATH})) == ()


def test_what_is_made_for_a_snapshot_that_exists_is_its_own_business() -> None:
    assert judge(RUBBISH, owners=frozenset({UID})) == ()
    assert judge(RUBBISH, owners=frozenset({"another"})) != ()


def test_one_that_a_vm_of_any_endpoint_has_is_never_removed() -> None:
    found = judge(RUBBISH, replace(USED, endpoint="two"))
    assert [(k.file.endpoint, k.removable) for k in found] == [("two", False)]
