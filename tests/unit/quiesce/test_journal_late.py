"""A journal that comes late is not written over that of the one who took over."""

from __future__ import annotations

import pytest

from tests.unit.quiesce.fake_libvirt import FakeDomain, a_journal
from vmsnapshot_operator.core.journal import Journal
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
