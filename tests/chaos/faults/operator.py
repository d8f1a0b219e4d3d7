"""The operator and its guardian die, stop, are two, or know the wrong time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping

from tests.chaos.faults.base import FROZEN, At, Fault, NoEffectError, Scene, at, nothing, send, unhurried
from tests.chaos.faults.storage import workers
from tests.chaos.seen import Finding
from tests.lab import LabError
from tests.stack import until
from vmsnapshot_operator.core.steps import Step

STOPPED_SECONDS = 20.0
"""Longer than a hasty window's budget, its freeze and its thaw may take: an operator that was stopped for so long finds all of them over."""
TAKE_OVER_SECONDS = 40.0
"""So long the start of another instance and its taking the lease over may last: 15 s are promised of one that runs already."""
FREED_SECONDS = 10.0
"""So long a guest may stay frozen after its operator died: a guardian promises 2 s. The budget is longer, so that it is freed for the death alone."""
_HELD = at(
    [
        Step.TAKE_WINDOW,
        Step.WINDOW_JOURNAL,
        Step.WINDOW_ARM,
        Step.WINDOW_QUIESCE,
        Step.WINDOW_CUT,
        Step.WINDOW_FREE,
        Step.WINDOW_DISARM,
        Step.WINDOW_CLEAR,
    ]
)


def _kill_operator(scene: Scene) -> None:
    scene.stack.programs["operator"].kill()


def _kill_operator_that_holds(scene: Scene) -> None:
    if scene.guest.freeze_status() != "frozen":
        raise NoEffectError("the guest is not frozen")
    _kill_operator(scene)


def _start_operator_when_free(scene: Scene) -> None:
    """The guardian frees the guest, as nobody else is there to."""
    try:
        until("the guest is thawed", lambda: scene.guest.freeze_status() == "thawed", FREED_SECONDS)
    except LabError as error:
        text = f"its operator died, and a guardian runs: {error}"
        scene.findings.append(Finding("frozen", f"guest {scene.guest.name}", text))
    _start_operator(scene)


def _kill_group(scene: Scene) -> None:
    """All that a container's end takes with it: drivers have sessions of their own."""
    program, drivers = scene.stack.programs["operator"], workers(scene)
    os.killpg(program.pid, signal.SIGKILL)
    for pid in drivers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    program.process.wait(30)


def _end_operator(scene: Scene) -> None:
    scene.stack.programs["operator"].process.terminate()


def _start_operator(scene: Scene) -> None:
    program = scene.stack.programs["operator"]
    if program.process.poll() is None:
        program.stop()
    scene.stack.start_operator()


def _start_and_kill_again(scene: Scene) -> None:
    scene.stack.start_operator(wait=False)
    time.sleep(scene.random.uniform(0.5, 4.0))
    scene.stack.programs["operator"].kill()
    scene.stack.start_operator()


def _stop_until_another_took_over(scene: Scene) -> None:
    """SIGSTOP; another instance takes the lease over; what was stopped then goes on beside it."""
    scene.stack.programs["operator"].kill(signal.SIGSTOP)
    scene.stack.start_operator("standby", wait=False)


def _go_on_beside_another(scene: Scene) -> None:
    end = time.monotonic() + STOPPED_SECONDS
    try:
        until("another instance took over", lambda: _leader(scene) == "standby", TAKE_OVER_SECONDS)
    except LabError as error:
        scene.findings.append(Finding("stuck", "the lease", str(error)))
    time.sleep(max(0.0, end - time.monotonic()))
    scene.stack.programs["operator"].kill(signal.SIGCONT)
    time.sleep(2)
    scene.stack.programs.pop("standby").stop()


def _leader(scene: Scene) -> str:
    return scene.lab.kubectl(
        "-n", "vmsnapshot-system", "get", "lease", "vmsnapshot-operator", "-o", "jsonpath={.spec.holderIdentity}"
    ).strip()


def _second_operator(scene: Scene) -> None:
    scene.stack.start_operator("second", wait=False)


def _end_second_operator(scene: Scene) -> None:
    scene.stack.programs.pop("second").stop()


def _kill_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill()


def _start_guardian(scene: Scene) -> None:
    if scene.stack.programs["guardian"].process.poll() is not None:
        scene.stack.start_guardian()


def _pause(scene: Scene) -> None:
    scene.method = "Pause"


def _stop_libvirtd_at_its_order(call: Mapping[Step, str]) -> Callable[[Scene], None]:
    """Not before the operator is about to send this very order: what it asks before would hang instead, and the order never be sent."""

    def strike(scene: Scene) -> None:
        assert scene.step is not None, "struck at a step"
        scene.injector.calls[call[scene.step]] = lambda: send("libvirtd", signal.SIGSTOP)(scene)

    return strike


def _is_sent(scene: Scene) -> bool:
    """The order has come to libvirtd's socket: it is told of right before."""
    if scene.injector.calls:
        return False
    time.sleep(0.5)
    return True


def _kill_operator_while_its_order_waits(scene: Scene) -> None:
    """libvirtd has its order in a socket, and carries it out when nobody waits for it any more."""
    sent = not scene.injector.calls
    scene.injector.calls.clear()
    _kill_operator(scene)
    send("libvirtd", signal.SIGCONT)(scene)
    _start_operator(scene)
    if not sent:
        raise NoEffectError("the order was not given")


def _kill_both(scene: Scene) -> None:
    _kill_guardian(scene)
    _kill_operator(scene)


def _start_both(scene: Scene) -> None:
    _start_guardian(scene)
    _start_operator(scene)


def _step_clock(seconds: int) -> Callable[[Scene], None]:
    """The operator's wall clock is wrong from its next step on."""

    def strike(scene: Scene) -> None:
        scene.injector.clock_seconds = seconds

    return strike


def _stop_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill(signal.SIGSTOP)


def _continue_guardian(scene: Scene) -> None:
    scene.stack.programs["guardian"].kill(signal.SIGCONT)


LATE: tuple[tuple[str, Callable[[Scene], None], Mapping[Step, str]], ...] = (
    ("freeze", nothing, {Step.WINDOW_QUIESCE: "fsFreeze"}),
    ("pause", _pause, {Step.WINDOW_QUIESCE: "suspend"}),
    ("switch", nothing, {Step.WINDOW_SWITCH: "snapshotCreateXML"}),
    ("begin-a-copy", nothing, {Step.WINDOW_BEGIN: "backupBegin"}),
    ("commit", nothing, {Step.COLLAPSE_COMMIT: "blockCommit", Step.COLLAPSE_PIVOT: "blockJobAbort"}),
    (
        "define",
        nothing,
        {
            Step.GATE_CLOSE: "defineXML",
            Step.GATE_OPEN: "defineXML",
            Step.CLONE_DEFINE: "defineXML",
            Step.START: "createWithFlags",
        },
    ),
)
"""What libvirt is ordered to do, at which steps, and by which function there."""

FAULTS = (
    Fault(name="operator-killed", strike=_kill_operator, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-with-its-group", strike=_kill_group, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-twice", strike=_kill_operator, heal=_start_and_kill_again, ends_operator=True),
    Fault(
        name="operator-killed-while-it-pauses",
        prepare=_pause,
        strike=_kill_operator,
        heal=_start_operator,
        ends_operator=True,
        only=_HELD,
    ),
    Fault(
        name="operator-stays-dead",
        prepare=unhurried,
        strike=_kill_operator_that_holds,
        heal=_start_operator_when_free,
        ends_operator=True,
        only=FROZEN | {(Step.WINDOW_SWITCH, At.BEFORE), (Step.WINDOW_BEGIN, At.BEFORE)},
    ),
    *(
        Fault(
            name=f"order-to-{what}-comes-late",
            prepare=prepare,
            strike=_stop_libvirtd_at_its_order(call),
            heal=_kill_operator_while_its_order_waits,
            hold=10.0,
            over=_is_sent,
            ends_operator=True,
            only=at(call, [At.BEFORE]),
            sure=(next(iter(call)), At.BEFORE),
        )
        for what, prepare, call in LATE
    ),
    Fault(name="operator-ended", strike=_end_operator, heal=_start_operator),
    Fault(
        name="operator-stopped-while-another-takes-over",
        strike=_stop_until_another_took_over,
        heal=_go_on_beside_another,
        hasty=True,
        slow=True,
    ),
    Fault(name="second-operator", strike=_second_operator, heal=_end_second_operator, hold=4.0),
    Fault(name="clock-an-hour-ahead", strike=_step_clock(3600), heal=_step_clock(0), hold=2.0),
    Fault(name="clock-an-hour-behind", strike=_step_clock(-3600), heal=_step_clock(0), hold=2.0),
    Fault(name="guardian-killed", strike=_kill_guardian, heal=_start_guardian, hold=1.0),
    Fault(
        name="guardian-killed-as-it-is-armed",
        strike=_kill_guardian,
        heal=_start_guardian,
        hold=1.0,
        only=at([Step.WINDOW_JOURNAL, Step.WINDOW_ARM]),
        sure=(Step.WINDOW_ARM, At.DURING),
    ),
    Fault(name="guardian-stopped", strike=_stop_guardian, heal=_continue_guardian, hold=3.0),
    Fault(name="guardian-and-operator-killed", strike=_kill_both, heal=_start_both, ends_operator=True),
)
