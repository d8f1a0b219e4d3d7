"""Unit tests: the same examples each time, and no deadline by the clock of a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", derandomize=True, deadline=None, database=None)
settings.load_profile("steady")
