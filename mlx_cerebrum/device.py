"""What MLX computes on: asked in this one place, and anew each time.

`mx.set_default_device` may change the answer at any moment. So other modules import this module,
not its functions, and keep no answer. Whoever puts another `backend` here changes it for them all.
"""

import ctypes
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import mlx.core as mx

Backend = Literal["metal", "cuda", "cpu"]
_CPU = Path("/proc/cpuinfo")
# Debian and Ubuntu, Fedora, Arch: each exports BLAS under the names MLX was linked against.
_OPENBLAS = (
    "usr/lib/*/openblas-pthread/libblas.so.3",
    "usr/lib64/libopenblas.so.0",
    "usr/lib/libopenblas.so.0",
)


def backend() -> Backend:
    """What MLX computes on by default, in the calling thread."""
    if mx.default_device() != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def gpu_info() -> Mapping[str, str | int]:
    """What MLX knows of the GPU, whichever device is the default; empty where there is none."""
    return mx.device_info(mx.gpu)


def on_gpu() -> bool:
    return backend() != "cpu"


def emulates_bfloat16() -> bool:
    """Whether MLX computes on a GPU of Apple's that has float16 of its own and no bfloat16: an M1
    or M2, of generation 13 or 14. Others have measured that they read a prompt in 20 to 34% less
    time in float16."""
    if backend() != "metal":
        return False
    named = re.match(r"applegpu_g(\d+)", str(gpu_info().get("architecture", "")))
    return named is not None and int(named[1]) < 15


def on_linux_cpu() -> bool:
    """Whether MLX computes on a CPU without Accelerate, where some work has a faster way than
    MLX's own."""
    return sys.platform == "linux" and not on_gpu()


def has_openblas() -> bool:
    """Whether OpenBLAS was loaded before MLX's own BLAS. Only a symbol of the process itself says
    so: numpy brings an OpenBLAS under other names."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "openblas_get_config")


def installed_openblas() -> Path | None:
    """The file to set LD_PRELOAD to before the process starts."""
    found = (path for pattern in _OPENBLAS for path in sorted(Path("/").glob(pattern)))
    return next(found, None)


def openblas_kernels() -> str:
    """The processor, by its maker's name, that OpenBLAS computes for; empty without OpenBLAS."""
    if not has_openblas():
        return ""
    name = ctypes.CDLL(None).openblas_get_corename
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def better_kernels() -> str | None:
    """What OPENBLAS_CORETYPE is to be set to before the process starts, where OpenBLAS is older
    than the processor: it then takes it for one of 2004. None where its own choice is right."""
    if openblas_kernels() != "Prescott":
        return None
    able = _CPU.read_text(encoding="utf-8").split()
    return "SkylakeX" if "avx512vl" in able else "Haswell" if "avx2" in able else None


def stream() -> mx.Stream:
    """The calling thread's default stream."""
    return mx.default_stream(mx.default_device())
