"""One libvirt that is followed: all journals on it, looked at each second and at once when some domain's metadata changed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import libvirt

from vmsnapshot_operator.core import journal as journals
from vmsnapshot_operator.core.journal import Journal, UnreadableJournalError
from vmsnapshot_operator.guardian.attempts import Attempts
from vmsnapshot_operator.guardian.log import say
from vmsnapshot_operator.guardian.release import connect, reach, read

POLL_SECONDS = 1.0
LOOK_SECONDS = 15.0

Seen = Callable[[str, dict[str, Journal]], None]
"""Is given the URI, and the journals there by domain."""


class Host:
    """Follows one libvirt in a thread of its own from `start` on; reconnects for ever."""

    def __init__(self, uri: str, seen: Seen) -> None:
        self.uri = uri
        self.answers = False
        self._seen = seen
        self._connection: tuple[libvirt.virConnect, int] | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._unreadable: dict[str, str] = {}
        self._why = ""

    def start(self) -> None:
        """Begin to follow."""
        threading.Thread(target=self._follow, name=f"follow {self.uri}"[:60], daemon=True).start()

    def _follow(self) -> None:
        attempts = Attempts()
        while True:
            try:
                found = attempts.run(self._look, LOOK_SECONDS)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is said, and following goes on
                self._lost(str(error))
            else:
                if not self.answers:
                    say("following", uri=self.uri)
                self.answers, self._why = True, ""
                self._seen(self.uri, found)
            self._wake.wait(POLL_SECONDS)
            self._wake.clear()

    def _lost(self, why: str) -> None:
        if why != self._why:  # a host that was taken away for good would be told of each second
            say("libvirt does not answer", uri=self.uri, why=why)
        self.answers, self._why = False, why
        self._replace(None)

    def _replace(self, connection: tuple[libvirt.virConnect, int] | None) -> None:
        """Use this connection (with its callback) from now on, and close the one before: in a thread, since it may hang."""
        with self._lock:
            before, self._connection = self._connection, connection
        if before is not None:
            threading.Thread(target=_close, args=before, name="close", daemon=True).start()

    def _look(self) -> dict[str, Journal]:
        held = self._connection
        connection = held[0] if held is not None else None
        if connection is None or not connection.isAlive():
            reach(self.uri)
            connection = connect(self.uri)
            kind = libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE
            self._replace((connection, connection.domainEventRegisterAny(None, kind, self._changed, None)))
        found: dict[str, Journal] = {}
        for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
            uuid = domain.UUIDString()
            try:
                journal = read(domain)
            except UnreadableJournalError as error:
                if self._unreadable.get(uuid) != str(error):
                    say("journal not understood", domain=uuid, why=str(error))
                self._unreadable[uuid] = str(error)
                continue
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    continue  # it ended meanwhile
                raise
            if journal is not None:
                found[uuid] = journal
        return found

    def _changed(self, _connection: Any, _domain: Any, _kind: int, namespace: str | None, _opaque: Any) -> None:
        """Called by libvirt's event thread, which must not call back into libvirt."""
        if namespace == journals.NAMESPACE:
            self._wake.set()


def _close(connection: libvirt.virConnect, callback: int) -> None:
    try:
        connection.domainEventDeregisterAny(callback)  # a callback keeps its connection open
        connection.close()
    except libvirt.libvirtError as error:
        say("connection not closed", why=str(error))
