"""What one VM whose agent, driver or host hangs does to the snapshots of fifteen others: with the hang and without, in turns."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tests.benchmarks.result import Result
from tests.lab import Lab, LabError, image
from tests.lab.control import Component
from tests.lab.definition import GuestDisk, Spec
from tests.lab.guests import Guest
from tests.lab.hypervisor import Host
from tests.stack import TENANT, Stack, conditions, until

GOAL = 1.15
OTHERS = 15
_BOOTS = 4
GUARD_SECONDS = 300.0
_DISKS = {"vda": GuestDisk(kind="file", size_mib=16), "vdb": GuestDisk(kind="rbd", size_mib=16)}
_MEMORY_MIB = 96
_FIRST, _SECOND = "lab", "lab-hung"
_CLASS = "hung-files"
_LOOK_SECONDS = 0.3
"""Less than a driver process takes to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One way to hang: the sixteenth VM, its Hypervisor object, how it is made to hang, and whether all is well again."""

    name: str
    says: str
    guest: Guest
    hypervisor: str
    hang: Callable[[], AbstractContextManager[None]]
    well: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Sample:
    """Of one of the fifteen: seconds from apply to Ready, and for how long it was held."""

    ready: float
    frozen: float


def isolation(stack: Stack, pairs: int) -> Iterator[Result]:
    """For each kind of hang: seconds to Ready and milliseconds of standstill of fifteen VMs, with the hang and without, by turns."""
    with ExitStack() as owned:
        with ThreadPoolExecutor(_BOOTS) as threads:
            names = [f"demo-bench-{n}" for n in range(OTHERS)]
            guests = list(threads.map(lambda name: owned.enter_context(_guest(stack.lab, name)), names))
        kinds = [owned.enter_context(make(stack)) for make in (_agent, _driver, _host)]
        for kind in kinds:
            yield from _measured(stack, guests, kind, max(4, pairs // 4))


def _measured(stack: Stack, guests: list[Guest], kind: _Kind, rounds: int) -> tuple[Result, Result]:
    hanging: list[list[_Sample]] = []
    calm: list[list[_Sample]] = []
    for number in range(rounds + 1):
        # In turns, and each of them first as often as the other: the machine may become slower or faster meanwhile.
        for hang in (True, False) if number % 2 else (False, True):
            taken = _round(stack, guests, kind, number, hang=hang)
            if number:  # the first round is to warm up
                (hanging if hang else calm).append(taken)

    def result(what: str, unit: str, value: Callable[[_Sample], float]) -> Result:
        ours = [[value(s) for s in taken] for taken in hanging]
        against = [[value(s) for s in taken] for taken in calm]
        made = Result(
            name=f"isolation-{kind.name}-{what}",
            unit=unit,
            ours=list(chain.from_iterable(ours)),
            against=list(chain.from_iterable(against)),
            ours_is=f"the 16th VM's {kind.says} hangs",
            against_is="nothing hangs",
            goal=f"median ratio, VM by VM, at most {GOAL:.2f}",
            details={
                "ratio of medians, round by round": [
                    round(statistics.median(a) / statistics.median(b), 2) for a, b in zip(ours, against, strict=True)
                ]
            },
        )
        return made.judged(GOAL)

    return (
        result("ready", "s from apply to Ready", lambda s: round(s.ready, 3)),
        result("frozen", "ms held", lambda s: s.frozen),
    )


def _round(stack: Stack, guests: list[Guest], kind: _Kind, number: int, *, hang: bool) -> list[_Sample]:
    """Sixteen snapshots at once; what the fifteen took, in the guests' order."""
    stem = f"iso-{os.getpid()}-{kind.name}-{number}-{'h' if hang else 'n'}"
    names = {g.name: f"{stem}-{g.name}" for g in (kind.guest, *guests)}
    try:
        with kind.hang() if hang else ExitStack():
            start = time.monotonic()
            _apply(stack, kind, {g.name: names[g.name] for g in (kind.guest, *guests)})
            found = _until_ready(stack, {names[g.name] for g in guests}, start)
            last = conditions(stack.get(names[kind.guest.name]) or {})
            if hang and last.get("Ready", {}).get("status") == "True":
                raise LabError(f"the snapshot of {kind.guest.name} is Ready: its {kind.says} did not hang")
    finally:
        _delete(stack, set(names.values()))
    until(f"all is well again after the {kind.says} hung", kind.well, GUARD_SECONDS)
    return [found[names[g.name]] for g in guests]


def _until_ready(stack: Stack, wanted: set[str], start: float) -> dict[str, _Sample]:
    found: dict[str, _Sample] = {}
    while missing := wanted - set(found):
        if time.monotonic() - start > GUARD_SECONDS:
            raise LabError(f"not Ready after {GUARD_SECONDS:g} s: {', '.join(sorted(missing))}")
        for body in stack.all("vmsnapshots.vmsnapshot.io"):
            name, said = body["metadata"]["name"], conditions(body)
            if name in missing and said.get("Stalled", {}).get("status") == "True":
                raise LabError(f"{name}: {said['Stalled'].get('message')}")
            if name in missing and said.get("Ready", {}).get("status") == "True":
                held = float(body["status"]["quiesce"]["frozenMilliseconds"])
                found[name] = _Sample(time.monotonic() - start, held)
    return found


def _delete(stack: Stack, names: set[str]) -> None:
    stack.lab.kubectl(
        "-n", TENANT, "delete", "vmsnapshots.vmsnapshot.io", "--wait=false", "--ignore-not-found", *sorted(names)
    )

    def gone() -> bool:
        return names.isdisjoint(b["metadata"]["name"] for b in stack.all("vmsnapshots.vmsnapshot.io"))

    until("the snapshots of this round are gone", gone, GUARD_SECONDS)


def _apply(stack: Stack, kind: _Kind, names: Mapping[str, str]) -> None:
    """Ask for all snapshots at once, by domain. That of the one that hangs may not fall back to less than a freeze."""
    items = []
    for domain, name in names.items():
        last = domain == kind.guest.name
        source = {"hypervisorName": kind.hypervisor if last else _FIRST, "domain": domain}
        items.append(
            {
                "apiVersion": "vmsnapshot.io/v1alpha1",
                "kind": "VMSnapshot",
                "metadata": {"name": name, "namespace": TENANT},
                "spec": {"source": source, "quiesce": {"policy": "Require" if last else "Prefer"}},
            }
        )
    stack.apply({"apiVersion": "v1", "kind": "List", "items": items})


def _object_is_ready(stack: Stack, resource: str, name: str) -> bool:
    body = json.loads(stack.lab.kubectl("get", resource, name, "-o", "json"))
    return conditions(body).get("Ready", {}).get("status") == "True"


@contextmanager
def _guest(lab: Lab, name: str) -> Iterator[Guest]:
    made = lab.guest(name, _DISKS, writer=False, memory_mib=_MEMORY_MIB)
    try:
        yield made
    finally:
        made.remove()


# --- the agent ---------------------------------------------------------------------------------------------------------------


@contextmanager
def _agent(stack: Stack) -> Iterator[_Kind]:
    with _guest(stack.lab, "demo-hung-agent") as guest:

        @contextmanager
        def hang() -> Iterator[None]:
            guest.hang_agent()
            try:
                yield
            finally:
                guest.hang_agent(hang=False)

        yield _Kind(name="agent", says="agent", guest=guest, hypervisor=_FIRST, hang=hang, well=guest.agent_answers)


# --- the driver ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _driver(stack: Stack) -> Iterator[_Kind]:
    """A class of its own for the files of the sixteenth VM; its processes are stopped, also those that take their place."""
    with _guest(stack.lab, "demo-hung-driver") as guest:
        document = _file_class(stack)
        document["metadata"]["name"] = _CLASS
        document["spec"] |= {"priority": 100, "match": [{"sourcePattern": f"*/{guest.name}-*"}]}
        stack.apply(document)
        until(f"the class {_CLASS} is ready", lambda: _object_is_ready(stack, _CLASSES, _CLASS))

        @contextmanager
        def hang() -> Iterator[None]:
            ended = threading.Event()
            stopping = threading.Thread(target=_keep_stopped, args=(stack, ended), daemon=True)
            _signal_workers(stack, signal.SIGSTOP)
            stopping.start()
            try:
                yield
            finally:
                ended.set()
                stopping.join()
                _signal_workers(stack, signal.SIGCONT)

        try:
            yield _Kind(
                name="driver",
                says="driver",
                guest=guest,
                hypervisor=_FIRST,
                hang=hang,
                well=lambda: _object_is_ready(stack, _CLASSES, _CLASS),
            )
        finally:
            stack.lab.kubectl("delete", _CLASSES, _CLASS, "--ignore-not-found")


_CLASSES = "storagedriverclasses.vmsnapshot.io"
_HYPERVISORS = "hypervisors.vmsnapshot.io"


def _file_class(stack: Stack) -> dict[str, object]:
    found = next(d for d in stack.example("storage-classes.yaml") if d["spec"]["driver"] == "libvirt-volume")
    return stack.fitted(found)


def _keep_stopped(stack: Stack, ended: threading.Event) -> None:
    while not ended.wait(_LOOK_SECONDS):
        _signal_workers(stack, signal.SIGSTOP)


def _signal_workers(stack: Stack, number: int) -> None:
    """Signal the driver processes of the class that hangs, children of this very operator."""
    # A driver process names the operator that started it, and its class.
    wanted = {b"vmsnapshot_operator.drivers.worker", str(stack.programs["operator"].pid).encode(), _CLASS.encode()}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if wanted <= set((entry / "cmdline").read_bytes().split(b"\0")):
                os.kill(int(entry.name), number)


# --- the host --------------------------------------------------------------------------------------------------------------------


@contextmanager
def _host(stack: Stack) -> Iterator[_Kind]:
    """A second libvirtd with the sixteenth VM, and a Hypervisor object of its own. Storage is served by the first as always."""
    lab = stack.lab
    host = Host(lab.state, "libvirtd-hung")
    component = Component(host.name, lab.control, host.check)
    host.up(lab.control, lambda _name: None)
    try:
        host.give_key(lab.ceph.key("libvirt"))
        guest = _guest_on(lab, host, "demo-hung-host")
        try:
            (document,) = stack.example("hypervisor.yaml")
            document["metadata"]["name"] = _SECOND
            document["spec"]["libvirt"]["endpoints"] = [stack.endpoint() | {"socketPath": str(host.socket)}]
            stack.apply(document)
            until(f"the Hypervisor {_SECOND} is ready", lambda: _object_is_ready(stack, _HYPERVISORS, _SECOND))

            @contextmanager
            def hang() -> Iterator[None]:
                component.kill(signal.SIGSTOP)
                try:
                    yield
                finally:
                    component.kill(signal.SIGCONT)

            yield _Kind(
                name="host",
                says="host",
                guest=guest,
                hypervisor=_SECOND,
                hang=hang,
                well=lambda: host.check() and _object_is_ready(stack, _HYPERVISORS, _SECOND),
            )
        finally:
            stack.lab.kubectl("delete", _HYPERVISORS, _SECOND, "--ignore-not-found")
            guest.remove()
    finally:
        component.stop()


def _guest_on(lab: Lab, host: Host, name: str) -> Guest:
    spec = Spec(
        name=name,
        disks={t: d.placed(name, t, lab.pool_path(d.pool or "reflink")) for t, d in _DISKS.items()},
        image=image.folder(),
        channel=lab.state / "channels" / f"{name}.sock",
        log=lab.state / "log" / f"guest-{name}.log",
        mon_host=lab.ceph.mon_host,
        memory_mib=_MEMORY_MIB,
        writer=False,
    )
    guest = Guest(spec, host, lab.ceph)
    guest.up()
    return guest


ALL: dict[str, Callable[[Stack, int], Iterator[Result]]] = {"isolation": isolation}
