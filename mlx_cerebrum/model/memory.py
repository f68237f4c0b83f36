"""How much memory a request needs, predicted, and refused before anything is allocated."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import MemoryBudgetError, RequestError
from mlx_cerebrum.model.attention import packed_rows
from mlx_cerebrum.model.cache import REWIND, STEP, entries_held
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import in_slices, scores_held
from mlx_cerebrum.model.entries import KV_BITS, check_kv_bits, kv_group
from mlx_cerebrum.model.limits import host_bytes, memory_limit

GB = 1e9
HEADROOM = 0.95  # of what is free; the rest is the system's
_SMALL_WINDOW = 1024  # tokens; what is suggested where caches don't fit


def available_bytes() -> int:
    """Bytes that weights and caches may take on the default device.

    Metal: the recommended working set (`iogpu.wired_limit_mb` raises it). CUDA: the card's
    memory. CPU: what the system says is free, within the limits of cgroups and `ulimit`.
    Inside `limits.limits`, no more than is left of the limit set there.
    """
    free, active = host_bytes(), mx.get_active_memory()
    if device.on_gpu():
        info = device.gpu_info()
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


def left(nbytes: int) -> str:
    """How to say that so many bytes may still be taken. Metal's are no free memory: what other
    programs hold is not counted."""
    size = human(max(0, nbytes))
    return f"Metal allows {size}" if device.backend() == "metal" else f"{size} are free"


def fits(needed: int) -> bool:
    """Whether `needed` bytes are there, with some to spare."""
    return needed <= available_bytes() * HEADROOM


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
    said = f"{what} needs {human(needed)} and {left(available)}{kept}"
    raise MemoryBudgetError(f"{said}; {remedy}" if remedy else said)


@dataclass(frozen=True)
class Workload:
    """A request, as far as its memory goes: `prompt` and `generated` tokens.

    item_bytes: of a number in activations, and in cache entries that are not packed.
    prefill_step: tokens of the prompt computed at once.
    kv_bits: packed entries' bits a value; None: not packed.
    drafts: most guesses in a round of speculative decoding. Its drafters use the model's own
        caches.
    """

    config: ModelConfig
    item_bytes: int
    prompt: int
    generated: int
    prefill_step: int
    kv_bits: int | None = None
    drafts: int = 0

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's entries in the caches of all positions."""
        width = self.config.head_dim
        row = width * self.item_bytes
        if self.kv_bits is not None:  # each group has a scale and a bias, which are not packed
            row = width * self.kv_bits // 8 + width // kv_group(width) * 2 * self.item_bytes
        return self.config.kv_values_per_token() // width * row

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of all positions take at most, room to grow included."""
        return self.entry_bytes * self._entries()

    @property
    def shared_bytes(self) -> int:
        """The same for its row of caches that several sequences share, none longer than it."""
        total, window = self.prompt + self.generated, self.config.sliding_window
        kept = total if window is None else min(total, window - 1 + REWIND)
        return self.entry_bytes * (kept + max(STEP, self.drafts + 2))

    def _entries(self) -> int:
        """Most entries a position's buffer has room for; with drafts a bound, without them exact.

        A round of drafts writes up to `drafts` entries more than it keeps. So a buffer may be
        full, and grow, that many tokens early, and then grow once more before the end.
        """
        window, step = self.config.sliding_window, min(self.prefill_step, self.prompt)
        held = entries_held(window, self.prompt, self.generated, step)
        total = self.prompt - 1 + self.generated
        if not self.drafts or total <= entries_held(window, self.prompt, 0, step):
            return held  # nothing grows after the prompt
        kept = total if window is None else min(total, window - 1 + REWIND)
        return max(held, kept + max(self.drafts + 2, STEP))

    @property
    def bytes(self) -> int:
        """Bytes a request takes at most besides the weights: its caches, and one forward pass.

        One of three passes needs most: the prompt's last whole chunk, the rest of the prompt
        after it, or a decoded token. With `drafts`, that token's pass has a row for each of them
        too, and every row has its logits.
        """
        filled = self.prompt - 1  # the prompt's last token is decoded
        rows = 1 + self.drafts
        logits = rows * self.config.vocab_size * self.item_bytes
        needs = [self._pass_bytes(rows, filled + self.generated) + logits]
        whole = filled - filled % self.prefill_step
        for seen, length in ((whole, self.prefill_step), (filled, filled - whole)):
            if seen and length:
                so_far = replace(self, prompt=seen + 1, generated=0)
                needs.append(so_far._pass_bytes(length, seen))
        return max(needs)

    def _pass_bytes(self, length: int, seen: int) -> int:
        """Bytes of the caches, and of a forward pass of `length` tokens that ends at `seen`."""
        window, caches = self.config.sliding_window, self.cache_bytes
        keys = seen if window is None else min(seen, window - 1 + length)
        made = forward_bytes(self.config, length, keys, self.item_bytes, self.kv_bits)
        # And one position's buffer, there twice while it is copied into a larger one.
        return caches + caches // self.config.num_positions + made

    def smaller(self, ways: Sequence["Weights"]) -> list[tuple[str, int]]:
        """Flags that take less memory, each with the bytes then needed: `settings` for `require`.

        `ways` to hold the weights: first the one asked for, which has no flags. For each way, the
        change to the caches that loses least and fits; where none fits, the smallest.
        """
        found = []
        for way in ways:
            sizes = [
                (f"{way.flags} {more}".strip(), way.bytes_with(changed))
                for more, changed in self._smaller_caches()
            ]
            sizes = [size for size in sizes if size[0]]  # without any it is what does not fit
            smallest = min(sizes, key=lambda size: size[1], default=("", 0))
            found.append(next((size for size in sizes if fits(size[1])), smallest))
        return [setting for setting in found if setting[0]]

    def _smaller_caches(self) -> list[tuple[str, "Workload"]]:
        """With their flags: this one, then others that lose more and more. First with packed
        entries, then also with a smaller window."""
        packed: list[tuple[str, Workload]] = [("", self)]
        for bits in KV_BITS:
            if bits < (self.kv_bits or 16):
                with suppress(RequestError):  # heads too narrow
                    check_kv_bits(self.config, bits)
                    packed.append((f"--kv-bits {bits}", replace(self, kv_bits=bits)))
        window = self.config.sliding_window
        if window is not None and window <= _SMALL_WINDOW:
            return packed
        narrow = replace(self.config, sliding_window=_SMALL_WINDOW)
        flag = f"--window {_SMALL_WINDOW}"
        return packed + [
            (f"{flags} {flag}".strip(), replace(each, config=narrow)) for flags, each in packed
        ]


class Weights(NamedTuple):
    """One way to hold a model's weights, and the flags that ask for it."""

    flags: str
    nbytes: int
    loading: int  # bytes more while they load
    item_bytes: int  # of an activation

    def bytes_with(self, request: Workload) -> int:
        """Bytes at most from the first weight loaded to the last token of `request`."""
        return self.nbytes + max(replace(request, item_bytes=self.item_bytes).bytes, self.loading)


def keeps_scores(config: ModelConfig, item_bytes: int) -> bool:
    """Whether attention over a prompt holds a score for every query, head and key at once.

    MLX's CPU backend does. A fused kernel does not: Metal has one for these head widths, CUDA
    (cuDNN's) for 16-bit numbers (MLX's scaled_dot_product_attention, use_fallback).
    """
    backend = device.backend()
    if backend == "cpu":
        return True
    if backend == "metal":
        return config.head_dim not in (64, 72, 80, 96, 128)
    return item_bytes != 2 or config.head_dim > 128 or config.head_dim % 8 != 0


def forward_bytes(
    config: ModelConfig, length: int, keys: int, item_bytes: int, kv_bits: int | None = None
) -> int:
    """Bytes of what a forward pass of `length` tokens makes besides cache entries and logits.

    A query sees `keys` entries at most. MLX issues operations ahead of computing them, so all
    that one block makes is held together, and about one block's at a time: on the CPU backend
    that is what is measured (tests/model/test_memory.py).
    """
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    held = (heads + 2 * kv_heads) + (heads + kv_heads)  # q, k, v; q and k rotated
    held += 3 * heads  # q scaled, what comes out, the same with its heads side by side
    held *= length * config.head_dim
    in_steps = keeps_scores(config, item_bytes)
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
            # Slices are so many operations that the rest of what a block makes is freed before
            # them, or made after them; but not where the heads are few.
            sliced = scores_held(length, keys, heads)
            rest = rest + sliced if heads < 4 else max(rest, sliced)
        elif in_steps:
            rest += heads * length * keys
    return (held + rest) * item_bytes + length * keys  # and the mask
