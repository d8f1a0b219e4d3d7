"""The guardian's command line and what it tells systemd."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from vmsnapshot_operator.guardian import __main__ as program
from vmsnapshot_operator.guardian import systemd


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "--socket is needed"),
        (["--uri", "qemu:///system"], "--socket is needed"),
        (["--watch-only"], "at least one --uri"),
        (["--watch-only", "--socket", "/x"], "at least one --uri"),
        (["--probe"], "--socket is needed"),
        (["--probe", "--watch-only", "--uri", "qemu:///system"], "--socket is needed"),
        (["--socket", "/x", "--reach"], "belongs to --probe"),
    ],
)
def test_options_that_make_no_sense(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.arguments(words)
    assert why in capsys.readouterr().err


def test_one_that_only_watches_needs_no_socket() -> None:
    options = program.arguments(["--watch-only", "--uri", "qemu:///system", "--uri", "qemu+tls://two/system"])
    assert options.uri == ["qemu:///system", "qemu+tls://two/system"]
    assert options.socket is None


def test_help_tells_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        program.arguments(["--help"])
    text = capsys.readouterr().out
    assert "never sooner, not even when the guardian is ended" in text
    assert "--watch-only --uri URI" in text


@pytest.mark.parametrize(
    ("answer", "alive", "reaching"),
    [
        ({"ok": True, "turned": 0.1, "followed": {"a": True, "b": True}}, 0, 0),
        ({"ok": True, "turned": 0.1, "followed": {"a": True, "b": False}}, 0, 1),
        ({"ok": True, "turned": 11.0, "followed": {"a": True}}, 1, 1),
        ({"ok": False, "error": "no"}, 1, 1),
    ],
)
def test_what_the_probe_makes_of_an_answer(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, object], alive: int, reaching: int
) -> None:
    monkeypatch.setattr(program, "ask", lambda _path: json.loads(json.dumps(answer)))
    assert program.probe("/x", reach=False) == alive
    assert program.probe("/x", reach=True) == reaching


def test_systemd_is_told(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path_factory.mktemp("s") / "n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(str(path))
        heard.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        systemd.tell("READY=1")
        assert heard.recv(64) == b"READY=1"


def test_outside_of_systemd_nobody_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.tell("READY=1")
    assert capsys.readouterr().err == ""


def test_a_systemd_that_is_gone_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.tell("WATCHDOG=1")
    assert json.loads(capsys.readouterr().err)["guardian"] == "systemd was not told"
