"""The operator's end of the guardian's socket: one connection for each VM that is held. It closes when this process dies.

A connection of its own per VM, so that a host whose libvirt hangs delays nobody else's guardian. If the guardian itself is
restarted meanwhile, it is told again. Not: what the guardian does (`guardian`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmsnapshot_operator.api.hypervisor import GuardianLayer
from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import GuardianError

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = Seconds(3.0)
RETRY_SECONDS = Seconds(0.5)


@dataclass(slots=True)
class _Talk:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.writer.write(json.dumps(question).encode() + b"\n")
        await self.writer.drain()
        answer: dict[str, Any] = json.loads(await self.reader.readuntil(b"\n"))
        if not answer.get("ok"):
            raise GuardianError(f"the guardian refuses: {answer.get('error', 'no reason given')}")
        return answer


@dataclass(slots=True)
class _Armed:
    """A VM that is watched over: what was asked, the connection that keeps it so, and who looks after that."""

    question: dict[str, Any]
    talk: _Talk | None
    keeper: asyncio.Task[None] | None = None


class GuardianLink:
    """Ask the guardian to watch over VMs, and tell it when that is over. Methods raise GuardianError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._armed: dict[str, _Armed] = {}

    async def ping(self) -> Mapping[str, bool]:
        """Return, if the guardian answers, which libvirts it follows, and whether each answers it."""
        talk = await self._connect()
        try:
            answer = await self._ask(talk, {"op": "status"})
        finally:
            talk.writer.close()
        followed = answer.get("followed")
        return {str(k): bool(v) for k, v in followed.items()} if isinstance(followed, dict) else {}

    @property
    def folder(self) -> Path:
        """Where both find what they share."""
        return self._path.parent

    async def arm(self, uri: str, domain: str, nonce: str, pool: Sequence[str] = ()) -> None:
        """Return once the guardian has read the journal with this nonce in the domain itself and started its timer.

        `pool`: URIs of all hosts to which the VM may migrate meanwhile.
        """
        question = {"op": "arm", "uri": uri, "domain": domain, "nonce": nonce, "pool": list(pool)}
        armed = _Armed(question, await self._arm(question))
        self._armed[nonce] = armed
        armed.keeper = asyncio.create_task(self._keep(armed), name=f"guardian of {domain}")

    async def disarm(self, nonce: str, *, late: bool = False) -> None:
        """Tell that the VM is free. Never raises: a guardian that misses it thaws a thawed guest, which harms nobody.

        `late`: an order of ours may still come and hold it. Then the guardian is left as if we had died: it frees the VM itself, and
        goes on looking for as long as such an order can come.
        """
        armed = self._armed.pop(nonce, None)
        if armed is None:
            return
        await _end(armed)
        if armed.talk is None:
            log.warning("the guardian went away, so it was not told that the VM is free")
            return
        try:
            if not late:
                await self._ask(armed.talk, {"op": "disarm", "nonce": nonce})
        except GuardianError as error:
            log.warning("the guardian was not told that the VM is free: %s", error.message)
        finally:
            armed.talk.writer.close()

    async def close(self) -> None:
        """Close all connections: what is still armed is freed by the guardian at once."""
        for nonce in list(self._armed):
            armed = self._armed.pop(nonce)
            await _end(armed)
            if armed.talk is not None:
                armed.talk.writer.close()

    async def _keep(self, armed: _Armed) -> None:
        """Arm again whenever the guardian went away."""
        while True:
            if armed.talk is not None:
                try:
                    # The guardian says nothing unasked: reading ends when it dies.
                    await armed.talk.reader.read(1)
                except OSError as error:
                    log.debug("the connection to the guardian broke: %s", error)
                armed.talk.writer.close()
                armed.talk = None
                log.warning("the guardian went away while it watched over domain %s", armed.question["domain"])
            await asyncio.sleep(RETRY_SECONDS)
            try:
                armed.talk = await self._arm(armed.question)
            except GuardianError as error:
                log.warning("domain %s is held without a guardian: %s", armed.question["domain"], error.message)

    async def _arm(self, question: dict[str, Any]) -> _Talk:
        talk = await self._connect()
        try:
            answer = await self._ask(talk, question)
        except BaseException:
            talk.writer.close()
            raise
        if answer.get("nonce") != question["nonce"]:
            talk.writer.close()
            raise GuardianError("the guardian acknowledged another journal than ours")
        return talk

    async def _connect(self) -> _Talk:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return _Talk(*await asyncio.open_unix_connection(str(self._path)))
        except (TimeoutError, OSError) as error:
            raise self._silent(error) from error

    async def _ask(self, talk: _Talk, question: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                return await talk.ask(question)
        except (TimeoutError, OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> GuardianError:
        return GuardianError(f"the guardian at {self._path} does not answer: {str(error) or type(error).__name__}")


async def _end(armed: _Armed) -> None:
    if armed.keeper is not None:
        armed.keeper.cancel()
        await asyncio.gather(armed.keeper, return_exceptions=True)


def layers(followed: Mapping[str, bool] | None, uris: Iterable[str]) -> tuple[GuardianLayer, ...]:
    """Which guardians of a hypervisor with these URIs have answered: the one beside us, or none.

    `followed`: what `GuardianLink.ping` returned, None if it raised. A libvirt that the guardian does not follow yet is taken for
    one that it will reach: it is told of it with the first VM there. Guardians elsewhere speak to nobody but libvirt, so that they
    are there when nobody else is: whether they run is not known here, and nothing is said of them.
    """
    if followed is None or not all(followed.get(uri, True) for uri in uris):
        return ()
    return (GuardianLayer.SIDECAR,)
