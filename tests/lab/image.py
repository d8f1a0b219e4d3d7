"""The guest's kernel and initramfs, built once from Debian packages that are unpacked and not installed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.run import run

SOURCES = paths.HERE / "guest"
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
)


def folder() -> Path:
    """Where the image of these very sources is kept."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(SOURCES.iterdir()))).hexdigest()[:12]
    return paths.cache() / f"guest-{digest}"


def ensure(report: Callable[[str], None]) -> Path:
    """Return the folder with `vmlinuz` and `initramfs`, built if need be."""
    target = folder()
    if (target / "initramfs").exists():
        return target
    report("building the guest's image, once")
    work = target.with_name(target.name + ".new")
    shutil.rmtree(work, ignore_errors=True)
    for name in ("packages", "kernel", "agent", "root"):
        (work / name).mkdir(parents=True)
    _packages(work)
    kernel = next((work / "kernel" / "boot").glob("vmlinuz-*"))
    shutil.copy(kernel, work / "vmlinuz")
    run("gcc", "-O2", "-static", "-o", work / "writer", SOURCES / "writer.c")
    _root(work)
    listing = "\n".join(str(p.relative_to(work / "root")) for p in sorted((work / "root").rglob("*")))
    run("cpio", "-o", "-H", "newc", "--quiet", "-F", work / "initramfs.cpio", stdin=listing, cwd=work / "root")
    run("lz4", "-l", "-q", "-f", work / "initramfs.cpio", work / "initramfs")
    for name in ("packages", "kernel", "agent", "root"):
        shutil.rmtree(work / name)
    (work / "initramfs.cpio").unlink()
    work.rename(target)
    return target


def _packages(work: Path) -> None:
    depends = run("apt-cache", "depends", "linux-image-cloud-amd64")
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise LabError("apt knows no linux-image-cloud-amd64: run `apt-get update`")
    # As root, apt would drop to its own user, who may not write here.
    run(
        "apt-get",
        "-o",
        "APT::Sandbox::User=root",
        "download",
        "-q",
        found.group(1),
        "qemu-guest-agent",
        cwd=work / "packages",
    )
    for package in (work / "packages").iterdir():
        run("dpkg-deb", "-x", package, work / ("agent" if package.name.startswith("qemu") else "kernel"))


def _root(work: Path) -> None:
    root = work / "root"
    for name in ("bin", "m", "etc/qemu", "lib", "lib64", "usr/sbin", "usr/bin"):
        (root / name).mkdir(parents=True)
    agent = work / "agent" / "usr" / "sbin" / "qemu-ga"
    # The agent runs under two names, so that the laboratory's own channel stays when the other one is stopped.
    for name in ("qemu-ga-main", "qemu-ga-lab"):
        shutil.copy(agent, root / "usr" / "sbin" / name)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    shutil.copy(work / "writer", root / "usr" / "bin" / "writer")
    shutil.copy(SOURCES / "init", root / "init")
    shutil.copy(SOURCES / "fsfreeze-hook", root / "etc" / "qemu" / "fsfreeze-hook")
    for path in (root / "init", root / "etc" / "qemu" / "fsfreeze-hook"):
        path.chmod(0o755)
    for library in re.findall(r"=> (/\S+)", run("ldd", agent)):
        shutil.copy(library, root / "lib" / Path(library).name)
    shutil.copy("/lib64/ld-linux-x86-64.so.2", root / "lib64")
    for module in MODULES:
        shutil.copy(next((work / "kernel").rglob(f"{module}.ko")), root / "m")
    (root / "modules.load").write_text(" ".join(MODULES))
