"""Sweeping by hand where VMs, hypervisors or the API server do not play along; on a clock that the event loop fakes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pytest
from click.testing import CliRunner

from tests.unit.handlers import test_gates as gates
from vmsnapshot_operator.api.meta import FINALIZER
from vmsnapshot_operator.cli import main
from vmsnapshot_operator.core import names
from vmsnapshot_operator.core.chains import OverlayFile
from vmsnapshot_operator.core.journal import Journal, Phase
from vmsnapshot_operator.core.machine import Agent, AgentState, Machine, PowerState
from vmsnapshot_operator.core.volumes import VolumeId
from vmsnapshot_operator.errors import HypervisorUnreachableError, KubeUnavailableError, QuiesceError
from vmsnapshot_operator.handlers import sweep, thaw
from vmsnapshot_operator.hypervisors.checkpoints import Seen as Checkpoint
from vmsnapshot_operator.hypervisors.domains import Gated, Hypervisor, Ref, Sighting

pytestmark = pytest.mark.looptime

OURS = "abcdef"
REF = Ref(uuid="00000000-0000-0000-0000-000000000001", name="demo", endpoint="host")
JOURNAL = Journal(installation=OURS, owner_uid="u", nonce="0" * 32, attempt=2, method="GuestAgent", budget=30.0)


@dataclass
class FakeHypervisor:
    """VMs with journals; each `sweep` sees the next of these, the last one for ever."""

    seen: list[list[Sighting]]
    problems: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    files: tuple[OverlayFile, ...] = ()
    silent: dict[str, str] = field(default_factory=dict)
    gated: tuple[Gated, ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()

    async def all_checkpoints(self, prefix: str) -> tuple[Checkpoint, ...]:
        return tuple(c for c in self.checkpoints if c.name.startswith(prefix))

    async def gates(self) -> tuple[tuple[Gated, ...], dict[str, str]]:
        return self.gated, self.silent

    async def overlay_files(self, prefix: str) -> tuple[tuple[OverlayFile, ...], dict[str, str]]:
        return tuple(f for f in self.files if f.name.startswith(prefix)), self.silent

    async def sweep(self) -> list[Sighting]:
        return self.seen.pop(0) if len(self.seen) > 1 else self.seen[0]

    async def describe(self, ref: Ref, *, ask_agent: bool) -> Machine:
        return Machine(
            name=ref.name,
            uuid=ref.uuid,
            endpoint="host",
            run_id=1,
            power=PowerState.RUNNING,
            agent=Agent(state=AgentState.FROZEN),
        )

    async def close(self) -> None:
        self.closed = True


class Lab:
    """Hypervisors by name, and an API server that may be gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hypervisors: dict[str, FakeHypervisor] = {}
        self.api, self.installation = True, OURS
        self.freed: list[str] = []
        self.restores: dict[tuple[str, str], dict[str, Any]] = {}
        self.error: QuiesceError | None = None
        lab = self

        class FakeCluster:
            def __init__(self, **_: object) -> None:
                return

            async def __aenter__(self) -> Self:
                if not lab.api:
                    raise KubeUnavailableError("the API server cannot be reached")
                return self

            async def __aexit__(self, *_: object) -> None:
                return

            async def known_installation(self) -> str | None:
                return lab.installation or None

            async def restore(self, namespace: str, name: str) -> dict[str, Any] | None:
                return lab.restores.get((namespace, name))

            async def hypervisor_names(self) -> tuple[str, ...]:
                return tuple(lab.hypervisors)

        async def connect(_kubeconfig: Path | None, _namespace: str, name: str) -> FakeHypervisor:
            if name not in lab.hypervisors:
                raise HypervisorUnreachableError(f"{name}: connection refused")
            return lab.hypervisors[name]

        async def free(_client: Hypervisor, ref: Ref, _journal: Journal) -> None:
            lab.freed.append(ref.name)
            if lab.error is not None:
                raise lab.error

        monkeypatch.setattr(sweep, "Cluster", FakeCluster)
        monkeypatch.setattr(thaw, "connect", connect)
        monkeypatch.setattr(sweep, "release", free)

    async def sweep(self, *names: str, installation: str = "", dry_run: bool = False) -> tuple[str, bool]:
        lines, ok = await sweep.sweep(None, "ns", names, installation, dry_run=dry_run)
        assert all(h.closed for n, h in self.hypervisors.items() if not names or n in names)
        return "\n".join(lines), ok


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


def held(journal: Journal | None = JOURNAL, problem: str = "", *, ref: Ref = REF) -> Sighting:
    return Sighting(ref=ref, journal=journal, problem=problem)


async def test_a_dry_run_says_what_would_be_done_and_does_nothing(lab: Lab) -> None:
    lab.hypervisors["lab"] = FakeHypervisor([[held()]])
    said, ok = await lab.sweep(dry_run=True)
    assert not ok
    assert "hypervisor lab: domain demo: Running on host; agent says Frozen" in said
    assert "would be freed: held by attempt 2 of VMSnapshot u" in said
    assert not lab.freed
    assert asyncio.get_running_loop().time() == 0


async def test_what_is_left_is_freed_after_it_had_time_to_end_by_itself(lab: Lab) -> None:
    other = replace(REF, uuid=REF.uuid[:-1] + "2", name="other")
    lab.hypervisors["lab"] = FakeHypervisor([[held(), held(replace(JOURNAL, nonce="1" * 32), ref=other)], [held()]])
    said, ok = await lab.sweep()
    assert ok
    assert lab.freed == ["demo"]
    assert "domain demo: freed" in said
    assert "domain other: its window ended by itself meanwhile" in said
    assert asyncio.get_running_loop().time() >= sweep.LIVE


async def test_a_vm_that_stands_still_on_overlays_is_not_well(lab: Lab) -> None:
    overlaid = replace(JOURNAL, phase=Phase.OVERLAID, overlays={"v": "/over"}, bases={"v": "then"})
    lab.hypervisors["lab"] = FakeHypervisor([[held(overlaid)]])
    assert (await lab.sweep())[1]
    lab.hypervisors["lab"] = FakeHypervisor([[replace(held(overlaid), stalled=True)]])
    said, ok = await lab.sweep()
    assert not ok
    assert "to which it cannot write; the operator commits them" in said
    assert not lab.freed


async def test_without_the_api_server_and_an_id_nothing_is_freed(lab: Lab) -> None:
    lab.api = False
    lab.hypervisors["qemu:///system"] = FakeHypervisor([[held()]])
    said, ok = await lab.sweep("qemu:///system")
    assert not ok
    assert not lab.freed
    assert "which installation is ours is not known" in said
    assert f"--installation {OURS} would free it" in said
    said, ok = await lab.sweep("qemu:///system", installation=OURS)
    assert ok
    assert lab.freed == ["demo"]
    assert "API server" not in said, "it was not needed"


async def test_without_the_api_server_and_a_hypervisor_it_is_said_how(lab: Lab) -> None:
    lab.api = False
    said, ok = await lab.sweep()
    assert not ok
    assert "qemu+tls://HOST/system" in said


async def test_others_and_unreadable_ones_are_left_and_said(lab: Lab) -> None:
    strange = replace(REF, uuid=REF.uuid[:-1] + "2", name="strange")
    lab.hypervisors["lab"] = FakeHypervisor([[held(replace(JOURNAL, installation="zzzzzz"))]])
    said, ok = await lab.sweep()
    assert ok, "that is nothing of ours"
    assert "another installation (zzzzzz)" in said
    lab.hypervisors["lab"] = FakeHypervisor([[held(None, "version 9", ref=strange)]])
    said, ok = await lab.sweep()
    assert not ok
    assert "domain strange: left: version 9" in said
    assert not lab.freed


async def test_hypervisors_and_endpoints_that_do_not_answer_are_said_and_the_others_swept(lab: Lab) -> None:
    lab.hypervisors["lab"] = FakeHypervisor([[held()]], problems={"host2": "no route"})
    said, ok = await lab.sweep("nowhere", "lab")
    assert not ok
    assert "hypervisor nowhere: cannot be swept: nowhere: connection refused" in said
    assert "host2 does not answer" in said
    assert lab.freed == ["demo"]


async def test_one_that_cannot_be_freed_is_said(lab: Lab) -> None:
    lab.hypervisors["lab"] = FakeHypervisor([[held()]])
    lab.error = QuiesceError("its agent does not answer", reason="ThawFailed", retryable=True)
    said, ok = await lab.sweep()
    assert not ok
    assert "not free yet, run this again: its agent does not answer" in said


async def test_overlays_that_no_journal_tells_of_and_checkpoints_are_said_and_left(lab: Lab) -> None:
    paths = [f"/pool/{names.overlay_name(OURS, 'u', n, VolumeId('v'))}" for n in (1, 2, 3, 4)]
    told = replace(JOURNAL, overlays={"v": paths[3]}, phase=Phase.OVERLAID)
    lab.hypervisors["lab"] = FakeHypervisor(
        [[held(told)]],
        files=(
            OverlayFile(path=paths[0], endpoint="host", domain="demo"),
            OverlayFile(path=paths[1], endpoint="host"),
            OverlayFile(path=paths[2], endpoint="host", pristine=True, genuine=True),
            OverlayFile(path=paths[3], endpoint="host", domain="demo"),
        ),
    )
    ours = names.checkpoint_name(names.request_name(OURS, "u", 1, "c", ()), VolumeId("v"))
    lab.hypervisors["lab"].checkpoints = (Checkpoint("demo", ours), Checkpoint("demo", "backup-of-monday"))
    for dry_run in (True, False):
        said, ok = await lab.sweep(dry_run=dry_run)
        assert ok, "no VM is held"
        assert f"checkpoint {ours} of domain demo: goes with its VMSnapshot" in said
        assert "monday" not in said
        assert f"overlay {paths[0]} on host: kept: VM demo has it among its disks" in said
        assert f"overlay {paths[1]} on host: kept: no VM uses it, and it was written to" in said
        assert f"overlay {paths[2]} on host: empty and not in use; the operator removes it" in said
        assert paths[3] not in said
    lab.api = False
    lab.hypervisors["lab"].silent = {"host": "the pool hangs"}
    said, _ = await lab.sweep("lab", dry_run=True)
    assert f"overlay {paths[0]} on host: kept" in said, "also without an id"
    assert "host does not say which overlays it has: the pool hangs" in said


def test_help_teaches() -> None:
    shown = CliRunner().invoke(main, ["sweep", "--help"])
    assert shown.exit_code == 0
    for taught in ("--dry-run", "qemu+tls://", "--installation abc123", "Exit status", "thaw"):
        assert taught in shown.output


@pytest.mark.parametrize("dry_run", [True, False])
async def test_gates_that_nobody_opens_are_said_and_left(lab: Lab, dry_run: bool) -> None:
    host = lab.hypervisors["lab"] = FakeHypervisor([[]])
    host.gated = (gates.gated(),)
    said, ok = await lab.sweep(dry_run=dry_run)
    assert "hypervisor lab: domain vm1: VMRestore team-a/back (UID r1) has taken its disks vda and is gone" in said
    assert not ok
    lab.restores["team-a", "back"] = {"metadata": {"uid": "r1", "finalizers": [FINALIZER]}}
    said, ok = await lab.sweep(dry_run=dry_run)
    assert "has taken its disks vda, and gives them back when it has come to its end" in said
    assert ok


async def test_gates_are_said_without_the_api_server(lab: Lab) -> None:
    host = lab.hypervisors["lab"] = FakeHypervisor([[]])
    broken = replace(gates.gated(name="vm3"), definition="", problem="it cannot be asked")
    host.gated = (gates.gated(), gates.gated(installation="zzzzzz", name="vm2"), broken)
    lab.api = False
    said, ok = await lab.sweep("lab", installation=OURS, dry_run=True)
    assert "domain vm1: VMRestore team-a/back (UID r1) has taken its disks vda; whether that is still there" in said
    assert "domain vm2: VMRestore team-a/back (UID r1) has taken its disks vda; it is of installation zzzzzz" in said
    assert "domain vm3: its gate cannot be read: it cannot be asked" in said
    assert not ok
