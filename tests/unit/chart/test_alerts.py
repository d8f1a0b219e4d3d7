"""The alerts and their runbook: each alert has a chapter, each series exists."""

from __future__ import annotations

import re
from pathlib import Path

from vmsnapshot_operator.telemetry.metrics import Metrics

ROOT = Path(__file__).resolve().parents[3]
RULES = (ROOT / "charts" / "vmsnapshot-operator" / "templates" / "prometheusrule.yaml").read_text()
RUNBOOK = (ROOT / "docs" / "operations.md").read_text()
_OTHERS = {"kube_deployment_status_replicas_available"}
"""Of kube-state-metrics, whose documentation names them."""


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", RULES)


def test_each_alert_has_one_chapter_and_each_chapter_an_alert() -> None:
    chapters = re.findall(r"^## (VMSnapshot\w+)$", RUNBOOK, re.MULTILINE)
    assert sorted(chapters) == sorted(alerts())
    for text in re.split(r"^## ", RUNBOOK, flags=re.MULTILINE):
        if text.startswith("VMSnapshot"):
            assert re.findall(r"^\*\*(.+?)\*\*:", text, re.MULTILINE) == ["Means", "Look at", "Do"], text.split("\n")[0]


def test_the_link_of_each_alert_leads_to_its_chapter() -> None:
    links = re.findall(r'\(list \$runbook "(\w+)"\)', RULES)
    assert links == [a.lower() for a in alerts()]


def test_every_series_exists() -> None:
    known = {name for family in Metrics().registry.collect() for name in (family.name, f"{family.name}_total")}
    used = set(re.findall(r"\b((?:vmsnapshot|kube)_\w+)", RULES))
    assert {re.sub(r"_(count|bucket)$", "", u) for u in used} <= known | _OTHERS


def test_the_default_length_is_a_bucket() -> None:
    values = (ROOT / "charts" / "vmsnapshot-operator" / "values.yaml").read_text()
    metrics = Metrics()
    metrics.frozen(seconds=1.0, method="Pause", hypervisor="h")
    buckets = set(re.findall(r'vmsnapshot_frozen_seconds_bucket\{.*?le="([^"]+)"', metrics.text().decode()))
    chosen = re.search(r'frozenSeconds: "(.+)"', values)
    assert chosen is not None
    assert chosen[1] in buckets
    told = re.search(r"one of the buckets ([\d., ]+)\.\n", values)
    assert told is not None
    assert set(told[1].split(", ")) <= buckets
