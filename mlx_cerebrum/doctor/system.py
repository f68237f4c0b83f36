"""What this package asks of macOS: that the answers are there, and mean what they should."""

import fcntl
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable

from mlx_cerebrum import device
from mlx_cerebrum.doctor.buffers import swapped
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.files import durable
from mlx_cerebrum.machine.awake import Awake
from mlx_cerebrum.machine.facts import memory_bytes, processor, sysctl_number
from mlx_cerebrum.machine.pressure import unused_bytes

_ARCHITECTURE = re.compile(r"applegpu_g\d+")
_STARTED = 0.3  # seconds after which a program that can't run has ended


def chip() -> bool:
    """The processor's name, and the GPU's generation, which decides about bfloat16."""
    named = processor().startswith("Apple")
    return named and bool(_ARCHITECTURE.match(str(device.gpu_info().get("architecture", ""))))


def pressure() -> bool:
    return sysctl_number("kern.memorystatus_vm_pressure_level") in (1, 2, 4)


def unused() -> bool:
    """Memory that other programs leave."""
    return 0 < (unused_bytes() or 0) < memory_bytes()


def swap() -> bool:
    return swapped() is not None


def awake() -> bool:
    """caffeinate(8) runs while there is work."""
    holder = Awake()
    holder.hold()
    try:
        time.sleep(_STARTED)
        return holder.running
    finally:
        holder.release()


def flushed() -> bool:
    """A file's bytes can be written through the drive's cache."""
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
        file.flush()
        durable.sync(file.fileno())
        through = getattr(fcntl, "F_FULLFSYNC", None)
        try:  # `sync` does without if need be
            return through is not None and fcntl.fcntl(file.fileno(), through) == 0
        except OSError:
            return False


ASKED: dict[str, Callable[[], bool]] = {
    "chip": chip,
    "pressure of memory": pressure,
    "memory unused": unused,
    "swap": swap,
    "staying awake": awake,
    "flushing to the drive": flushed,
}


def system(settings: Settings) -> Found:
    """Every question, and whether its answer is one."""
    if sys.platform != "darwin":
        return Found(None, f"{os.uname().sysname} is not asked so")
    answered = {name: ask() for name, ask in ASKED.items()}
    missing = [name for name, answer in answered.items() if not answer]
    words = f"{len(answered) - len(missing)} of {len(answered)} answered"
    words += f"; not: {', '.join(missing)}" if missing else ""
    return Found(not missing, words, data={"missing": missing})
