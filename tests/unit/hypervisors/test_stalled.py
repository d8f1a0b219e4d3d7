"""Whether a VM stands still by an overlay of ours, as libvirt tells it; only such a one is resumed."""

from __future__ import annotations

from dataclasses import replace

import libvirt
import pytest

from tests.unit.quiesce.fake_libvirt import a_journal
from vmsnapshot_operator.core.journal import Phase
from vmsnapshot_operator.core.volumes import Layer, SourceKind, volume_id
from vmsnapshot_operator.hypervisors import domain_journals, overlays

IO_ERROR = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)
BY_HAND = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER)
RUNS = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_RUNNING_UNPAUSED)
OURS = {str(volume_id(Layer(kind=SourceKind.FILE, source="/base", format="raw"))): "/over"}
NO_SPACE = libvirt.VIR_DOMAIN_DISK_ERROR_NO_SPACE


def disk(target: str, path: str, form: str) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{form}'/><source file='{path}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
    )


class Domain:
    """A VM with one disk that has an overlay or had one, and another."""

    def __init__(self, state: tuple[int, int], failed: tuple[str, ...], path: str = "/over") -> None:
        self.is_in, self.failed, self.path = state, failed, path
        self.resumed = False

    def state(self) -> tuple[int, int]:
        return self.is_in

    def diskErrors(self) -> dict[str, int]:  # noqa: N802 - libvirt's name
        return dict.fromkeys(self.failed, NO_SPACE)

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        disks = disk("vda", self.path, "qcow2" if self.path == "/over" else "raw") + disk("vdb", "/other", "raw")
        return f"<domain><name>vm</name><devices>{disks}</devices></domain>"

    def resume(self) -> None:
        self.resumed = True


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        (Domain(IO_ERROR, ("vda",)), True),
        (Domain(IO_ERROR, ("vda",), "/base"), True),
        (Domain(IO_ERROR, ()), True),
        (Domain(IO_ERROR, ("vdb",)), False),
        (Domain(IO_ERROR, ("vda",), "/elsewhere"), False),
        (Domain(IO_ERROR, (), "/elsewhere"), False),
        (Domain(BY_HAND, ("vda",)), False),
        (Domain(RUNS, ("vda",)), False),
    ],
    ids=["on it", "off it", "not said where", "another disk", "replaced", "none of ours", "by a person", "runs"],
)
def test_whether_it_stands_still_by_us(domain: Domain, expected: bool) -> None:
    assert overlays.stalled(domain, OURS) is expected


class Hangs(Domain):
    """One whose QEMU does not answer."""

    def diskErrors(self) -> dict[str, int]:  # noqa: N802 - libvirt's name
        pytest.fail("QEMU was asked")

    def UUIDString(self) -> str:  # noqa: N802 - libvirt's name
        return "u"

    def name(self) -> str:
        return "vm"


@pytest.mark.parametrize(
    ("domain", "expected"),
    [(Hangs(IO_ERROR, ()), True), (Hangs(IO_ERROR, (), "/elsewhere"), False), (Hangs(RUNS, ()), False)],
    ids=["on it", "none of ours", "runs"],
)
def test_who_looks_at_all_vms_of_a_host_asks_no_qemu(domain: Hangs, expected: bool) -> None:
    """One that hangs, as QEMU may where its storage does, would hide all others for as long."""
    journal = replace(a_journal(), phase=Phase.OVERLAID, overlays=OURS)
    assert domain_journals._sighting(domain, journal, "", "host").stalled is expected
    assert overlays.seen_stalled(lambda: domain, {"": "/over"}) is expected


@pytest.mark.parametrize(("state", "expected"), [(IO_ERROR, True), (BY_HAND, False), (RUNS, False)])
def test_one_that_a_person_has_paused_is_never_resumed(state: tuple[int, int], expected: bool) -> None:
    domain = Domain(state, ())
    overlays._resume(domain)
    assert domain.resumed is expected
