"""What a guest is made of, and its domain XML. Pure: nothing is asked, nothing is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from tests.lab.ceph import POOL
from tests.lab.hypervisor import SECRET

AGENT, OWN = "org.qemu.guest_agent.0", "org.vmsnapshot.lab.0"
WRITER_MICROSECONDS = 50_000
"""Pause of the writer between two rounds: an emulated guest that writes faster takes much of a processor from all others."""

_QBOOT = "<loader readonly='yes' type='rom'>/usr/share/qemu/qboot.rom</loader>"
"""Starts the kernel at once. libvirt's default, SeaBIOS, at times runs into nowhere when it is emulated on a busy machine.
It does not know generation ids (`<genid>`): who needs one gives a `firmware` of his own."""

_FIELDS = ("console=ttyS0", "quiet", "panic=-1", "mitigations=off", "nokaslr", "no_timer_check")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """One disk, of kind `file` in a libvirt pool or `rbd` in Ceph's. `path` or `image` are given their place if they are empty."""

    kind: Literal["file", "rbd"]
    pool: str = ""
    path: str = ""
    image: str = ""
    format: str = "raw"
    cache: str = "none"
    size_mib: int = 64
    extra: str = ""
    """More XML within `<disk>`."""

    def placed(self, guest: str, target: str, pool_folder: Path) -> GuestDisk:
        """The disk with everything filled in: `GUEST-vda.raw` in the pool's folder, or the image `GUEST-a`."""
        if self.kind == "rbd":
            return replace(self, pool=self.pool or POOL, image=self.image or f"{guest}-{target.removeprefix('vd')}")
        return replace(
            self, pool=self.pool or "reflink", path=self.path or str(pool_folder / f"{guest}-{target}.{self.format}")
        )


DEMO: Mapping[str, GuestDisk] = {
    "vda": GuestDisk(kind="file"),
    "vdb": GuestDisk(kind="file"),
    "vdc": GuestDisk(kind="rbd"),
}
"""Two files on a file system with reflink and one Ceph image: two storage systems."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Everything that says how a guest is made; two guests of one spec are alike."""

    name: str
    disks: Mapping[str, GuestDisk]
    image: Path | None
    """Folder of kernel and initramfs; None for a stub, which has nothing to boot, and no agent."""
    channel: Path
    log: Path
    mon_host: str
    memory_mib: int = 128
    writer: bool = True
    writer_us: int = WRITER_MICROSECONDS
    hook: bool = True
    append: str = ""
    """More words for the kernel's command line."""
    devices: str = ""
    """More XML within `<devices>`."""
    firmware: str = ""
    """More XML within `<os>`."""

    def command_line(self) -> str:
        """The kernel's command line; what is ours in it is read by the guest's `init`."""
        words = [*_FIELDS, f"guestname={self.name}"]
        if self.writer:
            words.append(f"writer_us={self.writer_us}")
        if not self.hook:
            words.append("hook=off")
        return " ".join([*words, self.append]).strip()

    def digest(self) -> str:
        """Changes with the definition; kept in the domain's description."""
        return f"lab {hashlib.sha256(self._xml('').encode()).hexdigest()[:16]}"

    def xml(self) -> str:
        """The domain's definition."""
        return self._xml(self.digest())

    def _xml(self, description: str) -> str:
        disks = "\n".join(self._disk(target, disk) for target, disk in sorted(self.disks.items()))
        return f"""<domain type='qemu'><name>{escape(self.name)}</name><description>{description}</description>
<memory unit='MiB'>{self.memory_mib}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='pc'>hvm</type>{self._boot()}{self.firmware}</os>
<features><acpi/></features><cpu mode='custom'><model fallback='allow'>qemu64</model></cpu>
<on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
{disks}
<controller type='usb' model='none'/><memballoon model='none'/>
<serial type='file'><source path={quoteattr(str(self.log))}/><target port='0'/></serial>
{self._channels()}{self.devices}</devices></domain>"""

    def _boot(self) -> str:
        if self.image is None:
            return ""
        return (
            f"<kernel>{self.image}/vmlinuz</kernel><initrd>{self.image}/initramfs</initrd>"
            f"<cmdline>{escape(self.command_line())}</cmdline>{'' if self.firmware else _QBOOT}"
        )

    def _channels(self) -> str:
        if self.image is None:
            return ""
        return f"""<controller type='virtio-serial' index='0'/>
<channel type='unix'><target type='virtio' name='{AGENT}'/></channel>
<channel type='unix'><source mode='bind' path={quoteattr(str(self.channel))}/><target type='virtio' name='{OWN}'/></channel>
"""

    def _disk(self, target: str, disk: GuestDisk) -> str:
        driver = f"<driver name='qemu' type='{disk.format}' cache='{disk.cache}' discard='unmap'/>"
        rest = f"<target dev='{target}' bus='virtio'/>{disk.extra}</disk>"
        if disk.kind == "file":
            return f"<disk type='file' device='disk'>{driver}<source file={quoteattr(disk.path)}/>{rest}"
        host, port = self.mon_host.split(":")
        source = f"<source protocol='rbd' name='{disk.pool}/{disk.image}'><host name='{host}' port='{port}'/></source>"
        auth = f"<auth username='libvirt'><secret type='ceph' uuid='{SECRET}'/></auth>"
        return f"<disk type='network' device='disk'>{driver}{auth}{source}{rest}"
