"""Run short programs: argv only, a deadline, and what they said when they fail."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.lab.errors import LabError


def run(
    *argv: str | Path,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> str:
    """Return what a program wrote; raises LabError with its words if it fails."""
    words = [str(a) for a in argv]
    try:
        done = subprocess.run(
            words,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, **env} if env is not None else None,
        )
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed: run `make system`") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words[:4])} … did not end within {timeout:g} s") from error
    if done.returncode:
        raise LabError(
            f"{' '.join(words[:6])} …: exit {done.returncode}: {done.stderr.strip()[-2000:] or done.stdout.strip()[-2000:]}"
        )
    return done.stdout
