"""`python -m tests.chaos.table FILE...`: add up the lines of several runs, as the table in docs/reliability.md."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.chaos.cases import every
from tests.chaos.results import KINDS, percentiles

Line = Mapping[str, Any]


def lines(files: Iterable[Path]) -> Iterator[Line]:
    """The injections of all these files; raises OSError, ValueError for what is none."""
    for file in files:
        for text in file.read_text().splitlines():
            if text.strip():
                yield json.loads(text)


def markdown(found: Sequence[Line]) -> str:
    """The whole in a row of its own, then each kind of fault. One that was not met, or did nothing, is not counted as an injection;
    what the judge found then is counted all the same.
    """
    heads = ["fault", "injections", *KINDS.values(), "recovery p50", "p99", "max"]
    by_fault: dict[str, list[Line]] = {}
    for line in found:
        by_fault.setdefault(str(line["case"]).partition("@")[0], []).append(line)
    rows = [_row("**all**", found), *(_row(name, by_fault[name]) for name in sorted(by_fault))]
    text = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    text += [f"| {' | '.join(row)} |" for row in rows]
    seeds = ", ".join(str(s) for s in sorted({int(line.get("seed", 0)) for line in found}))
    freeze = max((int(line["longestFreezeMilliseconds"]) for line in found), default=0)
    return "\n".join([*text, "", f"Seeds: {seeds}. Longest freeze: {freeze} ms. {coverage(found)}", ""])


def coverage(found: Iterable[Line]) -> str:
    """How many of all pairs of a fault and a moment of a step these injections have met; those that are none any more are not counted."""
    there = {case.name for case in every()}
    met = there & {str(line["case"]) for line in found if line["reached"]}
    return f"Pairs of fault and moment met: {len(met)} of {len(there)}."


def _row(name: str, found: Sequence[Line]) -> list[str]:
    met = [line for line in found if line["reached"]]
    kinds = Counter(f["kind"] for line in found for f in line["findings"])
    recovery = percentiles([float(line["recoverySeconds"]) for line in met])
    return [
        name,
        str(len(met)),
        *(str(kinds[k]) for k in KINDS),
        *(f"{recovery[p]:.1f} s" for p in ("p50", "p99", "max")),
    ]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m tests.chaos.table FILE...")
    sys.stdout.write(markdown(list(lines(Path(a) for a in sys.argv[1:]))))
