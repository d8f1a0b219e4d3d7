"""Start the guardian, or ask a running one whether it lives (`--probe`)."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sys
from types import FrameType

from vmsnapshot_operator.guardian.server import Server
from vmsnapshot_operator.guardian.watch import Watch


def probe(path: str) -> int:
    """Return 0 if the guardian at this socket answers within two seconds."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(2)
            link.connect(path)
            link.sendall(b'{"op":"status"}\n')
            answer = json.loads(link.makefile().readline())
    except (OSError, ValueError) as error:
        print(f"the guardian at {path} does not answer: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer))
    return 0 if answer.get("ok") else 1


def main() -> int:
    """Run until SIGTERM or SIGINT; then free everything that is armed."""
    parser = argparse.ArgumentParser(
        prog="vmsnapshot-operator guardian",
        description="Frees VMs that a snapshot holds longer than its budget, or whose holder has died.",
    )
    parser.add_argument("--socket", required=True, help="Unix socket on which the operator arms it")
    parser.add_argument("--uri", action="append", default=[], help="libvirt to watch from the start; may be given again")
    parser.add_argument("--probe", action="store_true", help="ask the one that runs at the socket, and exit 0 if it answers")
    options = parser.parse_args()
    if options.probe:
        return probe(options.socket)
    watch = Watch()
    for uri in options.uri:
        watch.follow(uri)
    server = Server(options.socket, watch)

    def end(_number: int, _frame: FrameType | None) -> None:
        server.stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    server.serve()
    watch.release_all("the guardian is ending")
    return 0


if __name__ == "__main__":
    sys.exit(main())
