"""Start the guardian, or ask a running one whether it lives (`--probe`)."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import libvirt

from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.server import Server
from vmsnapshot_operator.guardian.watch import Watch

PROBE_SECONDS = 2.0
STUCK_SECONDS = 10.0
ENDING_SECONDS = 25.0
"""How long the VMs are tried to be freed at the end: less than the 30 s that Kubernetes gives a pod by default."""


def ask(path: str) -> dict[str, Any]:
    """Return the status of the guardian at this socket. Raises OSError, ValueError."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PROBE_SECONDS)
        link.connect(path)
        link.sendall(b'{"op":"status"}\n')
        return dict(json.loads(link.makefile().readline()))


def probe(path: str) -> int:
    """Return 0 if the guardian at this socket answers and does its rounds."""
    try:
        answer = ask(path)
    except (OSError, ValueError) as error:
        print(f"the guardian at {path} does not answer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0 if answer.get("ok") and answer.get("turned", STUCK_SECONDS) < STUCK_SECONDS else 1


class Memory:
    """The URIs that were followed, in a file beside the socket: a guardian that is restarted alone must know where to look."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()

    def read(self) -> list[str]:
        """Return them; none if there are none, or the file cannot be understood."""
        try:
            with open(self._path) as file:  # noqa: PTH123 - pathlib costs memory that this program does not need
                return [str(uri) for uri in json.load(file)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            say("memory not understood", path=self._path, why=str(error))
            return []

    def write(self, uris: list[str]) -> None:
        """Replace them at once."""
        with self._lock:
            try:
                with open(f"{self._path}.new", "w") as file:  # noqa: PTH123 - as above
                    json.dump(uris, file)
                os.replace(f"{self._path}.new", self._path)  # noqa: PTH105 - as above
            except OSError as error:
                say("memory not written", path=self._path, why=str(error))


def main() -> int:
    """Run until SIGTERM or SIGINT; then free everything that is armed."""
    parser = argparse.ArgumentParser(
        prog="vmsnapshot-operator guardian",
        description="Frees VMs that a snapshot holds longer than its budget, or whose holder has died.",
    )
    parser.add_argument("--socket", required=True, help="Unix socket on which the operator arms it")
    parser.add_argument(
        "--uri", action="append", default=[], help="libvirt to watch from the start; may be given again"
    )
    parser.add_argument(
        "--probe", action="store_true", help="ask the one that runs at the socket, and exit 0 if it answers"
    )
    options = parser.parse_args()
    if options.probe:
        return probe(options.socket)
    try:
        ask(options.socket)
    except (OSError, ValueError):
        pass  # as it should be: nobody listens there
    else:
        print(f"another guardian listens at {options.socket}", file=sys.stderr)
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_events, name="libvirt events", daemon=True).start()
    memory = Memory(f"{options.socket}.uris")
    watch = Watch()
    for uri in (*options.uri, *memory.read()):
        watch.follow(uri)
    watch.start()
    server = Server(options.socket, watch, learned=lambda _: memory.write(watch.followed()))

    def end(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    server.serve()
    say("ending")
    watch.release_all("the guardian is ending", ENDING_SECONDS)
    return 0


def _events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            say("events", why=str(error))
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
