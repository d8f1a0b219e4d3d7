# ruff: noqa: ASYNC109, ASYNC110 - tests of processes look at /proc until they have ended
"""The processes of a class, with drivers that hang, crash, stop, babble and lie. Deadlines here are real, but short."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmsnapshot_operator.core.driver import CutKind, CutResult, SnapshotRequest
from vmsnapshot_operator.core.volumes import Handle, Layer, Seconds, SourceKind, Volume, VolumeId
from vmsnapshot_operator.drivers import registry, wire
from vmsnapshot_operator.drivers.fence import Fence
from vmsnapshot_operator.drivers.host import DriverHost
from vmsnapshot_operator.errors import (
    AlreadyCutError,
    DriverCrashedError,
    DriverError,
    DriverTimeoutError,
    DriverUnavailableError,
)

TOYS = "tests.unit.drivers.toys"
SECRET = "hunter2"  # noqa: S105 - made up
ROOT = Path(__file__).parents[3]
LONG = 60.0  # seconds: a guard, never reached
ARRIVES = 3.0  # seconds in which an order reaches its process on a busy machine, too


def volume(name):
    return Volume(
        id=VolumeId(name), label=name, size_bytes=1, writable=Layer(kind=SourceKind.FILE, source=name, format="raw")
    )


def order(name, timeout=LONG, count=1):
    return SnapshotRequest(name=name, volumes=tuple(volume(f"v{n}") for n in range(count)), timeout=Seconds(timeout))


def make(tmp_path, toy="Toy", **options):
    return DriverHost("gold", f"{TOYS}:{toy}", {"held": str(tmp_path)}, {"password": SECRET}, **options)


@pytest.fixture
async def host(tmp_path):
    """A host whose processes are all gone at the end of a test."""
    host = make(tmp_path)
    yield host
    await host.close()
    assert host.pids == ()


async def cut(host, name, timeout=LONG):
    async with host.reserve() as slot:
        return await slot.cut(order(name, timeout))


def runs(pid):
    """Tell whether a process is running (or stopped), not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def gone(pid):
    async with asyncio.timeout(LONG):
        while runs(pid):
            await asyncio.sleep(0.01)


def held(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))


# ---------------------------------------------------------------- ordinary service


async def test_every_operation_arrives_and_is_answered(host, tmp_path):
    request = order("one", count=2)

    await host.start()
    assert host.alive
    assert (await host.capabilities(timeout=LONG)).cut is CutKind.INSTANT
    await host.prepare(request)
    async with host.reserve(request) as slot:
        assert slot.alive
        result = await slot.cut(request)
    await host.wait_ready(request, result, timeout=LONG)
    fits = await host.check_revert(result, request.volumes, timeout=LONG)
    clones = await host.clone(result, "new", timeout=LONG)
    names = await host.list("on", timeout=LONG)
    await host.delete("one", timeout=LONG)
    await host.delete("one", timeout=LONG)

    assert result.handles == {"v0": Handle("one/v0"), "v1": Handle("one/v1")}
    assert [f.ok for f in fits] == [True, True]
    assert clones["v0"].source == "/new"
    assert names == ("one",)
    assert held(tmp_path) == []
    assert len(host.pids) == 1


async def test_the_process_says_in_ps_whose_it_is_and_no_secret(host):
    await host.start()
    (pid,) = host.pids

    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    environment = Path(f"/proc/{pid}/environ").read_bytes()

    assert b"vmsnapshot_operator.drivers.worker" in arguments
    assert b"gold" in arguments
    assert f"{TOYS}:Toy".encode() in arguments
    assert Path(f"/proc/{pid}/comm").read_text() == "driver:gold\n"
    assert SECRET.encode() not in b"".join(arguments) + environment


async def test_the_operators_environment_stays_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OPERATOR_TOKEN", "for nobody else")
    host = make(tmp_path)
    await host.start()

    environment = Path(f"/proc/{host.pids[0]}/environ").read_bytes()
    await host.close()

    assert b"OPERATOR_TOKEN" not in environment


async def test_a_cut_goes_to_the_process_that_prepared_it(host):
    request = order("one")
    await host.prepare(request)
    async with host.reserve(), host.reserve(request) as slot:  # the first takes the only idle one, which prepared it
        other = await slot.cut(request)
    assert other.group.endswith(" prepared")  # by preparing again, not by luck

    again = order("two")
    async with host.reserve():
        await host.prepare(again)
        async with host.reserve(again) as slot:
            assert (await slot.cut(again)).group == f"{slot.pid} prepared"


async def test_a_request_without_reservation_of_its_own_is_cut_all_the_same(host):
    assert (await cut(host, "one")).group.endswith(" unprepared")


async def test_surplus_processes_end_when_idle_and_one_stays(tmp_path):
    host = make(tmp_path, idle_seconds=0.05)
    async with host.reserve(), host.reserve(), host.reserve():
        assert len(host.pids) == 3
    async with asyncio.timeout(LONG):
        while len(host.pids) > 1:
            await asyncio.sleep(0.01)

    assert host.alive
    await host.close()


# ---------------------------------------------------------------- what a driver says


async def test_a_drivers_error_is_bounded_printable_named_and_without_secret(host):
    with pytest.raises(DriverError) as caught:
        await cut(host, "fail")

    error = caught.value
    assert error.message.startswith(
        f'storage class "gold" (driver {TOYS}:Toy), cut: the array says: bad password [redacted]'
    )
    assert len(error.message) < 1200
    assert error.message.isprintable()
    assert error.reason == "ArrayBusy"
    assert SECRET not in repr(error)
    assert host.alive  # an error is an answer: the process goes on


async def test_any_other_exception_is_reported_by_type_and_text(host):
    with pytest.raises(DriverError, match=r"gold.*cut: ZeroDivisionError: division by \[redacted\]"):
        await cut(host, "bug")


async def test_already_cut_is_an_error_of_its_own(host):
    await cut(host, "one")
    with pytest.raises(AlreadyCutError, match=r"gold.*prepare: one was cut before"):
        await host.prepare(order("one"))


async def test_an_answer_about_other_volumes_is_refused(host):
    with pytest.raises(DriverError, match="without 1 of the volumes and with 1 others"):
        await cut(host, "wrong")


async def test_an_answer_of_another_type_is_refused(host):
    with pytest.raises(DriverError, match=r"gold.*cut: .*handles"):
        await cut(host, "junk")


async def test_reasons_and_texts_for_status_are_made_fit(host):
    fit = await host.can_handle([volume("a")], timeout=LONG)

    assert fit.reason == "DriverSaysNo"
    assert fit.message == "no [31m [redacted] 1"


async def test_names_that_were_not_asked_for_are_refused(host):
    with pytest.raises(DriverError, match='list: asked for "foreign", the driver named "other-name"'):
        await host.list("foreign", timeout=LONG)


async def test_a_revert_check_needs_one_answer_per_volume(host):
    result = await cut(host, "one")
    with pytest.raises(DriverError, match="1 answers for 3 volumes"):
        await host.check_revert(result, [volume("a"), volume("b"), volume("c")], timeout=LONG)


async def test_what_a_driver_prints_is_logged_bounded_and_without_secrets(host, caplog):
    caplog.set_level(logging.INFO)
    await cut(host, "loud")
    async with asyncio.timeout(LONG):
        while "line 150" not in caplog.text:
            await asyncio.sleep(0.01)
    await host.close()

    assert "stdout [redacted]" in caplog.text
    assert "stderr [redacted]" in caplog.text
    assert "logged [redacted]" in caplog.text
    assert "(a line that is too long to be logged)" in caplog.text
    assert SECRET not in caplog.text
    assert "yyyy" not in caplog.text
    assert len(caplog.records) < 250


# ---------------------------------------------------------------- deadlines


async def test_a_hung_cut_is_killed_at_its_deadline_and_nobody_else_is(host, tmp_path):
    async with host.reserve() as slot, asyncio.TaskGroup() as group:
        others = [group.create_task(cut(host, f"ok-{n}")) for n in range(6)]
        began = time.monotonic()
        with pytest.raises(DriverTimeoutError) as caught:
            await slot.cut(order("hang", 0.3))
        took = time.monotonic() - began
        hung = slot.pid
    await gone(hung)

    assert "gold" in caught.value.message
    assert "cut: no answer within 0.3 s" in caught.value.message
    assert took < LONG  # it would have hung for an hour
    assert len({t.result().group.split()[0] for t in others} - {str(hung)}) >= 1
    assert held(tmp_path) == [f"ok-{n}" for n in range(6)]
    assert await cut(host, "after")


async def test_a_process_that_was_stopped_past_its_deadline_cannot_go_on(host, tmp_path):
    async with host.reserve() as slot:
        with pytest.raises(DriverTimeoutError):
            await slot.cut(order("stop", 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(slot.pid, signal.SIGCONT)
        await gone(slot.pid)

    assert held(tmp_path) == []


async def test_a_cut_that_its_attempts_end_forbids_is_not_begun(host, tmp_path):
    async with host.reserve() as slot:
        with pytest.raises(DriverError, match="nothing was done"):
            await slot.cut(order("late"), until=wire.boottime() - 1)
    assert held(tmp_path) == []


async def test_one_that_was_begun_in_time_goes_on(host, tmp_path, monkeypatch):
    # The lease as it is known when the order is sent is renewed meanwhile, and the driver does not know of it.
    async with host.reserve() as slot:
        await slot.prepare(order("sleep"))
        begin = wire.boottime() + 1.0  # it is there already, and sleeps for longer
        assert await slot.cut(order("sleep"), until=begin)
    assert wire.boottime() > begin
    assert held(tmp_path) == ["sleep"]


async def test_what_makes_something_ends_by_itself_and_does_not_begin_when_another_instance_may_act(tmp_path):
    fence = Fence()
    host = make(tmp_path, fence=fence.fd)
    held = CutResult(handles={VolumeId("v0"): Handle("h")}, atomic=True)
    try:
        await host.start()
        fence.tell(wire.boottime() + ARRIVES)
        with pytest.raises(DriverCrashedError):
            await host.wait_ready(order("stall"), held, timeout=LONG)
        for name, operation in (("late", "cut"), ("late", "prepare")):
            async with host.reserve() as slot:
                with pytest.raises(DriverError, match="nothing was done"):
                    await getattr(slot, operation)(order(name))
        with pytest.raises(DriverError, match="nothing was done"):
            await host.wait_ready(order("stall"), held, timeout=LONG)
        assert list(tmp_path.iterdir()) == []
        assert await host.list("", timeout=LONG) == (), "who only looks may do so"
        for name, operation in (("wait", "cut"), ("slow-prepare", "prepare")):
            async with host.reserve() as slot:
                fence.tell(wire.boottime() + ARRIVES)
                with pytest.raises(DriverCrashedError):
                    await getattr(slot, operation)(order(name))
        fence.tell(wire.boottime() + ARRIVES)
        with pytest.raises(DriverCrashedError):
            await host.wait_ready(order("child"), held, timeout=LONG)
        await gone(int((tmp_path / ".child").read_text()))  # who copies may be a program that the driver started
        fence.tell(wire.boottime() + LONG)
        await host.wait_ready(order("fine"), held, timeout=LONG)
    finally:
        await host.close()
        fence.close()


async def test_an_answer_that_waited_in_the_socket_past_the_deadline_is_not_used(host, tmp_path):
    async with host.reserve() as slot:
        task = asyncio.create_task(slot.cut(order("ok", 0.2)))
        await asyncio.sleep(0)  # the request is sent
        time.sleep(0.6)  # noqa: ASYNC251 - the operator itself stands still, while the driver answers in time
        with pytest.raises(DriverTimeoutError):
            await task
        assert not slot.alive


async def test_a_cancelled_cut_is_killed_at_once(host, tmp_path):
    async with host.reserve() as slot:
        task = asyncio.create_task(slot.cut(order("hang")))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < LONG  # it would have hung for an hour
        assert not slot.alive
        await gone(slot.pid)
        with pytest.raises(DriverCrashedError):
            await slot.cut(order("again"))

    assert held(tmp_path) == []


async def test_the_first_failure_of_a_window_ends_the_other_cuts(tmp_path):
    good, bad = make(tmp_path), make(tmp_path)
    async with good.reserve() as slow, bad.reserve() as broken:
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the group is what raises
            async with asyncio.TaskGroup() as cuts:
                cuts.create_task(slow.cut(order("hang")))
                cuts.create_task(broken.cut(order("fail")))
        assert caught.group_contains(DriverError, match="the array says")
        assert not slow.alive
        assert broken.alive
    await good.close()
    await bad.close()


async def test_waiting_for_a_process_is_bounded(tmp_path):
    host = make(tmp_path, max_workers=2)
    async with host.reserve(), host.reserve():
        with pytest.raises(DriverTimeoutError, match=r"capabilities: all 2 processes were busy for 0\.1 s"):
            await host.capabilities(timeout=0.1)
        with pytest.raises(DriverTimeoutError, match="reserve: all 2 processes were busy"):
            async with host.reserve(timeout=0.1):
                pytest.fail("a third process of two")
    assert await host.capabilities(timeout=LONG)
    await host.close()


async def test_a_copy_lives_as_long_as_it_tells_of_its_progress(host):
    request = order("copy-8")  # 4 s
    result = await cut(host, "copy-8")
    told = []

    await host.wait_ready(request, result, timeout=LONG, stall=3.0, on_progress=told.append)

    assert [p.total_bytes for p in told] == [100] * len(told)
    done = [p.done_bytes for p in told]
    assert len(done) >= 2
    assert done == sorted(set(done))
    assert (await host.capabilities(timeout=LONG)).clone, "a late word was taken for the answer"


async def test_a_copy_that_tells_of_no_progress_is_ended_before_its_time_is_up(host):
    result = await cut(host, "stall")
    pids = host.pids
    with pytest.raises(DriverTimeoutError, match=r"wait_ready: no progress for 0\.2 s; its process \d+ was killed"):
        await host.wait_ready(order("stall"), result, timeout=LONG, stall=0.2)
    await gone(pids[0])
    assert await cut(host, "after")


async def test_a_copy_has_to_be_done_in_time_however_well_it_goes_on(host):
    result = await cut(host, "copy-1000")
    with pytest.raises(DriverTimeoutError, match=r"no answer within 3 s, \d of 100 bytes done"):
        await host.wait_ready(order("copy-1000"), result, timeout=3.0, stall=LONG)


async def test_copies_do_not_hold_up_cuts(tmp_path):
    host = make(tmp_path, max_workers=1)
    result = await cut(host, "stall")
    copying = asyncio.create_task(host.wait_ready(order("stall"), result, timeout=LONG))
    await asyncio.sleep(0)
    assert await cut(host, "meanwhile")
    assert not copying.done()
    copying.cancel()
    await asyncio.wait([copying])
    await host.close()


async def test_a_prepare_inside_of_a_reservation_is_bounded(host):
    await host.start()
    with pytest.raises(DriverTimeoutError, match="prepare: no answer"):
        async with host.reserve(order("slow-prepare"), timeout=1.0):
            pytest.fail("nothing was prepared")
    assert await cut(host, "after")


async def test_processes_that_cannot_be_killed_do_not_pile_up(tmp_path, monkeypatch):
    host = make(tmp_path, max_workers=1)
    await host.start()
    monkeypatch.setattr(os, "killpg", lambda pid, number: None)  # as if they were in uninterruptible sleep
    for name in ("stop-1", "stop-2"):
        async with host.reserve() as slot:
            slot._process._process.send_signal(signal.SIGSTOP)
            with pytest.raises(DriverTimeoutError):
                await slot.cut(order(name, 0.1))

    with pytest.raises(DriverUnavailableError, match=r"2 killed processes do not end \(\d+, \d+\)"):
        await host.capabilities(timeout=LONG)
    monkeypatch.undo()
    await host.close()
    assert host.pids == ()


# ---------------------------------------------------------------- crashes


async def test_a_crash_is_told_from_a_timeout_and_the_next_request_is_served(host):
    with pytest.raises(DriverCrashedError, match=r"gold.*cut: its process .* before it answered"):
        await cut(host, "abort")
    assert await cut(host, "after")


async def test_an_idle_process_that_was_killed_is_replaced(host):
    await host.start()
    (pid,) = host.pids
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(LONG):
        while host.pids:
            await asyncio.sleep(0.01)

    assert not host.alive
    assert await host.capabilities(timeout=LONG)
    assert host.alive


async def test_a_reserved_process_that_died_is_seen_before_the_freeze(host):
    async with host.reserve() as slot:
        os.kill(slot.pid, signal.SIGKILL)
        async with asyncio.timeout(LONG):
            while slot.alive:
                await asyncio.sleep(0.01)
        with pytest.raises(DriverCrashedError):
            await slot.cut(order("one"))


async def test_a_closed_host_serves_nobody(tmp_path):
    host = make(tmp_path)
    async with host.reserve() as slot:
        task = asyncio.create_task(slot.cut(order("hang")))
        await asyncio.sleep(0.05)
        await host.close()
        with pytest.raises(DriverCrashedError):
            await task
    with pytest.raises(DriverUnavailableError, match="removed or changed"):
        await host.capabilities(timeout=LONG)
    assert host.pids == ()


# ---------------------------------------------------------------- start


@pytest.mark.parametrize(
    ("toy", "match", "reason"),
    [
        ("DiesAtStart", "start: its process .* ended before it was ready: .*", "DriverUnavailable"),
        (
            "RaisesAtStart",
            r"start: the driver .* does not start: RuntimeError: no luck with \[redacted\]",
            registry.NOT_LOADABLE,
        ),
        ("Lacking", "start: .* does not follow the contract", registry.NOT_LOADABLE),
        ("Nothing", "start: .* AttributeError", registry.NOT_LOADABLE),
    ],
)
async def test_why_a_driver_does_not_start_is_said(tmp_path, toy, match, reason):
    host = make(tmp_path, toy)
    with pytest.raises(DriverUnavailableError, match=match) as caught:
        await host.start()
    await host.close()

    assert caught.value.reason == reason
    assert "gold" in caught.value.message
    assert SECRET not in caught.value.message


async def test_a_driver_that_hangs_while_it_starts_is_killed(tmp_path):
    host = make(tmp_path, "HangsAtStart")
    with pytest.raises(DriverUnavailableError, match="was not ready in time and was killed"):
        await host.start(timeout=1.0)
    assert not host.alive
    await host.close()


async def test_a_driver_that_is_not_installed(tmp_path):
    host = DriverHost("gold", "no-such-driver", {}, {})
    with pytest.raises(DriverUnavailableError, match=r'gold.*start: no storage driver "no-such-driver"') as caught:
        await host.start()
    assert caught.value.reason == registry.NOT_INSTALLED
    await host.close()


async def test_wrong_parameters_are_found_out_at_the_start():
    host = DriverHost("gold", f"{TOYS}:Toy", {}, {"password": SECRET})
    with pytest.raises(DriverUnavailableError, match=r'gold.*start: parameter "held": Field required') as caught:
        await host.start()
    assert (caught.value.reason, caught.value.retryable) == (registry.INVALID_PARAMETERS, False)
    await host.close()


async def test_a_class_shows_no_secret_when_printed(host):
    await host.start()
    assert SECRET not in repr(host._setup) + repr(host) + str(vars(host)["_setup"])


# ---------------------------------------------------------------- the operator's own end

OPERATOR = """
import asyncio, sys
from vmsnapshot_operator.core.driver import SnapshotRequest
from vmsnapshot_operator.drivers.fence import Fence
from vmsnapshot_operator.drivers.host import DriverHost

async def main():
    host = DriverHost("gold", "tests.unit.drivers.toys:Toy", {"held": sys.argv[1]}, {})
    async with host.reserve() as slot, host.reserve():
        print(slot.pid, *(p for p in host.pids if p != slot.pid), flush=True)
        await slot.cut(SnapshotRequest(name=sys.argv[2], volumes=(), timeout=float(sys.argv[3])))

asyncio.run(main())
"""


@contextlib.contextmanager
def operator(tmp_path, name, seconds):
    with subprocess.Popen(
        [sys.executable, "-c", OPERATOR, str(tmp_path), name, str(seconds)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'operator'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            yield process, [int(p) for p in process.stdout.readline().split()]
        finally:
            process.kill()


async def test_killing_the_operator_ends_its_drivers_busy_or_idle(tmp_path):
    with operator(tmp_path, "hang", 3600) as (process, pids):
        assert len(pids) == 2
        assert all(runs(p) for p in pids)
        process.kill()
        for pid in pids:
            await gone(pid)


async def test_a_stopped_operator_cannot_have_a_cut_finished_late(tmp_path):
    with operator(tmp_path, "hang", 0.5) as (process, pids):
        async with asyncio.timeout(LONG):
            while not (tmp_path / ".hangs").exists():
                await asyncio.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        await gone(pids[0])  # by its own alarm: nobody else is awake to end it
        assert runs(pids[1])

    assert held(tmp_path) == []


@pytest.mark.parametrize("how", ["well", "kind", "name", "folder", "same"])
async def test_the_hypervisor_copies_only_into_files_that_show_whose_they_are(tmp_path, how):
    host = make(tmp_path, "Copied")
    try:
        async with host.reserve() as slot:
            if how == "well":
                found = await slot.targets(order("well-1", count=2))
                assert {layer.source for layer in found.values()} == {"/held/well-1-v0", "/held/well-1-v1"}
                return
            with pytest.raises(DriverError, match="one file for each volume"):
                await slot.targets(order(f"{how}-1", count=2))
    finally:
        await host.close()
