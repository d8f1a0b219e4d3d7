"""What earlier releases wrote is still understood: their objects are kept as they were, and restored."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from string import Template
from typing import Any

import pytest

from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.lab.run import run
from tests.stack import ROOT, TENANT, Stack
from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.volumes import Layer, SourceKind, VolumeId, volume_id

RELEASES = sorted((ROOT / "tests" / "fixtures" / "releases").iterdir())
DISKS = {"vda": GuestDisk(kind="file"), "vdb": GuestDisk(kind="file"), "vdc": GuestDisk(kind="rbd")}
SNAPSHOTS, CONTENTS = "vmsnapshots.vmsnapshot.io", "vmsnapshotcontents.vmsnapshot.io"


@pytest.fixture
def vm(lab: Lab) -> Iterator[Guest]:
    made = lab.domain_stub("demo-old", DISKS)
    made.destroy()
    yield made
    made.remove()


@pytest.mark.parametrize("release", RELEASES, ids=lambda r: r.name)
def test_a_snapshot_of_an_earlier_release_is_restored(
    release: Path, lab: Lab, stack: Stack, vm: Guest, fresh: Callable[[str], str]
) -> None:
    """The objects are those of the release, but for names of this laboratory; the cuts are made as it made them."""
    ours = stack.installation()
    stack.programs["operator"].stop()
    try:
        name = stack.snapshot(fresh("old"), vm.name)
        uid = str((stack.get(name) or {})["metadata"]["uid"])
        words = _words(lab, vm, ours, name, uid)
        content = _read(release / "vmsnapshotcontent.json", words)
        lab.kubectl("create", "-f", "-", stdin=json.dumps(content))
        _patch(lab, CONTENTS, content["metadata"]["name"], {"status": content["status"]}, "--subresource=status")
        _patch(lab, SNAPSHOTS, name, {"metadata": {"finalizers": [FINALIZER]}}, "-n", TENANT)
        status = _read(release / "vmsnapshot.json", words)["status"]
        _patch(lab, SNAPSHOTS, name, {"status": status}, "--subresource=status", "-n", TENANT)
        before = _cut(lab, vm, words)
    finally:
        stack.start_operator()
    _scribble(lab, vm)
    stack.wait(name)
    restore = stack.restore(fresh("old"), name, safetySnapshot=False)
    stack.wait_restore(restore)
    assert _held(lab, vm) == before
    stack.delete_restore(restore)
    stack.delete(name)
    assert not [p for p in lab.pool_path("reflink").iterdir() if words["FILES_REQUEST"] in p.name]


def _words(lab: Lab, vm: Guest, ours: str, name: str, uid: str) -> dict[str, str]:
    """What stands in the place of the names of another laboratory."""
    layers = {t: Layer(kind=SourceKind.FILE, source=vm.disks[t].path, format="raw") for t in ("vda", "vdb")}
    image = f"{lab.ceph.pool}/{vm.disks['vdc'].image}"
    layers["vdc"] = Layer(
        kind=SourceKind.NETWORK, source=image, format="raw", protocol="rbd", hosts=(lab.ceph.mon_host,)
    )
    ids: dict[str, VolumeId] = {t: volume_id(layer) for t, layer in layers.items()}
    files = names.request_name(ours, uid, 1, "reflink-files", [ids["vda"], ids["vdb"]])
    pool = lab.pool_path("reflink")
    return {
        "INSTALLATION": ours,
        "UID": uid,
        "NAME": name,
        "DOMAIN": vm.name,
        "DOMAIN_UUID": vm.uuid,
        "DEFINITION": json.dumps(vm.domain().XMLDesc())[1:-1],
        "SOCKET": str(lab.libvirt_socket),
        "POOL": str(pool),
        "MONITOR": lab.ceph.mon_host,
        "FILES_REQUEST": files,
        "CEPH_REQUEST": names.request_name(ours, uid, 1, "ceph-vms", [ids["vdc"]]),
        **{f"{t.upper()}_ID": str(v) for t, v in ids.items()},
        **{f"{t.upper()}_CUT": f"{files}-{names.member(ids[t])}" for t in ("vda", "vdb")},
    }


def _read(path: Path, words: dict[str, str]) -> dict[str, Any]:
    return dict(json.loads(Template(path.read_text()).substitute(words)))


def _patch(lab: Lab, kind: str, name: str, change: dict[str, Any], *options: str) -> None:
    lab.kubectl("patch", kind, name, *options, "--type=merge", "-p", json.dumps(change))


def _cut(lab: Lab, vm: Guest, words: dict[str, str]) -> dict[str, bytes]:
    """Make the cuts by hand; return what they hold."""
    import rbd  # Debian's bindings; only where the laboratory is

    for target in ("vda", "vdb"):
        run("cp", "--reflink=always", vm.disks[target].path, Path(words["POOL"]) / words[f"{target.upper()}_CUT"])
    with lab.ceph.connect() as (_, io), rbd.Image(io, vm.disks["vdc"].image) as image:
        image.create_snap(words["CEPH_REQUEST"])
        rbd.RBD().group_create(io, f"{words['CEPH_REQUEST']}.i-{image.id()}")
    return _held(lab, vm)


def _scribble(lab: Lab, vm: Guest) -> None:
    import rbd  # Debian's bindings; only where the laboratory is

    for target in ("vda", "vdb"):
        with Path(vm.disks[target].path).open("r+b") as disk:
            disk.seek(20 << 20)
            disk.write(b"later")
    with lab.ceph.connect() as (_, io), rbd.Image(io, vm.disks["vdc"].image) as image:
        image.write(b"later", 20 << 20)


def _held(lab: Lab, vm: Guest) -> dict[str, bytes]:
    import rbd  # Debian's bindings; only where the laboratory is

    found = {t: Path(vm.disks[t].path).read_bytes() for t in ("vda", "vdb")}
    with lab.ceph.connect() as (_, io), rbd.Image(io, vm.disks["vdc"].image, read_only=True) as image:
        found["vdc"] = image.read(0, image.size())
    return found
