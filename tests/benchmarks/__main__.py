"""`make bench`: run all measurements, or one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import click
from rich.console import Console

from tests.benchmarks import isolation, measurements, protection, wayback
from tests.benchmarks.result import Result, table
from tests.lab import Lab
from tests.stack import Stack, stack

ALL: dict[str, Callable[[Stack, int], Result | Iterator[Result]]] = {
    **measurements.ALL,
    **protection.ALL,
    **isolation.ALL,
    **wayback.ALL,
}

console = Console(highlight=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice(sorted(ALL)), help="Run this one only.")
@click.option("--pairs", default=15, show_default=True, help="Pairs for each alternating measurement.")
def main(only: str | None, pairs: int) -> None:
    """Measure on the laboratory; write build/bench/NAME.json and print a table. Exit status 1 if a goal was missed."""
    lab = Lab.up(report=lambda line: console.print(f"[dim]{line}[/dim]"))
    lab.guest("demo")
    results: list[Result] = []
    with stack(lab, "bench") as running:
        for name, measure in ALL.items():
            if only in (None, name):
                console.print(f"measuring {name} …")
                made = measure(running, pairs)
                for result in (made,) if isinstance(made, Result) else made:
                    results.append(result)
                    result.write()
    console.print(table(results))
    for result in results:
        for what, value in result.details.items():
            console.print(f"  [dim]{result.name}: {what}: {value}[/dim]")
    if missed := [result.name for result in results if result.met is False]:
        sys.exit(f"goals were missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
