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
    said and left; a VM that is frozen without a journal is not looked for. `thaw` frees a single VM, whoever holds it.

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
@click.argument("hypervisor")
@click.argument("domain", required=False)
@click.option("--all", "everything", is_flag=True, help="Every domain of the hypervisor that bears a journal.")
@click.option("--force", is_flag=True, help="Thaw also a domain without a journal of ours.")
def thaw(
    *, kubeconfig: Path | None, namespace: str, hypervisor: str, domain: str | None, everything: bool, force: bool
) -> None:
    """Free a VM by hand: thaw or resume it as its journal says, then remove the journal.

    HYPERVISOR is the name of a Hypervisor object, or a libvirt URI such as qemu:///system, which needs no API server; DOMAIN
    the name or UUID of the VM.
    """
    from vmsnapshot_operator.handlers import thaw as thaw_module

    if (domain is None) == (not everything):
        raise click.UsageError("name a DOMAIN, or use --all")
    lines, ok = asyncio.run(thaw_module.thaw(kubeconfig, namespace, hypervisor, domain, force=force))
    for line in lines:
        click.echo(line)
    sys.exit(0 if ok else 1)
