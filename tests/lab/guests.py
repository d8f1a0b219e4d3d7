"""Guests: real QEMU machines whose disks lie on the pools and on Ceph, and stubs that boot nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as ET

import libvirt
import libvirt_qemu

from tests.lab.ceph import Ceph
from tests.lab.channel import Channel
from tests.lab.definition import AGENT, GuestDisk, Spec
from tests.lab.errors import LabError
from tests.lab.hypervisor import FIRST_HOST, Host
from tests.lab.locks import locked
from tests.lab.run import run
from tests.lab.wait import until

BOOT_SECONDS = 60
MIGRATION_SECONDS = 60
_MIGRATE = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNSAFE
)
_UNDEFINE_SOURCE = libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
_UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)
_OLD_AGENT = f"""
for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = {AGENT} ] && port=/dev/${{p##*/}}; done
exec qemu-ga-main -d -m virtio-serial -p $port -t /run/qemu-ga-main -l /run/qemu-ga-main.log -b guest-fsfreeze-freeze"""


@dataclass(slots=True)
class Guest:
    """A guest of this laboratory. The handle holds a connection of its own, opened again after libvirtd was restarted."""

    spec: Spec
    host: Host
    ceph: Ceph
    _connection: Any = field(default=None, repr=False)

    # --- life --------------------------------------------------------------------------------------------------------

    def up(self) -> None:
        """Make it if there is none like it, start it if it is off, and wait for its agent. A boot that fails is tried once more."""
        with locked(self.host.folder / f"guest-{self.name}.lock"):
            domain = self._made()
            if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
                with contextlib.suppress(libvirt.libvirtError):  # it went on by itself, as after an I/O error
                    domain.resume()
            if not domain.isActive():
                domain.create()
            try:
                self.wait()
            except LabError:
                self.destroy()
                domain.create()
                self.wait(2 * BOOT_SECONDS)

    def up_paused(self) -> None:
        """Make it if there is none like it, and start it paused if it is off."""
        with locked(self.host.folder / f"guest-{self.name}.lock"):
            domain = self._made()
            if not domain.isActive():
                domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)

    def define(self) -> None:
        """Make it if there is none like it, and leave it off."""
        with locked(self.host.folder / f"guest-{self.name}.lock"):
            self._made()

    def wait(self, seconds: float = BOOT_SECONDS) -> None:
        """Wait until the agent answers and the writer writes."""
        until(f"guest {self.name} answers (console: {self.spec.log})", self.agent_answers, seconds)
        if self.spec.writer:
            until(f"guest {self.name} writes (console: {self.spec.log})", lambda: self.records() > 0, seconds)

    def shutdown(self) -> None:
        """Shut it down from within, and wait until it is off."""
        domain = self.domain()
        try:
            domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
        except libvirt.libvirtError as error:
            if domain.isActive():
                raise LabError(f"guest {self.name} cannot be shut down: {error}") from error
        until(f"guest {self.name} is off", lambda: not domain.isActive(), BOOT_SECONDS)

    def destroy(self) -> None:
        """Pull the plug."""
        with contextlib.suppress(libvirt.libvirtError):  # it went off meanwhile
            self.domain().destroy()
        if self.domain().isActive():
            raise LabError(f"guest {self.name} cannot be destroyed")

    def remove(self) -> None:
        """Destroy and undefine it, and delete its disks with their snapshots. Nothing happens if it is not there."""
        if (domain := self._found()) is not None:
            self._undo(domain)
        for disk in self.disks.values():
            self._delete(disk.path, disk.image)

    def migrate(
        self, to: Host, seconds: float = MIGRATION_SECONDS, *, mib_per_second: int = 0, leaving: bool = False
    ) -> None:
        """Live-migrate it to another host of this laboratory, definition and all, as fast as can be or at so many MiB/s.

        `leaving` its definition behind, too, as libvirt does unless it is told otherwise: whoever asks for that undefines it there.

        Raises LabError if that is refused, is ended by somebody, or takes longer; it is then where it was.
        """
        domain, last = self.domain(), threading.Timer(seconds, self._give_up)
        last.start()
        try:
            # The disks are files and images that both hosts see under the same names: safe, though libvirt cannot know.
            slowly = {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: mib_per_second} if mib_per_second else {}
            domain.migrateToURI3(
                to.uri, self._fitted(domain, to) | slowly, _MIGRATE if leaving else _MIGRATE | _UNDEFINE_SOURCE
            )
        except libvirt.libvirtError as error:
            raise LabError(f"guest {self.name} cannot migrate to {to.name}: {error}") from error
        finally:
            last.cancel()
        self.host, self._connection = to, None

    def _fitted(self, domain: Any, to: Host) -> dict[str, Any]:
        """The definition with another socket of our channel: a QEMU that ends removes its own."""
        here, there = str(self._channel(self.host)), str(self._channel(to))
        secure = libvirt.VIR_DOMAIN_XML_SECURE
        running = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE | secure)
        stored = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | secure)
        return {
            libvirt.VIR_MIGRATE_PARAM_URI: "tcp://127.0.0.1",
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: running.replace(here, there),
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: stored.replace(here, there),
        }

    def _channel(self, host: Host) -> Path:
        """Our channel's socket on a host: the first one has the name that the spec gives."""
        return self.spec.channel if host.name == FIRST_HOST else self.spec.channel.with_suffix(f".{host.name}.sock")

    def _give_up(self) -> None:
        with contextlib.suppress(libvirt.libvirtError):  # it just ended
            self.domain().abortJob()

    def kill(self, sig: int = signal.SIGKILL) -> None:
        """Send its QEMU process a signal; SIGSTOP and SIGCONT, too."""
        os.kill(self.pid, sig)

    # --- what goes wrong inside ----------------------------------------------------------------------------------------

    def hang_agent(self, *, hang: bool = True) -> None:
        """Stop the agent's process, or let it go on: a question asked meanwhile is answered late."""
        self.control(["killall", "-STOP" if hang else "-CONT", "qemu-ga-main"])

    def hang_agent_at_freeze(self, *, hang: bool = True) -> None:
        """Let the agent stop in the middle of its next freeze; or no longer, and let it go on if it did."""
        self.control(["touch" if hang else "rm", *([] if hang else ["-f"]), "/run/hook-hang"])
        if not hang:
            self.hang_agent(hang=False)

    def end_agent(self, *, end: bool = True) -> None:
        """End the agent, or let it start again."""
        if end:
            self.control(["touch", "/run/agent-off"])
            self.control(["killall", "-KILL", "qemu-ga-main"])
        else:
            self.control(["rm", "-f", "/run/agent-off"])
            until(f"the agent of guest {self.name} answers", self.agent_answers, BOOT_SECONDS)

    def age_agent(self, *, old: bool = True) -> None:
        """Put an agent that cannot freeze in the place of the good one; or end it, and let the good one start again."""
        if old:
            self.end_agent()
            self.control(["sh", "-c", _OLD_AGENT])
            until(f"the old agent of guest {self.name} answers", self.agent_answers, BOOT_SECONDS)
        else:
            self.control(["killall", "-KILL", "qemu-ga-main"])
            self.end_agent(end=False)

    def fail_hook(self, *, fail: bool = True, when: Literal["", "freeze", "thaw"] = "") -> None:
        """Let the agent's freeze hook fail, at freeze and at thaw or at one of them: the agent answers with an error."""
        path = f"/run/hook-fail-{when}" if when else "/run/hook-fail"
        self.control(["touch" if fail else "rm", *([] if fail else ["-f"]), path])

    # --- asking ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The domain's name."""
        return self.spec.name

    @property
    def disks(self) -> dict[str, GuestDisk]:
        """The disks by target."""
        return dict(self.spec.disks)

    def connection(self) -> Any:
        """This guest's connection to libvirtd."""
        with contextlib.suppress(libvirt.libvirtError):
            if self._connection is not None and self._connection.getLibVersion():
                return self._connection
        try:
            self._connection = self.host.open()
        except libvirt.libvirtError as error:
            raise LabError(f"libvirtd does not answer at {self.host.uri}: {error}") from error
        return self._connection

    def domain(self) -> Any:
        """The virDomain; raises LabError if there is none."""
        domain = self._found()
        if domain is None:
            raise LabError(f"there is no guest {self.name} at {self.host.uri}")
        return domain

    def _found(self) -> Any | None:
        try:
            return self.connection().lookupByName(self.name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise LabError(f"libvirtd at {self.host.uri} was asked for guest {self.name}: {error}") from error

    @property
    def uuid(self) -> str:
        """The domain's UUID."""
        return str(self.domain().UUIDString())

    @property
    def pid(self) -> int:
        """Number of its QEMU process; raises LabError if it is off."""
        pids = self.host.pids()
        if self.name not in pids:
            raise LabError(f"guest {self.name} does not run")
        return pids[self.name]

    def agent(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: int = 10) -> Any:
        """Ask the agent that the operator asks, too; raises LabError if it does not answer within `timeout` s, or with an error."""
        question = json.dumps({"execute": command, **({"arguments": arguments} if arguments else {})})
        try:
            answer = libvirt_qemu.qemuAgentCommand(self.domain(), question, timeout, 0)
        except libvirt.libvirtError as error:
            raise LabError(f"{command} in guest {self.name}: {error}") from error
        return json.loads(answer)["return"]

    def freeze_status(self) -> str:
        """`thawed` or `frozen`, by the agent's word."""
        return str(self.agent("guest-fsfreeze-status"))

    def control(self, argv: Sequence[str], timeout: float = 20) -> str:
        """Run a program in the guest by the laboratory's own agent and return what it wrote: works while the other agent hangs and
        while the file systems are frozen. Raises LabError if it fails or does not end in time.
        """
        with Channel(self._channel(self.host)) as channel:
            return channel.execute(list(argv), timeout)

    def records(self) -> int:
        """How many records the writer has written to all disks; 0 if it does not write."""
        try:
            return int(self.control(["cat", "/run/writer.count"]))
        except (LabError, ValueError):
            return 0

    def agent_answers(self) -> bool:
        """Whether the agent answers a ping within 3 s."""
        try:
            self.agent("guest-ping", timeout=3)
        except LabError:
            return False
        return True

    # --- making --------------------------------------------------------------------------------------------------------

    def _made(self) -> Any:
        """The domain of this very spec; another one of its name gives way."""
        domain = self._found()
        if domain is not None and f"<description>{self.spec.digest()}</description>" in domain.XMLDesc(
            libvirt.VIR_DOMAIN_XML_INACTIVE
        ):
            return domain
        self.remove()
        self.spec.channel.parent.mkdir(exist_ok=True)
        self._make_disks()
        return self.connection().defineXML(self.spec.xml())

    def _make_disks(self) -> None:
        for target, disk in self.disks.items():
            raw = Path(disk.path) if disk.kind == "file" else self.spec.channel.with_name(f"{self.name}-{target}.raw")
            run("truncate", "-s", f"{disk.size_mib}M", raw)
            run("mkfs.ext4", "-q", "-F", raw)
            if disk.kind == "rbd":
                self.ceph.create_image(disk.image, raw)
                raw.unlink()
            elif disk.format != "raw":
                made = raw.with_suffix(".new")
                run("qemu-img", "convert", "-O", disk.format, raw, made)
                made.rename(raw)

    def _undo(self, domain: Any) -> None:
        """End a domain of this name, however it was made, and delete what its definition has in our pools."""
        definition = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        self.destroy()
        domain.undefineFlags(_UNDEFINE)
        for source in ET.fromstring(definition).findall("devices/disk/source"):  # noqa: S314 - from our own libvirtd
            pool, _, image = source.get("name", "").partition("/")
            path = source.get("file", "")
            inside = Path(path).is_relative_to(self.host.state / "pools")
            self._delete(path if inside else "", image if pool == self.ceph.pool else "")

    def _delete(self, path: str, image: str) -> None:
        if path:
            Path(path).unlink(missing_ok=True)
        if image:
            self.ceph.remove_image(image)
