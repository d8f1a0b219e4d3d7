"""A domain as libvirt shows it, without libvirt: its state, its metadata, its frozen file systems; and a hypervisor that has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import libvirt

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.hypervisors.calls import Calls
from vmsnapshot_operator.hypervisors.domains import Ref
from vmsnapshot_operator.hypervisors.events import EventWatch
from vmsnapshot_operator.hypervisors.window import DomainWindow, Handles, Outstanding

REF = Ref(uuid="00000000-0000-0000-0000-000000000001", name="demo", endpoint="host")


def a_journal(number: int = 1, method: str = "GuestAgent") -> Journal:
    """A journal of an attempt of this number."""
    return Journal(
        installation="abc123", owner_uid="u", nonce=f"{number:032x}", attempt=number, method=method, budget=30.0
    )


@dataclass
class FakeDomain:
    """`before`: called in the thread of a call, by its name, before it is carried out."""

    power: int = libvirt.VIR_DOMAIN_RUNNING
    reason: int = libvirt.VIR_DOMAIN_RUNNING_BOOTED
    journal: Journal | None = None
    filesystems: int = 2
    frozen: int = 0
    calls: list[str] = field(default_factory=list)
    before: dict[str, Callable[[], None]] = field(default_factory=dict)

    def _carry_out(self, what: str) -> None:
        if (first := self.before.pop(what, None)) is not None:
            first()
        self.calls.append(what)

    def paused(self, reason: int = libvirt.VIR_DOMAIN_PAUSED_USER) -> None:
        """Pause it, as somebody else."""
        self.power, self.reason = libvirt.VIR_DOMAIN_PAUSED, reason

    def name(self) -> str:
        return REF.name

    def connect(self) -> object:
        return self

    def isActive(self) -> int:  # noqa: N802 - libvirt's name
        return 1

    def isPersistent(self) -> int:  # noqa: N802 - libvirt's name
        return 0

    def state(self) -> list[int]:
        return [self.power, self.reason]

    def metadata(self, *_: object) -> str:
        if self.journal is None:
            raise error(libvirt.VIR_ERR_NO_DOMAIN_METADATA)
        return journals.to_xml(self.journal)

    def setMetadata(self, _kind: int, text: str | None, *_: object) -> None:  # noqa: N802 - libvirt's name
        self._carry_out("setMetadata")
        self.journal = journals.from_xml(text) if text is not None else None

    def agentSetResponseTimeout(self, *_: object) -> None:  # noqa: N802 - libvirt's name
        return

    def fsFreeze(self, *_: object) -> int:  # noqa: N802 - libvirt's name
        self._carry_out("freeze")
        self.frozen = self.filesystems
        return self.frozen

    def fsThaw(self, *_: object) -> int:  # noqa: N802 - libvirt's name
        self._carry_out("thaw")
        thawed, self.frozen = self.frozen, 0
        return thawed

    def suspend(self) -> None:
        self._carry_out("suspend")
        self.paused()

    def resume(self) -> None:
        self._carry_out("resume")
        self.power, self.reason = libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED


def error(code: int) -> libvirt.libvirtError:
    """libvirt's error with this code."""
    made = libvirt.libvirtError("fake")
    made.err = (code, 0, "fake", 0, None, None, None, 0, 0)
    return made


class FakeHypervisor:
    """One domain, found at once."""

    def __init__(self, domain: FakeDomain) -> None:
        self.domain = domain
        self.outstanding = Outstanding()
        self._calls = Calls("host")
        self._freezes = asyncio.Semaphore(10)

    async def window(self, ref: Ref) -> DomainWindow:
        async def look_up(_: DomainWindow) -> Handles:
            return Handles(self.domain, self.domain, self._calls, self._freezes, active=True)

        made = DomainWindow(ref.name, ref.uuid, self.outstanding, look_up)
        await made.open()
        return made

    @contextmanager
    def events(self, ref: Ref) -> Iterator[EventWatch]:
        yield EventWatch(ref.uuid, ref.endpoint)


def as_any(fake: object) -> Any:
    """Hand a stand-in on as what it stands in for."""
    return fake
