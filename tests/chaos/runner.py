"""One injection after the other: bring a snapshot to the step, strike, mend, and have the judge look at the world.

Not: which faults there are (`faults`), which are injected where (`cases`), what is right (`judge`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import quantiles
from typing import Any

from tests.chaos import judge
from tests.chaos.apiproxy import ApiProxy
from tests.chaos.cases import At, Case, Way
from tests.chaos.faults import Scene
from tests.chaos.injector import Injector, Trap
from tests.chaos.judge import Finding
from tests.lab import Lab, LabError
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, SERVICE_ACCOUNT, TENANT, Stack, conditions, until
from vmsnapshot_operator.core.steps import Moment, Step

REACH_SECONDS = 60.0
"""So long a snapshot may need to reach its step; one that does not is no injection."""
HASTY_SHARE = 0.5
HEAL_SECONDS = 3.0
END_SECONDS = 240.0
"""So long after the mending everything may need to come to its end; after that it is stuck."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one injection did. `recovery_seconds`: from the mending to the end of the snapshot, one way or the other."""

    case: str
    number: int
    reached: bool
    seconds: float
    recovery_seconds: float
    longest_freeze_milliseconds: int
    outcome: str
    findings: tuple[Finding, ...] = ()


@dataclass(slots=True)
class Suite:
    """The laboratory, the observed operator behind the proxy, and what became of the injections so far."""

    lab: Lab
    stack: Stack
    proxy: ApiProxy
    injector: Injector
    guest: Guest
    seed: int
    results: list[Result] = field(default_factory=list)

    def inject(self, case: Case, number: int) -> Result:
        """Make one injection and judge it. Never raises for what the operator did wrong: that is a finding."""
        start = time.monotonic()
        random = Random(f"{self.seed}/{case.name}")  # noqa: S311 - nothing secret
        scene = Scene(
            lab=self.lab,
            stack=self.stack,
            proxy=self.proxy,
            injector=self.injector,
            guest=self.guest,
            random=random,
            namespace=TENANT,
            name=f"c{number}-{random.randrange(10**6)}",
        )
        self.guest.control(["sh", "-c", ": > /run/fsfreeze-hook.log"])
        reached, recovery, findings = False, 0.0, []
        written = self.guest.records()
        try:
            reached = self._strike(case, scene)
            mended = time.monotonic()
            findings += self.ended(scene)
            recovery = time.monotonic() - mended
        except LabError as error:
            findings.append(Finding("stuck", scene.name, str(error)))
        outcome = self.outcome(scene)
        findings += self._look(scene, written)
        result = Result(
            case=case.name,
            number=number,
            reached=reached,
            seconds=round(time.monotonic() - start, 2),
            recovery_seconds=round(recovery, 2),
            longest_freeze_milliseconds=self._longest_freeze(),
            outcome=outcome,
            findings=tuple(dict.fromkeys(findings)),
        )
        self.results.append(result)
        return result

    # --- one injection ------------------------------------------------------------------------------------------------------

    def _strike(self, case: Case, scene: Scene) -> bool:
        prepare = _WAYS[case.way]
        with prepare(self, scene), self.injector.trap(case.step, case.at.moment) as trap:
            _DRIVE[case.way](self, scene)
            if not self._reached(trap, scene, case):
                return False
            if case.at is At.DURING:
                trap.go()
                time.sleep(scene.random.uniform(0.0, 0.08))
            try:
                case.fault.strike(scene)
                trap.go()
                time.sleep(case.fault.hold)
            finally:
                case.fault.heal(scene)
        return True

    def _reached(self, trap: Trap, scene: Scene, case: Case) -> bool:
        """Wait for the step, but not for one that can no longer come. Some steps come only after the snapshot's end."""
        end = time.monotonic() + REACH_SECONDS
        while not trap.wait(1.0):
            late = case.way in (Way.EXPIRE, Way.AMEND)
            over = self.stack.get(scene.name, TENANT) is None if late else self._is_over(scene.name)
            if time.monotonic() > end or over:
                return trap.wait(0.0)
        return True

    def ended(self, scene: Scene, seconds: float = END_SECONDS) -> list[Finding]:
        """Wait until every snapshot of the scene has come to its end."""
        for name in (scene.name, *scene.others):
            try:
                until(f"{name} has ended", lambda name=name: self._is_over(name), seconds)  # type: ignore[misc]
            except LabError as error:
                status = json.dumps((self.stack.get(name, TENANT) or {}).get("status"))
                return [Finding("stuck", name, f"{error}: {status}")]
        return []

    def _is_over(self, name: str) -> bool:
        body = self.stack.get(name, TENANT)
        if body is None:
            return True
        if body["metadata"].get("deletionTimestamp"):
            return False
        found = conditions(body)
        settled = found.get("Reconciling", {}).get("status") == "False"
        return settled and "True" in (found.get("Ready", {}).get("status"), found.get("Stalled", {}).get("status"))

    def outcome(self, scene: Scene) -> str:
        """What became of the scene's snapshot, in a word."""
        body = self.stack.get(scene.name, TENANT)
        if body is None:
            return "gone"
        found = conditions(body)
        if found.get("Ready", {}).get("status") == "True":
            return str((body.get("status") or {}).get("consistency", ""))
        return str(found.get("Stalled", {}).get("reason", "unknown"))

    def _look(self, scene: Scene, written: int) -> list[Finding]:
        """The judge's view before the deletion of what is there, and after it."""
        findings: list[Finding] = []
        try:
            self.guest.up()
            names = [n for n in (scene.name, *scene.others) if self.stack.get(n, TENANT) is not None]
            for name in names:
                now = self.guest.records()
                counted = (
                    (written, now) if 0 < written <= now else None
                )  # one that was booted anew counts from the start
                found = judge.judge_snapshot(self.lab, self.stack, name, TENANT, records=counted)
                if found and scene.forged:
                    time.sleep(HEAL_SECONDS)  # a status that somebody else wrote stands until the next look
                    found = judge.judge_snapshot(self.lab, self.stack, name, TENANT, records=counted)
                findings += found
            findings += self.settled([self.guest])
            for name in names:
                self.stack.delete(name, namespace=TENANT, wait=False)
            for name in names:
                until(f"{name} is gone", lambda name=name: self.stack.get(name, TENANT) is None, END_SECONDS)  # type: ignore[misc]
            findings += self.settled([self.guest])
        except LabError as error:
            findings.append(Finding("stuck", scene.name, str(error)))
        return findings

    def settled(self, guests: list[Guest]) -> list[Finding]:
        """What the judge still finds after a while: a thaw or a clearing of traces may be under way."""
        end = time.monotonic() + 30
        while True:
            found = judge.judge_now(self.lab, self.stack, guests)
            if not found or time.monotonic() > end:
                return found
            time.sleep(0.5)

    def _longest_freeze(self) -> int:
        """From the guest's own clock: its freeze hook writes down when it is called."""
        try:
            lines = self.guest.control(["cat", "/run/fsfreeze-hook.log"]).split("\n")
        except LabError:
            return 0
        longest, since = 0.0, None
        for line in lines:
            word, _, moment = line.partition(" ")
            if word == "freeze" and since is None:
                since = float(moment)
            elif word == "thaw" and since is not None:
                longest, since = max(longest, float(moment) - since), None
        return round(longest * 1000)

    # --- ways to a step --------------------------------------------------------------------------------------------------------

    def create(self, scene: Scene, **spec: Any) -> None:
        """Apply the scene's VMSnapshot; every other one with a budget that many faults outlast."""
        if scene.random.random() < HASTY_SHARE:
            spec["quiesce"] = {"maxFrozenSeconds": 5, **spec.get("quiesce", {})}
        self.stack.snapshot(scene.name, self.guest.name, namespace=TENANT, **spec)


@contextlib.contextmanager
def _plain(_suite: Suite, _scene: Scene) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _taken(suite: Suite, scene: Scene) -> Iterator[None]:
    suite.create(scene)
    suite.stack.wait(scene.name, namespace=TENANT)
    yield


@contextlib.contextmanager
def _adopted(suite: Suite, scene: Scene) -> Iterator[None]:
    with suite.injector.trap(Step.ADOPT, Moment.AFTER) as trap:
        suite.create(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("it was not adopted")
        scene.go = trap.go
        yield


@contextlib.contextmanager
def _taken_and_given_back(suite: Suite, scene: Scene) -> Iterator[None]:
    with _taken(suite, scene):
        yield
    with contextlib.suppress(LabError):  # it may be gone
        suite.stack.patch(scene.name, {"spec": {"deletionPolicy": "Delete"}})


@contextlib.contextmanager
def _killed_in_the_window(suite: Suite, scene: Scene) -> Iterator[None]:
    with suite.injector.trap(Step.WINDOW_CUT, Moment.BEFORE) as trap:
        suite.create(scene)
        if not trap.wait(REACH_SECONDS):
            raise LabError("the window was not reached")
        suite.stack.programs["operator"].kill()
    yield


@contextlib.contextmanager
def _hook_fails(suite: Suite, _scene: Scene) -> Iterator[None]:
    suite.guest.fail_hook()
    try:
        yield
    finally:
        with contextlib.suppress(LabError):
            suite.guest.fail_hook(fail=False)


def _take(suite: Suite, scene: Scene) -> None:
    suite.create(scene)


def _delete(suite: Suite, scene: Scene) -> None:
    scene.deleted = True
    suite.stack.delete(scene.name, namespace=TENANT, wait=False)


def _delete_early(suite: Suite, scene: Scene) -> None:
    _delete(suite, scene)
    if scene.go is not None:
        scene.go()


def _recover(suite: Suite, _scene: Scene) -> None:
    suite.stack.start_operator()


def _fail(suite: Suite, scene: Scene) -> None:
    suite.create(scene, quiesce={"policy": "Require"})


def _expire(suite: Suite, scene: Scene) -> None:
    scene.deleted = True
    suite.create(scene, ttlSeconds=1)


def _amend(suite: Suite, scene: Scene) -> None:
    suite.stack.patch(scene.name, {"spec": {"deletionPolicy": "Retain"}})


_WAYS: dict[Way, Callable[[Suite, Scene], contextlib.AbstractContextManager[None]]] = {
    Way.TAKE: _plain,
    Way.DELETE: _taken,
    Way.DELETE_EARLY: _adopted,
    Way.RECOVER: _killed_in_the_window,
    Way.FAIL: _hook_fails,
    Way.EXPIRE: _plain,
    Way.AMEND: _taken_and_given_back,
}
_DRIVE: dict[Way, Callable[[Suite, Scene], None]] = {
    Way.TAKE: _take,
    Way.DELETE: _delete,
    Way.DELETE_EARLY: _delete_early,
    Way.RECOVER: _recover,
    Way.FAIL: _fail,
    Way.EXPIRE: _expire,
    Way.AMEND: _amend,
}


@contextlib.contextmanager
def suite(lab: Lab, seed: int) -> Iterator[Suite]:
    """The operator under observation, and the guest that is hurt."""
    guest = lab.guest("demo")
    state = lab.state / "chaos"
    state.mkdir(parents=True, exist_ok=True)
    stack = Stack(lab, state)
    stack.install()
    kubeconfig = lab.service_account_kubeconfig(NAMESPACE, SERVICE_ACCOUNT)
    with Injector(state / "injector.sock") as injector, ApiProxy(kubeconfig) as proxy:
        stack.server, stack.observer = proxy.url, injector.path
        with stack:
            yield Suite(lab=lab, stack=stack, proxy=proxy, injector=injector, guest=guest, seed=seed)


def summary(results: list[Result], seed: int) -> dict[str, Any]:
    """What `build/chaos.json` holds."""
    made = [r for r in results if r.reached]
    kinds = Counter(f.kind for r in results for f in r.findings)
    recovery = sorted(r.recovery_seconds for r in made)
    cuts = quantiles(recovery, n=100, method="inclusive") if len(recovery) > 1 else [*recovery, 0.0] * 99
    return {
        "injections": len(made),
        "byFault": dict(sorted(Counter(r.case.partition("@")[0] for r in made).items())),
        "leftFrozen": kinds["frozen"],
        "leaked": kinds["leaked"],
        "lied": kinds["lied"],
        "stuck": kinds["stuck"],
        "recoverySeconds": {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "max": max(recovery, default=0.0)},
        "longestFreezeMilliseconds": max((r.longest_freeze_milliseconds for r in made), default=0),
        "seed": seed,
    }


def write(results: list[Result], seed: int, path: Path) -> dict[str, Any]:
    """Write the summary, and one line for each injection beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = summary(results, seed)
    path.write_text(json.dumps(found, indent=2) + "\n")
    lines = [
        json.dumps(
            {
                "number": r.number,
                "case": r.case,
                "reached": r.reached,
                "outcome": r.outcome,
                "seconds": r.seconds,
                "recoverySeconds": r.recovery_seconds,
                "longestFreezeMilliseconds": r.longest_freeze_milliseconds,
                "findings": [{"kind": f.kind, "subject": f.subject, "what": f.what} for f in r.findings],
            }
        )
        for r in results
    ]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    return found
