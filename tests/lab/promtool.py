"""promtool, which evaluates alert rules: that of PATH, else the one of Debian's package, unpacked and not installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.locks import locked
from tests.lab.run import run

_PACKAGE = "prometheus"


def ensure() -> Path:
    """Return the program; it is fetched once and kept. Raises LabError if it cannot be had."""
    given = shutil.which("promtool")
    if given is not None:
        return Path(given)
    target = paths.cache() / "bin" / "promtool"
    with locked(paths.cache() / "promtool.lock"):
        if not target.exists():
            work = paths.cache() / "promtool.new"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            try:
                _download(work)
                run("dpkg-deb", "-x", next(work.glob("*.deb")), work / "root")
                target.parent.mkdir(exist_ok=True)
                (work / "root" / "usr" / "bin" / "promtool").rename(target)
            finally:
                shutil.rmtree(work)
    return target


def _download(into: Path) -> None:
    # As root, apt would drop to its own user, who may not write here.
    fetch = ("apt-get", "-o", "APT::Sandbox::User=root", "download", "-q", _PACKAGE)
    try:
        run(*fetch, cwd=into)
    except LabError:  # no package lists, or lists so old that they name files that are gone
        run("apt-get", "update", "-q")
        run(*fetch, cwd=into)
