"""Many VMSnapshots over many guests at once, with a random fault for each: what one case after the other cannot show.

Nobody is met at a step here; a fault strikes wherever the operator happens to be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

from tests.chaos import judge
from tests.chaos.faults import FAULTS, Fault, NoEffectError, Scene
from tests.chaos.judge import Finding
from tests.chaos.runner import Result, Suite
from tests.lab import Lab, LabError
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import TENANT, until

GUESTS = 16
DISKS = {"vda": GuestDisk(kind="file", size_mib=16), "vdb": GuestDisk(kind="rbd", size_mib=16)}
WRITER_MICROSECONDS = 200_000
BATCH = 40
"""So many VMSnapshots exist at a time: two or three for each guest."""
END_SECONDS = 600.0

_OF_ALL = (
    "operator-killed",
    "guardian-killed",
    "libvirtd-killed",
    "drivers-killed",
    "api-conflict",
    "api-internal-error",
)
_OF_ONE = (
    "deleted",
    "deleted-by-force",
    "status-forged",
    "agent-hangs",
    "agent-ended",
    "agent-hook-fails",
    "agent-fails-at-thaw",
    "thawed-inside-the-guest",
    "guest-reset",
    "guest-destroyed",
    "guest-paused",
    "guest-paused-and-resumed",
    "guest-redefined",
)


def run(suite: Suite, number: int, tell: Callable[[Result], None]) -> None:
    """Take `number` snapshots with a fault for each; the results are added to the suite's."""
    random = Random(f"{suite.seed}/fleet")  # noqa: S311 - nothing secret
    with _guests(suite.lab) as guests:
        done = 0
        while done < number:
            size = min(BATCH, number - done)
            for result in _batch(suite, guests, random, done, size):
                suite.results.append(result)
                tell(result)
            done += size


@contextlib.contextmanager
def _guests(lab: Lab) -> Iterator[list[Guest]]:
    made = [lab.guest(f"demo-fleet-{n}", DISKS, writer_us=WRITER_MICROSECONDS, memory_mib=96) for n in range(GUESTS)]
    try:
        yield made
    finally:
        for guest in made:
            guest.remove()


def _batch(suite: Suite, guests: list[Guest], random: Random, first: int, size: int) -> list[Result]:
    faults = {f.name: f for f in FAULTS}
    scenes = [suite.scene(guests[(first + n) % len(guests)], random, f"fleet-{first + n}") for n in range(size)]
    chosen = [faults[random.choice(_OF_ONE if random.random() < 0.85 else _OF_ALL)] for _ in scenes]
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda s: suite.stack.snapshot(s.name, s.guest.name, namespace=TENANT), scenes))
    for scene, fault in zip(scenes, chosen, strict=True):
        _strike(scene, fault)
    findings: dict[str, list[Finding]] = {s.name: [] for s in scenes}
    mended = time.monotonic()
    seconds = {}
    for scene in scenes:
        findings[scene.name] += suite.ended(scene, END_SECONDS)
        seconds[scene.name] = time.monotonic() - mended
    outcomes = {s.name: suite.outcome(s) for s in scenes}
    world = _look(suite, guests, scenes, findings)
    results = []
    for number, (scene, fault) in enumerate(zip(scenes, chosen, strict=True)):
        found = findings[scene.name] + (world if number == 0 else [])
        results.append(
            Result(
                case=f"{fault.name}@fleet",
                number=first + number,
                reached=True,
                seconds=round(time.monotonic() - start, 2),
                recovery_seconds=round(seconds[scene.name], 2),
                longest_freeze_milliseconds=0,
                outcome=outcomes[scene.name],
                findings=tuple(dict.fromkeys(found)),
            )
        )
    return results


def _strike(scene: Scene, fault: Fault) -> None:
    try:
        fault.strike(scene)
        time.sleep(min(fault.hold, 1.5) * scene.random.random())
    except (LabError, NoEffectError):
        pass  # what it would hurt is already gone
    finally:
        fault.heal(scene)


def _look(suite: Suite, guests: list[Guest], scenes: list[Scene], findings: dict[str, list[Finding]]) -> list[Finding]:
    world: list[Finding] = []
    try:
        for guest in guests:
            guest.up()
        left = [s for s in scenes if suite.stack.get(s.name, TENANT) is not None]
        for scene in left:
            findings[scene.name] += judge.judge_snapshot(suite.lab, suite.stack, scene.name, TENANT)
        world += judge.settled(suite.lab, suite.stack, guests)
        for scene in left:
            suite.stack.delete(scene.name, namespace=TENANT, wait=False)
        until("all are gone", lambda: not any(suite.stack.get(s.name, TENANT) for s in left), END_SECONDS)
        world += judge.settled(suite.lab, suite.stack, guests)
    except LabError as error:
        world.append(Finding("stuck", "fleet", str(error)))
    return world
