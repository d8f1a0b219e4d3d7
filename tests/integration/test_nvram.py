"""The variables of a VM's firmware, of a guest that really boots with UEFI and writes to them; and what is said where none can be held."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

from tests import proof
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until

FIRMWARE = Path("/usr/share/OVMF")
VARIABLES = "/sys/firmware/efi/efivars"
OURS = "cfc8fc79-be2e-4ddc-97f0-9f98bfe302a0"
CHANGED = f"{VARIABLES}/DriverOrder-8be4df61-93ca-11d2-aa0d-00e098032b8c"
"""One that Linux lets everybody change, of any pairs of bytes; the firmware drops it at its next boot if there are no such drivers."""


def firmware(path: Path) -> str:
    """What makes a VM boot by UEFI, with its variables there."""
    return (
        f"<loader readonly='yes' type='pflash'>{FIRMWARE}/OVMF_CODE.fd</loader>"
        f"<nvram template='{FIRMWARE}/OVMF_VARS.fd'>{path}</nvram>"
    )


@pytest.fixture(scope="module")
def variables(lab: Lab) -> Path:
    """Where the guest's variables are: in a pool that shares blocks, which a class of the examples matches."""
    return lab.pool_path("reflink") / "demo-uefi_VARS.fd"


@pytest.fixture(scope="module")
def guest(lab: Lab, variables: Path) -> Iterator[Guest]:
    disks = {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="rbd")}
    made = lab.guest("demo-uefi", disks, memory_mib=192, firmware=firmware(variables))
    yield made
    made.remove()
    variables.unlink(missing_ok=True)


@pytest.fixture
def vmrestore(stack: Stack, fresh: Callable[[str], str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Restore, and wait for the end; the objects go with the test."""
    made: list[str] = []

    def restore(snapshot: str, **spec: object) -> dict[str, Any]:
        made.append(stack.restore(fresh("back"), snapshot, **spec))
        return stack.wait_restore(made[-1])

    yield restore
    for name in made:
        stack.delete_restore(name)
    for body in stack.all("vmsnapshots.vmsnapshot.io"):
        if body["metadata"].get("labels", {}).get("vmsnapshot.io/safety-of") in made:
            stack.delete(body["metadata"]["name"])


def shell(guest: Guest, command: str) -> str:
    mounted = f"grep -q efivarfs /proc/mounts || {{ insmod /m/efivarfs.ko; mount -t efivarfs none {VARIABLES}; }}"
    return guest.control(["sh", "-c", f"{mounted}; {command}"], 60)


def write(guest: Guest, name: str) -> None:
    """Add a variable of ours: Linux lets nobody change it afterwards."""
    shell(guest, rf"printf '\007\000\000\000lab' > {VARIABLES}/Lab{name}-{OURS}")


def there(guest: Guest) -> set[str]:
    """Our variables."""
    listed = shell(guest, f"ls {VARIABLES}").split()
    return {name.removeprefix("Lab").removesuffix(f"-{OURS}") for name in listed if name.endswith(OURS)}


def held(stack: Stack, name: str) -> dict[str, dict[str, Any]]:
    """The volumes in the content, by target."""
    content = stack.content(name)
    assert content is not None
    return {v["target"]: v for v in content["spec"]["volumes"]}


def claims(body: dict[str, Any]) -> dict[str, str]:
    return {v["target"]: v["consistency"] for v in body["status"]["volumes"]}


def test_they_are_captured_with_the_disks_and_set_back_with_them(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    variables: Path,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    guest.up()
    write(guest, "Before")
    snapshot = vmsnapshot("uefi", domain=guest.name, quiesce={"policy": "Require"})
    body = stack.wait(snapshot)
    assert claims(body) == {"vda": "Filesystem", "vdb": "Filesystem", "nvram": "Filesystem"}
    assert "excluded" not in body["status"]
    cut = Path(held(stack, snapshot)["nvram"]["handle"])
    assert cut.read_bytes() == variables.read_bytes(), "nobody has written to it since"

    write(guest, "After")
    assert there(guest) == {"Before", "After"}
    assert cut.read_bytes() != variables.read_bytes(), "the guest's writes reach the file at once"
    restored = vmrestore(snapshot)
    assert not guest.domain().isActive()
    assert variables.read_bytes() == cut.read_bytes()
    safety = restored["status"]["safetySnapshotName"]
    later = Path(held(stack, safety)["nvram"]["handle"])
    assert later.read_bytes() != cut.read_bytes(), "as they were is in the safety snapshot"
    content = stack.content(snapshot)
    assert content is not None
    assert proof.of_domain(lab, guest.domain(), tmp_path).records == proof.read(lab, content, tmp_path).records
    guest.up()
    assert there(guest) == {"Before"}

    # Boot entries alone: the disks stay, and the VM is set back all the same only while it is off.
    write(guest, "Broken")
    records = guest.records()
    alone = vmrestore(snapshot, volumes={"include": ["nvram"]}, safetySnapshot=False)
    assert "disk vda, vdb stays as it is" in conditions(alone)["Planned"]["message"]
    assert variables.read_bytes() == cut.read_bytes()
    assert min(proof.of_domain(lab, guest.domain(), tmp_path).records.values()) >= records
    guest.up()
    assert there(guest) == {"Before"}
    stack.delete(snapshot)
    assert not cut.exists()


def test_another_vm_gets_a_copy_of_its_own(
    lab: Lab,
    stack: Stack,
    guest: Guest,
    variables: Path,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., dict[str, Any]],
    fresh: Callable[[str], str],
) -> None:
    guest.up()
    snapshot = vmsnapshot("uefi", domain=guest.name)
    stack.wait(snapshot)
    cut = Path(held(stack, snapshot)["nvram"]["handle"]).read_bytes()
    new = fresh("demo-uefi-new")
    try:
        vmrestore(snapshot, mode="NewVM", newVM={"name": new})
        domain = lab.libvirt().lookupByName(new)
        element = ET.fromstring(domain.XMLDesc()).find("os/nvram")  # noqa: S314 - libvirt's own
        assert element is not None
        own = Path(element.text or "")
        assert own != variables
        assert own.read_bytes() == cut
        domain.create()
        assert domain.isActive()
        stack.delete(snapshot)
        assert own.exists()
    finally:
        proof.remove_vm(lab, new)
    assert not own.exists()
    assert not [x for x in proof.leftovers(lab) if new in x]


def test_beside_disks_on_overlays(stack: Stack, guest: Guest, vmsnapshot: Callable[..., str]) -> None:
    guest.up()
    body = stack.wait(vmsnapshot("uefi", domain=guest.name, quiesce={"method": "HypervisorSnapshot"}))
    assert claims(body) == {"vda": "Filesystem", "vdb": "Filesystem", "nvram": "Filesystem"}
    assert "2 disks on overlays" in conditions(body)["Quiesced"]["message"]


def test_what_the_guest_writes_meanwhile_is_of_a_moment_of_its_own(
    stack: Stack, guest: Guest, vmsnapshot: Callable[..., str]
) -> None:
    guest.up()
    once = rf'i=$(((i+1)%10)); printf "\007\000\000\000n$i" > {CHANGED}; usleep 50000'
    shell(guest, f"touch /run/busy; (while [ -e /run/busy ]; do {once}; done) > /dev/null 2>&1 < /dev/null &")
    until("the guest writes variables", lambda: "DriverOrder" in shell(guest, f"ls {VARIABLES}"))
    try:
        body = stack.wait(vmsnapshot("uefi", domain=guest.name))
        assert claims(body) == {"vda": "Filesystem", "vdb": "Filesystem", "nvram": "PerVolume"}
        assert body["status"]["consistency"] == "PerVolume"
        (found,) = [v for v in body["status"]["volumes"] if v["target"] == "nvram"]
        assert "written" in found["consistencyReason"]
    finally:
        guest.control(["rm", "-f", "/run/busy"])


def test_of_a_vm_that_is_off_any_storage_holds_them(
    lab: Lab, stack: Stack, vmsnapshot: Callable[..., str], vmrestore: Callable[..., dict[str, Any]]
) -> None:
    """On a file system that must copy; and the file was made past the pool, which does not know it yet."""
    path = lab.pool_path("plain") / "demo-off_VARS.fd"
    stub = lab.domain_stub("demo-off", firmware=firmware(path), started=False)
    path.write_bytes(before := os.urandom(131_072))
    try:
        snapshot = vmsnapshot("off", domain=stub.name)
        assert claims(stack.wait(snapshot)) == {"vda": "Crash", "nvram": "Crash"}
        path.write_bytes(os.urandom(131_072))
        vmrestore(snapshot, safetySnapshot=False)
        assert path.read_bytes() == before

        stub.domain().create()  # its firmware finds nothing to boot; a class that must copy cannot take what a VM writes to
        body = stack.wait(vmsnapshot("off", domain=stub.name))
        (excluded,) = body["status"]["excluded"]
        assert (excluded["name"], excluded["rule"]) == ("nvram", "NVRAM")
        assert "cannot cut in an instant" in excluded["message"]
    finally:
        stub.remove()
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("folder", "words"), [("reflink", "is not in the pool reflink"), ("nowhere", "no StorageDriverClass matches")]
)
def test_what_no_class_takes_is_said_and_so_is_that_it_stays(
    lab: Lab,
    stack: Stack,
    folder: str,
    words: str,
    vmsnapshot: Callable[..., str],
    vmrestore: Callable[..., dict[str, Any]],
) -> None:
    """A VM that never ran has no variables of its own yet; or they lie in no pool."""
    path = (lab.pool_path("reflink") if folder == "reflink" else Path("/nowhere")) / "demo-none_VARS.fd"
    stub = lab.domain_stub("demo-none", firmware=firmware(path), started=False)
    try:
        snapshot = vmsnapshot("none", domain=stub.name)
        body = stack.wait(snapshot)
        assert claims(body) == {"vda": "Crash"}
        (excluded,) = body["status"]["excluded"]
        assert excluded["rule"] == "NVRAM"
        assert words in excluded["message"]
        assert "StorageDriverClass" in excluded["message"]
        restored = vmrestore(snapshot, safetySnapshot=False)
        assert "stay as they are" in conditions(restored)["Planned"]["message"]
    finally:
        stub.remove()


def test_a_disk_cannot_be_called_so(lab: Lab) -> None:
    with pytest.raises(libvirt.libvirtError):
        lab.domain_stub(
            "demo-none",
            devices="<disk type='file'><source file='/nowhere'/><target dev='nvram' bus='virtio'/></disk>",
            started=False,
        )
