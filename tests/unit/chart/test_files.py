"""The chart's files as they are, without helm: what is generated is current, and no more is allowed than is needed."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from vmsnapshot_operator.api import schema
from vmsnapshot_operator.handlers import permissions
from vmsnapshot_operator.handlers.permissions import Permission

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "vmsnapshot-operator"
TEMPLATES = sorted((CHART / "templates").iterdir())


def documents(template: str) -> list[dict[str, Any]]:
    """Read a template without its actions: each of them stands on a line of its own, or fills in a name."""
    lines = (CHART / "templates" / template).read_text().splitlines()
    return [d for d in yaml.safe_load_all("\n".join(x for x in lines if "{{" not in x)) if d]


def granted() -> list[Permission]:
    """Every permission that the operator's roles give."""
    return [
        Permission(group=group, resource=resource, subresource=sub, verb=verb, name=name, own=role["kind"] == "Role")
        for role in documents("rbac.yaml")
        for rule in role.get("rules", ())
        for group in rule["apiGroups"]
        for resource, _, sub in (r.partition("/") for r in rule["resources"])
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or [""]
    ]


def flat(values: dict[str, Any], prefix: str = "") -> set[str]:
    """All paths of the values, parents included."""
    found = set()
    for key, value in values.items():
        found.add(prefix + key)
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
    return found


def test_crds_are_those_of_the_models() -> None:
    assert schema.check(CHART / "crds-src") == []
    assert {p.name: p.read_text() for p in (CHART / "crds-src").iterdir()} == {
        p.name: p.read_text() for p in (ROOT / "crds").iterdir()
    }


def test_roles_give_exactly_what_doctor_asks_for() -> None:
    given = granted()
    assert sorted(given) == sorted(permissions.needed())
    assert max(Counter(given).values()) == 1, "none is given twice"


def test_roles_have_no_wildcard() -> None:
    for role in (*documents("rbac.yaml"), *documents("tenant-roles.yaml")):
        for rule in role.get("rules", ()):
            assert all("*" not in word for words in rule.values() for word in words or ()), rule


def test_secrets_are_read_by_name_and_at_home_only() -> None:
    secrets = [p for p in granted() if p.resource == "secrets"]
    assert [(p.verb, p.own) for p in secrets] == [("get", True)]


def test_nothing_leads_to_more_permissions() -> None:
    given = granted()
    assert not {p.verb for p in given} & {"escalate", "bind", "impersonate", "approve", "sign"}
    assert not {p.group for p in given} & {"rbac.authorization.k8s.io", "admissionregistration.k8s.io", "apps"}
    assert not {p.resource for p in given} & {"pods", "nodes", "serviceaccounts"}


def test_tenants_get_the_namespaced_kinds_only() -> None:
    roles = documents("tenant-roles.yaml")
    assert {r for role in roles for rule in role["rules"] for r in rule["resources"]} == {
        k.plural for k in schema.KINDS if k.namespaced
    }
    labels = [key for role in roles for key in role["metadata"]["labels"]]
    assert labels == ["rbac.authorization.k8s.io/aggregate-to-view", "rbac.authorization.k8s.io/aggregate-to-edit"]


def test_values_and_templates_know_the_same_keys() -> None:
    known = flat(yaml.safe_load((CHART / "values.yaml").read_text()))
    used = {m for p in TEMPLATES for m in re.findall(r"\.Values\.([A-Za-z.]+)", p.read_text())}
    assert used <= known
    # What a template takes as a whole (resources, security contexts) covers all that is below it.
    leaves = {k for k in known if not any(o.startswith(f"{k}.") for o in known)}
    assert not [k for k in leaves if not any(k == u or k.startswith(f"{u}.") for u in used)]


def test_every_value_is_explained() -> None:
    lines = [*(CHART / "values.yaml").read_text().splitlines(), ""]
    keys = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z]+:", line)]
    assert not [lines[i] for i in keys if not any(x.lstrip().startswith("#") for x in (lines[i - 1], lines[i + 1]))]


def test_the_image_runs_as_the_user_of_the_chart() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    uid = values["podSecurityContext"]["runAsUser"]
    text = (ROOT / "Dockerfile").read_text()
    assert f"USER {uid}:{uid}" in text
    assert f":x:{uid}:{uid}:" in text, "kopf asks for the user's name"


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert chart["appVersion"] == project[1]
