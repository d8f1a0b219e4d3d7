"""The definition of a new VM: what it has of its own, what it does not get, and what is refused rather than shared."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmsnapshot_operator.core.markers import Gate, Marker
from vmsnapshot_operator.core.volumes import Layer, SourceKind
from vmsnapshot_operator.errors import RefusedError
from vmsnapshot_operator.plan import definition, new_devices
from vmsnapshot_operator.plan import domain_tree as tree
from vmsnapshot_operator.plan.new_definition import Identity, NewDefinition, as_new_vm, genid

SAMPLES = {p.stem: p.read_text() for p in sorted((Path(__file__).parent / "domains").glob("*.xml"))}
MARKER = Marker(
    installation="abc234",
    restore="team-a/look-back",
    restore_uid="6f1d3c0a-58f2-4a57-9f0e-2d6f4a1b7c33",
    snapshot_uid="0c5f2f4e-9a17-4a35-b0d8-7f6a3a1e2d44",
)
IDENTITY = Identity(name="copy-1", seed=MARKER.restore_uid)


def file(path: str, image_format: str = "raw") -> Layer:
    return Layer(kind=SourceKind.FILE, source=path, format=image_format)


def block(path: str) -> Layer:
    return Layer(kind=SourceKind.BLOCK, source=path, format="raw")


def rbd(image: str, *hosts: str) -> Layer:
    return Layer(kind=SourceKind.NETWORK, source=image, format="raw", protocol="rbd", hosts=hosts)


def volume(name: str) -> Layer:
    return Layer(kind=SourceKind.VOLUME, source=name, format="raw", pool=name.split("/", maxsplit=1)[0])


SOURCES: dict[str, dict[str, Layer]] = {
    "rbd": {"vda": file("/pool/copy-a.raw"), "vdb": file("/pool/copy-b.raw"), "vdc": rbd("vms/copy")},
    "uefi": {"sda": block("/dev/vg0/copy")},
    "devices": {
        "vda": file("/vm/copy.qcow2", "qcow2"),
        "vdb": rbd("vms/copy", "mon9.example.org:6789", "mon8.example.org", "[fd00::1]:3300"),
        "vdd": volume("fast/copy"),
    },
}


def new(sample: str, sources: Mapping[str, Layer] | None = None) -> NewDefinition:
    return as_new_vm(SAMPLES[sample], IDENTITY, SOURCES[sample] if sources is None else sources, MARKER)


def root_of(sample: str) -> ET.Element:
    return tree.parse(new(sample).xml)


def with_devices(xml: str) -> str:
    """A small VM with one disk and these devices."""
    disk = "<disk type='file' device='disk'><source file='/vm/a.raw'/><target dev='vda'/></disk>"
    return f"<domain><name>a</name><devices><emulator>/usr/bin/qemu</emulator>{disk}{xml}</devices></domain>"


def small(xml: str) -> NewDefinition:
    return as_new_vm(with_devices(xml), IDENTITY, {"vda": file("/vm/copy.raw")}, MARKER)


# --- who it is ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_nothing_by_which_a_vm_is_known_is_the_old_ones(sample: str) -> None:
    before, after = tree.parse(SAMPLES[sample]), root_of(sample)
    assert after.findtext("name") == "copy-1"
    assert after.findtext("uuid") == IDENTITY.uuid != before.findtext("uuid")
    assert uuid.UUID(IDENTITY.uuid).version == 5
    assert (after.find("genid") is None) == (before.find("genid") is None)
    macs = {m.get("address") for m in after.iterfind("devices/interface/mac")}
    assert not macs & {m.get("address") for m in before.iterfind("devices/interface/mac")}
    assert len(macs) == len(after.findall("devices/interface"))
    assert SAMPLES[sample].count(before.findtext("uuid") or "?") >= 1
    assert (before.findtext("uuid") or "?") not in new(sample).xml, "the firmware's tables tell it, too"


def test_a_generation_id_tells_the_guest_that_it_is_a_copy() -> None:
    assert root_of("uefi").findtext("genid") == IDENTITY.genid == genid(MARKER.restore_uid)
    assert IDENTITY.genid != IDENTITY.uuid


def test_the_same_restore_makes_the_same_vm() -> None:
    assert [new(s) for s in SAMPLES] == [new(s) for s in SAMPLES]
    other = Identity(name="copy-1", seed="another")
    assert {other.uuid, other.genid, other.mac(0)}.isdisjoint({IDENTITY.uuid, IDENTITY.genid, IDENTITY.mac(0)})


@given(st.text(max_size=60), st.integers(0, 300))
def test_a_mac_is_local_and_of_one(seed: str, number: int) -> None:
    mac = Identity(name="a", seed=seed).mac(number)
    assert re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", mac)
    first = int(mac[:2], 16)
    assert first & 0b11 == 0b10, "locally administered, and of one station"
    assert first != 0xFE, "the host's end of an interface begins so"


def test_a_mac_that_the_old_vm_has_by_chance_is_passed_over() -> None:
    taken = f"<interface type='network'><mac address='{IDENTITY.mac(0).upper()}'/></interface><interface type='user'/>"
    found = [m.get("address") for m in tree.parse(small(taken).xml).iterfind("devices/interface/mac")]
    assert found == [IDENTITY.mac(1), IDENTITY.mac(2)]


@pytest.mark.parametrize("sample", SAMPLES)
def test_of_ours_only_the_new_marker_is_in_it(sample: str) -> None:
    gated = definition.gated(SAMPLES[sample], Gate(marker=MARKER, targets=tuple(SOURCES[sample])[:1], autostart=False))
    for text in (SAMPLES[sample], definition.restored(gated, MARKER, genid=IDENTITY.genid)):
        made = as_new_vm(text, IDENTITY, SOURCES[sample], MARKER).xml
        assert definition.done(made) == (MARKER,)
        assert made.count("vmsnapshot.io/") == 1
        assert definition.gate_of(made) is None
    assert ("libosinfo" in new(sample).xml) == ("libosinfo" in SAMPLES[sample]), "others' stays"


# --- disks -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_disks_are_the_copies_and_no_others(sample: str) -> None:
    made = tree.disks(root_of(sample))
    before = tree.disks(tree.parse(SAMPLES[sample]))
    for target, layer in SOURCES[sample].items():
        disk, source = made[target], made[target].find("source")
        assert source is not None
        assert disk.get("type") == layer.kind.value
        assert disk.find("driver").get("type") == layer.format  # type: ignore[union-attr]
        assert disk.find("backingStore") is None
        for kept in ("address", "serial", "boot"):
            old, now = before[target].find(kept), disk.find(kept)
            assert (old is None) == (now is None)
            assert old is None or now is None or old.attrib == now.attrib, "the guest finds it where it was"
    for target in made.keys() - SOURCES[sample].keys():
        assert new_devices.is_read_only(made[target]) or made[target].find("source") is None


def test_how_to_reach_a_copy_is_as_it_was() -> None:
    disk = tree.disks(root_of("devices"))["vdb"]
    source = tree.required(disk, "source")
    assert source.attrib == {"protocol": "rbd", "name": "vms/copy"}
    assert [h.attrib for h in source.findall("host")] == [
        {"name": "mon9.example.org", "port": "6789"},
        {"name": "mon8.example.org"},
        {"name": "fd00::1", "port": "3300"},
    ]
    assert tree.required(source, "config").get("file") == "/etc/ceph/ceph.conf"
    assert tree.required(disk, "auth/secret").get("usage") == "client.vms secret"
    assert source.find("snapshot") is None, "that was the old image's"
    assert tree.required(disk, "driver").get("cache") == "writeback"
    same_hosts = tree.disks(root_of("rbd"))["vdc"]
    assert tree.required(same_hosts, "source/host").attrib == {"name": "127.0.0.1", "port": "15200"}
    assert tree.required(same_hosts, "auth").get("username") == "libvirt"


def test_a_copy_elsewhere_takes_no_log_in_along() -> None:
    made = tree.disks(tree.parse(new("rbd", {"vdc": file("/pool/c.raw")}).xml))
    assert made.keys() == {"vdc"}
    assert made["vdc"].find("auth") is None
    assert [c.tag for c in tree.required(made["vdc"], "source")] == []
    made = tree.disks(tree.parse(new("rbd", {"vda": rbd("vms/a", "/run/nbd.sock")}).xml))
    assert tree.required(made["vda"], "source/host").attrib == {"transport": "unix", "socket": "/run/nbd.sock"}


def test_what_is_encrypted_stays_so() -> None:
    disk = tree.disks(root_of("devices"))["vdd"]
    assert tree.required(disk, "source").get("pool") == "fast"
    assert next(disk.iter("encryption")).find("secret").get("usage") == "vdd"  # type: ignore[union-attr]


def test_a_copy_may_have_another_format() -> None:
    disk = tree.disks(tree.parse(new("devices", {"vda": file("/vm/copy.raw")}).xml))["vda"]
    assert tree.required(disk, "driver").get("type") == "raw"
    assert disk.find("driver/metadata_cache") is None
    assert tree.required(disk, "source").attrib == {"file": "/vm/copy.raw"}, "and is not optional"
    kept = tree.disks(root_of("devices"))["vda"]
    assert kept.find("driver/metadata_cache") is not None
    assert tree.required(kept, "alias").get("name") == "ua-root"


def test_drives() -> None:
    made = tree.disks(root_of("devices"))
    assert made["fda"].find("source") is None, "a floppy can be written to"
    assert tree.required(made["vde"], "source").get("file") == "/vm/licences.raw"
    assert tree.required(tree.disks(root_of("uefi"))["sdb"], "source").get("file") == "/srv/iso/virtio-win.iso"


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ({}, "would be empty"),
        ({"vdx": file("/c")}, "the VM has no disk vdx, but vda, vdb, vdc"),
        ({"vda": file("/c"), "vdb": file("/c")}, "cannot be the same copy"),
        ({"vda": file("/srv/lab/pools/reflink/demo-vda.raw")}, "demo-vda.raw"),
        ({"vda": file("/srv/lab/pools/reflink/demo-vdb.raw")}, "demo-vdb.raw"),
        ({"vdc": rbd("vms/demo-c")}, "rbd vms/demo-c"),
    ],
)
def test_a_copy_that_is_none_is_refused(sources: Mapping[str, Layer], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        new("rbd", sources)


def test_a_slice_is_refused() -> None:
    text = with_devices("").replace(
        "'/vm/a.raw'/>", "'/vm/a.raw'><slices><slice type='storage' offset='0' size='9'/></slices></source>"
    )
    with pytest.raises(RefusedError, match="a slice of a larger image"):
        as_new_vm(text, IDENTITY, {"vda": file("/vm/copy.raw")}, MARKER)


# --- devices -----------------------------------------------------------------------------------------------------------------


def test_what_was_not_snapshotted_is_not_in_it() -> None:
    made = new("devices")
    devices = tree.devices(tree.parse(made.xml))
    assert [f.find("target").get("dir") for f in devices.findall("filesystem")] == ["docs"]  # type: ignore[union-attr]
    for tag in ("hostdev", "shmem", "memory", "tpm"):
        assert devices.find(tag) is None
    assert {i.get("type") for i in devices.findall("interface")} == {"network", "bridge", "direct"}
    for what in ("shared directory", "device of the host", "persistent memory", "memory shared between", "vdc"):
        assert any(what in note for note in made.notes), what


def test_sockets_and_logs_are_its_own() -> None:
    made = new("devices").xml
    for path in ("/run/consoles/app-1-copy-1.sock", "/var/log/app-1-copy-1.log", "/run/app-1-copy-1.sock"):
        assert path in made
    assert "/var/log/app-1-copy-1.serial" in made
    for old in ("/run/consoles/app-1.sock", "/var/log/app-1.log", "/run/app-1.sock", "4555", "ttyS0", "channel/target"):
        assert old not in made
    assert [s.get("type") for s in tree.parse(made).iterfind("devices/serial")] == ["unix", "pty", "file", "pty"]


def test_a_socket_whose_path_would_be_too_long() -> None:
    path = "/run/" + "a" * 95 + ".sock"
    with pytest.raises(RefusedError, match="would be longer than the 107 bytes"):
        small(f"<channel type='unix'><source mode='bind' path='{path}'/><target type='virtio' name='x'/></channel>")


def test_ports_of_switches_and_ends_of_the_host_are_its_own() -> None:
    devices = tree.devices(root_of("devices"))
    assert devices.find("interface/target") is None
    assert tree.required(devices, "interface/virtualport/parameters").attrib == {"profileid": "app"}
    assert tree.required(devices, "vsock/cid").attrib == {"auto": "yes"}


def test_displays() -> None:
    made = new("uefi")
    spice, vnc = tree.parse(made.xml).findall("devices/graphics")
    assert spice.get("passwd") == "sesame", "whoever knew it may see the copy as well"
    assert spice.get("passwdValidTo") is None
    assert vnc.get("passwdValidTo") == "1970-01-01T00:00:01"
    assert {d.get("autoport") for d in (spice, vnc)} == {"yes"}
    assert "5910" not in made.xml
    assert "5912" not in made.xml
    assert [n for n in made.notes if "locked" in n] == [
        "its vnc display is locked until an administrator sets a password"
    ]


@pytest.mark.parametrize(
    "xml",
    [
        "<graphics type='vnc' listen='127.0.0.1'><listen type='address' address='127.0.0.1'/></graphics>",
        "<graphics type='spice'><listen type='none'/></graphics>",
        "<graphics type='vnc' socket='/run/a.sock'><listen type='socket' socket='/run/a.sock'/></graphics>",
        "<graphics type='egl-headless'/>",
    ],
)
def test_a_display_that_the_network_does_not_reach_is_not_locked(xml: str) -> None:
    made = small(xml)
    assert "passwd" not in made.xml
    assert "/run/a.sock" not in made.xml


def test_an_emulated_tpm_begins_anew() -> None:
    made = small("<tpm model='tpm-crb'><backend type='emulator'><source type='dir' path='/tpm/a'/></backend></tpm>")
    assert tree.required(tree.parse(made.xml), "devices/tpm/backend").attrib == {"type": "emulator"}
    assert "/tpm/a" not in made.xml
    assert any("TPM is a new one" in n for n in made.notes)


def test_what_only_a_run_knows_is_not_in_it() -> None:
    live = with_devices(
        "<console type='pty' tty='/dev/pts/3'><source path='/dev/pts/3'/><alias name='serial0'/></console>"
        "<channel type='unix'><source mode='bind' path='/run/libvirt/qemu/channel/3-a/org.qemu.guest_agent.0'/>"
        "<target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>"
    ).replace("<domain>", "<domain type='kvm' id='3'><seclabel type='dynamic'><label>x</label></seclabel>")
    made = as_new_vm(live, IDENTITY, {"vda": file("/vm/copy.raw")}, MARKER).xml
    for word in ("id='3'", 'id="3"', "pts", "serial0", "seclabel", "3-a"):
        assert word not in made
    assert "org.qemu.guest_agent.0" in made


@pytest.mark.parametrize("sample", SAMPLES)
def test_nothing_that_two_vms_may_not_share_is_in_both(sample: str) -> None:
    before, after = (new_devices.belongings(r) for r in (tree.parse(SAMPLES[sample]), root_of(sample)))
    assert before
    assert not before & after


@pytest.mark.parametrize(
    "xml",
    [
        "<pstore backend='acpi-erst'><path>/var/a.pstore</path></pstore>",
        "<audio id='1' type='file' path='/var/a.wav'/>",
        "<rng model='virtio'><backend model='egd' type='unix'><source mode='connect' path='/run/egd'/></backend></rng>",
        "<invented><by somebody='/var/a'/></invented>",
    ],
)
def test_a_path_of_a_device_that_is_not_known_is_refused(xml: str) -> None:
    with pytest.raises(RefusedError, match=r"nobody can tell whether a second VM may use .*: /(var|run)/"):
        small(xml)


@pytest.mark.parametrize(
    "xml",
    [
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>",
        "<interface type='bridge'><backend tap='/dev/net/tun' vhost='/dev/vhost-net'/><rom file='/usr/share/a.rom'/></interface>",
        "<video><driver vgaconf='io'/><model type='virtio'><acceleration rendernode='/dev/dri/renderD128'/></model></video>",
        "<disk type='file' device='cdrom'><source file='/srv/a.iso'/><target dev='sda'/></disk>",
    ],
)
def test_what_any_number_of_vms_may_use_stays(xml: str) -> None:
    path = re.search(r"/(dev|usr|srv)/[^'<]*", xml)
    assert path is not None
    assert path[0] in small(xml).xml


def test_arguments_past_libvirt_are_refused() -> None:
    schema = "http://libvirt.org/schemas/domain/qemu/1.0"
    arguments = (
        "<{0}:commandline{1}><{0}:arg value='-drive'/><{0}:arg value='file=/vm/a.raw'/></{0}:commandline></domain>"
    )
    plain = with_devices("")
    for prefix, where in (("qemu", "root"), ("q", "root"), ("q", "element")):
        own = f" xmlns:{prefix}='{schema}'"
        text = plain.replace("<domain", f"<domain{own}", 1) if where == "root" else plain
        text = text.replace("</domain>", arguments.format(prefix, "" if where == "root" else own))
        with pytest.raises(RefusedError, match="qemu:commandline"):
            as_new_vm(text, IDENTITY, {"vda": file("/vm/copy.raw")}, MARKER)


# --- firmware ---------------------------------------------------------------------------------------------------------------


def firmware(xml: str, **copied: Layer) -> tuple[ET.Element, tuple[str, ...]]:
    text = with_devices("").replace("<devices>", f"<os>{xml}</os><devices>")
    made = as_new_vm(text, IDENTITY, {"vda": file("/vm/copy.raw"), **copied}, MARKER)
    return tree.required(tree.parse(made.xml), "os"), made.notes


def test_firmware_variables_are_its_own() -> None:
    found = tree.required(root_of("uefi"), "os/nvram")
    assert found.get("template") == "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"
    assert found.text == f"/var/lib/libvirt/qemu/nvram/copy-1-{IDENTITY.uuid[:8]}_VARS.fd"
    assert any("begin anew" in n for n in new("uefi").notes)
    copied = new("uefi", {**SOURCES["uefi"], "nvram": file("/nvram/copy.fd")})
    assert tree.required(tree.parse(copied.xml), "os/nvram").text == "/nvram/copy.fd"
    assert not any("begin anew" in n for n in copied.notes)


@pytest.mark.parametrize(
    ("xml", "path"),
    [
        ("<nvram>/n/a.qcow2</nvram>", f"/n/copy-1-{IDENTITY.uuid[:8]}_VARS.qcow2"),
        ("<nvram type='file'><source file='/n/a.fd'/></nvram>", f"/n/copy-1-{IDENTITY.uuid[:8]}_VARS.fd"),
        ("<nvram/>", None),
    ],
)
def test_forms_of_firmware_variables(xml: str, path: str | None) -> None:
    found, notes = firmware(xml)
    nvram = tree.required(found, "nvram")
    assert (nvram.text, len(nvram), nvram.get("type")) == (path, 0, None)
    assert notes


def test_a_store_of_variables() -> None:
    found, _ = firmware("<varstore template='/usr/t.json' path='/n/a.json'/>")
    assert tree.required(found, "varstore").attrib == {
        "template": "/usr/t.json",
        "path": f"/n/copy-1-{IDENTITY.uuid[:8]}_VARS.json",
    }
    found, _ = firmware("<varstore template='/usr/t.json'/>")
    assert tree.required(found, "varstore").attrib == {"template": "/usr/t.json"}
    found, notes = firmware("<varstore/>", nvram=file("/n/b.json"))
    assert tree.required(found, "varstore").attrib == {"path": "/n/b.json"}
    assert notes == ()


@pytest.mark.parametrize(
    ("xml", "why"),
    [
        ("<nvram type='network'><source protocol='iscsi' name='a'/></nvram>", "on storage of type network"),
        ("<nvram type='block'><source dev='/dev/sdx'/></nvram>", "on storage of type block"),
        ("<loader readonly='no' type='pflash'>/n/all.fd</loader>", "a file that it can write to"),
    ],
)
def test_firmware_that_cannot_be_copied(xml: str, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        firmware(xml)


def test_a_copy_of_the_variables_that_is_no_file_is_refused_and_one_alone_makes_no_vm() -> None:
    with pytest.raises(RefusedError, match="no file that the VM could be given"):
        firmware("<nvram>/n/a.fd</nvram>", nvram=rbd("vms/copy"))
    with pytest.raises(RefusedError, match="would be empty"):
        new("uefi", {"nvram": file("/nvram/copy.fd")})


# --- whatever comes --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_a_damaged_definition_is_refused_or_shares_nothing(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(sorted(SAMPLES)))
    root = tree.parse(SAMPLES[sample])
    places = [(parent, child) for parent in root.iter() for child in parent]
    for parent, child in data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=4, unique=True)):
        if child in list(parent) and data.draw(st.booleans()):
            parent.remove(child)
        else:
            parent.append(tree.copy_of(child))
    text = tree.text_of(root)
    try:
        made = as_new_vm(text, IDENTITY, SOURCES[sample], MARKER)
    except RefusedError:
        return
    after = tree.parse(made.xml)
    assert not new_devices.belongings(tree.parse(text)) & new_devices.belongings(after)
    assert after.findtext("uuid") == IDENTITY.uuid
    assert definition.done(made.xml) == (MARKER,)
