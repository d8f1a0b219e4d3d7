"""How the end of a backup is heard of, what is asked of libvirt, and that only a job of ours is stopped."""

from __future__ import annotations

import asyncio
from typing import Any

import libvirt
import pytest

from vmsnapshot_operator.core.backups import RunningBackup
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind, volume_id
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import backups, description
from vmsnapshot_operator.hypervisors.calls import Calls
from vmsnapshot_operator.hypervisors.events import EventHub
from vmsnapshot_operator.hypervisors.window import DomainWindow, Handles, Outstanding

UUID = "6dd6ed9d-0000-4000-8000-000000000002"
BACKUP = libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
DESCRIBED = """<domainbackup mode='push'><disks>
  <disk name='vda' backup='yes' type='file'><driver type='raw'/><target file='/p/vms-1'/></disk>
  <disk name='vdb' backup='no'/></disks></domainbackup>"""


class Connection:
    """Takes callbacks."""

    def __init__(self) -> None:
        self.heard: dict[int, Any] = {}

    def getType(self) -> str:  # noqa: N802 - libvirt's name
        return "QEMU"

    def registerCloseCallback(self, *_: object) -> None:  # noqa: N802 - libvirt's name
        pass

    def domainEventRegisterAny(self, _domain: object, number: int, callback: Any, _opaque: object) -> int:  # noqa: N802
        self.heard[number] = callback
        return number

    def ended(self, **job: object) -> None:
        domain = type("Domain", (), {"UUIDString": lambda _self: UUID.upper()})()
        self.heard[libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED](self, domain, job, None)


def listening(hub: EventHub) -> tuple[Connection, Seconds]:
    """A connection whose events the hub hears, and a moment from which on it does."""
    connection = Connection()
    hub.register(connection, "host")
    return connection, Seconds(hub._hearing["host"] + 1e-6)


def test_the_ends_of_backups_are_heard_of() -> None:
    hub = EventHub()
    connection, since = listening(hub)
    assert hub.endings(UUID, "host", since) == ()
    connection.ended(operation=BACKUP, success=True)
    connection.ended(operation=BACKUP, success=False, errmsg="Operation canceled")
    connection.ended(operation=BACKUP, success=False)
    connection.ended(operation=libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP, success=True)
    heard = hub.endings(UUID, "host", since)
    assert heard is not None
    assert [(e.whole, e.said) for e in heard] == [
        (True, ""),
        (False, "Operation canceled"),
        (False, "libvirt does not say why; it ends with the VM"),
    ]
    assert hub.endings(UUID, "host", heard[1].at) == heard[1:]
    assert hub.endings(UUID, "another", since) is None


def test_who_did_not_listen_all_the_time_has_heard_nothing() -> None:
    hub = EventHub()
    connection, since = listening(hub)
    connection.ended(operation=BACKUP, success=True)
    assert hub.endings(UUID, "host", Seconds(since - 1.0)) is None, "it began before"
    hub.lost("host")
    assert hub.endings(UUID, "host", since) is None
    _, again = listening(hub)
    assert hub.endings(UUID, "host", since) is None, "the connection broke in between"
    assert hub.endings(UUID, "host", again) is not None


def test_more_ends_than_are_remembered_prove_nothing() -> None:
    hub = EventHub()
    connection, since = listening(hub)
    for _ in range(9):
        connection.ended(operation=BACKUP, success=True)
    assert hub.endings(UUID, "host", since) is None


class Domain:
    """A domain with a job, or without one."""

    def __init__(self, described: str | None, code: int = libvirt.VIR_ERR_NO_DOMAIN_BACKUP) -> None:
        self.described, self.code, self.aborted = described, code, 0
        self.asked: list[str] = []
        self.definition = ""

    def XMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        return self.definition

    def backupGetXMLDesc(self, _flags: int) -> str:  # noqa: N802 - libvirt's name
        self.asked.append("description")
        if self.described is None:
            error = libvirt.libvirtError("no")
            error.err = (self.code, 0, "no", 0, "", "", "", 0, 0)
            raise error
        return self.described

    def jobStats(self, _flags: int) -> dict[str, int]:  # noqa: N802 - libvirt's name
        self.asked.append("statistics")
        return {"disk_total": 8, "disk_processed": 3}

    def abortJob(self) -> None:  # noqa: N802 - libvirt's name
        self.aborted += 1


def test_what_runs_is_told_by_the_files_that_it_writes() -> None:
    assert backups.running(Domain(DESCRIBED)) == RunningBackup(
        targets=frozenset({"/p/vms-1"}), done_bytes=3, total_bytes=8
    )
    assert backups.running(Domain(None)) is None
    assert backups.running(Domain(None, libvirt.VIR_ERR_NO_SUPPORT)) is None
    with pytest.raises(libvirt.libvirtError):
        backups.running(Domain(None, libvirt.VIR_ERR_RPC))


def test_what_waits_for_the_files_to_be_closed_is_asked_first() -> None:
    over = Domain(None)
    assert backups.running(over) is None
    assert over.asked == ["statistics", "description"]


@pytest.mark.parametrize(("described", "into"), [(DESCRIBED, ("/p/vms-1",)), (None, ())])
def test_a_copy_that_is_only_beginning_is_one(described: str | None, into: tuple[str, ...]) -> None:
    assert description._copied_into(Domain(described), BACKUP) == into
    assert description._copied_into(Domain(described), None) is None


@pytest.mark.parametrize(
    ("planned", "reason"), [("/d/a.raw", ""), ("/d/b.raw", "DiskPlugged"), ("/d/unplugged.raw", "DiskPlugged")]
)
async def test_only_a_copy_of_the_planned_disks_is_described(planned: str, reason: str) -> None:
    def disk(target: str, path: str) -> str:
        return f"<disk type='file'><driver type='raw'/><source file='{path}'/><target dev='{target}'/></disk>"

    domain = Domain(None)
    domain.definition = f"<domain><devices>{disk('vda', '/d/a.raw')}{disk('vdb', '/d/b.raw')}</devices></domain>"
    target = "vdc" if "unplugged" in planned else "vda"
    layer = Layer(kind=SourceKind.FILE, source=planned, format="raw")
    into = {target: Layer(kind=SourceKind.FILE, source="/p/vms-1", format="raw")}
    calls = Calls("host")

    async def look_up(_window: DomainWindow) -> Handles:
        return Handles(domain, domain, calls, asyncio.Semaphore(1), active=True)

    window = DomainWindow("demo", UUID, Outstanding(), look_up)
    await window.open()
    if not reason:
        assert "name='vdb'" in (await window.prepare_backup(into, {target: volume_id(layer)}, {})).replace('"', "'")
        return
    with pytest.raises(HypervisorError, match=target) as caught:
        await window.prepare_backup(into, {target: volume_id(layer)}, {})
    assert (caught.value.reason, caught.value.retryable) == (reason, True)


def test_only_our_job_is_stopped() -> None:
    ours, other, none = Domain(DESCRIBED), Domain(DESCRIBED), Domain(None)
    pull = Domain("<domainbackup mode='pull'><server transport='unix'/></domainbackup>")
    assert backups._stop(ours, lambda path: path == "/p/vms-1")
    assert not backups._stop(other, lambda path: path == "/p/vms-2")
    assert not backups._stop(none, lambda _path: True)
    assert not backups._stop(pull, lambda _path: True)
    assert (ours.aborted, other.aborted, pull.aborted) == (1, 0, 0)


def test_all_other_disks_are_left_out() -> None:
    layer = Layer(kind=SourceKind.FILE, source="/p/a'<b", format="raw")
    said = backups.backup_xml({"vda": layer}, ["vdc", "vdb"], {})
    assert '<target file="/p/a\'&lt;b"/>' in said
    assert said.count("backup='yes'") == 1
    assert said.index('"vdb" backup=') < said.index('"vdc" backup=')
