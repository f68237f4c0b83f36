"""What the machine is, in words and numbers."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

from mlx_cerebrum import device

_CPUINFO = Path("/proc/cpuinfo")


def sysctl(name: str) -> bytes | None:
    """What macOS keeps under a name, as it is in memory (sysctlbyname(3)); None elsewhere, and for
    a name that this version does not have."""
    if sys.platform != "darwin":
        return None
    call = ctypes.CDLL(None, use_errno=True).sysctlbyname
    call.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_void_p,
        ctypes.c_size_t,
    ]
    size = ctypes.c_size_t(0)
    if call(name.encode(), None, ctypes.byref(size), None, 0) != 0:
        return None
    value = ctypes.create_string_buffer(max(size.value, 1))
    if call(name.encode(), value, ctypes.byref(size), None, 0) != 0:
        return None
    return value.raw[: size.value]


def sysctl_number(name: str) -> int | None:
    """The same, of a number."""
    value = sysctl(name)
    return None if value is None else int.from_bytes(value, sys.byteorder, signed=True)


def processor() -> str:
    """The CPU's name, as its maker has it: Apple M2 Pro."""
    if (brand := sysctl("machdep.cpu.brand_string")) is not None:
        return brand.rstrip(b"\0").decode(errors="replace")
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def chip() -> str:
    """The name of what MLX computes on."""
    if device.on_gpu():
        return str(device.gpu_info().get("device_name", "")) or processor()
    return processor()


def memory_bytes() -> int:
    """All of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def summary() -> str:
    """Chip, memory and backend in one line: `Apple M2, 17 GB of memory, computing on metal`."""
    return f"{chip()}, {memory_bytes() / 1e9:.0f} GB of memory, computing on {device.backend()}"
