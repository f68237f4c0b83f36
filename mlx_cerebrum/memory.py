"""Bytes needed against bytes there are, asked before anything is allocated."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_cerebrum.cache import entries_held
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.errors import MemoryBudgetError

GB = 1e9
# What the rest of the process and the system must be left with.
_HEADROOM = 0.95


def on_gpu() -> bool:
    return mx.default_device() == mx.Device(mx.gpu)


def available_bytes() -> int:
    """Bytes that weights and caches may take on the default device.

    Metal: the recommended working set (`iogpu.wired_limit_mb` raises it). CUDA: the card's
    memory. CPU: what the system says is free, within a cgroup's limit.
    """
    if on_gpu():
        info = mx.device_info()
        size = info.get("max_recommended_working_set_size", info.get("memory_size", 0))
        return int(size) - mx.get_active_memory() if size else _host_bytes()
    return _host_bytes()


def _host_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                total = int(line.split()[1]) * 1024
    return min(total, _cgroup_bytes(Path("/sys/fs/cgroup")) or total)


def _cgroup_bytes(folder: Path) -> int | None:
    """What a container (cgroup v2) may still take; cached file pages count as free."""
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # none, or "max"
        return None
    return max(1, limit - used + int(stat.get("inactive_file", 0)))


def human(nbytes: int) -> str:
    """Bytes for a person: 4.07 GB, 12.3 MB (10^9 and 10^6)."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= 0.1 * GB else f"{nbytes / 1e6:.1f} MB"


def kv_bytes(
    config: ModelConfig, prompt: int, generated: int, item_bytes: int, prefill_step: int
) -> int:
    """Bytes the caches of all positions take at most in a request, room to grow included."""
    entries = entries_held(config.sliding_window, prompt, generated, min(prefill_step, prompt))
    return config.kv_values_per_token() * item_bytes * entries


def require(needed: int, what: str, remedy: str) -> None:
    """Raise MemoryBudgetError, with the numbers and what would fit, unless `needed` bytes fit."""
    available = available_bytes()
    if needed > available * _HEADROOM:
        raise MemoryBudgetError(
            f"{what} needs {human(needed)} and {human(available)} are free; {remedy}"
        )


@contextmanager
def wired() -> Iterator[None]:
    """Keep weights resident on Metal while generating; elsewhere nothing.

    macOS may otherwise page a large model out between tokens.
    """
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
