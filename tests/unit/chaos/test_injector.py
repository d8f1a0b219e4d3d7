"""The injector at its socket, and which requests a trouble of the API server meets. No laboratory."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import observed
from tests.chaos.apiproxy import Trouble
from tests.chaos.faults.operator import LATE
from tests.chaos.injector import Injector
from vmsnapshot_operator.core.steps import Moment, Step


def say(path: Path, step: Step, detail: str = "", obeyed: int = 0, pid: int = 1) -> dict[str, Any]:
    """What the operator does at a step: tell it, and wait for the answer."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(30)
        link.connect(str(path))
        said = {"step": step, "moment": Moment.BEFORE, "uid": "u", "detail": detail, "pid": pid, "obeyed": obeyed}
        link.sendall(json.dumps(said).encode() + b"\n")
        return dict(json.loads(link.makefile().readline()))


def test_only_the_class_that_is_meant_is_held_and_its_answer_lost(tmp_path: Path) -> None:
    with Injector(tmp_path / "s") as injector, injector.trap(Step.WINDOW_CUT, Moment.BEFORE, "ceph") as trap:
        assert say(injector.path, Step.WINDOW_CUT, "files") == {"clock": 0, "order": ""}
        assert not trap.wait(0.0)
        answers: list[dict[str, Any]] = []
        held = threading.Thread(target=lambda: answers.append(say(injector.path, Step.WINDOW_CUT, "ceph")))
        held.start()
        assert trap.wait(30)
        assert trap.detail == "ceph"
        injector.orders["ceph"], injector.clock_seconds = "lose", 5
        trap.go()
        held.join(30)
        assert answers == [{"clock": 5, "order": "lose"}]
        assert say(injector.path, Step.WINDOW_CUT, "ceph", obeyed=1) == {"clock": 5, "order": ""}, "once"
        assert injector.obeyed == 1
        say(injector.path, Step.KEEP, obeyed=1, pid=2)
        assert injector.obeyed == 2, "one that was started anew counts from its start"
        assert injector.reached[Step.WINDOW_CUT, Moment.BEFORE] == 3


def test_how_long_the_operator_was_kept_anywhere(tmp_path: Path) -> None:
    with Injector(tmp_path / "s") as injector:
        with injector.trap(Step.KEEP, Moment.BEFORE) as trap:
            held = threading.Thread(target=say, args=(injector.path, Step.KEEP))
            held.start()
            assert trap.wait(30)
            time.sleep(0.2)
            trap.go()
            held.join(30)
            time.sleep(0.3)
        assert 0.2 <= injector.stood < 0.5
        with injector.trap(Step.KEEP, Moment.BEFORE):
            pass
        assert injector.stood < 0.5, "nobody came there"


def test_something_is_done_right_before_an_order_is_sent(tmp_path: Path) -> None:
    done: list[str] = []
    with Injector(tmp_path / "s") as injector:
        freeze = observed._told(str(injector.path), "fsFreeze", lambda: done.append("sent"))
        freeze()
        injector.calls["fsFreeze"] = lambda: done.append("stopped")
        freeze()
        freeze()
        assert done == ["sent", "stopped", "sent", "sent"]
        assert not injector.calls
        assert not injector.reached
    freeze()
    assert done[-1] == "sent", "with nobody at the other end it goes on"


def test_every_order_is_a_function_of_libvirt() -> None:
    for owner, name in observed._ORDERS:
        assert callable(getattr(owner, name))
    assert {name for _, _, call in LATE for name in call.values()} <= {name for _, name in observed._ORDERS}


WORK, LEASE, EVENT = "/apis/vmsnapshot.io/v1alpha1/x", "/apis/coordination.k8s.io/v1/leases/y", "/api/v1/events"


@pytest.mark.parametrize(
    ("trouble", "met"),
    [
        (Trouble(count=1), {("PATCH", WORK), ("DELETE", WORK)}),
        (Trouble(count=1, reads=True), {("GET", WORK)}),
        (Trouble(count=0), set()),
        (
            Trouble(count=1, all_of_them=True),
            {(m, p) for m in ("GET", "PATCH", "DELETE") for p in (WORK, LEASE, EVENT)},
        ),
    ],
)
def test_which_requests_fail(trouble: Trouble, met: set[tuple[str, str]]) -> None:
    asked = {(m, p) for m in ("GET", "PATCH", "DELETE") for p in (WORK, LEASE, EVENT)}
    assert {(m, p) for m, p in asked if trouble.concerns(m, p, watch=False)} == met
    assert not trouble.concerns("GET", WORK, watch=True)
