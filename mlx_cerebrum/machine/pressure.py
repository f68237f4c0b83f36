"""Whether the machine runs short of memory, as its system sees it."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mlx_cerebrum import device
from mlx_cerebrum.machine.facts import memory_bytes, sysctl_number
from mlx_cerebrum.model.limits import PROC, cgroups, sizes
from mlx_cerebrum.model.memory import human

_LEVEL = "kern.memorystatus_vm_pressure_level"  # 1 normal, 2 warning, 4 critical (XNU)
_WARNING = 2
_SHARE = "kern.memorystatus_level"  # percent of the memory that is neither wired nor compressed
# vm_stat(1): the size of a page, and pages that are given away without anything being written.
_VM_STAT = "/usr/bin/vm_stat"
_PAGE = re.compile(r"page size of (\d+) bytes")
_UNUSED = re.compile(r"^(?:Pages free|Pages purgeable|File-backed pages): +(\d+)\.", re.MULTILINE)
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


def unused_bytes() -> int | None:
    """Memory that macOS can give away without compressing or swapping out what programs hold:
    free pages, cached files, and what programs may lose. None elsewhere."""
    if sys.platform != "darwin":
        return None
    try:
        run = subprocess.run([_VM_STAT], capture_output=True, text=True, timeout=5, check=True)
        page, counts = _PAGE.search(run.stdout), _UNUSED.findall(run.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        page, counts = None, []
    if page is not None and len(counts) == 3:
        return int(page[1]) * sum(map(int, counts))
    share = sysctl_number(_SHARE)
    return None if share is None else share * memory_bytes() // 100


def would_swap(needed: int, name: str) -> str | None:
    """What to say before weights are loaded that Metal allows, and for which macOS would have to
    take memory from other programs; None where there is nothing to say."""
    if device.backend() != "metal" or (unused := unused_bytes()) is None or needed <= unused:
        return None
    short = ", and the system is short of memory already" if is_short() else ""
    return (
        f"{name} takes {human(needed)}, and other programs leave {human(unused)}{short}: macOS will"
        " compress and swap, which is slow; close some of them, or take fewer bits"
    )


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
