"""Where a libvirt daemon is, in typed fields. Not the URI that is made of them (`hypervisors.uri`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One libvirt daemon. `driver` is qemu or test; `transport` unix, tls, tcp or ssh."""

    driver: str = "qemu"
    transport: str = "unix"
    host: str = ""
    port: int | None = None
    socket_path: str = ""

    @property
    def name(self) -> str:
        """What a user recognises it by."""
        return self.socket_path or (f"{self.host}:{self.port}" if self.port else self.host) or self.driver
