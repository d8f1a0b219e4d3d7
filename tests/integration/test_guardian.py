"""Layers of protection: whoever holds a VM dies, hangs or is restarted, and the VM goes on all the same."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio

from tests.integration.hypervisor_support import (
    ONE_DISK,
    TWO_DISKS,
    Guardian,
    Holder,
    connect,
    eventually,
    free,
    is_state,
    journal,
    small_guest,
)
from tests.lab import Lab
from tests.lab.guests import Guest
from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState, PowerState
from vmsnapshot_operator.errors import GuardianError
from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink

pytestmark = pytest.mark.usefixtures("alone")

MEMORY_LIMIT_MB = 40


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    made = small_guest(lab, "held", TWO_DISKS)
    yield made
    made.remove()


@pytest_asyncio.fixture
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    made = await connect(lab)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def ref(hypervisor: Hypervisor, guest: Guest) -> AsyncIterator[Ref]:
    found = await hypervisor.find("held")
    yield found
    domain = guest.domain()
    if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        domain.resume()
    await free(await hypervisor.window(found))
    with contextlib.suppress(libvirt.libvirtError):
        domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, None, None, journals.NAMESPACE, 3)


@pytest.fixture
def guardian(tmp_path: Path) -> Iterator[Guardian]:
    made = Guardian(tmp_path / "socket", tmp_path / "log").start()
    yield made
    made.stop()


Hold = Callable[[Journal], Holder]


@pytest.fixture
def hold(lab: Lab, guardian: Guardian, ref: Ref) -> Iterator[Hold]:
    """Have another process hold the guest."""
    made: list[Holder] = []

    def start(held: Journal) -> Holder:
        made.append(Holder(lab, guardian, ref, held))
        return made[-1]

    yield start
    for holder in made:
        holder.stop()


DEATH_GUARD_SECONDS = 10.0
HELD = {"GuestAgent": AgentState.FROZEN, "Pause": PowerState.PAUSED}
FREE = {"GuestAgent": AgentState.THAWED, "Pause": PowerState.RUNNING}
both = pytest.mark.parametrize("method", ["GuestAgent", "Pause"])


@both
async def test_the_holder_is_killed(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold, method: str
) -> None:
    held = journal(method)
    holder = hold(held)
    assert await is_state(hypervisor, ref, HELD[method])
    holder.signal(signal.SIGKILL)
    took = await eventually("it is free", lambda: is_state(hypervisor, ref, FREE[method]))
    # 2 s are promised, and measured by `make bench`; this is far from the budget on a busy machine, too.
    assert took < DEATH_GUARD_SECONDS < held.budget
    (line,) = guardian.said("releasing", held.nonce)
    assert line["why"] == "the process that armed it is gone"
    assert await hypervisor.read_journal(ref) == held, "the operator must see what happened"
    await hypervisor.clear_journal(ref, held.nonce)


@both
async def test_the_holder_is_stopped(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold, method: str
) -> None:
    held = journal(method, budget=3.0)
    holder = hold(held)
    holder.signal(signal.SIGSTOP)
    start = time.monotonic()
    assert await is_state(hypervisor, ref, HELD[method])
    await eventually("it is free", lambda: is_state(hypervisor, ref, FREE[method]))
    assert not guardian.said("releasing", held.nonce)[0]["why"].startswith("the process")
    assert time.monotonic() - start > 1.0, "it was freed long before its budget was over"


@both
async def test_an_order_of_a_dead_holder_that_comes_when_its_journal_is_removed_is_undone(
    hypervisor: Hypervisor, ref: Ref, guest: Guest, guardian: Guardian, hold: Hold, method: str
) -> None:
    """libvirtd had it in its line; an operator that was started meanwhile has found the VM free and removed the journal."""
    held = journal(method)
    hold(held).signal(signal.SIGKILL)
    await eventually("it is freed", lambda: _said(guardian, "released", held))
    await hypervisor.clear_journal(ref, held.nonce)
    if method == "Pause":
        guest.domain().suspend()
    else:
        assert guest.agent("guest-fsfreeze-freeze") == len(TWO_DISKS)
    await eventually("it is free again", lambda: is_state(hypervisor, ref, FREE[method]))


@both
async def test_a_window_of_another_attempt_is_not_disturbed_by_who_looks_on(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold, method: str
) -> None:
    first, second = journal(method), journal(method)
    hold(first).signal(signal.SIGKILL)
    await eventually("it is freed", lambda: _said(guardian, "released", first))
    await hypervisor.clear_journal(ref, first.nonce)
    hold(second)
    await asyncio.sleep(3.0)
    assert await is_state(hypervisor, ref, HELD[method])


@both
async def test_holder_stopped_and_guardian_killed_and_restarted(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold, method: str
) -> None:
    held = journal(method, budget=3.0)
    hold(held).signal(signal.SIGSTOP)
    guardian.signal(signal.SIGKILL)
    assert await is_state(hypervisor, ref, HELD[method])
    guardian.start()
    await eventually("it is free", lambda: is_state(hypervisor, ref, FREE[method]))
    await eventually("this guardian freed it", lambda: _said(guardian, "released", held))
    assert len(guardian.said("armed", held.nonce)) == 2


async def _said(guardian: Guardian, what: str, held: Journal) -> bool:
    return bool(guardian.said(what, held.nonce))


async def test_a_journal_found_at_the_start(lab: Lab, hypervisor: Hypervisor, ref: Ref, tmp_path: Path) -> None:
    held = journal(budget=1.0)
    await hypervisor.write_journal(ref, held)
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2
    late = Guardian(tmp_path / "late", tmp_path / "log", uris=(lab.libvirt_uri,)).start()
    try:
        await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
        await eventually("this guardian freed it", lambda: _said(late, "released", held))
    finally:
        late.stop()


async def test_sigterm_frees_what_is_armed_before_it_ends(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold
) -> None:
    held = journal()
    hold(held)
    assert guardian.signal(signal.SIGTERM) == 0
    assert await is_state(hypervisor, ref, AgentState.THAWED)
    assert guardian.said("released", held.nonce)


async def test_libvirtd_is_restarted_while_nobody_else_is_left(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold
) -> None:
    held = journal()
    holder = hold(held)
    lab.component("libvirtd").kill()
    holder.signal(signal.SIGKILL)
    assert guardian.probe() == 0
    lab.component("libvirtd").start()
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    await eventually("this guardian freed it", lambda: _said(guardian, "released", held))


async def test_libvirtd_is_restarted_while_paused(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold
) -> None:
    held = journal("Pause")
    holder = hold(held)
    lab.component("libvirtd").kill()
    holder.signal(signal.SIGKILL)
    lab.component("libvirtd").start()
    await eventually("it is free", lambda: is_state(hypervisor, ref, PowerState.RUNNING))


async def test_an_agent_that_hangs_delays_nobody_else(
    lab: Lab, hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold
) -> None:
    mute = small_guest(lab, "held-mute", ONE_DISK)
    silent = await hypervisor.find("held-mute")
    lost, held = journal(), journal()
    try:
        other = Holder(lab, guardian, silent, lost)
        mute.hang_agent()
        holder = hold(held)
        other.stop()
        await eventually("the first is being freed", lambda: _said(guardian, "releasing", lost))
        holder.signal(signal.SIGKILL)
        await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
        await eventually("it is said", lambda: _said(guardian, "released", held))
        assert not guardian.said("released", lost.nonce)
        assert guardian.probe() == 0
        mute.hang_agent(hang=False)
        await eventually("the other is free, too", lambda: _said(guardian, "released", lost))
        assert await is_state(hypervisor, silent, AgentState.THAWED)
    finally:
        mute.remove()


async def test_what_was_disarmed_is_left_alone(hypervisor: Hypervisor, ref: Ref, guardian: Guardian) -> None:
    link = GuardianLink(guardian.socket)
    held = journal(budget=1.0)
    await hypervisor.write_journal(ref, held)
    await link.arm(hypervisor.uri(ref), ref.uuid, held.nonce, hypervisor.uris)
    await link.disarm(held.nonce)
    await asyncio.sleep(2.5)
    assert not guardian.said("releasing", held.nonce)
    await link.close()


async def test_the_link_arms_again_when_the_guardian_was_restarted(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian
) -> None:
    link = GuardianLink(guardian.socket)
    held = journal()
    await hypervisor.write_journal(ref, held)
    await link.arm(hypervisor.uri(ref), ref.uuid, held.nonce, hypervisor.uris)
    guardian.signal(signal.SIGKILL)
    with pytest.raises(GuardianError):
        await link.ping()
    guardian.start()
    window = await hypervisor.window(ref)
    assert await window.freeze((), 15) == 2

    async def armed_by_us() -> bool:
        # What this link armed is freed when it closes, hence before its budget of two minutes.
        return len(guardian.said("armed", held.nonce)) == 2

    await eventually("it is armed again", armed_by_us)
    await asyncio.sleep(1.0)
    await link.close()
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert guardian.said("releasing", held.nonce)[0]["why"] == "the process that armed it is gone"


async def test_nothing_is_acknowledged_that_the_domain_does_not_say(
    hypervisor: Hypervisor, ref: Ref, guardian: Guardian
) -> None:
    link = GuardianLink(guardian.socket)
    with pytest.raises(GuardianError, match="does not bear"):
        await link.arm(hypervisor.uri(ref), ref.uuid, journal().nonce)
    held = journal()
    await hypervisor.write_journal(ref, held)
    with pytest.raises(GuardianError, match="does not bear"):
        await link.arm(hypervisor.uri(ref), ref.uuid, journal().nonce)
    with pytest.raises(GuardianError, match="refuses"):
        await link.arm("qemu+unix:///system?socket=/nowhere", ref.uuid, held.nonce)
    with pytest.raises(GuardianError, match="refuses"):
        await link.arm(hypervisor.uri(ref), "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000", held.nonce)
    await link.ping()
    await link.close()


async def test_one_guardian_per_socket(guardian: Guardian) -> None:
    second = Guardian(guardian.socket, guardian.log)
    words = [sys.executable, "-m", "vmsnapshot_operator.guardian", "--socket", str(second.socket)]
    assert subprocess.run(words, check=False, capture_output=True, timeout=60).returncode == 1
    assert guardian.probe() == 0


async def test_the_probe_tells_a_dead_one(tmp_path: Path) -> None:
    assert Guardian(tmp_path / "none", tmp_path / "log").probe() == 1


async def test_it_is_small(hypervisor: Hypervisor, ref: Ref, guardian: Guardian, hold: Hold) -> None:
    hold(journal()).signal(signal.SIGKILL)
    await eventually("it is free", lambda: is_state(hypervisor, ref, AgentState.THAWED))
    assert guardian.process is not None
    text = Path(f"/proc/{guardian.process.pid}/status").read_text()
    resident = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS:")) / 1024
    assert resident <= MEMORY_LIMIT_MB
