"""The command line: `vmsnapshot-operator run | guardian | crds | reasons | doctor | sweep | thaw`.

Imports happen inside the commands, so that `--help` is quick and the guardian stays as small as it says it is.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import click

_KUBECONFIG = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="KUBECONFIG",
    help="How to reach the cluster. Without it: as the ServiceAccount of the pod.",
)
_NAMESPACE = click.option(
    "--namespace",
    envvar="POD_NAMESPACE",
    default="vmsnapshot-system",
    show_default=True,
    help="The operator's own namespace: its Lease, its installation id and all credentials live there.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vmsnapshot-operator")
def main() -> None:
    """Take one consistent snapshot of a VM whose disks lie on several storage systems.

    In a cluster the chart runs `run` and `guardian` side by side. `doctor` says what is missing. On a bad
    day `sweep` frees what was left held, on all hypervisors, and `thaw` one VM.
    """


@main.command()
@_KUBECONFIG
@_NAMESPACE
@click.option(
    "--guardian-socket",
    type=click.Path(path_type=Path),
    envvar="VMSNAPSHOT_GUARDIAN_SOCKET",
    help="Socket of the guardian beside us. Without one no VM is ever frozen or paused.",
)
@click.option(
    "--telemetry-port", default=8080, show_default=True, help="Port of /metrics, /healthz and /readyz; 0 picks one."
)
@click.option("--telemetry-host", default="0.0.0.0", show_default=True, help="Address to listen on.")  # noqa: S104 - probes come from outside the pod
@click.option(
    "--identity",
    default="",
    envvar="VMSNAPSHOT_IDENTITY",
    help="Name of this instance in the lease. It must be one that no other running process has, such as the pod's; a "
    "restart under the same name goes on at once, under another one when the lease has run out. Default: host and process.",
)
@click.option(
    "--lease-seconds",
    type=click.IntRange(10, 60),
    default=10,
    show_default=True,
    help="So long a standby waits for an instance that has fallen silent; it has taken over 5 s later at the latest. More than 10 only "
    "for an API server that does not answer for seconds.",
)
@click.option("--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True)
@click.option("--verbose", is_flag=True, help="Also log what is seen, not only what is done.")
def run(
    *,
    kubeconfig: Path | None,
    namespace: str,
    guardian_socket: Path | None,
    telemetry_port: int,
    telemetry_host: str,
    identity: str,
    lease_seconds: int,
    log_format: str,
    verbose: bool,
) -> None:
    """Run the operator."""
    from vmsnapshot_operator.handlers.operator import Options
    from vmsnapshot_operator.handlers.operator import run as run_operator
    from vmsnapshot_operator.telemetry import logs

    logs.configure(log_format, verbose=verbose)
    os.environ.setdefault("LOGNAME", "vmsnapshot")  # kopf asks for a login name, and a uid in a pod may have none
    run_operator(
        Options(
            namespace=namespace,
            kubeconfig=kubeconfig,
            guardian_socket=guardian_socket,
            telemetry_port=telemetry_port,
            telemetry_host=telemetry_host,
            identity=identity,
            lease_seconds=lease_seconds,
        )
    )


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def guardian(arguments: tuple[str, ...]) -> None:
    """Run the guardian: it thaws when nobody else does (`guardian --help` for its options)."""
    # Another program image, so that nothing of ours but the journal's format is in its memory.
    os.execv(sys.executable, [sys.executable, "-m", "vmsnapshot_operator.guardian", *arguments])  # noqa: S606 - argv only


@main.command()
@click.option(
    "--write",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write one file per kind into this folder.",
)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Fail if the files there differ.",
)
def crds(*, folder: Path | None, checked: Path | None) -> None:
    """Print the CustomResourceDefinitions, or write or check the files."""
    from vmsnapshot_operator.api import schema

    if folder is not None:
        schema.write(folder)
    elif checked is not None:
        different = schema.check(checked)
        if different:
            raise click.ClickException(
                f"not as generated: {', '.join(different)}; run `vmsnapshot-operator crds --write {checked}`"
            )
    else:
        click.echo("---\n".join(schema.crd_documents().values()), nl=False)


@main.command()
@click.option(
    "--write", "written", type=click.Path(path_type=Path, dir_okay=False), help="Write the page to this file."
)
@click.option(
    "--check",
    "checked",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Fail if the page there differs.",
)
def reasons(*, written: Path | None, checked: Path | None) -> None:
    """Print all reasons of conditions and events with what to do about them, or write or check the page."""
    from vmsnapshot_operator.api.reasons import document

    if written is not None:
        written.write_text(document(), encoding="utf-8")
    elif checked is not None:
        if checked.read_text(encoding="utf-8") != document():
            raise click.ClickException(f"not as generated: run `vmsnapshot-operator reasons --write {checked}`")
    else:
        click.echo(document(), nl=False)


@main.command()
@_KUBECONFIG
@_NAMESPACE
@click.option("--guardian-socket", type=click.Path(path_type=Path), envvar="VMSNAPSHOT_GUARDIAN_SOCKET")
def doctor(*, kubeconfig: Path | None, namespace: str, guardian_socket: Path | None) -> None:
    """Say in plain words what is missing, with what to do about it. Exit status 1 if anything is."""
    from vmsnapshot_operator.handlers import doctor as doctor_module

    findings = asyncio.run(doctor_module.examine(kubeconfig, namespace, guardian_socket))
    click.echo(doctor_module.render(findings))
    sys.exit(0 if all(f.ok for f in findings) else 1)


@main.command()
@_KUBECONFIG
@_NAMESPACE
@click.option(
    "--hypervisor",
    "hypervisors",
    multiple=True,
    metavar="NAME|URI",
    help="Name of a Hypervisor object, or a libvirt URI such as qemu+tls://host/system. Again for several. Default: all objects.",
)
@click.option(
    "--installation",
    default="",
    metavar="ID",
    help="Whose journals are freed: six characters, as the journals say. Default: the installation of the cluster.",
)
@click.option("--dry-run", is_flag=True, help="Only say what was found and what would be done. Touches nothing.")
def sweep(
    *, kubeconfig: Path | None, namespace: str, hypervisors: tuple[str, ...], installation: str, dry_run: bool
) -> None:
    """Find every VM that a snapshot left frozen or paused, and free it.

    While a VM is held for a snapshot, a journal in its metadata says by whom, how and for how long. The operator and its
    guardians free what they find themselves; this command does the same when none of them runs, and works with the API server
    gone: give the hypervisors by their libvirt URIs, and our installation's id.

    \b
    Begin with what is there:
      vmsnapshot-operator sweep --dry-run
      vmsnapshot-operator sweep --dry-run --hypervisor qemu+tls://kvm1.example.org/system
    Then, if the API server does not answer, with the id that the journals show:
      vmsnapshot-operator sweep --installation abc123 --hypervisor qemu+tls://kvm1.example.org/system

    A journal is given five seconds to go by itself, since its snapshot may be being taken; one that is cut short all the same
    fails and is tried again, and its VM is none the worse. Journals of other installations, and those that cannot be read, are
    said and left, and so are overlays that no journal tells of: a VM may run on one, or what it wrote be in it alone; a VM that is frozen without a journal is not looked for. `thaw` frees a VM at once, whoever holds it.

    Exit status 0: nothing of ours is held. 1: something is (in a dry run: would have to be freed), a journal cannot be read,
    or a hypervisor does not answer.
    """  # noqa: D301 - the mark by which click leaves the lines of a paragraph as they are
    from vmsnapshot_operator.handlers import sweep as sweep_module

    lines, ok = asyncio.run(sweep_module.sweep(kubeconfig, namespace, hypervisors, installation, dry_run=dry_run))
    for line in lines:
        click.echo(line)
    sys.exit(0 if ok else 1)


@main.command()
@_KUBECONFIG
@_NAMESPACE
@click.option(
    "--hypervisor",
    required=True,
    metavar="NAME|URI",
    help="Name of a Hypervisor object, or a libvirt URI such as qemu:///system, which needs no API server.",
)
@click.option(
    "--domain",
    metavar="NAME|UUID",
    help="The VM. It is freed whoever's journal it bears. Default: every VM of the hypervisor that our installation holds.",
)
@click.option(
    "--installation",
    default="",
    metavar="ID",
    help="Without --domain: whose VMs are freed. Default: those of the cluster's installation, or, if the API server does not "
    "say which that is, of any.",
)
@click.option(
    "--force",
    is_flag=True,
    help="Also thaw what bears no journal or one that cannot be read; without --domain, also what other installations hold.",
)
def thaw(
    *, kubeconfig: Path | None, namespace: str, hypervisor: str, domain: str | None, installation: str, force: bool
) -> None:
    """Free VMs by hand, at once: thaw or resume them as their journals say, then remove the journals.

    While a VM is held for a snapshot, a journal in its metadata says by whom, how and for how long. To free it early harms no
    VM: the snapshot that held it fails, says so, and is tried again. What is held is said first, then what became of it.

    \b
    One VM, or all that are held:
      vmsnapshot-operator thaw --hypervisor kvm1 --domain db-0
      vmsnapshot-operator thaw --hypervisor kvm1
    With the API server gone, from a machine that has the libvirt client's certificates, or on the host itself:
      vmsnapshot-operator thaw --hypervisor qemu+tls://kvm1.example.org/system --domain db-0
      vmsnapshot-operator thaw --hypervisor qemu:///system
    A VM that is frozen although it bears no journal (by a backup program, say):
      vmsnapshot-operator thaw --hypervisor kvm1 --domain db-0 --force

    `sweep --dry-run` only says what is held, on all hypervisors; `sweep` frees what is left, and spares what ends by itself.

    Exit status 0: what was asked for is free. 1: a VM could not be freed, was left because its journal cannot be read or somebody
    else froze it, or a host does not answer.
    """  # noqa: D301 - the mark by which click leaves the lines of a paragraph as they are
    from vmsnapshot_operator.handlers import thaw as thaw_module

    ok = asyncio.run(
        thaw_module.thaw(
            kubeconfig, namespace, hypervisor, domain, installation=installation, force=force, say=click.echo
        )
    )
    sys.exit(0 if ok else 1)
