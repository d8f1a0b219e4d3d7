"""Every error this project raises on purpose, in one tree.

SnapshotError                    has `reason` (stable word), `retryable` (can trying again help?), and a message that
|                                says what was found, where, and what to do
+-- RefusedError                 the request cannot be served as it is: nothing was touched
+-- HypervisorError              libvirt said no
|   +-- HypervisorUnreachableError   no connection, or it broke: retryable
|   +-- DomainGoneError              the domain is not (any more) on any endpoint
|   +-- DomainAmbiguousError         the domain runs nowhere, and several endpoints define it: which one is true is unknown
|   +-- AgentError                   the guest's agent answered with an error, or did not answer
|   +-- CallTimeoutError             a libvirt call did not return before its deadline: its effect is unknown
|   +-- ForeignJournalError          somebody else holds this VM still
+-- QuiesceError                 the VM could not be made to stand still; `free` tells whether it is confirmed free
+-- GuardianError                no guardian acknowledged: nobody freezes without one
+-- WindowError                  the window failed after the VM was freed; says which group and why
+-- DriverError                  a storage driver, or the process that hosts it
|   +-- DriverUnavailableError       not installed, does not load, its process does not start, or its storage is down
|   +-- DriverTimeoutError           did not answer before its deadline: its effect is unknown, its process was killed
|   +-- DriverCrashedError           its process ended before it answered
|   +-- AlreadyCutError              the name was cut before: an older attempt must never be adopted
+-- KubeError                    the API server said no, or nothing
|   +-- ConflictError                somebody else wrote first: read again
|   +-- KubeUnavailableError         the API server does not answer: retryable
+-- ForgedContentError           a VMSnapshotContent is not bound to this VMSnapshot, or was changed by another hand
"""

from __future__ import annotations

from collections.abc import Sequence


class SnapshotError(Exception):
    """Base of the tree. `reason` is a stable CamelCase word; `retryable` tells whether trying again can help."""

    reason = "InternalError"
    retryable = False

    def __init__(self, message: str, *, reason: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        if retryable is not None:
            self.retryable = retryable

    @property
    def message(self) -> str:
        """The text for the user."""
        return str(self.args[0]) if self.args else type(self).__name__


class RefusedError(SnapshotError):
    """The request cannot be served as it is; nothing was touched."""

    reason = "Refused"


class HypervisorError(SnapshotError):
    """Libvirt said no."""

    reason = "HypervisorError"


class HypervisorUnreachableError(HypervisorError):
    """No connection to an endpoint, or it broke."""

    reason = "HypervisorUnreachable"
    retryable = True


class DomainGoneError(HypervisorError):
    """The domain is not, or no longer, on any endpoint of the hypervisor; or (`ambiguous`) several are of this name."""

    reason = "DomainNotFound"

    def __init__(
        self, message: str, *, reason: str | None = None, retryable: bool | None = None, ambiguous: bool = False
    ) -> None:
        super().__init__(message, reason=reason, retryable=retryable)
        self.ambiguous = ambiguous

    @property
    def certain(self) -> bool:
        """Whether all endpoints have answered and none has it: not so where there is no hypervisor to be asked."""
        return self.reason == DomainGoneError.reason and not self.ambiguous


class DomainAmbiguousError(HypervisorError):
    """The domain runs nowhere, and several endpoints define it: nobody can tell which definition is the true one."""

    reason = "DomainAmbiguous"

    def __init__(self, name: str, endpoints: Sequence[str], why: str) -> None:
        super().__init__(
            f"domain {name} is defined on {' and on '.join(endpoints)}, and {why}. Undefine it where it does not belong: a migration"
            " without --undefinesource leaves its definition on the host that it came from (there:"
            f" `virsh undefine --keep-nvram {name}`, which leaves its disks alone)"
        )


class AgentError(HypervisorError):
    """The guest's agent answered with an error, or did not answer."""

    reason = "AgentError"


class CallTimeoutError(HypervisorError):
    """A libvirt call did not return before its deadline; what it did is unknown."""

    reason = "HypervisorTimeout"
    retryable = True


class ForeignJournalError(HypervisorError):
    """Somebody else's journal is in the domain: they may hold the VM still."""

    reason = "VMBusy"
    retryable = True


class QuiesceError(SnapshotError):
    """The VM could not be made to stand still, or not be freed.

    `free` tells whether it is confirmed free, `rest` whether its journal has to stay although it is, `fallback` whether another
    way to make it stand still may do, and `evidence` (a `core.evidence.Evidence`) what was seen until then, if anything was sent.
    """

    reason = "QuiesceFailed"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retryable: bool | None = None,
        free: bool = False,
        rest: bool = False,
        fallback: bool = True,
        evidence: object = None,
    ) -> None:
        super().__init__(message, reason=reason, retryable=retryable)
        self.free = free
        self.rest = rest
        self.fallback = fallback
        self.evidence = evidence


class GuardianError(SnapshotError):
    """No guardian acknowledged the journal: nobody freezes without one."""

    reason = "GuardianNotReady"
    retryable = True


class NotPermittedError(SnapshotError):
    """What this process was about to do to a VM or its storage it may not do any more: its time is over, or its lease."""

    reason = "NotLeader"
    retryable = True


class WindowError(SnapshotError):
    """The window failed; the VM has been freed."""

    reason = "CutFailed"


class DriverError(SnapshotError):
    """A storage driver said no; raised by drivers themselves, too."""

    reason = "DriverError"


class DriverUnavailableError(DriverError):
    """The driver is not installed, does not load, does not start, or its storage system does not answer."""

    reason = "DriverUnavailable"
    retryable = True


class DriverTimeoutError(DriverError):
    """The driver did not answer before its deadline; its process was killed and what it did is unknown."""

    reason = "DriverTimeout"
    retryable = True


class DriverCrashedError(DriverError):
    """The driver's process ended before it answered; what it did is unknown."""

    reason = "DriverCrashed"
    retryable = True


class AlreadyCutError(DriverError):
    """The name was cut before: an older attempt must never be adopted."""

    reason = "AlreadyCut"


class KubeError(SnapshotError):
    """The API server refused a request."""

    reason = "KubernetesError"


class ConflictError(KubeError):
    """Somebody else wrote first; read again and decide anew."""

    reason = "Conflict"
    retryable = True


class KubeUnavailableError(KubeError):
    """The API server does not answer."""

    reason = "KubernetesUnavailable"
    retryable = True


class ForgedContentError(SnapshotError):
    """A VMSnapshotContent is not bound to its VMSnapshot, or was changed by another hand; its handles are not used."""

    reason = "ContentNotBound"
