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


def keeps_scores(config: ModelConfig, item_bytes: int) -> bool:
    """Whether attention over a prompt holds a score for every query, head and key at once.

    MLX's CPU backend does. A fused kernel does not: Metal has one for these head widths, CUDA
    (cuDNN's) for 16-bit numbers (MLX's scaled_dot_product_attention, use_fallback).
    """
    if not on_gpu():
        return True
    if mx.metal.is_available():
        return config.head_dim not in (64, 80, 128)
    return item_bytes != 2 or config.head_dim > 128 or config.head_dim % 8 != 0


def forward_bytes(
    config: ModelConfig, length: int, keys: int, item_bytes: int, scores: bool | None = None
) -> int:
    """Bytes of what a forward pass of `length` tokens makes besides cache entries and logits.

    `keys` each query's row has at most. MLX issues operations ahead of computing them, so all
    that one block makes is held together, and about one block's at a time: on the CPU backend
    that is what is measured (tests/test_memory.py). `scores`: as `keeps_scores`, unless given.
    """
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    attention = (heads + 2 * kv_heads) + (heads + kv_heads)  # q, k, v; q and k rotated
    attention += 3 * heads  # q scaled, what comes out, the same with its heads side by side
    mlp = 3 * config.intermediate_size  # gate and up, their product
    stream = 6 * D  # two norms, what attention and MLP write, the sum after each
    values = length * (attention * config.head_dim + mlp + stream)
    if keeps_scores(config, item_bytes) if scores is None else scores:
        values += heads * length * keys
    return values * item_bytes + length * keys  # and the mask


def request_bytes(
    config: ModelConfig,
    prompt: int,
    generated: int,
    item_bytes: int,
    prefill_step: int,
    scores: bool | None = None,
) -> int:
    """Bytes a request takes at most besides the weights: caches, and the pass that runs.

    Either the prompt's last whole chunk, or what is left of it, or a decoded token needs most.
    """
    window, filled = config.sliding_window, prompt - 1  # the last one is decoded

    def held(prompt: int, generated: int) -> int:
        caches = kv_bytes(config, prompt, generated, item_bytes, prefill_step)
        return caches + caches // config.num_positions  # one position's are moved at a time

    def forward(length: int, seen: int) -> int:
        keys = seen if window is None else min(seen, window - 1 + length)
        return forward_bytes(config, length, keys, item_bytes, scores)

    logits = config.vocab_size * item_bytes
    needs = [held(prompt, generated) + forward(1, filled + generated) + logits]
    whole = filled - filled % prefill_step
    for seen, length in ((whole, prefill_step), (filled, filled - whole)):
        if seen and length:
            needs.append(held(seen + 1, 0) + forward(length, seen))
    return max(needs)


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
