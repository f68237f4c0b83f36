"""Bytes needed against bytes there are, asked before anything is allocated."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.attention import check_kv_bits, packed_rows
from mlx_cerebrum.model.attention_cpu import in_slices, scores_held
from mlx_cerebrum.model.cache import KV_BITS, REWIND, STEP, entries_held, kv_group
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.limits import host_bytes, memory_limit

GB = 1e9
# What the rest of the process and the system must be left with.
_HEADROOM = 0.95
_SMALL_WINDOW = 1024  # tokens; what is suggested where caches don't fit


def available_bytes() -> int:
    """Bytes that weights and caches may take on the default device.

    Metal: the recommended working set (`iogpu.wired_limit_mb` raises it). CUDA: the card's
    memory. CPU: what the system says is free, within the limits of cgroups and `ulimit`.
    Inside `memory_limits.limits`, no more than is left of the limit set there.
    """
    free, active = host_bytes(), mx.get_active_memory()
    if device.on_gpu():
        info = mx.device_info()
        if "free_memory" in info:  # CUDA; what MLX keeps for reuse is free too
            free = int(info["free_memory"]) + mx.get_cache_memory()
        else:
            size = info.get("max_recommended_working_set_size", info.get("memory_size", 0))
            free = int(size) - active if size else free
    limit = memory_limit()
    return free if limit is None else min(free, limit - active)


def human(nbytes: int) -> str:
    """Bytes for a person: 4.07 GB, 12.3 MB (10^9 and 10^6)."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= 0.1 * GB else f"{nbytes / 1e6:.1f} MB"


def kv_bytes(
    config: ModelConfig,
    prompt: int,
    generated: int,
    item_bytes: int,
    prefill_step: int,
    *,
    kv_bits: int | None = None,
    drafts: int = 0,
) -> int:
    """Bytes the caches of all positions take at most in a request, room to grow included.

    `kv_bits`: packed entries hold a scale and a bias of `item_bytes` for each group. `drafts`:
    most guesses in a round of speculative decoding; its drafters use the model's own caches.
    """
    entries = _entries(config.sliding_window, prompt, generated, prefill_step, drafts)
    width = config.head_dim
    row = width * item_bytes
    if kv_bits is not None:
        row = width * kv_bits // 8 + width // kv_group(width) * 2 * item_bytes
    return config.kv_values_per_token() // width * row * entries


def _entries(
    window: int | None, prompt: int, generated: int, prefill_step: int, drafts: int
) -> int:
    """Most entries a position's buffer has room for; with drafts a bound, without them exact.

    A round reaches the end of a buffer with up to `drafts` guesses more than it will keep, so
    the buffer may grow that much earlier, and once more by the end.
    """
    step = min(prefill_step, prompt)
    held, total = entries_held(window, prompt, generated, step), prompt - 1 + generated
    if not drafts or total <= entries_held(window, prompt, 0, step):  # no need to grow
        return held
    kept = total if window is None else min(total, window - 1 + REWIND)
    return max(held, kept + max(drafts + 2, STEP))


def keeps_scores(config: ModelConfig, item_bytes: int) -> bool:
    """Whether attention over a prompt holds a score for every query, head and key at once.

    MLX's CPU backend does. A fused kernel does not: Metal has one for these head widths, CUDA
    (cuDNN's) for 16-bit numbers (MLX's scaled_dot_product_attention, use_fallback).
    """
    if not device.on_gpu():
        return True
    if device.backend() == "metal":
        return config.head_dim not in (64, 80, 128)
    return item_bytes != 2 or config.head_dim > 128 or config.head_dim % 8 != 0


def forward_bytes(
    config: ModelConfig,
    length: int,
    keys: int,
    item_bytes: int,
    scores: bool | None = None,
    kv_bits: int | None = None,
) -> int:
    """Bytes of what a forward pass of `length` tokens makes besides cache entries and logits.

    `keys` each query's row has at most. MLX issues operations ahead of computing them, so all
    that one block makes is held together, and about one block's at a time: on the CPU backend
    that is what is measured (tests/model/test_memory.py). `scores`: as `keeps_scores` unless given.
    """
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    held = (heads + 2 * kv_heads) + (heads + kv_heads)  # q, k, v; q and k rotated
    held += 3 * heads  # q scaled, what comes out, the same with its heads side by side
    held *= length * config.head_dim
    in_steps = keeps_scores(config, item_bytes) if scores is None else scores
    rest = 3 * config.intermediate_size  # gate and up, their product
    rest += 6 * D  # two norms, what attention and MLP write, the sum after each
    if in_steps:  # the rotation too: its two products, its tables of two chunks
        rest += (2 * (heads + kv_heads) + 4) * config.head_dim
    rest *= length
    if kv_bits is not None and length <= packed_rows():
        rest += 3 * heads * length * keys  # scores, masked, what softmax makes of them
    else:
        if kv_bits is not None:
            held += 2 * kv_heads * config.head_dim * keys  # one position's entries, unpacked
        if in_steps and item_bytes == 4 and in_slices(length, keys, mx.float32, None):
            held += heads * length * config.head_dim  # slices apart, before they are joined
            # So many operations that what else a block makes is gone before, or comes after; but
            # not where the heads are few.
            sliced = scores_held(length, keys, heads)
            rest = rest + sliced if heads < 4 else max(rest, sliced)
        elif in_steps:
            rest += heads * length * keys
    return (held + rest) * item_bytes + length * keys  # and the mask


def request_bytes(
    config: ModelConfig,
    prompt: int,
    generated: int,
    item_bytes: int,
    prefill_step: int,
    scores: bool | None = None,
    *,
    kv_bits: int | None = None,
    drafts: int = 0,
) -> int:
    """Bytes a request takes at most besides the weights: caches, and the pass that runs.

    Either the prompt's last whole chunk, or what is left of it, or a decoded token needs most.
    With `drafts`, a decoded token is a pass of one row more than those, each with its logits.
    """
    window, filled = config.sliding_window, prompt - 1  # the last one is decoded

    def held(prompt: int, generated: int) -> int:
        caches = kv_bytes(
            config, prompt, generated, item_bytes, prefill_step, kv_bits=kv_bits, drafts=drafts
        )
        return caches + caches // config.num_positions  # one position's are moved at a time

    def forward(length: int, seen: int) -> int:
        keys = seen if window is None else min(seen, window - 1 + length)
        return forward_bytes(config, length, keys, item_bytes, scores, kv_bits)

    rows = 1 + drafts
    logits = rows * config.vocab_size * item_bytes
    needs = [held(prompt, generated) + forward(rows, filled + generated) + logits]
    whole = filled - filled % prefill_step
    for seen, length in ((whole, prefill_step), (filled, filled - whole)):
        if seen and length:
            needs.append(held(seen + 1, 0) + forward(length, seen))
    return max(needs)


def fits(needed: int) -> bool:
    """Whether `needed` bytes are there, with some to spare."""
    return needed <= available_bytes() * _HEADROOM


def what_fits(
    weights: Sequence[tuple[str, int, int, int]],
    config: ModelConfig,
    prompt: int,
    generated: int,
    prefill_step: int,
    *,
    kv_bits: int | None = None,
    drafts: int = 0,
) -> list[tuple[str, int]]:
    """Flags that take less memory, each with the bytes then needed: `settings` for `require`.

    `weights` are the ways to hold them: flags, bytes, bytes more while loading, bytes of an
    activation; the first as asked for, without flags. For each the change to the caches that
    loses least and fits, else the smallest.
    """
    found = []
    for flags, nbytes, loading, item_bytes in weights:
        sizes = []
        for more, changed, bits in _smaller_caches(config, kv_bits):
            request = request_bytes(
                changed, prompt, generated, item_bytes, prefill_step, kv_bits=bits, drafts=drafts
            )
            sizes.append((f"{flags} {more}".strip(), nbytes + max(request, loading)))
        sizes = [size for size in sizes if size[0]]  # without any it is what does not fit
        smallest = min(sizes, key=lambda size: size[1], default=("", 0))
        found.append(next((size for size in sizes if fits(size[1])), smallest))
    return [setting for setting in found if setting[0]]


def _smaller_caches(
    config: ModelConfig, kv_bits: int | None
) -> list[tuple[str, ModelConfig, int | None]]:
    """`(flags, config, kv bits)` that lose ever more: as they are, packed, a smaller window."""
    packed: list[tuple[str, int | None]] = [("", kv_bits)]
    for bits in KV_BITS:
        if bits < (kv_bits or 16):
            with suppress(RequestError):  # heads too narrow
                check_kv_bits(config, bits)
                packed.append((f"--kv-bits {bits}", bits))
    found = [(flags, config, bits) for flags, bits in packed]
    if config.sliding_window is None or config.sliding_window > _SMALL_WINDOW:
        narrow, flag = replace(config, sliding_window=_SMALL_WINDOW), f"--window {_SMALL_WINDOW}"
        found += [(f"{flags} {flag}".strip(), narrow, bits) for flags, bits in packed]
    return found


def require(
    needed: int, what: str, remedy: str = "", settings: Sequence[tuple[str, int]] = ()
) -> None:
    """Raise MemoryBudgetError, with the numbers and what would fit, unless `needed` bytes fit.

    `settings` are flags to try, the ones that change least first, each with what would then be
    needed. The message names up to three that fit, or says that none does and adds `remedy`.
    """
    if fits(needed):
        return
    available = available_bytes()
    fitting = [f"{flags} ({human(size)})" for flags, size in settings if fits(size)][:3]
    if fitting:
        remedy = f"{' or '.join(fitting)} would fit"
    elif settings:
        flags, size = min(settings, key=lambda setting: setting[1])
        tried = f"none of its settings would fit, even {flags} needs {human(size)}"
        remedy = f"{tried}; {remedy}" if remedy else tried
    kept = " (5% of it kept back)" if needed <= available else ""
    said = f"{what} needs {human(needed)} and {human(max(0, available))} are free{kept}"
    raise MemoryBudgetError(f"{said}; {remedy}" if remedy else said)
