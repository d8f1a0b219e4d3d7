"""Run short programs: argv only, a deadline, and what they said when they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.lab.errors import LabError

_SHOWN = 2000


def run(
    *argv: str | Path,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> str:
    """Return what a program wrote; raises LabError with its words if it fails, is missing or does not end in `timeout` s."""
    words = [str(a) for a in argv]
    shown = " ".join(words[:6]) + (" …" if len(words) > 6 else "")
    given = {**os.environ, **env} if env is not None else None
    try:
        done = subprocess.run(
            words, input=stdin, capture_output=True, text=True, check=False, timeout=timeout, cwd=cwd, env=given
        )
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed: run `make system`") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{shown} did not end within {timeout:g} s") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise LabError(f"{shown}: exit {done.returncode}: {said[-_SHOWN:]}")
    return done.stdout
