"""The backup job of one domain (virDomainBackupBegin): seen, and stopped if it is ours. Its begin is part of the window.

Blocking calls off the event loop, each with a deadline; everything raises HypervisorError or a child of it. Not what follows from
what is seen (`plan.copying`).

Seen with libvirt 9.0 and QEMU 7.2: a domain has one such job at a time; its description names the files that it copies into; it
ends with the VM; its end is told by an event once. While it runs, the VM can neither migrate nor get an overlay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import libvirt

from vmsnapshot_operator.core.backups import BackupSeen, RunningBackup
from vmsnapshot_operator.core.volumes import Layer, Seconds
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import domain_xml

if TYPE_CHECKING:
    from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref

JOB_TIMEOUT = Seconds(30.0)
_STOPPING_SECONDS, _PAUSE = 20.0, 0.1
_NO_JOB = frozenset(
    {libvirt.VIR_ERR_NO_DOMAIN_BACKUP, libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_SUPPORT}
)  # an inactive domain, or a hypervisor that knows no such jobs


class Backups:
    """The backup job of the domain `ref`, wherever it is now."""

    def __init__(self, hypervisor: Hypervisor, ref: Ref) -> None:
        self._hypervisor = hypervisor
        self._ref = ref

    async def look(self, since: Seconds) -> BackupSeen:
        """See whether one runs, wherever the VM is, and which have ended on the endpoint of `ref` since then, by this process's clock."""
        running = await self._look()
        return BackupSeen(running=running, endings=self._hypervisor.endings(self._ref, since))

    async def stop(self, is_ours: Callable[[str], bool]) -> None:
        """Stop the job if all files that it copies into are ours, and wait for its end. None, or another one, is success.

        Raises HypervisorError also while a begin of ours has not returned: it may come after the answer.
        """
        self._hypervisor.wait_for_backup(self._ref)
        until = asyncio.get_running_loop().time() + _STOPPING_SECONDS
        while await self._hypervisor.act(
            self._ref,
            f"end of the copy of {self._ref.name}",
            lambda d: _stop(d, is_ours),
            timeout=JOB_TIMEOUT,
            any_definition=True,
        ):
            if asyncio.get_running_loop().time() > until:
                text = f"domain {self._ref.name}: the hypervisor does not stop copying its disks"
                raise HypervisorError(text, reason="BackupRunning", retryable=True)
            await asyncio.sleep(_PAUSE)
        self._hypervisor.wait_for_backup(self._ref)

    async def _look(self) -> RunningBackup | None:
        return await self._hypervisor.act(
            self._ref, f"copy of {self._ref.name}", running, timeout=JOB_TIMEOUT, any_definition=True
        )


# --- blocking, in a thread of their own ----------------------------------------------------------------------------------


def running(domain: Any) -> RunningBackup | None:
    """Return the backup job of a domain, or None. Blocking; raises libvirtError.

    The statistics first: by the rules of its domain jobs libvirt lets them wait for what it does at the end of a backup (it tells of
    the end, and only then has the files closed, which flushes them). So who asks after he heard of the end gets the answer when the files are closed.
    """
    try:
        job = domain.jobStats(0)
        described = domain.backupGetXMLDesc(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _NO_JOB:
            return None
        raise
    files = [v for t in domain_xml.element(described).iter("target") for v in t.attrib.values()]
    return RunningBackup(
        targets=frozenset(files),
        done_bytes=int(job.get("disk_processed", 0)),
        total_bytes=int(job.get("disk_total", 0)),
    )


def _stop(domain: Any, is_ours: Callable[[str], bool]) -> bool:
    """Ask our job to end; return whether it is there."""
    found = running(domain)
    if found is None or not found.targets or not all(map(is_ours, found.targets)):
        return False
    try:
        domain.abortJob()
    except libvirt.libvirtError as error:
        if error.get_error_code() not in _NO_JOB:
            raise
    return True


def backup_xml(targets: Mapping[str, Layer], others: Sequence[str], since: Mapping[str, str]) -> str:
    """Return the description of a copy of these disks into these files, which are there, and of no other disk.

    `since`: by target, the checkpoint since which a disk is copied; all of the others is. Into a raw file QEMU then writes
    what changed, and leaves the rest of it as it is.
    """
    mode = {t: f" backupmode='incremental' incremental={quoteattr(c)}" for t, c in since.items()}
    disks = "".join(
        f"<disk name={quoteattr(t)} backup='yes' type='file'{mode.get(t, '')}><driver type={quoteattr(layer.format)}/>"
        f"<target file={quoteattr(layer.source)}/></disk>"
        for t, layer in sorted(targets.items())
    )
    disks += "".join(f"<disk name={quoteattr(t)} backup='no'/>" for t in sorted(others))
    return f"<domainbackup mode='push'><disks>{disks}</disks></domainbackup>"
