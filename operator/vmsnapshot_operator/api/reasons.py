"""The reasons of conditions and events: stable words that programs may compare with, each with what it means.

A test holds the words that the code uses against this list. Storage drivers are plug-ins and have words of their own beside
these; so do strategies and quiesce methods that others add.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """One word for one state of affairs; `meaning` says it in a sentence."""

    meaning: str

    def __new__(cls, word: str, meaning: str) -> Self:
        """Make a member that is its word and knows its meaning."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member

    # --- Planned: what was asked for -------------------------------------------------------------------------------------
    PLANNED = "Planned", "Every choice is made, and nothing was touched yet."
    INVALID_OBJECT = "InvalidObject", "The object itself cannot be understood."
    HYPERVISOR_NOT_FOUND = "HypervisorNotFound", "There is no Hypervisor of this name."
    HYPERVISOR_UNREACHABLE = "HypervisorUnreachable", "libvirt does not answer on any endpoint that may have the VM."
    HYPERVISOR_TIMEOUT = "HypervisorTimeout", "A call to libvirt did not return in time; what it did is unknown."
    HYPERVISOR_ERROR = "HypervisorError", "libvirt answered with an error."
    DOMAIN_NOT_FOUND = (
        "DomainNotFound",
        "The VM is not there, or not for this namespace: the two look alike on purpose.",
    )
    STRATEGY_UNKNOWN = "StrategyUnknown", "No strategy of this name is installed."
    QUIESCE_METHOD_UNKNOWN = "QuiesceMethodUnknown", "No quiesce method of this name is installed."

    # --- Planned: the VM's disks and devices ------------------------------------------------------------------------------
    EXCLUDED_TARGET_NOT_FOUND = "ExcludedTargetNotFound", "A disk to be left out is none of the VM's."
    UNSUPPORTED_DISK = (
        "UnsupportedDisk",
        "A disk or device bears state and cannot be snapshotted: shareable, transient, encrypted, empty, passed through, a shared directory.",
    )
    NO_VOLUMES = "NoVolumes", "No disk is left to be snapshotted."
    NO_CLASS_FOR_DISK = (
        "NoClassForDisk",
        "No StorageDriverClass matches a disk, or no driver of those that do says that it fits.",
    )
    CLASS_TIE = "ClassTie", "Two classes of the same priority would serve a disk."
    CLASS_NOT_READY = "ClassNotReady", "The class that would serve a disk is not Ready."
    OVERLAY_NOT_AVAILABLE = (
        "OverlayNotAvailable",
        "A class cannot cut in an instant, or the method HypervisorSnapshot was asked for, and no overlay can be made.",
    )

    # --- Planned: the VM and its agent ------------------------------------------------------------------------------------
    VM_BUSY = "VMBusy", "Another operation of ours is under way on this VM; this one waits."
    VM_MIGRATING = "VMMigrating", "The VM is between two hosts."
    VM_PAUSED = "VMPaused", "The VM is paused and policy Require needs it running."
    VM_STATE_UNSUPPORTED = "VMStateUnsupported", "The VM neither runs, nor is paused, nor is shut off."
    VM_NOT_CLEANLY_SHUT_DOWN = (
        "VMNotCleanlyShutDown",
        "The VM is off, but is not known to have been shut down by its own system.",
    )
    AGENT_ABSENT = "AgentAbsent", "The guest has no agent that is connected."
    AGENT_SILENT = "AgentSilent", "The guest's agent is connected and does not answer."
    AGENT_TOO_OLD = "AgentTooOld", "The guest's agent answers and cannot freeze file systems."
    AGENT_ERROR = "AgentError", "The guest's agent answered with an error."
    ALREADY_FROZEN = "AlreadyFrozen", "Somebody else has frozen the guest: nothing was sent to it."
    NO_FILE_SYSTEMS = "NoFileSystems", "The guest's agent lists no file system on any disk."
    MOUNTPOINT_NOT_FOUND = (
        "MountpointNotFound",
        "The guest has no file system mounted at a path of spec.quiesce.mountpoints.",
    )
    POLICY_NOT_MET = "PolicyNotMet", "Policy Require needs Filesystem, and less is all that there is evidence for."

    # --- Quiesced ---------------------------------------------------------------------------------------------------------
    FROZEN = "Frozen", "The guest's agent froze file systems."
    PAUSED = "Paused", "The VM was paused for the moment."
    HELD = "Held", "Another method made the VM stand still."
    STOOD_STILL = "StoodStill", "The VM was off or paused already: nothing had to be held."
    NOT_STILL = "NotStill", "Nothing had to be held, but the VM did not stand still."
    NOT_REQUESTED = "NotRequested", "Policy Never: nothing was sent to the VM."
    NOT_STARTED = "NotStarted", "It did not come to that: nothing was touched."
    FREEZE_FAILED = "FreezeFailed", "The guest's file systems could not be frozen; it was thawed all the same."
    PAUSE_FAILED = "PauseFailed", "The VM could not be paused."
    QUIESCE_FAILED = "QuiesceFailed", "The VM could not be made to stand still."
    GUARDIAN_NOT_READY = "GuardianNotReady", "No guardian has acknowledged: nobody freezes without one."
    NOT_LEADER = "NotLeader", "This instance of the operator does not hold the lease, or not for long enough."

    # --- VolumesSnapshotted -----------------------------------------------------------------------------------------------
    SNAPSHOTTED = "Snapshotted", "All disks are cut: the point in time exists."
    CUT_FAILED = "CutFailed", "A group could not be cut; the message names the driver and the disks."
    FROZEN_TOO_LONG = "FrozenTooLong", "The VM was freed by its limit before all groups were cut."
    ALREADY_CUT = "AlreadyCut", "The storage system holds the name already: an older attempt is never adopted."
    DRIVER_ERROR = "DriverError", "A storage driver said no."
    DRIVER_TIMEOUT = (
        "DriverTimeout",
        "A storage driver did not answer in time; its process was killed and its leftovers removed.",
    )
    DRIVER_CRASHED = "DriverCrashed", "A storage driver's process ended before it answered."
    DRIVER_UNAVAILABLE = "DriverUnavailable", "A storage driver does not start, or its storage system does not answer."
    INTERRUPTED = "Interrupted", "The operator was ended in the middle, more often than it tries again."
    DEADLINE_EXCEEDED = "DeadlineExceeded", "The point in time did not exist within spec.deadlineSeconds."

    # --- Unquiesced -------------------------------------------------------------------------------------------------------
    THAWED = "Thawed", "The guest's agent thawed the file systems and says so."
    RESUMED = "Resumed", "The VM runs again."
    LET_GO = "LetGo", "Another method let the VM go on."
    NOTHING_HELD = "NothingHeld", "The VM was never held."
    FREE = "Free", "The VM is confirmed to go on."
    NOT_CONFIRMED = "NotConfirmed", "Nobody has confirmed yet that the VM goes on."
    RECOVERING = "Recovering", "The VM is being freed after an interruption."
    THAW_FAILED = "ThawFailed", "The guest could not be thawed yet; it is tried again."
    RESUME_FAILED = "ResumeFailed", "The VM could not be resumed yet; it is tried again."
    JOURNAL_UNREADABLE = (
        "JournalUnreadable",
        "The VM's metadata holds a journal that cannot be read: somebody may hold it.",
    )

    # --- Ready ------------------------------------------------------------------------------------------------------------
    READY = "Ready", "It can be used: a snapshot restored, a class or hypervisor chosen."
    READY_DEADLINE_EXCEEDED = "ReadyDeadlineExceeded", "It could not be restored within spec.readyDeadlineSeconds."
    DELETING = "Deleting", "It is being deleted."
    CONTENT_NOT_BOUND = (
        "ContentNotBound",
        "The VMSnapshotContent belongs to another object, or was changed by another hand: its handles are not used.",
    )

    # --- Ready of a StorageDriverClass or a Hypervisor --------------------------------------------------------------------
    DRIVER_NOT_INSTALLED = "DriverNotInstalled", "No driver of this name is installed."
    DRIVER_NOT_LOADABLE = "DriverNotLoadable", "The driver is installed and cannot be loaded."
    INVALID_PARAMETERS = "InvalidParameters", "The driver does not accept spec.parameters."
    INVALID_CREDENTIALS = "InvalidCredentials", "The driver does not accept what the Secret holds."
    SECRET_NOT_FOUND = "SecretNotFound", "The Secret is not in the operator's namespace."
    SECRET_INVALID = "SecretInvalid", "The Secret holds something that is no text."
    ENDPOINT_INVALID = "EndpointInvalid", "An endpoint's fields do not go together."

    # --- Reconciling ------------------------------------------------------------------------------------------------------
    NOT_YET = "NotYet", "It has not come to that yet."
    PLANNING = "Planning", "The choices are being made."
    PREPARING = "Preparing", "The intent is written down and the drivers do what is slow; the VM is untouched."
    TAKING = "Taking", "The VM is being held and its disks are being cut."
    RECORDING = "Recording", "What was cut, and the evidence, are being written down."
    SETTLING = "Settling", "The point in time exists; it is being made restorable while the VM runs."
    RETRYING = "Retrying", "The last step failed and is tried again."
    ROLLING_BACK = "RollingBack", "What was cut is being removed."
    STORAGE_UNAVAILABLE = (
        "StorageUnavailable",
        "A storage system cannot be asked what it still holds, or to remove it; it is tried again.",
    )
    DRY_RUN = "DryRun", "spec.dryRun: it was planned, and nothing more will be done."

    # --- Stalled ----------------------------------------------------------------------------------------------------------
    STALLED = "Stalled", "It failed for good; the condition Stalled says why."
    NOT_STALLED = "NotStalled", "It has not failed."
    REFUSED = "Refused", "It cannot be done as it was asked for; nothing was touched."
    INTERNAL_ERROR = "InternalError", "The operator itself failed; its log says more."

    # --- the API server as the operator meets it --------------------------------------------------------------------------
    CONFLICT = "Conflict", "Somebody else wrote first; it is looked at again."
    KUBERNETES_ERROR = "KubernetesError", "The API server refused a request of the operator."
    KUBERNETES_UNAVAILABLE = "KubernetesUnavailable", "The API server does not answer."
    NOT_FOUND = "NotFound", "The API server has no such object."
    INVALID = "Invalid", "The API server refused what the operator wrote: its definitions are of another version."
    FORBIDDEN = "Forbidden", "The operator's ServiceAccount may not do this."
    UNAUTHORIZED = "Unauthorized", "The API server does not accept the operator's credentials."
    INSTALLATION_LOST = "InstallationLost", "The ConfigMap with the installation's id was emptied."

    # --- why the operator does not start: in its log ----------------------------------------------------------------------
    KUBECONFIG_INVALID = "KubeconfigInvalid", "The kubeconfig, or what the pod is given in its place, cannot be used."
    CLOSED = "Closed", "The connection to the API server was closed before: a mistake in the operator."
    PORT_IN_USE = "PortInUse", "The telemetry port is taken."

    # --- events -----------------------------------------------------------------------------------------------------------
    SNAPSHOT_TAKEN = "SnapshotTaken", "The point in time exists and was written down."
