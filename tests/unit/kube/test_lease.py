"""At most one instance believes to be the leader at any moment, whatever happens to requests, processes and clocks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kube.fake_api import FakeClient
from vmsnapshot_operator.errors import KubeUnavailableError
from vmsnapshot_operator.kube.cluster import Cluster
from vmsnapshot_operator.kube.lease import NAME, Durations, Leadership, Seen, Step, choose
from vmsnapshot_operator.strategies.window import LEASE_AT_BEGIN, LEASE_MARGIN

PATH = f"/apis/coordination.k8s.io/v1/namespaces/system/leases/{NAME}"


class Clock:
    """A clock that goes on when told to; both instances are on one machine here, but never compare readings."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def api() -> FakeClient:
    return FakeClient()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _instance(api: FakeClient, clock: Clock, identity: str = "one", **durations: float) -> Leadership:
    cluster = Cluster(namespace="system")
    cluster.client = api
    return Leadership(cluster, identity=identity, durations=Durations(**durations), clock=clock)


def _lease(holder: str, version: str = "1", duration: int = 15) -> dict[str, Any]:
    return {
        "metadata": {"resourceVersion": version},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": duration},
    }


@pytest.mark.parametrize(
    ("lease", "seen", "now", "step"),
    [
        (None, None, 0.0, Step.CREATE),
        (_lease("one"), None, 0.0, Step.RENEW),
        (_lease(""), None, 0.0, Step.TAKE),
        (_lease("two"), None, 99.0, Step.WAIT),
        (_lease("two"), Seen(version="1", since=0.0), 15.0, Step.WAIT),
        (_lease("two"), Seen(version="1", since=0.0), 15.1, Step.TAKE),
        (_lease("two", version="2"), Seen(version="1", since=0.0), 99.0, Step.WAIT),
        (_lease("two", duration=60), Seen(version="1", since=0.0), 59.0, Step.WAIT),
    ],
)
def test_what_to_do_with_a_lease(lease: dict[str, Any] | None, seen: Seen | None, now: float, step: Step) -> None:
    assert choose(lease, "one", seen, now) is step


async def test_it_holds_as_long_as_the_lease_and_no_longer(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock)
    assert not one.is_leader()
    await one._try()
    assert one.is_leader()
    assert one.is_leader(9.9)
    assert not one.is_leader(10.0)
    assert one.until == clock.now + 10.0
    clock.now += 10.0  # the process was stopped, or the machine slept: nothing ran meanwhile
    assert not one.is_leader()
    await one._try()
    assert one.is_leader(), "nobody else came"


async def test_a_term_is_counted_where_another_may_have_held_it(api: FakeClient, clock: Clock) -> None:
    one, two = _instance(api, clock), _instance(api, clock, "two")
    await one._try()
    await one._try()
    clock.now += 99.0  # stopped, and nobody else came
    await one._try()
    assert (one.term, two.term) == (1, 0)
    await two._try()
    clock.now += 99.0
    await two._try()
    for _ in range(2):  # that it lost it; whose it is
        await one._try()
    clock.now += 99.0
    await one._try()
    assert (one.term, two.term) == (2, 1)


async def test_time_counts_from_before_the_request(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock)

    def slow(method: str, path: str) -> None:
        clock.now += 1.4

    api.before = slow
    await one._try()  # a GET and a POST, 1.4 seconds each
    assert one.is_leader(8.5)
    assert not one.is_leader(8.7)


async def test_another_waits_until_it_is_over_and_then_takes_it(api: FakeClient, clock: Clock) -> None:
    one, two = _instance(api, clock), _instance(api, clock, "two")
    await one._try()
    for _ in range(6):
        await two._try()
        assert not two.is_leader()
        clock.now += 2.0
    assert not one.is_leader()
    await two._try()
    assert two.is_leader()
    assert api.objects[PATH]["spec"]["leaseTransitions"] == 2
    await one._try()
    assert not one.is_leader(), "it sees that it was taken"


async def test_a_renewed_lease_is_never_taken(api: FakeClient, clock: Clock) -> None:
    one, two = _instance(api, clock), _instance(api, clock, "two")
    for _ in range(50):
        await one._try()
        await two._try()
        assert one.is_leader()
        assert not two.is_leader()
        clock.now += 2.0


async def test_a_silent_api_server_takes_it_away(
    api: FakeClient, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one = _instance(api, clock)
    await one._try()

    def silent(method: str, path: str) -> None:
        raise KubeUnavailableError("no answer")

    api.before = silent
    for _ in range(9):
        clock.now += 1.0
        await one._try()
        assert one.is_leader()
    clock.now += 1.0
    assert not one.is_leader()
    assert caplog.text.count("was not renewed") == 1, "said once, not each time"
    api.before = lambda _method, _path: None
    await one._try()
    assert one.is_leader()


async def test_a_lost_answer_counts_as_the_worse_of_both(api: FakeClient, clock: Clock) -> None:
    """The renewal for a shorter time was stored, its answer lost: others count by the shorter time."""
    one = _instance(api, clock)
    await one._try()
    async with one.outlasting(100.0) as ours:
        assert ours
    put = api.put

    def lose(path: str, body: Any) -> Any:
        put(path, body)
        raise KubeUnavailableError("the answer got lost")

    api.put = lose  # type: ignore[method-assign]  # the failure is the point
    await one._try()
    assert not one.is_leader(10.0)
    assert one.is_leader(9.0)


async def test_a_lease_deleted_by_hand_is_made_again(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock)
    await one._try()
    del api.objects[PATH]
    await one._try()
    await one._try()
    assert PATH in api.objects
    assert one.is_leader()


async def test_a_lease_given_to_another_by_hand_is_respected(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock)
    await one._try()
    lease = api.objects[PATH]
    api.put(PATH, {**lease, "spec": {**lease["spec"], "holderIdentity": "two"}})
    await one._try()
    await one._try()
    assert not one.is_leader()


async def test_outlasting_holds_for_its_whole_time(api: FakeClient, clock: Clock) -> None:
    one, two = _instance(api, clock), _instance(api, clock, "two")
    await one._try()
    async with one.outlasting(35.0) as ours:
        assert ours
        await two._try()
        clock.now += 35.0  # stopped: it never renewed
        await two._try()
        assert not two.is_leader()
    assert one.is_leader()


async def test_renewals_inside_do_not_shorten_it(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock)
    await one._try()
    async with one.outlasting(35.0):
        await one._try()
        assert one.is_leader(35.0)
        clock.now += 30.0
        await one._try()
    await one._try()
    assert not one.is_leader(10.0), "afterwards the usual time is enough"


async def test_outlasting_writes_nothing_that_is_not_needed(api: FakeClient, clock: Clock) -> None:
    one = _instance(api, clock, lease=60.0)
    await one._try()
    api.requests.clear()
    async with one.outlasting(35.0) as ours:
        assert ours
    assert api.requests == []


async def test_who_does_not_lead_outlasts_nothing(api: FakeClient, clock: Clock) -> None:
    one, two = _instance(api, clock), _instance(api, clock, "two")
    await one._try()
    async with two.outlasting(35.0) as ours:
        assert not ours


@pytest.mark.looptime
async def test_a_clean_end_lets_another_begin_at_once(api: FakeClient, clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    one, two = _instance(api, clock), _instance(api, clock, "two")
    one._clock = two._clock = loop.time
    running = asyncio.create_task(one.run())
    await asyncio.sleep(60)
    assert one.is_leader()
    running.cancel()
    await asyncio.wait({running})
    assert not one.is_leader()
    await two._try()
    assert two.is_leader()


async def test_a_thread_may_ask_while_the_lease_is_lost(api: FakeClient) -> None:
    one = _instance(api, Clock())
    await one._try()
    assert one.is_leader()

    def lose() -> float:
        one._valid_until = None
        return 0.0

    one._clock = lose  # it happens between two words of the same question
    assert one.is_leader() in (True, False)


def test_a_window_makes_nobody_wait_longer() -> None:
    usual = Durations()
    assert LEASE_MARGIN < LEASE_AT_BEGIN
    assert LEASE_AT_BEGIN + usual.retry <= usual.lease
    assert 2 * (usual.retry + usual.request) <= usual.lease, "one renewal may come to nothing"
    assert Durations.of(usual.lease) == usual
    first = usual.retry + usual.request  # since the last one that succeeded, when the first one is given up
    assert usual.lease - LEASE_MARGIN - (first + usual.retry) == 1.0, "what the next one has before all is ended"


@pytest.mark.parametrize("lease", [10.0, 30.0, 60.0])
def test_another_has_taken_over_5_seconds_after_a_lease_of_any_length(lease: float) -> None:
    slowest = 1.0
    assert Durations.of(lease).retry + 4 * slowest <= 5.0


@pytest.mark.looptime
@pytest.mark.parametrize("answer", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("dies", [30.0, 30.3, 30.7, 31.1, 31.6])
async def test_another_takes_over_within_15_seconds_of_a_death(api: FakeClient, answer: float, dies: float) -> None:
    """Every request takes as long as the proof allows; the holder dies in the middle of a window."""
    loop = asyncio.get_running_loop()
    real = api.get, api.request

    async def get(*given: Any) -> Any:
        await asyncio.sleep(answer / 2)  # what is read is how it was on the way
        found = await real[0](*given)
        await asyncio.sleep(answer / 2)
        return found

    async def request(*given: Any) -> Any:
        await asyncio.sleep(answer / 2)
        found = await real[1](*given)
        await asyncio.sleep(answer / 2)
        return found

    api.get, api.request = get, request  # type: ignore[method-assign]  # slower, and the same
    one, two = _instance(api, Clock()), _instance(api, Clock(), "two")
    one._clock = two._clock = loop.time
    first = asyncio.create_task(one.run())
    await asyncio.sleep(0.1)
    second = asyncio.create_task(two.run())
    await asyncio.sleep(dies)
    async with one.outlasting(LEASE_AT_BEGIN) as ours:
        assert ours
        died = loop.time()
        one._release = asyncio.Event().wait  # type: ignore[method-assign, assignment]  # killed: it gives nothing back
        first.cancel()
        while not two.is_leader():
            assert loop.time() - died < 15.0
            await asyncio.sleep(0.01)
    assert not one.is_leader(), "it stopped acting before"
    for task in (first, second):
        task.cancel()
    two._release = asyncio.Event().set  # type: ignore[method-assign, assignment]  # as above
    await asyncio.sleep(0)


@pytest.mark.looptime
async def test_an_end_in_the_middle_of_a_window_keeps_others_out(api: FakeClient) -> None:
    loop = asyncio.get_running_loop()
    clock = Clock()
    one, two = _instance(api, clock), _instance(api, clock, "two")
    one._clock = two._clock = loop.time
    running = asyncio.create_task(one.run())
    await asyncio.sleep(5)
    async with one.outlasting(35.0):
        running.cancel()
        await asyncio.wait({running})
        assert not one.is_leader()
        until = loop.time() + 35.0
        while loop.time() < until:
            await two._try()
            assert not two.is_leader()
            await asyncio.sleep(2.0)


_ACTIONS = st.lists(
    st.tuples(st.sampled_from(["one", "two", "both silent", "lose answer"]), st.floats(0.0, 20.0)), max_size=40
)


@settings(deadline=None)
@given(_ACTIONS)
def test_never_two_leaders(actions: list[tuple[str, float]]) -> None:
    """Any mixture of renewals, silence, lost answers and stopped processes."""

    async def play() -> None:
        api, clock = FakeClient(), Clock()
        instances = {i: _instance(api, clock, i) for i in ("one", "two")}
        put = api.put
        for action, seconds in actions:
            if action in instances:
                await instances[action]._try()
            elif action == "lose answer":

                def lose(path: str, body: Any) -> Any:
                    put(path, body)
                    raise KubeUnavailableError("the answer got lost")

                api.put = lose  # type: ignore[method-assign]  # the failure is the point
                await instances["one"]._try()
                api.put = put  # type: ignore[method-assign]  # as above
            clock.now += seconds
            assert sum(i.is_leader() for i in instances.values()) <= 1

    asyncio.run(play())
