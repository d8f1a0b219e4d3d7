"""Overlays of one domain: made in a storage pool of its host, seen in its chains, committed, removed.

Blocking calls off the event loop, each with a deadline; everything raises HypervisorError or a child of it. Not what is done about
an overlay (`plan.collapse`), nor the switch to overlays, which is a part of the window (`hypervisors.window`).

Seen with libvirt 9.0 and QEMU 7.2: after the switch the saved definition names the overlay, too; a commit's job ends with the
VM, and the overlay keeps all that was written; a base that is committed onto is opened for writing by QEMU itself. Where the pool of
the overlays is full, QEMU pauses the VM; a commit and a pivot go on all the same, and once resumed the VM writes to the base what it
could not write to the overlay. An error of a disk is told for the rest of the VM's run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import libvirt

from vmsnapshot_operator.core import qcow2
from vmsnapshot_operator.core.chains import BlockJob, Chains, DiskChain, Overlaid, OverlayFile
from vmsnapshot_operator.core.machine import Disk, PowerState
from vmsnapshot_operator.core.volumes import Layer, Seconds, SourceKind, Volume, volume_id
from vmsnapshot_operator.errors import HypervisorError
from vmsnapshot_operator.hypervisors import description, domain_xml

if TYPE_CHECKING:
    from vmsnapshot_operator.hypervisors.domains import Hypervisor, Ref

POOL_TIMEOUT = Seconds(30.0)
JOB_TIMEOUT = Seconds(60.0)
_MISSING = frozenset({libvirt.VIR_ERR_NO_STORAGE_VOL, libvirt.VIR_ERR_NO_STORAGE_POOL})
_COMMIT = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
_BYTES = libvirt.VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES


T = TypeVar("T")


class Overlays:
    """The overlays of the domain `ref`, wherever it is now."""

    def __init__(self, hypervisor: Hypervisor, ref: Ref) -> None:
        self._hypervisor = hypervisor
        self._ref = ref

    async def free_bytes(self, pool: str) -> int:
        """Return how much room a pool of the domain's host has."""
        return await self._pools(f"room in the pool {pool}", lambda c: _free(c, pool))

    async def create(self, pool: str, name: str, volume: Volume) -> str:
        """Make an empty overlay over a volume and return its path; one of that name that no VM uses is made anew."""
        try:
            content = qcow2.overlay(
                volume.size_bytes, qcow2.backing_name(volume.writable), volume.writable.format or "raw"
            )
        except ValueError as error:
            raise HypervisorError(f"disk {volume.label}: {error}", reason="OverlayNotAvailable") from error
        return await self._pools(f"overlay {name}", lambda c: _create(c, pool, name, content))

    async def pristine(self, pool: str, prefix: str) -> tuple[str, ...]:
        """Return the overlays with this prefix that nobody ever wrote to and no VM of this host uses."""
        return await self._pools(f"overlays in the pool {pool}", lambda c: _pristine(c, pool, prefix))

    async def remove(self, pool: str, name: str) -> None:
        """Remove an overlay that no VM of this host uses; missing is success."""
        await self._pools(f"removal of overlay {name}", lambda c: _remove(c, _find(c, pool, name)))

    async def remove_path(self, path: str) -> None:
        """Remove an overlay by its path; as `remove`."""
        await self._pools(f"removal of overlay {path}", lambda c: _remove(c, _at(c, path)))

    async def look(self, overlays: Mapping[str, str]) -> Overlaid:
        """Look at these overlays (path by volume), at their bases, and at the chains of the domain.

        Raises HypervisorError also while a switch of ours has not returned: it may come after the answer.
        """
        self._hypervisor.wait_for_switch(self._ref)
        seen = await self._hypervisor.act(
            self._ref, f"chains of {self._ref.name}", lambda d: _look(d, overlays), timeout=POOL_TIMEOUT
        )
        self._hypervisor.wait_for_switch(self._ref)
        return seen

    async def commit(self, target: str, overlay: str, bandwidth: int) -> None:
        """Begin to commit the overlay of a disk into its base. `bandwidth`: bytes per second, 0: any."""
        await self._hypervisor.act(
            self._ref,
            f"commit of disk {target} of {self._ref.name}",
            lambda d: _begin_commit(d, target, overlay, bandwidth),
            timeout=JOB_TIMEOUT,
        )

    async def pivot(self, target: str) -> None:
        """Have the VM go on on the base of a disk; the commit of its overlay must be ready."""
        await self._hypervisor.act(
            self._ref,
            f"pivot of disk {target} of {self._ref.name}",
            lambda d: d.blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT),
            timeout=JOB_TIMEOUT,
        )

    async def unlimit(self, target: str) -> None:
        """Let the commit of a disk go on as fast as it can; one that has ended is success."""
        await self._hypervisor.act(
            self._ref,
            f"commit of disk {target} of {self._ref.name}",
            lambda d: d.blockJobSetSpeed(target, 0, 0) if d.blockJobInfo(target, 0) else None,
            timeout=JOB_TIMEOUT,
        )

    async def stalled(self, overlays: Mapping[str, str]) -> bool:
        """Whether an I/O error has paused the VM at one of these overlays (path by volume)."""
        what = f"state of {self._ref.name}"
        return await self._hypervisor.act(self._ref, what, lambda d: stalled(d, overlays), timeout=POOL_TIMEOUT)

    async def resume(self) -> None:
        """Have the VM go on if an I/O error has paused it, and nobody else."""
        await self._hypervisor.act(self._ref, f"resuming of {self._ref.name}", _resume, timeout=JOB_TIMEOUT)

    async def fingerprints(self, layers: Mapping[str, Layer]) -> dict[str, str]:
        """Return what betrays a later change of these images, by the same keys; empty where nothing would."""
        return await self._pools("bases", lambda c: {k: _fingerprint(c, layer) for k, layer in layers.items()})

    async def _pools(self, what: str, act: Callable[[Any], T]) -> T:
        """Call `act(virConnect)` on the domain's host."""
        return await self._hypervisor.act(
            self._ref, f"{what} for {self._ref.name}", lambda d: act(d.connect()), timeout=POOL_TIMEOUT
        )


# --- blocking, in a thread of their own ----------------------------------------------------------------------------------


def _free(connection: Any, pool: str) -> int:
    found = connection.storagePoolLookupByName(pool)
    found.refresh(0)  # else it says what it knew
    return int(found.info()[3])


def _find(connection: Any, pool: str, name: str) -> Any | None:
    try:
        return connection.storagePoolLookupByName(pool).storageVolLookupByName(name)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_STORAGE_VOL:
            return None
        raise


def _at(connection: Any, path: str) -> Any | None:
    try:
        pool = connection.storagePoolLookupByTargetPath(str(PurePosixPath(path).parent))
        pool.refresh(0)
        return pool.storageVolLookupByName(PurePosixPath(path).name)
    except libvirt.libvirtError as error:
        if error.get_error_code() in _MISSING:
            return None
        raise


def _create(connection: Any, pool: str, name: str, content: bytes) -> str:
    home = connection.storagePoolLookupByName(pool)
    home.refresh(0)
    _remove(connection, _find(connection, pool, name))
    length = len(content)
    volume = home.createXML(
        f"<volume><name>{name}</name><capacity>{length}</capacity><allocation>{length}</allocation>"
        "<target><format type='raw'/></target></volume>"
    )
    stream = connection.newStream(0)
    try:
        volume.upload(stream, 0, length, 0)
        sent = 0
        while sent < length:
            sent += stream.send(content[sent : sent + 262_144])
        stream.finish()
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):  # it may have ended already
            stream.abort()
        raise
    return str(volume.path())


def _pristine(connection: Any, pool: str, prefix: str) -> tuple[str, ...]:
    home = connection.storagePoolLookupByName(pool)
    home.refresh(0)
    found = {v.name(): v for v in home.listAllVolumes() if v.name().startswith(prefix)}
    used = _used(connection) if found else set()
    return tuple(n for n, v in found.items() if str(v.path()) not in used and _is_pristine(v))


def _is_pristine(volume: Any) -> bool:
    """Whether an image has no more than its header and empty tables: the first write of a guest makes it longer."""
    root = domain_xml.element(volume.XMLDesc())
    physical = int(root.findtext("physical") or root.findtext("allocation") or 0)
    capacity = int(root.findtext("capacity") or 0)
    return physical <= qcow2.empty_length(capacity)


def survey(connection: Any, endpoint: str, prefix: str, pool: str) -> tuple[OverlayFile, ...]:
    """Return everything of a host whose name begins so: in its active pools, and among the disks of its domains.

    `pool`: the one that is read anew before, if it can be; what another host put into the others may be seen late.
    """
    found = users(connection)
    volumes: dict[str, Any] = {}
    for home in connection.listAllStoragePools(libvirt.VIR_CONNECT_LIST_STORAGE_POOLS_ACTIVE):
        if home.name() == pool:
            with contextlib.suppress(libvirt.libvirtError):  # a volume is being copied there: what is known will do
                home.refresh(0)
        volumes |= {str(v.path()): v for v in home.listAllVolumes() if v.name().startswith(prefix)}
    used = {p for p in found if PurePosixPath(p).name.startswith(prefix)}
    files = (_file(connection, endpoint, p, volumes.get(p), found.get(p, "")) for p in sorted(volumes.keys() | used))
    return tuple(f for f in files if f is not None)


def _file(connection: Any, endpoint: str, path: str, volume: Any | None, domain: str) -> OverlayFile | None:
    """What there is to be said of one file; None if it went away meanwhile."""
    try:
        pristine = volume is not None and _is_pristine(volume)
        genuine = pristine and not domain and qcow2.is_new_overlay(_content(connection, volume))
        still = bool(domain) and seen_stalled(lambda: connection.lookupByName(domain), {"": path})
    except libvirt.libvirtError as error:
        if error.get_error_code() in _MISSING:
            return None
        raise
    return OverlayFile(path=path, endpoint=endpoint, domain=domain, pristine=pristine, genuine=genuine, stalled=still)


def _content(connection: Any, volume: Any) -> bytes:
    """Read a whole volume: only for those that are known to be short."""
    stream = connection.newStream(0)
    content = bytearray()
    try:
        volume.download(stream, 0, 0, 0)
        while part := stream.recv(262_144):
            content += part
        stream.finish()
    except BaseException:
        with contextlib.suppress(libvirt.libvirtError):  # it may have ended already
            stream.abort()
        raise
    return bytes(content)


def remove_pristine(connection: Any, path: str) -> None:
    """Remove an overlay that nobody wrote to and that no VM of this host uses, as it is now; missing is success."""
    volume = _at(connection, path)
    if volume is not None and not _is_pristine(volume):
        raise HypervisorError(f"overlay {path} was written to meanwhile, and is not removed", reason="OverlayInUse")
    _remove(connection, volume)


def _remove(connection: Any, volume: Any | None) -> None:
    if volume is None:
        return
    if str(volume.path()) in _used(connection):
        raise HypervisorError(f"overlay {volume.path()} is used by a VM, and not removed", reason="OverlayInUse")
    if above := _above(connection, str(volume.path())):
        text = f"overlay {volume.path()} lies beneath {above}, which would be lost with it, and is not removed"
        raise HypervisorError(text, reason="OverlayInUse")
    try:
        volume.delete(0)
    except libvirt.libvirtError as error:
        if error.get_error_code() not in _MISSING:
            raise


def _above(connection: Any, path: str) -> str:
    """Return an image of the same pool that lies on this one, or nothing: a domain that is off names the top of its chain only.

    Where a snapshot that somebody else makes is put if he says no other place. All pools would take too long to read.
    """
    pool = connection.storagePoolLookupByTargetPath(str(PurePosixPath(path).parent))
    with contextlib.suppress(libvirt.libvirtError):  # a volume is being copied there: what is known will do
        pool.refresh(0)
    for volume in pool.listAllVolumes():
        try:
            if domain_xml.element(volume.XMLDesc()).findtext("backingStore/path") == path:
                return str(volume.path())
        except libvirt.libvirtError as error:
            if error.get_error_code() not in _MISSING:
                raise
    return ""


def _used(connection: Any) -> set[str]:
    """All images that the domains of a host have."""
    return set(users(connection))


def users(connection: Any) -> dict[str, str]:
    """All images that the domains of a host have, as they run and as they are saved, each with the name of a domain that has it.

    The files of their firmware's variables, too. Their metadata, which names overlays too, does not count.
    """
    texts = []
    for domain in connection.listAllDomains():
        try:
            texts.append((domain.name(), domain.XMLDesc(0)))
            if domain.isPersistent():
                texts.append((domain.name(), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)))
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise
    found: dict[str, str] = {}
    for name, text in texts:
        root = domain_xml.element(text)
        for part in (*root.findall("devices"), *root.findall("os/nvram")):
            found |= {v: name for e in part.iter() for v in (*e.attrib.values(), (e.text or "").strip()) if v}
    return found


def stalled(domain: Any, overlays: Mapping[str, str]) -> bool:
    """Whether an I/O error has paused a domain at a disk that has one of these overlays (path by volume), or is such a volume.

    Where libvirt does not say at which disk, it may be such a one.
    """
    if not _by_io_error(domain):
        return False
    failed, ours = frozenset(domain.diskErrors()), _disks_on(domain, overlays)
    return bool(ours & failed) if failed else bool(ours)


def seen_stalled(find: Callable[[], Any], overlays: Mapping[str, str]) -> bool:
    """Whether an I/O error has paused a domain that has such a disk, as libvirt knows it without asking QEMU, which may hang.

    At which disk it occurred, QEMU alone knows: `stalled`. No where the domain is gone or cannot say it now, so that it hides none of
    the others.
    """
    try:
        domain = find()
        return _by_io_error(domain) and bool(_disks_on(domain, overlays))
    except libvirt.libvirtError:
        return False


def _disks_on(domain: Any, overlays: Mapping[str, str]) -> frozenset[str]:
    """The disks that have one of these overlays (path by volume), or are such a volume."""
    return frozenset(
        d.target
        for d in domain_xml.parse(domain.XMLDesc(0))[0]
        if d.layers and (d.layers[0].source in overlays.values() or str(volume_id(d.layers[0])) in overlays)
    )


def _by_io_error(domain: Any) -> bool:
    return description.power_of(domain) == (PowerState.PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)


def _resume(domain: Any) -> None:
    if _by_io_error(domain):
        domain.resume()


def _look(domain: Any, overlays: Mapping[str, str]) -> Overlaid:
    connection = domain.connect()
    power, _ = description.power_of(domain)
    io_error = _by_io_error(domain)
    active = bool(domain.isActive())
    live = domain_xml.parse(domain.XMLDesc(0))[0] if active else ()
    saved = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))[0] if domain.isPersistent() else ()
    jobs = _jobs(domain) if active else {}
    disks = {d.target: DiskChain(target=d.target, live=_sources(d), job=jobs.get(d.target)) for d in live}
    for disk in saved:
        before = disks.get(disk.target, DiskChain(target=disk.target))
        disks[disk.target] = DiskChain(target=disk.target, live=before.live, saved=_sources(disk), job=before.job)
    bases = {d.layers[0].source: d.layers[1] for d in live if len(d.layers) > 1}
    volumes = {vid: _at(connection, path) for vid, path in overlays.items()}
    return Overlaid(
        chains=Chains(
            run_id=int(domain.ID()) if active else -1,
            power=power,
            io_error=io_error,
            stalled=io_error and stalled(domain, overlays),
            disks=tuple(disks.values()),
        ),
        fingerprints={v: _fingerprint(connection, bases[path]) for v, path in overlays.items() if path in bases},
        pristine=frozenset(v for v, volume in volumes.items() if volume is not None and _is_pristine(volume)),
        missing=frozenset(v for v, volume in volumes.items() if volume is None),
        on_base=frozenset(str(volume_id(d.layers[0])) for d in live if d.layers) & overlays.keys(),
    )


def _sources(disk: Disk) -> tuple[str, ...]:
    return tuple(layer.source for layer in disk.layers)


def _jobs(domain: Any) -> dict[str, BlockJob]:
    """The block jobs of all disks. That one is ready is told by the XML alone: bytes done may be all without it."""
    found = {}
    for disk in domain_xml.element(domain.XMLDesc(0)).findall("devices/disk"):
        target = disk.find("target")
        name = target.get("dev", "") if target is not None else ""
        try:
            info = domain.blockJobInfo(name, 0)
        except libvirt.libvirtError:
            continue  # an empty drive
        if not info:
            continue
        mirror = disk.find("mirror")
        found[name] = BlockJob(
            commit=info.get("type") == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT,
            ready=mirror is not None and mirror.get("ready") == "yes",
            done_bytes=int(info.get("cur", 0)),
            total_bytes=int(info.get("end", 0)),
        )
    return found


def _begin_commit(domain: Any, target: str, overlay: str, bandwidth: int) -> None:
    """Commit into the next layer beneath, and only if the disk still writes to our overlay."""
    disk = next((d for d in domain_xml.parse(domain.XMLDesc(0))[0] if d.target == target), None)
    if disk is None or _sources(disk)[:1] != (overlay,):
        raise HypervisorError(f"disk {target} of {domain.name()} does not write to {overlay} any more", retryable=True)
    if domain.blockJobInfo(target, 0):
        return  # begun already
    domain.blockCommit(target, None, None, bandwidth, _COMMIT | (_BYTES if bandwidth else 0))


def _fingerprint(connection: Any, layer: Layer) -> str:
    """Size and time of the last write, for images in a directory pool. An RBD image tells libvirt neither.

    For RBD it is a word that never changes: QEMU's exclusive lock keeps others from writing while the VM runs, and what was
    written while it did not is not found out.
    """
    if layer.kind is SourceKind.NETWORK:
        return f"{layer.protocol}:{layer.source}"
    volume = description.volume_of(connection, layer)
    if volume is None:
        return ""
    root = domain_xml.element(volume.XMLDesc())
    mtime = root.findtext("target/timestamps/mtime")
    return f"{root.findtext('capacity')}/{mtime}" if mtime else ""


def snapshot_xml(targets: Mapping[str, str], others: Sequence[str]) -> str:
    """Return the description of a switch of these disks to these paths, and of no other disk."""
    disks = "".join(
        f"<disk name='{t}' snapshot='external' type='file'><driver type='qcow2'/><source file='{path}'/></disk>"
        for t, path in sorted(targets.items())
    )
    disks += "".join(f"<disk name='{t}' snapshot='no'/>" for t in sorted(others))
    return f"<domainsnapshot><disks>{disks}</disks></domainsnapshot>"
