"""What the guardian says of a libvirt that it follows and that does not answer."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vmsnapshot_operator.guardian import host

GUARD_SECONDS = 30.0


def test_a_libvirt_that_stays_away_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    tried: list[str] = []
    answers = ["refused", "refused", "refused", "unreachable", "unreachable", "refused"]
    done = threading.Event()

    def reach(uri: str) -> None:
        if len(tried) == len(answers):
            done.set()
            threading.Event().wait(GUARD_SECONDS)  # it is a daemon's thread, which follows for ever
        tried.append(uri)
        raise OSError(answers[len(tried) - 1])

    monkeypatch.setattr(host, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(host, "reach", reach)
    monkeypatch.setattr(host, "say", lambda what, **facts: said.append((what, facts["why"])))
    host.Host("qemu+unix:///system", lambda _uri, _journals: None).start()
    assert done.wait(GUARD_SECONDS)
    assert said == [("libvirt does not answer", why) for why in ("refused", "unreachable", "refused")]
