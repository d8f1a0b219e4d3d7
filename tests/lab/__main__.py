"""`python -m tests.lab up | down | status | env | bindings`."""

from __future__ import annotations

import shlex
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import click
import libvirt
from rich.console import Console
from rich.table import Table

from tests.lab import leftovers, paths, pools
from tests.lab.errors import LabError
from tests.lab.lab import Lab
from tests.lab.locks import locked
from tests.lab.supervisor import Supervisor

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTOFF: "off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A real control plane, hypervisor, storage and guests on this machine, for the demo, the tests and the benchmarks.

    \b
    up      etcd, kube-apiserver, kube-controller-manager; libvirtd with the pools `reflink` (xfs) and `plain` (ext4);
            Ceph with one monitor and one OSD; the guest `demo` with three disks on both
    status  what of it runs          env   what a shell needs to use it          down   end all of it

    \b
    LAB_STATE          everything that runs          /var/tmp/vmsnapshot-lab   (another one: another laboratory)
    LAB_CACHE          what is built once            ~/.cache/vmsnapshot-operator
    KUBEBUILDER_ASSETS ready etcd, kube-apiserver … instead of building them: spares 15 minutes, once
    KUBECONFIG         an existing cluster, used instead of a control plane of our own
    """


@main.command()
@click.option("--guest/--no-guest", default=True, show_default=True, help="Also boot the guest `demo`.")
def up(*, guest: bool) -> None:
    """Start what does not run and mend what is broken; on a laboratory that is up this takes a second.

    The first time, the control plane is built from pinned Go modules (some 15 minutes on two cores) and the guest's image from
    Debian packages; later it takes about 15 seconds.
    """
    start = time.monotonic()
    with console.status("starting the laboratory"):
        lab = Lab.up(report=lambda line: console.print(f"  {line}"))
        if guest:
            lab.guest("demo")
            console.print(f"  {'guest demo':<26} ready after {time.monotonic() - start:5.1f} s")
    console.print(f"the laboratory is up at {lab.state}; `make lab-status` shows it, `make lab-down` ends it")


@main.command()
def down() -> None:
    """End everything, whoever started it and whatever is left of it, and delete its state. The cache stays."""
    left = Lab.down()
    for each in left:
        console.print(f"left: {each}", style="red")
    if left:
        raise LabError("the laboratory is not wholly down: somebody uses what is left")
    console.print("the laboratory is down: no process, mount or loop device of it is left")


@main.command()
def status() -> None:
    """Show each component and guest: whether it works, its process, its memory, where it is."""
    try:
        lab = Lab.attach(whole=False)
    except LabError as error:
        console.print(str(error))
        for each in leftovers.found(paths.state()):
            console.print(f"  left: {each}")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("", "state", "process", "memory"):
        table.add_column(column, no_wrap=True)
    table.add_column("where", overflow="fold")
    for row in [*_components(lab), *_guests(lab)]:
        table.add_row(*row)
    for pool in pools.NAMES:
        path = lab.pool_path(pool)
        table.add_row(f"pool {pool}", "mounted" if path.is_mount() else "gone", "", "", str(path))
    console.print(table)


@main.command()
def env() -> None:
    """Print what a shell needs: eval "$(python -m tests.lab env)" and then kubectl, virsh, rbd, helm."""
    lab = Lab.attach()
    values = {"KUBECONFIG": lab.kubeconfig, "LIBVIRT_DEFAULT_URI": lab.libvirt_uri, "CEPH_CONF": lab.ceph.conf}
    for name, value in values.items():
        click.echo(f"export {name}={shlex.quote(str(value))}")
    click.echo(f'export PATH={shlex.quote(str(lab.bin("kubectl").parent))}:"$PATH"')


@main.command()
def bindings() -> None:
    """Make Debian's bindings of Ceph importable here: they are not on PyPI, and built for Debian's Python alone."""
    source, target = Path("/usr/lib/python3/dist-packages"), Path(sysconfig.get_path("platlib"))
    here = sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("rados", "rbd"):
        built = source / f"{name}{here}"
        if not built.exists():
            found = (
                ", ".join(p.name for p in source.glob(f"{name}.*.so"))
                or f"nothing: run `make system`, which installs python3-{name}"
            )
            raise LabError(
                f"this Python is {sys.version_info.major}.{sys.version_info.minor} and needs {built}; there is {found}. "
                "Make the environment with the Python that Debian built them for: python3.11 -m venv .venv"
            )
        link = target / built.name
        if not (link.is_symlink() and link.readlink() == built):
            link.unlink(missing_ok=True)
            link.symlink_to(built)


@main.command(hidden=True)
def supervise() -> None:
    """Be the parent of all components."""
    Supervisor(paths.state()).serve()


@main.command(hidden=True)
@click.argument("supervisor", type=int)
def clear(supervisor: int) -> None:
    """End what a supervisor left, unless another one has taken its place."""
    state = paths.state()
    if not state.exists():
        return
    with locked(state / "lab.lock"):
        known = state / "supervisor.pid"
        if known.exists() and known.read_text() == str(supervisor):
            leftovers.clear(state)


def _components(lab: Lab) -> Iterator[tuple[str, ...]]:
    where = {
        "etcd": lambda: lab.control_plane.etcd,
        "kube-apiserver": lambda: lab.control_plane.server,
        "ceph-mon": lambda: lab.ceph.mon_host,
        "libvirtd": lambda: f"{lab.libvirt_socket}, tcp 127.0.0.1:{lab.host.tcp_port}",
    }
    pids = lab.control.pids()
    for name in lab.components:
        if name not in pids:
            yield name, "ended", "", "", f"log: {lab.control.log(name)}"
        else:
            said = "works" if lab.component(name).healthy() else "does not answer"
            yield name, said, str(pids[name]), _resident(pids[name]), where.get(name, str)()


def _guests(lab: Lab) -> Iterator[tuple[str, ...]]:
    pids = lab.host.pids()
    try:
        with lab.host.connection() as connection:
            found = {d.name(): _STATES.get(d.state()[0], "other") for d in connection.listAllDomains()}
    except libvirt.libvirtError:
        found = dict.fromkeys(pids, "unknown")
    for name, state in sorted(found.items()):
        log = lab.state / "log" / f"guest-{name}.log"
        yield f"guest {name}", state, str(pids.get(name, "")), _resident(pids.get(name)), str(log)


def _resident(pid: int | None) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((f"{int(line.split()[1]) // 1024} MB" for line in lines if line.startswith("VmRSS:")), "")


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        console.print(str(error), style="red")
        sys.exit(1)
