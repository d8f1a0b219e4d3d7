"""A brake on the copy that a hypervisor makes: so that something can be done while it is under way."""

from __future__ import annotations

import contextlib
import threading
import time

import libvirt

from tests.lab import Lab
from tests.lab.guests import Guest


class Brake:
    """Holds the copy of a guest's first disk from its begin on, until it is let go."""

    def __init__(self, lab: Lab, guest: Guest) -> None:
        self._connection = lab.libvirt()
        self._domain = self._connection.lookupByName(guest.name)
        self._over = False
        self.holds = threading.Event()
        self._thread = threading.Thread(target=self._press)
        self._thread.start()

    def _press(self) -> None:
        while not self._over and not self.holds.is_set():
            with contextlib.suppress(libvirt.libvirtError):
                if self._domain.blockJobInfo("vda", 0):
                    self._domain.blockJobSetSpeed("vda", 4096, libvirt.VIR_DOMAIN_BLOCK_JOB_SPEED_BANDWIDTH_BYTES)
                    self.holds.set()
            time.sleep(0.002)

    def wait(self) -> None:
        """Wait until it holds the copy."""
        assert self.holds.wait(60), "nothing was copied"

    def let_go(self) -> None:
        """Let the copy go on."""
        self._domain.blockJobSetSpeed("vda", 0)

    def job(self) -> str:
        """The description of the guest's backup job, or nothing."""
        try:
            return str(self._domain.backupGetXMLDesc(0))
        except libvirt.libvirtError:
            return ""

    def close(self) -> None:
        """End the copy, if there is one still."""
        self._over = True
        self._thread.join()
        with contextlib.suppress(libvirt.libvirtError):
            if self.job():
                self._domain.abortJob()
        self._connection.close()
