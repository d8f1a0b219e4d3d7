"""Who may not see a domain gets what he would get if it were not there, whatever state the hosts of the pool are in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vmsnapshot_operator.errors import DomainGoneError, HypervisorError, HypervisorUnreachableError
from vmsnapshot_operator.hypervisors.domains import Hypervisor

UUID, OTHER = "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0000", "6ee5d4b8-9d0f-4d0c-9e5c-0b4f0b1c0001"
HERE = ("demo", UUID, True)

pytestmark = pytest.mark.looptime


def pool(**answers: tuple[str, str, bool] | None) -> Hypervisor:
    """Hosts that have this domain, or (None) do not answer for 15 s."""
    made = Hypervisor("pool", {name: f"test:///{name}" for name in answers})
    for name, answer in answers.items():

        async def look(_what: str, _function: object, domain: str, *, found: Any = answer, host: str = name) -> Any:
            if found is None:
                await asyncio.sleep(15)
                raise HypervisorError(f"{host} does not answer")
            if domain not in found[:2]:
                raise DomainGoneError("it has none")
            return (*found, ())

        made._hosts[name].look = look  # type: ignore[method-assign]  # a stand-in
    return made


async def outcome(hosts: Hypervisor, domain: str, *, may: bool) -> tuple[str, str, float]:
    """What whoever asks is told, and after how long."""
    start = asyncio.get_running_loop().time()
    try:
        told = str(await hosts.find(domain, lambda _name: may))
    except HypervisorError as error:
        told = error.message.replace(domain, "D")
        return type(error).__name__, told, asyncio.get_running_loop().time() - start
    return "found", told, asyncio.get_running_loop().time() - start


@pytest.mark.parametrize("domain", ["demo", UUID])
@pytest.mark.parametrize(
    ("hosts", "error"),
    [
        ({"a": HERE, "b": ("x", OTHER, True)}, DomainGoneError),
        ({"a": HERE, "b": None}, HypervisorUnreachableError),
        ({"a": ("demo", UUID, False), "b": None}, HypervisorUnreachableError),
        ({"a": HERE, "b": ("demo", OTHER, True)}, DomainGoneError),
    ],
    ids=["all answer", "one is silent", "off, one is silent", "two of that name"],
)
async def test_forbidden_and_missing_are_the_same(hosts: dict[str, Any], error: type[Exception], domain: str) -> None:
    forbidden = await outcome(pool(**hosts), domain, may=False)
    missing = await outcome(pool(**hosts), "absent", may=True)
    assert forbidden == missing
    assert forbidden[0] == error.__name__


async def test_who_may_see_it_waits_for_no_silent_host_if_it_is_named_by_its_uuid() -> None:
    kind, told, after = await outcome(pool(a=HERE, b=None), UUID, may=True)
    assert (kind, after) == ("found", 0.0), told
