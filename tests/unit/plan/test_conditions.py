"""What the conditions of a failed VMSnapshot say of its VM: nothing that nobody has seen."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.unit.plan import builders as b
from vmsnapshot_operator.core.effects import Condition, Failure, Observation, Record
from vmsnapshot_operator.core.evidence import Evidence, WindowOutcome
from vmsnapshot_operator.core.planning import Method
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.plan import conditions

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAILURE = Failure(reason="CutFailed", message="the array said no")


def told(outcome: WindowOutcome | None) -> dict[str, Condition]:
    """The conditions of a snapshot that failed with this outcome on record."""
    record = Record(name="c", attempt=1, plan=b.plan(), groups={}, outcome=outcome, failure=FAILURE)
    found = conditions.failed(Observation(request=b.request(), record=record), record, FAILURE)
    return {c.type: c for c in found}


def window(method: str, *, asked: bool, stood: bool, **facts: object) -> WindowOutcome:
    evidence = Evidence(
        method=method, frozen_time=NOW if asked else None, still_from=Seconds(1.0) if stood else None, frozen=3
    )
    return replace(WindowOutcome(attempt=1, evidence=evidence, free=True, message="said so"), **facts)  # type: ignore[arg-type]  # fields of it


@pytest.mark.parametrize(
    ("method", "yes", "no"),
    [
        (Method.GUEST_AGENT, "Frozen", "FreezeFailed"),
        (Method.HYPERVISOR_SNAPSHOT, "Switched", "SwitchFailed"),
        (Method.PAUSE, "Paused", "PauseFailed"),
        ("Sorcery", "Held", "NotStill"),
    ],
)
def test_quiesced_says_what_the_vm_did(method: str, yes: str, no: str) -> None:
    stood = told(window(method, asked=True, stood=True))["Quiesced"]
    assert (stood.status, stood.reason) == (True, yes)
    failed = told(window(method, asked=True, stood=False))["Quiesced"]
    assert (failed.status, failed.reason, failed.message) == (False, no, "said so")
    never = told(window(method, asked=False, stood=False))["Quiesced"]
    assert (never.status, never.reason) == (False, "NotStarted")


def test_a_freeze_that_failed_around_a_switch_is_called_so() -> None:
    failed = window(Method.HYPERVISOR_SNAPSHOT, asked=True, stood=False, reason="FreezeFailed")
    assert told(failed)["Quiesced"].reason == "FreezeFailed"


def test_the_vm_is_called_free_only_if_somebody_said_so() -> None:
    free = told(window(Method.GUEST_AGENT, asked=True, stood=True))["Unquiesced"]
    assert (free.status, free.reason) == (True, "Free")
    unknown = told(window(Method.GUEST_AGENT, asked=True, stood=True, free=False))["Unquiesced"]
    assert (unknown.status, unknown.reason) == (None, "FreeUnknown")
    nothing = told(None)["Unquiesced"]
    assert nothing.status is True
    assert "confirmed" not in nothing.message
