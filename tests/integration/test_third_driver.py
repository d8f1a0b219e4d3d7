"""A storage driver that is not the project's: one module and its entry point, from there to a snapshot that is Ready.

It misbehaves on demand: each way ends with its own reason, the guest freed first, and nothing left of what the others cut.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.integration.outcomes import failed, left, refused
from tests.lab import Lab
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import Stack, until
from vmsnapshot_operator.core import names

DEMO = {"type": "file", "sourcePattern": "*/demo-vdb.raw"}
ALONE = {"type": "file", "sourcePattern": "*/alone-*.raw"}


@pytest.fixture(scope="module")
def held(lab: Lab) -> Iterator[Path]:
    """Where the driver keeps what it holds: nothing but its log when the tests are over."""
    folder = lab.pool_path("reflink") / "third"
    folder.mkdir(exist_ok=True)
    yield folder
    kept = [p.name for p in folder.iterdir() if p.name != "log"]
    shutil.rmtree(folder)
    assert not kept


@pytest.fixture
def alone(lab: Lab, tmp_path: Path) -> Iterator[Guest]:
    """A domain that is off, with two disks that no class of the examples serves."""
    disks = {t: GuestDisk(kind="file", path=str(tmp_path / f"alone-{t}.raw"), size_mib=8) for t in ("vda", "vdb")}
    stub = lab.domain_stub("demo-alone", disks, started=False)
    yield stub
    stub.remove()


def test_a_third_driver_is_one_module_and_its_entry_point(
    stack: Stack, vmsnapshot: Callable[..., str], extra_class: Callable[..., str], held: Path, alone: Guest
) -> None:
    extra_class("third", "third", [ALONE], parameters={"held": str(held)})
    name = vmsnapshot("third", domain=alone.name)
    body = stack.wait(name)
    assert [(g["driver"], g["volumes"]) for g in body["status"]["groups"]] == [("third", 2)]
    content = stack.content(name)
    assert content is not None
    handles = {v["target"]: Path(v["handle"]) for v in content["spec"]["volumes"]}
    assert {t: p.read_bytes() for t, p in handles.items()} == {
        t: Path(d.path).read_bytes() for t, d in alone.disks.items()
    }
    stack.delete(name)
    assert not [p for p in handles.values() if p.exists()]
    assert not left(stack, body)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        pytest.param("no-such-driver", 'no storage driver "no-such-driver" is installed', id="not installed"),
        pytest.param("third-dead", "cannot find libarray.so", id="its process does not start"),
    ],
)
def test_the_only_class_has_no_driver_that_runs(
    stack: Stack,
    vmsnapshot: Callable[..., str],
    extra_class: Callable[..., str],
    held: Path,
    alone: Guest,
    driver: str,
    words: str,
) -> None:
    extra_class("only", driver, [ALONE], parameters={"held": str(held)})
    message = refused(stack, vmsnapshot("only", domain=alone.name), "ClassNotReady")
    lines = [line for line in message.split("disk ") if 'class "only"' in line]
    assert [line.split(" ")[0] for line in lines] == ["vda", "vdb"]
    assert all(words in line for line in lines), message


@pytest.mark.parametrize(
    ("how", "reason"),
    [("fails", "ArrayFull"), ("hangs", "FrozenTooLong"), ("late", "FrozenTooLong"), ("dies", "DriverCrashed")],
)
def test_a_cut_that_goes_wrong(
    stack: Stack,
    lab: Lab,
    vmsnapshot: Callable[..., str],
    extra_class: Callable[..., str],
    held: Path,
    how: str,
    reason: str,
) -> None:
    extra_class("third", "third", [DEMO], 10, parameters={"held": str(held), "cut": how})
    name = vmsnapshot(how, quiesce={"policy": "Require", "maxFrozenSeconds": 3})
    message = failed(stack, name, reason)
    assert "third" in message
    assert "vdb" in message
    body = stack.get(name)
    assert body is not None
    thawed = datetime.fromisoformat(body["status"]["quiesce"]["thawedTime"]).timestamp()
    ours = names.object_prefix(stack.installation(), body["metadata"]["uid"])
    (cut, did), (deleted, then), *_ = [
        (float(time), what)
        for time, what, name_of_cut in map(str.split, (held / "log").read_text().splitlines())
        if name_of_cut.startswith(ours)
    ]
    assert (did, then) == ("cut", "delete")
    assert cut < thawed < deleted, "the guest is freed first"
    guest = lab.guest("demo")
    until("the guest is thawed", lambda: guest.freeze_status() == "thawed")
