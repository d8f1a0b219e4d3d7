"""The laboratory: a real control plane, hypervisor, storage systems and guests, shared by demo, tests and benchmarks."""

from tests.lab.control import Component
from tests.lab.definition import GuestDisk
from tests.lab.errors import LabError
from tests.lab.guests import Guest
from tests.lab.lab import Lab

__all__ = ["Component", "Guest", "GuestDisk", "Lab", "LabError"]
