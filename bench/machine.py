"""Where a figure was measured: the machine card, and the same BLAS for everyone.

MLX's Linux wheel multiplies matrices with the reference BLAS, some 30 times slower than
OpenBLAS in float32. It is one library for the whole process, so preloading OpenBLAS speeds
every MLX engine up alike, and what is compared is then the engines' own work.
"""

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from mlx_cerebrum import __version__, device

_KERNELS = "OPENBLAS_CORETYPE"
_PRELOADED = "MLX_CEREBRUM_BENCH_BLAS"  # set after one attempt, so that there is never a second


def use_openblas(wanted: bool) -> None:
    """Start this process over with OpenBLAS preloaded and its kernels for this processor, if that
    is wanted, needed and possible.

    Only the CPU backend on Linux needs it; child processes inherit it. Does not return when
    it starts over, so call it before any work.
    """
    if not wanted:
        return
    environment = dict(os.environ)
    if blas() == "reference" and _PRELOADED not in os.environ:
        if found := device.installed_openblas():
            preload = [str(found), *filter(None, [os.environ.get("LD_PRELOAD")])]
            environment |= {"LD_PRELOAD": ":".join(preload), _PRELOADED: "1"}
    elif (kernels := device.better_kernels()) and _KERNELS not in os.environ:
        environment[_KERNELS] = kernels
    if environment != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def blas() -> str:
    """Which BLAS this process multiplies float32 matrices with."""
    if device.backend() != "cpu":
        return "not used"
    if sys.platform == "darwin":
        return "Accelerate"
    if not device.has_openblas():
        return "reference"
    return f"OpenBLAS ({device.openblas_kernels()})"


def card() -> dict[str, Any]:
    """What a reader must know to judge or repeat a figure."""
    return {
        "os": platform.platform(terse=True),
        "processor": processor(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "backend": device.backend(),
        "device": chip() if device.backend() != "cpu" else "cpu",
        "blas": blas(),
        "load_average": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlx_cerebrum": __version__,
    }


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """What is checked out, with a + where files of it were changed; None outside of git."""
    words = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def chip() -> str:
    """The name of what MLX computes on, as its maker has it, such as Apple M2 Pro."""
    return str(device.gpu_info().get("device_name", "")) if device.on_gpu() else processor()


def processor() -> str:
    """The CPU's name."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return named[1] if named else platform.machine()
