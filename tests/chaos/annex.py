"""What some faults need in addition: a second host, six more guests, a guest with two images, another installation.

Each is started when it is first asked for and ends with the injection. Not what is done with them (`faults`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

from tests.lab import Lab, LabError
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.lab.hypervisor import Host
from tests.stack import Stack, until

SIX = 6
_SMALL = {"vda": GuestDisk(kind="file", size_mib=16)}
_PAIR = {
    "vda": GuestDisk(kind="file", size_mib=16),
    "vdb": GuestDisk(kind="rbd", size_mib=16),
    "vdc": GuestDisk(kind="rbd", size_mib=16),
}


@dataclass(slots=True)
class Annex:
    """Owns what it started. `stack` is the operator under test."""

    lab: Lab
    stack: Stack
    _guests: dict[str, Guest] = field(default_factory=dict)
    _other: Stack | None = None

    def second_host(self) -> Host:
        """A second host, in the Hypervisor's pool of endpoints."""
        host = self.lab.second_host()
        self.stack.spread(self.lab.hosts)
        return host

    def one_host(self, *guests: Guest) -> None:
        """Bring guests home, and the pool back to one host; the second one ends. Does nothing if there is none."""
        if self.lab.hosts == (self.lab.host,):
            return
        for guest in guests:
            self.bring_home(guest)
        self.stack.spread((self.lab.host,))
        self.lab.end_second_host()

    def bring_home(self, guest: Guest) -> None:
        """Migrate a guest back to the first host, if it is not there; what is under way in its domain may delay it."""

        def home() -> bool:
            if guest.host != self.lab.host:
                with suppress(LabError):
                    guest.migrate(self.lab.host)
            return guest.host == self.lab.host

        until(f"guest {guest.name} is back on {self.lab.host.name}", home)

    def six(self) -> list[Guest]:
        """Six small guests without a writer."""
        return [self._guest(f"demo-hung-{n}", _SMALL, writer=False) for n in range(SIX)]

    def pair(self) -> Guest:
        """A guest with two images on Ceph, which are cut as a group."""
        return self._guest("demo-pair", _PAIR, writer=True)

    def other(self) -> Stack:
        """Another installation: a control plane, an operator and a guardian of its own, on the same hypervisor and the same Ceph."""
        if self._other is None:
            other = Stack(self.lab.second_cluster(), self.lab.state / "other")
            other.__enter__()
            self._other = other
        return self._other

    def close(self) -> None:
        """End all of it."""
        if self._other is not None:
            self._other.stop()
            self._other = None
            self.lab.end_second_cluster()
        for guest in self._guests.values():
            guest.remove()
        self._guests.clear()

    def _guest(self, name: str, disks: dict[str, GuestDisk], *, writer: bool) -> Guest:
        if name not in self._guests:
            self._guests[name] = self.lab.guest(name, disks, writer=writer, memory_mib=96)
        return self._guests[name]
