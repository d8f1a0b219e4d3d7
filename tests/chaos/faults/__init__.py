"""What can go wrong, as data: how it is done to the real parts, and how it is mended.

A fault strikes while the operator stands before or after a step, or a moment after it was let go on. `heal` is always called, and
leaves the laboratory as a new fault expects it; the operator runs again afterwards.
"""

from __future__ import annotations

from tests.chaos.faults import api, guest, neighbours, operator, storage
from tests.chaos.faults.base import At, Fault, NoEffectError, Scene

__all__ = ["FAULTS", "At", "Fault", "NoEffectError", "Scene"]

FAULTS: tuple[Fault, ...] = (*operator.FAULTS, *api.FAULTS, *guest.FAULTS, *storage.FAULTS, *neighbours.FAULTS)
"""Every kind of fault. Where a fault is met, the step says."""
