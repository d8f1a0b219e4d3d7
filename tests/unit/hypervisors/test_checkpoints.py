"""No checkpoint may appear after the copy that bears its name began; and what libvirt says of bitmaps is believed only where it says it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import libvirt
import pytest

from vmsnapshot_operator.core.volumes import Layer, SourceKind
from vmsnapshot_operator.errors import (
    CallTimeoutError,
    DomainGoneError,
    HypervisorError,
    HypervisorUnreachableError,
    NotPermittedError,
)
from vmsnapshot_operator.hypervisors import backups, checkpoints
from vmsnapshot_operator.hypervisors.checkpoints import Checkpoints
from vmsnapshot_operator.hypervisors.domains import Ref
from vmsnapshot_operator.hypervisors.window import always

REF = Ref(uuid="u", name="demo", endpoint="")


def failure(code: int) -> libvirt.libvirtError:
    error = libvirt.libvirtError("no")
    error.err = (code, 0, "no", 0, "", "", "", 0, 0)
    return error


class Checkpoint:
    """A checkpoint of disk vda; `size`: its bitmap is there and unbroken; `gone`: it is not there at all."""

    def __init__(self, domain: Domain, name: str, *, size: bool = True, gone: bool = False) -> None:
        self.domain, self.name, self.size, self.gone = domain, name, size, gone

    def getName(self) -> str:  # noqa: N802 - libvirt's name
        return self.name

    def getXMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        size = " size='4096'" if self.size and not self.gone else ""
        return f"<domaincheckpoint><disks><disk name='vda'{size}/><disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>"

    def delete(self, flags: int) -> None:
        if not self.domain.active:
            raise failure(libvirt.VIR_ERR_OPERATION_UNSUPPORTED)
        if self.gone and not flags:
            raise failure(libvirt.VIR_ERR_INTERNAL_ERROR)
        del self.domain.found[self.name]


class Domain:
    """A domain with checkpoints; `bitmaps`: those that its disk has without a description."""

    def __init__(self, *, active: bool = True) -> None:
        self.active, self.found, self.bitmaps = active, dict[str, Checkpoint](), set[str]()

    def isActive(self) -> bool:  # noqa: N802 - libvirt's name
        return self.active

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        return "<domain/>"

    def listAllCheckpoints(self, _flags: int) -> list[Checkpoint]:  # noqa: N802 - libvirt's name
        return list(self.found.values())

    def checkpointLookupByName(self, name: str) -> Checkpoint:  # noqa: N802 - libvirt's name
        if name not in self.found:
            raise failure(libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT)
        return self.found[name]

    def checkpointCreateXML(self, described: str, flags: int) -> Checkpoint:  # noqa: N802 - libvirt's name
        name = described.partition("<name>")[2].partition("</name>")[0]
        if flags and name not in self.bitmaps:
            raise failure(libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT)
        self.found[name] = Checkpoint(self, name)
        return self.found[name]


class Fake:
    """Calls at once, or fails with what it was told to, having done it or not."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.fails: HypervisorError | None = None
        self.done = False

    async def act(self, _ref: Ref, _what: str, act: Callable[[Any], Any], *, timeout: float) -> Any:  # noqa: ASYNC109 - as the real one
        error, self.fails = self.fails, None
        if error is not None:
            if self.done:
                act(self.domain)
            raise error
        return act(self.domain)


def of(domain: Domain) -> tuple[Fake, Checkpoints]:
    fake = Fake(domain)
    return fake, Checkpoints(fake, REF)  # type: ignore[arg-type]  # as much of it as is used


@pytest.mark.parametrize(
    "error", [CallTimeoutError("late"), HypervisorUnreachableError("broken"), DomainGoneError("gone")]
)
async def test_a_checkpoint_of_which_nobody_knows_whether_it_comes_ends_the_attempt(error: HypervisorError) -> None:
    fake, made = of(Domain())
    fake.fails = error
    with pytest.raises(type(error)):
        await made.make({"n": "vda"}, always)


async def test_a_checkpoint_that_is_refused_is_not_there_for_certain() -> None:
    fake, made = of(Domain())
    fake.fails = HypervisorError("raw")
    assert await made.make({"n": "vda"}, always) == {"n": "raw"}
    fake.fails, fake.done = HypervisorError("what it says is not what it did"), True
    with pytest.raises(HypervisorError) as caught:
        await made.make({"n": "vda"}, always)
    assert caught.value.retryable, "the next attempt has other names"


async def test_no_checkpoint_is_made_by_who_may_not() -> None:
    domain = Domain()
    with pytest.raises(NotPermittedError):
        await of(domain)[1].make({"n": "vda"}, lambda: "another instance may have taken over")
    assert not domain.found
    assert await of(domain)[1].make({"n": "vda"}, always) == {}
    assert set(domain.found) == {"n"}


async def test_only_a_bitmap_of_which_a_size_is_told_is_whole() -> None:
    domain = Domain()
    domain.found = {n: Checkpoint(domain, n, size=n == "whole") for n in ("whole", "broken")}
    domain.bitmaps = {"migrated"}
    made = of(domain)[1]
    asked = {"whole": "vda", "broken": "vda", "migrated": "vda", "nowhere": "vda"}
    assert await made.whole(asked) == {"whole", "migrated"}
    assert await made.whole({"whole": "vdb"}) == frozenset(), "it is the disk of another target"
    domain.active = False
    assert await made.whole(asked) == frozenset()


async def test_what_is_removed_is_gone_with_its_bitmap() -> None:
    domain = Domain()
    domain.found = {"whole": Checkpoint(domain, "whole"), "gone": Checkpoint(domain, "gone", gone=True)}
    domain.bitmaps = {"migrated"}
    asked = {"whole": "vda", "gone": "vda", "migrated": "vda", "nowhere": "vda"}
    assert await of(domain)[1].remove(asked) == frozenset()
    assert not domain.found
    domain.found = {"off": Checkpoint(domain, "off")}
    domain.active = False
    assert await of(domain)[1].remove({"off": "vda", "nowhere": "vda"}) == {"off"}
    assert set(domain.found) == {"off"}


def test_checkpoints_are_listed_by_their_beginning() -> None:
    domain = Domain()
    domain.found = {n: Checkpoint(domain, n) for n in ("vms-a-1", "other")}
    domain.UUIDString = lambda: "u"  # type: ignore[attr-defined]  # libvirt's name
    connection = type("Connection", (), {"listAllDomains": lambda _self: [domain]})()
    assert checkpoints.listed(connection, "vms-a-") == (("u", "vms-a-1"),)


def test_only_disks_with_a_checkpoint_are_copied_since_it() -> None:
    targets = {t: Layer(kind=SourceKind.FILE, source=f"/p/{t}", format="raw") for t in ("vda", "vdb")}
    text = backups.backup_xml(targets, ["vdc"], {"vda": "vms-1"})
    assert text.count("backupmode='incremental' incremental=\"vms-1\"") == 1
    assert "<disk name=\"vdb\" backup='yes' type='file'><driver" in text
    assert "<disk name=\"vdc\" backup='no'/>" in text
