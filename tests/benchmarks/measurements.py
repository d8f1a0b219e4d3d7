"""The measurements themselves: the window against a bare script, requests of the API server, memory."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

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
        """Freeze, cut, thaw; return milliseconds in all and of the parts. What was cut is removed afterwards.

        The cuts are the calls that the drivers make: a plain snapshot of the image that is open already, and a clone of each
        file in a thread of its own.
        """
        self._pool.refresh()
        names = [f"bare-{number}-{p.name}" for p in self._files]
        parts: dict[str, float] = {}
        with self._lab.ceph.connect() as (_, ioctx), rbd.Image(ioctx, self._image) as image:
            sources = [self._storage.storageVolLookupByPath(str(p)) for p in self._files]
            xmls = [
                f"<volume><name>{n}</name><capacity>{s.info()[1]}</capacity><target><format type='raw'/></target></volume>"
                for n, s in zip(names, sources, strict=True)
            ]

            def clone(xml: str, source: libvirt.virStorageVol) -> None:
                begun = time.perf_counter()
                self._pool.createXMLFrom(xml, source, libvirt.VIR_STORAGE_VOL_CREATE_REFLINK)
                parts["reflink"] = max(parts.get("reflink", 0.0), (time.perf_counter() - begun) * 1000)

            def snapshot() -> None:
                begun = time.perf_counter()
                image.create_snap(f"bare-{number}", rbd.RBD_SNAP_CREATE_SKIP_QUIESCE)
                parts["ceph"] = (time.perf_counter() - begun) * 1000

            threads = [threading.Thread(target=clone, args=pair) for pair in zip(xmls, sources, strict=True)]
            threads.append(threading.Thread(target=snapshot))
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
            image.remove_snap(f"bare-{number}")
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
    still: list[float] = []
    try:
        for number in range(pairs + 1):  # the first pair warms caches and is not counted
            name = stack.snapshot(f"bench-window-{number}")
            quiesce = stack.wait(name)["status"]["quiesce"]
            evidence = _evidence(stack, name)
            stack.delete(name)
            total, seen = bare.window(number)
            if number == 0:
                continue
            ours.append(quiesce["frozenMilliseconds"])
            still.append(evidence["stillUntilMilliseconds"] - evidence["stillFromMilliseconds"])
            against.append(total)
            for key, value in seen.items():
                parts.setdefault(key, []).append(value)
    finally:
        bare.close()
    medians = {k: statistics.median(v) for k, v in sorted(parts.items())}
    cuts = statistics.median(still)
    around = statistics.median(a - b for a, b in zip(ours, still, strict=True))
    return Result(
        name="window",
        unit="ms frozen",
        ours=ours,
        against=against,
        ours_is="freeze sent to thaw answered",
        against_is="the same calls by a bare script",
        goal=f"median ratio at most {WINDOW_GOAL:.2f}",
        details={
            "parts of the bare window (median ms)": {k: round(v) for k, v in medians.items()},
            "parts of ours (median ms)": {"freeze and thaw": round(around), "cuts": round(cuts)},
            "what ours takes more (median ms)": {
                "freeze and thaw: two calls in threads": round(around - medians["freeze"] - medians["thaw"], 1),
                "cuts: to the drivers' processes and back": round(cuts - medians["cuts"], 1),
            },
        },
    ).judged(WINDOW_GOAL)


def _evidence(stack: Stack, name: str) -> Mapping[str, Any]:
    """What the snapshot's content says of its window."""
    content = stack.content(name)
    if content is None:
        raise RuntimeError(f"{name} has no VMSnapshotContent")
    evidence: Mapping[str, Any] = content["spec"]["evidence"]
    return evidence


def writes(stack: Stack, pairs: int) -> Result:
    """API writes from apply to Ready (ours), and what else was asked of the API server for it, from its audit log."""
    log = stack.lab.audit_log
    if log is None:
        raise RuntimeError("the laboratory's own control plane is needed: only it has an audit log")
    taking: list[list[audit.Asked]] = []
    deleting: list[list[audit.Asked]] = []
    inside: list[audit.Asked] = []
    renewals: list[audit.Asked] = []
    for number in range(max(5, pairs // 3)):
        mark = log.stat().st_size
        name = stack.snapshot(f"bench-writes-{number}")
        quiesce = stack.wait(name)["status"]["quiesce"]
        time.sleep(1.5)  # the log is written after the answer
        taking.append(audit.of_snapshots(log, start=mark))
        frozen, thawed = (datetime.fromisoformat(quiesce[t]) for t in ("frozenTime", "thawedTime"))
        inside += [r for r in audit.requests(log, start=mark) if frozen <= r.time <= thawed]
        renewals += [r for r in audit.requests(log, start=mark, leases=True) if frozen <= r.time <= thawed]
        mark = log.stat().st_size
        stack.delete(name)
        time.sleep(1.5)
        deleting.append(audit.of_snapshots(log, start=mark))
    made = [sum(r.is_write for r in each) for each in taking]

    def medians(each: list[list[audit.Asked]]) -> str:
        wrote = statistics.median(sum(r.is_write for r in one) for one in each)
        read = statistics.median(sum(not r.is_write for r in one) for one in each)
        return f"{wrote:g} writes, {read:g} reads"

    return Result(
        name="writes",
        unit="API writes",
        ours=made,
        ours_is="from apply to Ready",
        goal=f"at most {TAKING_WRITES_GOAL} for taking; none while frozen",
        met=max(made) <= TAKING_WRITES_GOAL and not inside,
        details={
            "from apply to Ready (median)": medians(taking),
            "from delete to gone (median)": medians(deleting),
            "requests while the guest was frozen": len(inside),
            "renewals of the lease while it was frozen, in the background": len(renewals),
            "the writes of the last one": ", ".join(f"{r.verb} {r.resource}" for r in taking[-1] if r.is_write),
        },
    )


def memory(stack: Stack, _pairs: int) -> Result:
    """Resident memory of the idle operator (ours), of the guardian and of each driver process."""
    time.sleep(5)
    operator, guardian = stack.programs["operator"].pid, stack.programs["guardian"].pid
    drivers = {_name(pid): _resident(pid) for pid in _children(operator)}
    ours, watch = _resident(operator), _resident(guardian)
    return Result(
        name="memory",
        unit="MB resident",
        ours=[ours],
        ours_is="the idle operator",
        goal=f"operator at most {OPERATOR_MB}, guardian at most {GUARDIAN_MB}",
        met=ours <= OPERATOR_MB and watch <= GUARDIAN_MB,
        details={
            "guardian (MB)": watch,
            "driver processes (MB)": ", ".join(f"{n} {m:.0f}" for n, m in sorted(drivers.items())),
        },
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
