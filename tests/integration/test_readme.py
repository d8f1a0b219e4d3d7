"""Every command of the README: those of `make` name targets that are there, those on a cluster are run as they stand.

`make demo` is run by `test_a_demo`; `make test` would run itself, and `make lab-down` end the laboratory under the tests. The chart
is asked for by `helm install` without being installed, since the operator of the tests runs already (see `test_chart`).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import yaml

from tests.lab import Lab
from tests.stack import EXAMPLES, ROOT, Stack, until

README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """The commands of all console blocks."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {c[1] for c in commands() if c[0] == "make"} | set(re.findall(r"`make ([a-z-]+)", README))
    assert {"demo", "test", "lab-down"} <= named
    assert named <= targets


def test_commands_on_a_cluster(lab: Lab, stack: Stack, tmp_path: Path) -> None:
    """Run in a folder with the chart and the examples, fitted to the laboratory."""
    (tmp_path / "charts").symlink_to(ROOT / "charts")
    (tmp_path / "examples").mkdir()
    for path in EXAMPLES.glob("*.yaml"):
        documents = [stack.fitted(d) for d in stack.example(path.name)]
        (tmp_path / "examples" / path.name).write_text(yaml.safe_dump_all(documents))
    environment = os.environ | {
        "KUBECONFIG": str(lab.kubeconfig),
        "PATH": f"{lab.bin('kubectl').parent}:{os.environ['PATH']}",
    }
    ran = []
    for command in commands():
        if command[0] == "helm":
            command = [*command, "--dry-run=server", "--take-ownership"]  # noqa: PLW2901 - the stack is installed
        if command[0] in ("helm", "kubectl"):
            done = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
            )
            assert done.returncode == 0, f"{command}: {done.stderr}"
            ran.append(command[0])
    assert ran.count("kubectl") >= 4
    stack.delete("before-upgrade")
    until("it is gone", lambda: stack.get("before-upgrade") is None)


def test_the_dry_run_example_is_planned_and_no_more(stack: Stack) -> None:
    (document,) = stack.example("vmsnapshot-dry-run.yaml")
    name = document["metadata"]["name"]
    stack.apply(document)
    try:
        status = stack.wait(name, "Planned")["status"]
        assert (status["phase"], len(status["volumes"])) == ("Planned", 3)
        assert stack.content(name) is None
    finally:
        stack.delete(name)
