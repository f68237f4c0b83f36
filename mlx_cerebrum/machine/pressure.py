"""Whether the machine runs short of memory, as its system sees it."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_cerebrum.machine.facts import sysctl_number
from mlx_cerebrum.model.limits import PROC, cgroups, sizes

_LEVEL = "kern.memorystatus_vm_pressure_level"  # 1 normal, 2 warning, 4 critical (XNU)
_WARNING = 2
# Linux, Documentation/accounting/psi.rst: the share of the last 10 s in which something waited for
# memory, in percent.
_WAITED = re.compile(r"^some avg10=(\d+(?:\.\d+)?)", re.MULTILINE)
_MOST_WAITED = 10.0
_LEAST_FREE = 0.04  # of all memory

LOOK = 1.0  # seconds between two looks
CALM = 30.0  # seconds without pressure before it counts as over: else it would come and go


def is_short(proc: Path = PROC) -> bool:
    """Whether the system asks programs for memory now."""
    if (level := sysctl_number(_LEVEL)) is not None:
        return level >= _WARNING
    if sys.platform != "linux":
        return False
    # The machine's, and of each group with limits that this process is in.
    files = [
        proc / "pressure" / "memory",
        *(folder / "memory.pressure" for folder in cgroups(proc)),
    ]
    if any(_waited(file) >= _MOST_WAITED for file in files):
        return True
    memory = sizes(proc / "meminfo")
    total = memory.get("MemTotal", 0)
    return memory.get("MemAvailable", total) < _LEAST_FREE * total


def _waited(file: Path) -> float:
    try:
        found = _WAITED.search(file.read_text())
    except (OSError, ValueError):  # a kernel, or a group, without it
        return 0.0
    return float(found[1]) if found else 0.0


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
