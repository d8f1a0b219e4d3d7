"""What happened to one domain between two moments, as libvirt's events tell: evidence of an early resume or another run."""

from __future__ import annotations

import libvirt


class EventWatch:
    """Flags that only ever rise. Written by libvirt's event thread, read after the window."""

    def __init__(self) -> None:
        self.resumed = False
        self.started = False
        self.stopped = False
        self.migrated = False

    def lifecycle(self, event: int, detail: int) -> None:
        """Take one lifecycle event."""
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            self.resumed = True
            self.migrated |= detail == libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED
        elif event == libvirt.VIR_DOMAIN_EVENT_STARTED:
            self.started = True
        elif event in (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_SHUTDOWN, libvirt.VIR_DOMAIN_EVENT_CRASHED):
            self.stopped = True
