"""The truth test must not be fooled: by an order that is broken, by damage, by a journal that was not replayed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.lab import LabError, truth


def log(*numbers: int) -> bytes:
    return b"".join(f"{n:<16} {0:2} {'text':<43}".encode()[: truth.RECORD - 1] + b"\n" for n in numbers)


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is full after four records."""
    monkeypatch.setattr(truth, "SLOTS", 4)


@pytest.mark.parametrize(
    ("held", "last"),
    [
        (b"", 0),
        (log(1), 1),
        (log(1, 2, 3), 3),
        (log(1, 2, 3)[:-10], 2),
        (log(1, 2, 3, 4), 4),
        (log(5, 2, 3, 4), 5),
        (log(9, 10, 7, 8), 10),
    ],
    ids=["empty", "one", "three", "a piece of the third", "full", "the first again", "twice around"],
)
@pytest.mark.usefixtures("ring")
def test_the_last_record(held: bytes, last: int) -> None:
    assert truth.last_record(held, "disk") == last


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (log(1, 3), "slot 1"),
        (log(1, 1), "slot 1"),
        (log(2), "slot 0"),
        (log(5, 2, 7, 4), "slot"),
        (log(5, 2, 3), "slot 3"),
        (log(1) + bytes(64) + log(3), "slot 1 cannot be read"),
    ],
    ids=["missing", "repeated", "the beginning is missing", "one of another round", "shorter than the ring", "zeroes"],
)
@pytest.mark.usefixtures("ring")
def test_a_log_that_is_not_what_the_writer_wrote_is_refused(held: bytes, words: str) -> None:
    with pytest.raises(LabError, match=words):
        truth.last_record(held, "disk")


def file_system(path: Path, content: bytes | None) -> Path:
    """An ext4 file system with a log in it."""
    with path.open("wb") as raw:
        raw.truncate(8 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-F", str(path)], check=True)
    if content is not None:
        source = path.with_suffix(".log")
        source.write_bytes(content)
        subprocess.run(["debugfs", "-w", "-R", f"write {source} log", str(path)], check=True, capture_output=True)
    return path


def test_records_are_read_from_the_file_system(tmp_path: Path) -> None:
    raw = file_system(tmp_path / "disk.raw", log(*range(1, 100)))
    assert truth.records(raw) == 99
    assert truth.fsck(raw) == truth.CLEAN


def test_no_log_is_no_record(tmp_path: Path) -> None:
    assert truth.records(file_system(tmp_path / "disk.raw", None)) == 0


def test_what_is_no_file_system_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(1 << 20))
    with pytest.raises(LabError, match=r"disk\.raw"):
        truth.records(raw)
    assert truth.fsck(raw) != truth.CLEAN


def test_a_journal_that_was_not_replayed_is_not_clean(tmp_path: Path) -> None:
    raw = file_system(tmp_path / "disk.raw", log(1))
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", str(raw)], check=True, capture_output=True)
    assert truth.fsck(raw) == truth.NOT_REPLAYED


def test_damage_is_told(tmp_path: Path) -> None:
    raw = file_system(tmp_path / "disk.raw", log(1))
    subprocess.run(["debugfs", "-w", "-R", "clri <12>", str(raw)], check=True, capture_output=True)
    assert truth.fsck(raw).startswith("exit 4")


def test_a_volume_is_fetched_as_it_is(tmp_path: Path) -> None:
    raw = file_system(tmp_path / "disk.raw", log(1, 2))
    truth.fetch_file(raw, tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == raw.read_bytes()
