"""Lines of the log: readable by machines or people, and never with a secret."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.telemetry import logs
from vmsnapshot_operator.telemetry.logs import HIDDEN, JsonFormatter, Redactor, TextFormatter

SECRET = 'AQB3"secret"/==\n line two'  # noqa: S105 - what must not be seen


@pytest.fixture
def restored() -> Iterator[None]:
    """Logging as it was before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {
        n: logging.getLogger(n).level for n in ("vmsnapshot_operator", "kopf", "kubernetes", "aiohttp", "asyncio")
    }
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def _record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    record = logging.LogRecord("vmsnapshot_operator.x", logging.INFO, "f", 1, message, arguments, None)
    record.__dict__.update(extra)
    return record


@pytest.mark.parametrize(
    "spelling",
    [
        SECRET,
        SECRET.splitlines()[0],
        repr(SECRET),
        json.dumps(SECRET),
        quote(SECRET, safe=""),
        base64.b64encode(SECRET.encode()).decode(),
    ],
)
@pytest.mark.parametrize("formatter", [JsonFormatter, TextFormatter])
def test_no_spelling_of_a_secret_gets_through(spelling: str, formatter: type[JsonFormatter | TextFormatter]) -> None:
    redactor = Redactor()
    redactor.hide([SECRET])
    line = formatter(redactor).format(_record("login with %s failed", spelling))
    assert HIDDEN in line
    assert "secret" not in line


@given(st.text(min_size=4).filter(lambda s: len(s.strip()) >= 4), st.text(), st.text())
def test_a_registered_value_is_never_left_whole(value: str, before: str, after: str) -> None:
    redactor = Redactor()
    redactor.hide([value])
    cleaned = redactor.clean(before + value + after)
    assert value.strip() not in cleaned.replace(HIDDEN, "\0")


def test_a_secret_that_begins_with_another_is_hidden_whole() -> None:
    redactor = Redactor()
    redactor.hide(["pass"])
    redactor.hide(["password-two"])
    assert redactor.clean("password-two") == HIDDEN


def test_short_values_are_no_secrets() -> None:
    redactor = Redactor()
    redactor.hide(["", "a", "yes"])
    assert redactor.clean("yes, a line") == "yes, a line"


def test_tracebacks_are_clean_too() -> None:
    redactor = Redactor()
    redactor.hide(["hunter22"])
    record = _record("it failed")
    error = ValueError("key hunter22 is wrong")
    record.exc_info = (type(error), error, None)
    line = JsonFormatter(redactor).format(record)
    assert "hunter22" not in line
    assert "ValueError" in json.loads(line)["error"]


def test_a_json_line_has_simple_extras_and_no_objects() -> None:
    line = json.loads(JsonFormatter(Redactor()).format(_record("seen", domain="demo", attempt=2, body={"spec": "x"})))
    assert line["message"] == "seen"
    assert (line["level"], line["logger"], line["domain"], line["attempt"]) == (
        "info",
        "vmsnapshot_operator.x",
        "demo",
        2,
    )
    assert "body" not in line
    assert line["time"].endswith("+00:00")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("log_format", ["json", "text"])
def test_configured_once_each_line_comes_once(log_format: str) -> None:
    stream = io.StringIO()
    logs.configure(log_format, stream=io.StringIO())
    logs.configure(log_format, stream=stream)
    logging.getLogger("vmsnapshot_operator.test").info("hello")
    logging.getLogger("vmsnapshot_operator.test").debug("not this")
    logging.getLogger("kopf.objects").info("nor that")
    (line,) = stream.getvalue().splitlines()
    assert "hello" in line
    assert line.startswith("{") == (log_format == "json")


@pytest.mark.usefixtures("restored")
def test_verbose_says_more_of_ours_and_nothing_more_of_others() -> None:
    stream = io.StringIO()
    logs.configure("text", verbose=True, stream=stream)
    logging.getLogger("vmsnapshot_operator.test").debug("ours")
    logging.getLogger("kubernetes").debug("theirs")
    assert "ours" in stream.getvalue()
    assert "theirs" not in stream.getvalue()


@pytest.mark.usefixtures("restored")
def test_values_hidden_anywhere_are_hidden_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "REDACTOR", Redactor())
    stream = io.StringIO()
    logs.configure("text", stream=stream)
    logs.hide({"key": "topsecret"}.values())
    logging.getLogger("anything").warning("with topsecret")
    assert f"with {HIDDEN}" in stream.getvalue()
