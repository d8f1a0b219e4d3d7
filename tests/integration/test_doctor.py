"""What doctor says of a whole installation, and of each thing that can be missing, on real parts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.lab import Lab
from tests.stack import NAMESPACE, SERVICE_ACCOUNT, Stack
from vmsnapshot_operator import cli
from vmsnapshot_operator.handlers.doctor import Finding, examine
from vmsnapshot_operator.handlers.permissions import needed

Json = dict[str, Any]


@pytest.fixture
def operator(lab: Lab, stack: Stack) -> Path:
    """A kubeconfig of the operator's own ServiceAccount."""
    return lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT)


@pytest.fixture
def nobody(lab: Lab, stack: Stack) -> Iterator[Path]:
    """A kubeconfig of a ServiceAccount without any permission."""
    name = f"nobody-{os.getpid()}"
    lab.kubectl("-n", NAMESPACE, "create", "serviceaccount", name)
    yield lab.service_account_kubeconfig(NAMESPACE, name)
    lab.kubectl("-n", NAMESPACE, "delete", "serviceaccount", name)


@pytest.fixture
def objects(lab: Lab, stack: Stack, fresh: Callable[[str], str]) -> Iterator[Callable[[str, Json], str]]:
    """Make cluster-scoped objects of ours that are deleted at the end of the test."""
    made: list[tuple[str, str]] = []

    def make(kind: str, spec: Json) -> str:
        name = f"{fresh('doctor')}-{os.getpid()}"
        body = {"apiVersion": "vmsnapshot.io/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}
        lab.kubectl("create", "-f", "-", stdin=json.dumps(body))
        made.append((kind, name))
        return name

    yield make
    for kind, name in made:
        lab.kubectl("delete", f"{kind.lower()}.vmsnapshot.io", name)


def of(findings: list[Finding], what: str) -> Finding:
    """The one finding about something."""
    (found,) = [f for f in findings if f.what == what]
    return found


def a_class(**spec: object) -> Json:
    """A StorageDriverClass that serves no disk of any guest."""
    return {"driver": "libvirt-volume", "match": [{"sourcePattern": "/nowhere/*"}], **spec}


async def test_all_is_well(stack: Stack, operator: Path) -> None:
    findings = await examine(operator, NAMESPACE, stack.guardian_socket)
    assert [f for f in findings if not f.ok] == []
    told = {f.what: f.found for f in findings}
    assert told["permissions"].endswith(f"as system:serviceaccount:{NAMESPACE}:{SERVICE_ACCOUNT}")
    assert "libvirt" in told['Hypervisor "lab"']
    assert "cut Instant, atomic" in told['StorageDriverClass "ceph-vms"']
    assert "cut Instant, not atomic" in told['StorageDriverClass "reflink-files"']
    assert {"CRD VMSnapshot", "CRD Hypervisor", "guardian", "driver ceph-rbd", "Ceph's bindings"} <= told.keys()


def test_the_command_says_so_and_exits_with_it(stack: Stack, operator: Path, tmp_path: Path) -> None:
    options = ["doctor", "--kubeconfig", str(operator), "--namespace", NAMESPACE, "--guardian-socket"]
    well = CliRunner().invoke(cli.main, [*options, str(stack.guardian_socket)])
    assert (well.exit_code, "are well" in well.output) == (0, True), well.output
    ill = CliRunner().invoke(cli.main, [*options, str(tmp_path / "none.sock")])
    assert ill.exit_code == 1
    assert "FAIL  guardian" in ill.output
    assert "1 of" in ill.output


async def test_each_missing_permission_is_named(nobody: Path) -> None:
    findings = await examine(nobody, NAMESPACE, None)
    said = [f.found for f in findings if f.what == "permissions"]
    # Secrets are asked for by the names that objects give, and this user cannot even see the objects.
    assert len(said) == len([p for p in needed() if p.resource != "secrets"])
    assert any("may not patch vmsnapshots.vmsnapshot.io --subresource=status" in s for s in said)
    assert any(s.endswith(f"may not create leases.coordination.k8s.io in namespace {NAMESPACE}") for s in said)
    assert not of(findings, "Hypervisor objects").ok
    assert of(findings, "API server").ok


async def test_a_secret_that_may_not_be_read_is_named(
    lab: Lab, operator: Path, objects: Callable[[str, Json], str]
) -> None:
    name = objects("StorageDriverClass", a_class(secretName="there-is-none"))
    found = of(await examine(operator, NAMESPACE, None), f'StorageDriverClass "{name}"')
    assert not found.ok
    assert f'Secret "there-is-none" in namespace "{NAMESPACE}" does not exist' in found.found
    assert "operator's own namespace" in found.advice


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"driver": "no-such-driver"}, "is installed; installed are: ceph-rbd, libvirt-backup, libvirt-volume"),
        ({"parameters": {"poolName": "reflink", "minFreeBites": "1"}}, 'parameter "minFreeBites"'),
        ({"parameters": {}}, 'parameter "poolName"'),
        ({"parameters": {"poolName": "reflink", "socketPath": "/nowhere/sock"}}, "/nowhere/sock"),
        ({"driver": "ceph-rbd", "parameters": {"monHosts": "127.0.0.1:1", "pool": "vms"}}, 'credential "key"'),
    ],
    ids=["driver", "misspelt", "missing", "unreachable", "credentials"],
)
async def test_a_class_that_cannot_serve_says_why(
    operator: Path, objects: Callable[[str, Json], str], spec: Json, said: str
) -> None:
    name = objects("StorageDriverClass", a_class(**spec))
    findings = await examine(operator, NAMESPACE, None)
    found = of(findings, f'StorageDriverClass "{name}"')
    assert not found.ok
    assert said in found.found
    assert found.advice
    assert of(findings, 'StorageDriverClass "ceph-vms"').ok, "the others are not kept from being looked at"


async def test_each_endpoint_that_does_not_answer_is_named(
    lab: Lab, stack: Stack, operator: Path, objects: Callable[[str, Json], str]
) -> None:
    dead = {"socketPath": "/nowhere/libvirt-sock"}
    name = objects("Hypervisor", {"libvirt": {"endpoints": [stack.endpoint(), dead]}, "access": []})
    found = [f for f in await examine(operator, NAMESPACE, None) if f.what == f'Hypervisor "{name}"']
    good, bad, access = found
    assert good.ok
    assert str(lab.libvirt_socket) in good.found
    assert not bad.ok
    assert "/nowhere/libvirt-sock" in bad.found
    assert not access.ok
    assert "nobody may snapshot" in access.found


async def test_another_namespace_is_not_the_operators(lab: Lab) -> None:
    findings = await examine(lab.kubeconfig, "no-such-namespace", None)
    assert not of(findings, 'namespace "no-such-namespace"').ok
    assert "that is not the operator" in of(findings, "permissions").found
    assert not of(findings, 'StorageDriverClass "ceph-vms"').ok, "its Secret is not there"
