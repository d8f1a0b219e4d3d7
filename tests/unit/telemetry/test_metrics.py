"""Names and labels of the metrics are a promise to dashboards and alerts."""

from __future__ import annotations

import pytest

from vmsnapshot_operator.telemetry.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def _value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_durations(metrics: Metrics) -> None:
    metrics.frozen(seconds=0.3, method="GuestAgent", hypervisor="lab")
    metrics.cut(seconds=0.02, driver="ceph-rbd")
    assert _value(metrics, "vmsnapshot_frozen_seconds_count", method="GuestAgent", hypervisor="lab") == 1
    assert _value(metrics, "vmsnapshot_frozen_seconds_sum", method="GuestAgent", hypervisor="lab") == 0.3
    assert _value(metrics, "vmsnapshot_cut_seconds_bucket", driver="ceph-rbd", le="0.025") == 1
    assert _value(metrics, "vmsnapshot_cut_seconds_bucket", driver="ceph-rbd", le="0.01") == 0


def test_counts(metrics: Metrics) -> None:
    metrics.snapshot(consistency="Filesystem", outcome="taken")
    metrics.snapshot(consistency="Filesystem", outcome="taken")
    metrics.snapshot(consistency="Unknown", outcome="failed")
    metrics.thaw_failed(hypervisor="lab")
    assert _value(metrics, "vmsnapshot_snapshots_total", consistency="Filesystem", outcome="taken") == 2
    assert _value(metrics, "vmsnapshot_snapshots_total", consistency="Unknown", outcome="failed") == 1
    assert _value(metrics, "vmsnapshot_thaw_failures_total", hypervisor="lab") == 1


def test_what_is_asked_at_each_scrape(metrics: Metrics) -> None:
    state = {"depth": 3, "left": 1, "leader": True}
    metrics.watch_queue(lambda: state["depth"])
    metrics.watch_left_behind(lambda: state["left"])
    metrics.watch_leadership(lambda: bool(state["leader"]))
    assert _value(metrics, "vmsnapshot_queue_depth") == 3
    state |= {"depth": 0, "leader": False}
    assert _value(metrics, "vmsnapshot_queue_depth") == 0
    assert _value(metrics, "vmsnapshot_hypervisor_calls_left_behind") == 1
    assert _value(metrics, "vmsnapshot_leader") == 0


def test_what_has_not_come_to_an_end(metrics: Metrics) -> None:
    ages = {"taking": 7.5, "deleting": 0.0}
    metrics.watch_unfinished({d: (lambda d=d: ages[d]) for d in ages}, leftovers=lambda: 3)
    assert _value(metrics, "vmsnapshot_oldest_unfinished_seconds", doing="taking") == 7.5
    ages["taking"], ages["deleting"] = 0.0, 2.0
    assert _value(metrics, "vmsnapshot_oldest_unfinished_seconds", doing="taking") == 0
    assert _value(metrics, "vmsnapshot_oldest_unfinished_seconds", doing="deleting") == 2
    assert _value(metrics, "vmsnapshot_leftovers") == 3


def test_who_is_held_now(metrics: Metrics) -> None:
    def now() -> float | None:
        return _value(metrics, "vmsnapshot_frozen_vms", hypervisor="lab")

    state = {"one": False, "two": True}
    with metrics.window(lambda: state["one"], hypervisor="lab"):
        assert now() == 0, "it is not frozen yet"
        state["one"] = True
        assert now() == 1
        with metrics.window(lambda: state["two"], hypervisor="lab"):
            assert now() == 2
            state["one"] = False
            assert now() == 1
    assert now() == 0


def test_series_go_with_their_objects(metrics: Metrics) -> None:
    metrics.driver_workers({"fast": 2, "slow": 1})
    metrics.driver_workers({"fast": 1})
    assert _value(metrics, "vmsnapshot_driver_workers", class_name="fast") == 1
    assert _value(metrics, "vmsnapshot_driver_workers", class_name="slow") is None
    for hypervisor in ("lab", "other"):
        metrics.still_held(1, hypervisor=hypervisor)
        with metrics.window(lambda: True, hypervisor=hypervisor):
            pass
        metrics.journals(3, overlays=2, hypervisor=hypervisor)
        metrics.guardian(answers=True, hypervisor=hypervisor)
        metrics.hypervisor_answers(answers=True, hypervisor=hypervisor)
        metrics.strange_journals(1, hypervisor=hypervisor)
        metrics.swept(hypervisor=hypervisor)
        metrics.frozen(seconds=1, method="Pause", hypervisor=hypervisor)
        metrics.thaw_failed(hypervisor=hypervisor)
    metrics.forget_hypervisor("lab")
    metrics.forget_hypervisor("never-seen")
    assert _value(metrics, "vmsnapshot_frozen_vms", hypervisor="lab") is None
    assert _value(metrics, "vmsnapshot_frozen_vms", hypervisor="other") == 0
    assert _value(metrics, "vmsnapshot_still_held_vms", hypervisor="other") == 1
    assert b'hypervisor="lab"' not in metrics.text()


def test_two_of_them_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.thaw_failed(hypervisor="lab")
    assert b"lab" in first.text()
    assert b"lab" not in second.text()
