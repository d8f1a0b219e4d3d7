"""The guest's kernel and initramfs, built once from Debian packages that are unpacked and not installed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.locks import locked
from tests.lab.run import run

SOURCES = paths.HERE / "guest"
_MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)
_AT_REQUEST = ("efivarfs",)
"""Modules that are there for tests to load; in `/m`."""
_KERNEL, _AGENT = "linux-image-cloud-amd64", "qemu-guest-agent"


def folder() -> Path:
    """Where the image of these very sources is kept."""
    sources = [*sorted(SOURCES.iterdir()), Path(__file__)]
    return paths.cache() / f"guest-{hashlib.sha256(b''.join(p.read_bytes() for p in sources)).hexdigest()[:12]}"


def ensure(report: Callable[[str], None]) -> Path:
    """Return the folder with `vmlinuz` and `initramfs`, built if need be."""
    target = folder()
    if target.exists():
        return target
    with locked(paths.cache() / "guest.lock"):
        if target.exists():
            return target
        report("building the guest's image of Debian's kernel and agent, once")
        work = target.with_name(f"{target.name}.new")
        shutil.rmtree(work, ignore_errors=True)
        for name in ("packages", "kernel", "agent", "root", "made"):
            (work / name).mkdir(parents=True)
        _unpack(work, report)
        _build(work)
        (work / "made").rename(target)
        shutil.rmtree(work)
        return target


def _unpack(work: Path, report: Callable[[str], None]) -> None:
    try:
        _download(work / "packages")
    except LabError:  # no package lists, or lists so old that they name files that are gone
        report("refreshing the list of Debian packages")
        run("apt-get", "update", "-q")
        _download(work / "packages")
    for package in (work / "packages").iterdir():
        run("dpkg-deb", "-x", package, work / ("agent" if package.name.startswith(_AGENT) else "kernel"))


def _download(into: Path) -> None:
    found = re.search(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", _KERNEL))
    if found is None:
        raise LabError(f"apt knows no {_KERNEL}: run `apt-get update`")
    # As root, apt would drop to its own user, who may not write here.
    run("apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", found[1], _AGENT, cwd=into)


def _build(work: Path) -> None:
    made, root = work / "made", work / "root"
    shutil.copy(next((work / "kernel" / "boot").glob("vmlinuz-*")), made / "vmlinuz")
    _fill(work)
    listing = "\n".join(str(p.relative_to(root)) for p in sorted(root.rglob("*")))
    archive = work / "initramfs.cpio"
    run("cpio", "-o", "-H", "newc", "--quiet", "-F", archive, stdin=listing, cwd=root)
    # Unpacked by an emulated processor: lz4 is seconds faster than gzip.
    run("lz4", "-l", "-q", "-f", archive, made / "initramfs")


def _fill(work: Path) -> None:
    """The initramfs: busybox, the agent with its libraries, the writer, the modules that the disks and channels need."""
    root, agent = work / "root", work / "agent" / "usr" / "sbin" / "qemu-ga"
    for name in ("bin", "m", "etc/qemu", "lib", "lib64", "usr/sbin", "usr/bin"):
        (root / name).mkdir(parents=True)
    # The agent under two names, so that the laboratory's own one goes on when the other one is stopped.
    for name in ("qemu-ga-main", "qemu-ga-lab"):
        shutil.copy(agent, root / "usr" / "sbin" / name)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    run("gcc", "-O2", "-Wall", "-Werror", "-static", "-o", root / "usr" / "bin" / "writer", SOURCES / "writer.c")
    for source, target in (
        (SOURCES / "init", root / "init"),
        (SOURCES / "fsfreeze-hook", root / "etc" / "qemu" / "fsfreeze-hook"),
        (SOURCES / "windows-agent", root / "usr" / "bin" / "windows-agent"),
    ):
        shutil.copy(source, target)
        target.chmod(0o755)
    for library in re.findall(r"=> (/\S+)", run("ldd", agent)):
        shutil.copy(library, root / "lib" / Path(library).name)
    shutil.copy("/lib64/ld-linux-x86-64.so.2", root / "lib64")
    for module in (*_MODULES, *_AT_REQUEST):
        shutil.copy(next((work / "kernel").rglob(f"{module}.ko")), root / "m")
    (root / "modules.load").write_text(" ".join(_MODULES))
