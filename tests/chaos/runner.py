"""One injection after the other: bring a snapshot to the step, strike, mend, and have the judge look at the world.

Not: which faults there are (`faults`), which are injected where (`cases`), what is right (`judge`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import libvirt

from tests import proof
from tests.chaos import judge, restored, ways
from tests.chaos.annex import Annex
from tests.chaos.apiproxy import ApiProxy
from tests.chaos.cases import RESTORING, Case, Way
from tests.chaos.faults import At, Fault, NoEffectError, Scene
from tests.chaos.faults.base import BUDGET_SECONDS
from tests.chaos.faults.neighbours import all_over, is_over, is_restored
from tests.chaos.injector import Injector, Trap
from tests.chaos.judge import Finding
from tests.chaos.results import Result
from tests.lab import Lab, LabError
from tests.lab.ceph import bindings
from tests.lab.guests import Guest
from tests.stack import NAMESPACE, SERVICE_ACCOUNT, TENANT, Stack, conditions, until

MADE = "c"
"""What each injection makes begins with this and its number."""
HEAL_SECONDS = 3.0
THAW_SECONDS = 12.0
"""So long it may take at most until a guest is thawed whose budget is over, or whose fault was mended: a try that gets no answer, and another."""
REST_SECONDS, PATIENT_SECONDS = 30.0, 150.0
"""So long the world may need to come to rest, and where nobody is told of what is left: the operator looks each half minute, lets half a
minute pass before it takes away what nobody accounts for, and tries a minute later what does not succeed."""
END_SECONDS = 240.0
SHORT_SECONDS = 2.0
"""So long after the mending everything may need to come to its end; after that it is stuck."""


@dataclass(slots=True)
class Suite:
    """The laboratory, the observed operator behind the proxy, and what became of the injections so far."""

    lab: Lab
    stack: Stack
    proxy: ApiProxy
    injector: Injector
    guest: Guest
    annex: Annex
    seed: int
    results: list[Result] = field(default_factory=list)

    def inject(self, case: Case, number: int) -> Result:
        """Make one injection and judge it. Never raises for what the operator did wrong: that is a finding."""
        start = time.monotonic()
        random = Random(f"{self.seed}/{case.name}")  # noqa: S311 - nothing secret
        guest = case.fault.guest(self.annex) if case.fault.guest is not None else self.guest
        scene = self.scene(guest, random, f"{MADE}{number}-{random.randrange(10**6)}")
        forget_freezes(guest)
        reached, recovery, findings = False, 0.0, scene.findings
        written, stood = guest.records(), self.injector.stood
        try:
            case.fault.prepare(scene)
            reached = self._strike(case, scene)
            mended = time.monotonic()
            findings += self.ended(scene)
            recovery = time.monotonic() - mended
        except _trouble() as error:
            findings.append(Finding("stuck", scene.name, _said(error)))
        outcome = self.outcome(scene)
        longest = longest_freeze(guest)
        findings += self._look(scene, written)
        longest = max(longest, longest_freeze(guest))
        findings += frozen_too_long(guest.name, longest, _permitted(case.fault, scene, self.injector.stood - stood))
        try:
            case.fault.leave(scene)
            self.annex.close()  # what only some faults need takes its part of the processors from all others
        except _trouble() as error:
            findings.append(Finding("stuck", scene.name, _said(error)))
        result = Result(
            case=case.name,
            number=number,
            reached=reached,
            seconds=round(time.monotonic() - start, 2),
            recovery_seconds=round(recovery, 2),
            longest_freeze_milliseconds=longest,
            outcome=outcome,
            findings=tuple(dict.fromkeys(findings)),
        )
        self.results.append(result)
        return result

    def scene(self, guest: Guest, random: Random, name: str) -> Scene:
        """The scene of a VMSnapshot of this name that is to be made of this guest."""
        return Scene(
            lab=self.lab,
            stack=self.stack,
            proxy=self.proxy,
            injector=self.injector,
            annex=self.annex,
            guest=guest,
            random=random,
            namespace=TENANT,
            name=name,
        )

    # --- one injection ------------------------------------------------------------------------------------------------------

    def _strike(self, case: Case, scene: Scene) -> bool:
        prepare = ways.PREPARE[case.way]
        scene.step, scene.late = case.step, case.way in (Way.EXPIRE, Way.AMEND)
        if case.fault.hasty:
            scene.hasty = True
        with prepare(scene), self.injector.trap(case.step, case.at.moment, case.fault.about) as trap:
            scene.before = Counter(self.injector.reached)
            ways.DRIVE[case.way](scene)
            if not self._reached(trap, scene, case):
                return False
            scene.detail = trap.detail
            if case.at is At.DURING:
                trap.go()
                time.sleep(scene.random.uniform(0.0, 0.08))
            try:
                hurt(case.fault, scene, trap)
            except NoEffectError as error:
                print(f"{case.name} had no effect: {error}", file=sys.stderr, flush=True)
                return False
        return True

    def _reached(self, trap: Trap, scene: Scene, case: Case) -> bool:
        """Wait for the step, but not for one that can no longer come. Some steps come only after the snapshot's end."""
        end = time.monotonic() + ways.REACH_SECONDS
        while not trap.wait(1.0):
            over = self.stack.get(scene.name, TENANT) is None if scene.late else is_over(self.stack, scene.name)
            if case.way in RESTORING:
                over = all(is_restored(self.stack, name) for name in scene.restores)
            if time.monotonic() > end or over:
                return trap.wait(0.0)
        return True

    def ended(self, scene: Scene, seconds: float = END_SECONDS) -> list[Finding]:
        """Wait until every snapshot of the scene has come to its end."""
        for name in (scene.name, *scene.others, *scene.beside):
            try:
                until(f"{name} has ended", lambda name=name: is_over(self.stack, name), seconds)  # type: ignore[misc]
            except LabError as error:
                status = json.dumps((self.stack.get(name, TENANT) or {}).get("status"))
                return [Finding("stuck", name, f"{error}: {status}")]
        for name in scene.restores:
            try:
                until(f"{name} has ended", lambda name=name: is_restored(self.stack, name), seconds)  # type: ignore[misc]
            except LabError as error:
                status = json.dumps((self.stack.get_restore(name, TENANT) or {}).get("status"))
                return [Finding("stuck", name, f"{error}: {status}")]
        return []

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
        guests = [scene.guest, *scene.beside.values()]
        try:
            findings += restored.judge(scene)
            for guest in guests:
                findings += booted(scene, guest)
            patience = PATIENT_SECONDS if scene.patient else REST_SECONDS
            names = [n for n in (scene.name, *scene.others, *scene.beside) if self.stack.get(n, TENANT) is not None]
            now = scene.guest.records()
            with ThreadPoolExecutor(2) as threads:  # they only look
                world = threads.submit(judge.settled, self.lab, self.stack, guests, patience)
                for name in names:
                    # One that was booted anew, or set back, does not count on; and of the other VMs nothing was counted.
                    counts = 0 < written <= now and name not in scene.beside and not scene.restores
                    findings += self._of_snapshot(scene, name, (written, now) if counts else None)
                findings += world.result()
            for name in names:
                self.stack.delete(name, namespace=TENANT, wait=False)
            for name in names:
                until(f"{name} is gone", lambda name=name: self.stack.get(name, TENANT) is None, END_SECONDS)  # type: ignore[misc]
            findings += judge.settled(self.lab, self.stack, guests, patience)
        except _trouble() as error:
            findings.append(Finding("stuck", scene.name, _said(error)))
        return findings

    def _of_snapshot(self, scene: Scene, name: str, counted: tuple[int, int] | None) -> list[Finding]:
        found = judge.judge_snapshot(self.lab, self.stack, name, TENANT, records=counted)
        if found and scene.forged:
            time.sleep(HEAL_SECONDS)  # a status that somebody else wrote stands until the next look
            found = judge.judge_snapshot(self.lab, self.stack, name, TENANT, records=counted)
        return found


def _trouble() -> tuple[type[Exception], ...]:
    """What the parts raise where they are asked and do not do what they should: told as a finding, and the run goes on."""
    return (LabError, OSError, libvirt.libvirtError, bindings("rbd").Error, bindings("rados").Error)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"


def booted(scene: Scene, guest: Guest, *, mend: bool = True) -> list[Finding]:
    """Start a guest that is off. Raises LabError if it does not come up, but for one whose disks were restored: that is a finding,
    and it is made anew (`mend`).
    """
    try:
        guest.up()
    except (LabError, libvirt.libvirtError) as error:
        if not scene.restores:
            raise
        if mend:
            guest.remove()
            guest.up()
        return [Finding("unbootable", f"domain {guest.name}", _said(error))]
    return []


def hurt(fault: Fault, scene: Scene, trap: Trap) -> None:
    """Strike, let the operator go on, and mend whatever came of it. Raises NoEffectError if the fault did nothing."""
    try:
        fault.strike(scene)
        trap.go()
        _wait_out(fault, scene)
    finally:
        fault.heal(scene)


def _wait_out(fault: Fault, scene: Scene) -> None:
    """Leave it broken for as long as the fault says, but not for longer than there is anybody whom it could hurt.

    What is short is waited for without asking: an API server without its etcd lets each question wait for half a minute.
    """
    end = time.monotonic() + fault.hold
    asks = fault.hold > SHORT_SECONDS
    while time.monotonic() < end and not fault.over(scene):
        with contextlib.suppress(LabError):  # it may be the API server that is broken
            if asks and not scene.late and all_over(scene):
                return
        time.sleep(min(0.1, max(0.0, end - time.monotonic())))


def _permitted(fault: Fault, scene: Scene, stood: float) -> float:
    """So many seconds the scene's guest may stand still at a time: the budget, then a thaw; no fault lasts longer than it was made to,
    and while the operator is kept at a step nobody may be there who thaws.
    """
    # Of the others that hold it nobody has said a budget.
    budget = BUDGET_SECONDS if scene.others or scene.planted else scene.budget
    return budget + fault.hold + stood + THAW_SECONDS


def frozen_too_long(guest: str, milliseconds: int, permitted: float) -> Iterator[Finding]:
    """Tell of a guest that was free when the judge looked, and had stood still for longer than it ever may. Pure."""
    if milliseconds > permitted * 1000:
        text = f"it stood still for {milliseconds / 1000:.1f} s, and may for {permitted:.1f} s at most"
        yield Finding("frozen", f"guest {guest}", text)


def forget_freezes(guest: Guest) -> None:
    """Have the guest count its freezes from now on."""
    guest.control(["sh", "-c", ": > /run/fsfreeze-hook.log"])


def longest_freeze(guest: Guest) -> int:
    """In milliseconds, from the guest's own clock: its freeze hook writes down when it is called."""
    try:
        lines = guest.control(["cat", "/run/fsfreeze-hook.log"]).split("\n")
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


def _forget_earlier_run(lab: Lab, stack: Stack, annex: Annex, guest: Guest) -> None:
    """Take away what a run has left that was killed: its judge would have, and the next one's must find nothing of it."""
    annex.one_host(guest)
    for body in stack.all("vmrestores"):
        stack.delete_restore(body["metadata"]["name"], namespace=body["metadata"]["namespace"])
    for body in stack.all("vmsnapshots"):
        stack.delete(body["metadata"]["name"], namespace=body["metadata"]["namespace"])
    connection = lab.libvirt()
    try:
        left = [d.name() for d in connection.listAllDomains() if d.name().startswith(f"{guest.name}-{MADE}")]
    finally:
        connection.close()
    for name in left:
        proof.remove_vm(lab, name)


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
        annex = Annex(lab, stack)
        with stack, contextlib.closing(annex):
            _forget_earlier_run(lab, stack, annex, guest)
            yield Suite(lab=lab, stack=stack, proxy=proxy, injector=injector, guest=guest, annex=annex, seed=seed)
