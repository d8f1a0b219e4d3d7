"""Which programs are taken, and when they are built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab import LabError, binaries

GO = """#!/bin/sh
if [ "$1" = env ]; then echo {version}; exit 0; fi
echo "$PWD $CGO_ENABLED $GOFLAGS $*" >> {log}
{build}
"""
BUILD = """while [ "$1" != -o ]; do shift; done
echo built > "$2"; chmod +x "$2"
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    return tmp_path / "cache"


def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, version: str = "go1.99.1", build: str = BUILD) -> Path:
    """Put a Go on PATH that writes down what it is asked for."""
    program, log = tmp_path / "path" / "go", tmp_path / "go.log"
    program.parent.mkdir(exist_ok=True)
    program.write_text(GO.format(version=version, log=log, build=build))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    log.touch()
    return log


def test_built_once_and_again_after_a_changed_pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, said = go(tmp_path, monkeypatch), []
    binaries.ensure(said.append)
    built = log.read_text().splitlines()
    assert len(built) == len(binaries.PROGRAMS)
    assert all(" 0 -mod=readonly build -o " in line for line in built), "other flags make Go's cache useless"
    assert any(line.startswith("[5/5] helm built in") for line in said)

    binaries.ensure(said.append)
    assert len(log.read_text().splitlines()) == len(built), "nothing is built twice"

    pins = binaries.folder() / "pins.json"
    pins.write_text(json.dumps(json.loads(pins.read_text()) | {"kubectl": "another pin"}))
    binaries.ensure(said.append)
    assert log.read_text().splitlines()[len(built) :] == [built[1]]


def test_a_build_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, monkeypatch, build="echo no such module >&2; exit 1")
    with pytest.raises(LabError, match="building etcd failed with 1:\nno such module"):
        binaries.ensure(lambda _line: None)
    assert binaries.find("etcd") is None


def test_given_programs_are_taken_and_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, assets = go(tmp_path, monkeypatch), tmp_path / "assets"
    assets.mkdir()
    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kubectl"):
        (assets / name).touch(mode=0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(assets))
    binaries.ensure(lambda _line: None)
    assert [line.rsplit("/", 1)[-1] for line in log.read_text().splitlines()] == ["helm"]
    assert binaries.need("etcd") == assets / "etcd"
    assert binaries.need("helm") == binaries.folder() / "helm"


def test_an_existing_cluster_needs_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = go(tmp_path, monkeypatch)
    (tmp_path / "path" / "kubectl").touch(mode=0o755)
    binaries.ensure(lambda _line: None, servers=False)
    assert [line.rsplit("/", 1)[-1] for line in log.read_text().splitlines()] == ["helm"]
    assert binaries.need("kubectl") == tmp_path / "path" / "kubectl"


def test_a_missing_program_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LabError, match=r"etcd is neither in .* run `make lab-up`"):
        binaries.need("etcd")


def test_an_old_go_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = go(tmp_path, monkeypatch, version="go1.19.4")
    monkeypatch.setattr(binaries, "run", _without_pip(binaries.run))
    with pytest.raises(LabError, match="KUBEBUILDER_ASSETS"):
        binaries.ensure(lambda _line: None)
    assert log.read_text() == ""


def _without_pip(run):  # type: ignore[no-untyped-def]  # wraps a function of any arguments
    def wrapped(*argv, **options):  # type: ignore[no-untyped-def]
        return "" if "pip" in argv else run(*argv, **options)

    return wrapped
