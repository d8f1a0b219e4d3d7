"""Which images the disks of a domain lie on, as the running VM has them and as its saved definition says. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from vmsnapshot_operator.core.machine import PowerState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockJob:
    """A block job of a disk. `commit`: it is an active commit. `ready`: both images are alike, and stay so until it is ended."""

    commit: bool
    ready: bool = False
    done_bytes: int = 0
    total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskChain:
    """One disk: its images by source, the writable one first, in the running VM (empty if it does not run) and as saved.

    Of the saved definition only the first is sure: libvirt finds out the others when it starts the VM.
    """

    target: str
    live: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    job: BlockJob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chains:
    """All disks of a domain at one moment. `run_id` as in `core.machine`.

    `io_error`: it is paused by an I/O error, and by nobody. `stalled`: and that occurred at a disk that has an overlay of ours, or had one;
    also where the hypervisor does not say at which.
    """

    run_id: int
    power: PowerState
    io_error: bool = False
    stalled: bool = False
    disks: tuple[DiskChain, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether it runs, or would but for an I/O error: its block jobs run all the same."""
        return self.power is PowerState.RUNNING or self.io_error

    def with_image(self, source: str) -> DiskChain | None:
        """The disk that has this image anywhere in its chain, live or saved."""
        return next((d for d in self.disks if source in d.live or source in d.saved), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlaid:
    """What was seen of a VM that may have overlays of ours.

    `chains` is None if the domain is gone. `fingerprints`: of each base, by volume, as far as it could be read now.
    `pristine`: volumes whose overlay nobody ever wrote to. `missing`: those whose overlay does not exist (any more). `on_base`: those that
    a disk of the running VM writes to itself, with nothing over them.
    """

    chains: Chains | None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    pristine: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    on_base: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlayFile:
    """A file or image under a name of our overlays, as one endpoint shows it, whoever made it.

    `domain`: the VM that has it among its disks, running or saved; empty if none has. `pristine`: nobody ever wrote to it.
    `genuine`: its content is what this program writes into a new overlay, byte for byte; looked at only where it is pristine.
    `stalled`: that VM writes to it, and stands still by an I/O error, maybe at it.
    """

    path: str
    endpoint: str
    domain: str = ""
    pristine: bool = False
    genuine: bool = False
    stalled: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]


class Move(StrEnum):
    """What is done about one overlay."""

    COMMIT = "Commit"
    WATCH = "Watch"  # the commit is under way
    PIVOT = "Pivot"
    REMOVE = "Remove"
    GONE = "Gone"  # nothing is left to do
    WAIT = "Wait"  # the VM, or somebody, has to do something first
    KEEP = "Keep"  # never touched again, and told to a person


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruling:
    """One overlay: what is done, and why, in a sentence for people. `target` is empty where no disk has it.

    `done`, `total`: bytes of a commit that is under way.
    """

    volume: str
    overlay: str
    move: Move
    why: str = ""
    target: str = ""
    done: int = 0
    total: int = 0
