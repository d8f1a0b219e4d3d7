"""Who shut a domain down: libvirt's state does not tell a guest that powered off from a QEMU that was ended, its events do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import libvirt
import pytest

from vmsnapshot_operator.hypervisors import events
from vmsnapshot_operator.hypervisors.events import EventHub

VM, OTHER = "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000", "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0001"
SHUTDOWN, STOPPED, STARTED = (
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN,
    libvirt.VIR_DOMAIN_EVENT_STOPPED,
    libvirt.VIR_DOMAIN_EVENT_STARTED,
)
BY_GUEST = (SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST)
BY_HOST = (SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST)
BY_NOBODY_KNOWS = (SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_FINISHED)
OFF = (STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
ON = (STARTED, libvirt.VIR_DOMAIN_EVENT_STARTED_BOOTED)
ON_AGAIN = (libvirt.VIR_DOMAIN_EVENT_RESUMED, libvirt.VIR_DOMAIN_EVENT_RESUMED_UNPAUSED)
DEFINED = (libvirt.VIR_DOMAIN_EVENT_DEFINED, libvirt.VIR_DOMAIN_EVENT_DEFINED_UPDATED)


class Host:
    """A connection that has nothing but events."""

    def __init__(self, hub: EventHub, endpoint: str) -> None:
        self._heard: dict[int, Callable[..., None]] = {}
        hub.register(self, endpoint)

    def getType(self) -> str:  # noqa: N802 - libvirt's name
        return "Test"

    def domainEventRegisterAny(self, _domain: Any, number: int, heard: Callable[..., None], _opaque: Any) -> int:  # noqa: N802 - libvirt's name
        self._heard[number] = heard
        return number

    def tell(self, *happened: tuple[int, int], uuid: str = VM) -> None:
        domain = SimpleNamespace(UUIDString=lambda: uuid)
        for event, detail in happened:
            self._heard[libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE](None, domain, event, detail, None)


@pytest.mark.parametrize(
    ("happened", "within"),
    [
        ([BY_GUEST, OFF], True),
        ([BY_GUEST, OFF, DEFINED], False),
        ([BY_HOST, OFF], False),
        ([BY_NOBODY_KNOWS, OFF], False),
        ([OFF], False),
        ([], False),
        ([BY_GUEST, OFF, ON], False),
        ([BY_GUEST, OFF, ON, OFF], False),
        ([BY_GUEST, OFF, ON, BY_HOST, OFF], False),
        ([BY_GUEST, ON_AGAIN], False),
        ([BY_HOST, OFF, ON, BY_GUEST, OFF], True),
    ],
)
def test_only_a_guest_that_was_heard_shutting_itself_down_has_done_so(
    happened: list[tuple[int, int]], within: bool
) -> None:
    hub = EventHub()
    host = Host(hub, "a")
    host.tell(*happened)
    host.tell(BY_HOST, OFF, uuid=OTHER)
    assert hub.shut_down_from_within(VM.upper(), "a") is within
    assert not hub.shut_down_from_within(VM, "b"), "it was heard there, not here"


@pytest.mark.parametrize("told", [True, False], ids=["its end was told", "nobody told"])
def test_what_happened_while_nobody_listened_is_not_known(told: bool) -> None:
    hub = EventHub()
    one, other = Host(hub, "a"), Host(hub, "b")
    one.tell(BY_GUEST, OFF)
    other.tell(BY_GUEST, OFF, uuid=OTHER)
    assert hub.shut_down_from_within(OTHER, "b")
    if told:
        hub.lost("a")
    else:
        Host(hub, "a")
    assert not hub.shut_down_from_within(VM, "a")
    assert not hub.shut_down_from_within(OTHER, "b"), (
        "a domain of this name may be on a as well, and have run there unheard"
    )


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_REMEMBERED", 1)
    hub = EventHub()
    host = Host(hub, "a")
    host.tell(BY_GUEST, OFF)
    host.tell(BY_GUEST, OFF, uuid=OTHER)
    assert (hub.shut_down_from_within(VM, "a"), hub.shut_down_from_within(OTHER, "a")) == (False, True)
