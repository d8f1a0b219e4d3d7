"""`make chaos`: inject faults at every step of taking and deleting snapshots, and judge the world after each."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tests.chaos import cases, results, runner
from tests.chaos.fleet import replay as replay_of_fleet
from tests.chaos.fleet import run as run_fleet
from tests.chaos.results import Result
from tests.lab import Lab

BUILD = Path("build")
console = Console(highlight=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-n", "--number", default=60, show_default=True, help="How many injections.")
@click.option("--seed", default=1, show_default=True, help="Decides which faults meet which steps, and in which order.")
@click.option("--first", default=0, show_default=True, help="Leave out so many of the walk: to extend an earlier run.")
@click.option("--case", "names", multiple=True, help="Replay this case alone: fault@step:when. Can be repeated.")
@click.option(
    "--way", "ways", multiple=True, type=click.Choice(list(cases.Way)), help="Only steps on this way. Can be repeated."
)
@click.option("--list", "listing", is_flag=True, help="List all cases and end.")
@click.option(
    "--fleet", default=0, show_default=True, help="Afterwards so many VMSnapshots over 16 guests, a fault each."
)
@click.option("--fleet-first", default=0, show_default=True, help="Leave out so many of the fleet.")
@click.option("--quick", is_flag=True, help="Leave out faults that take longer than half a minute each.")
def main(
    *,
    number: int,
    seed: int,
    first: int,
    names: tuple[str, ...],
    ways: tuple[str, ...],
    listing: bool,
    fleet: int,
    fleet_first: int,
    quick: bool,
) -> None:
    """Inject faults into the laboratory and judge what is left of the world. Exit status 1 if the judge found anything.

    A run is repeated by its seed: `make chaos N=100 SEED=7`. A failing case prints the command that replays it alone.
    """
    if listing:
        for case in cases.every():
            click.echo(case.name)
        return
    try:
        chosen = [cases.parse(n) for n in names] or cases.walk(
            first + number, seed, slow=not quick, ways=[cases.Way(w) for w in ways]
        )[first:]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    lab = Lab.up(report=lambda line: console.print(f"[dim]{line}[/dim]"))
    with runner.suite(lab, seed) as suite, _progress() as bar:
        task = bar.add_task("injecting", total=len(chosen) + fleet)

        def tell(result: Result) -> None:
            results.append(result, seed, BUILD / "chaos.jsonl")
            results.write(suite.results, seed, BUILD / "chaos.json")
            for finding in result.findings:
                said = f"✘ {result.case}: {finding.kind}: {finding.subject}: {finding.what}"
                bar.console.print(said, style="red", markup=False, soft_wrap=True)
                alone = f"make chaos SEED={seed} CASE={result.case}"
                of_fleet = result.case.endswith("@fleet")
                command = replay_of_fleet(result.number, seed) if of_fleet else alone
                bar.console.print(f"  replay: {command}", markup=False, soft_wrap=True)
            if result.reached:
                bar.advance(task)
            if not console.is_terminal:
                console.print(
                    f"{result.number:>5} {result.case:<64} {result.outcome:<12.40} {result.seconds:6.1f} s",
                    soft_wrap=True,
                )

        for offset, case in enumerate(chosen):
            bar.update(task, description=case.name)
            result = suite.inject(case, first + offset)
            tell(result)
            if not result.reached:
                tell(suite.inject(cases.instead(case), first + offset))
        if fleet:
            bar.update(task, description=f"{fleet} over 16 guests")
            run_fleet(suite, fleet, tell, fleet_first)
        found = results.write(suite.results, seed, BUILD / "chaos.json")
    console.print(_table(found))
    console.print("written to build/chaos.json, and one line for each injection added to build/chaos.jsonl")
    if any(found[kind] for kind in results.KINDS.values()):
        sys.exit(1)
    if len(chosen) + fleet > (met := sum(r.reached for r in suite.results)):
        sys.exit(f"only {met} of {len(chosen) + fleet} injections had an effect")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<70}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _table(found: dict[str, object]) -> Table:
    table = Table(title="What was injected, and what the judge found", show_header=False)
    rows = (
        ("injections", found["injections"]),
        ("left frozen", found["leftFrozen"]),
        ("leaked", found["leaked"]),
        ("lied", found["lied"]),
        ("stuck", found["stuck"]),
        ("unbootable", found["unbootable"]),
        ("recovery, seconds", found["recoverySeconds"]),
        ("longest freeze, ms", found["longestFreezeMilliseconds"]),
        ("seed", found["seed"]),
    )
    for name, value in rows:
        table.add_row(name, str(value))
    by_fault = found["byFault"]
    assert isinstance(by_fault, dict)
    for name, value in by_fault.items():
        table.add_row(f"  {name}", str(value))
    return table


if __name__ == "__main__":
    main()
