"""What the judge makes of what a snapshot's volumes hold, without any: the least that each claim needs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chaos import claims
from tests.chaos.claims import Expected, Read

STILL = {t: Read(records=7, fsck="clean") for t in ("vda", "vdb", "vdc")}
DIRTY = "journal not replayed"
NOTHING = Expected()


def told(whole: str, **each: str) -> dict[str, Any]:
    volumes = [{"target": t, "consistency": each.get(t, whole), "handle": t} for t in STILL]
    return {"consistency": whole, "volumes": volumes}


def lies(
    whole: str, found: dict[str, Read], expected: Expected = NOTHING, *, content: dict[str, Any] | None = None
) -> list[str]:
    spec = told(whole) if content is None else content
    return list(claims.of_ready({"status": told(whole)}, {"spec": spec}, found, expected))


def counted(a: int, b: int, c: int, fsck: str = DIRTY) -> dict[str, Read]:
    return {t: Read(records=n, fsck=fsck) for t, n in zip(STILL, (a, b, c), strict=True)}


@pytest.mark.parametrize("claim", ["Filesystem", "Crash", "PerVolume", "Unknown"])
def test_a_still_moment_bears_out_every_claim(claim: str) -> None:
    assert lies(claim, STILL) == []


@pytest.mark.parametrize(
    ("found", "most"),
    [
        (counted(7, 7, 7, "clean"), "Filesystem"),
        (counted(7, 7, 7), "Crash"),
        (counted(7, 7, 6, "clean"), "Crash"),
        (counted(7, 7, 6), "Crash"),
        (counted(7, 6, 6), "Crash"),
        (counted(7, 6, 7), "PerVolume"),
        (counted(7, 6, 5), "PerVolume"),
        (counted(6, 7, 7), "PerVolume"),
        (counted(9, 265, 275), "PerVolume"),
        ({**STILL, "vdb": Read(damaged="not a file system")}, "Unknown"),
        ({**STILL, "vdb": Read(missing="gone")}, ""),
    ],
)
def test_no_more_can_be_claimed_than_what_is_there(found: dict[str, Read], most: str) -> None:
    for claim in claims.ORDER[1:]:
        assert bool(lies(claim, found)) == (claims.rank(claim) > claims.rank(most)), claim


def test_each_volume_bears_out_its_own_claim() -> None:
    found = {**STILL, "vdc": Read(records=40, fsck=DIRTY)}
    mixed = told("PerVolume", vda="Filesystem", vdb="Filesystem", vdc="PerVolume")
    body = {"status": mixed}
    assert list(claims.of_ready(body, {"spec": mixed}, found, Expected())) == []
    forged = told("PerVolume", vda="Filesystem", vdb="Filesystem", vdc="Filesystem")
    assert list(claims.of_ready({"status": forged}, {"spec": forged}, found, Expected()))


def test_status_claims_no_more_than_the_content() -> None:
    said = lies("Crash", STILL, content=told("PerVolume"))
    assert said[0] == "its status claims Crash, its VMSnapshotContent PerVolume"
    assert lies("PerVolume", STILL, content=told("Filesystem")) == [], "it may say less"


def test_the_whole_is_no_better_than_its_least_volume() -> None:
    mixed = told("Filesystem", vdb="Crash")
    said = list(claims.of_ready({"status": mixed}, {"spec": mixed}, STILL, Expected()))
    assert said == ["its status claims Filesystem of the whole and Crash of disk vdb"]


def test_a_volume_of_which_nothing_is_said_takes_nothing_away() -> None:
    body = {"status": {"consistency": "Crash"}}
    assert list(claims.of_ready(body, {"spec": told("Crash")}, STILL, Expected())) == []
    assert list(claims.of_ready(body, {"spec": told("Crash")}, counted(5, 7, 7), Expected()))


def test_an_unknown_word_is_a_lie() -> None:
    assert lies("Perfect", STILL) == ["its status claims Perfect, for which nothing gives evidence"]


@pytest.mark.parametrize(("bounds", "count"), [((7, 7), 0), ((0, 9), 0), ((8, 9), 3), ((0, 6), 3)])
def test_the_moment_is_that_of_the_snapshot(bounds: tuple[int, int], count: int) -> None:
    said = lies("Filesystem", STILL, Expected(records=bounds))
    assert len(said) == count
    assert all("of another moment" in s for s in said)


def test_a_writer_leaves_records() -> None:
    empty = counted(0, 0, 0, "clean")
    assert lies("Filesystem", empty) == []
    assert len(lies("Filesystem", empty, Expected(writer=True))) == 3


def test_no_disk_is_left_out_silently() -> None:
    expected = Expected(targets=frozenset({"vda", "vdb", "vdc", "vdd"}))
    assert lies("Crash", STILL, expected) == ["disk vdd of its VM is neither in it nor said to be left out"]
    body = {"status": {**told("Crash"), "excluded": [{"name": "vdd"}]}}
    assert list(claims.of_ready(body, {"spec": told("Crash")}, STILL, expected)) == []


def test_every_disk_of_status_has_a_handle() -> None:
    spec = told("Crash")
    del spec["volumes"][2]["handle"]
    found = {t: STILL[t] for t in ("vda", "vdb")}
    assert lies("Crash", found, content=spec) == ["it is Ready, and its VMSnapshotContent has no handle of disk vdc"]


def test_what_failed_claims_nothing() -> None:
    assert list(claims.of_failed({"status": {}})) == []
    assert list(claims.of_failed({"status": {"consistency": "Unknown"}})) == []
    assert list(claims.of_failed({"status": {"consistency": "PerVolume"}})) == ["it is Stalled, and claims PerVolume"]
