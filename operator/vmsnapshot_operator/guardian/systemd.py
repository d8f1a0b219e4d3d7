"""Tell systemd how we are, if it is who started us: the protocol of sd_notify(3), without its library."""

from __future__ import annotations

import os
import socket

from vmsnapshot_operator.guardian.log import say


def tell(state: str) -> None:
    """Send a state such as `READY=1` or `WATCHDOG=1`. Does nothing outside of systemd; a failure is said and stops nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.connect("\0" + path[1:] if path.startswith("@") else path)
            link.sendall(state.encode())
    except OSError as error:
        say("systemd was not told", state=state, why=str(error))
