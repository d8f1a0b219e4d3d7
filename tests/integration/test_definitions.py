"""Definitions on real libvirt: a VM that nobody can start while it is restored, and a new one beside the one it was made of."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio

from tests.integration.hypervisor_support import ONE_DISK, TWO_DISKS, connect, eventually
from tests.lab import Lab
from tests.lab.guests import Guest
from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind
from vmsnapshot_operator.errors import DomainGoneError, HypervisorError, RefusedError
from vmsnapshot_operator.hypervisors import definitions
from vmsnapshot_operator.hypervisors.definitions import Defined
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.plan import definition
from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.new_definition import Identity, as_new_vm

MARKER = Marker(
    installation="tested",
    restore="team-a/back-to-monday",
    restore_uid="6f1d3c0a-58f2-4a57-9f0e-2d6f4a1b7c33",
    snapshot_uid="0c5f2f4e-9a17-4a35-b0d8-7f6a3a1e2d44",
)
IDENTITY = Identity(name="df-new", seed=MARKER.restore_uid)
NETWORK = "<interface type='user'><mac address='52:54:00:11:22:33'/><model type='virtio'/></interface>"
DISPLAY = "<graphics type='vnc' autoport='yes' listen='127.0.0.1' passwd='sesame'/>"
LONG = Seconds(90.0)
GATE = Gate(marker=MARKER, targets=("vda",), autostart=True)


@pytest_asyncio.fixture
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    made = await connect(lab)
    yield made
    await made.close()


async def seen(hypervisor: Hypervisor, domain: str) -> Defined:
    """The domain, which must be there."""
    (found,) = await definitions.look(hypervisor, domain)
    return found


async def restart_libvirtd(lab: Lab, hypervisor: Hypervisor) -> None:
    """Let libvirtd read again what it keeps on disk."""
    lab.component("libvirtd").kill()
    lab.component("libvirtd").start()

    async def answers() -> bool:
        await hypervisor.about()
        return True

    await eventually("libvirtd answers", answers)


# --- a VM that does not boot anything ----------------------------------------------------------------------------------------


@pytest.fixture
def stub(lab: Lab) -> Iterator[Guest]:
    """A domain that is off, with a display that has a password."""
    made = lab.domain_stub("df-stub", ONE_DISK, devices=DISPLAY)
    made.destroy()
    yield made
    made.remove()


@pytest_asyncio.fixture
async def ref(hypervisor: Hypervisor, stub: Guest) -> Ref:
    return await hypervisor.find(stub.name)


async def test_a_gated_vm_cannot_be_started_and_comes_back_as_it_was(
    lab: Lab, hypervisor: Hypervisor, stub: Guest, ref: Ref
) -> None:
    before = stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
    await definitions.set_autostart(hypervisor, ref, on=False)
    await definitions.redefine(hypervisor, ref, lambda xml: definition.gated(xml, GATE))
    with pytest.raises(HypervisorError, match="VMRestore/team-a/back-to-monday/vda"):
        await definitions.start(hypervisor, ref)
    with pytest.raises(libvirt.libvirtError, match="VMRestore/team-a/back-to-monday/vda"):
        stub.domain().create()

    await restart_libvirtd(lab, hypervisor)
    gated = await seen(hypervisor, stub.name)
    assert gated.ref.uuid == ref.uuid
    assert definition.gate_of(gated.xml) == GATE
    assert (gated.power, gated.persistent, gated.autostart, gated.managed_save) == (
        PowerState.SHUT_OFF,
        True,
        False,
        False,
    )
    assert str(stub.disks["vda"].path) in definition.true_disks(gated.xml)["vda"]
    with pytest.raises(HypervisorError, match="VMRestore/team-a/back-to-monday/vda"):
        await definitions.start(hypervisor, ref)

    await definitions.redefine(hypervisor, ref, lambda xml: definition.restored(xml, MARKER, genid=IDENTITY.genid))
    await definitions.set_autostart(hypervisor, ref, on=True)
    await restart_libvirtd(lab, hypervisor)
    done = await seen(hypervisor, ref.uuid)
    assert done.autostart
    assert definition.done(done.xml) == (MARKER,)
    assert definition.gate_of(done.xml) is None
    after = tree.parse(stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE))
    tree.discard(after, "metadata")
    assert [x.strip() for x in tree.text_of(after).replace('"', "'").split()] == [
        x.strip() for x in tree.text_of(tree.parse(before)).replace('"', "'").split()
    ], "the password of its display, too"
    await definitions.set_autostart(hypervisor, ref, on=False)
    await definitions.start(hypervisor, ref)
    await definitions.start(hypervisor, ref)
    assert stub.domain().isActive()


async def test_a_vm_that_runs_is_not_redefined(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    stub.domain().create()
    with pytest.raises(HypervisorError, match="its disks are in use") as caught:
        await definitions.redefine(hypervisor, ref, lambda _: pytest.fail("it was asked"))
    assert caught.value.reason == "VMRunning"
    with pytest.raises(HypervisorError, match="its disks are in use"):
        await definitions.undefine(hypervisor, ref, nvram=True)


async def test_a_gate_that_came_too_late_is_taken_back(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    """It was started from its true disks right before: behind a gate it would be taken for one whose disks are half set back."""

    def late(xml: str) -> str:
        stub.domain().create()
        return definition.gated(xml, GATE)

    with pytest.raises(HypervisorError, match="its disks are in use") as caught:
        await definitions.redefine(hypervisor, ref, late, take_back=True)
    assert caught.value.reason == "VMRunning"
    assert stub.domain().isActive()
    assert definition.gate_of((await seen(hypervisor, ref.uuid)).xml) is None
    stub.destroy()
    stub.domain().create()


async def test_saved_memory_would_go_past_the_gate(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    stub.domain().create()
    stub.domain().managedSave()
    assert (await seen(hypervisor, ref.uuid)).managed_save
    with pytest.raises(HypervisorError, match="saved with its memory") as caught:
        await definitions.redefine(hypervisor, ref, lambda xml: definition.gated(xml, GATE))
    assert caught.value.reason == "VMSaved"
    await definitions.start(hypervisor, ref)
    assert not (await seen(hypervisor, ref.uuid)).managed_save, "it booted, and the memory was thrown away"


async def test_a_change_that_is_refused_changes_nothing(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    before = stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    with pytest.raises(RefusedError, match="bears no gate"):
        await definitions.redefine(hypervisor, ref, lambda xml: definition.restored(xml, MARKER, genid=IDENTITY.genid))
    assert stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) == before


async def test_a_vm_that_takes_no_notice_is_switched_off(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    stub.domain().create()
    assert not await definitions.stop(hypervisor, ref, Seconds(1.0))
    assert not stub.domain().isActive()
    assert not await definitions.stop(hypervisor, ref, Seconds(1.0)), "off already, and not by itself"


async def test_a_paused_vm_is_switched_off_at_once(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    stub.domain().createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
    assert not await definitions.stop(hypervisor, ref, Seconds(3600.0))
    assert not stub.domain().isActive()


async def test_a_transient_vm_is_not_stopped(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    definition_of_it = stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    stub.domain().create()
    stub.domain().undefine()
    with pytest.raises(HypervisorError, match="is transient") as caught:
        await definitions.stop(hypervisor, ref, Seconds(1.0))
    assert caught.value.reason == "VMTransient"
    assert stub.domain().isActive()
    stub.connection().defineXML(definition_of_it)


async def test_a_vm_without_an_agent_is_waited_for_in_vain(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    with pytest.raises(HypervisorError, match="does not run") as caught:
        await definitions.wait_for_agent(hypervisor, ref, Seconds(1.0))
    assert caught.value.reason == "VMStopped"
    stub.domain().create()
    state, text = await definitions.wait_for_agent(hypervisor, ref, Seconds(0.0))
    assert state is AgentState.ABSENT
    assert text
    assert not (await seen(hypervisor, ref.uuid)).agent_channel


async def test_no_vm_is_overwritten(hypervisor: Hypervisor, stub: Guest, ref: Ref) -> None:
    before = stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    sources = {"vda": Layer(kind=SourceKind.FILE, source="/nowhere/copy.raw", format="raw")}
    taken = as_new_vm(before, Identity(name=stub.name, seed="x"), sources, MARKER)
    with pytest.raises(HypervisorError, match=f"it has the UUID {ref.uuid}") as caught:
        await definitions.define(hypervisor, ref.endpoint, taken.xml)
    assert caught.value.reason == "NameTaken"
    assert stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) == before
    same_uuid = before.replace("<name>df-stub</name>", "<name>df-other</name>")
    with pytest.raises(HypervisorError) as caught:
        await definitions.define(hypervisor, ref.endpoint, same_uuid)
    assert caught.value.reason == "NameTaken"
    assert stub.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) == before


async def test_a_vm_that_is_not_there(hypervisor: Hypervisor) -> None:
    assert await definitions.look(hypervisor, "df-absent") == ()
    gone = Ref(uuid="0c5f2f4e-0000-4000-8000-000000000000", name="df-absent", endpoint="")
    await definitions.undefine(hypervisor, gone, nvram=True)
    with pytest.raises(DomainGoneError):
        await definitions.start(hypervisor, gone)
    with pytest.raises(HypervisorError, match='has no endpoint "elsewhere"'):
        await definitions.define(hypervisor, "elsewhere", "<domain><name>df-absent</name></domain>")


# --- a VM beside the one that it was made of -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(lab: Lab) -> Iterator[Guest]:
    """A running guest with a network, a generation id and an agent."""
    # The laboratory's own firmware stands still before a generation id, which it does not know.
    made = lab.guest("df", TWO_DISKS, writer=False, memory_mib=96, devices=NETWORK, firmware="<boot dev='hd'/>")
    xml = made.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    if "<genid>" not in xml:
        made.connection().defineXML(xml.replace("</uuid>", "</uuid><genid/>"))
    yield made
    made.remove()


@pytest.fixture
def copies(original: Guest) -> Iterator[dict[str, Layer]]:
    """Copies of its disks."""
    made = {}
    for target, disk in original.disks.items():
        path = Path(disk.path).with_name(f"df-new-{target}.raw")
        subprocess.run(["cp", "--reflink=auto", disk.path, path], check=True)
        made[target] = Layer(kind=SourceKind.FILE, source=str(path), format="raw")
    yield made
    for layer in made.values():
        Path(layer.source).unlink()


async def test_a_new_vm_runs_beside_the_old_one(
    lab: Lab, hypervisor: Hypervisor, original: Guest, copies: dict[str, Layer]
) -> None:
    old = await seen(hypervisor, "df")
    assert old.agent_channel
    before = original.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    made = as_new_vm(old.xml, IDENTITY, copies, MARKER)
    ref = await definitions.define(hypervisor, old.ref.endpoint, made.xml)
    try:
        assert (ref.uuid, ref.name) == (IDENTITY.uuid, "df-new")
        assert await definitions.define(hypervisor, old.ref.endpoint, made.xml) == ref, "once more is the same VM"
        await definitions.start(hypervisor, ref)
        state, text = await definitions.wait_for_agent(hypervisor, ref, LONG)
        assert state is AgentState.THAWED, text
        await restart_libvirtd(lab, hypervisor)

        new = await seen(hypervisor, "df-new")
        old = await seen(hypervisor, "df")
        assert (new.power, old.power) == (PowerState.RUNNING, PowerState.RUNNING)
        assert definition.done(new.xml) == (MARKER,)
        assert definition.done(old.xml) == ()
        for path in ("uuid", "name", "genid"):
            told = [tree.parse(d.xml).findtext(path) for d in (old, new)]
            assert all(told)
            assert told[0] != told[1]
        macs = [tree.required(tree.parse(d.xml), "devices/interface/mac").get("address") for d in (old, new)]
        assert macs == ["52:54:00:11:22:33", IDENTITY.mac(0)]
        assert original.control(["cat", "/proc/uptime"]), "its own channel is still its own"
        assert original.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE) == before, "and nothing of it changed"

        live = tree.parse(original.connection().lookupByName("df-new").XMLDesc())
        assert tree.required(live, "devices/interface/mac").get("address") == IDENTITY.mac(0), "QEMU was told so"
        assert live.findtext("genid") == IDENTITY.genid
        assert await definitions.stop(hypervisor, ref, LONG), "it went down by itself"
        assert (await seen(hypervisor, "df-new")).power is PowerState.SHUT_OFF
        assert original.domain().isActive()
    finally:
        await definitions.stop(hypervisor, ref, Seconds(0.0))
        await definitions.undefine(hypervisor, ref, nvram=True)
    assert await definitions.look(hypervisor, "df-new") == ()
    for target, layer in copies.items():
        checked = subprocess.run(["e2fsck", "-fn", layer.source], check=False, capture_output=True, text=True)
        assert checked.returncode == 0, f"{target}: {checked.stdout}"


async def test_a_definition_made_of_a_running_one_can_be_defined(
    hypervisor: Hypervisor, original: Guest, copies: dict[str, Layer]
) -> None:
    """What only a run knows (sockets, aliases, labels) is left out."""
    made = as_new_vm(original.domain().XMLDesc(), IDENTITY, copies, MARKER)
    ref = await definitions.define(hypervisor, (await seen(hypervisor, "df")).ref.endpoint, made.xml)
    try:
        assert "domain-" not in (await seen(hypervisor, "df-new")).xml
    finally:
        await definitions.undefine(hypervisor, ref, nvram=True)
