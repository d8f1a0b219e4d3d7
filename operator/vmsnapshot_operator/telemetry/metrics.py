"""The operator's metrics: names, labels, buckets. Labels are bounded (never an object's name but a hypervisor's or a class's).

Not when something is counted (the workflow), nor how they are served (`telemetry.http`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST

_FROZEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_CUT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._frozen = Histogram(
            "vmsnapshot_frozen_seconds",
            "How long VMs were held still, from asking them to stand still to their answer that they go on",
            ("method", "hypervisor"),
            buckets=_FROZEN_BUCKETS,
            registry=self.registry,
        )
        self._cut = Histogram(
            "vmsnapshot_cut_seconds",
            "How long a storage driver took to cut all the volumes it serves of one VM",
            ("driver",),
            buckets=_CUT_BUCKETS,
            registry=self.registry,
        )
        self._frozen_vms = Gauge(
            "vmsnapshot_frozen_vms",
            "VMs that a snapshot holds frozen or paused now, within its window",
            ("hypervisor",),
            registry=self.registry,
        )
        self._windows: dict[str, list[Callable[[], bool]]] = {}
        self._still_held = Gauge(
            "vmsnapshot_still_held_vms",
            "VMs that are still held still by us although no window is open",
            ("hypervisor",),
            registry=self.registry,
        )
        self._swept = Counter(
            "vmsnapshot_swept_vms_total",
            "VMs that a sweep found with a journal of ours without a living owner, and saw free",
            ("hypervisor",),
            registry=self.registry,
        )
        self._strange_journals = Gauge(
            "vmsnapshot_strange_journals",
            "VMs with a journal that cannot be read or is another installation's; nobody here touches them",
            ("hypervisor",),
            registry=self.registry,
        )
        self._journals = Gauge(
            "vmsnapshot_journal_vms",
            "VMs that bear a journal of this installation: held now, or not yet back on their own disks",
            ("hypervisor",),
            registry=self.registry,
        )
        self._overlays = Gauge(
            "vmsnapshot_overlay_vms",
            "VMs that run on overlays of ours until these are merged back",
            ("hypervisor",),
            registry=self.registry,
        )
        self._kept_overlays = Gauge(
            "vmsnapshot_kept_overlays",
            "Overlays of ours that nobody commits or removes any more: a VM may run on one, or what it wrote be in it alone",
            ("hypervisor",),
            registry=self.registry,
        )
        self._stalled = Gauge(
            "vmsnapshot_stalled_vms",
            "VMs that an I/O error has paused at an overlay of ours, mostly because its pool is full",
            ("hypervisor",),
            registry=self.registry,
        )
        self._left_gates = Gauge(
            "vmsnapshot_left_gates",
            "VMs that bear the gate of a restore which nobody opens any more: they cannot be started, and their disks may be half set back",
            ("hypervisor",),
            registry=self.registry,
        )
        self._guardian = Gauge(
            "vmsnapshot_guardian_answers",
            "1 while a guardian answers that reaches this hypervisor; nothing is frozen there otherwise",
            ("hypervisor",),
            registry=self.registry,
        )
        self._hypervisor_answers = Gauge(
            "vmsnapshot_hypervisor_answers",
            "1 while all endpoints of a hypervisor answer; otherwise VMs there are not swept",
            ("hypervisor",),
            registry=self.registry,
        )
        self._orphans = Gauge(
            "vmsnapshot_orphans",
            "Names that storage holds under our prefix and that no VMSnapshot or VMSnapshotContent knows",
            ("class_name",),
            registry=self.registry,
        )
        self._orphans_removed = Counter(
            "vmsnapshot_orphans_removed_total",
            "Leftovers on storage that a journal or a VMSnapshotContent proved to be ours, and that were removed",
            ("class_name",),
            registry=self.registry,
        )
        self._scan_failures = Counter(
            "vmsnapshot_orphan_scan_failures_total",
            "Scans for orphans that a storage system did not answer",
            ("class_name",),
            registry=self.registry,
        )
        self._thaw_failures = Counter(
            "vmsnapshot_thaw_failures_total",
            "Windows that ended without a confirmation that the VM goes on",
            ("hypervisor",),
            registry=self.registry,
        )
        self._snapshots = Counter(
            "vmsnapshot_snapshots_total",
            "VMSnapshots that came to an end, by what is claimed of them and how they ended",
            ("consistency", "outcome"),
            registry=self.registry,
        )
        self._unfinished = Gauge(
            "vmsnapshot_oldest_unfinished_seconds",
            "Age of the oldest VMSnapshot that is still being taken, or deleted; 0 if there is none",
            ("doing",),
            registry=self.registry,
        )
        self._leftovers = Gauge(
            "vmsnapshot_leftovers",
            "Names on storage that failed or deleted VMSnapshots left and that are not removed yet, and storage that cannot say",
            registry=self.registry,
        )
        self._copied = Counter(
            "vmsnapshot_copied_bytes_total",
            "Bytes that storage drivers have copied to make snapshots restorable, and to restore them",
            ("class_name",),
            registry=self.registry,
        )
        self._queue = Gauge("vmsnapshot_queue_depth", "Objects that wait for a worker", registry=self.registry)
        self._left_behind = Gauge(
            "vmsnapshot_hypervisor_calls_left_behind",
            "Calls to a hypervisor that have not returned although their deadline is over",
            registry=self.registry,
        )
        self._workers = Gauge(
            "vmsnapshot_driver_workers",
            "Processes that host the driver of a StorageDriverClass",
            ("class_name",),
            registry=self.registry,
        )
        self._leader = Gauge("vmsnapshot_leader", "1 while this instance holds the lease", registry=self.registry)
        self._classes: frozenset[str] = frozenset()

    def frozen(self, *, seconds: float, method: str, hypervisor: str) -> None:
        """One VM was held still for so long."""
        self._frozen.labels(method, hypervisor).observe(seconds)

    def cut(self, *, seconds: float, driver: str) -> None:
        """One group was cut in so long."""
        self._cut.labels(driver).observe(seconds)

    @contextmanager
    def window(self, held: Callable[[], bool], *, hypervisor: str) -> Iterator[None]:
        """A window is open until left; `held` is asked at each scrape whether its VM is held right then."""
        windows = self._windows.setdefault(hypervisor, [])
        self._frozen_vms.labels(hypervisor).set_function(lambda: float(sum(each() for each in windows)))
        windows.append(held)
        try:
            yield
        finally:
            windows.remove(held)

    def still_held(self, count: int, *, hypervisor: str) -> None:
        """So many VMs of a hypervisor are held although no window is open."""
        self._still_held.labels(hypervisor).set(count)

    def swept(self, *, hypervisor: str) -> None:
        """A VM that nobody alive held any more is free; a guardian may have freed it before."""
        self._swept.labels(hypervisor).inc()

    def strange_journals(self, count: int, *, hypervisor: str) -> None:
        """So many VMs bear a journal that is not ours to act on."""
        self._strange_journals.labels(hypervisor).set(count)

    def journals(self, count: int, *, overlays: int, hypervisor: str) -> None:
        """So many VMs bear a journal of ours, and so many of them run on overlays."""
        self._journals.labels(hypervisor).set(count)
        self._overlays.labels(hypervisor).set(overlays)

    def kept_overlays(self, count: int, *, hypervisor: str) -> None:
        """So many overlays were found that are kept for good."""
        self._kept_overlays.labels(hypervisor).set(count)

    def stalled(self, count: int, *, hypervisor: str) -> None:
        """So many VMs stand still because they cannot write to overlays of ours."""
        self._stalled.labels(hypervisor).set(count)

    def left_gates(self, count: int, *, hypervisor: str) -> None:
        """So many VMs bear a restore's gate that nobody opens."""
        self._left_gates.labels(hypervisor).set(count)

    def guardian(self, *, answers: bool, hypervisor: str) -> None:
        """Whether a guardian answered that reaches a hypervisor."""
        self._guardian.labels(hypervisor).set(answers)

    def hypervisor_answers(self, *, answers: bool, hypervisor: str) -> None:
        """Whether all endpoints of a hypervisor answered."""
        self._hypervisor_answers.labels(hypervisor).set(answers)

    def orphans(self, count: int, *, class_name: str) -> None:
        """So many orphans were found at the last scan of a class."""
        self._orphans.labels(class_name).set(count)

    def orphan_removed(self, *, class_name: str) -> None:
        """A leftover was removed."""
        self._orphans_removed.labels(class_name).inc()

    def orphan_scan_failed(self, *, class_name: str) -> None:
        """The storage of a class did not answer a scan."""
        self._scan_failures.labels(class_name).inc()

    def forget_class(self, class_name: str) -> None:
        """A StorageDriverClass is gone, and its series with it."""
        for metric in (self._orphans, self._orphans_removed, self._scan_failures, self._copied):
            metric.remove_by_labels({"class_name": class_name})

    def thaw_failed(self, *, hypervisor: str) -> None:
        """Nobody confirmed that a VM goes on."""
        self._thaw_failures.labels(hypervisor).inc()

    def copied(self, class_name: str, count: int) -> None:
        """So many bytes more were copied."""
        self._copied.labels(class_name).inc(count)

    def snapshot(self, *, consistency: str, outcome: str) -> None:
        """One VMSnapshot was `taken` or has `failed`."""
        self._snapshots.labels(consistency, outcome).inc()

    def driver_workers(self, count_by_class: Mapping[str, int]) -> None:
        """All classes with the number of their processes; those not named are forgotten."""
        for gone in self._classes - count_by_class.keys():
            self._workers.remove(gone)
        for name, count in count_by_class.items():
            self._workers.labels(name).set(count)
        self._classes = frozenset(count_by_class)

    def forget_hypervisor(self, hypervisor: str) -> None:
        """A Hypervisor object is gone, and its series with it."""
        for metric in (
            self._frozen,
            self._frozen_vms,
            self._still_held,
            self._swept,
            self._strange_journals,
            self._journals,
            self._overlays,
            self._kept_overlays,
            self._stalled,
            self._left_gates,
            self._guardian,
            self._hypervisor_answers,
            self._thaw_failures,
        ):
            metric.remove_by_labels({"hypervisor": hypervisor})

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Ask this function for the depth of the queue at each scrape."""
        self._queue.set_function(depth)

    def watch_unfinished(self, oldest: Mapping[str, Callable[[], float]], leftovers: Callable[[], int]) -> None:
        """Ask at each scrape, for each thing that may be under way, the age of the oldest; and the number of leftovers."""
        for doing, age in oldest.items():
            self._unfinished.labels(doing).set_function(age)
        self._leftovers.set_function(leftovers)

    def watch_left_behind(self, calls: Callable[[], int]) -> None:
        """Ask this function at each scrape for the number of calls to hypervisors that hang."""
        self._left_behind.set_function(calls)

    def watch_leadership(self, leader: Callable[[], bool]) -> None:
        """Ask this function at each scrape whether this instance holds the lease."""
        self._leader.set_function(lambda: float(leader()))

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
