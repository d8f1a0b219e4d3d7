"""What protecting a held VM costs, and how soon one is freed whose holder died."""

from __future__ import annotations

import asyncio
import secrets
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tests.benchmarks.result import Result
from tests.integration.hypervisor_support import Guardian, Holder, connect, is_state, journal
from tests.stack import NAMESPACE, Stack, until
from vmsnapshot_operator.core.journal import Journal
from vmsnapshot_operator.core.machine import AgentState
from vmsnapshot_operator.hypervisors.guardian_link import GuardianLink
from vmsnapshot_operator.kube.cluster import Cluster

GUARDIAN_SECONDS, SWEEPER_SECONDS, TAKEOVER_SECONDS = 2.0, 5.0, 15.0

T = TypeVar("T")


def recovery(stack: Stack, pairs: int) -> Result:
    """From SIGKILL of the holder to the guest's thaw by the guardian (ours), and by the sweep from the start of a process (against).

    The process is started again under its name, as a container in its pod. One under another name waits for the lease first: told beside.
    """
    by_guardian, by_sweep, by_another = [], [], []
    for number in range(max(5, pairs // 3)):
        by_guardian.append(_by_guardian(stack))
        by_sweep.append(_by_sweep(stack, "operator"))
        if number % 2:
            by_another.append(_by_sweep(stack, f"operator-{number}"))
            stack.programs.pop(f"operator-{number}").stop()
            stack.start_operator()
    return Result(
        name="recovery",
        unit="s until thawed",
        ours=by_guardian,
        against=by_sweep,
        ours_is="guardian, from SIGKILL",
        against_is="sweep, from the start of the operator's process, without a guardian that knew of it",
        goal=f"guardian at most {GUARDIAN_SECONDS:g} s, sweep at most {SWEEPER_SECONDS:g} s",
        met=max(by_guardian) <= GUARDIAN_SECONDS and max(by_sweep) <= SWEEPER_SECONDS,
        paired=False,
        details={"sweep by a process of another name (s)": by_another},
    )


def _by_guardian(stack: Stack) -> float:
    async def run() -> float:
        hypervisor = await connect(stack.lab)
        try:
            ref = await hypervisor.find("demo")
            held = journal()
            watching = Guardian(stack.guardian_socket, stack.state / "guardian.log")
            holder = Holder(stack.lab, watching, ref, held)
            window = await hypervisor.window(ref)
            assert await window.status(2) is AgentState.FROZEN
            holder.signal(signal.SIGKILL)
            start = time.monotonic()
            while await window.status(2) is not AgentState.THAWED:  # noqa: ASYNC110 - it is asked, and does not tell
                await asyncio.sleep(0.01)
            took = time.monotonic() - start
            holder.stop()
            await asyncio.sleep(1.5)  # the guardian looks once more before it lets the journal be
            await hypervisor.clear_journal(ref, held.nonce)
            return round(took, 3)
        finally:
            await hypervisor.close()

    return asyncio.run(run())


def _by_sweep(stack: Stack, name: str) -> float:
    until("the operator leads", lambda: holder(stack) == "operator")
    stack.programs.pop("operator").kill()

    async def hold() -> None:
        async with Cluster(namespace=NAMESPACE, kubeconfig=stack.lab.kubeconfig) as cluster:
            installation = await cluster.installation()
        hypervisor = await connect(stack.lab)
        try:
            ref = await hypervisor.find("demo")
            held = journal()
            ours = Journal(
                installation=installation,
                owner_uid=held.owner_uid,
                nonce=held.nonce,
                attempt=1,
                method="GuestAgent",
                budget=120.0,
            )
            await hypervisor.write_journal(ref, ours)
            await (await hypervisor.window(ref)).freeze((), 15)
        finally:
            await hypervisor.close()

    asyncio.run(hold())
    start = time.monotonic()
    stack.start_operator(name, wait=False)

    async def free() -> None:
        hypervisor = await connect(stack.lab)
        try:
            ref = await hypervisor.find("demo")
            while not await is_state(hypervisor, ref, AgentState.THAWED):  # noqa: ASYNC110 - it is asked, and does not tell
                await asyncio.sleep(0.02)
        finally:
            await hypervisor.close()

    asyncio.run(free())
    took = time.monotonic() - start
    until("the operator leads", lambda: holder(stack) == name)
    return round(took, 3)


def costs(stack: Stack, pairs: int) -> Result:
    """Milliseconds that journal and guardian take before the freeze (ours), and after the thaw (against)."""
    before: list[float] = []
    after: list[float] = []
    parts: dict[str, list[float]] = {}

    async def timed(name: str, work: Awaitable[T]) -> float:
        start = time.perf_counter()
        await work
        took = (time.perf_counter() - start) * 1000
        parts.setdefault(name, []).append(took)
        return took

    async def run() -> None:
        hypervisor = await connect(stack.lab)
        link = GuardianLink(stack.guardian_socket)
        try:
            ref = await hypervisor.find("demo")
            for number in range(pairs + 1):
                held = journal()
                if number == 1:  # the first is to warm up
                    parts.clear()
                    before.clear()
                    after.clear()
                written = await timed("journal", hypervisor.write_journal(ref, held))
                armed = await timed("arming", link.arm(hypervisor.uri(ref), ref.uuid, held.nonce, hypervisor.uris))
                disarmed = await timed("disarming", link.disarm(held.nonce))
                cleared = await timed("clearing the journal", hypervisor.clear_journal(ref, held.nonce))
                before.append(round(written + armed, 2))
                after.append(round(disarmed + cleared, 2))
        finally:
            await link.close()
            await hypervisor.close()

    asyncio.run(run())
    return Result(
        name="costs",
        unit="ms of journal and guardian",
        ours=before,
        against=after,
        ours_is="before the freeze",
        against_is="after the thaw",
        goal="nothing inside the window",
        paired=False,
        details={
            "medians (ms)": {k: round(statistics.median(v), 1) for k, v in parts.items()},
            "driver processes": "reserved before the freeze; see the measurement `window` for what they cost inside",
        },
    )


def takeover(stack: Stack, pairs: int) -> Result:
    """From SIGKILL of the leader until a standby that runs beside it holds the lease; every other one dies while a VM is held."""
    took: list[float] = []
    stack.start_operator("standby", wait=False)
    names = ["operator", "standby"]
    for number in range(pairs):
        until("one of both holds the lease", lambda: holder(stack) in names)
        leader = holder(stack)
        time.sleep(3 + number % 7 / 7)  # it has renewed for a while, and dies at any point of its rhythm
        if number % 2:
            took.append(_killed_in_a_window(stack, leader))
        else:
            stack.programs.pop(leader).kill()
            took.append(_taken(stack, leader, time.monotonic()))
        print(f"  {leader} killed, taken over after {took[-1]} s", flush=True)
        stack.start_operator(leader, wait=False)
        time.sleep(5)  # it has read the lease before the next one dies
    for name in names:
        stack.programs.pop(name).stop()
    stack.start_operator()
    return Result(
        name="takeover",
        unit="s until a standby leads",
        ours=took[::2],
        against=took[1::2],
        ours_is="from SIGKILL of a leader that is idle",
        against_is="from SIGKILL of a leader in a window",
        goal=f"at most {TAKEOVER_SECONDS:g} s",
        met=max(took) < TAKEOVER_SECONDS,
        details={"median (s)": statistics.median(took), "longest (s)": max(took), "kills": len(took)},
    )


def holder(stack: Stack) -> str:
    """Who holds the lease, as it says."""
    return stack.lab.kubectl(
        "-n", NAMESPACE, "get", "lease", "vmsnapshot-operator", "-o", "jsonpath={.spec.holderIdentity}"
    )


def _taken(stack: Stack, before: str, start: float) -> float:
    until("another one holds the lease", lambda: holder(stack) not in ("", before))
    return round(time.monotonic() - start, 2)


def _killed_in_a_window(stack: Stack, leader: str) -> float:
    name = stack.snapshot(f"takeover-{secrets.token_hex(4)}", quiesce={"policy": "Require"})
    guest = stack.lab.guest("demo")
    until("the VM is held", lambda: "vmsnapshot:journal" in guest.domain().XMLDesc())
    stack.programs.pop(leader).kill()
    took = _taken(stack, leader, time.monotonic())
    stack.delete(name)
    return took


ALL: dict[str, Callable[[Stack, int], Result]] = {"recovery": recovery, "costs": costs, "takeover": takeover}
