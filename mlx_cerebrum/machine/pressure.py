"""Whether the machine runs short of memory, as its system sees it."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_cerebrum.machine.facts import memory_bytes, sysctl_number
from mlx_cerebrum.model.limits import PROC, host_bytes

_LEVEL = "kern.memorystatus_vm_pressure_level"  # 1 normal, 2 warning, 4 critical (XNU)
_WARNING = 2
# Linux, Documentation/accounting/psi.rst: the share of the last 10 s in which something waited for
# memory, in percent.
_WAITED = re.compile(r"^some avg10=(\d+(?:\.\d+)?)", re.MULTILINE)
_MOST_WAITED = 10.0
_LEAST_FREE = 0.04  # of all memory, and of what limits leave of it

LOOK = 1.0  # seconds between two looks
CALM = 30.0  # seconds without pressure before it counts as over: else it would come and go


def is_short(proc: Path = PROC) -> bool:
    """Whether the system asks programs for memory now."""
    if (level := sysctl_number(_LEVEL)) is not None:
        return level >= _WARNING
    if sys.platform != "linux":
        return False
    try:
        waited = _WAITED.search((proc / "pressure" / "memory").read_text())
    except OSError:  # a kernel without it
        waited = None
    if waited is not None and float(waited[1]) >= _MOST_WAITED:
        return True
    return host_bytes(proc) < _LEAST_FREE * memory_bytes()


class Pressure:
    """Pressure, from its first sign until it was over for a while: `look` as often as you like."""

    def __init__(
        self,
        short: Callable[[], bool] = is_short,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._short, self._clock = short, clock
        self._next = 0.0
        self._last: float | None = None  # when it was last seen

    def look(self) -> bool:
        """Whether memory counts as short now."""
        now = self._clock()
        if now >= self._next:
            self._next = now + LOOK
            if self._short():
                self._last = now
            elif self._last is not None and now - self._last >= CALM:
                self._last = None
        return self._last is not None
