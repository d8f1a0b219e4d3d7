"""The chart as helm renders it, held against a real API server; and the examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import Lab, LabError
from tests.stack import CHART, EXAMPLES, NAMESPACE, ROOT, Stack, until
from vmsnapshot_operator import cli
from vmsnapshot_operator.guardian import __main__ as guardian_program
from vmsnapshot_operator.handlers import permissions
from vmsnapshot_operator.handlers.permissions import Permission

Json = dict[str, Any]
Render = Callable[..., list[Json]]

EVERYTHING = """
image: {digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000"}
imagePullSecrets: [{name: registry}]
serviceAccount: {annotations: {example.com/a: b}}
rbac: {secretNames: [ceph-rbd, libvirt-client]}
log: {format: text, verbose: true}
podLabels: {example.com/team: storage}
podAnnotations: {example.com/a: b}
priorityClassName: system-cluster-critical
nodeSelector: {kubernetes.io/os: linux}
tolerations: [{key: a, operator: Exists}]
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms: [{matchExpressions: [{key: a, operator: Exists}]}]
replicas: 2
leaseSeconds: 20
extraVolumes: [{name: libvirt, hostPath: {path: /run/libvirt, type: Directory}}]
extraVolumeMounts: [{name: libvirt, mountPath: /run/libvirt}]
metrics: {service: {enabled: true, annotations: {example.com/scrape: "true"}}}
guardian:
  remote:
    enabled: true
    uris: ["qemu+tls://kvm1.example.org/system?pkipath=/etc/vmsnapshot/libvirt", "qemu+tls://kvm2.example.org/system"]
    credentials: {secretName: libvirt-client, items: [{key: ca.crt, path: cacert.pem}]}
    replicas: 2
    nodeSelector: {kubernetes.io/os: linux}
    tolerations: [{key: a, operator: Exists}]
    extraVolumes: [{name: more, emptyDir: {}}]
    extraVolumeMounts: [{name: more, mountPath: /more}]
    egress: [{ports: [{port: 16514}]}]
networkPolicy:
  enabled: true
  metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
  egress: [{ports: [{port: 443}]}]
"""


@pytest.fixture(scope="session")
def helm(lab: Lab) -> Callable[..., str]:
    """Run helm; raises AssertionError with what it said if it fails."""

    def run(*arguments: str, stdin: str | None = None) -> str:
        done = subprocess.run(
            [str(lab.bin("helm")), *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def render(helm: Callable[..., str]) -> Render:
    """Render the chart with values (YAML) and further arguments of helm."""

    def rendered(*arguments: str, values: str = "{}") -> list[Json]:
        text = helm(
            "template", "vmsnapshot-operator", str(CHART), "--namespace", NAMESPACE, "--kube-version", "1.37.0",
            "--values", "-", *arguments, stdin=values,
        )  # fmt: skip
        return [d for d in yaml.safe_load_all(text) if d]

    return rendered


@pytest.fixture
def namespace(lab: Lab, fresh: Callable[[str], str]) -> Iterator[str]:
    """A namespace in which only pods of the `restricted` standard may run, with the operator's ServiceAccount."""
    name = f"{fresh('chart')}-{os.getpid()}"
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    lab.kubectl("create", "-f", "-", stdin=json.dumps(_object("Namespace", {"name": name, "labels": label})))
    lab.kubectl(
        "create", "-n", name, "-f", "-", stdin=json.dumps(_object("ServiceAccount", {"name": "vmsnapshot-operator"}))
    )
    yield name
    lab.kubectl("delete", "namespace", name, "--wait=false")


def _object(kind: str, metadata: Json) -> Json:
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata}


def only(documents: list[Json], kind: str, name: str = "vmsnapshot-operator") -> Json:
    """The one object of a kind and name."""
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pod(documents: list[Json], namespace: str = NAMESPACE, name: str = "vmsnapshot-operator") -> Json:
    """The pod that the Deployment would make."""
    template = only(documents, "Deployment", name)["spec"]["template"]
    metadata = {**template["metadata"], "name": "operator", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def granted(documents: list[Json]) -> list[Permission]:
    """Every permission that is bound to the operator's ServiceAccount."""
    roles = {(b["roleRef"]["kind"], b["roleRef"]["name"]) for b in documents if b["kind"].endswith("Binding")}
    return [
        Permission(group=group, resource=resource, subresource=sub, verb=verb, name=name, own=role["kind"] == "Role")
        for role in documents
        if (role["kind"], role["metadata"]["name"]) in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource, _, sub in (r.partition("/") for r in rule["resources"])
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    ]


def test_lint_is_clean(helm: Callable[..., str], tmp_path: Path) -> None:
    helm("lint", "--strict", str(CHART))
    given = tmp_path / "values.yaml"
    given.write_text(EVERYTHING)
    helm("lint", "--strict", str(CHART), "--values", str(given))


@pytest.mark.parametrize("values", ["{}", EVERYTHING], ids=["defaults", "everything"])
def test_the_api_server_takes_all_of_it(lab: Lab, stack: Stack, render: Render, values: str) -> None:
    documents = render(values=values)
    assert {d["kind"] for d in documents} >= {"CustomResourceDefinition", "Deployment", "ClusterRole", "Role"}
    text = yaml.safe_dump_all(documents)
    said = lab.kubectl(
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=chart-test",
        "--dry-run=server",
        "-f",
        "-",
        stdin=text,
    )
    assert len(said.splitlines()) == len(documents), said
    assert "Warning" not in said


def test_crds_are_the_generated_ones_and_are_kept(render: Render) -> None:
    generated = [yaml.safe_load(p.read_text()) for p in sorted((ROOT / "crds").glob("*.yaml"))]
    for keep in (True, False):
        crds = render("--set", f"crds.keep={str(keep).lower()}", "-s", "templates/crds.yaml")
        policies = [c["metadata"].pop("annotations", {}).get("helm.sh/resource-policy") for c in crds]
        assert policies == ["keep" if keep else None] * len(generated)
        for crd in crds:
            assert crd["metadata"].pop("labels")["app.kubernetes.io/instance"] == "vmsnapshot-operator"
        assert sorted(crds, key=lambda c: c["metadata"]["name"]) == sorted(
            generated, key=lambda c: c["metadata"]["name"]
        )
    assert not [d for d in render("--set", "crds.enabled=false") if d["kind"] == "CustomResourceDefinition"]


def test_permissions_alone_can_be_rendered(render: Render) -> None:
    documents = render("-s", "templates/serviceaccount.yaml", "-s", "templates/rbac.yaml")
    kinds = ["ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"]
    assert sorted(d["kind"] for d in documents) == kinds
    assert sorted(granted(documents)) == sorted(permissions.needed())
    for binding in (d for d in documents if d["kind"].endswith("Binding")):
        (subject,) = binding["subjects"]
        assert subject == {"kind": "ServiceAccount", "name": "vmsnapshot-operator", "namespace": NAMESPACE}


def test_secrets_can_be_restricted_to_those_that_are_named(render: Render) -> None:
    secrets = [p for p in granted(render(values=EVERYTHING)) if p.resource == "secrets"]
    assert {(p.verb, p.name, p.own) for p in secrets} == {("get", "ceph-rbd", True), ("get", "libvirt-client", True)}


def test_no_request_of_the_operator_is_refused(stack: Stack, vmsnapshot: Callable[..., str]) -> None:
    audit = stack.lab.audit_log
    mark = audit.stat().st_size if audit is not None else 0
    name = vmsnapshot("permitted", ttlSeconds=60)
    stack.wait(name)
    stack.delete(name)
    log = stack.programs["operator"].log.read_text()
    assert "Not enough permissions" not in log
    assert "check the operator's RBAC" not in log
    if audit is not None:  # on a cluster of the user's own there is the operator's log alone
        user = f"system:serviceaccount:{NAMESPACE}:vmsnapshot-operator"
        lines = (json.loads(line) for line in audit.read_bytes()[mark:].splitlines())
        ours = [e for e in lines if e["user"]["username"] == user]
        assert ours
        assert not [e["requestURI"] for e in ours if e["responseStatus"].get("code") == 403]


def test_the_pod_is_admitted_as_restricted(lab: Lab, namespace: str, render: Render) -> None:
    made = pod(render(), namespace)
    lab.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))
    made["spec"]["containers"][0]["securityContext"].pop("allowPrivilegeEscalation")
    with pytest.raises(LabError, match="restricted"):
        lab.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))


def test_the_guardian_is_a_sidecar_of_its_own(render: Render) -> None:
    spec = pod(render())["spec"]
    (guardian,), (operator,) = spec["initContainers"], spec["containers"]
    assert guardian["restartPolicy"] == "Always", "a native sidecar: started before, ended after the operator"
    assert guardian["image"] == operator["image"]
    mounts = {c["name"]: {m["name"] for m in c["volumeMounts"]} for c in (guardian, operator)}
    assert "api-access" not in mounts["guardian"], "who only thaws needs no token"
    assert "api-access" in mounts["operator"]
    assert spec["automountServiceAccountToken"] is False
    assert "run" in mounts["guardian"] & mounts["operator"]
    deployment = only(render(), "Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert "--lease-seconds=10" in operator["args"]
    assert spec["terminationGracePeriodSeconds"] > 30, "a window of the default budget ends before anything is killed"


def test_both_containers_reach_the_hypervisors(render: Render) -> None:
    spec = pod(render(values=EVERYTHING))["spec"]
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {"name": "libvirt", "mountPath": "/run/libvirt"} in container["volumeMounts"]
        assert container["image"].endswith("@sha256:" + 64 * "0")


def test_the_program_takes_the_arguments_of_the_chart(render: Render) -> None:
    for values in ("{}", EVERYTHING):
        (operator,) = pod(render(values=values))["spec"]["containers"]
        command, *arguments = operator["args"]
        context = cli.main.commands[command].make_context(command, arguments)
        assert str(context.params["guardian_socket"]) == "/run/vmsnapshot/guardian.sock"
        assert context.params["telemetry_port"] == operator["ports"][0]["containerPort"]
        env = {e["name"]: e.get("value") for e in operator["env"]}
        assert env == {
            "VMSNAPSHOT_IDENTITY": None,
            "POD_NAMESPACE": None,
            "VMSNAPSHOT_GUARDIAN_SOCKET": "/run/vmsnapshot/guardian.sock",
        }


def test_the_guardian_runs_and_is_probed_as_the_chart_says(render: Render, tmp_path: Path) -> None:
    (guardian,) = pod(render())["spec"]["initContainers"]
    here = f"--socket={tmp_path}/guardian.sock"
    folder = Path(sys.executable).parent

    def fitted(words: list[str]) -> list[str]:
        return [here if w.startswith("--socket=") else w for w in words]

    interpreter, *probe = fitted(guardian["livenessProbe"]["exec"]["command"])

    def answers() -> bool:
        return subprocess.run([str(folder / interpreter), *probe], check=False, capture_output=True).returncode == 0

    assert not answers()
    process = subprocess.Popen(
        [str(folder / "vmsnapshot-operator"), *fitted(guardian["args"])], stderr=subprocess.DEVNULL
    )
    try:
        until("the guardian answers its probe", answers)
        process.terminate()
        assert process.wait(timeout=30) == 0, "SIGTERM ends it"
    finally:
        process.kill()
        process.wait()


REMOTE = "vmsnapshot-operator-guardian"


def test_there_is_no_remote_guardian_unless_it_is_asked_for(render: Render) -> None:
    assert [d["metadata"]["name"] for d in render() if d["kind"] == "Deployment"] == ["vmsnapshot-operator"]


def test_the_remote_guardian_may_do_nothing_but_reach_libvirt(lab: Lab, namespace: str, render: Render) -> None:
    documents = render(values=EVERYTHING)
    made = pod(documents, namespace, REMOTE)
    lab.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(made))
    spec = made["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in spec
    assert {v["name"] for v in spec["volumes"]} == {"run", "credentials", "more"}
    (container,) = spec["containers"]
    assert container["securityContext"] == pod(documents)["spec"]["containers"][0]["securityContext"]
    assert only(documents, "NetworkPolicy", REMOTE)["spec"]["ingress"] == []


def test_the_remote_guardian_is_elsewhere_than_the_operator_and_not_taken_for_it(render: Render) -> None:
    documents = render(values=EVERYTHING)
    remote = pod(documents, name=REMOTE)
    (term,) = remote["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    wanted = term["labelSelector"]["matchLabels"]
    operator = pod(documents)["metadata"]["labels"]
    assert wanted.items() <= operator.items()
    selectors = [
        only(documents, "Deployment")["spec"]["selector"]["matchLabels"],
        only(documents, "Service", "vmsnapshot-operator-metrics")["spec"]["selector"],
        only(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    for selector in (wanted, *selectors):
        assert not selector.items() <= remote["metadata"]["labels"].items()
    assert only(documents, "Deployment", REMOTE)["spec"]["selector"]["matchLabels"].items() <= (
        remote["metadata"]["labels"].items()
    )
    preferred = pod(render("--set", "guardian.remote.antiAffinityRequired=false", values=EVERYTHING), name=REMOTE)
    assert set(preferred["spec"]["affinity"]["podAntiAffinity"]) == {"preferredDuringSchedulingIgnoredDuringExecution"}


def test_the_remote_guardian_takes_the_arguments_of_the_chart(render: Render) -> None:
    (container,) = pod(render(values=EVERYTHING), name=REMOTE)["spec"]["containers"]
    command, *words = container["args"]
    assert command == "guardian"
    options = guardian_program.arguments(words)
    assert options.watch_only
    assert options.uri == [
        "qemu+tls://kvm1.example.org/system?pkipath=/etc/vmsnapshot/libvirt",
        "qemu+tls://kvm2.example.org/system",
    ]
    (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "credentials"]
    assert options.uri[0].endswith(f"pkipath={mount}")
    for probe, reach in (("startupProbe", False), ("livenessProbe", False), ("readinessProbe", True)):
        _, _, module, *words = container[probe]["exec"]["command"]
        assert module == "vmsnapshot_operator.guardian"
        asked = guardian_program.arguments(words)
        assert (asked.probe, asked.reach, asked.socket) == (True, reach, options.socket)


def test_a_remote_guardian_that_knows_no_libvirt_is_refused(render: Render) -> None:
    with pytest.raises(AssertionError, match=r"guardian\.remote\.uris is empty"):
        render("--set", "guardian.remote.enabled=true")


def test_alerts_are_told_with_what_they_are_about(render: Render) -> None:
    assert not [d for d in render(values=EVERYTHING) if d["kind"] == "PrometheusRule"]
    arguments = ("--set", "metrics.alerts.enabled=true", "--set", "metrics.alerts.labels.release=p")
    (rule,) = [d for d in render(*arguments, values=EVERYTHING) if d["kind"] == "PrometheusRule"]
    assert rule["metadata"]["labels"]["release"] == "p"
    alerts = [a for group in rule["spec"]["groups"] for a in group["rules"]]
    for alert in alerts:
        assert alert["labels"]["severity"] in {"critical", "warning"}
        assert alert["annotations"]["summary"].strip()
        assert "runbook_url" not in alert["annotations"]
        assert len(re.findall(r"\{namespace=", alert["expr"])) == len(
            re.findall(r"\b(?:vmsnapshot|kube)_\w+\{", alert["expr"])
        )
        for label in re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]):
            assert f"by ({label})" in alert["expr"], "else the alert has no such label"
    assert {"VMSnapshotGuardianDown", "VMSnapshotRemoteGuardianDown"} <= {a["alert"] for a in alerts}
    more = (
        "--set",
        "metrics.alerts.kubeStateMetrics=false",
        "--set",
        "metrics.alerts.runbookUrl=https://example.org/o",
    )
    (rule,) = [d for d in render(*arguments, *more) if d["kind"] == "PrometheusRule"]
    alerts = [a for group in rule["spec"]["groups"] for a in group["rules"]]
    assert not [a for a in alerts if "kube_" in a["expr"]]
    assert {a["annotations"]["runbook_url"] for a in alerts} == {
        f"https://example.org/o#{a['alert'].lower()}" for a in alerts
    }


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_taken_as_they_are(lab: Lab, stack: Stack, path: Path) -> None:
    said = lab.kubectl(
        "apply", "--server-side", "--force-conflicts", "--field-manager=chart-test", "--dry-run=server", "-f", str(path)
    )
    assert "serverside-applied" in said


def test_examples_fit_each_other() -> None:
    bodies = [b for p in EXAMPLES.glob("*.yaml") for b in yaml.safe_load_all(p.read_text()) if b]
    names = {(b["kind"], b["metadata"]["name"]) for b in bodies}
    assert ("Namespace", "team-a") in names
    for body in bodies:
        spec = body.get("spec", {})
        if body["kind"] == "VMSnapshot":
            assert ("Hypervisor", spec["source"]["hypervisorName"]) in names
            assert ("Namespace", body["metadata"]["namespace"]) in names
        if body["kind"] == "VMRestore":
            assert ("VMSnapshot", spec["snapshotName"]) in names
            assert ("Namespace", body["metadata"]["namespace"]) in names
        if "secretName" in spec:
            assert ("Secret", spec["secretName"]) in names
        if body["kind"] == "Secret":
            assert body["metadata"]["namespace"] == NAMESPACE
