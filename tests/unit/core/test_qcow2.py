"""What this program writes into a new overlay is known again, and nothing else is taken for it."""

from __future__ import annotations

import pytest

from vmsnapshot_operator.core import qcow2

RBD = 'json:{"driver":"raw","file":{"driver":"rbd","pool":"vms","image":"a"}}'


@pytest.mark.parametrize("size", [512, 64 << 20, 3 << 40])
@pytest.mark.parametrize(("backing", "form"), [("/pool/a", "raw"), ("/pool/a b", "qcow2"), (RBD, "raw")])
def test_a_new_overlay_is_known_again(size: int, backing: str, form: str) -> None:
    made = qcow2.overlay(size, backing, form)
    assert qcow2.is_new_overlay(made)
    assert len(made) == qcow2.empty_length(size)


def test_what_was_changed_in_any_way_is_not_new() -> None:
    made = qcow2.overlay(64 << 20, "/pool/a", "raw")
    for place in (0, 7, 70, 105, 120, qcow2.CLUSTER, 3 * qcow2.CLUSTER, len(made) - 1):
        changed = bytearray(made)
        changed[place] ^= 1
        assert not qcow2.is_new_overlay(bytes(changed)), place
    assert not qcow2.is_new_overlay(made + bytes(1))
    assert not qcow2.is_new_overlay(made[:-1])


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", bytes(qcow2.CLUSTER), b"\xff" * 4 * qcow2.CLUSTER])
def test_what_is_none_is_none(content: bytes) -> None:
    assert not qcow2.is_new_overlay(content)
