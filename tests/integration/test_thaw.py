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
from vmsnapshot_operator.handlers import thaw as by_hand
from vmsnapshot_operator.hypervisors.domains import Hypervisor

ANYWAY = "--domain demo frees it all the same"


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


async def thaw(
    kubeconfig: Path, namespace: str, hypervisor: str, domain: str | None, *, force: bool, installation: str = ""
) -> tuple[list[str], bool]:
    """Free by hand; what was said, and whether all are free."""
    lines: list[str] = []
    ok = await by_hand.thaw(
        kubeconfig, namespace, hypervisor, domain, installation=installation, force=force, say=lines.append
    )
    return lines, ok


def a_journal(method: str, installation: str = "gone01") -> Journal:
    """The journal of an installation that is no more; a guardian that sees it waits ten minutes."""
    return Journal(
        installation=installation, owner_uid="0", nonce=secrets.token_hex(16), attempt=1, method=method, budget=600.0
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


async def test_all_that_are_held_by_us_are_freed(
    stack: Stack, guest: Guest, operator: Path, hypervisor: Hypervisor
) -> None:
    ref = await hypervisor.find("demo")
    await hypervisor.write_journal(ref, a_journal("Pause"))
    guest.domain().suspend()
    lines, ok = await thaw(operator, NAMESPACE, "lab", None, force=False)
    assert ok, "another installation's business"
    assert lines == [f"demo: left: held by installation gone01, object 0, attempt 1, which is not ours; {ANYWAY}"]
    assert guest.domain().state()[0] == libvirt.VIR_DOMAIN_PAUSED
    lines, ok = await thaw(operator, NAMESPACE, "lab", None, force=False, installation="gone01")
    assert ok, lines
    assert lines[0] == "demo: held by installation gone01, object 0, attempt 1; being freed"
    assert any("demo: resumed" in line for line in lines)
    assert guest.domain().state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert await hypervisor.read_journal(ref) is None
    assert await thaw(operator, NAMESPACE, "lab", None, force=False) == (
        ["hypervisor lab: no domain bears a journal: none is held by a snapshot"],
        True,
    )


async def test_all_with_the_api_server_gone(lab: Lab, guest: Guest, hypervisor: Hypervisor, tmp_path: Path) -> None:
    gone = tmp_path / "kubeconfig"
    gone.write_text("this: is none")
    ref = await hypervisor.find("demo")
    await hypervisor.write_journal(ref, a_journal("GuestAgent"))
    guest.agent("guest-fsfreeze-freeze")
    uri = f"qemu+unix:///system?socket={lab.libvirt_socket}"
    lines, ok = await thaw(gone, NAMESPACE, uri, None, force=False)
    assert ok, lines
    assert "does not say which installation is ours" in lines[0]
    assert guest.freeze_status() == "thawed"
    assert await hypervisor.read_journal(ref) is None


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
    options = ["thaw", "--kubeconfig", str(operator), "--namespace", NAMESPACE, "--hypervisor", "lab"]
    guest.agent("guest-fsfreeze-freeze")
    refused = CliRunner().invoke(cli.main, [*options, "--domain", "demo"])
    assert refused.exit_code == 1
    done = CliRunner().invoke(cli.main, [*options, "--domain", "demo", "--force"])
    assert (done.exit_code, guest.freeze_status()) == (0, "thawed"), done.output
    free = CliRunner().invoke(cli.main, options)
    assert (free.exit_code, free.output) == (
        0,
        "hypervisor lab: no domain bears a journal: none is held by a snapshot\n",
    )
