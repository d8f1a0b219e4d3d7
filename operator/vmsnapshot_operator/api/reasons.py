"""All stable reasons in one place: what a program may compare with, and what each means.

A test holds them against the words that the code uses, so that none is used and not listed, or listed and not used.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Reasons of conditions and events, by the moment at which they arise."""

    # --- planning: nothing was touched
    PLANNED = "Planned"
    HYPERVISOR_NOT_FOUND = "HypervisorNotFound"  # no Hypervisor of this name
    HYPERVISOR_UNREACHABLE = "HypervisorUnreachable"  # libvirt does not answer
    DOMAIN_NOT_FOUND = "DomainNotFound"  # not there, or not for this namespace: the two look alike on purpose
    EXCLUDED_TARGET_NOT_FOUND = "ExcludedTargetNotFound"
    UNSUPPORTED_DISK = "UnsupportedDisk"  # shareable, transient, encrypted, passed through, empty, shared directory
    NO_VOLUMES = "NoVolumes"
    NO_CLASS_FOR_DISK = "NoClassForDisk"
    CLASS_TIE = "ClassTie"
    CLASS_NOT_READY = "ClassNotReady"
    OVERLAY_NOT_AVAILABLE = "OverlayNotAvailable"  # a class copies, and only an overlay would let it
    STRATEGY_UNKNOWN = "StrategyUnknown"
    QUIESCE_METHOD_UNKNOWN = "QuiesceMethodUnknown"
    MOUNTPOINT_NOT_FOUND = "MountpointNotFound"
    NO_FILE_SYSTEMS = "NoFileSystems"
    AGENT_ABSENT = "AgentAbsent"
    AGENT_SILENT = "AgentSilent"
    AGENT_TOO_OLD = "AgentTooOld"
    ALREADY_FROZEN = "AlreadyFrozen"  # by somebody else: nothing is sent
    VM_PAUSED = "VMPaused"
    VM_MIGRATING = "VMMigrating"
    VM_BUSY = "VMBusy"  # another snapshot of the same VM
    VM_NOT_CLEANLY_SHUT_DOWN = "VMNotCleanlyShutDown"
    VM_STATE_UNSUPPORTED = "VMStateUnsupported"
    POLICY_NOT_MET = "PolicyNotMet"  # Require, and less than Filesystem

    # --- under way
    NOT_YET = "NotYet"
    NOT_STARTED = "NotStarted"
    NOT_STALLED = "NotStalled"
    PLANNING = "Planning"
    PREPARING = "Preparing"
    TAKING = "Taking"
    RECORDING = "Recording"
    SETTLING = "Settling"
    RECOVERING = "Recovering"
    RETRYING = "Retrying"
    ROLLING_BACK = "RollingBack"
    DELETING = "Deleting"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    GUARDIAN_NOT_READY = "GuardianNotReady"  # nobody freezes without one
    NOT_LEADER = "NotLeader"

    # --- the window
    FROZEN = "Frozen"
    PAUSED = "Paused"
    HELD = "Held"
    STOOD_STILL = "StoodStill"
    NOT_STILL = "NotStill"
    NOT_REQUESTED = "NotRequested"
    SNAPSHOTTED = "Snapshotted"
    THAWED = "Thawed"
    RESUMED = "Resumed"
    LET_GO = "LetGo"
    NOTHING_HELD = "NothingHeld"
    FREE = "Free"
    NOT_CONFIRMED = "NotConfirmed"
    FREEZE_FAILED = "FreezeFailed"
    PAUSE_FAILED = "PauseFailed"
    FROZEN_TOO_LONG = "FrozenTooLong"  # the budget was over before the cuts were done
    CUT_FAILED = "CutFailed"
    DRIVER_ERROR = "DriverError"
    DRIVER_UNAVAILABLE = "DriverUnavailable"
    DRIVER_TIMEOUT = "DriverTimeout"
    DRIVER_CRASHED = "DriverCrashed"
    ALREADY_CUT = "AlreadyCut"

    # --- the end
    READY = "Ready"
    DRY_RUN = "DryRun"
    STALLED = "Stalled"
    INTERRUPTED = "Interrupted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    READY_DEADLINE_EXCEEDED = "ReadyDeadlineExceeded"
    CONTENT_NOT_BOUND = "ContentNotBound"  # the content was forged or changed by another hand
    SNAPSHOT_TAKEN = "SnapshotTaken"  # an event
