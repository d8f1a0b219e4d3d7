"""Storage drivers that misbehave on demand. Each keeps what it "holds" as files in the directory `held`."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vmsnapshot_operator.core.driver import Capabilities, CutKind, CutResult, Fit, Progress
from vmsnapshot_operator.core.volumes import Handle, Layer, SourceKind, VolumeId
from vmsnapshot_operator.drivers import wire
from vmsnapshot_operator.errors import AlreadyCutError, DriverError


class Parameters(BaseModel):
    model_config = ConfigDict(frozen=True)
    held: str
    limit: int = 3


class Credentials(BaseModel):
    password: str = ""


class Toy:
    """Behaves as the request's name says: `hang-…`, `abort-…`, `slow-…`, `fail-…`, `loud-…`, otherwise well."""

    Parameters = Parameters
    Credentials = Credentials

    def __init__(self, parameters, credentials):
        self.held = Path(parameters.held)
        self.password = credentials.password
        self.prepared = set()
        self.copied = None

    def capabilities(self):
        return Capabilities(cut=CutKind.INSTANT, atomic=True, revert=False, clone=True)

    def can_handle(self, volumes):
        return Fit(ok=False, reason="not a word", message=f"no\n\x1b[31m {self.password} {len(volumes)}")

    def prepare(self, request):
        if (self.held / request.name).exists():
            raise AlreadyCutError(f"{request.name} was cut before")
        self.prepared.add(request.name)
        if request.name.startswith("slow-prepare"):
            time.sleep(3600)

    def cut(self, request):
        how = request.name.partition("-")[0]
        if how == "hang":
            (self.held / ".hangs").touch()
            # Inside of C and deaf to Python: signals that Python would handle do not interrupt it.
            ctypes.PyDLL(None).sleep(3600)
        if how == "sleep":
            time.sleep(1.2)
        if how == "wait":
            time.sleep(3600)
        if how == "abort":
            os.abort()
        if how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "fail":
            raise DriverError(f"the array says: bad password {self.password}\n" + "x" * 5000, reason="ArrayBusy")
        if how == "bug":
            raise ZeroDivisionError("division by " + self.password)
        if how == "loud":
            print("stdout", self.password)
            sys.stdout.flush()
            print("stderr", self.password, file=sys.stderr)
            logging.getLogger("toy").warning("logged %s", self.password)
            print("y" * 200_000 + self.password, file=sys.stderr)
            for n in range(1000):
                print("line", n, file=sys.stderr)
        if how == "wrong":
            return CutResult(handles={"other": Handle("h")}, atomic=True)
        if how == "junk":
            return {"handles": 3}
        (self.held / request.name).write_text(str(os.getpid()))
        looked_up = "prepared" if request.name in self.prepared else "unprepared"
        return CutResult(
            handles={v.id: Handle(f"{request.name}/{v.id}") for v in request.volumes},
            atomic=True,
            group=Handle(f"{os.getpid()} {looked_up}"),
        )

    def wait_ready(self, request, cut):
        how, _, steps = request.name.partition("-")
        self.copied = 0
        for self.copied in range(int(steps) if how == "copy" else 0):
            time.sleep(wire.REPORT_SECONDS / 2)
        if how == "child":
            child = subprocess.Popen(["sleep", "3600"])
            (self.held / ".child").write_text(str(child.pid))
        if how in ("stall", "child"):
            self.copied = None
            time.sleep(3600)

    def progress(self):
        return None if self.copied is None else Progress(done_bytes=self.copied, total_bytes=100)

    def check_revert(self, cut, onto):
        return [Fit(ok=True, reason="Fits") for _ in onto][: 1 if len(onto) == 3 else None]

    def revert(self, cut, onto):
        time.sleep(0.2)

    def clone(self, cut, name):
        return {v: Layer(kind=SourceKind.FILE, source=f"/{name}", format="raw") for v in cut.handles}

    def missing(self, cuts):
        return [h for c in cuts for h in c.handles.values() if h.startswith("lost")]

    def keep(self, name):
        pass

    def delete(self, name):
        (self.held / name).unlink(missing_ok=True)

    def list(self, prefix):
        if prefix == "foreign":
            return ["other-name"]
        return sorted(p.name for p in self.held.iterdir() if p.name.startswith(prefix))


class Copied(Toy):
    """Names the files that the hypervisor is to copy into, of which one is wrong as the request's name says."""

    def targets(self, request):
        found = {
            v.id: Layer(kind=SourceKind.FILE, source=f"/held/{request.name}-{v.id}", format="raw")
            for v in request.volumes
        }
        wrong = {
            "kind": {"kind": SourceKind.BLOCK},
            "name": {"source": "/held/other-v1"},
            "folder": {"source": f"{request.name}-v1"},
            "same": {"source": f"/held/{request.name}-v0"},
        }
        found[VolumeId("v1")] = replace(found[VolumeId("v1")], **wrong.get(request.name.partition("-")[0], {}))
        return found


class Lacking:
    """Not a driver: most of the contract is missing."""

    def capabilities(self):
        return None


class DiesAtStart(Toy):
    def __init__(self, parameters, credentials):
        print("cannot find libfoo.so", file=sys.stderr, flush=True)
        os.abort()


class HangsAtStart(Toy):
    def __init__(self, parameters, credentials):
        time.sleep(3600)


class RaisesAtStart(Toy):
    def __init__(self, parameters, credentials):
        raise RuntimeError("no luck with " + credentials.password)
