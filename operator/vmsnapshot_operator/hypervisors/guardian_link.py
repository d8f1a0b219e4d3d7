"""The operator's end of the guardian's socket. One connection: when this process dies it closes, and the guardian acts."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from vmsnapshot_operator.core.volumes import Seconds
from vmsnapshot_operator.errors import GuardianError

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = Seconds(3.0)


class GuardianLink:
    """Ask the guardian to watch over a VM, and tell it when that is over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()

    async def ping(self) -> None:
        """Raise GuardianError unless the guardian answers."""
        await self._ask({"op": "status"})

    async def arm(self, uri: str, domain: str, nonce: str) -> None:
        """Return once the guardian has read the journal with this nonce in the domain itself and started its timer."""
        answer = await self._ask({"op": "arm", "uri": uri, "domain": domain, "nonce": nonce})
        if answer.get("nonce") != nonce:
            raise GuardianError("the guardian acknowledged another journal than ours")

    async def disarm(self, nonce: str) -> None:
        """Tell that the VM is free. Never raises: a guardian that misses it thaws a thawed guest, which harms nobody."""
        try:
            await self._ask({"op": "disarm", "nonce": nonce})
        except GuardianError as error:
            log.warning("the guardian was not told that the VM is free: %s", error.message)

    async def close(self) -> None:
        """Close the connection."""
        writer, self._writer, self._reader = self._writer, None, None
        if writer is not None:
            writer.close()

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            try:
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    answer = await self._exchange(question)
            except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                # An answer that comes later must not be taken for that to the next question.
                await self.close()
                text = str(error) or type(error).__name__
                raise GuardianError(f"the guardian at {self._path} does not answer: {text}") from error
        if not answer.get("ok"):
            raise GuardianError(f"the guardian refuses: {answer.get('error', 'no reason given')}")
        return answer

    async def _exchange(self, question: dict[str, Any]) -> dict[str, Any]:
        if self._writer is None or self._reader is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        self._writer.write(json.dumps(question).encode() + b"\n")
        await self._writer.drain()
        line = await self._reader.readuntil(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer
