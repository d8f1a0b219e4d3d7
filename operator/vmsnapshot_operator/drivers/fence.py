"""Until when drivers may write: told by the operator to all of their processes, in memory that they share.

An operator that is stopped, or whose node sleeps, cannot end what its drivers are at, while another instance takes over and goes on with
it. So those processes look by themselves. Not: who may act (`kube.lease`), nor how a process ends at a deadline (`worker`).
"""

from __future__ import annotations

import os
import struct

from vmsnapshot_operator.drivers import wire

_MOMENT = struct.Struct("<d")


class Fence:
    """One moment of CLOCK_BOOTTIME in memory that processes share by its file descriptor; until it is told, there is none."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("vmsnapshot-fence", os.MFD_CLOEXEC)
        self.tell(float("inf"))

    def tell(self, moment: float) -> None:
        """Have drivers write until this moment."""
        os.pwrite(self.fd, _MOMENT.pack(moment), 0)

    def close(self) -> None:
        """Give the memory back; processes that have it keep it."""
        os.close(self.fd)


def is_over(fd: int) -> bool:
    """Tell whether the moment that a fence tells is over."""
    (moment,) = _MOMENT.unpack(os.pread(fd, _MOMENT.size, 0))
    return wire.boottime() >= float(moment)
