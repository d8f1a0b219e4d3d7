"""Two installations, each with a cluster, an operator and a guardian of its own, on one hypervisor and one Ceph.

Both take, keep and delete at the same time; neither touches what is the other's, not even what the other left when it was killed.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import pytest

from tests.chaos import hosts, judge, storage
from tests.chaos.annex import Annex
from tests.chaos.faults.neighbours import is_over
from tests.chaos.judge import Allowed, Finding
from tests.chaos.rules import OURS
from tests.lab import Lab
from tests.stack import NAMESPACE, Stack, conditions, until
from vmsnapshot_operator.core import names
from vmsnapshot_operator.drivers import probes

END_SECONDS = 240.0


@pytest.fixture(scope="module")
def other(stack: Stack) -> Iterator[Stack]:
    """The second installation; gone with this module."""
    with contextlib.closing(Annex(stack.lab, stack)) as annex:
        yield annex.other()


def prefix(stack: Stack) -> str:
    """What everything is named after that an installation holds on storage."""
    text = stack.lab.kubectl("-n", NAMESPACE, "get", "configmap", "vmsnapshot-installation", "-o", "json")
    return names.installation_prefix(names.installation_id(json.loads(text)["data"]["seed"]))


def held(lab: Lab, beginning: str) -> frozenset[str]:
    """All that storage lists under a prefix, but probes: both operators make some now and then, and a killed one left its last."""
    seen = storage.look(lab)
    found = {f for f in seen.files if PurePath(f).name.startswith(beginning)}
    found |= {g for g in seen.groups if PurePath(g).name.startswith(beginning)}
    found |= {
        f"{place}@{s.group or s.name}"
        for place, image in seen.images.items()
        for s in image.snaps
        if (s.group or s.name).startswith(beginning)
    }
    return frozenset(f for f in found if probes.PREFIX not in f)


def judged(stack: Stack, foreign: str = "") -> list[Finding]:
    """What is wrong by the books of one installation, once all is at rest."""
    guest = stack.lab.guest("demo")
    allowed = Allowed(foreign=(foreign,)) if foreign else judge.NOTHING
    return judge.settled(stack.lab, stack, [guest], allowed=allowed)


def ended(stack: Stack, name: str) -> str:
    """Wait for the end of a VMSnapshot and return what became of it: Ready, or why not."""
    until(f"{name} has ended", lambda: is_over(stack, name), END_SECONDS)
    found = conditions(stack.get(name) or {})
    return "Ready" if found["Ready"]["status"] == "True" else str(found["Stalled"]["reason"])


@pytest.mark.timeout(900)
def test_snapshots_and_deletions_at_the_same_time(stack: Stack, other: Stack) -> None:
    both = (stack, other)
    assert prefix(stack) != prefix(other)
    with ThreadPoolExecutor(6) as threads:
        orders = [(s, f"at-once-{n}") for n in range(3) for s in both]
        list(threads.map(lambda o: o[0].snapshot(o[1], "demo"), orders))
        ends = list(threads.map(lambda o: ended(*o), orders))
    assert ends == ["Ready"] * len(orders), "each waits for its turn"
    assert [judge.judge_snapshot(s.lab, s, n) for s, n in orders] == [[]] * len(orders)
    assert judged(stack, prefix(other)) == []
    assert judged(other, prefix(stack)) == []
    theirs = held(stack.lab, prefix(other))
    assert len(theirs) >= 3 * 3
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda n: stack.delete(f"at-once-{n}"), range(3)))
    assert held(stack.lab, prefix(stack)) == frozenset()
    assert held(stack.lab, prefix(other)) == theirs, "what is the other's stands untouched"
    assert [judge.judge_snapshot(other.lab, other, f"at-once-{n}") for n in range(3)] == [[]] * 3
    with ThreadPoolExecutor(6) as threads:  # one deletes while the other takes
        again = threads.submit(stack.snapshot, "while-deleted", "demo")
        list(threads.map(lambda n: other.delete(f"at-once-{n}"), range(3)))
        again.result()
    assert ended(stack, "while-deleted") == "Ready"
    assert judge.judge_snapshot(stack.lab, stack, "while-deleted") == []
    stack.delete("while-deleted")
    assert judged(stack) == []
    assert judged(other) == []


@pytest.mark.timeout(900)
def test_what_a_killed_one_left_is_not_the_others_to_clean_up(stack: Stack, other: Stack) -> None:
    """Operator and guardian of one die in mid-window; the other one's start and sweep leave journal and handles as they are."""
    guest = stack.lab.guest("demo")

    def journals() -> tuple[str, ...]:
        return next(d.journals for d in hosts.domains(guest.host) if d.name == guest.name)

    other.snapshot("cut-short", "demo")
    end = time.monotonic() + 60
    while not journals():
        assert time.monotonic() < end, "the window was not reached"
    for program in ("guardian", "operator"):
        other.programs[program].process.kill()  # both at once: the window is over soon
    for program in ("guardian", "operator"):
        other.programs[program].process.wait()
    assert journals(), "it was killed while its journal was there"
    left = held(stack.lab, prefix(other))
    try:
        stack.stop()
        stack.start()  # sweeps, first of all
        stack.snapshot("beside-it", "demo")
        until("it says what it waits for, or has ended", lambda: bool(conditions(stack.get("beside-it") or {})), 60)
        time.sleep(5)
        assert journals(), "the journal is the other's"
        assert held(stack.lab, prefix(other)) == left
    finally:
        for program in ("operator", "guardian"):
            other.programs.pop(program).stop()
        other.start()
    assert ended(other, "cut-short")
    assert ended(stack, "beside-it")
    for one in (stack, other):
        name = "beside-it" if one is stack else "cut-short"
        assert judge.judge_snapshot(one.lab, one, name) == []
        one.delete(name)
    assert held(stack.lab, OURS) == frozenset()
    assert judged(stack) == []
    assert judged(other) == []
