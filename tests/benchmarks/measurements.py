"""The measurements themselves: the window against a bare script, requests of the API server, memory."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import libvirt
import rbd

from tests import audit
from tests.benchmarks.result import Result
from tests.lab import Lab
from tests.stack import Stack

WINDOW_GOAL = 1.10
TAKING_WRITES_GOAL = 8
OPERATOR_MB, GUARDIAN_MB = 120, 40


class Bare:
    """The same freeze, parallel cuts and thaw without any operator: what the hardware needs."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        guest = lab.guest("demo")
        self._files = [Path(d.path) for t, d in sorted(guest.disks.items()) if d.kind == "file"]
        self._image = next(d.image for d in guest.disks.values() if d.kind == "rbd")
        self._connection = lab.libvirt()
        self._domain = self._connection.lookupByName("demo")
        self._storage = lab.libvirt()
        self._pool = self._storage.storagePoolLookupByName("reflink")

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()
        self._storage.close()

    def window(self, number: int) -> tuple[float, dict[str, float]]:
        """Freeze, cut, thaw; return milliseconds in all and of the parts. What was cut is removed afterwards."""
        self._pool.refresh()
        names = [f"bare-{number}-{p.name}" for p in self._files]
        parts: dict[str, float] = {}
        with self._lab.ceph.connect() as (_, ioctx):
            group_name = f"bare-{number}"
            rbd.RBD().group_create(ioctx, group_name)
            group = rbd.Group(ioctx, group_name)
            group.add_image(ioctx, self._image)
            sources = [self._storage.storageVolLookupByPath(str(p)) for p in self._files]
            xmls = [
                f"<volume><name>{n}</name><capacity>{s.info()[1]}</capacity><target><format type='raw'/></target></volume>"
                for n, s in zip(names, sources, strict=True)
            ]

            def files() -> None:
                begun = time.perf_counter()
                for xml, source in zip(xmls, sources, strict=True):
                    self._pool.createXMLFrom(xml, source, libvirt.VIR_STORAGE_VOL_CREATE_REFLINK)
                parts["reflink"] = (time.perf_counter() - begun) * 1000

            def ceph() -> None:
                begun = time.perf_counter()
                group.create_snap("s")
                parts["ceph"] = (time.perf_counter() - begun) * 1000

            threads = [threading.Thread(target=files), threading.Thread(target=ceph)]
            start = time.perf_counter()
            self._domain.fsFreeze()
            frozen = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            cut = time.perf_counter()
            self._domain.fsThaw()
            end = time.perf_counter()
            group.remove_snap("s")
            group.remove_image(ioctx, self._image)
            rbd.RBD().group_remove(ioctx, group_name)
        self._pool.refresh()
        for name in names:
            self._pool.storageVolLookupByName(name).delete()
        parts |= {"freeze": (frozen - start) * 1000, "cuts": (cut - frozen) * 1000, "thaw": (end - cut) * 1000}
        return (end - start) * 1000, parts


def window(stack: Stack, pairs: int) -> Result:
    """Frozen time of our snapshot against a bare script, alternating on the same guest."""
    bare = Bare(stack.lab)
    ours: list[float] = []
    against: list[float] = []
    parts: dict[str, list[float]] = {}
    cuts: list[float] = []
    try:
        for number in range(pairs + 1):  # the first pair warms caches and is not counted
            name = stack.snapshot(f"bench-window-{number}")
            status = stack.wait(name)["status"]
            stack.delete(name)
            total, seen = bare.window(number)
            if number == 0:
                continue
            ours.append(status["quiesce"]["frozenMilliseconds"])
            cuts.append(max(g["cutMilliseconds"] for g in status["groups"]))
            against.append(total)
            for key, value in seen.items():
                parts.setdefault(key, []).append(value)
    finally:
        bare.close()
    ratio = statistics.median(a / b for a, b in zip(ours, against, strict=True))
    medians = {k: round(statistics.median(v)) for k, v in sorted(parts.items())}
    return Result(
        name="window",
        unit="ms frozen",
        ours=ours,
        against=against,
        ours_is="freeze sent to thaw answered",
        against_is="the same calls by a bare script",
        goal=f"median ratio at most {WINDOW_GOAL:.2f}",
        met=ratio <= WINDOW_GOAL,
        details={
            "parts of the bare window (median ms)": medians,
            "our longest cut (median ms)": round(statistics.median(cuts)),
        },
    )


def writes(stack: Stack, pairs: int) -> Result:
    """API writes from apply to Ready (ours) and from delete to gone (against), from the audit log."""
    log = stack.lab.audit_log
    if log is None:
        raise RuntimeError("the laboratory's own control plane is needed: only it has an audit log")
    taking: list[float] = []
    deleting: list[float] = []
    reads: list[float] = []
    leases: list[float] = []
    inside = 0
    last: list[audit.Asked] = []
    for number in range(max(5, pairs // 3)):
        mark = log.stat().st_size
        name = stack.snapshot(f"bench-writes-{number}")
        status = stack.wait(name)["status"]
        time.sleep(1.5)
        last = audit.of_snapshots(log, start=mark)
        every = list(audit.requests(log, start=mark))
        taking.append(sum(r.is_write for r in last))
        reads.append(sum(not r.is_write for r in every))
        leases.append(sum(r.is_write for r in audit.requests(log, start=mark, leases=True)))
        frozen, thawed = status["quiesce"]["frozenTime"], status["quiesce"]["thawedTime"]
        inside += sum(frozen <= r.time.strftime("%Y-%m-%dT%H:%M:%S.%fZ") <= thawed for r in every)
        mark = log.stat().st_size
        stack.delete(name)
        time.sleep(1.5)
        deleting.append(sum(r.is_write for r in audit.of_snapshots(log, start=mark)))
    return Result(
        name="writes",
        unit="API writes",
        ours=taking,
        against=deleting,
        ours_is="from apply to Ready",
        against_is="from delete to gone",
        goal=f"at most {TAKING_WRITES_GOAL} for taking; none while frozen, the lease aside",
        met=max(taking) <= TAKING_WRITES_GOAL and inside == 0,
        details={
            "requests while the guest was frozen": inside,
            "reads from apply to Ready (median)": statistics.median(reads),
            "renewals of the lease meanwhile (median)": statistics.median(leases),
            "the writes of the last one": ", ".join(f"{r.verb} {r.resource}" for r in last if r.is_write),
        },
    )


def memory(stack: Stack, _pairs: int) -> Result:
    """Resident memory of the idle operator, the guardian and each driver process."""
    time.sleep(5)
    operator, guardian = stack.programs["operator"].pid, stack.programs["guardian"].pid
    drivers = {_name(pid): _resident(pid) for pid in _children(operator)}
    ours, watch = _resident(operator), _resident(guardian)
    return Result(
        name="memory",
        unit="MB resident",
        ours=[ours],
        against=[watch],
        ours_is="operator",
        against_is="guardian",
        goal=f"operator at most {OPERATOR_MB}, guardian at most {GUARDIAN_MB}",
        met=ours <= OPERATOR_MB and watch <= GUARDIAN_MB,
        details={"driver processes (MB)": ", ".join(f"{n} {m:.0f}" for n, m in sorted(drivers.items()))},
    )


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"process {pid} has no resident memory")


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue  # it ended meanwhile
            if parent == pid:
                found.append(int(entry.name))
    return found


def _name(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return os.fsdecode(words[-1]) + f" ({pid})"


ALL: dict[str, Callable[[Stack, int], Result]] = {"window": window, "writes": writes, "memory": memory}
