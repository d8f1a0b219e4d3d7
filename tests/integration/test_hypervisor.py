"""Libvirt as it is: what a domain looks like, what freezing and thawing do, what is left when things break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio

from tests.integration.hypervisor_support import (
    ONE_DISK,
    TWO_DISKS,
    connect,
    endpoint,
    eventually,
    free,
    journal,
    small_guest,
)
from tests.lab import Lab
from tests.lab.guests import Guest
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.machine import AgentState, DeviceKind, DiskDevice, PowerState
from vmsnapshot_operator.core.volumes import SourceKind
from vmsnapshot_operator.errors import (
    AgentError,
    CallTimeoutError,
    DomainAmbiguousError,
    DomainGoneError,
    ForeignJournalError,
    HypervisorError,
    HypervisorUnreachableError,
)
from vmsnapshot_operator.hypervisors.calls import threads_running
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.hypervisors.events import Kind
from vmsnapshot_operator.quiesce.base import release


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    made = small_guest(lab, "hv", TWO_DISKS)
    yield made
    made.remove()


@pytest_asyncio.fixture
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    made = await connect(lab)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def ref(hypervisor: Hypervisor, guest: Guest) -> AsyncIterator[Ref]:
    """The guest, which is thawed, runs and bears no journal afterwards."""
    found = await hypervisor.find("hv")
    yield found
    domain = guest.domain()
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()
    await free(await hypervisor.window(found))
    with contextlib.suppress(libvirt.libvirtError):
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, journals.NAMESPACE, 3)


# --- looking ----------------------------------------------------------------------------------------------------------


async def test_a_running_guest_is_described(lab: Lab, hypervisor: Hypervisor, ref: Ref) -> None:
    seen = await hypervisor.describe(ref, ask_agent=True)
    assert (seen.name, seen.power, seen.persistent, seen.migrating) == ("hv", PowerState.RUNNING, True, False)
    assert seen.run_id > 0
    assert seen.definition.startswith("<domain")
    assert seen.agent is not None
    assert seen.agent.state is AgentState.THAWED
    assert seen.agent.version
    assert {(f.mountpoint, f.targets) for f in seen.agent.filesystems} == {
        ("/mnt/vda", ("vda",)),
        ("/mnt/vdb", ("vdb",)),
    }
    for disk in seen.disks:
        (layer,) = disk.layers
        assert (layer.kind, layer.pool, layer.format) == (SourceKind.FILE, "reflink", "raw")
        assert layer.source == str(lab.pool_path("reflink") / f"hv-{disk.target}.raw")
        assert disk.size_bytes == 64 * 1024 * 1024
        assert not disk.in_block_job


async def test_a_domain_that_is_off_shows_its_whole_chain(lab: Lab, hypervisor: Hypervisor) -> None:
    base = lab.pool_path("reflink") / "hv-chain-base.raw"
    top = lab.pool_path("reflink") / "hv-chain-top.qcow2"
    subprocess.run(["truncate", "-s", "8M", base], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top], check=True)
    xml = f"""<domain type='qemu'><name>hv-chain</name><memory unit='MiB'>32</memory><os><type arch='x86_64'>hvm</type></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{top}'/><target dev='vda'/></disk>
<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>
<filesystem type='mount'><source dir='/tmp'/><target dir='shared'/></filesystem></devices></domain>"""
    connection = lab.libvirt()
    connection.storagePoolLookupByName("reflink").refresh()
    domain = connection.defineXML(xml)
    try:
        seen = await hypervisor.describe(await hypervisor.find("hv-chain"), ask_agent=True)
        assert (seen.power, seen.run_id, seen.agent) == (PowerState.SHUT_OFF, -1, None)
        assert not seen.shut_down_from_within
        disk, drive = seen.disks
        assert [(layer.source, layer.format, layer.pool) for layer in disk.layers] == [
            (str(top), "qcow2", "reflink"),
            (str(base), "raw", "reflink"),
        ]
        assert disk.layers[0].fingerprint, "nobody writes to it while the VM is off"
        before = disk.layers[1].fingerprint
        assert before
        assert disk.size_bytes == 8 * 1024 * 1024
        assert (drive.device, drive.layers) == (DiskDevice.CDROM, ())
        assert [(d.kind, d.name) for d in seen.devices] == [(DeviceKind.FILESYSTEM, "shared")]
        base.write_bytes(b"changed" * 100_000)
        connection.storagePoolLookupByName("reflink").refresh()
        again = await hypervisor.describe(await hypervisor.find("hv-chain"), ask_agent=False)
        assert again.disks[0].layers[1].fingerprint != before
    finally:
        domain.undefine()
        connection.close()
        base.unlink()
        top.unlink()


async def test_an_agent_that_may_not_freeze(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    port = "/dev/$(basename $(dirname $(grep -l org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name)))"
    for forbidden in ("guest-fsfreeze-status", "guest-fsfreeze-freeze"):
        guest.end_agent()
        guest.control(["sh", "-c", f"qemu-ga-main -d -m virtio-serial -p {port} -t /run/qemu-ga-main -b {forbidden}"])
        await eventually("the agent answers", lambda: _true(guest.agent_answers()))
        seen = await hypervisor.describe(ref, ask_agent=True)
        assert seen.agent is not None
        assert seen.agent.state is AgentState.UNSUPPORTED, seen.agent
        assert forbidden in seen.agent.message
    guest.control(["killall", "-KILL", "qemu-ga-main"])
    await eventually("the agent is gone", lambda: _absent(hypervisor, ref))
    guest.end_agent(end=False)


async def _absent(hypervisor: Hypervisor, ref: Ref) -> bool:
    seen = await hypervisor.describe(ref, ask_agent=True)
    return seen.agent is not None and seen.agent.state is AgentState.ABSENT


async def test_found_by_name_and_by_uuid_and_not_at_all(hypervisor: Hypervisor, ref: Ref) -> None:
    assert await hypervisor.find(ref.uuid) == ref
    assert await hypervisor.find(ref.uuid.upper()) == ref
    for missing in ("no-such-vm", "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000"):
        with pytest.raises(DomainGoneError):
            await hypervisor.find(missing)


async def test_about(hypervisor: Hypervisor, ref: Ref) -> None:
    about = await hypervisor.about()
    assert about["domains"] >= 1
    assert about["libvirtVersion"].count(".") == 2
    assert not hypervisor.problems


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(HypervisorUnreachableError):
        await Hypervisor.connect("none", [Endpoint(socket_path=str(tmp_path / "none"))], {})


async def test_closing_leaves_nothing_open(lab: Lab, ref: Ref) -> None:
    before = _sockets()
    for _ in range(3):
        made = await connect(lab)
        windows = [await made.window(ref) for _ in range(6)]
        assert len(windows) == 6
        del windows
        await made.close()

    async def closed() -> bool:
        return _sockets() == before and threads_running() == 0

    await eventually("all is closed", closed)  # libvirt lets go of its sockets in threads of its own


def _sockets() -> int:
    """How many sockets this process has open."""
    links = list(Path("/proc/self/fd").iterdir())
    return sum(os.readlink(n).startswith("socket:") for n in links if n.is_symlink())  # noqa: PTH115 - no path is meant


# --- several endpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[Endpoint]:
    """A libvirtd that takes connections and never answers."""
    path = tmp_path / "hung"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    taken: list[socket.socket] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(listener.accept()[0])

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield Endpoint(socket_path=str(path))
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for link in taken:
        link.close()


async def test_a_host_that_hangs_delays_no_vm_of_another(lab: Lab, ref: Ref, hung: Endpoint) -> None:
    pool = await Hypervisor.connect("pool", [hung, endpoint(lab)], {})
    try:
        assert set(pool.problems) == {hung.name}
        found = await asyncio.wait_for(pool.find(ref.uuid), 5)
        assert found.endpoint == endpoint(lab).name
        window = await asyncio.wait_for(pool.window(ref), 5)
        assert await window.freeze((), 15) == 2
        assert await window.thaw(5) == 2
    finally:
        await pool.close()


async def test_what_may_run_on_a_silent_host_is_not_said_to_be_off_or_gone(lab: Lab, tmp_path: Path) -> None:
    stub = lab.domain_stub("hv-off")
    nobody = Endpoint(socket_path=str(tmp_path / "nobody"))
    pool = await Hypervisor.connect("pool", [nobody, endpoint(lab)], {})
    try:
        assert (await pool.find("hv-off")).name == "hv-off"
        stub.destroy()
        with pytest.raises(HypervisorUnreachableError):
            await pool.find("hv-off")
        with pytest.raises(HypervisorUnreachableError):
            await pool.find("no-such-vm")
    finally:
        await pool.close()
        stub.remove()


async def test_a_migration_that_leaves_the_definition_behind(lab: Lab, tmp_path: Path) -> None:
    """What it left bears a journal that nobody needs, and may lack a disk that the VM has got since."""
    first, second = lab.host, lab.second_host()
    guest = small_guest(lab, "hv-two", TWO_DISKS)
    pool = await Hypervisor.connect(
        "pool", [Endpoint(socket_path=str(h.socket)) for h in (first, second)], {}, folder=tmp_path
    )
    try:
        here = await pool.find("hv-two")
        held = journal()
        await pool.write_journal(here, held)
        guest.migrate(second, leaving=True)
        there = await pool.find(here.uuid)
        assert there.endpoint != here.endpoint
        assert [p.endpoint for p in await pool.places(here)] == [there.endpoint, here.endpoint]
        assert [s.journal for s in await pool.sweep()] == [held] * 2, "the one that runs, and what it left"
        await release(pool, there, held)
        assert [s.ref for s in await pool.sweep()] == [here]
        await pool.clear_left(there, held.nonce)
        await pool.clear_left(here, held.nonce)
        assert not await pool.sweep()

        guest.destroy()
        for _ in range(5):
            seen = await pool.describe(there, ask_agent=False)
            assert (seen.endpoint, seen.power) == (here.endpoint, PowerState.SHUT_OFF), "both are equal: the first"
        path = lab.pool_path("reflink") / "hv-two-vdc.raw"
        subprocess.run(["truncate", "-s", "1M", path], check=True)
        disk = f"<disk type='file' device='disk'><source file='{path}'/><target dev='vdc' bus='virtio'/></disk>"
        guest.domain().attachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        for _ in range(5):
            with pytest.raises(DomainAmbiguousError) as caught:
                await pool.describe(there, ask_agent=False)
        assert all(e in caught.value.message for e in (here.endpoint, there.endpoint))
        with first.connection() as connection:
            connection.lookupByName("hv-two").undefine()
        seen = await pool.describe(here, ask_agent=False)
        assert (seen.endpoint, {d.target for d in seen.disks}) == (there.endpoint, {"vda", "vdb", "vdc"})
        path.unlink()
    finally:
        await pool.close()
        with first.connection() as connection, contextlib.suppress(libvirt.libvirtError):
            connection.lookupByName("hv-two").undefine()
        guest.remove()
        lab.end_second_host()


# --- freezing and thawing ----------------------------------------------------------------------------------------------


async def test_counts_tell_what_was_frozen_and_thawed(hypervisor: Hypervisor, ref: Ref) -> None:
    window = await hypervisor.window(ref)
    for _ in range(2):
        assert await window.freeze((), 15) == 2
        assert await window.status(2) is AgentState.FROZEN
        assert await window.thaw(5) == 2
        assert await window.thaw(5) == 0
        assert await window.status(2) is AgentState.THAWED
    assert await window.freeze(("/mnt/vdb",), 15) == 1
    assert await window.thaw(5) == 1


async def test_a_thaw_by_another_hand_shows_in_the_count_alone(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    guest.control(["fsfreeze", "--unfreeze", "/mnt/vda"])
    assert await window.status(2) is AgentState.FROZEN
    assert await window.thaw(5) == 1


async def test_a_planner_sees_that_somebody_has_frozen_it(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    guest.domain().fsFreeze()
    seen = await hypervisor.describe(ref, ask_agent=True)
    assert seen.agent is not None
    assert (seen.agent.state, seen.agent.filesystems) == (AgentState.FROZEN, ())


async def test_a_freeze_that_timed_out_comes_later(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    window = await hypervisor.window(ref)
    guest.hang_agent()
    try:
        with pytest.raises(AgentError):
            await window.freeze((), 2)
        with pytest.raises(AgentError):
            await window.thaw(1)
    finally:
        guest.hang_agent(hang=False)

    async def frozen() -> bool:
        return await window.status(2) is AgentState.FROZEN

    await eventually("the late freeze is carried out", frozen)
    await free(window)


async def test_while_a_freeze_has_not_returned_nobody_says_that_it_is_thawed(
    hypervisor: Hypervisor, ref: Ref, guest: Guest
) -> None:
    window = await hypervisor.window(ref)
    guest.hang_agent()
    try:
        freeze = asyncio.create_task(window.freeze((), 4))
        await eventually("the freeze is under way", lambda: _refuses(window.status(1)))
        freeze.cancel()
        with pytest.raises(asyncio.CancelledError):
            await freeze
        other = await hypervisor.window(ref)
        assert await _refuses(other.status(1))
    finally:
        guest.hang_agent(hang=False)
    await free(window)


async def _refuses(answer: object) -> bool:
    try:
        await answer  # type: ignore[misc]  # any awaitable
    except HypervisorError as error:
        return "has not returned" in error.message
    return False


async def test_a_hook_that_fails_at_thaw_makes_it_raise_though_it_thawed(
    hypervisor: Hypervisor, ref: Ref, guest: Guest
) -> None:
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    guest.fail_hook()
    try:
        with pytest.raises(HypervisorError):
            await window.thaw(5)
        assert await window.status(2) is AgentState.THAWED
    finally:
        guest.fail_hook(fail=False)


async def test_a_paused_vm_cannot_be_frozen_and_one_that_is_frozen_is_not_free_when_it_is_paused(
    hypervisor: Hypervisor, ref: Ref, guest: Guest
) -> None:
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    guest.domain().suspend()
    for refused in (window.freeze((), 5), window.thaw(5)):
        with pytest.raises(HypervisorError):
            await refused
    assert await window.status(2) is AgentState.ABSENT
    guest.domain().resume()
    assert await window.thaw(5) == 2


async def test_what_stopped_meanwhile_holds_nothing(lab: Lab, hypervisor: Hypervisor) -> None:
    stub = lab.domain_stub("hv-stop")
    try:
        window = await hypervisor.window(await hypervisor.find("hv-stop"))
        assert await window.state() is PowerState.PAUSED
        stub.destroy()
        assert await window.thaw(5) == 0
        assert await window.status(2) is AgentState.THAWED
        assert await window.state() is PowerState.SHUT_OFF
    finally:
        stub.remove()
    assert await window.thaw(5) == 0
    assert await window.status(2) is AgentState.THAWED
    assert await window.state() is PowerState.SHUT_OFF


async def test_libvirtd_killed_while_frozen(lab: Lab, hypervisor: Hypervisor, ref: Ref) -> None:
    window = await hypervisor.window(ref)
    held = journal()
    await hypervisor.write_journal(ref, held)
    assert await window.freeze((), 15) == 2
    with hypervisor.events(ref) as events:
        lab.component("libvirtd").kill()
        with pytest.raises(HypervisorUnreachableError):
            await window.thaw(5)
        lab.component("libvirtd").start()
        thawed: list[int] = []

        async def thaw() -> bool:
            thawed.append(await window.thaw(5))
            return True

        await eventually("libvirtd answers again and the guest is thawed", thaw)
        assert thawed == [2]
    assert events.blind
    assert events.resumed
    assert await hypervisor.read_journal(ref) == held
    assert [s.journal for s in await hypervisor.sweep()] == [held]


async def test_libvirtd_that_hangs_is_left_at_the_deadline(lab: Lab, hypervisor: Hypervisor, ref: Ref) -> None:
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    lab.component("libvirtd").kill(19)
    try:
        with pytest.raises((CallTimeoutError, HypervisorUnreachableError)):
            await window.thaw(1)
        assert threads_running() > 0
    finally:
        lab.component("libvirtd").kill(18)
    await free(window)
    await eventually("the threads that were left behind end", _no_thread)


async def _no_thread() -> bool:
    return threads_running() == 0


# --- pausing and events -------------------------------------------------------------------------------------------------


async def test_pause_and_resume_are_seen_as_events(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    window = await hypervisor.window(ref)
    with hypervisor.events(ref) as quiet:
        await window.pause()
        assert await window.state() is PowerState.PAUSED
        with hypervisor.events(ref) as events:
            assert not events.resumed
            guest.domain().resume()
            await eventually("the early resume is heard", lambda: _true(events.resumed))
        await window.pause()
        await window.resume()
        assert await window.state() is PowerState.RUNNING
        await eventually("all is heard", lambda: _true(len(quiet.happenings) == 4))
    assert [h.kind for h in events.happenings] == [Kind.RESUMED]
    assert [h.kind for h in quiet.happenings] == [Kind.PAUSED, Kind.RESUMED] * 2
    assert not any((quiet.started, quiet.stopped, quiet.migrated, quiet.rebooted, quiet.disks_changed, quiet.blind))
    assert sorted(h.at for h in quiet.happenings) == [h.at for h in quiet.happenings]


async def _true(value: bool) -> bool:
    return value


async def test_events_of_another_domain_are_not_taken_for_ours(lab: Lab, hypervisor: Hypervisor, ref: Ref) -> None:
    stub = lab.domain_stub("hv-other")
    other = await hypervisor.find("hv-other")
    with hypervisor.events(ref) as ours, hypervisor.events(other) as theirs:
        stub.remove()
        await eventually("the end is heard", lambda: _true(theirs.stopped))
    assert not ours.happenings


async def test_an_agent_that_goes_away_and_a_disk_that_is_plugged_are_heard(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, guest: Guest
) -> None:
    with hypervisor.events(ref) as events:
        guest.control(["killall", "-9", "qemu-ga-main"])
        await eventually("the agent is gone", lambda: _true(events.agent_lost))
        path = lab.pool_path("reflink") / "hv-plugged.raw"
        subprocess.run(["truncate", "-s", "1M", path], check=True)
        disk = f"<disk type='file' device='disk'><source file='{path}'/><target dev='vdx' bus='virtio'/></disk>"
        guest.domain().attachDevice(disk)
        await eventually("the new disk is heard", lambda: _true(events.disks_changed))
        assert "vdx" in {d.target for d in (await hypervisor.describe(ref, ask_agent=False)).disks}
    await eventually("the agent is back", lambda: _true(guest.agent_answers()))
    guest.destroy()
    path.unlink()
    guest.up()


# --- the journal --------------------------------------------------------------------------------------------------------


async def test_the_journal_is_written_refused_and_cleared_by_its_nonce(
    hypervisor: Hypervisor, ref: Ref, guest: Guest
) -> None:
    ours, theirs = journal(), journal()
    assert await hypervisor.read_journal(ref) is None
    await hypervisor.write_journal(ref, ours)
    await hypervisor.write_journal(ref, ours)
    assert await hypervisor.read_journal(ref) == ours
    assert (await hypervisor.describe(ref, ask_agent=False)).journal == ours
    for flag in (libvirt.VIR_DOMAIN_AFFECT_LIVE, libvirt.VIR_DOMAIN_AFFECT_CONFIG):
        text = guest.domain().metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, journals.NAMESPACE, flag)
        assert journals.from_xml(text) == ours
    with pytest.raises(ForeignJournalError):
        await hypervisor.write_journal(ref, theirs)
    await hypervisor.clear_journal(ref, theirs.nonce)
    assert await hypervisor.read_journal(ref) == ours
    await hypervisor.clear_journal(ref, ours.nonce)
    await hypervisor.clear_journal(ref, ours.nonce)
    assert await hypervisor.read_journal(ref) is None
    assert not await hypervisor.sweep()


async def test_a_journal_that_cannot_be_read_is_somebody_elses(hypervisor: Hypervisor, ref: Ref, guest: Guest) -> None:
    kind, flags = libvirt.VIR_DOMAIN_METADATA_ELEMENT, 3
    guest.domain().setMetadata(kind, "<journal version='99'/>", journals.PREFIX, journals.NAMESPACE, flags)
    with pytest.raises(ForeignJournalError):
        await hypervisor.write_journal(ref, journal())
    with pytest.raises(HypervisorError) as caught:
        await hypervisor.read_journal(ref)
    assert caught.value.reason == "JournalUnreadable"
    seen = await hypervisor.describe(ref, ask_agent=False)
    assert seen.journal is None
    assert seen.journal_error
    [sighting] = await hypervisor.sweep()
    assert (sighting.ref.name, sighting.journal) == (ref.name, None)
    assert "version" in sighting.problem
    await hypervisor.clear_journal(ref, journal().nonce)
    assert guest.domain().metadata(kind, journals.NAMESPACE, 1)


async def test_a_sweep_finds_journals_of_domains_that_run_are_off_or_transient(
    lab: Lab, hypervisor: Hypervisor, ref: Ref
) -> None:
    off = lab.domain_stub("hv-sweep-off")
    passing = lab.domain_stub("hv-sweep-passing")
    passing.domain().undefine()
    try:
        held = {name: journal() for name in ("hv", "hv-sweep-off", "hv-sweep-passing")}
        for name, each in held.items():
            await hypervisor.write_journal(await hypervisor.find(name), each)
        off.destroy()
        assert {s.ref.name: s.journal for s in await hypervisor.sweep()} == held
        for name, each in held.items():
            await hypervisor.clear_journal(await hypervisor.find(name), each.nonce)
        assert not await hypervisor.sweep()
    finally:
        passing.domain().destroy()
        passing.remove()
        off.remove()


# --- many at once -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def silent_six(lab: Lab) -> Iterator[list[Guest]]:
    """Six guests whose agents hang."""
    guests: list[Guest] = []

    def make(number: int) -> None:
        guests.append(small_guest(lab, f"hv-mute-{number}", ONE_DISK))

    threads = [threading.Thread(target=make, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(guests) == 6
    for guest in guests:
        guest.hang_agent()
    yield guests
    for guest in guests:
        guest.remove()


async def test_six_agents_that_hang_do_not_delay_the_seventh_vm(
    hypervisor: Hypervisor, ref: Ref, silent_six: list[Guest]
) -> None:
    refs = [await hypervisor.find(g.name) for g in silent_six]
    windows = [await hypervisor.window(r) for r in refs]
    freezes = [asyncio.create_task(w.freeze((), 20)) for w in windows]
    questions = [asyncio.create_task(hypervisor.describe(r, ask_agent=True)) for r in refs]
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    assert await window.status(2) is AgentState.FROZEN
    assert await window.thaw(5) == 2
    assert not any(f.done() for f in freezes), "the seventh had to wait for the others"
    seen = await asyncio.gather(*questions, return_exceptions=True)
    assert not any(isinstance(s, HypervisorError) and not isinstance(s, CallTimeoutError) for s in seen)
    for answer in await asyncio.gather(*freezes, return_exceptions=True):
        assert isinstance(answer, AgentError)
    for guest, opened in zip(silent_six, windows, strict=True):
        guest.hang_agent(hang=False)
        await free(opened)
        guest.hang_agent()
