"""The chart's alerts, evaluated by promtool: each fires when it must and is silent when it must be, on series as they are scraped."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab import Lab, promtool
from tests.stack import CHART, NAMESPACE, Stack
from vmsnapshot_operator.telemetry.metrics import Metrics

Series = Mapping[str, str]
"""Values, one a minute, in promtool's notation, by series. All are of the release's namespace if they name none."""

_PROMETHEUS_ADDS = {"namespace", "pod", "le"}
_OTHERS = {"kube_deployment_status_replicas_available": {"namespace", "deployment"}}
"""Of kube-state-metrics: its documentation names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`fires` and `silent`: inputs, each looked at after `at` minutes. `labels` beside the severity, `summary`: as it is told."""

    alert: str
    at: int
    fires: tuple[Series, ...]
    silent: tuple[Series, ...]
    severity: str = "warning"
    labels: Mapping[str, str] = field(default_factory=dict)
    summary: str = ""


def _counter(name: str, labels: str) -> dict[str, Any]:
    """A counter is told when it appears and when it grows, not for standing where it stood."""
    series = f"{name}{{{labels}}}"
    return {
        "at": 30,
        "fires": ({series: "_x27 1+0x5"}, {series: "3+0x25 4+0x10"}, {series: "7+0x25 0 1+0x10"}),
        "silent": ({series: "3+0x40"}, {series: "0+0x5 1+0x40"}),
    }


_KVM = {"hypervisor": "kvm"}
_HELD = '{method="Pause",hypervisor="kvm"'

CASES = (
    Case(
        alert="VMSnapshotVMStillHeld",
        severity="critical",
        at=3,
        fires=({'vmsnapshot_still_held_vms{hypervisor="kvm"}': "0 0 0 1"},),
        silent=({'vmsnapshot_still_held_vms{hypervisor="kvm"}': "1 1 1 0"},),
        labels=_KVM,
        summary="VMs of hypervisor kvm are still frozen or paused by a snapshot: 1",
    ),
    Case(
        alert="VMSnapshotVMStalled",
        severity="critical",
        at=5,
        fires=({'vmsnapshot_stalled_vms{hypervisor="kvm"}': "0 1+0x9"},),
        silent=({'vmsnapshot_stalled_vms{hypervisor="kvm"}': "1+0x2 0 1+0x9"},),
        labels=_KVM,
        summary="VMs of hypervisor kvm stand still, because they cannot write to the overlays of a snapshot: 1",
    ),
    Case(
        alert="VMSnapshotThawFailed",
        severity="critical",
        labels=_KVM,
        summary="A VM of hypervisor kvm did not confirm that it goes on after a snapshot",
        **_counter("vmsnapshot_thaw_failures_total", 'hypervisor="kvm"'),
    ),
    Case(
        alert="VMSnapshotFrozenTooLong",
        at=30,
        fires=(
            {
                f"vmsnapshot_frozen_seconds_count{_HELD}}}": "_x27 1+0x5",
                f'vmsnapshot_frozen_seconds_bucket{_HELD},le="30.0"}}': "_x27 0+0x5",
            },
            {
                f"vmsnapshot_frozen_seconds_count{_HELD}}}": "5+0x25 6+0x9",
                f'vmsnapshot_frozen_seconds_bucket{_HELD},le="30.0"}}': "5+0x35",
            },
        ),
        silent=(
            {
                f"vmsnapshot_frozen_seconds_count{_HELD}}}": "_x27 1+0x5",
                f'vmsnapshot_frozen_seconds_bucket{_HELD},le="30.0"}}': "_x27 1+0x5",
            },
            {
                f"vmsnapshot_frozen_seconds_count{_HELD}}}": "0+1x35",
                f'vmsnapshot_frozen_seconds_bucket{_HELD},le="30.0"}}': "0+1x35",
            },
            {
                f"vmsnapshot_frozen_seconds_count{_HELD}}}": "6+0x40",
                f'vmsnapshot_frozen_seconds_bucket{_HELD},le="30.0"}}': "5+0x40",
            },
        ),
        labels=_KVM,
        summary="A VM of hypervisor kvm was held longer than 30.0 s",
    ),
    Case(
        alert="VMSnapshotVMSwept",
        labels=_KVM,
        summary="A VM of hypervisor kvm was left held by an operator that ended; it was freed",
        **_counter("vmsnapshot_swept_vms_total", 'hypervisor="kvm"'),
    ),
    Case(
        alert="VMSnapshotStrangeJournal",
        at=20,
        fires=({'vmsnapshot_strange_journals{hypervisor="kvm"}': "2+0x30"},),
        silent=({'vmsnapshot_strange_journals{hypervisor="kvm"}': "1+0x7 0 1+0x30"},),
        labels=_KVM,
        summary="VMs of hypervisor kvm bear a journal that nobody here may act on: 2",
    ),
    Case(
        alert="VMSnapshotGateLeft",
        severity="critical",
        at=8,
        fires=({'vmsnapshot_left_gates{hypervisor="kvm"}': "1+0x20"},),
        silent=({'vmsnapshot_left_gates{hypervisor="kvm"}': "1+0x3 0 1+0x20"},),
        labels=_KVM,
        summary="VMs of hypervisor kvm cannot be started: a restore has taken their disks and is gone: 1",
    ),
    Case(
        alert="VMSnapshotOverlayKept",
        at=20,
        fires=({'vmsnapshot_kept_overlays{hypervisor="kvm"}': "1+0x30"},),
        silent=({'vmsnapshot_kept_overlays{hypervisor="kvm"}': "1+0x7 0 1+0x30"},),
        labels=_KVM,
        summary="Overlays of hypervisor kvm are committed by nobody, and a VM may run on one: 1",
    ),
    Case(
        alert="VMSnapshotOrphans",
        at=70,
        fires=({'vmsnapshot_orphans{class_name="ceph"}': "3+0x80"},),
        silent=({'vmsnapshot_orphans{class_name="ceph"}': "3+0x20 0 3+0x60"},),
        labels={"class_name": "ceph"},
        summary="Storage of class ceph holds snapshots that nobody knows: 3",
    ),
    Case(
        alert="VMSnapshotStorageNotScanned",
        at=60,
        fires=({'vmsnapshot_orphan_scan_failures_total{class_name="ceph"}': "0+0x9 1+0x9 2+0x9 3+0x9 4+0x9 5+0x30"},),
        silent=(
            {'vmsnapshot_orphan_scan_failures_total{class_name="ceph"}': "0+0x20 1+0x10 2+0x60"},
            {'vmsnapshot_orphan_scan_failures_total{class_name="ceph"}': "9+0x80"},
        ),
        labels={"class_name": "ceph"},
        summary="Storage of class ceph does not say what it holds",
    ),
    Case(
        alert="VMSnapshotNoLeader",
        severity="critical",
        at=5,
        fires=({'vmsnapshot_leader{pod="a"}': "1 0+0x9", 'vmsnapshot_leader{pod="b"}': "0+0x9"}, {}),
        silent=({'vmsnapshot_leader{pod="a"}': "1+0x3 0+0x9", 'vmsnapshot_leader{pod="b"}': "0+0x4 1+0x9"},),
        summary="No operator holds the lease, or none is scraped: no snapshot is taken",
    ),
    Case(
        alert="VMSnapshotTwoLeaders",
        severity="critical",
        at=5,
        fires=({'vmsnapshot_leader{pod="a"}': "1+0x9", 'vmsnapshot_leader{pod="b"}': "0 1+0x9"},),
        silent=(
            {'vmsnapshot_leader{pod="a"}': "1+0x9", 'vmsnapshot_leader{pod="b"}': "0+0x9"},
            {'vmsnapshot_leader{pod="a"}': "1+0x4 1 0", 'vmsnapshot_leader{pod="b"}': "0+0x4 1+0x9"},
        ),
        summary="Several operators say that they hold the lease",
    ),
    Case(
        alert="VMSnapshotStuck",
        at=20,
        fires=({"vmsnapshot_queue_depth": "2+0x30"},),
        silent=(
            {"vmsnapshot_queue_depth": "2+0x9 0 2+0x30"},
            {"vmsnapshot_queue_depth": "_x19 2+0x9"},
        ),
        summary="Objects have waited for a worker for 15 minutes: 2",
    ),
    Case(
        alert="VMSnapshotHypervisorHangs",
        at=20,
        fires=({"vmsnapshot_hypervisor_calls_left_behind": "0 3+0x30"},),
        silent=(
            {"vmsnapshot_hypervisor_calls_left_behind": "3+0x14 0 3+0x30"},
            {"vmsnapshot_hypervisor_calls_left_behind": "_x19 3+0x9"},
        ),
        summary="Calls to a hypervisor have not returned for 10 minutes: 3",
    ),
    Case(
        alert="VMSnapshotsFail",
        at=30,
        fires=({'vmsnapshot_snapshots_total{consistency="Unknown",outcome="failed"}': "_x27 1+0x9"},),
        silent=(
            {'vmsnapshot_snapshots_total{consistency="Filesystem",outcome="taken"}': "0+1x40"},
            {'vmsnapshot_snapshots_total{consistency="Unknown",outcome="failed"}': "2+0x40"},
        ),
        labels={"outcome": "failed"},
        summary="VMSnapshots have failed",
    ),
    Case(
        alert="VMSnapshotUnfinished",
        at=5,
        fires=({'vmsnapshot_oldest_unfinished_seconds{doing="deleting"}': "3500 3560 3620+60x9"},),
        silent=(
            {
                'vmsnapshot_oldest_unfinished_seconds{doing="taking"}': "3200+60x9",
                'vmsnapshot_oldest_unfinished_seconds{doing="deleting"}': "0+0x9",
            },
            {'vmsnapshot_oldest_unfinished_seconds{doing="taking"}': "9000 9060 12+60x9"},
        ),
        labels={"doing": "deleting"},
        summary="A VMSnapshot has not come to an end (deleting) for 1h 3m 20s",
    ),
    Case(
        alert="VMSnapshotHypervisorDown",
        at=10,
        fires=({'vmsnapshot_hypervisor_answers{hypervisor="kvm"}': "1 0+0x20"},),
        silent=({'vmsnapshot_hypervisor_answers{hypervisor="kvm"}': "1 0+0x3 1 0+0x20"}, {}),
        labels=_KVM,
        summary="Hypervisor kvm does not answer: its VMs are not snapshotted, and nobody sees whether one is held",
    ),
    Case(
        alert="VMSnapshotGuardianDown",
        severity="critical",
        at=5,
        fires=({'vmsnapshot_guardian_answers{hypervisor="kvm"}': "1 0+0x9"},),
        silent=({'vmsnapshot_guardian_answers{hypervisor="kvm"}': "1+0x3 0 1+0x9"}, {}),
        labels=_KVM,
        summary="No guardian answers for hypervisor kvm: nothing is frozen there until one does",
    ),
    Case(
        alert="VMSnapshotRemoteGuardianDown",
        at=10,
        fires=({'kube_deployment_status_replicas_available{deployment="vmsnapshot-operator-guardian"}': "1 0+0x20"},),
        silent=(
            {
                'kube_deployment_status_replicas_available{deployment="vmsnapshot-operator-guardian"}': "1+0x20",
                'kube_deployment_status_replicas_available{deployment="another"}': "0+0x20",
            },
            {'kube_deployment_status_replicas_available{deployment="vmsnapshot-operator-guardian"}': "1 0+0x3 1+0x20"},
        ),
        labels={"deployment": "vmsnapshot-operator-guardian"},
        summary="The guardian on another node is not there, or does not reach all hypervisors",
    ),
)


@pytest.fixture(scope="session")
def rules(lab: Lab) -> dict[str, Any]:
    """The groups of rules that helm renders, with every alert in them."""
    values = {
        "metrics": {"alerts": {"enabled": True}},
        "guardian": {"remote": {"enabled": True, "uris": ["qemu+tls://kvm/system"]}},
    }
    helm = [str(lab.bin("helm")), "template", "vmsnapshot-operator", str(CHART), "--namespace", NAMESPACE]
    shown = ["--kube-version", "1.37.0", "--show-only", "templates/prometheusrule.yaml", "--values", "-"]
    done = subprocess.run(
        [*helm, *shown], input=json.dumps(values), capture_output=True, text=True, check=True, timeout=120
    )
    return {"groups": yaml.safe_load(done.stdout)["spec"]["groups"]}


@pytest.fixture(scope="session")
def evaluator() -> Path:
    """The program that evaluates rules."""
    return promtool.ensure()


@pytest.fixture
def evaluate(evaluator: Path, rules: dict[str, Any], tmp_path: Path) -> Callable[..., str]:
    """Run tests of promtool's over the chart's rules, or given ones; return what it said against them."""

    def run(tests: list[dict[str, Any]], given: dict[str, Any] | None = None) -> str:
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(given or rules))
        document = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
        (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document))
        done = subprocess.run(
            [str(evaluator), "test", "rules", "tests.yaml"],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return "" if done.returncode == 0 else done.stdout + done.stderr

    return run


def _test(case: Case, given: Series, *, fires: bool, namespace: str = NAMESPACE) -> dict[str, Any]:
    told = {
        "exp_labels": {"severity": case.severity, **case.labels},
        "exp_annotations": {"summary": case.summary},
    }
    return {
        "interval": "1m",
        "input_series": [{"series": _in(namespace, name), "values": values} for name, values in given.items()],
        "alert_rule_test": [
            {"eval_time": f"{case.at}m", "alertname": case.alert, "exp_alerts": [told] if fires else []}
        ],
    }


def _in(namespace: str, series: str) -> str:
    name, _, labels = series.rstrip("}").partition("{")
    return f'{name}{{namespace="{namespace}"{"," if labels else ""}{labels}}}'


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.alert)
def test_it_fires_and_it_is_silent(case: Case, evaluate: Callable[..., str]) -> None:
    tests = [_test(case, given, fires=True) for given in case.fires]
    tests += [_test(case, given, fires=False) for given in case.silent]
    assert evaluate(tests) == ""


def test_another_releases_series_are_none_of_ours(evaluate: Callable[..., str]) -> None:
    others = [c for c in CASES if c.alert != "VMSnapshotNoLeader"]
    assert evaluate([_test(c, given, fires=False, namespace="another") for c in others for given in c.fires]) == ""


def test_every_alert_has_a_case(rules: dict[str, Any]) -> None:
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    assert sorted(alerts) == sorted(c.alert for c in CASES)
    assert all(c.fires and c.silent for c in CASES)


def test_a_rule_about_a_series_that_is_not_there_is_found(evaluate: Callable[..., str], rules: dict[str, Any]) -> None:
    case = next(c for c in CASES if c.alert == "VMSnapshotVMStillHeld")
    wrong = json.loads(json.dumps(rules).replace("vmsnapshot_still_held_vms", "vmsnapshot_held_vms"))
    assert "VMSnapshotVMStillHeld" in evaluate([_test(case, case.fires[0], fires=True)], wrong)


def _families(text: str) -> dict[str, str]:
    """Types of the families of an exposition, by name."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


def test_every_series_is_one_that_the_operator_exposes(stack: Stack, rules: dict[str, Any]) -> None:
    status, text = stack.http("/metrics")
    assert status == 200
    families = _families(text)
    for group in rules["groups"]:
        for rule in group["rules"]:
            used = set(re.findall(r"\b((?:vmsnapshot|kube)_\w+)", re.sub(r'"[^"]*"', "", rule["expr"])))
            assert used, rule["alert"]
            for name in used - _OTHERS.keys():
                family = re.sub(r"_(count|bucket)$", "", name)
                wanted = "histogram" if family != name else "counter" if name.endswith("_total") else "gauge"
                assert families.get(family) == wanted, f"{rule['alert']}: {name}"


def test_the_cases_are_about_series_with_the_labels_that_they_have() -> None:
    metrics = Metrics()
    labels: dict[str, set[str]] = {name: set(names) for name, names in _OTHERS.items()}
    for family in (v for v in vars(metrics).values() if hasattr(v, "describe")):
        (described,) = family.describe()
        names = set(family._labelnames)
        for ending in ("", "_total", "_count", "_bucket"):
            labels[described.name + ending] = names
    for case in CASES:
        for series in (s for given in (*case.fires, *case.silent) for s in given):
            name, _, rest = series.partition("{")
            assert set(re.findall(r"(\w+)=", rest)) - _PROMETHEUS_ADDS == labels[name] - _PROMETHEUS_ADDS, series
