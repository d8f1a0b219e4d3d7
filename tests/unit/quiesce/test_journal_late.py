"""A journal that comes late is not written over that of the one who took over."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.quiesce.fake_libvirt import FakeDomain, a_journal
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.errors import NotPermittedError
from vmsnapshot_operator.hypervisors import journals

OURS, THEIRS = a_journal(1), a_journal(2)


def test_one_who_was_stopped_after_looking_writes_nothing() -> None:
    domain = FakeDomain()

    def permit() -> str:
        domain.journal = THEIRS  # written since we looked
        return "another instance may have taken over"

    with pytest.raises(NotPermittedError, match="was not written"):
        journals.write(domain, OURS, permit)
    assert domain.journal == THEIRS


def test_one_who_may_writes_it() -> None:
    domain = FakeDomain()
    journals.write(domain, OURS, lambda: "")
    assert domain.journal == OURS


@pytest.mark.parametrize(("there", "told"), [(THEIRS, THEIRS), (OURS, None), (None, None)])
def test_only_another_ones_journal_is_told(there: Journal | None, told: Journal | None) -> None:
    assert journals.another(FakeDomain(journal=there), OURS.nonce) == told


def test_what_was_written_down_since_is_not_lost_by_a_slow_one_that_freed() -> None:
    held = replace(OURS, method="HypervisorSnapshot", overlays={"v": "/pool/ovl"})
    overlaid = replace(held, phase=Phase.OVERLAID)
    known = replace(overlaid, bases={"v": "1/2"}, begun=("v",), phase=Phase.COLLAPSING)
    domain = FakeDomain(journal=known)
    assert journals.update(domain, overlaid, held=True), "it is there"
    assert domain.journal == known
    domain.journal = held
    assert journals.update(domain, overlaid, held=True)
    assert domain.journal == overlaid
