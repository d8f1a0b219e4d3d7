"""VMs that are off, on real parts: what nobody holds any more was not still, and what is defined twice is not taken for one."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator

import libvirt
import pytest

from tests.chaos.injector import Injector
from tests.integration.test_restores import refused
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions
from vmsnapshot_operator.core.steps import Moment, Step

COPIED = {"vda": GuestDisk(kind="file", pool="plain"), "vdb": GuestDisk(kind="file", pool="plain")}
CUT = {"vda": GuestDisk(kind="file")}


@pytest.fixture
def copied(lab: Lab) -> Iterator[Guest]:
    made = lab.domain_stub("demo-off", COPIED, started=False)
    yield made
    made.remove()


def test_a_disk_that_is_taken_away_while_it_is_copied(
    lab: Lab, stack: Stack, injector: Injector, copied: Guest, vmsnapshot: Callable[..., str]
) -> None:
    name = vmsnapshot("whole", domain=copied.name)
    assert stack.wait(name)["status"]["consistency"] == "Crash"
    before = copied.domain().XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    disk = f"<disk type='file' device='disk'><source file='{lab.pool_path('plain')}/demo-off-vdb.raw'/><target dev='vdb'/></disk>"
    with injector.trap(Step.SETTLE_DRIVER, Moment.BEFORE) as trap:
        name = vmsnapshot("taken-away", domain=copied.name)
        assert trap.wait(60)
        copied.domain().detachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
    try:
        told = conditions(stack.wait(name, "Stalled"))
        assert told["Stalled"]["reason"] == "SnapshotLost"
        assert "disk vdb is none of the VM's any more" in told["Stalled"]["message"]
        assert told["Ready"]["status"] == "False"
    finally:
        copied.connection().defineXML(before)


@pytest.fixture
def moved(lab: Lab, stack: Stack) -> Iterator[Guest]:
    """A guest that is off and was migrated, and whose definition was left behind."""
    first, second = lab.host, lab.second_host()
    made = lab.guest("demo-moved", CUT, writer=False, memory_mib=96)
    try:
        stack.spread([first, second])
        made.migrate(second, leaving=True)
        made.destroy()
        yield made
    finally:
        made.remove()
        with first.connection() as connection, contextlib.suppress(libvirt.libvirtError):
            connection.lookupByName("demo-moved").undefine()
        stack.spread([first])
        lab.end_second_host()


def test_a_vm_that_is_defined_twice(
    lab: Lab, stack: Stack, moved: Guest, vmsnapshot: Callable[..., str], fresh: Callable[[str], str]
) -> None:
    name = vmsnapshot("equal", domain=moved.name)
    stack.wait(name)
    back = stack.restore(fresh("back"), name, safetySnapshot=False)
    try:
        assert "demo-moved is defined on" in refused(stack, back, "DomainAmbiguous")
    finally:
        stack.delete_restore(back)

    path = lab.pool_path("reflink") / "demo-moved-vdb.raw"
    subprocess.run(["truncate", "-s", "1M", path], check=True)
    try:
        disk = f"<disk type='file' device='disk'><source file='{path}'/><target dev='vdb' bus='virtio'/></disk>"
        moved.domain().attachDeviceFlags(disk, libvirt.VIR_DOMAIN_AFFECT_CONFIG)
        told = conditions(stack.wait(vmsnapshot("differ", domain=moved.name), "Stalled"))
        assert (told["Planned"]["reason"], told["Planned"]["status"]) == ("DomainAmbiguous", "False")
        with lab.host.connection() as connection:
            connection.lookupByName(moved.name).undefine()
        body = stack.wait(vmsnapshot("one", domain=moved.name))
        assert {v["target"] for v in body["status"]["volumes"]} == {"vda", "vdb"}
    finally:
        path.unlink()
