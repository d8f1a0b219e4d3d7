"""Overlays as a host shows them: found in its pools and among its VMs' disks, read before they are called ours, removed if unused."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

import libvirt
import pytest

from vmsnapshot_operator.core import qcow2
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import overlays
from vmsnapshot_operator.hypervisors.domains import Hypervisor

NEW = qcow2.overlay(64 << 20, "/pool/base", "raw")
INACTIVE = libvirt.VIR_DOMAIN_XML_INACTIVE


def error(code: int) -> libvirt.libvirtError:
    """libvirt's error with this code."""
    made = libvirt.libvirtError("fake")
    made.err = (code, 0, "fake", 0, None, None, None, 0, 0)
    return made


@dataclass
class Volume:
    label: str
    content: bytes | None
    deleted: bool = False
    backing: str = ""

    def name(self) -> str:
        return self.label

    def path(self) -> str:
        return f"/pool/{self.label}"

    def XMLDesc(self) -> str:  # noqa: N802 - libvirt's name
        if self.content is None:
            raise error(libvirt.VIR_ERR_NO_STORAGE_VOL)
        return (
            f"<volume><capacity>{64 << 20}</capacity><allocation>{len(self.content)}</allocation>"
            f"<physical>{len(self.content)}</physical>"
            + (f"<backingStore><path>{self.backing}</path></backingStore>" if self.backing else "")
            + "</volume>"
        )

    def download(self, stream: Stream, *_: int) -> None:
        stream.left = self.content or b""

    def delete(self, _flags: int) -> None:
        self.deleted = True


class Stream:
    left = b""

    def recv(self, count: int) -> bytes:
        part, self.left = self.left[:count], self.left[count:]
        return part

    def finish(self) -> None:
        assert not self.left


@dataclass
class Domain:
    label: str
    live: str = ""
    saved: str = ""
    is_in: tuple[int, int] = (libvirt.VIR_DOMAIN_RUNNING, 0)

    def state(self) -> tuple[int, int]:
        return self.is_in

    def diskErrors(self) -> dict[str, int]:  # noqa: N802 - libvirt's name
        return {}

    def name(self) -> str:
        return self.label

    def isPersistent(self) -> int:  # noqa: N802 - libvirt's name
        return 1

    def XMLDesc(self, flags: int) -> str:  # noqa: N802 - libvirt's name
        source = self.saved if flags == INACTIVE else self.live
        return (
            f"<domain><metadata><journal x='/pool/ovl-abcdef-x'/></metadata>"
            f"<devices><disk type='file'><source file='{source}'/><target dev='vda'/></disk></devices></domain>"
        )


@dataclass
class Connection:
    """A host with one pool."""

    volumes: list[Volume] = field(default_factory=list)
    domains: list[Domain] = field(default_factory=list)
    busy: bool = False

    def listAllStoragePools(self, _flags: int) -> list[Connection]:  # noqa: N802 - libvirt's name
        return [self]

    def storagePoolLookupByTargetPath(self, path: str) -> Connection:  # noqa: N802 - libvirt's name
        assert path == "/pool"
        return self

    def storageVolLookupByName(self, name: str) -> Volume:  # noqa: N802 - libvirt's name
        for volume in self.volumes:
            if volume.label == name:
                return volume
        raise error(libvirt.VIR_ERR_NO_STORAGE_VOL)

    def lookupByName(self, name: str) -> Domain:  # noqa: N802 - libvirt's name
        for domain in self.domains:
            if domain.label == name:
                return domain
        raise error(libvirt.VIR_ERR_NO_DOMAIN)

    def listAllDomains(self) -> list[Domain]:  # noqa: N802 - libvirt's name
        return self.domains

    def listAllVolumes(self) -> list[Volume]:  # noqa: N802 - libvirt's name
        return self.volumes

    def newStream(self, _flags: int) -> Stream:  # noqa: N802 - libvirt's name
        return Stream()

    def name(self) -> str:
        return "pool"

    def refresh(self, _flags: int) -> None:
        if self.busy:
            raise error(libvirt.VIR_ERR_OPERATION_INVALID)


def survey(host: Connection) -> dict[str, OverlayFile]:
    return {f.name: f for f in overlays.survey(host, "host", "ovl-abcdef-", "pool")}


def test_all_that_bear_the_name_are_found_and_nothing_else() -> None:
    host = Connection(
        volumes=[Volume("ovl-abcdef-new", NEW), Volume("ovl-zzzzzz-theirs", NEW), Volume("base", b"data")],
        domains=[Domain("vm", live="/elsewhere/ovl-abcdef-far"), Domain("other", saved="/pool/base")],
    )
    assert survey(host) == {
        "ovl-abcdef-new": OverlayFile(path="/pool/ovl-abcdef-new", endpoint="host", pristine=True, genuine=True),
        "ovl-abcdef-far": OverlayFile(path="/elsewhere/ovl-abcdef-far", endpoint="host", domain="vm"),
    }


def test_a_vm_that_stands_still_on_one_is_told_as_such() -> None:
    still = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)
    host = Connection(
        domains=[Domain("a", live="/p/ovl-abcdef-a", is_in=still), Domain("b", live="/p/ovl-abcdef-b")],
    )
    assert {n: f.stalled for n, f in survey(host).items()} == {"ovl-abcdef-a": True, "ovl-abcdef-b": False}


@pytest.mark.parametrize("place", ["live", "saved"])
def test_one_that_a_vm_has_is_used_wherever_its_definition_says_so(place: str) -> None:
    path = "/pool/ovl-abcdef-new"
    host = Connection(volumes=[Volume("ovl-abcdef-new", NEW)], domains=[Domain("vm", **{place: path})])
    assert survey(host)["ovl-abcdef-new"].domain == "vm"
    with pytest.raises(HypervisorError, match="is used by a VM"):
        overlays.remove_pristine(host, path)
    assert not host.volumes[0].deleted


@pytest.mark.parametrize(
    ("content", "pristine", "genuine"),
    [
        (NEW, True, True),
        (NEW + bytes(qcow2.CLUSTER), False, False),
        (bytes(len(NEW)), True, False),
        (b"", True, False),
    ],
)
def test_what_is_empty_and_ours_is_told_from_what_is_not(content: bytes, pristine: bool, genuine: bool) -> None:
    found = survey(Connection(volumes=[Volume("ovl-abcdef-new", content)]))["ovl-abcdef-new"]
    assert (found.pristine, found.genuine) == (pristine, genuine)


def test_one_that_goes_away_meanwhile_is_none_and_a_busy_pool_is_read_as_it_is_known() -> None:
    host = Connection(volumes=[Volume("ovl-abcdef-gone", None), Volume("ovl-abcdef-new", NEW)], busy=True)
    assert list(survey(host)) == ["ovl-abcdef-new"]


def test_only_what_is_still_empty_is_removed() -> None:
    host = Connection(volumes=[Volume("ovl-abcdef-new", NEW), Volume("ovl-abcdef-full", NEW + bytes(qcow2.CLUSTER))])
    overlays.remove_pristine(host, "/pool/ovl-abcdef-new")
    assert host.volumes[0].deleted
    with pytest.raises(HypervisorError, match="was written to meanwhile"):
        overlays.remove_pristine(host, "/pool/ovl-abcdef-full")
    assert not host.volumes[1].deleted
    overlays.remove_pristine(host, "/pool/ovl-abcdef-gone")


async def test_a_pool_that_hangs_takes_one_worker_of_libvirtd_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    end, looks = threading.Event(), 0

    def hang(*_: object) -> tuple[OverlayFile, ...]:
        nonlocal looks
        looks += 1
        end.wait(30)
        return ()

    monkeypatch.setattr(overlays, "survey", hang)
    monkeypatch.setattr(overlays, "POOL_TIMEOUT", Seconds(0.2))
    client = Hypervisor("lab", {"host": "test:///default"})
    try:
        for _ in range(3):
            _, problems = await client.overlay_files("ovl-")
            assert problems
        assert looks == 1
        end.set()
        async with asyncio.timeout(30):
            while (await client.overlay_files("ovl-"))[1]:  # noqa: ASYNC110 - it is asked, and does not tell
                await asyncio.sleep(0.01)
    finally:
        end.set()
        await client.close()


def test_one_on_which_another_image_lies_is_not_removed() -> None:
    """A VM that is off names only the top of its chain: the snapshot that somebody else made of it."""
    host = Connection(
        [Volume("ovl-abcdef-a", NEW), Volume("theirs", b"", backing="/pool/ovl-abcdef-a"), Volume("vanished", None)],
        [Domain("vm", saved="/pool/theirs")],
    )
    with pytest.raises(HypervisorError, match="beneath /pool/theirs"):
        overlays.remove_pristine(host, "/pool/ovl-abcdef-a")
    assert not host.volumes[0].deleted


@pytest.mark.parametrize(
    "nvram", ["<nvram>/pool/vars.fd</nvram>", "<nvram type='file'><source file='/pool/vars.fd'/></nvram>"]
)
def test_the_file_of_a_firmwares_variables_is_used(nvram: str) -> None:
    class Firmware(Domain):
        def XMLDesc(self, _flags: int = 0) -> str:  # noqa: N802 - libvirt's name
            return f"<domain><metadata><x y='/pool/no'/></metadata><os>{nvram}</os><devices/></domain>"

    found = overlays.users(Connection(domains=[Firmware("vm", live="")]))
    assert found["/pool/vars.fd"] == "vm"
    assert "/pool/no" not in found
