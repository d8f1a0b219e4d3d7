"""Guests: real QEMU machines whose disks lie on the pools and on Ceph, and stubs that never run a kernel."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import libvirt
import libvirt_qemu

from tests.lab import hypervisor
from tests.lab.ceph import POOL, Ceph
from tests.lab.errors import LabError
from tests.lab.run import run
from tests.lab.wait import until

AGENT, LAB = "org.qemu.guest_agent.0", "org.vmsnapshot.lab.0"
DISK_SIZE = "64M"
BOOT_SECONDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk: `kind` file (in a pool) or rbd."""

    kind: str
    pool: str = "reflink"
    format: str = "raw"
    cache: str = "none"
    extra: str = ""
    path: str = ""
    image: str = ""


DEMO: Mapping[str, Disk] = {"vda": Disk(kind="file"), "vdb": Disk(kind="file"), "vdc": Disk(kind="rbd")}


@dataclass(slots=True)
class Guest:
    """A guest of this laboratory."""

    name: str
    state: Path
    ceph: Ceph
    image: Path
    disks: dict[str, Disk]
    memory_mib: int = 128
    devices: str = ""
    writer_us: int | None = 1000
    _connection: Any = field(default=None, repr=False)

    # --- life --------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Define and start it if need be; wait for its agent. A boot that fails is tried once more."""
        connection = self.connection()
        try:
            domain = connection.lookupByName(self.name)
        except libvirt.libvirtError:
            self._make_disks()
            domain = connection.defineXML(self.xml())
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            with contextlib.suppress(libvirt.libvirtError):  # it went on by itself, as after an I/O error
                domain.resume()
        if not domain.isActive():
            domain.create()
        try:
            self.wait()
        except LabError:
            domain.destroy()
            domain.create()
            self.wait()

    def wait(self) -> None:
        """Wait until the agent answers and the writer writes."""
        until(f"guest {self.name} answers", self.answers, BOOT_SECONDS)
        if self.writer_us is not None:
            until(f"guest {self.name} writes", lambda: self.records() > 0, BOOT_SECONDS)

    def shutdown(self) -> None:
        """Shut it down from within."""
        domain = self.domain()
        try:
            domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
        except libvirt.libvirtError as error:
            if domain.isActive():
                raise LabError(f"guest {self.name} cannot be shut down: {error}") from error
        until(f"guest {self.name} is off", lambda: not domain.isActive(), BOOT_SECONDS)

    def destroy(self) -> None:
        """Pull the plug."""
        if self.domain().isActive():
            self.domain().destroy()

    def remove(self) -> None:
        """Destroy and undefine it, and delete its disks."""
        self.destroy()
        self.domain().undefine()
        self._delete_disks()

    # --- asking ------------------------------------------------------------------------------------------------------

    def connection(self) -> Any:
        """A connection of its own to libvirtd, opened again after libvirtd was restarted."""
        libvirt.registerErrorHandler(lambda *_: None, None)
        if self._connection is None or not self._alive():
            self._connection = libvirt.open(hypervisor.uri(self.state))
        return self._connection

    def _alive(self) -> bool:
        try:
            self._connection.getLibVersion()
        except libvirt.libvirtError:
            return False
        return True

    def domain(self) -> Any:
        """The virDomain."""
        return self.connection().lookupByName(self.name)

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return str(self.domain().UUIDString())

    @property
    def pid(self) -> int:
        """Number of its QEMU process."""
        return hypervisor.domain_pids(self.state)[self.name]

    def agent(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: int = 10) -> Any:
        """Ask the agent that the operator uses, too."""
        question = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        try:
            answer = libvirt_qemu.qemuAgentCommand(self.domain(), question, timeout, 0)
        except libvirt.libvirtError as error:
            raise LabError(f"{command} in guest {self.name}: {error}") from error
        return json.loads(answer)["return"]

    def answers(self) -> bool:
        """Whether the agent answers."""
        try:
            self.agent("guest-ping", timeout=3)
        except LabError:
            return False
        return True

    def freeze_status(self) -> str:
        """`thawed` or `frozen`, by the agent's word."""
        return str(self.agent("guest-fsfreeze-status"))

    def control(self, argv: Sequence[str], timeout: float = 20) -> str:
        """Run a program in the guest by the laboratory's own agent: it works while the other one hangs or is frozen."""
        from tests.lab.channel import Channel

        with Channel(self.state / "channels" / f"{self.name}.sock") as channel:
            return channel.execute(list(argv), timeout)

    def records(self) -> int:
        """How many records the writer has written to its first disk, as the guest sees it."""
        try:
            return int(self.control(["/bin/busybox", "stat", "-c", "%s", "/mnt/vda/log"]).strip() or 0) // 64
        except (LabError, ValueError):
            return 0

    # --- making --------------------------------------------------------------------------------------------------------

    def xml(self) -> str:
        """The domain's definition."""
        disks = "".join(self._disk_xml(t, d) for t, d in sorted(self.disks.items()))
        writer = f" writer_us={self.writer_us}" if self.writer_us is not None else ""
        channel = self.state / "channels" / f"{self.name}.sock"
        channel.parent.mkdir(exist_ok=True)
        log = self.state / "log" / f"guest-{self.name}.log"
        return f"""<domain type='qemu'><name>{self.name}</name><memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type><kernel>{self.image}/vmlinuz</kernel><initrd>{self.image}/initramfs</initrd>
<cmdline>console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check guestname={self.name}{writer}</cmdline></os>
<features><acpi/></features><cpu mode='custom'><model fallback='allow'>qemu64</model></cpu>
<on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>{disks}
<controller type='usb' model='none'/><controller type='virtio-serial' index='0'/>
<serial type='file'><source path={quoteattr(str(log))}/><target port='0'/></serial>
<channel type='unix'><target type='virtio' name='{AGENT}'/></channel>
<channel type='unix'><source mode='bind' path={quoteattr(str(channel))}/><target type='virtio' name='{LAB}'/></channel>
<memballoon model='none'/>{self.devices}</devices></domain>"""

    def _disk_xml(self, target: str, disk: Disk) -> str:
        common = f"<target dev='{target}' bus='virtio'/>{disk.extra}</disk>"
        driver = f"<driver name='qemu' type='{disk.format}' cache='{disk.cache}' discard='unmap'/>"
        if disk.kind == "file":
            return f"<disk type='file' device='disk'>{driver}<source file={quoteattr(disk.path)}/>{common}"
        host, port = self.ceph.mon_host.split(":")
        source = f"<source protocol='rbd' name='{POOL}/{disk.image}'><host name='{host}' port='{port}'/></source>"
        auth = f"<auth username='libvirt'><secret type='ceph' uuid='{hypervisor.SECRET}'/></auth>"
        return f"<disk type='network' device='disk'>{driver}{auth}{source}{common}"

    def _make_disks(self) -> None:
        for target, disk in self.disks.items():
            raw = Path(disk.path) if disk.kind == "file" else self.state / f"{self.name}-{target}.raw"
            run("truncate", "-s", DISK_SIZE, raw)
            run("mkfs.ext4", "-q", "-F", raw)
            if disk.kind == "rbd":
                conf = str(self.ceph.conf)
                features = "layering,exclusive-lock,object-map,fast-diff,deep-flatten"
                run(
                    "rbd",
                    "-c",
                    conf,
                    "import",
                    "--no-progress",
                    "--image-feature",
                    features,
                    raw,
                    f"{POOL}/{disk.image}",
                )
                raw.unlink()
            elif disk.format != "raw":
                made = raw.with_suffix(".new")
                run("qemu-img", "convert", "-O", disk.format, raw, made)
                made.rename(raw)

    def _delete_disks(self) -> None:
        for disk in self.disks.values():
            if disk.kind == "file":
                Path(disk.path).unlink(missing_ok=True)
            else:
                run("rbd", "-c", self.ceph.conf, "rm", "--no-progress", f"{POOL}/{disk.image}")


def placed(state: Path, name: str, disks: Mapping[str, Disk]) -> dict[str, Disk]:
    """Give each disk of a guest its place."""
    found = {}
    for target, disk in disks.items():
        path = (
            str(hypervisor.pool_path(state, disk.pool) / f"{name}-{target}.{disk.format}")
            if disk.kind == "file"
            else ""
        )
        image = f"{name}-{target[-1]}" if disk.kind == "rbd" else ""
        found[target] = Disk(
            kind=disk.kind,
            pool=disk.pool,
            format=disk.format,
            cache=disk.cache,
            extra=disk.extra,
            path=disk.path or path,
            image=disk.image or image,
        )
    return found


def forget_channels(state: Path) -> None:
    """Remove the sockets of guests that are gone."""
    shutil.rmtree(state / "channels", ignore_errors=True)
