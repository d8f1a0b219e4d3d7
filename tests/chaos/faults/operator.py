"""The operator and its guardian die, stop, are two, or know the wrong time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from tests.chaos.faults.base import At, Fault, Scene, at
from tests.lab import LabError
from tests.stack import until
from vmsnapshot_operator.core.steps import Step


def _kill_operator(scene: Scene) -> None:
    scene.stack.programs["operator"].kill()


def _kill_group(scene: Scene) -> None:
    program = scene.stack.programs["operator"]
    os.killpg(program.pid, signal.SIGKILL)
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
    with contextlib.suppress(LabError):
        until("another instance took over", lambda: _leader(scene) == "standby", 60)
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


FAULTS = (
    Fault(name="operator-killed", strike=_kill_operator, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-with-its-group", strike=_kill_group, heal=_start_operator, ends_operator=True),
    Fault(name="operator-killed-twice", strike=_kill_operator, heal=_start_and_kill_again, ends_operator=True),
    Fault(name="operator-ended", strike=_end_operator, heal=_start_operator),
    Fault(
        name="operator-stopped-while-another-takes-over",
        strike=_stop_until_another_took_over,
        heal=_go_on_beside_another,
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
