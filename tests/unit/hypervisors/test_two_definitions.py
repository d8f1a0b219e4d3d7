"""A VM that is off and that two endpoints define: nobody's answer counts more because it came first, and a journal is not forgotten.

The domains are real ones of libvirt's test driver; only who answers when is made up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests.unit.quiesce.fake_libvirt import a_journal
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.errors import (
    DomainAmbiguousError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
    NotPermittedError,
)
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.hypervisors.events import EventHub
from vmsnapshot_operator.hypervisors.hosts import Host
from vmsnapshot_operator.hypervisors.window import ACT_TIMEOUT
from vmsnapshot_operator.plan import definition
from vmsnapshot_operator.quiesce.base import release

UUID = "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000"
RUNNING, OFF = 1, 5

_DISK = "<disk type='file' device='disk'><source file='/pool/{0}.raw'/><target dev='{0}' bus='virtio'/></disk>"
_DOMAIN = """<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><name>demo</name><uuid>{uuid}</uuid>
<memory>{memory}</memory><os><type>hvm</type></os><devices>{disks}</devices><test:runstate>{state}</test:runstate></domain>"""

Pool = Callable[..., Hypervisor]


def domain(*disks: str, state: int = OFF, memory: int = 8192) -> str:
    return _DOMAIN.format(uuid=UUID, memory=memory, disks="".join(_DISK.format(d) for d in disks), state=state)


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    """Makes a pool of hosts, each with this domain or (None) without it; `slow`: who answers last."""
    made: list[Hypervisor] = []

    def make(slow: str = "", **hosts: str | None) -> Hypervisor:
        uris = {}
        for name, text in hosts.items():
            path = tmp_path / f"{name}.xml"
            path.write_text(f"<node>{text or ''}</node>")
            uris[name] = f"test://{path}"
        found = Hypervisor("pool", uris)
        if slow:
            look = found._hosts[slow].look

            async def late(*arguments: Any, **options: Any) -> Any:
                await asyncio.sleep(0.05)
                return await look(*arguments, **options)

            found._hosts[slow].look = late  # type: ignore[method-assign]  # the same, later
        made.append(found)
        return found

    yield make
    for each in made:
        await each.close()


async def domain_on(hosts: Hypervisor, endpoint: str) -> Any:
    """The domain there, on the connection on which journals are read and written."""
    return (await hosts._hosts[endpoint].main.get()).lookupByUUIDString(UUID)


async def put(hosts: Hypervisor, endpoint: str, journal: Journal) -> None:
    """Write a journal into one definition, as it is left there."""
    found = await domain_on(hosts, endpoint)
    flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG | (libvirt.VIR_DOMAIN_AFFECT_LIVE if found.isActive() else 0)
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    found.setMetadata(kind, journals.to_xml(journal), journals.PREFIX, journals.NAMESPACE, flags)


async def nonces(hosts: Hypervisor) -> dict[str, str]:
    """Which journals a sweep sees, by endpoint."""
    return {s.ref.endpoint: s.journal.nonce for s in await hosts.sweep() if s.journal is not None}


# --- which one is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["a", "b"])
@pytest.mark.parametrize("named", ["demo", UUID])
async def test_the_first_endpoint_is_taken_whoever_answers_first(pool: Pool, slow: str, named: str) -> None:
    hosts = pool(slow=slow, c=None, b=domain("vda"), a=domain("vda", memory=4096))
    ref = await hosts.find(named)
    assert ref.endpoint == "b"
    assert (await hosts.describe(ref, ask_agent=False)).endpoint == "b"
    assert await hosts.act(ref, "memory", lambda d: d.maxMemory()) == 8192
    assert [p.endpoint for p in await hosts.places(ref)] == ["b", "a"]


@pytest.mark.parametrize("slow", ["a", "b"])
@pytest.mark.parametrize("other", [("vda",), ("vda", "vdc"), ("vda", "vdb", "vdc"), ()])
async def test_none_is_taken_if_the_disks_differ(pool: Pool, slow: str, other: tuple[str, ...]) -> None:
    hosts = pool(slow=slow, a=domain("vda", "vdb"), b=domain(*other))
    ref = await hosts.find("demo")
    for asked in (hosts.describe(ref, ask_agent=False), hosts.act(ref, "name", lambda d: d.name())):
        with pytest.raises(DomainAmbiguousError, match="demo is defined on a and on b") as caught:
            await asked
        assert (caught.value.reason, caught.value.retryable) == ("DomainAmbiguous", False)
        assert "--undefinesource" in caught.value.message
    assert await hosts.act(ref, "job", lambda d: d.isActive(), any_definition=True) == 0, "what is off has no job"
    assert [d.ref.endpoint for d in await definitions.look(hosts, UUID)] == ["a", "b"]


@pytest.mark.parametrize("slow", ["a", "b"])
async def test_the_one_that_runs_is_the_true_one(pool: Pool, slow: str) -> None:
    hosts = pool(slow=slow, a=domain("vda", "vdb"), b=domain("vda", state=RUNNING))
    ref = await hosts.find(UUID)
    assert ref.endpoint == "b"
    assert (await hosts.describe(ref, ask_agent=False)).endpoint == "b"
    assert [d.ref.endpoint for d in await definitions.look(hosts, UUID)] == ["b"]
    assert [p.endpoint for p in await hosts.places(ref)] == ["b", "a"], "who gates it wants to know of all"


async def test_who_wants_to_know_of_all_places_waits_for_all(pool: Pool) -> None:
    hosts = pool(a=domain("vda", state=RUNNING), b=None)
    ref = await hosts.find(UUID)
    assert await hosts.places(ref) == (ref,)

    async def look(*_: object, **__: object) -> Any:
        raise HypervisorUnreachableError("b does not answer")

    hosts._hosts["b"].look = look  # type: ignore[method-assign]  # a stand-in
    assert await hosts.find(UUID) == ref
    with pytest.raises(HypervisorUnreachableError, match="b does not answer"):
        await hosts.places(ref)


async def test_one_that_is_nowhere(pool: Pool) -> None:
    hosts = pool(a=None, b=None)
    assert await definitions.look(hosts, "demo") == ()
    for asked in (hosts.find("demo"), hosts.places(Ref(uuid=UUID, name="demo", endpoint="a"))):
        with pytest.raises(DomainGoneError):
            await asked


# --- the journal ---------------------------------------------------------------------------------------------------------

LEFT, NEW = a_journal(1), a_journal(2)


@pytest.mark.parametrize("endpoint", ["a", "b"])
async def test_a_vm_that_is_off_is_freed_wherever_its_journal_stands(pool: Pool, endpoint: str) -> None:
    hosts = pool(a=domain("vda"), b=domain("vda", "vdb"))
    await put(hosts, endpoint, LEFT)
    ref = await hosts.find(UUID)
    assert await hosts.read_journal(ref) == LEFT
    await release(hosts, ref, LEFT)
    assert await nonces(hosts) == {}


async def test_one_of_overlays_is_not_hidden_by_one_that_was_left(pool: Pool) -> None:
    overlaid = replace(NEW, phase=Phase.OVERLAID, overlays={"v": "/over"})
    hosts = pool(a=domain("vda"), b=domain("vda"))
    await put(hosts, "a", LEFT)
    await put(hosts, "b", overlaid)
    ref = await hosts.find(UUID)
    assert await hosts.read_journal(ref) == overlaid
    begun = replace(overlaid, begun=("v",))
    assert await hosts.update_journal(ref, begun)
    assert await hosts.read_journal(ref) == begun
    await hosts.clear_journal(ref, LEFT.nonce)
    assert await nonces(hosts) == {"b": NEW.nonce}


async def test_what_a_migration_left_behind_goes_with_the_journal(pool: Pool) -> None:
    hosts = pool(a=domain("vda"), b=domain("vda", state=RUNNING))
    for endpoint in ("a", "b"):
        await put(hosts, endpoint, LEFT)
    left = Ref(uuid=UUID, name="demo", endpoint="a")
    await hosts.clear_journal(left, LEFT.nonce)
    assert await nonces(hosts) == {}


@pytest.mark.parametrize(
    ("there", "stays"),
    [
        (LEFT, False),
        (NEW, True),
        (replace(LEFT, phase=Phase.OVERLAID, overlays={"v": "/over"}), True),
    ],
    ids=["held", "another", "on overlays"],
)
async def test_only_what_says_that_it_is_held_is_taken_from_what_was_left(
    pool: Pool, there: Journal, stays: bool
) -> None:
    hosts = pool(a=domain("vda"), b=domain("vda", state=RUNNING))
    await put(hosts, "a", there)
    await put(hosts, "b", LEFT)
    await hosts.clear_left(Ref(uuid=UUID, name="demo", endpoint="a"), LEFT.nonce)
    await hosts.clear_left(Ref(uuid=UUID, name="demo", endpoint="b"), LEFT.nonce)
    await hosts.clear_left(Ref(uuid=UUID, name="demo", endpoint="gone"), LEFT.nonce)
    assert await nonces(hosts) == ({"a": there.nonce} if stays else {}) | {"b": LEFT.nonce}, "where it runs it counts"


async def test_a_definition_that_is_gone_bears_none(pool: Pool) -> None:
    hosts = pool(a=None, b=domain("vda", state=RUNNING))
    await hosts.clear_left(Ref(uuid=UUID, name="demo", endpoint="a"), LEFT.nonce)


# --- the gate of a restore -------------------------------------------------------------------------------------------------

MARKER = Marker(installation="abc123", restore="team-a/back", restore_uid="r1", snapshot_uid="s1")
GATE = Gate(marker=MARKER, targets=("vda",), autostart=False)
_INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE


async def changed_on(hosts: Hypervisor, endpoint: str) -> Any:
    """The domain there, on the connection on which it is defined: each of the test driver's has domains of its own."""
    return await hosts.act_on(endpoint, "look", lambda c: c.lookupByUUIDString(UUID), timeout=ACT_TIMEOUT)


async def test_a_gate_is_seen_wherever_the_vm_runs(pool: Pool) -> None:
    hosts = pool(one=domain("vda"), two=domain("vda", state=RUNNING))
    stored = await changed_on(hosts, "one")
    stored.connect().defineXML(definition.gated(stored.XMLDesc(_INACTIVE), GATE))
    seen = await definitions.look_everywhere(hosts, UUID)
    assert [(d.ref.endpoint, d.power, definition.gate_of(d.xml)) for d in seen] == [
        ("two", PowerState.RUNNING, None),
        ("one", PowerState.SHUT_OFF, GATE),
    ]
    assert await definitions.look_on(hosts, seen[1].ref) == seen[1]
    assert [d.ref.endpoint for d in await definitions.look(hosts, UUID)] == ["two"]
    assert await definitions.look_everywhere(pool(one=None), UUID) == ()
    silent = pool(one=domain("vda"))
    silent._hosts["two"] = Host("two", "test:///nowhere/at/all.xml", EventHub())
    with pytest.raises(HypervisorUnreachableError):
        await definitions.look_everywhere(silent, UUID)


@pytest.mark.parametrize("closing", [True, False])
async def test_a_gate_is_taken_back_from_a_vm_that_was_started_meanwhile(pool: Pool, closing: bool) -> None:
    """Once it was opened it stays so: then it was started from its true disks."""
    hosts = pool(one=domain("vda"))
    here = await changed_on(hosts, "one")
    if not closing:
        here.connect().defineXML(definition.gated(here.XMLDesc(_INACTIVE), GATE))

    def change(text: str) -> str:
        here.create()
        return definition.gated(text, GATE) if closing else definition.reopened(text, MARKER)

    with pytest.raises(HypervisorError) as caught:
        await definitions.redefine(hosts, await hosts.find("demo"), change, take_back=closing)
    assert caught.value.reason == "VMRunning"
    assert here.isActive()
    assert definition.gate_of(here.XMLDesc(_INACTIVE)) is None


async def test_nothing_is_defined_by_one_who_may_not_any_more(pool: Pool) -> None:
    """It is asked in the thread that defines, after all else: a process may have stood still before."""
    hosts = pool(one=domain("vda"))
    here = await changed_on(hosts, "one")
    lost = ""

    def change(text: str) -> str:
        nonlocal lost
        lost = "another instance may have taken over"
        return definition.gated(text, GATE)

    with pytest.raises(NotPermittedError, match="another instance"):
        await definitions.redefine(hosts, await hosts.find("demo"), change, permit=lambda: lost)
    assert definition.gate_of(here.XMLDesc(_INACTIVE)) is None
