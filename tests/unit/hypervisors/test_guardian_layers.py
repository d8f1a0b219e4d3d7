"""Which guardians are said to be there: only one that answered, and only if it reaches the hypervisor."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from vmsnapshot_operator.api.hypervisor import GuardianLayer
from vmsnapshot_operator.hypervisors.guardian_link import layers

ONE, TWO = "qemu+tls://one/system", "qemu+tls://two/system"


@pytest.mark.parametrize(
    ("followed", "there"),
    [
        (None, False),
        ({}, True),
        ({ONE: True, TWO: True}, True),
        ({ONE: True}, True),
        ({ONE: True, TWO: False}, False),
        ({"qemu+tls://another/system": False}, True),
    ],
)
def test_layers(followed: Mapping[str, bool] | None, there: bool) -> None:
    assert layers(followed, (ONE, TWO)) == ((GuardianLayer.SIDECAR,) if there else ())
