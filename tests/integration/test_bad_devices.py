"""What a VM may have that a snapshot cannot hold: refused by name, left out by rule and listed, or claimed as less.

The domains are off and never start: libvirt takes devices into a definition that are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from xml.sax.saxutils import quoteattr

import libvirt
import pytest

from tests.integration.outcomes import refused
from tests.lab import Lab
from tests.lab.guests import Guest
from tests.stack import Stack, conditions, until

FILE = "<source file='/nowhere/extra.raw'/>"
PCI = "<address domain='0' bus='0' slot='31' function='0'/>"


def disk(
    more: str = "", source: str = FILE, target: str = "vdb", bus: str = "virtio", kind: str = "file", driver: str = ""
) -> str:
    device, _, kind = ("disk", "", kind) if ":" not in kind else kind.partition(":")
    return (
        f"<disk type='{kind}' device='{device}'><driver name='qemu' type='raw' {driver}/>{source}"
        f"<target dev='{target}' bus='{bus}'/>{more}</disk>"
    )


LUKS = "<encryption format='luks'><secret type='passphrase' uuid='0a81f5b2-8403-7b23-c8d6-21ccc2f80d6f'/></encryption>"
LUN = disk(source="<source dev='/dev/nowhere'/>", target="sda", bus="scsi", kind="lun:block")
NVME = disk(source=f"<source type='pci' managed='yes' namespace='1'>{PCI}</source>", kind="nvme")
HOSTDEV = f"<hostdev mode='subsystem' type='pci' managed='no'><source>{PCI}</source></hostdev>"
SHARED = "<filesystem type='mount' accessmode='mapped'><source dir='/srv'/><target dir='share'/></filesystem>"
NVRAM = "<loader readonly='yes' type='pflash'>/nowhere/code.fd</loader><nvram>/nowhere/vars.fd</nvram>"
TPM = "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>"
CDROM = disk(source="", target="hda", bus="ide", kind="cdrom:file")
FLOPPY = disk(source="", target="fda", bus="fdc", kind="floppy:file")
READ_ONLY = disk("<readonly/>")
UNSAFE = disk(driver="cache='unsafe'")


REFUSED = {
    "shareable": (disk("<shareable/>"), "vdb", "disk vdb is shareable"),
    "transient": (disk("<transient/>"), "vdb", "disk vdb is transient"),
    "encrypted": (disk(LUKS), "vdb", "disk vdb is encrypted"),
    "lun": (LUN, "sda", "disk sda is a passed-through LUN"),
    "nvme": (NVME, "vdb", "disk vdb is a passed-through LUN"),
    "hostdev": (HOSTDEV, "hostdev0", "device hostdev0: a passed-through device"),
    "shared-directory": (SHARED, "share", "device share: a shared directory"),
}
LEFT_OUT = {
    "read-only": (READ_ONLY, "", {"vdb": "ReadOnly"}),
    "removable": (CDROM + FLOPPY, "", {"hda": "RemovableMedia", "fda": "RemovableMedia"}),
    "nvram": ("", NVRAM, {"nvram": "NVRAM"}),
    "tpm": (TPM, "", {"tpm": "TPM"}),
}


@pytest.fixture(scope="module")
def taken(lab: Lab, stack: Stack) -> Iterator[dict[str, str]]:
    """A VMSnapshot of each, by case; all at once, since a refusal is not final at once."""
    cases = {c: (devices, "") for c, (devices, _, _) in REFUSED.items()}
    cases |= {c: (devices, firmware) for c, (devices, firmware, _) in LEFT_OUT.items()}
    made = [
        lab.domain_stub(f"demo-odd-{c}", devices=devices, firmware=firmware, started=False)
        for c, (devices, firmware) in cases.items()
    ]
    names = {c: stack.snapshot(f"odd-{c}", f"demo-odd-{c}") for c in cases}
    yield names
    for name in names.values():
        stack.delete(name, wait=False)
    until("all are gone", lambda: not any(stack.get(n) for n in names.values()))
    for stub in made:
        stub.remove()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_touched(stack: Stack, taken: dict[str, str], case: str) -> None:
    _, _, words = REFUSED[case]
    assert words in refused(stack, taken[case], "UnsupportedDisk")


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_refused_may_be_left_out_on_purpose(
    stack: Stack, vmsnapshot: Callable[..., str], taken: dict[str, str], case: str
) -> None:
    _, name, _ = REFUSED[case]
    planned = vmsnapshot("odd", domain=f"demo-odd-{case}", volumes={"exclude": [name]}, dryRun=True)
    status = stack.wait(planned, "Planned")["status"]
    assert {e["name"]: e["rule"] for e in status["excluded"]} == {name: "ByRequest"}
    assert [v["target"] for v in status["volumes"]] == ["vda"]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_left_out_by_rule_and_listed(stack: Stack, taken: dict[str, str], case: str) -> None:
    _, _, excluded = LEFT_OUT[case]
    body = stack.wait(taken[case])
    assert {e["name"]: e["rule"] for e in body["status"]["excluded"]} == excluded
    assert {v["target"]: v["consistency"] for v in body["status"]["volumes"]} == {"vda": "Crash"}
    notes = conditions(body)["Planned"]["message"]
    assert all((name in notes) == (rule in ("NVRAM", "TPM")) for name, rule in excluded.items()), notes


@pytest.fixture
def odd(lab: Lab) -> Iterator[Callable[[str], Guest]]:
    made: list[Guest] = []

    def make(devices: str) -> Guest:
        made.append(lab.domain_stub("demo-odd", devices=devices, started=False))
        return made[-1]

    yield make
    for stub in made:
        stub.remove()


def test_a_disk_without_a_source_is_refused_by_libvirt_itself(odd: Callable[[str], Guest]) -> None:
    with pytest.raises(libvirt.libvirtError, match="missing source"):
        odd(disk(source=""))


def test_a_cache_that_ignores_flushes_claims_nothing(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str], odd: Callable[[str], Guest]
) -> None:
    source = lab.pool_path("reflink") / "demo-unsafe.raw"
    source.touch()
    try:
        stub = odd(UNSAFE.replace(FILE, f"<source file={quoteattr(str(source))}/>"))
        status = stack.wait(vmsnapshot("odd", domain=stub.name))["status"]
        assert status["consistency"] == "Unknown"
        assert {v["target"]: v["consistency"] for v in status["volumes"]} == {"vda": "Crash", "vdb": "Unknown"}
    finally:
        source.unlink(missing_ok=True)


def test_a_cache_that_ignores_flushes_is_refused_by_require(
    stack: Stack, lab: Lab, vmsnapshot: Callable[..., str]
) -> None:
    domain = lab.guest("demo").domain()
    source = lab.pool_path("reflink") / "demo-plugged.raw"
    source.write_bytes(bytes(1 << 20))
    plugged = UNSAFE.replace(FILE, f"<source file={quoteattr(str(source))}/>").replace("vdb", "vdx")
    domain.attachDevice(plugged)
    try:
        message = refused(stack, vmsnapshot("unsafe", quiesce={"policy": "Require"}), "PolicyNotMet")
        assert "disk vdx has cache=unsafe" in message
    finally:
        domain.detachDevice(plugged)
        until("the disk is unplugged", lambda: "vdx" not in domain.XMLDesc())
        source.unlink()
