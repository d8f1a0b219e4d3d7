import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmsnapshot_operator.drivers.redaction import MAX_CHARACTERS, printable, redactor

SECRET = 'p"a ss/w\\örd+=='  # noqa: S105 - made up


@pytest.mark.parametrize(
    "spelling",
    [
        SECRET,
        repr(SECRET),
        json.dumps(SECRET),
        json.dumps(SECRET, ensure_ascii=False),
        quote(SECRET, safe=""),
        base64.b64encode(SECRET.encode()).decode(),
    ],
)
def test_a_secret_is_hidden_in_every_spelling(spelling):
    said = redactor({"password": SECRET})(f"cannot log in with {spelling}!")

    assert said.startswith("cannot log in with ")
    assert said.endswith("!")
    assert "[redacted]" in said
    assert "ss/w" not in said
    assert "a%20ss" not in said


def test_a_key_of_several_lines_is_hidden_line_by_line():
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEF\nAASCBKcwggSjAgEAAoIBAQC7VJT\n-----END KEY-----\n"
    hide = redactor({"tls.key": key})

    assert [hide(line) for line in key.splitlines()] == ["[redacted]"] * 4


def test_a_longer_secret_is_hidden_whole_when_it_begins_with_another():
    assert redactor({"a": "tiger", "b": "tiger-lily"})("is it tiger-lily?") == "is it [redacted]?"


def test_without_secrets_nothing_is_touched():
    assert redactor({"password": ""})("as it is") == "as it is"


@given(st.text(max_size=3000))
def test_printable_is_one_bounded_line(text):
    shown = printable(text)

    assert len(shown) <= MAX_CHARACTERS
    assert all(c.isprintable() for c in shown)


def test_printable_keeps_ordinary_text():
    assert printable("no\nroom\x1b[31m left\t(3 of 4)") == "no room [31m left (3 of 4)"
