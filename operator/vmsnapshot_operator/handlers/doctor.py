"""What is missing for the operator to work, found by looking at each thing that it needs, with what to do about it.

Only looks: nothing is created or changed, but for what a driver's own probe does in its storage system. Not how the
operator itself copes when something is missing: each object's status says that.
"""

from __future__ import annotations

import asyncio
import importlib
import platform
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.api.meta import VERSION
from vmsnapshot_operator.core.endpoint import Endpoint
from vmsnapshot_operator.core.planning import StorageClass
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.drivers import ceph_cluster, registry
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import KubeError, RefusedError, SnapshotError
from vmsnapshot_operator.handlers.permissions import Permission, needed
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink
from vmsnapshot_operator.kube import distill
from vmsnapshot_operator.kube.client import Client
from vmsnapshot_operator.kube.cluster import CLASSES, CONFIG_MAPS, HYPERVISORS, INSTALLATION, NAMESPACES, Cluster
from vmsnapshot_operator.kube.distill import HypervisorSettings

PROBE_TIMEOUT = Seconds(30.0)
"""What a driver's probe may take; the operator itself gives it less."""

_CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
_ACCESS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_WHO = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
_CEPH_DRIVER = "ceph-rbd"
_INSTALL = (
    "apply those of this version: `helm upgrade`, or `vmsnapshot-operator crds | kubectl apply --server-side -f -`"
)
_ADVICE = {
    "KubeconfigInvalid": "give --kubeconfig, or run it in the operator's pod",
    "KubernetesUnavailable": "see that the API server runs and can be reached from here",
    "Unauthorized": "renew the credentials in the kubeconfig, or see that the ServiceAccount exists",
    "Forbidden": "grant it: the chart's RBAC does",
    "SecretNotFound": "create it in the operator's own namespace, not in the tenant's",
    "SecretInvalid": "write it again; values must be text",
    "InvalidObject": "correct the object",
    "GuardianNotReady": "see whether the guardian runs: the log of container `guardian`",
    "DriverNotInstalled": "correct spec.driver, or install the package that brings the driver into the operator's image",
    "DriverNotLoadable": "install what the message names into the operator's image",
    "InvalidParameters": "correct spec.parameters",
    "InvalidCredentials": "correct the Secret that spec.secretName names",
    "DriverUnavailable": "see that the storage system runs, can be reached from here, and takes these credentials",
    "DriverTimeout": "see whether the storage system is up: it does not answer in time",
    "DriverCrashed": "see the lines that the driver wrote to the log before it ended",
    "HypervisorUnreachable": "see that libvirtd runs, can be reached from here, and takes these credentials",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: what, what was found, and what to do if it is not as it must be."""

    ok: bool
    what: str
    found: str
    advice: str = ""


async def examine(kubeconfig: Path | None, namespace: str, guardian_socket: Path | None) -> list[Finding]:
    """Look at everything and return what was found. Each look has a deadline; none raises."""
    findings = await _told("this program", _versions())
    classes: list[StorageClass] = []
    # Without the API server there are no objects to look at; what is on this side of it can be told all the same.
    findings += await _told("API server", _cluster(kubeconfig, namespace, classes))
    findings += await _told("storage drivers", _drivers())
    findings += await _told("Ceph's bindings", _ceph_bindings(c.name for c in classes if c.driver == _CEPH_DRIVER))
    return findings + await _told("guardian", _guardian(guardian_socket))


def render(findings: Sequence[Finding]) -> str:
    """Return the findings as aligned lines for people."""
    width = max((len(f.what) for f in findings), default=0)
    lines = []
    for finding in findings:
        found = " ".join(finding.found.split())
        lines.append(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what:<{width}}  {found}")
        if finding.advice and not finding.ok:
            lines.append(f"      {'':<{width}}  -> {finding.advice}")
    bad = sum(not f.ok for f in findings)
    lines.append(f"\n{bad} of {len(findings)} need attention" if bad else f"\nall {len(findings)} are well")
    return "\n".join(lines)


async def _told(what: str, looking: Awaitable[Sequence[Finding]]) -> list[Finding]:
    """Wait for a look; what it raises is a finding, so that one that fails hides none of the others."""
    try:
        return list(await looking)
    except SnapshotError as error:
        return [_bad(what, error)]
    except Exception as error:  # noqa: BLE001 - whatever it is, a person reads it as a finding
        text = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding(ok=False, what=what, found=text, advice="if nothing here explains it, report it as a bug")]


def _bad(what: str, error: SnapshotError) -> Finding:
    return Finding(ok=False, what=what, found=error.message, advice=_ADVICE.get(error.reason, ""))


# --- this program -----------------------------------------------------------------------------------------------------


async def _versions() -> list[Finding]:
    own = f"{metadata.version('vmsnapshot-operator')}, Python {platform.python_version()}"
    found = [Finding(ok=True, what="vmsnapshot-operator", found=own)]
    try:
        # Not imported with this module: that it is missing has to be told.
        number = importlib.import_module("libvirt").getVersion()
    except ImportError as error:
        advice = "install the package libvirt0 of your distribution, and libvirt-python"
        return [*found, Finding(ok=False, what="libvirt's bindings", found=f"do not load: {error}", advice=advice)]
    version = f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
    text = f"libvirt {version}, libvirt-python {metadata.version('libvirt-python')}"
    return [*found, Finding(ok=True, what="libvirt's bindings", found=text)]


async def _drivers() -> list[Finding]:
    drivers = await asyncio.to_thread(registry.inspect)
    if not drivers:
        advice = "install the package again: its entry points are missing"
        return [Finding(ok=False, what="storage drivers", found="none is installed", advice=advice)]
    return [
        Finding(
            ok=not d.problem,
            what=f"driver {d.name}",
            found=d.problem or f"loads, from {d.distribution}",
            advice=_ADVICE["DriverNotLoadable"],
        )
        for d in drivers
    ]


async def _ceph_bindings(classes: Iterable[str]) -> list[Finding]:
    users = ", ".join(classes)
    try:
        for name in ("rados", "rbd"):
            await asyncio.to_thread(ceph_cluster.binding, name)
    except SnapshotError as error:
        needed_by = f"; needed by StorageDriverClass {users}" if users else "; no StorageDriverClass needs it"
        return [Finding(ok=not users, what="Ceph's bindings", found=error.message + needed_by)]
    return [Finding(ok=True, what="Ceph's bindings", found="load")]


async def _guardian(path: Path | None) -> list[Finding]:
    if path is None:
        text = "not asked: no --guardian-socket was given; without a guardian no VM is ever frozen"
        return [Finding(ok=True, what="guardian", found=text)]
    link = GuardianLink(path)
    try:
        await link.ping()
    finally:
        await link.close()
    return [Finding(ok=True, what="guardian", found=f"answers at {path}")]


# --- the API server ---------------------------------------------------------------------------------------------------


async def _cluster(kubeconfig: Path | None, namespace: str, classes: list[StorageClass]) -> list[Finding]:
    """Look at all that is in the cluster; the classes that can be understood are added to `classes`."""
    async with Cluster(namespace=namespace, kubeconfig=kubeconfig) as cluster:
        answer = await cluster.client.request("GET", "/version")
        text = f"Kubernetes {answer.get('gitVersion', 'of unknown version')}"
        return [Finding(ok=True, what="API server", found=text), *await _in_cluster(cluster, classes)]


async def _in_cluster(cluster: Cluster, classes: list[StorageClass]) -> list[Finding]:
    findings = await _told("CustomResourceDefinitions", _crds(cluster.client))
    findings += await _told("own namespace", _namespace(cluster))
    hypervisors, bad = await _objects(cluster.client, "Hypervisor", HYPERVISORS.path(), distill.hypervisor)
    found, worse = await _objects(cluster.client, "StorageDriverClass", CLASSES.path(), distill.storage_class)
    classes += found
    secrets = {s for s in (*(h.secret_name for h in hypervisors), *(c.secret_name for c in found)) if s}
    findings += await _told("permissions", _permissions(cluster, sorted(secrets)))
    looks = [_told(f'Hypervisor "{h.name}"', _hypervisor(cluster, h)) for h in hypervisors]
    looks += [_told(f'StorageDriverClass "{c.name}"', _class(cluster, c)) for c in found]
    return findings + bad + worse + [f for each in await asyncio.gather(*looks) for f in each]


async def _crds(client: Client) -> list[Finding]:
    findings = []
    for kind in schema.KINDS:
        wanted = schema.crd(kind)
        name = wanted["metadata"]["name"]
        answer = await client.request("GET", _CRDS, query={"fieldSelector": f"metadata.name={name}"})
        what = f"CRD {kind.name}"
        items = answer.get("items") or []
        problem = _difference(items[0], wanted) if items else "is not installed"
        if problem:
            findings.append(Finding(ok=False, what=what, found=problem, advice=_INSTALL))
        else:
            findings.append(Finding(ok=True, what=what, found=f"installed, schema {VERSION} of this version"))
    return findings


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say in what an installed definition differs from ours in a way that matters; empty if it does not."""
    conditions = {c["type"]: c["status"] for c in (found.get("status") or {}).get("conditions") or ()}
    if conditions.get("Established") != "True":
        return "is installed, but the API server does not serve it (yet)"
    versions = {v["name"]: v for v in found["spec"]["versions"]}
    (ours,) = wanted["spec"]["versions"]
    theirs = versions.get(ours["name"])
    if theirs is None:
        return f"is installed without version {ours['name']}"
    if found["spec"]["scope"] != wanted["spec"]["scope"]:
        return f"is installed with scope {found['spec']['scope']}"
    parts = ("schema", "subresources", "additionalPrinterColumns")
    differing = [k for k in parts if _numbers(theirs.get(k)) != _numbers(ours[k])]
    return (
        f"is installed from another version of this program (it differs in {', '.join(differing)})" if differing else ""
    )


def _numbers(node: Any) -> Any:
    """Make all numbers floats: the API server keeps bounds as such, and gives back large ones rounded."""
    if isinstance(node, Mapping):
        return {k: _numbers(v) for k, v in node.items()}
    if isinstance(node, list):
        return [_numbers(v) for v in node]
    return float(node) if isinstance(node, int) and not isinstance(node, bool) else node


async def _namespace(cluster: Cluster) -> list[Finding]:
    what = f'namespace "{cluster.namespace}"'
    if await cluster.client.get(NAMESPACES.path(cluster.namespace)) is None:
        advice = "create it, or give the operator's own namespace by --namespace"
        return [Finding(ok=False, what=what, found="does not exist", advice=advice)]
    body = await cluster.client.get(CONFIG_MAPS.path(INSTALLATION, cluster.namespace))
    if body is None:
        text = f"exists; without ConfigMap {INSTALLATION} yet, which the operator makes at its first start"
        return [Finding(ok=True, what=what, found=text)]
    return [Finding(ok=True, what=what, found=f"exists; installation {await cluster.installation()}")]


async def _objects(client: Client, kind: str, path: str, read: Any) -> tuple[list[Any], list[Finding]]:
    """Return the objects of a kind that can be understood, and findings about the others, or that there are none."""
    try:
        answer = await client.get(path)
    except KubeError as error:
        return [], [_bad(f"{kind} objects", error)]
    found, findings = [], []
    for body in (answer or {}).get("items") or ():
        try:
            found.append(read(body))
        except RefusedError as error:
            findings.append(_bad(f'{kind} "{body["metadata"]["name"]}"', error))
    if not found and not findings:
        advice = f"write one: examples/ has a {kind}"
        findings.append(Finding(ok=False, what=f"{kind} objects", found="there are none", advice=advice))
    return found, findings


# --- permissions ------------------------------------------------------------------------------------------------------


async def _permissions(cluster: Cluster, secrets: Sequence[str]) -> list[Finding]:
    who = await _who(cluster.client)
    asked = [p for permission in needed() for p in _named(permission, secrets)]
    allowed = await asyncio.gather(*(_allowed(cluster, p) for p in asked))
    refused = [p for p, yes in zip(asked, allowed, strict=True) if not yes]
    advice = f"grant it to {who}: the chart's RBAC does"
    findings = [
        Finding(ok=False, what="permissions", found=f"{who} may not {p}{_where(p, cluster.namespace)}", advice=advice)
        for p in refused
    ]
    if findings:
        return findings
    aside = "" if who.startswith("system:serviceaccount:") else "; that is not the operator: ask in its pod for its own"
    return [Finding(ok=True, what="permissions", found=f"all {len(asked)}, as {who}{aside}")]


def _named(permission: Permission, secrets: Sequence[str]) -> list[Permission]:
    """Ask for Secrets one by one: the operator may be allowed to read just those that are named somewhere."""
    if permission.resource != "secrets":
        return [permission]
    return [replace(permission, name=s) for s in secrets]


def _where(permission: Permission, namespace: str) -> str:
    return f" in namespace {namespace}" if permission.own else ""


async def _who(client: Client) -> str:
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
    answer = await client.request("POST", _WHO, body)
    return str(answer.get("status", {}).get("userInfo", {}).get("username", "an unknown user"))


async def _allowed(cluster: Cluster, permission: Permission) -> bool:
    attributes = {
        "group": permission.group,
        "resource": permission.resource,
        "subresource": permission.subresource,
        "verb": permission.verb,
        "name": permission.name,
        "namespace": cluster.namespace if permission.own else "",
    }
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    answer = await cluster.client.request("POST", _ACCESS, body)
    return answer.get("status", {}).get("allowed") is True


# --- what is reached from here ----------------------------------------------------------------------------------------


async def _hypervisor(cluster: Cluster, settings: HypervisorSettings) -> list[Finding]:
    credentials = await cluster.secret(settings.secret_name) if settings.secret_name else {}
    looks = (
        _told(f'Hypervisor "{settings.name}"', _endpoint(settings.name, e, credentials)) for e in settings.endpoints
    )
    findings = [f for each in await asyncio.gather(*looks) for f in each]
    if not settings.access:
        text = "reachable or not, nobody may snapshot its VMs: spec.access is empty"
        advice = "say which namespaces may snapshot which domains"
        findings.append(Finding(ok=False, what=f'Hypervisor "{settings.name}"', found=text, advice=advice))
    return findings


async def _endpoint(name: str, endpoint: Endpoint, credentials: Mapping[str, str]) -> list[Finding]:
    # Not with this module: without libvirt's bindings everything else can be told all the same.
    from vmsnapshot_operator.hypervisors.domains import Hypervisor  # noqa: PLC0415

    client = await Hypervisor.connect(name, [endpoint], credentials)
    try:
        about = await client.about()
    finally:
        await client.close()
    versions = f"libvirt {about['libvirtVersion']}, hypervisor {about['hypervisorVersion']}"
    text = f"{endpoint.name} answers: {versions}, {about['domains']} domains"
    return [Finding(ok=True, what=f'Hypervisor "{name}"', found=text)]


async def _class(cluster: Cluster, cls: StorageClass) -> list[Finding]:
    credentials = await cluster.secret(cls.secret_name) if cls.secret_name else {}
    host = DriverHost(cls.name, cls.driver, cls.parameters, credentials)
    try:
        await host.start()
        can = await host.capabilities(timeout=PROBE_TIMEOUT)
    finally:
        await host.close()
    text = f"driver {cls.driver} answers: cut {can.cut}, {'atomic' if can.atomic else 'not atomic'}"
    return [Finding(ok=True, what=f'StorageDriverClass "{cls.name}"', found=text)]
