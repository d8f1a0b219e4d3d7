"""`python -m tests.lab up | down | status | env`."""

from __future__ import annotations

import shlex
import sys
import sysconfig
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.lab import paths
from tests.lab.errors import LabError
from tests.lab.lab import COMPONENTS, Lab, leftovers
from tests.lab.supervisor import Control, Supervisor

console = Console(highlight=False, soft_wrap=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A real control plane, hypervisor, storage and guests on this machine, for the demo, the tests and the benchmarks.

    State: $LAB_STATE (default /var/tmp/vmsnapshot-lab); what is built once: $LAB_CACHE (default ~/.cache/vmsnapshot-operator).
    Programs of $KUBEBUILDER_ASSETS are used if given, and the cluster of $KUBECONFIG instead of ours.
    """


@main.command()
@click.option("--guest/--no-guest", default=True, show_default=True, help="Also boot the guest `demo`.")
def up(*, guest: bool) -> None:
    """Start what does not run; a second time it only looks."""
    start = time.monotonic()
    lab = Lab.up(report=lambda line: console.print(f"  {line}"))
    if guest:
        lab.guest("demo")
    console.print(f"the laboratory is up after {time.monotonic() - start:.1f} s; `make lab-down` ends it")


@main.command()
def down() -> None:
    """End everything that runs, and remove the state."""
    left = Lab.down()
    for each in left:
        console.print(f"[red]left: {each}[/red]")
    console.print("the laboratory is down" if not left else "the laboratory is not wholly down")
    sys.exit(1 if left else 0)


@main.command()
def status() -> None:
    """Say what runs."""
    control = Control(paths.state())
    pids = control.pids() if control.alive() else {}
    table = Table(box=None)
    for column in ("component", "process", "resident"):
        table.add_column(column)
    for name in COMPONENTS:
        table.add_row(name, str(pids.get(name, "—")), _resident(pids.get(name)))
    console.print(table)
    if not pids:
        for each in leftovers(paths.state()):
            console.print(f"left by an earlier one: {each}")


@main.command()
def env() -> None:
    """Print what a shell needs: eval "$(python -m tests.lab env)"."""
    lab = Lab.attach()
    console.print(f"export KUBECONFIG={shlex.quote(str(lab.kubeconfig))}")
    console.print(f"export LIBVIRT_DEFAULT_URI={shlex.quote(lab.libvirt_uri)}")
    console.print(f"export CEPH_CONF={shlex.quote(str(lab.ceph.conf))}")
    console.print(f'export PATH={shlex.quote(str(lab.bin("kubectl").parent))}:"$PATH"')


@main.command()
def bindings() -> None:
    """Make Debian's bindings of Ceph importable here: they are not on PyPI."""
    source = Path("/usr/lib/python3/dist-packages")
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}-x86_64-linux-gnu.so"
    for name in ("rados", "rbd"):
        built = source / f"{name}.{tag}"
        if not built.exists():
            found = ", ".join(p.name for p in source.glob(f"{name}.*.so")) or "nothing"
            raise LabError(
                f"{built} is not there (found: {found}): install python3-{name}, and use the Python that Debian built it for"
            )
        link = Path(sysconfig.get_path("platlib")) / built.name
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(built)


@main.command(hidden=True)
def supervise() -> None:
    """Be the parent of all components."""
    Supervisor(paths.state()).serve()


def _resident(pid: int | None) -> str:
    if pid is None:
        return "—"
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return f"{int(line.split()[1]) // 1024} MB"
    return "—"


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        console.print(f"[red]{error}[/red]")
        sys.exit(1)
