"""Freeing VMs by hand, on real guests."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio
from click.testing import CliRunner

from tests.lab import Lab
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, SERVICE_ACCOUNT, Stack, until
from vmsnapshot_operator import cli
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.handlers.thaw import thaw
from vmsnapshot_operator.hypervisors.domains import Hypervisor


@pytest.fixture
def guest(lab: Lab, stack: Stack) -> Iterator[Guest]:
    """The guest, which is neither frozen nor paused afterwards."""
    found = lab.guest("demo")
    yield found
    if found.domain().state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        found.domain().resume()
    until(
        "the guest is thawed",
        lambda: found.agent("guest-fsfreeze-thaw") is not None and found.freeze_status() == "thawed",
    )


@pytest.fixture
def operator(lab: Lab, stack: Stack) -> Path:
    """A kubeconfig of the operator's own ServiceAccount: no more is needed to thaw."""
    return lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT)


@pytest_asyncio.fixture(loop_scope="function")
async def hypervisor(lab: Lab) -> AsyncIterator[Hypervisor]:
    """Our own connections to libvirt."""
    client = await Hypervisor.connect("lab", [Endpoint(socket_path=str(lab.libvirt_socket))], {})
    yield client
    await client.close()


def a_journal(method: str) -> Journal:
    """The journal of an installation that is no more; a guardian that sees it waits ten minutes."""
    return Journal(
        installation="gone01", owner_uid="0", nonce=secrets.token_hex(16), attempt=1, method=method, budget=600.0
    )


async def test_a_vm_that_is_not_held_is_left_alone(guest: Guest, operator: Path) -> None:
    lines, ok = await thaw(operator, NAMESPACE, "lab", "demo", force=False)
    assert ok
    assert "agent says Thawed; no journal" in lines[0]
    assert "nothing was done" in lines[1]


async def test_what_somebody_else_froze_is_thawed_by_force_only(guest: Guest, operator: Path) -> None:
    guest.agent("guest-fsfreeze-freeze")
    lines, ok = await thaw(operator, NAMESPACE, "lab", "demo", force=False)
    assert not ok
    assert "frozen by somebody else" in lines[1]
    assert guest.freeze_status() == "frozen"
    lines, ok = await thaw(operator, NAMESPACE, "lab", guest.uuid, force=True)
    assert ok, lines
    assert lines[1] == "demo: its agent says thawed"
    assert guest.freeze_status() == "thawed"


async def test_a_journal_is_obeyed_and_removed(guest: Guest, operator: Path, hypervisor: Hypervisor) -> None:
    ref = await hypervisor.find("demo")
    await hypervisor.write_journal(ref, a_journal("GuestAgent"))
    guest.agent("guest-fsfreeze-freeze")
    lines, ok = await thaw(operator, NAMESPACE, "lab", "demo", force=False)
    assert ok, lines
    assert "held by installation gone01" in lines[0]
    assert guest.freeze_status() == "thawed"
    assert await hypervisor.read_journal(ref) is None


async def test_all_that_bear_a_journal_are_freed(guest: Guest, operator: Path, hypervisor: Hypervisor) -> None:
    ref = await hypervisor.find("demo")
    await hypervisor.write_journal(ref, a_journal("Pause"))
    guest.domain().suspend()
    lines, ok = await thaw(operator, NAMESPACE, "lab", None, force=False)
    assert ok, lines
    assert any("demo: resumed" in line for line in lines)
    assert guest.domain().state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert await hypervisor.read_journal(ref) is None
    assert await thaw(operator, NAMESPACE, "lab", None, force=False) == (
        ["no domain bears a journal: none is held by a snapshot"],
        True,
    )


async def test_what_does_not_exist_is_said(lab: Lab, stack: Stack, operator: Path, tmp_path: Path) -> None:
    lines, ok = await thaw(operator, NAMESPACE, "lab", "no-such-vm", force=True)
    assert (lines, ok) == (['no-such-vm: hypervisor "lab" has no domain "no-such-vm"'], False)
    lines, ok = await thaw(operator, NAMESPACE, "no-such-hypervisor", "demo", force=True)
    assert not ok
    assert 'there is no Hypervisor "no-such-hypervisor"' in lines[0]
    broken = tmp_path / "kubeconfig"
    broken.write_text("this: is none")
    lines, ok = await thaw(broken, NAMESPACE, "lab", "demo", force=True)
    assert not ok
    assert "virsh domfsthaw" in lines[1], "there is a way without the API server"


def test_the_command(guest: Guest, operator: Path) -> None:
    options = ["thaw", "--kubeconfig", str(operator), "--namespace", NAMESPACE, "lab"]
    guest.agent("guest-fsfreeze-freeze")
    refused = CliRunner().invoke(cli.main, [*options, "demo"])
    assert refused.exit_code == 1
    done = CliRunner().invoke(cli.main, [*options, "demo", "--force"])
    assert (done.exit_code, guest.freeze_status()) == (0, "thawed"), done.output
    assert CliRunner().invoke(cli.main, [*options]).exit_code == 2, "one, or --all"
