"""A third storage driver, as a vendor would write it: this one module and its entry point. It clones files into a folder.

A class's parameter `cut` lets it misbehave while the guest stands still.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Volume, VolumeId
from vmsnapshot_operator.errors import AlreadyCutError, DriverError, DriverUnavailableError


class Parameters(BaseModel):
    """`held`: the folder of the clones; `cut`: what happens to a cut."""

    held: Path
    cut: Literal["well", "fails", "hangs", "dies", "late"] = "well"


class FolderDriver:
    """Each name is a folder with one clone per volume; what it did when is in the file `log`."""

    Parameters = Parameters

    class Credentials(BaseModel):
        """None are needed."""

    def __init__(self, parameters: Parameters, credentials: Credentials) -> None:
        self._held, self._how = parameters.held, parameters.cut

    def capabilities(self) -> Capabilities:
        if not self._held.is_dir():
            raise DriverUnavailableError(f"{self._held} is not there")
        return Capabilities(cut=CutKind.INSTANT, atomic=False, revert=False)

    def can_handle(self, volumes: Sequence[Volume]) -> Fit:
        others = [v.label for v in volumes if not v.writable.source.startswith("/")]
        return Fit(ok=not others, reason="NotAFile" if others else "Fits")

    def prepare(self, request: SnapshotRequest) -> None:
        if (self._held / request.name).exists():
            raise AlreadyCutError(f"{request.name} is there")

    def cut(self, request: SnapshotRequest) -> CutResult:
        self._log("cut", request.name)
        folder = self._held / request.name
        folder.mkdir()
        match self._how:
            case "fails":
                raise DriverError("the array is full", reason="ArrayFull")
            case "hangs":
                ctypes.PyDLL(None).sleep(3600)  # deaf to whatever Python would hear
            case "dies":
                os.abort()
            case "late":
                time.sleep(request.timeout + 1.0)
        handles: dict[VolumeId, Handle] = {}
        for volume in request.volumes:
            clone = folder / volume.label
            subprocess.run(["cp", "--reflink=auto", volume.writable.source, clone], check=True)
            handles[volume.id] = Handle(str(clone))
        return CutResult(handles=handles, atomic=False)

    def wait_ready(self, request: SnapshotRequest, cut: CutResult) -> None:
        return

    def check_revert(self, cut: CutResult, onto: Sequence[Volume]) -> Sequence[Fit]:
        return [Fit(ok=False, reason="CannotRevert") for _ in onto]

    def revert(self, cut: CutResult, onto: Sequence[Volume]) -> None:
        raise DriverError("this storage cannot revert", reason="CannotRevert")

    def clone(self, cut: CutResult, name: str) -> Mapping[VolumeId, Layer]:
        raise DriverError("this storage cannot clone", reason="CannotClone")

    def keep(self, name: str) -> None:
        return

    def delete(self, name: str) -> None:
        self._log("delete", name)
        folder = self._held / name
        for clone in folder.glob("*"):
            clone.unlink()
        if folder.exists():
            folder.rmdir()

    def list(self, prefix: str) -> Sequence[str]:
        return sorted(p.name for p in self._held.iterdir() if p.name.startswith(prefix))

    def missing(self, cuts: Sequence[CutResult]) -> Sequence[Handle]:
        return [h for c in cuts for h in c.handles.values() if not Path(h).exists()]

    def _log(self, what: str, name: str) -> None:
        with (self._held / "log").open("a") as log:
            log.write(f"{time.time()} {what} {name}\n")


class DeadDriver(FolderDriver):
    """Its process ends before it is ready."""

    def __init__(self, parameters: Parameters, credentials: FolderDriver.Credentials) -> None:
        print("cannot find libarray.so", file=sys.stderr, flush=True)
        os.abort()


ENTRY_POINTS = """[vmsnapshot_operator.drivers]
third = third_driver:FolderDriver
third-dead = third_driver:DeadDriver
"""


def install(into: Path) -> Path:
    """Install this module and its entry points in a folder, as pip would; return the folder."""
    about = into / "third_driver-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: third-driver\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    (into / "third_driver.py").write_text(Path(__file__).read_text())
    return into
