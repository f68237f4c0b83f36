"""What decodes at a length of context: ours, or mlx-lm, over caches filled at random.

A side is prepared for one length: its caches are filled, and decoding from there is a function
that gives its pace and takes the tokens back, to be called in turns with the other sides'.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from bench.engines import timed
from mlx_cerebrum.decoding.decode import generate_step, prefill_step
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require

PROBE = 32  # tokens of the prompt whose logits are compared
_PEER_CHUNK = 2048  # mlx-lm's own default

Decode = Callable[[], float]  # one round: tokens a second
Prepare = Callable[[int, int], tuple[Decode, Sequence[Any]]]  # length, tokens -> and its caches


def ours(model: Model, length: int, tokens: int) -> tuple[Decode, Sequence[WindowedKVCache]]:
    """Raises MemoryBudgetError for a length whose caches can't fit."""
    dtype = model.dtype
    _require(model.config, length, tokens, dtype.size)
    cache = model.make_cache()
    filled = length - tokens
    for layer in cache:
        fill_ours(layer, filled, model.config, dtype)
    mx.eval([layer.state for layer in cache])

    def decode() -> float:
        run = timed(generate_step([1], model, max_tokens=tokens, cache=cache), 1)
        for layer in cache:
            layer.trim(layer.offset - filled)
        return run.decode_tps

    return decode, cache


def peer(
    model: nn.Module, config: ModelConfig, length: int, tokens: int
) -> tuple[Decode, Sequence[Any]]:
    """mlx-lm's own loop and caches. Raises MemoryBudgetError for what can't fit."""
    from mlx_lm.generate import generate_step as peer_step
    from mlx_lm.models.cache import make_prompt_cache

    dtype = model.model.norm.weight.dtype
    _require(replace(config, sliding_window=None), length, tokens, dtype.size)
    cache: list[Any] = make_prompt_cache(model)
    filled = length - tokens
    for layer in cache:
        fill(layer, filled, _PEER_CHUNK, config, dtype)
    mx.eval([(layer.keys, layer.values) for layer in cache])

    def decode() -> float:
        steps = peer_step(mx.array([1]), model, max_tokens=tokens, prompt_cache=cache)
        run = timed((int(token) for token, _ in steps), 1)
        for layer in cache:
            layer.trim(layer.offset - filled)
        return run.decode_tps

    return decode, cache


def load_peer(directory: Path, dtype: mx.Dtype) -> nn.Module:
    """mlx-lm's model of `directory`, all of it in memory. It computes in `dtype`, as ours does."""
    from mlx_lm.utils import load_model

    model: nn.Module
    model, _ = load_model(directory)
    model.set_dtype(dtype)  # the same numbers, widened
    mx.eval(model.parameters())
    return model


def difference(model: Model, theirs: nn.Module) -> float:
    """The largest difference of the logits inside the window."""
    config = model.config
    length = min(PROBE, config.sliding_window or PROBE)
    ids = mx.array([[1 + 37 * n % (config.vocab_size - 1) for n in range(length)]])
    found = mx.max(mx.abs(model(ids).astype(mx.float32) - theirs(ids).astype(mx.float32)))
    return cast(float, found.item())


def _require(config: ModelConfig, length: int, tokens: int, item_bytes: int) -> None:
    request = Workload(config, item_bytes, length - tokens + 1, tokens, prefill_step())
    require(request.bytes, f"a context of {length} tokens", "measure it where there is more memory")


def fill(cache: Any, length: int, chunk: int, config: ModelConfig, dtype: mx.Dtype) -> None:
    """Append random keys and values of `length` tokens, in chunks as a prompt comes.

    All but the last chunks at once: the buffer that leaves is the same.
    """
    first = max(chunk, length // chunk * chunk - 2 * chunk)
    pieces = [min(first, length)]
    while sum(pieces) < length:
        pieces.append(min(chunk, length - sum(pieces)))
    for rows in filter(None, pieces):
        shape = (1, config.num_key_value_heads, rows, config.head_dim)
        cache.update_and_fetch(*(mx.random.uniform(-1, 1, shape, dtype) for _ in range(2)))
        mx.eval(cache.keys, cache.values)


def fill_ours(cache: WindowedKVCache, length: int, config: ModelConfig, dtype: mx.Dtype) -> None:
    """`fill`, but tokens that nothing is left of at the end are only counted."""
    window = cache.window
    needed = length if window is None else window + cache.rewind + 4 * prefill_step()
    skipped = max(0, length - needed) // prefill_step() * prefill_step()
    cache.state = (None, None, skipped, skipped, window or 0, cache.rewind, cache.step, 0)
    fill(cache, length - skipped, prefill_step(), config, dtype)
