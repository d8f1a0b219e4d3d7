"""The reasons of conditions and events: stable words that programs may compare with, each with what it means and what to do.

The only source of `docs/reasons.md`. A test holds the words that the code uses against this list. Storage drivers, strategies
and quiesce methods that others add have words of their own beside these.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

_FINE = "Nothing: this is as it should be."


class Reason(StrEnum):
    """One word for one state of affairs; `meaning` says it in a sentence, `action` what can be done about it."""

    meaning: str
    action: str

    def __new__(cls, word: str, meaning: str, action: str) -> Self:
        """Make a member that is its word and knows its meaning and what to do."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        member.action = action
        return member

    # --- Planned: what was asked for -------------------------------------------------------------------------------------
    PLANNED = (
        "Planned",
        "Every choice is made, and nothing was touched yet.",
        _FINE,
    )
    INVALID_OBJECT = (
        "InvalidObject",
        "The object itself cannot be understood.",
        "Correct the field that the message names, or, if the object came from an older version or a backup, write it anew.",
    )
    HYPERVISOR_NOT_FOUND = (
        "HypervisorNotFound",
        "There is no Hypervisor of this name.",
        "Correct spec.source.hypervisorName, or let an administrator create the Hypervisor.",
    )
    HYPERVISOR_UNREACHABLE = (
        "HypervisorUnreachable",
        "libvirt does not answer on any endpoint that may have the VM.",
        "Look at the Hypervisor's Ready condition, then at libvirtd and the network to the endpoint it names. It goes on by itself.",
    )
    HYPERVISOR_TIMEOUT = (
        "HypervisorTimeout",
        "A call to libvirt did not return in time; what it did is unknown.",
        "Look whether libvirtd on the named host hangs (`virsh list` there); it is tried again by itself.",
    )
    HYPERVISOR_ERROR = (
        "HypervisorError",
        "libvirt answered with an error.",
        "Do what libvirt's own words in the message say; its log on the host says more.",
    )
    DOMAIN_NOT_FOUND = (
        "DomainNotFound",
        "The VM is not there, or not for this namespace: the two look alike on purpose.",
        "Check spec.source.domain, and that spec.access of the Hypervisor names this namespace and VM.",
    )
    DOMAIN_AMBIGUOUS = (
        "DomainAmbiguous",
        "The VM runs nowhere, and several endpoints of its Hypervisor define it: with different disks or devices, or (of a VMRestore in place) at all.",
        "On the hosts that the message names, undefine it where it does not belong (`virsh undefine --keep-nvram` leaves its disks alone); or, for a snapshot, start it where it does. Migrate with --undefinesource.",
    )
    STRATEGY_UNKNOWN = (
        "StrategyUnknown",
        "No strategy of this name is installed.",
        "Use Auto, or one of the strategies that the message lists.",
    )
    QUIESCE_METHOD_UNKNOWN = (
        "QuiesceMethodUnknown",
        "No quiesce method of this name is installed.",
        "Use Auto, or one of the methods that the message lists.",
    )

    # --- Planned: the VM's disks and devices ------------------------------------------------------------------------------
    EXCLUDED_TARGET_NOT_FOUND = (
        "ExcludedTargetNotFound",
        "A disk to be left out is none of the VM's.",
        "Correct spec.volumes.exclude: the message lists the disks that there are.",
    )
    UNSUPPORTED_DISK = (
        "UnsupportedDisk",
        "A disk or device bears state and cannot be snapshotted: shareable, transient, encrypted, empty, passed through, a shared directory.",
        "Name the disk in spec.volumes.exclude if it may be left out, or remove the device from the VM.",
    )
    NO_VOLUMES = (
        "NoVolumes",
        "No disk is left to be snapshotted, or to make a new VM of.",
        "Exclude fewer disks, or include one.",
    )
    NO_CLASS_FOR_DISK = (
        "NoClassForDisk",
        "No StorageDriverClass matches a disk, or no driver of those that do says that it fits.",
        "Create a StorageDriverClass that matches the disk, or exclude the disk; the message says what each class or driver answered.",
    )
    CLASS_TIE = (
        "ClassTie",
        "Two classes of the same priority would serve a disk.",
        "Give one of the two classes a higher spec.priority.",
    )
    CLASS_NOT_READY = (
        "ClassNotReady",
        "The class that would serve a disk is not Ready.",
        "Look at the class's Ready condition; the snapshot goes on by itself once the class is Ready.",
    )
    OVERLAY_NOT_AVAILABLE = (
        "OverlayNotAvailable",
        "A class cannot cut in an instant, or the method HypervisorSnapshot was asked for, and no overlay can be made.",
        "Use another method or policy, or mend what the message names; a class that cuts slowly under a freeze has to allow it (spec.allowUnderFreeze).",
    )

    # --- Planned: the VM and its agent ------------------------------------------------------------------------------------
    VM_BUSY = (
        "VMBusy",
        "Another operation of ours is under way on this VM; this one waits.",
        "Wait: it begins by itself. If nobody seems to be at it, `vmsnapshot-operator sweep --dry-run` shows who holds the VM.",
    )
    VM_MIGRATING = (
        "VMMigrating",
        "The VM is between two hosts.",
        "Wait: it begins when the migration has ended.",
    )
    BACKUP_RUNNING = (
        "BackupRunning",
        "The hypervisor is copying disks of this VM, for another snapshot or another program, and does one such job at a time.",
        "Wait: it begins by itself when that job has ended. `virsh domjobinfo` shows how far it is.",
    )
    BACKUP_NEEDS_RUNNING_VM = (
        "BackupNeedsRunningVM",
        "The VM is off, and a class whose disks the hypervisor copies has one that nothing else could copy.",
        "Start the VM, or give another class that matches the disk a higher priority.",
    )
    VM_PAUSED = (
        "VMPaused",
        "The VM is paused and policy Require needs it running.",
        "Resume the VM, or use policy Prefer.",
    )
    VM_STATE_UNSUPPORTED = (
        "VMStateUnsupported",
        "The VM neither runs, nor is paused, nor is shut off.",
        "Start the VM or shut it off, then create the VMSnapshot again.",
    )
    VM_NOT_CLEANLY_SHUT_DOWN = (
        "VMNotCleanlyShutDown",
        "The VM is off, but was not heard being shut down by its own system: it was ended otherwise, or this operator did not listen then.",
        "Start the VM and, while the operator runs, shut it down from within; or use policy Prefer.",
    )
    AGENT_ABSENT = (
        "AgentAbsent",
        "The guest has no agent that is connected.",
        "Install and start qemu-guest-agent in the guest and give the domain its channel, or use policy Prefer.",
    )
    AGENT_SILENT = (
        "AgentSilent",
        "The guest's agent is connected and does not answer.",
        "Restart qemu-guest-agent in the guest; if it hangs at a freeze, look at its hooks and at the guest's disks.",
    )
    AGENT_TOO_OLD = (
        "AgentTooOld",
        "The guest's agent answers and cannot freeze file systems.",
        "Update qemu-guest-agent in the guest, or allow it the guest-fsfreeze commands.",
    )
    AGENT_ERROR = (
        "AgentError",
        "The guest's agent answered with an error.",
        "Do what the agent's own words in the message say; the guest's log says more.",
    )
    ALREADY_FROZEN = (
        "AlreadyFrozen",
        "Somebody else has frozen the guest: nothing was sent to it.",
        "Let whoever froze it (a backup program, an administrator) thaw it; if nobody is at it, `vmsnapshot-operator thaw --force` does.",
    )
    NO_FILE_SYSTEMS = (
        "NoFileSystems",
        "The guest's agent lists no file system on any disk.",
        "Mount the file systems in the guest, or use policy Prefer.",
    )
    MOUNTPOINT_NOT_FOUND = (
        "MountpointNotFound",
        "The guest has no file system mounted at a path of spec.quiesce.mountpoints.",
        "Correct spec.quiesce.mountpoints: they are the guest's own paths.",
    )
    POLICY_NOT_MET = (
        "PolicyNotMet",
        "Policy Require needs Filesystem, and less is all that there is evidence for.",
        "Remove what the message names as missing, or use policy Prefer and read status.consistency.",
    )

    # --- Quiesced ---------------------------------------------------------------------------------------------------------
    FROZEN = (
        "Frozen",
        "The guest's agent froze file systems.",
        _FINE,
    )
    PAUSED = (
        "Paused",
        "The VM was paused for the moment.",
        _FINE,
    )
    HELD = (
        "Held",
        "Another method made the VM stand still.",
        _FINE,
    )
    STOOD_STILL = (
        "StoodStill",
        "The VM was off or paused already: nothing had to be held.",
        _FINE,
    )
    NOT_STILL = (
        "NotStill",
        "The VM did not stand still: it was started or resumed meanwhile, or a quiesce method of your own could not hold it.",
        "Take another snapshot if consistency Crash or better is needed.",
    )
    NOT_REQUESTED = (
        "NotRequested",
        "Policy Never: nothing was sent to the VM.",
        "Nothing: it was asked for so.",
    )
    NOT_STARTED = (
        "NotStarted",
        "It did not come to that: nothing was asked of the VM.",
        "Nothing here: the condition Stalled says why.",
    )
    FREEZE_FAILED = (
        "FreezeFailed",
        "The guest's file systems could not be frozen; it was thawed all the same.",
        "Look at the guest's agent and its freeze hooks; policy Prefer falls back by itself and says so.",
    )
    PAUSE_FAILED = (
        "PauseFailed",
        "The VM could not be paused.",
        "Look at the VM and at libvirtd's log on its host, then try again.",
    )
    QUIESCE_FAILED = (
        "QuiesceFailed",
        "The VM could not be made to stand still.",
        "Do what the message says; policy Prefer falls back by itself where another method may do.",
    )
    GUARDIAN_NOT_READY = (
        "GuardianNotReady",
        "No guardian has acknowledged: nobody freezes without one.",
        "Look at the guardian's container: it must run beside the operator, reach the hypervisor and answer on its socket.",
    )
    NOT_LEADER = (
        "NotLeader",
        "This instance of the operator does not hold the lease, or not for long enough.",
        "Wait: the instance with the lease does it. If none has it, look at the Lease in the operator's namespace and at the API server.",
    )

    # --- VolumesSnapshotted -----------------------------------------------------------------------------------------------
    SNAPSHOTTED = (
        "Snapshotted",
        "All disks are cut: the point in time exists.",
        _FINE,
    )
    CUT_FAILED = (
        "CutFailed",
        "A group could not be cut; the message names the driver and the disks.",
        "Do what the driver's words in the message say, then create another VMSnapshot; what was cut is removed by itself.",
    )
    FROZEN_TOO_LONG = (
        "FrozenTooLong",
        "The VM was freed by its limit before all groups were cut.",
        "Look why the named class is slow (status.cutMilliseconds), or raise spec.quiesce.maxFrozenSeconds if the VM bears it.",
    )
    ALREADY_CUT = (
        "AlreadyCut",
        "The storage system holds the name already: an older attempt is never adopted.",
        "Create the VMSnapshot again under any name; if it comes back, look for what else uses the operator's names on that storage.",
    )
    DRIVER_ERROR = (
        "DriverError",
        "A storage driver said no.",
        "Do what the driver's words in the message say.",
    )
    LOCK_NOT_GIVEN = (
        "LockNotGiven",
        "A Ceph image's lock is held by a client that Ceph does not see now; it was not shut out of its disk.",
        "If the VM runs, look at its host's way to Ceph; if it crashed and is off, start it once, or take the lock from it: `rbd lock rm`.",
    )
    DRIVER_TIMEOUT = (
        "DriverTimeout",
        "A storage driver did not answer in time; its process was killed and its leftovers removed.",
        "Look whether the storage system that the message names answers; it is tried again by itself.",
    )
    DRIVER_CRASHED = (
        "DriverCrashed",
        "A storage driver's process ended before it answered.",
        "Look at the operator's log for the driver's last words; it is tried again by itself.",
    )
    DRIVER_UNAVAILABLE = (
        "DriverUnavailable",
        "A storage driver does not start, or its storage system does not answer.",
        "Look at the class's Ready condition and at the storage system; it is tried again by itself.",
    )
    INTERRUPTED = (
        "Interrupted",
        "The operator was ended in the middle, more often than it tries again.",
        "Look why the operator was ended (restarts, memory, node), then create another VMSnapshot.",
    )
    DEADLINE_EXCEEDED = (
        "DeadlineExceeded",
        "The point in time did not exist within spec.deadlineSeconds.",
        "Remove what the message names as the last hindrance, or raise spec.deadlineSeconds, and create another VMSnapshot.",
    )

    # --- Unquiesced -------------------------------------------------------------------------------------------------------
    THAWED = (
        "Thawed",
        "The guest's agent thawed the file systems and says so.",
        _FINE,
    )
    RESUMED = (
        "Resumed",
        "The VM runs again.",
        _FINE,
    )
    LET_GO = (
        "LetGo",
        "Another method let the VM go on.",
        _FINE,
    )
    FREE_UNKNOWN = (
        "FreeUnknown",
        "Nobody has confirmed that the VM goes on, and nobody tries to free it any more: its journal was removed, or its Hypervisor.",
        "Look at the VM at once, and free it by hand (docs/operations.md says how with nothing of ours at hand).",
    )
    NOTHING_HELD = (
        "NothingHeld",
        "The VM was never held.",
        _FINE,
    )
    FREE = (
        "Free",
        "The VM is confirmed to go on.",
        _FINE,
    )
    NOT_CONFIRMED = (
        "NotConfirmed",
        "Nobody has confirmed yet that the VM goes on.",
        "Look at the VM at once: `vmsnapshot-operator thaw --hypervisor HYPERVISOR --domain DOMAIN` says its state and frees it; the operator goes on trying.",
    )
    RECOVERING = (
        "Recovering",
        "The VM is being freed after an interruption.",
        "Wait some seconds; if it stays so, `vmsnapshot-operator thaw --hypervisor HYPERVISOR --domain DOMAIN` says why.",
    )
    THAW_FAILED = (
        "ThawFailed",
        "The guest could not be thawed yet; it is tried again.",
        "Look at the guest's agent: without it only a reset of the VM is left. It is tried again by itself.",
    )
    RESUME_FAILED = (
        "ResumeFailed",
        "The VM could not be resumed yet; it is tried again.",
        "Look at libvirtd on the VM's host, or run `virsh resume DOMAIN` there. It is tried again by itself.",
    )
    JOURNAL_UNREADABLE = (
        "JournalUnreadable",
        "The VM's metadata holds a journal that cannot be read: somebody may hold it.",
        "Find out who wrote it (an operator of a newer version?); if nobody holds the VM, remove the element: `virsh metadata DOMAIN https://vmsnapshot.io/journal/1 --remove`, with --live and --config.",
    )

    # --- Ready ------------------------------------------------------------------------------------------------------------
    READY = (
        "Ready",
        "It can be used: a snapshot restored, a class or hypervisor chosen.",
        _FINE,
    )
    READY_DEADLINE_EXCEEDED = (
        "ReadyDeadlineExceeded",
        "It could not be restored within spec.readyDeadlineSeconds.",
        "Look why copying takes so long on the class that is named, or raise spec.readyDeadlineSeconds, and create another VMSnapshot.",
    )
    DELETING = (
        "Deleting",
        "It is being deleted.",
        "Wait; if it stays so, the condition Reconciling names the storage that does not confirm.",
    )
    CONTENT_NOT_BOUND = (
        "ContentNotBound",
        "The VMSnapshotContent belongs to another object, or was changed by another hand: its handles are not used.",
        "Restore the VMSnapshotContent from a backup as it was. If nobody needs it, delete it by hand, and on the storage what it names.",
    )

    # --- Ready of a StorageDriverClass or a Hypervisor --------------------------------------------------------------------
    DRIVER_NOT_INSTALLED = (
        "DriverNotInstalled",
        "No driver of this name is installed.",
        "Install the driver's package into the operator's image, or correct spec.driver; `vmsnapshot-operator doctor` lists what is installed.",
    )
    DRIVER_NOT_LOADABLE = (
        "DriverNotLoadable",
        "The driver is installed and cannot be loaded.",
        "Look at the message for what the driver misses (a library, a Python package) and install it into the operator's image.",
    )
    INVALID_PARAMETERS = (
        "InvalidParameters",
        "The driver does not accept spec.parameters.",
        "Correct the parameter that the message names.",
    )
    INVALID_CREDENTIALS = (
        "InvalidCredentials",
        "The driver does not accept what the Secret holds.",
        "Correct the Secret: the message names the key, never its value.",
    )
    SECRET_NOT_FOUND = (
        "SecretNotFound",
        "The Secret is not in the operator's namespace.",
        "Create the Secret in the operator's namespace, or let the operator's ServiceAccount read it.",
    )
    SECRET_INVALID = (
        "SecretInvalid",
        "The Secret holds something that is no text.",
        "Write the key that the message names anew, as text in UTF-8.",
    )
    ENDPOINT_INVALID = (
        "EndpointInvalid",
        "An endpoint's fields do not go together.",
        "Correct spec.libvirt.endpoints as the message says.",
    )

    # --- Reconciling ------------------------------------------------------------------------------------------------------
    NOT_YET = (
        "NotYet",
        "It has not come to that yet.",
        "Wait.",
    )
    PLANNING = (
        "Planning",
        "The choices are being made.",
        "Wait; the message says for what, if it takes long.",
    )
    PREPARING = (
        "Preparing",
        "The intent is written down and the drivers do what is slow; the VM is untouched.",
        "Wait.",
    )
    TAKING = (
        "Taking",
        "The VM is being held and its disks are being cut.",
        "Wait: this takes seconds.",
    )
    RECORDING = (
        "Recording",
        "What was cut, and the evidence, are being written down.",
        "Wait.",
    )
    SETTLING = (
        "Settling",
        "The point in time exists; it is being made restorable while the VM runs.",
        "Wait: how long depends on what has to be copied.",
    )
    RETRYING = (
        "Retrying",
        "The last step failed and is tried again.",
        "Read the message: it says what failed. It goes on by itself.",
    )
    ROLLING_BACK = (
        "RollingBack",
        "What was cut is being removed.",
        "Wait.",
    )
    STORAGE_UNAVAILABLE = (
        "StorageUnavailable",
        "A storage system cannot be asked what it still holds, or to remove it; it is tried again.",
        "Make the storage system that the message names answer; it goes on by itself.",
    )
    DRY_RUN = (
        "DryRun",
        "spec.dryRun: it was planned, and nothing more will be done.",
        "Nothing: read the plan in status, then create one without spec.dryRun.",
    )

    # --- overlays: a snapshot by copying ----------------------------------------------------------------------------------
    SWITCHED = (
        "Switched",
        "The VM writes to overlays, so that what lies beneath stands still while it is copied.",
        _FINE,
    )
    BACKUP_FAILED = (
        "BackupFailed",
        "The hypervisor did not begin to copy the disks.",
        "Nothing at first: it is tried again. If it stays so, do what libvirt's words in the message say.",
    )
    SWITCH_FAILED = (
        "SwitchFailed",
        "The VM could not be switched to overlays, or not all of its disks together.",
        "Do what libvirt's words in the message say; what was switched is committed by itself.",
    )
    DISK_PLUGGED = (
        "DiskPlugged",
        "A disk was plugged into the VM, or into the place of another one, while the snapshot was taken, so it is not in what was cut.",
        "Nothing: it is taken again with the disks that the VM has. Do not change the VM's disks while it is taken.",
    )
    COLLAPSING = (
        "Collapsing",
        "The overlays are being committed into the VM's own disks.",
        "Wait: how long depends on what the VM wrote meanwhile.",
    )
    OVERLAY_IN_USE = (
        "OverlayInUse",
        "An overlay of ours stands in a way that it must not be committed: the VM's chain was changed by another hand.",
        "Look at the VM's disks (`virsh domblklist`, `virsh domblkinfo`) and end what the message names; then it is committed by itself.",
    )
    OVERLAY_FULL = (
        "OverlayFull",
        "The copy was given up, because what the VM wrote meanwhile left too little room in the overlays' pool, or none, so that the VM stood still.",
        "Give the overlay pool more room, or take the snapshot when the VM writes less.",
    )
    OVERLAY_LOST = (
        "OverlayLost",
        "An overlay that held the VM's writes is gone from under it.",
        "Look at the VM's disks at once, and at what else deletes volumes of the overlay pool: what was written after the cut may be lost.",
    )
    OVERLAY_KEPT = (
        "OverlayKept",
        "An overlay is kept: its base was changed by somebody, or the VM goes on without it. It may hold the only copy of what the VM wrote.",
        "Do not delete it. Look who changed the base, compare both, and bring together by hand what the message names.",
    )
    GATE_LEFT = (
        "GateLeft",
        "A VM bears the gate of a restore whose VMRestore is gone: it cannot be started, its disks may be neither old nor new, and nobody opens the gate.",
        "Do not put its disks back before you know what they hold: see the chapter VMSnapshotGateLeft of docs/operations.md.",
    )
    COMMIT_FAILED = (
        "CommitFailed",
        "The commit of an overlay fails again and again, so the VM stays on it. It is tried again, at least each minute.",
        "Look at the storage of the disk that the message names: it may be full, or refuse writes; `virsh domblkerror`, and the log of its QEMU.",
    )
    JOURNAL_LOST = (
        "JournalLost",
        "The journal of overlays is no longer in the VM's metadata as it was written.",
        "Look who changes the VM's metadata; the snapshot says by itself what became of its overlays.",
    )

    # --- VMRestore: what was asked for ------------------------------------------------------------------------------------
    SNAPSHOT_NOT_FOUND = (
        "SnapshotNotFound",
        "There is no VMSnapshot of this name in the restore's namespace.",
        "Correct spec.snapshotName, or create the VMRestore in the namespace of the VMSnapshot.",
    )
    SNAPSHOT_UID_MISMATCH = (
        "SnapshotUIDMismatch",
        "The VMSnapshot is another one than spec.snapshotUID says.",
        "Correct spec.snapshotUID, or leave it out.",
    )
    SNAPSHOT_DELETING = (
        "SnapshotDeleting",
        "The VMSnapshot is being deleted.",
        "Take another snapshot.",
    )
    SNAPSHOT_NOT_READY = (
        "SnapshotNotReady",
        "The VMSnapshot is not Ready, or failed.",
        "Wait until it is Ready, or take another snapshot if it is Stalled.",
    )
    SNAPSHOT_DEGRADED = (
        "SnapshotDegraded",
        "What the VMSnapshot stands for is no longer whole on storage.",
        "Take another snapshot; the message says what is missing.",
    )
    INCLUDED_TARGET_NOT_FOUND = (
        "IncludedTargetNotFound",
        "A disk to be restored is none of the snapshot's.",
        "Correct spec.volumes.include: the message lists the disks that there are.",
    )
    DISKS_CHANGED = (
        "DisksChanged",
        "A disk of the VM is not what it was when the snapshot was taken.",
        "Change the VM back as the message says, or restore to a new VM (spec.mode NewVM).",
    )
    REVERT_NOT_SUPPORTED = (
        "RevertNotSupported",
        "A class cannot set disks back to what it has snapshotted.",
        "Restore into a new VM (spec.mode NewVM).",
    )
    NEWER_SNAPSHOTS = (
        "NewerSnapshots",
        "A class can go back to the newest snapshot of a disk alone, and there is a newer one, or the safety snapshot would be one.",
        "Delete the newer ones or set spec.safetySnapshot to false, as the message says, or restore into a new VM (spec.mode NewVM).",
    )
    CLONE_NOT_SUPPORTED = (
        "CloneNotSupported",
        "A class cannot make new volumes from what it has snapshotted.",
        "Restore in place (spec.mode InPlace).",
    )
    DRIVER_TOO_OLD = (
        "DriverTooOld",
        "The snapshot was cut by a newer version of its driver, whose handles this one cannot read.",
        "Install that version of the driver, or a later one: the snapshot is untouched.",
    )
    DEFINITION_MISSING = (
        "DefinitionMissing",
        "The snapshot does not hold the VM's definition.",
        "Restore in place, or define the new VM by hand.",
    )

    # --- VMRestore: what is done ------------------------------------------------------------------------------------------
    TAKING_SAFETY_SNAPSHOT = (
        "TakingSafetySnapshot",
        "The disks are being snapshotted as they are, before they are set back.",
        "Wait.",
    )
    TAKEN = (
        "Taken",
        "The safety snapshot is there: the message names its VMSnapshot.",
        "Nothing; delete it when it is no longer needed.",
    )
    SAFETY_SNAPSHOT_FAILED = (
        "SafetySnapshotFailed",
        "The safety snapshot failed, or the VM ran after it and wrote what it lacks, so no disk was changed.",
        "Look at the VMSnapshot that the message names, then create the VMRestore again, or set spec.safetySnapshot to false.",
    )
    STOPPING = (
        "Stopping",
        "The VM is being shut down.",
        "Wait.",
    )
    CLOSING_GATE = (
        "ClosingGate",
        "The VM's disks are being taken from its definition, so that nobody starts it meanwhile.",
        "Wait.",
    )
    GATED = (
        "Gated",
        "The VM's disks are taken from its definition until all of them are restored.",
        "Wait; if it stays so, the condition Reconciling says what hinders.",
    )
    HALF_DONE = (
        "HalfDone",
        "Disks may be neither old nor new: they are being set back, or somebody defined the VM anew in the middle of it.",
        "Wait; if it stays so, the condition Reconciling says what hinders. If it has failed so, do what the condition Stalled says.",
    )
    RESTORING = (
        "Restoring",
        "The disks are being set back.",
        "Wait: how long depends on what has to be copied.",
    )
    RESTORED = (
        "Restored",
        "All disks are what they were at the snapshot.",
        _FINE,
    )
    WENT_BACK = (
        "WentBack",
        "The restore could not be completed: all disks are what they were at the safety snapshot.",
        "Look at the condition Stalled for why; the VM can be started.",
    )
    GOING_BACK = (
        "GoingBack",
        "The restore cannot be completed: all disks are being set to the safety snapshot.",
        "Wait; then read the condition Stalled.",
    )
    BLOCKED = (
        "Blocked",
        "The restore can neither go on nor back; the VM cannot be started meanwhile.",
        "Mend what the message names; it goes on by itself.",
    )
    CLONING = (
        "Cloning",
        "The new VM's disks are being made from the snapshot.",
        "Wait: how long depends on what has to be copied.",
    )
    CLONED = (
        "Cloned",
        "All disks of the new VM are there.",
        _FINE,
    )
    DEFINED = (
        "Defined",
        "The VM is defined with its disks.",
        _FINE,
    )
    HANDING_OVER = (
        "HandingOver",
        "The new VM's disks are being made its own.",
        "Wait.",
    )
    STARTING = (
        "Starting",
        "The VM is being started.",
        "Wait.",
    )
    WAITING_FOR_AGENT = (
        "WaitingForAgent",
        "The VM was started; its guest's agent does not answer yet.",
        "Wait; if it stays so, look at the VM's console.",
    )
    ALREADY_RESTORED = (
        "AlreadyRestored",
        "The VM bears the mark of this very restore, by a VMRestore that was deleted and created anew: nothing was done again.",
        "Nothing; to go back once more, create a VMRestore of another name.",
    )
    IN_USE_BY_RESTORE = (
        "InUseByRestore",
        "A VMRestore restores from this VMSnapshot; its deletion waits.",
        "Wait, or delete the VMRestore.",
    )

    # --- Stalled ----------------------------------------------------------------------------------------------------------
    STALLED = (
        "Stalled",
        "It failed for good; the condition Stalled says why.",
        "Read the condition Stalled.",
    )
    NOT_STALLED = (
        "NotStalled",
        "It has not failed.",
        _FINE,
    )
    REFUSED = (
        "Refused",
        "It cannot be done as it was asked for; nothing was touched.",
        "Change what the message names and create the object again.",
    )
    INTERNAL_ERROR = (
        "InternalError",
        "The operator itself failed; its log says more.",
        "Report it with the operator's log of that moment.",
    )

    # --- the API server as the operator meets it --------------------------------------------------------------------------
    CONFLICT = (
        "Conflict",
        "Somebody else wrote first; it is looked at again.",
        _FINE,
    )
    KUBERNETES_ERROR = (
        "KubernetesError",
        "The API server refused a request of the operator.",
        "Look at the message for what the API server refused, and at the operator's log.",
    )
    KUBERNETES_UNAVAILABLE = (
        "KubernetesUnavailable",
        "The API server does not answer.",
        "Make the API server answer; VMs are freed without it.",
    )
    NOT_FOUND = (
        "NotFound",
        "The API server has no such object.",
        "Create the object that the message names.",
    )
    INVALID = (
        "Invalid",
        "The API server refused what the operator wrote: its definitions are of another version.",
        "Apply the CustomResourceDefinitions of the operator's own version.",
    )
    FORBIDDEN = (
        "Forbidden",
        "The operator's ServiceAccount may not do this.",
        "Apply the chart's ClusterRole of the operator's own version.",
    )
    UNAUTHORIZED = (
        "Unauthorized",
        "The API server does not accept the operator's credentials.",
        "Renew the token or the kubeconfig that the operator was given.",
    )
    INSTALLATION_LOST = (
        "InstallationLost",
        "The ConfigMap with the installation's id was emptied.",
        "Restore the ConfigMap `vmsnapshot-installation` from a backup; a new one would disown all that the storage systems hold.",
    )

    # --- why the operator does not start: in its log ----------------------------------------------------------------------
    KUBECONFIG_INVALID = (
        "KubeconfigInvalid",
        "The kubeconfig, or what the pod is given in its place, cannot be used.",
        "Correct the file, or run it in a pod with a ServiceAccount.",
    )
    CLOSED = (
        "Closed",
        "The connection to the API server was closed before: a mistake in the operator.",
        "Report it with the operator's log of that moment.",
    )
    PORT_IN_USE = (
        "PortInUse",
        "The telemetry port is taken.",
        "Give another port by --telemetry-port, or end what listens there.",
    )

    # --- events -----------------------------------------------------------------------------------------------------------
    SNAPSHOT_TAKEN = (
        "SnapshotTaken",
        "The point in time exists and was written down.",
        _FINE,
    )

    # --- a content, and what is left over ---------------------------------------------------------------------------------
    CONTENT_LOST = (
        "ContentLost",
        "The VMSnapshot was taken and its VMSnapshotContent is gone: nothing says any more what the storage systems hold of it.",
        "Restore the VMSnapshotContent from a backup, or delete the VMSnapshot: what is left under its names is removed then.",
    )
    RETAINED = (
        "Retained",
        "The VMSnapshot is gone and its deletionPolicy was Retain: the content and what the storage systems hold are kept.",
        "Nothing while it is wanted; else delete it on the storage by the handles in its spec, then delete the content.",
    )
    RESTORED_FROM_BACKUP = (
        "RestoredFromBackup",
        "The content was created whole, as a restore does, and its VMSnapshot is not there: nothing of it is touched.",
        "Delete it if it is not wanted: what it names is reported as orphans then. Else keep it until it was restored from.",
    )
    CONTENT_REMOVED = (
        "ContentRemoved",
        "A content whose VMSnapshot was gone was removed, after the storage systems had confirmed that they hold nothing of it.",
        "Nothing; find out who removed the VMSnapshot's finalizer by force.",
    )
    ORPHANS_FOUND = (
        "OrphansFound",
        "A storage system holds names of this installation that no VMSnapshot or VMSnapshotContent knows; they are not touched.",
        "Find out by the message what each one is; delete on the storage what nobody needs, which status.orphans of the class lists. Never delete one that a VM has among its disks: the message says so.",
    )
    ORPHAN_REMOVED = (
        "OrphanRemoved",
        "A leftover was removed from a storage system or an overlay pool, where it was proved to be ours and of no use to anybody.",
        "Nothing.",
    )
    VM_FREED = (
        "VMFreed",
        "A VM was found held by an attempt of ours that nobody was at any more, or standing still on overlays without room, and was freed.",
        "Nothing for the VM. Of one on overlays: see `OverlayFull`. Else look why neither the operator nor a guardian freed it before (restarts, node, network).",
    )
    VM_STILL_HELD = (
        "VMStillHeld",
        "A VM is held by an attempt of ours that is over, and could not be freed yet; it is tried again every few seconds.",
        "Look at the VM's agent and host at once; `vmsnapshot-operator thaw --hypervisor HYPERVISOR --domain DOMAIN` says its state.",
    )
    JOURNAL_LEFT = (
        "JournalLeft",
        "A VM bears a journal that cannot be read or is another installation's; it is not touched.",
        "See that the other installation runs; for one that cannot be read, see JournalUnreadable.",
    )

    # --- the words of the storage drivers that come with the operator: no class for a disk, why a cut failed ------------------
    DRIVER_SAYS_NO = "DriverSaysNo", "A driver refused a disk without a word of its own.", "Read the driver's message."
    FORMAT_NOT_SERVED = (
        "FormatNotServed",
        "The driver does not serve images of this format.",
        "Use another class for this disk, or convert the image.",
    )
    IN_GROUP = (
        "InGroup",
        "The RBD image is in a group already, and an image can be in one only.",
        "Remove it from that group, if nobody needs it; one of ours is taken over or removed by itself.",
    )
    IMAGE_NOT_FOUND = "ImageNotFound", "There is no such RBD image.", "Check the disk's source in the VM's definition."
    IN_USE = (
        "InUse",
        "The image that would be set back is in use.",
        "Shut the VM off that uses it, then try again.",
    )
    LAYERS_CHANGED = (
        "LayersChanged",
        "The volume to be set back has other layers beneath it than when it was cut.",
        "Bring the VM's disks back onto the images that were cut, or restore into a new VM.",
    )
    NO_EXCLUSIVE_LOCK = (
        "NoExclusiveLock",
        "The RBD image lacks the feature exclusive-lock, without which a cut may miss writes.",
        "Enable it: `rbd feature enable POOL/IMAGE exclusive-lock`.",
    )
    NO_SPACE = (
        "NoSpace",
        "The storage pool has not enough free space.",
        "Free some, delete snapshots that nobody needs, or enlarge the pool; it is tried again by itself.",
    )
    NOT_A_VOLUME = (
        "NotAVolume",
        "The disk is neither a file nor a volume of a libvirt storage pool.",
        "Use a class with another driver for this disk.",
    )
    NOT_RBD = "NotRbd", "The disk is no RBD image.", "Let the class match disks of protocol rbd only."
    OTHER_CLUSTER = (
        "OtherCluster",
        "The disk lies on another Ceph cluster than the class's.",
        "Make a class with the monitors of that cluster.",
    )
    OTHER_POOL = "OtherPool", "The disk lies in another pool than the class's.", "Make a class for that pool."
    OTHER_VOLUME = (
        "OtherVolume",
        "The volume to be set back is not the one that was cut.",
        "Restore onto the VM's own disks, or into a new VM.",
    )
    SIZE_CHANGED = (
        "SizeChanged",
        "The volume to be set back has another size than when it was cut.",
        "Give it the size that the message names, or restore into a new VM.",
    )
    SNAPSHOT_INCOMPLETE = (
        "SnapshotIncomplete",
        "The copy of the volume was not made to the end.",
        "Wait until the VMSnapshot is ready; if it failed, delete it and create another one.",
    )
    SNAPSHOT_CHANGED = (
        "SnapshotChanged",
        "The copy was written to since it was made, or nobody can say.",
        "Nothing: the next copy of the disk is of all of it. Find out who writes to the class's pool, and make another VMSnapshot.",
    )
    SNAPSHOT_LOST = (
        "SnapshotLost",
        "The cut is not whole, or the storage system does not hold it any more; the message says which.",
        "Delete the VMSnapshot, which nothing can be restored from, and take another one. If it was removed, find out who deletes on that storage.",
    )
    UNKNOWN_CLUSTER = (
        "UnknownCluster",
        "The disk names no monitor in its domain, so nobody can tell which Ceph cluster it lies on.",
        "Name the monitors in the domain's disk; or set the class's parameter allowDisksWithoutHosts, if there is one cluster only.",
    )
    SIZE_UNKNOWN = (
        "SizeUnknown",
        "Nobody can say how big a disk is that the hypervisor would copy.",
        "Start the VM: libvirt knows the sizes of a running one's disks.",
    )
    POOL_NOT_SERVED = (
        "PoolNotServed",
        "The class's pool is none of files in a directory, or its file system cannot share blocks and the class asks for that.",
        'Name another pool in the class\'s parameter poolName, or leave incremental: "true" out.',
    )
    POOL_INACTIVE = (
        "PoolInactive",
        "The class's pool is defined on the host, and not active.",
        "Start it: `virsh pool-start`.",
    )
    VOLUME_MISSING = (
        "VolumeMissing",
        "The volume to be set back does not exist any more.",
        "Restore into a new VM.",
    )
    VOLUME_NOT_FOUND = (
        "VolumeNotFound",
        "The storage pool has no such volume.",
        "Check the disk's source; refresh the pool (`virsh pool-refresh POOL`) if the file is new.",
    )

    # --- restoring: the VM and its definition ------------------------------------------------------------------------------
    DEFINITION_UNUSABLE = (
        "DefinitionUnusable",
        "The VM's definition cannot be worked with: it is damaged, lacks the disk, or names what a second VM may not share.",
        "Do what the message says: change the VM's definition, or define the new VM by hand from clones.",
    )
    MARKER_UNREADABLE = (
        "MarkerUnreadable",
        "What a restore wrote into the domain's metadata cannot be read; nothing is changed on the VM.",
        "Look at it (`virsh dumpxml DOMAIN`), and whether a restore is under way; if another version of the operator wrote it, let that one go on.",
    )
    NAME_TAKEN = (
        "NameTaken",
        "A VM of the name, or of the UUID, that the new one was to have is there already.",
        "Use another spec.newVM.name, or remove that VM.",
    )
    VM_NOT_STOPPED = (
        "VMNotStopped",
        "The VM does not stay off: whenever it is stopped something starts it again.",
        "Find out what starts it (a cluster manager, a script) and tell that to leave it off; then create the VMRestore again.",
    )
    VM_RUNNING = (
        "VMRunning",
        "The VM runs, so that its disks are in use and cannot be set back.",
        "Shut the VM down, or use spec.runningVM Stop; or restore into a new VM.",
    )
    VM_SAVED = (
        "VMSaved",
        "The VM was saved with its memory, which belongs to its disks as they are now.",
        "Start the VM and shut it down, or throw its memory away (`virsh managedsave-remove`).",
    )
    VM_STOPPED = (
        "VMStopped",
        "The VM was started and does not run any more.",
        "Look at the VM's console and at libvirt's log on the host for why it stopped.",
    )
    VM_TRANSIENT = (
        "VMTransient",
        "The VM is transient: nothing would be left of it once it is stopped.",
        "Define the VM (`virsh define`), or restore into a new VM.",
    )


def document() -> str:
    """Return the page that lists all reasons by their words: for the same list always the same."""
    rows = "\n".join(f"| `{r}` | {_cell(r.meaning)} | {_cell(r.action)} |" for r in sorted(Reason))
    return _PAGE.format(rows=rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_PAGE = """\
<!-- Generated from the list in the code by `make generate`; `make lint` fails if it differs. -->
# Reasons

Every condition and every event says why in one stable word, and in a message with the names and numbers of the case. Programs
may compare the words; messages are for people and may change. Drivers, strategies and quiesce methods of others have words
of their own beside these.

| Reason | What it means | What to do |
|---|---|---|
{rows}
"""
