"""Many VMSnapshots over many guests at once, with a random fault for each: what one case after the other cannot show.

Nobody is met at a step here; a fault strikes wherever the operator happens to be. One that strikes when its snapshot has already
come to its end, or that finds nothing to hurt, is no injection: it is told, and another one is made instead.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import libvirt

from tests.chaos import judge
from tests.chaos.faults import FAULTS, Fault, NoEffectError, Scene
from tests.chaos.faults.base import BUDGET_SECONDS
from tests.chaos.faults.neighbours import is_over
from tests.chaos.judge import Finding
from tests.chaos.results import Result
from tests.chaos.runner import (
    PATIENT_SECONDS,
    REST_SECONDS,
    THAW_SECONDS,
    Suite,
    forget_freezes,
    frozen_too_long,
    longest_freeze,
)
from tests.lab import Lab, LabError
from tests.lab.definition import GuestDisk
from tests.lab.guests import Guest
from tests.stack import TENANT, until

GUESTS = 16
DISKS = {"vda": GuestDisk(kind="file", size_mib=16), "vdb": GuestDisk(kind="rbd", size_mib=16)}
WRITER_MICROSECONDS = 200_000
BOOTS_AT_ONCE = 3
BATCH = 40
"""After so many VMSnapshots everything comes to rest, and the judge looks."""
AT_ONCE = 12
"""So many are under way at a time, of different guests or of the same."""
PAIR_SHARE = 0.25
"""Of so many of the guests another VMSnapshot is taken at the same time."""
MEET_SECONDS = 1.5
"""A fault strikes within so long after its snapshot was asked for."""
STRUCK_SECONDS = 1.5
"""A fault lasts so long at most."""
END_SECONDS = 300.0
TRIES = 2
"""So many times the number of injections that are wanted are tried at most."""

OF_ONE_SHARE = 0.85
_OF_ALL = (
    "operator-killed",
    "guardian-killed",
    "libvirtd-killed",
    "drivers-killed",
    "api-conflict",
    "api-internal-error",
    "api-read-internal-error",
    "guardian-and-operator-killed",
)
_OF_ONE = (
    "deleted",
    "deleted-by-force",
    "status-forged",
    "agent-hangs",
    "agent-ended",
    "agent-hook-fails",
    "agent-fails-at-freeze",
    "agent-fails-at-thaw",
    "thawed-inside-the-guest",
    "guest-reset",
    "guest-destroyed",
    "guest-paused",
    "guest-paused-and-resumed",
    "guest-redefined",
)


def run(suite: Suite, number: int, tell: Callable[[Result], None], first: int = 0) -> None:
    """Take snapshots until `number` of them have met a fault that did something; the results are added to the suite's.

    `first`: leave out so many of this seed's, as an earlier run has numbered them. What is done to each depends on the seed and its
    number alone; how it meets the others is a matter of time, which is not repeated.
    """
    # What a thread has started ends with it (`tests.lab.supervisor.die_with_parent`): the operator that a fault's mending started, too.
    with _guests(suite.lab, min(GUESTS, number)) as guests, ThreadPoolExecutor(AT_ONCE) as threads:
        tried = met = 0
        while met < number and tried < TRIES * number:
            size = min(BATCH, number - met)
            for result in _batch(suite, guests, threads, first + tried, size):
                suite.results.append(result)
                met += result.reached
                tell(result)
            tried += size


def replay(number: int, seed: int) -> str:
    """The command that repeats one of a fleet, among those that were under way beside it."""
    return f"make chaos SEED={seed} N=0 FLEET={BATCH} FLEET_FIRST={number // BATCH * BATCH}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What is done to one of a fleet: which fault, so many seconds after it was asked for, and whether another one is taken beside it."""

    fault: str
    pause: float
    pair: bool
    random: Random


def choose(seed: int, number: int) -> Choice:
    """The choice for this number. Pure."""
    random = Random(f"{seed}/fleet/{number}")  # noqa: S311 - nothing secret
    return Choice(
        fault=random.choice(_OF_ONE if random.random() < OF_ONE_SHARE else _OF_ALL),
        pause=random.uniform(0.0, MEET_SECONDS),
        pair=random.random() < PAIR_SHARE,
        random=random,
    )


@contextlib.contextmanager
def _guests(lab: Lab, number: int) -> Iterator[list[Guest]]:
    def make(n: int) -> Guest:
        return lab.guest(f"demo-fleet-{n}", DISKS, writer_us=WRITER_MICROSECONDS, memory_mib=96)

    with ThreadPoolExecutor(BOOTS_AT_ONCE) as threads:
        made = list(threads.map(make, range(number)))
        try:
            yield made
        finally:
            list(threads.map(Guest.remove, made))


@dataclass(slots=True)
class _Turn:
    """One VMSnapshot and its fault."""

    scene: Scene
    fault: Fault
    pause: float
    pair: bool
    met: bool = False
    seconds: float = 0.0
    recovery: float = 0.0
    outcome: str = ""
    findings: list[Finding] = field(default_factory=list)


def _batch(suite: Suite, guests: list[Guest], threads: ThreadPoolExecutor, first: int, size: int) -> list[Result]:
    faults = {f.name: f for f in FAULTS}
    chosen = {n: choose(suite.seed, n) for n in range(first, first + size)}
    turns = [
        _Turn(
            scene=suite.scene(guests[n % len(guests)], choice.random, f"fleet-{n}"),
            fault=faults[choice.fault],
            pause=choice.pause,
            pair=choice.pair,
        )
        for n, choice in chosen.items()
    ]
    alone = threading.Lock()
    list(threads.map(forget_freezes, guests))
    list(threads.map(lambda turn: _take(suite, turn, alone), turns))
    longest = dict(zip([g.name for g in guests], threads.map(longest_freeze, guests), strict=True))
    world = _look(suite, guests, turns)
    for name, milliseconds in longest.items():
        world += frozen_too_long(name, milliseconds, BUDGET_SECONDS + STRUCK_SECONDS + THAW_SECONDS)
    return [
        Result(
            case=f"{turn.fault.name}@fleet",
            number=first + number,
            reached=turn.met,
            seconds=round(turn.seconds, 2),
            recovery_seconds=round(turn.recovery, 2),
            longest_freeze_milliseconds=longest[turn.scene.guest.name],
            outcome=turn.outcome,
            findings=tuple(dict.fromkeys([*turn.scene.findings, *turn.findings, *(world if number == 0 else ())])),
        )
        for number, turn in enumerate(turns)
    ]


def _take(suite: Suite, turn: _Turn, alone: threading.Lock) -> None:
    """Ask for it, strike while it is under way, mend, and wait for its end. What the laboratory cannot do is told, too."""
    scene, start = turn.scene, time.monotonic()
    try:
        suite.stack.snapshot(scene.name, scene.guest.name, namespace=TENANT)
        if turn.pair:
            scene.others.append(suite.stack.snapshot(f"{scene.name}-pair", scene.guest.name, namespace=TENANT))
        time.sleep(turn.pause)
        # What is done to all of them is done by one at a time: two would mend each other's.
        with alone if turn.fault.name in _OF_ALL else contextlib.nullcontext():
            turn.met = _strike(suite, turn)
        mended = time.monotonic()
        turn.findings += suite.ended(scene, END_SECONDS)
        turn.recovery = time.monotonic() - mended
        turn.outcome = suite.outcome(scene)
    except (LabError, libvirt.libvirtError) as error:
        turn.findings.append(Finding("stuck", scene.name, str(error)))
    turn.seconds = time.monotonic() - start


def _strike(suite: Suite, turn: _Turn) -> bool:
    """Whether the fault met a snapshot under way, and did something."""
    scene, fault = turn.scene, turn.fault
    if is_over(suite.stack, scene.name):
        return False
    try:
        try:
            fault.strike(scene)
            time.sleep(min(fault.hold, STRUCK_SECONDS) * scene.random.random())
        finally:
            fault.heal(scene)
    except NoEffectError:
        return False
    except (LabError, libvirt.libvirtError):
        # Another one's fault may stop libvirtd, or this very guest, at the same moment: then nobody can say what this one did.
        return False
    return True


def _look(suite: Suite, guests: list[Guest], turns: list[_Turn]) -> list[Finding]:
    """The judge's view when all has come to rest. A guest whose mending was disturbed is started anew."""
    world: list[Finding] = []
    try:
        with ThreadPoolExecutor(BOOTS_AT_ONCE) as threads:
            list(threads.map(_at_rest, guests))
        names = [(turn, name) for turn in turns for name in (turn.scene.name, *turn.scene.others)]
        left = [(turn, name) for turn, name in names if suite.stack.get(name, TENANT) is not None]
        with ThreadPoolExecutor(2) as threads:
            judged = [threads.submit(judge.judge_snapshot, suite.lab, suite.stack, name, TENANT) for _, name in left]
            for (turn, _), each in zip(left, judged, strict=True):
                turn.findings += each.result()
        patience = PATIENT_SECONDS if any(turn.scene.patient for turn in turns) else REST_SECONDS
        world += judge.settled(suite.lab, suite.stack, guests, patience)
        for _, name in left:
            suite.stack.delete(name, namespace=TENANT, wait=False)
        until("all are gone", lambda: not any(suite.stack.get(name, TENANT) for _, name in left), END_SECONDS)
        world += judge.settled(suite.lab, suite.stack, guests, patience)
    except LabError as error:
        world.append(Finding("stuck", "fleet", str(error)))
    return world


def _at_rest(guest: Guest) -> None:
    """Nothing of a fault is left in it: what two of them did at once, not each may have mended."""
    guest.up()
    guest.control(["rm", "-f", "/run/agent-off", "/run/hook-fail", "/run/hook-fail-thaw", "/run/hook-fail-freeze"])
    guest.wait()
