"""Which strategies are installed, and which one serves a snapshot. Not what a strategy does."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import entry_points

from vmsnapshot_operator.core.effects import Record, SnapshotStrategy
from vmsnapshot_operator.core.planning import Request
from vmsnapshot_operator.strategies.world import World

log = logging.getLogger(__name__)

ENTRY_POINTS = "vmsnapshot_operator.strategies"
AUTO, DEFAULT = "Auto", "Storage"


def load(world: World) -> Mapping[str, SnapshotStrategy]:
    """Make every installed strategy; one that does not load is logged and left out: it is refused where it is asked for."""
    found: dict[str, SnapshotStrategy] = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            found[point.name] = point.load()(world)
        except Exception:  # importing foreign code may raise anything
            log.exception("strategy %s (%s) does not load", point.name, point.value)
    return found


def choose(strategies: Mapping[str, SnapshotStrategy], request: Request, record: Record | None) -> SnapshotStrategy:
    """Return the strategy of a snapshot: the one that began it, else the one asked for.

    A name that is not installed goes to the default, which refuses it when planning.
    """
    begun = record.plan.strategy if record is not None and not record.problem else ""
    asked = begun or (DEFAULT if request.strategy == AUTO else request.strategy)
    return strategies.get(asked, strategies[DEFAULT])
