"""The CustomResourceDefinitions on a real API server: what is accepted, what is refused and in which words.

The cases of `tests/crd-cases` run against copies of the definitions in a group of their own, so that no operator takes their
objects for work; the copies differ from `crds/` in the name of the group alone.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import Lab, LabError
from tests.stack import until
from vmsnapshot_operator.api.meta import API_VERSION, CATEGORY, GROUP, VERSION

ROOT = Path(__file__).resolve().parents[2]
CRDS = sorted((ROOT / "crds").glob("*.yaml"))
CASES = {p.stem: yaml.safe_load(p.read_text()) for p in sorted((ROOT / "tests" / "crd-cases").glob("*.yaml"))}
REFUSED = [n for n, c in CASES.items() if c["expect"] == "refused"]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
OF_THE_SERVER = re.compile(r"must be of type (integer|boolean|string)|unknown field|RFC 1123")
"""What the API server refuses by itself, whatever the schema bounds."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API server said, with its warnings."""

    status: int
    body: Json
    warnings: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return self.status < 300

    @property
    def message(self) -> str:
        """Its words, if it did not."""
        return str(self.body.get("message", ""))


@dataclass(frozen=True, slots=True)
class Server:
    """The API server behind `kubectl proxy`: plain requests, since kubectl does not show all that it answers."""

    url: str

    def call(self, method: str, path: str, body: Json | None = None, *, kind: str = "application/json") -> Answer:
        """Send one request."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind}, method=method)  # noqa: S310 - our own proxy
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
                return _answer(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return _answer(error.code, error.read(), error.headers)

    def done(self, method: str, path: str, body: Json | None = None, *, kind: str = "application/json") -> Json:
        """Send one request that must succeed without a warning."""
        answer = self.call(method, path, body, kind=kind)
        assert answer.ok, answer.message
        assert answer.warnings == ()
        return answer.body


def _answer(status: int, data: bytes, headers: Message) -> Answer:
    try:
        body = json.loads(data)
    except ValueError:  # a kind that is not served yet is answered by a line of text
        body = {"message": data.decode()}
    return Answer(status, body, tuple(headers.get_all("Warning") or ()))


@dataclass(frozen=True, slots=True)
class Copies:
    """Our definitions under another group."""

    server: Server
    group: str
    plurals: dict[str, str]

    def path(self, body: Json, name: str = "", subresource: str = "") -> str:
        """Path of the collection that an object belongs to, or of one object in it."""
        namespace = body["metadata"].get("namespace")
        parts = ["/apis", self.group, VERSION, *(("namespaces", namespace) if namespace else ())]
        return "/".join(
            [*parts, self.plurals[body["kind"]], *([name] if name else []), *([subresource] if subresource else [])]
        )

    def own(self, body: Json) -> Json:
        """The same object in this group."""
        return copy.deepcopy(body) | {"apiVersion": f"{self.group}/{VERSION}"}

    def run(self, case: Json) -> Answer:
        """Create the first object of a case, update it to the others, and return the last answer; nothing stays."""
        first, *others = case.get("objects") or [case["object"]]
        answer = self.server.call("POST", self.path(first) + "?fieldValidation=Strict", self.own(first))
        try:
            for other in others:
                assert answer.ok, answer.message
                assert answer.warnings == ()
                body = self.own(other)
                body["metadata"]["resourceVersion"] = answer.body["metadata"]["resourceVersion"]
                path = self.path(other, other["metadata"]["name"]) + "?fieldValidation=Strict"
                answer = self.server.call("PUT", path, body)
        finally:
            self.server.call("DELETE", self.path(first, first["metadata"]["name"]))
        return answer


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Server]:
    argv = [str(lab.bin("kubectl")), "--kubeconfig", str(lab.kubeconfig), "proxy", "--port=0"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            line = proxy.stdout.readline()
            found = re.search(r"127\.0\.0\.1:\d+", line)
            assert found, line
            yield Server(f"http://{found[0]}")
        finally:
            proxy.terminate()


@contextmanager
def copies(server: Server, change: Callable[[Json], None] = lambda _schema: None) -> Iterator[Copies]:
    """Install copies of our definitions in a fresh group, their schemas changed, and remove them in the end."""
    group = f"case-{secrets.token_hex(4)}.test"
    made = []
    try:
        for path in CRDS:
            crd = yaml.safe_load(path.read_text())
            names = crd["spec"]["names"]
            # Other names, lest somebody's `kubectl get` meets two kinds of the same.
            names |= {
                "plural": f"{names['plural']}copy",
                "singular": f"{names['singular']}copy",
                "shortNames": [],
                "categories": [],
            }
            crd["spec"]["group"] = group
            crd["metadata"]["name"] = f"{names['plural']}.{group}"
            change(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
            server.done("POST", DEFINITIONS, crd)
            made.append(crd)
        found = Copies(server, group, {c["spec"]["names"]["kind"]: c["spec"]["names"]["plural"] for c in made})
        for plural in found.plurals.values():
            until(f"{plural}.{group} is served", lambda p=plural: server.call("GET", f"/apis/{group}/{VERSION}/{p}").ok)
        yield found
    finally:
        for crd in made:
            server.done("DELETE", f"{DEFINITIONS}/{crd['metadata']['name']}")


@pytest.fixture(scope="module")
def ours(server: Server) -> Iterator[Copies]:
    with copies(server) as found:
        yield found


@pytest.fixture(scope="module")
def without_rules(server: Server) -> Iterator[Copies]:
    with copies(server, _drop_rules) as found:
        yield found


@pytest.fixture(scope="module")
def bare(server: Server) -> Iterator[Copies]:
    with copies(server, _drop_bounds) as found:
        yield found


def _parts(schema: Json) -> Iterator[Json]:
    """The schema and all schemas in it."""
    yield schema
    inner = [*schema.get("properties", {}).values()]
    inner += [schema[k] for k in ("items", "additionalProperties") if k in schema]
    for part in inner:
        yield from _parts(part)


def _drop_rules(schema: Json) -> None:
    for part in _parts(schema):
        part.pop("x-kubernetes-validations", None)


def _drop_bounds(schema: Json) -> None:
    """Leave nothing but types and defaults."""
    for part in _parts(schema):
        for key in part.keys() - {"type", "properties", "items", "additionalProperties", "default"}:
            del part[key]


def _rules_of(kind: str) -> list[str]:
    """The messages of all rules of a kind."""
    crd = next(c for c in (yaml.safe_load(p.read_text()) for p in CRDS) if c["spec"]["names"]["kind"] == kind)
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return [r["message"] for part in _parts(root) for r in part.get("x-kubernetes-validations", ())]


def _by_rule(case: Json) -> bool:
    kind = (case.get("objects") or [case["object"]])[0]["kind"]
    return any(case["message"] in message for message in _rules_of(kind))


# --- the cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_case(ours: Copies, name: str) -> None:
    case = CASES[name]
    answer = ours.run(case)
    assert answer.warnings == ()
    if case["expect"] == "accepted":
        assert answer.ok, answer.message
    else:
        assert answer.status in (400, 422), answer.body
        assert case["message"] in answer.message
        assert "evaluating rule" not in answer.message, "a rule must hold or not hold, never break"


@pytest.mark.parametrize("name", [n for n in REFUSED if _by_rule(CASES[n])])
def test_it_is_the_rule_that_refuses(without_rules: Copies, name: str) -> None:
    """The counter-check: the same objects are accepted by the same schema without its rules."""
    answer = without_rules.run(CASES[name])
    assert answer.ok, answer.message


@pytest.mark.parametrize("name", [n for n in REFUSED if not OF_THE_SERVER.search(CASES[n]["message"])])
def test_it_is_the_schema_that_refuses(bare: Copies, name: str) -> None:
    """The counter-check: the same objects are accepted by the same types without any bound."""
    answer = bare.run(CASES[name])
    assert answer.ok, answer.message


@pytest.mark.parametrize("name", [n for n in REFUSED if OF_THE_SERVER.search(CASES[n]["message"])])
def test_it_is_the_type_that_refuses(bare: Copies, name: str) -> None:
    answer = bare.run(CASES[name])
    assert not answer.ok
    assert CASES[name]["message"] in answer.message


# --- defaults, a second apply, status ---------------------------------------------------------------------------------------


def test_defaults_are_filled_in(ours: Copies) -> None:
    body = CASES["vmsnapshot-smallest"]["object"]
    made = ours.server.done("POST", ours.path(body), ours.own(body))
    try:
        read = ours.server.done("GET", ours.path(body, "case"))
    finally:
        ours.server.done("DELETE", ours.path(body, "case"))
    assert made["spec"] == read["spec"]
    assert read["spec"] == {
        "source": {"hypervisorName": "kvm", "domain": "web-1"},
        "quiesce": {"policy": "Prefer", "method": "Auto"},
        "strategyName": "Auto",
        "volumes": {},
        "deadlineSeconds": 600,
        "readyDeadlineSeconds": 86400,
        "deletionPolicy": "Delete",
        "dryRun": False,
    }
    assert read["status"] == {"observedGeneration": -1}


@pytest.mark.parametrize("kind", ["hypervisor", "storagedriverclass", "vmsnapshot", "vmsnapshotcontent", "vmrestore"])
def test_a_fresh_object_counts_as_in_progress(ours: Copies, kind: str) -> None:
    name = "vmsnapshotcontent-intent" if kind == "vmsnapshotcontent" else f"{kind}-smallest"
    body = CASES[name]["object"]
    ours.server.done("POST", ours.path(body), ours.own(body))
    try:
        assert ours.server.done("GET", ours.path(body, "case"))["status"] == {"observedGeneration": -1}
    finally:
        ours.server.done("DELETE", ours.path(body, "case"))


def _manifests() -> Iterator[tuple[str, Json]]:
    for path in EXAMPLES:
        for number, body in enumerate(yaml.safe_load_all(path.read_text())):
            if body and body["apiVersion"] == API_VERSION:
                yield f"{path.stem}-{number}", body
    for name, case in CASES.items():
        if name.endswith("-everything"):
            yield name, case["object"]


@pytest.mark.parametrize(("name", "body"), [pytest.param(n, b, id=n) for n, b in _manifests()])
@pytest.mark.parametrize("how", ["client-side", "server-side"])
def test_a_second_apply_is_no_change(lab: Lab, ours: Copies, name: str, body: Json, how: str) -> None:
    body = ours.own(body)
    body["metadata"]["name"] = f"{name}-{how}"
    if "namespace" in body["metadata"]:
        body["metadata"]["namespace"] = "default"
    flags = ["--server-side"] if how == "server-side" else []
    text = json.dumps(body)
    try:
        lab.kubectl("apply", *flags, "-f", "-", stdin=text)
        _look(ours, body)
        first = ours.server.done("GET", ours.path(body, body["metadata"]["name"]))
        said = lab.kubectl("apply", *flags, "-f", "-", stdin=text)
        lab.kubectl("diff", *flags, "-f", "-", stdin=text)
        second = ours.server.done("GET", ours.path(body, body["metadata"]["name"]))
    finally:
        ours.server.call("DELETE", ours.path(body, body["metadata"]["name"]))
    assert said.strip().endswith("unchanged" if how == "client-side" else "serverside-applied")
    assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
    assert first == second


def _look(ours: Copies, body: Json) -> None:
    """Do what the operator does at its first look: write status. Until then the default of status is not stored."""
    name = body["metadata"]["name"]
    seen = {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {"name": name},
        "status": {"observedGeneration": 1},
    }
    path = ours.path(body, name, "status") + "?fieldManager=vmsnapshot-operator&force=true"
    ours.server.done("PATCH", path, seen, kind="application/apply-patch+yaml")


def test_defaults_of_a_restore_are_filled_in(ours: Copies) -> None:
    body = CASES["vmrestore-smallest"]["object"]
    made = ours.server.done("POST", ours.path(body), ours.own(body))
    ours.server.done("DELETE", ours.path(body, "case"))
    assert made["spec"] == {
        "snapshotName": "before",
        "mode": "InPlace",
        "volumes": {},
        "runningVM": "Refuse",
        "startAfter": False,
        "deadlineSeconds": 3600,
    }


def test_a_user_cannot_write_status_with_the_spec(ours: Copies) -> None:
    body = ours.own(CASES["vmsnapshot-smallest"]["object"]) | {
        "status": {"consistency": "Application", "observedGeneration": 1}
    }
    made = ours.server.done("POST", ours.path(body), body)
    try:
        read = ours.server.done("GET", ours.path(body, "case"))
    finally:
        ours.server.done("DELETE", ours.path(body, "case"))
    assert "consistency" not in read["status"]
    assert made["metadata"]["generation"] == 1


STATUS: Json = {
    "observedGeneration": 1,
    "phase": "Ready",
    "consistency": "Filesystem",
    "contentName": "vmsnapcontent-7",
    "quiesce": {"method": "GuestAgent", "frozenMilliseconds": 245},
    "conditions": [
        {
            "type": "Ready",
            "status": "True",
            "observedGeneration": 1,
            "lastTransitionTime": "2026-01-05T10:00:00Z",
            "reason": "Ready",
            "message": "consistency Filesystem",
        }
    ],
}


def test_columns(lab: Lab, ours: Copies) -> None:
    body = CASES["vmsnapshot-smallest"]["object"]
    ours.server.done("POST", ours.path(body), ours.own(body))
    try:
        patch = {
            "apiVersion": f"{ours.group}/{VERSION}",
            "kind": "VMSnapshot",
            "metadata": {"name": "case"},
            "status": STATUS,
        }
        path = ours.path(body, "case", "status") + "?fieldManager=test&force=true"
        ours.server.done("PATCH", path, patch, kind="application/apply-patch+yaml")
        shown = lab.kubectl("-n", "default", "get", f"{ours.plurals['VMSnapshot']}.{ours.group}").splitlines()
        wide = lab.kubectl(
            "-n", "default", "get", f"{ours.plurals['VMSnapshot']}.{ours.group}", "-o", "wide"
        ).splitlines()
    finally:
        ours.server.done("DELETE", ours.path(body, "case"))
    assert shown[0].split() == ["NAME", "DOMAIN", "PHASE", "CONSISTENCY", "FROZEN-MS", "READY", "AGE"]
    assert shown[1].split()[:-1] == ["case", "web-1", "Ready", "Filesystem", "245", "True"]
    assert wide[0].split()[7:] == ["METHOD", "CONTENT", "MESSAGE"]
    assert wide[1].split()[7:] == ["GuestAgent", "vmsnapcontent-7", "consistency", "Filesystem"]


@pytest.mark.parametrize("twice", ["conditions", "volumes", "groups"])
def test_status_lists_have_one_entry_per_key(ours: Copies, twice: str) -> None:
    entry = {"conditions": STATUS["conditions"][0], "volumes": {"target": "vda"}, "groups": {"className": "ceph"}}[
        twice
    ]
    body = CASES["vmsnapshot-smallest"]["object"]
    made = ours.server.done("POST", ours.path(body), ours.own(body))
    try:
        answer = ours.server.call("PUT", ours.path(body, "case", "status"), made | {"status": {twice: [entry, entry]}})
    finally:
        ours.server.done("DELETE", ours.path(body, "case"))
    assert answer.status == 422
    assert "Duplicate value" in answer.message


# --- the definitions themselves, under their own name -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(server: Server) -> dict[str, Json]:
    """Our definitions as they are shipped, applied as an administrator does, by kind."""
    found = {}
    for path in CRDS:
        crd = yaml.safe_load(path.read_text())
        where = f"{DEFINITIONS}/{crd['metadata']['name']}"
        server.done("PATCH", f"{where}?fieldManager=kubectl&force=true", crd, kind="application/apply-patch+yaml")
        until(f"{where} is established", lambda w=where: _holds(server.done("GET", w), "Established"))
        found[crd["spec"]["names"]["kind"]] = server.done("GET", where)
    return found


def _holds(crd: Json, condition: str) -> bool:
    conditions = {c["type"]: c["status"] for c in crd.get("status", {}).get("conditions") or ()}
    return conditions.get(condition) == "True"


def test_schemas_are_structural_and_names_are_free(installed: dict[str, Json]) -> None:
    assert len(installed) == len(CRDS)
    for crd in installed.values():
        assert _holds(crd, "NamesAccepted")
        assert not _holds(crd, "NonStructuralSchema")


def test_a_second_apply_of_the_definitions_is_no_change(server: Server, installed: dict[str, Json]) -> None:
    for path in CRDS:
        crd = yaml.safe_load(path.read_text())
        where = f"{DEFINITIONS}/{crd['metadata']['name']}"
        again = server.done(
            "PATCH", f"{where}?fieldManager=kubectl&force=true", crd, kind="application/apply-patch+yaml"
        )
        before = installed[crd["spec"]["names"]["kind"]]["metadata"]
        assert again["metadata"]["resourceVersion"] == before["resourceVersion"]


def test_every_field_can_be_explained(lab: Lab, installed: dict[str, Json]) -> None:
    told = lab.kubectl("explain", "vmsnapshots.vmsnapshot.io.spec.quiesce")
    assert "Require: no snapshot" in " ".join(told.split())
    for crd in installed.values():
        root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        assert root["description"]
        for part in (root["properties"]["spec"], root["properties"]["status"]):
            assert all(p.get("description") for s in _parts(part) for p in s.get("properties", {}).values())


KUBEVIRT: Json = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "virtualmachinesnapshots.snapshot.kubevirt.io"},
    "spec": {
        "group": "snapshot.kubevirt.io",
        "names": {
            "kind": "VirtualMachineSnapshot",
            "listKind": "VirtualMachineSnapshotList",
            "plural": "virtualmachinesnapshots",
            "singular": "virtualmachinesnapshot",
            "shortNames": ["vmsnapshot", "vmsnapshots"],
            "categories": ["all"],
        },
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
"""The names that KubeVirt's own definition has."""


@pytest.fixture(scope="module")
def kubevirt(server: Server, installed: dict[str, Json]) -> Iterator[None]:
    where = f"{DEFINITIONS}/{KUBEVIRT['metadata']['name']}"
    until("KubeVirt's definition is there", lambda: server.call("POST", DEFINITIONS, KUBEVIRT).status in (201, 409))
    try:
        path = "/apis/snapshot.kubevirt.io/v1beta1/virtualmachinesnapshots"
        until("KubeVirt's kind is served", lambda: server.call("GET", path).ok)
        assert _holds(server.done("GET", where), "NamesAccepted")
        yield
    finally:
        server.done("DELETE", where)


def _resource_of(lab: Lab, cache: Path, word: str) -> str:
    """The resource, with its group, that kubectl takes a word for."""
    with pytest.raises(LabError) as caught:
        lab.kubectl("--cache-dir", str(cache), "-n", "default", "get", word, "absent")
    found = re.search(r'\(NotFound\): (\S+) "absent" not found', str(caught.value))
    assert found, str(caught.value)
    return found[1]


@pytest.mark.parametrize("word", ["vmsnapshots.vmsnapshot.io", "vmsnapshot.vmsnapshot.io", "vmsnap"])
@pytest.mark.usefixtures("kubevirt")
def test_kubevirt_beside_us_takes_none_of_our_names(lab: Lab, tmp_path: Path, word: str) -> None:
    assert _resource_of(lab, tmp_path, word) == "vmsnapshots.vmsnapshot.io"


@pytest.mark.parametrize("word", ["virtualmachinesnapshots.snapshot.kubevirt.io", "virtualmachinesnapshot"])
@pytest.mark.usefixtures("kubevirt")
def test_our_names_take_none_of_kubevirts(lab: Lab, tmp_path: Path, word: str) -> None:
    assert _resource_of(lab, tmp_path, word) == "virtualmachinesnapshots.snapshot.kubevirt.io"


def test_no_short_name_of_storage_snapshots_is_taken(installed: dict[str, Json]) -> None:
    short = [n for crd in installed.values() for n in crd["spec"]["names"]["shortNames"]]
    assert len(set(short)) == len(short)
    assert not {"vs", "vsc", "vss", "vgs", "vgsc", "vsclass", "vscontent", "vm", "vmi", "vmr"} & set(short)


def test_the_category_is_no_name_of_a_kind(lab: Lab, tmp_path: Path, installed: dict[str, Json]) -> None:
    """kubectl takes a category before a kind: one called as a kind would make that kind unreachable by its name."""
    names = {
        n for crd in installed.values() for n in (*crd["spec"]["names"]["shortNames"], crd["spec"]["names"]["singular"])
    }
    names |= {crd["spec"]["names"]["plural"] for crd in installed.values()}
    assert CATEGORY not in names
    assert _resource_of(lab, tmp_path, "vmsnapshot") == "vmsnapshots.vmsnapshot.io"
    listed = lab.kubectl(
        "--cache-dir", str(tmp_path), "api-resources", f"--categories={CATEGORY}", "-o", "name"
    ).split()
    assert sorted(listed) == sorted(f"{crd['spec']['names']['plural']}.{GROUP}" for crd in installed.values())
