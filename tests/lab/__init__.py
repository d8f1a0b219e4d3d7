"""The laboratory: a real control plane, hypervisor, storage systems and guests, shared by demo, tests and benchmarks."""

from tests.lab.errors import LabError
from tests.lab.lab import Lab

__all__ = ["Lab", "LabError"]
