"""`make demo`: one VM, two storage systems, one short freeze, and the proof from the content of the snapshots."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from kubernetes import client, config, watch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests import audit, proof
from tests.lab import Lab, LabError
from tests.stack import ROOT, TENANT, Stack, conditions

RESULT = ROOT / "build" / "demo.json"
RESTORES = ("vmrestore-new-vm.yaml", "vmrestore-in-place.yaml")
RESTORE_STEPS = ("Planned", "SafetySnapshotTaken", "VolumesRestored", "VMDefined", "Ready")
RESTORE_SECONDS = 180
STEPS = ("Planned", "Quiesced", "VolumesSnapshotted", "Unquiesced", "Ready")
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)


@dataclass(slots=True)
class Shown:
    """One snapshot as the demo saw it."""

    name: str
    policy: str
    body: Mapping[str, Any]
    truth: proof.Truth
    writes: int
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> Mapping[str, Any]:
        """What the operator says of it."""
        return self.body["status"]  # type: ignore[no-any-return]  # plain JSON

    def as_json(self) -> dict[str, Any]:
        """The form of build/demo.json."""
        return {
            "name": self.name,
            "policy": self.policy,
            "frozenMilliseconds": self.status["quiesce"].get("frozenMilliseconds", 0),
            "consistency": self.status["consistency"],
            "groups": [
                {"driver": g["driver"], "volumes": _count(g), "cutMilliseconds": g["cutMilliseconds"]}
                for g in self.status["groups"]
            ],
            "truth": {"records": dict(self.truth.records), "fsck": dict(self.truth.fsck)},
            "apiWrites": self.writes,
        }


def _count(group: Mapping[str, Any]) -> int:
    volumes = group["volumes"]
    return volumes if isinstance(volumes, int) else len(volumes)


def say(text: str, seconds: float | None = None) -> None:
    """One line of progress, with its time where it has one."""
    console.print(f"  [green]✔[/green] {text:<88} [dim]{'' if seconds is None else f'{seconds:6.2f} s'}[/dim]")


def head(text: str) -> None:
    """A chapter."""
    console.print(f"\n[bold]{text}[/bold]")


def happened(status: Mapping[str, Any], step: str) -> datetime | None:
    """When the operator did a step, by its own word: the window is told of when it is over, all at once."""
    quiesce = status.get("quiesce", {})
    told = {
        "Quiesced": quiesce.get("frozenTime") or status.get("creationTime"),  # nothing was asked of it: it was cut
        "VolumesSnapshotted": status.get("creationTime"),
        "Unquiesced": quiesce.get("thawedTime"),
    }.get(step)
    return datetime.fromisoformat(told) if told else None


def follow(stack: Stack, example: str) -> tuple[Mapping[str, Any], str]:
    """Apply an example and print each step as it happens, until Ready; raise LabError when it stalls."""
    (document,) = stack.example(example)
    name, policy = document["metadata"]["name"], document["spec"].get("quiesce", {}).get("policy", "Prefer")
    head(f"{name}: policy {policy}")
    api = client.CustomObjectsApi()
    start = datetime.now(UTC)
    stack.apply(document)
    shown: set[str] = set()
    stream = watch.Watch().stream(
        api.list_namespaced_custom_object,
        "vmsnapshot.io",
        "v1alpha1",
        TENANT,
        "vmsnapshots",
        field_selector=f"metadata.name={name}",
        timeout_seconds=120,
    )
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task(f"{name}", total=len(STEPS))
        for event in stream:
            body = event["object"]
            found = conditions(body)
            for step in STEPS:
                condition = found.get(step, {})
                if (
                    step in shown
                    or condition.get("status") not in ("True", "False")
                    or condition.get("reason") == "NotYet"
                ):
                    continue
                shown.add(step)
                bar.advance(task)
                mark = "" if condition["status"] == "True" else "no: "
                text = f"{step:<20} {mark}{condition['reason']}: {condition.get('message', '')}"[:86]
                when = happened(body["status"], step) or datetime.now(UTC)
                say(text, (when - start).total_seconds())
            if found.get("Stalled", {}).get("status") == "True":
                raise LabError(f"{name}: {found['Stalled']['reason']}: {found['Stalled'].get('message')}")
            if found.get("Ready", {}).get("status") == "True":
                return body, policy
    raise LabError(f"{name} was not Ready within 120 s")


def take(stack: Stack, example: str, into: Path) -> Shown:
    """Take one snapshot and read what it holds."""
    log = stack.lab.audit_log
    mark = log.stat().st_size if log is not None else 0
    body, policy = follow(stack, example)
    name = body["metadata"]["name"]
    time.sleep(1)  # the audit log and the event come after the answer
    writes = sum(r.is_write for r in audit.of_snapshots(log, start=mark)) if log is not None else -1
    content = stack.content(name)
    if content is None:
        raise LabError(f"{name} has no VMSnapshotContent")
    return Shown(name, policy, body, proof.read(stack.lab, content, into), writes)


def judge(shown: Shown) -> None:
    """Hold what was claimed against what the disks hold."""
    claimed = shown.status["consistency"]
    counts = ", ".join(f"{t} {n}" for t, n in sorted(shown.truth.records.items()))
    if shown.policy == "Never":
        if claimed != "PerVolume":
            shown.problems.append(f"{shown.name} claims {claimed}, not PerVolume")
        say(f"claimed {claimed}, and no more; its disks hold records {counts}")
        return
    if claimed != "Filesystem":
        shown.problems.append(f"{shown.name} claims {claimed}, not Filesystem")
    if not shown.truth.one_instant:
        shown.problems.append(f"{shown.name}: the disks are of different moments: {counts}")
    if not shown.truth.clean:
        shown.problems.append(f"{shown.name}: not clean: {dict(shown.truth.fsck)}")
    if not shown.problems:
        say(f"one point in time, proved from the content: records {counts}; e2fsck clean on each")


@dataclass(frozen=True, slots=True)
class Restored:
    """One restore as the demo saw it. `proved`: its disks hold exactly the records of the snapshot, and the other VM is as it must be."""

    mode: str
    proved: bool
    seconds: float
    records: Mapping[str, int]


def restore(stack: Stack, example: str, held: proof.Truth, into: Path) -> Restored:
    """Apply an example, wait until it is done, and hold the disks against the snapshot. The VM is left off, to be read."""
    (document,) = stack.example(example)
    document["spec"]["startAfter"] = False
    spec, name = document["spec"], document["metadata"]["name"]
    guest, begun = stack.lab.guest("demo"), time.monotonic()
    head(f"{name}: {spec['mode']} from {spec['snapshotName']}")
    stack.apply(document)
    shown: set[str] = set()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task(name)
        while True:
            found = conditions(stack.get_restore(name) or {})
            bar.update(task, description=f"{name}: {found.get('Reconciling', {}).get('reason', '')}")
            for kind in RESTORE_STEPS:
                if kind not in shown and found.get(kind, {}).get("status") == "True":
                    shown.add(kind)
                    text = f"{kind:<20} {found[kind]['reason']}: {found[kind].get('message', '')}"
                    say(text[:86], time.monotonic() - begun)
            if "Ready" in shown:
                break
            if found.get("Stalled", {}).get("status") == "True":
                raise LabError(f"{name}: {found['Stalled']['reason']}: {found['Stalled'].get('message')}")
            if time.monotonic() > begun + RESTORE_SECONDS:
                raise LabError(f"{name} was not Ready within {RESTORE_SECONDS} s")
            time.sleep(0.2)
    seconds = time.monotonic() - begun
    connection = stack.lab.libvirt()
    try:
        domain = connection.lookupByName(spec.get("newVM", {}).get("name", guest.name))
        now = proof.of_domain(stack.lab, domain, into)
    finally:
        connection.close()
    proved = now.records == held.records and now.clean
    counts = ", ".join(f"{t} {n}" for t, n in sorted(now.records.items()))
    if spec["mode"] == "NewVM":
        untouched = guest.records() > max(held.records.values())
        proved = proved and untouched
        say(f"its disks hold the snapshot's records: {counts}; the VM itself runs on and is ahead: {untouched}")
    else:
        say(f"the VM's disks hold the snapshot's records again: {counts}")
    return Restored(spec["mode"], proved, seconds, now.records)


def clear(stack: Stack, *keep: str) -> None:
    """Delete the restores, what they leave on purpose (the new VM, the safety snapshot), and all other VMSnapshots but these."""
    for example in RESTORES:
        (document,) = stack.example(example)
        stack.delete_restore(document["metadata"]["name"])
        if "newVM" in document["spec"]:
            proof.remove_vm(stack.lab, document["spec"]["newVM"]["name"])
    for document in stack.all("vmsnapshots.vmsnapshot.io"):
        if document["metadata"]["name"] not in keep:
            stack.delete(document["metadata"]["name"], namespace=document["metadata"]["namespace"])


def table(snapshots: list[Shown], left: list[str]) -> Table:
    """The result for people."""
    result = Table(title="What was taken, and what it holds", title_justify="left")
    for column in ("snapshot", "policy", "claimed", "frozen", "cut by", "records on each disk", "e2fsck", "API writes"):
        result.add_column(column, justify="right" if column in ("frozen", "API writes") else "left")
    for shown in snapshots:
        row = shown.as_json()
        result.add_row(
            shown.name,
            shown.policy,
            row["consistency"],
            f"{row['frozenMilliseconds']} ms",
            "\n".join(f"{g['driver']}: {g['volumes']} in {g['cutMilliseconds']} ms" for g in row["groups"]),
            "  ".join(f"{t} {n}" for t, n in sorted(shown.truth.records.items())),
            "\n".join(sorted(set(shown.truth.fsck.values()))),
            str(shown.writes),
        )
    result.caption = f"left behind after deleting both: {len(left)}"
    return result


def _held(stack: Stack, example: str, snapshots: list[Shown]) -> proof.Truth:
    """What the snapshot holds that an example of a restore names."""
    (document,) = stack.example(example)
    return next(s.truth for s in snapshots if s.name == document["spec"]["snapshotName"])


def step(line: str) -> None:
    """A line of the laboratory's own progress."""
    console.print(f"  [dim]{line}[/dim]")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--example", "examples", multiple=True, default=("vmsnapshot.yaml", "vmsnapshot-never.yaml"), show_default=True
)
def main(examples: tuple[str, ...]) -> None:
    """Show the whole way of a snapshot on real parts, and prove it. Writes build/demo.json."""
    start = time.monotonic()
    RESULT.unlink(missing_ok=True)
    head("Laboratory")
    lab = Lab.up(report=step)
    lab.guest("demo")
    say("control plane, hypervisor, storage and guest are up", time.monotonic() - start)
    problems: list[str] = []
    snapshots: list[Shown] = []
    left: list[str] = []
    with Stack(lab, lab.state / "demo") as stack:
        config.load_kube_config(str(lab.kubeconfig))
        say("operator (with the chart's permissions) and guardian are up", time.monotonic() - start)
        clear(stack)
        for example in examples:
            shown = take(stack, example, lab.state / "proof")
            judge(shown)
            snapshots.append(shown)
            problems += shown.problems
        restores = [restore(stack, e, _held(stack, e, snapshots), lab.state / "proof") for e in RESTORES]
        problems += [f"{r.mode}: the disks hold {dict(r.records)}" for r in restores if not r.proved]
        begun = time.monotonic()
        lab.guest("demo")
        say("the VM is started again, and writes on", time.monotonic() - begun)
        head("Deleting")
        clear(stack, *(s.name for s in snapshots))
        say("the restores, the VM that one of them made, and the safety snapshot are gone")
        for shown in snapshots:
            begun = time.monotonic()
            stack.delete(shown.name)
            say(f"{shown.name} is gone", time.monotonic() - begun)
        left = proof.leftovers(lab)
        problems += [f"left behind: {x}" for x in left]
        if not left:
            say("neither storage, the domain's metadata, the hypervisor nor the API server holds anything of them")
    console.print()
    console.print(table(snapshots, left))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {
                "snapshots": [s.as_json() for s in snapshots],
                "restores": [{"mode": r.mode, "proved": r.proved, "seconds": round(r.seconds, 1)} for r in restores],
                "leftovers": len(left),
            },
            indent=2,
        )
        + "\n"
    )
    for problem in problems:
        console.print(f"[red]✘ {problem}[/red]")
    console.print(f"[dim]{time.monotonic() - start:.0f} s; written to {RESULT.relative_to(ROOT)}[/dim]")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    try:
        main()
    except LabError as error:
        console.print(f"[red]✘ {error}[/red]")
        sys.exit(1)
