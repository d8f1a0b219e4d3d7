"""One domain while it is held: looked up beforehand on two connections, so that holding and freeing it cost libvirt's time alone.

Not when it is held or freed, and for how long (`quiesce`).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, NamedTuple, TypeVar

import libvirt

from vmsnapshot_operator.core.machine import AgentState, PowerState, not_at
from vmsnapshot_operator.core.volumes import Layer, Seconds, VolumeId
from vmsnapshot_operator.errors import (
    AgentError,
    CallTimeoutError,
    DomainGoneError,
    ForeignJournalError,
    HypervisorError,
    NotPermittedError,
)
from vmsnapshot_operator.hypervisors import agent, backups, description, domain_xml, journals, overlays
from vmsnapshot_operator.hypervisors.calls import Calls, is_unreachable

ACT_TIMEOUT = Seconds(10.0)
GRACE = Seconds(2.0)
"""What a call may take longer than the deadline given to libvirt itself."""

_SWITCH = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
)
_BY_A_CALL = frozenset({libvirt.VIR_DOMAIN_PAUSED_USER, libvirt.VIR_DOMAIN_PAUSED_UNKNOWN})
"""A pause like ours; a libvirtd that was restarted may have forgotten why, and our journal says that it was us."""
_BY_A_JOB = frozenset(
    {
        libvirt.VIR_DOMAIN_PAUSED_MIGRATION,
        libvirt.VIR_DOMAIN_PAUSED_POSTCOPY,
        libvirt.VIR_DOMAIN_PAUSED_SAVE,
        libvirt.VIR_DOMAIN_PAUSED_DUMP,
        libvirt.VIR_DOMAIN_PAUSED_SNAPSHOT,
        libvirt.VIR_DOMAIN_PAUSED_STARTING_UP,
    }
)
"""libvirt holds the VM for something of its own, after which it may be found paused by us again."""

T = TypeVar("T")


class Resume(Enum):
    """What became of a resume."""

    DONE = auto()
    LATER = auto()
    NOT_OURS = auto()


Permit = Callable[[], str]
"""Asked in the very thread that is about to hold a VM, right before it does: why it may not any more, or nothing. A process
that was stopped meanwhile must not act on what was true before."""


def always() -> str:
    """Permit everything."""
    return ""


class Handles(NamedTuple):
    """A domain where it is now: on a connection to hold it and on another one to free it. `active`: it runs or is paused."""

    holding: Any
    freeing: Any
    calls: Calls
    freezes: asyncio.Semaphore
    active: bool


class Outstanding:
    """Calls that hold a VM and have not returned: as long as there is one, no answer says that the VM is free for good.

    Kept per domain and beyond the window that made them: a freeze that was left behind may still be executed later. One whose
    connection broke has returned, and libvirtd may have it in its line all the same: it hung, or the network was away.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._lost: set[str] = set()

    @contextmanager
    def holding(self, uuid: str) -> Iterator[None]:
        """Count a call while it is under way; used in its thread."""
        with self._lock:
            self._counts[uuid] = self._counts.get(uuid, 0) + 1
            self._lost.discard(uuid)
        try:
            yield
        except libvirt.libvirtError as error:
            if is_unreachable(error):
                with self._lock:
                    self._lost.add(uuid)
            raise
        finally:
            with self._lock:
                self._counts[uuid] -= 1
                if not self._counts[uuid]:
                    del self._counts[uuid]

    def any(self, uuid: str) -> bool:
        """Whether one is under way."""
        return uuid in self._counts

    def lost(self, uuid: str) -> bool:
        """Whether the last one lost its connection before it was answered."""
        return uuid in self._lost


class DomainWindow:
    """Hold and free one domain. Made by `Hypervisor.window`, before anything is frozen.

    Every method raises HypervisorError or a child of it. Those that free look the domain up anew, on all endpoints, when it
    is not where it was or the connection broke: libvirtd may have been restarted, the VM may have migrated.
    """

    def __init__(
        self, name: str, uuid: str, outstanding: Outstanding, look_up: Callable[[DomainWindow], Awaitable[Handles]]
    ) -> None:
        self._name = name
        self.uuid = uuid
        self._outstanding = outstanding
        self._look_up = look_up
        self._handles: Handles | None = None
        self._releases = 0

    async def open(self) -> None:
        """Look the domain up on both connections."""
        self._handles = await self._look_up(self)

    async def freeze(self, mountpoints: Sequence[str], timeout: Seconds, permit: Permit = always) -> int:  # noqa: ASYNC109 - given to libvirt
        """Freeze these file systems, or all; return how many were. After any error it may still happen later: thaw.

        Raises NotPermittedError if `permit` says no: then nothing was sent.
        """
        here = self._known()
        seconds, releases = max(1, int(timeout)), self._releases

        def run() -> int:
            with self._outstanding.holding(self.uuid):
                # By default libvirt waits for an agent without end. The setting is the domain's, and stays.
                here.holding.agentSetResponseTimeout(seconds, 0)
                if self._releases != releases:
                    raise AgentError("the freeze was given up before it was sent")
                if why := permit():
                    raise NotPermittedError(f"domain {self._name} was not frozen: {why}")
                return int(here.holding.fsFreeze(list(mountpoints) or None, 0))

        try:
            async with asyncio.timeout(timeout):
                await here.freezes.acquire()
        except TimeoutError:
            raise AgentError(f"freeze of {self._name}: too many freezes of this host do not return") from None
        try:
            return await here.calls.act(f"freeze of {self._name}", run, timeout=Seconds(seconds + GRACE))
        finally:
            here.freezes.release()

    async def thaw(self, timeout: Seconds, ours: str = "") -> int:  # noqa: ASYNC109 - given to libvirt
        """Thaw everything; return how many file systems were. What does not run holds nothing, hence 0.

        `ours`: the nonce of the journal under which it was frozen, from one who may come late. Raises ForeignJournalError, and
        nothing is sent, if the VM bears another one: whoever wrote that has seen the VM free, and holds it himself by now.
        """
        self._releases += 1
        seconds = max(1, int(timeout))

        def run(domain: Any) -> int:
            self._must_be(ours, domain)
            domain.agentSetResponseTimeout(seconds, 0)
            return int(domain.fsThaw(None, 0))

        return await self._free("thaw", run, Seconds(seconds + GRACE), nothing=0)

    async def status(self, timeout: Seconds) -> AgentState:  # noqa: ASYNC109 - given to libvirt
        """Ask the agent for its freeze state; THAWED also for what does not run.

        Raises HypervisorError while a freeze of ours has not returned: it may come after the answer.
        """
        seconds = max(1, int(timeout))

        def run(domain: Any) -> AgentState:
            state, _ = agent.freeze_state(domain, seconds)
            if state is AgentState.ABSENT and not domain.isActive():
                raise DomainGoneError(f"domain {self._name} does not run here")
            return state

        self.must_have_returned("freeze")
        state = await self._free("freeze state", run, Seconds(seconds + GRACE), nothing=AgentState.THAWED)
        self.must_have_returned("freeze")
        return state

    async def prepare_switch(self, targets: Mapping[str, str]) -> str:
        """Describe a switch of these disks to these overlays beforehand, so that nothing is looked up while the VM is held."""
        here = self._known()

        def run() -> str:
            disks, _ = domain_xml.parse(here.holding.XMLDesc(0))
            return overlays.snapshot_xml(targets, [d.target for d in disks if d.target not in targets])

        return await here.calls.act(f"disks of {self._name}", run, timeout=ACT_TIMEOUT)

    async def switch(self, described: str, timeout: Seconds, permit: Permit = always) -> None:  # noqa: ASYNC109 - of the call
        """Switch disks to overlays, all at once or none. After any error it may still happen later: look at the chains.

        Raises NotPermittedError as `freeze` does.
        """
        here = self._known()

        def run() -> None:
            with self._outstanding.holding(f"switch {self.uuid}"):
                if why := permit():
                    raise NotPermittedError(f"domain {self._name} was not switched to overlays: {why}")
                here.holding.snapshotCreateXML(described, _SWITCH)

        await here.calls.act(f"switch of {self._name} to overlays", run, timeout=timeout)

    async def prepare_backup(
        self, targets: Mapping[str, Layer], planned: Mapping[str, VolumeId], since: Mapping[str, str]
    ) -> str:
        """Describe a copy of these disks into these files beforehand. All are by the disk's target; `since`: see `backups.backup_xml`.

        Raises HypervisorError if one is under way, whoever's it is, or if another disk is at a target than the planned one.
        """
        here = self._known()

        def run() -> str:
            if backups.running(here.holding) is not None:
                text = f"domain {self._name}: the hypervisor copies its disks already, and does one such job at a time"
                raise HypervisorError(text, reason="BackupRunning", retryable=True)
            disks, _ = domain_xml.parse(here.holding.XMLDesc(0))
            if wrong := not_at(planned, disks):
                text = f"domain {self._name}: another disk than planned is at {', '.join(wrong)} by now, or none"
                raise HypervisorError(text, reason="DiskPlugged", retryable=True)
            return backups.backup_xml(targets, [d.target for d in disks if d.target not in targets], since)

        return await here.calls.act(f"disks of {self._name}", run, timeout=ACT_TIMEOUT)

    async def begin_backup(self, described: str, timeout: Seconds, permit: Permit = always) -> None:  # noqa: ASYNC109 - of the call
        """Begin to copy what disks hold at this moment, of all at one instant or of none. After any error it may still begin later.

        Raises NotPermittedError as `freeze` does.
        """
        here = self._known()

        def run() -> None:
            with self._outstanding.holding(f"backup {self.uuid}"):
                if why := permit():
                    raise NotPermittedError(f"domain {self._name} was not copied: {why}")
                here.holding.backupBegin(described, None, libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL)

        await here.calls.act(f"begin of the copy of {self._name}", run, timeout=timeout)

    async def pause(self, permit: Permit = always) -> None:
        """Pause the VM. After any error it may still happen later: resume.

        Raises NotPermittedError as `freeze` does, and for a VM that somebody has paused already: it would be resumed afterwards,
        and they did not ask for that.
        """
        here, releases = self._known(), self._releases

        def run() -> None:
            with self._outstanding.holding(self.uuid):
                if self._releases != releases:
                    raise HypervisorError("the pause was given up before it was sent")
                if why := permit():
                    raise NotPermittedError(f"domain {self._name} was not paused: {why}")
                if description.power_of(here.holding)[0] is PowerState.PAUSED:
                    text = f"domain {self._name} was paused by somebody else meanwhile"
                    raise NotPermittedError(text, reason="VMPaused")
                here.holding.suspend()

        await here.calls.act(f"pause of {self._name}", run, timeout=ACT_TIMEOUT)

    async def resume(self, ours: str = "") -> Resume:
        """Resume the VM if it is paused as we pause. `ours` and ForeignJournalError: as for `thaw`.

        LATER: libvirt itself holds it for a moment. NOT_OURS: it is paused for another reason (an error of its storage, say), hence
        it has gone on since we paused it.
        """
        self._releases += 1

        def run(domain: Any) -> Resume:
            self._must_be(ours, domain)
            power, reason = description.power_of(domain)
            if power is PowerState.PAUSED and reason in _BY_A_JOB:
                return Resume.LATER
            if power is PowerState.PAUSED and reason not in _BY_A_CALL:
                return Resume.NOT_OURS
            domain.resume()
            return Resume.DONE

        return await self._free("resume", run, ACT_TIMEOUT, nothing=Resume.DONE)

    async def state(self) -> PowerState:
        """Return the VM's power state; SHUT_OFF if it is gone.

        Raises HypervisorError while a pause of ours has not returned: it may come after the answer.
        """

        def run(domain: Any) -> PowerState:
            power, _ = description.power_of(domain)
            if power is PowerState.SHUT_OFF:
                raise DomainGoneError(f"domain {self._name} does not run here")
            return power

        self.must_have_returned("pause")
        power = await self._free("state", run, ACT_TIMEOUT, nothing=PowerState.SHUT_OFF)
        self.must_have_returned("pause")
        return power

    async def _free(self, what: str, act: Callable[[Any], T], timeout: Seconds, *, nothing: T) -> T:  # noqa: ASYNC109 - handed on
        """Act where the domain was; if that fails and it is elsewhere or the connection is another, act there, once."""
        before = self._known()
        try:
            return await before.calls.act(f"{what} of {self._name}", act, before.freeing, timeout=timeout)
        except (AgentError, CallTimeoutError, ForeignJournalError):
            raise  # it is there
        except HypervisorError as error:
            try:
                now = await self._look_up(self)
            except DomainGoneError:
                return nothing  # all endpoints have answered, and none has it
            if not now.active:
                return nothing
            if now.freeing.connect() is before.freeing.connect():
                raise error from None
            self._handles = now
            return await now.calls.act(f"{what} of {self._name}", act, now.freeing, timeout=timeout)

    def _must_be(self, ours: str, domain: Any) -> None:
        """In the very thread that is about to free it: raise ForeignJournalError if another one's journal is in it by now."""
        if ours and (other := journals.another(domain, ours)) is not None:
            raise ForeignJournalError(
                f"domain {self._name} is held by attempt {other.attempt} of {other.owner_uid} by now, which frees it itself"
            )

    def _known(self) -> Handles:
        if self._handles is None:
            raise HypervisorError(f"domain {self._name}: the window was not opened")
        return self._handles

    def must_have_returned(self, what: str) -> None:
        """Raise HypervisorError while a call of ours that holds the VM has not returned: it may come after any answer."""
        if self._outstanding.any(self.uuid):
            text = f"domain {self._name}: a {what} of ours has not returned, so it may still come"
            raise HypervisorError(text, retryable=True)
