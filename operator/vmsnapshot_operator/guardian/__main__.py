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
from functools import partial
from types import FrameType
from typing import Any

import libvirt

from vmsnapshot_operator.guardian import systemd
from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.server import Server
from vmsnapshot_operator.guardian.watch import Watch

PROBE_SECONDS = 2.0
STUCK_SECONDS = 10.0
BEAT_SECONDS = 2.0
GRACE_SECONDS = 2.0
"""One that only watches waits so much longer than the budget: the one beside the operator comes first."""

ENDING_SECONDS = 25.0
"""How long the VMs are tried to be freed at the end: less than the 30 s that Kubernetes gives a pod by default."""


def ask(path: str) -> dict[str, Any]:
    """Return the status of the guardian at this socket. Raises OSError, ValueError."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(PROBE_SECONDS)
        link.connect(path)
        link.sendall(b'{"op":"status"}\n')
        return dict(json.loads(link.makefile().readline()))


def probe(path: str, *, reach: bool) -> int:
    """Return 0 if the guardian at this socket answers and does its rounds; `reach`: and if all it follows answers, too."""
    try:
        answer = ask(path)
    except (OSError, ValueError) as error:
        print(f"the guardian at {path} does not answer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    well = bool(answer.get("ok")) and answer.get("turned", STUCK_SECONDS) < STUCK_SECONDS
    return 0 if well and (not reach or all(answer.get("followed", {}).values())) else 1


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
    """Run until SIGTERM or SIGINT. What was armed is freed then; one that only watches leaves windows that are open alone."""
    options = arguments(sys.argv[1:])
    if options.probe:
        return probe(options.socket, reach=options.reach)
    if options.socket and _taken(options.socket):
        print(f"another guardian listens at {options.socket}", file=sys.stderr)
        return 1
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_events, name="libvirt events", daemon=True).start()
    watch = Watch(grace=GRACE_SECONDS if options.watch_only else 0.0)
    memory = Memory(f"{options.socket}.uris")
    for uri in (*options.uri, *(() if options.watch_only else memory.read())):
        watch.follow(uri)
    watch.start()
    if options.socket:
        learned = partial(_remember, memory, watch)
        server = Server(options.socket, watch, learned, arms=not options.watch_only)
        threading.Thread(target=server.serve, name="serve", daemon=True).start()
    _run_until_signalled(watch)
    say("ending")
    systemd.tell("STOPPING=1")
    if options.watch_only:
        watch.finish(ENDING_SECONDS)
    else:
        watch.release_all("the guardian is ending", ENDING_SECONDS)
    return 0


def arguments(words: list[str]) -> argparse.Namespace:
    """Understand the command line; exits with status 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="vmsnapshot-operator guardian",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Frees VMs that a snapshot holds longer than its budget, or whose holder has died.

beside the operator    --socket PATH
    The operator arms it before each freeze; what was armed is freed when the operator's connection closes, when its budget is
    over, and when the guardian is ended.
anywhere else          --watch-only --uri URI [--uri URI ...]
    On another node, or on the hypervisor's host. Nobody arms it: it finds held VMs by the journals in their metadata, and frees
    one when the journal has stood for its budget and 2 s more, never sooner, not even when the guardian is ended. A VM without
    a journal, or with one that it cannot read, is never touched.
""",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help="Unix socket to listen on; with --watch-only it answers --probe and nothing else",
    )
    parser.add_argument(
        "--uri", action="append", default=[], help="libvirt to follow from the start; may be given again"
    )
    parser.add_argument("--watch-only", action="store_true", help="be armed by nobody; see above")
    parser.add_argument(
        "--probe", action="store_true", help="ask the one that runs at the socket; exit status 0 if it is well"
    )
    parser.add_argument(
        "--reach", action="store_true", help="with --probe: it is well only if every libvirt that it follows answers"
    )
    options = parser.parse_args(words)
    if not options.socket and (options.probe or not options.watch_only):
        parser.error("--socket is needed, but for --watch-only")
    if options.watch_only and not options.uri:
        parser.error("--watch-only needs at least one --uri: nobody else tells it where to look")
    if options.reach and not options.probe:
        parser.error("--reach belongs to --probe")
    return options


def _remember(memory: Memory, watch: Watch, _learned: str) -> None:
    memory.write(watch.followed())


def _taken(path: str) -> bool:
    try:
        ask(path)
    except (OSError, ValueError):
        return False  # as it should be: nobody listens there
    return True


def _run_until_signalled(watch: Watch) -> None:
    """Wait for SIGTERM or SIGINT. systemd hears that all is well only while what is due is looked for."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    systemd.tell("READY=1")
    while not ended.wait(BEAT_SECONDS):
        if watch.status()["turned"] < STUCK_SECONDS:
            systemd.tell("WATCHDOG=1")


def _events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError as error:
            say("events", why=str(error))
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
