"""The demo, as the README tells to run it. First of all by its name: it runs an operator of its own."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.lab import Lab
from tests.stack import ROOT


@pytest.mark.timeout(700)
def test_the_demo_proves_what_it_shows(lab: Lab) -> None:
    done = subprocess.run(["make", "demo"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads((ROOT / "build" / "demo.json").read_text())
    assert result["leftovers"] == 0
    first, second = result["snapshots"]
    assert first["consistency"] == "Filesystem"
    assert len(set(first["truth"]["records"].values())) == 1
    assert set(first["truth"]["fsck"].values()) == {"clean"}
    assert {g["driver"]: g["volumes"] for g in first["groups"]} == {"libvirt-volume": 2, "ceph-rbd": 1}
    assert first["frozenMilliseconds"] > 0
    assert first["apiWrites"] <= 8
    assert (second["policy"], second["consistency"], second["frozenMilliseconds"]) == ("Never", "PerVolume", 0)
    assert [(r["mode"], r["proved"]) for r in result["restores"]] == [("NewVM", True), ("InPlace", True)]
