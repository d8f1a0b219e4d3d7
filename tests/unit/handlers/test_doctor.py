"""Doctor where nothing is there: each lack is a finding, and none a traceback."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.errors import DriverUnavailableError
from vmsnapshot_operator.handlers import doctor
from vmsnapshot_operator.handlers.doctor import Finding, examine, render

CRD = schema.crd(schema.KINDS[0])


def bad(findings: list[Finding]) -> dict[str, str]:
    """What is not as it must be, and why."""
    return {f.what: f.found for f in findings if not f.ok}


@pytest.mark.parametrize("text", ["", "{", "[1]", "kind: Config", "clusters: 3", "current-context: a\ncontexts: []"])
async def test_a_file_that_is_no_kubeconfig(tmp_path: Path, text: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    findings = await examine(path, "default", None)
    assert list(bad(findings)) == ["API server"]
    assert f"kubeconfig {path} cannot be used" in bad(findings)["API server"]
    assert {"libvirt's bindings", "driver libvirt-volume", "guardian"} <= {f.what for f in findings}


async def test_an_api_server_that_is_away(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        config = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{closed.getsockname()[1]}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config))
        findings = await examine(path, "default", None)
    assert "cannot be reached" in bad(findings)["API server"]


async def test_a_guardian_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = bad(await examine(None, "default", tmp_path / "none.sock"))
    assert found.keys() == {"API server", "guardian"}
    assert "none.sock does not answer" in found["guardian"]


async def test_a_look_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("something nobody thought of")

    monkeypatch.setattr(doctor.registry, "inspect", broken)
    findings = await examine(None, "default", None)
    assert "something nobody thought of" in bad(findings)["storage drivers"]
    assert findings[-1].what == "guardian"


@pytest.mark.parametrize(("users", "ok"), [([], True), (["ceph-vms"], False)])
async def test_bindings_of_ceph_matter_to_who_uses_them(
    monkeypatch: pytest.MonkeyPatch, users: list[str], ok: bool
) -> None:
    def missing(name: str) -> None:
        raise DriverUnavailableError(f'the Python module "{name}" is not installed')

    monkeypatch.setattr(doctor.ceph_cluster, "binding", missing)
    (found,) = await doctor._ceph_bindings(users)
    assert found.ok is ok
    assert '"rados" is not installed' in found.found


def installed(**changes: Any) -> dict[str, Any]:
    """The definition as an API server that serves it gives it back."""
    body = copy.deepcopy(CRD) | {"status": {"conditions": [{"type": "Established", "status": "True"}]}}
    body["spec"] |= changes
    return body


def test_the_schema_of_this_version_is_told_from_others() -> None:
    assert doctor._difference(installed(), CRD) == ""
    other = installed()
    del other["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["access"]
    assert "it differs in schema" in doctor._difference(other, CRD)
    assert "scope Namespaced" in doctor._difference(installed(scope="Namespaced"), CRD)
    older = [{**CRD["spec"]["versions"][0], "name": "v1alpha0"}]
    assert "without version v1alpha1" in doctor._difference(installed(versions=older), CRD)
    assert "does not serve it" in doctor._difference(installed() | {"status": {}}, CRD)


def test_bounds_that_the_api_server_rounded_are_no_difference() -> None:
    # It keeps them as floating point numbers: of 2**62 it gives back the first sixteen digits.
    assert doctor._numbers({"maximum": 4611686018427388000}) == doctor._numbers({"maximum": 2**62})
    assert doctor._numbers([True, "1"]) == [True, "1"]
    assert doctor._numbers([True]) != doctor._numbers(["1"])


def test_findings_are_rendered_for_people() -> None:
    text = render(
        [
            Finding(ok=True, what="a", found="is there", advice="not shown"),
            Finding(ok=False, what="longer", found="is\n  not there", advice="put it there"),
        ]
    )
    assert text.splitlines() == [
        "ok    a       is there",
        "FAIL  longer  is not there",
        "              -> put it there",
        "",
        "1 of 2 need attention",
    ]
    assert render([Finding(ok=True, what="a", found="b")]).endswith("all 1 are well")
