"""What is installed outside of the cluster: the one file, its unit, and the hook for guests."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vmsnapshot_operator.guardian import __main__ as program

CONTRIB = Path(__file__).resolve().parents[3] / "contrib"
HOST, GUEST = CONTRIB / "guardian-host", CONTRIB / "guest-watchdog"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("host") / "vmsnapshot-guardian.pyz"
    subprocess.run([sys.executable, str(HOST / "build.py"), str(target)], check=True)
    return target


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's options are case-sensitive
    parser.read(HOST / "vmsnapshot-guardian.service")
    return parser


def test_the_one_file_needs_libvirt_and_the_standard_library_alone(built: Path) -> None:
    imported = set()
    with zipfile.ZipFile(built) as archive:
        names = [n for n in archive.namelist() if n.endswith(".py")]
        for name in names:
            for node in ast.walk(ast.parse(archive.read(name))):
                match node:
                    case ast.Import(names=aliases):
                        imported |= {a.name.split(".")[0] for a in aliases}
                    case ast.ImportFrom(module=str(module)):
                        imported.add(module.split(".")[0])
    assert "vmsnapshot_operator/guardian/watch.py" in names
    assert imported - sys.stdlib_module_names == {"libvirt", "libvirt_qemu", "vmsnapshot_operator"}


def test_the_one_file_runs_and_finds_all_its_parts(built: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-I", str(built), "--help"], check=True, capture_output=True, text=True, env=environment
    )
    assert "--watch-only" in done.stdout


def test_the_unit_starts_it_with_options_that_it_has() -> None:
    interpreter, isolated, path, *options = shlex.split(unit()["Service"]["ExecStart"])
    assert (interpreter, isolated) == ("/usr/bin/python3", "-I")
    assert path in (CONTRIB.parent / "docs" / "guardian.md").read_text()
    assert program.arguments(options).watch_only


def test_the_unit_outlives_libvirtd_and_itself() -> None:
    parser = unit()
    assert not {"Requires", "BindsTo", "PartOf", "Requisite"} & set(parser["Unit"])
    assert parser["Unit"]["StartLimitIntervalSec"] == "0"
    assert parser["Service"]["Restart"] == "always"
    assert parser["Service"]["Type"] == "notify"
    assert int(parser["Service"]["WatchdogSec"]) > 3 * program.BEAT_SECONDS + program.STUCK_SECONDS
    assert int(parser["Service"]["TimeoutStopSec"]) > program.ENDING_SECONDS


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("PrivateNetwork", "yes"),
        ("RestrictAddressFamilies", "AF_UNIX"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateDevices", "yes"),
        ("User", "vmsnapshot-guardian"),
    ],
)
def test_the_unit_allows_no_more_than_it_needs(option: str, value: str) -> None:
    assert unit()["Service"][option] == value


def test_its_user_is_made_and_may_use_libvirt() -> None:
    lines = [x.split() for x in (HOST / "vmsnapshot-guardian.sysusers.conf").read_text().splitlines() if x[0] != "#"]
    user = unit()["Service"]["User"]
    assert ["m", user, "libvirt"] in lines
    assert [x[:2] for x in lines if x[0] == "u"] == [["u", user]]


def test_the_hook_is_a_program_in_plain_sh() -> None:
    hook = GUEST / "vmsnapshot-watchdog"
    assert os.access(hook, os.X_OK)
    text = hook.read_text()
    assert text.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(hook)], check=True)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"<<|\[\[ |\blocal\b|\bfunction\b|\$\{[^}]*//|<\(", code), (
        "what a plain sh has not, or does on a disk"
    )


def test_the_hook_has_the_settings_of_its_file() -> None:
    defaults = dict(
        re.findall(r"^(seconds|PATH|base)=(.+)$", (GUEST / "vmsnapshot-watchdog").read_text(), re.MULTILINE)
    )
    told = dict(re.findall(r"^(\w+)=(.+)$", (GUEST / "vmsnapshot-watchdog.conf").read_text(), re.MULTILINE))
    assert told == defaults


@pytest.mark.parametrize("words", [[], ["sleep"]])
def test_the_hook_refuses_what_it_does_not_know(words: list[str]) -> None:
    done = subprocess.run([str(GUEST / "vmsnapshot-watchdog"), *words], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "usage" in done.stderr
