"""Decoding at a long context: pace, and bytes of keys and values, with the window and without.

Each decoded token attends to the keys and values of the tokens before it, reads them all and
keeps them all: its cost grows with the context, in time and in memory. A sliding window ends
both. Mistral's is 4096 tokens, and Cerebrum's with it: further back nothing is read, and nothing
needs to be kept. mlx-lm runs the same files as a Llama, with full attention: it reads and keeps
everything. So **past the window the two do not compute the same function**: the model was
trained with the window, and its reference (transformers) honours it. Inside the window they
agree, and the largest difference of their logits there stands below the table.

What a decoded token costs depends on how many keys there are, not on what they say. So caches
are filled with random keys and values through their own `update_and_fetch`, in chunks as a
prompt comes, instead of running tens of thousands of tokens through the model; a test holds
that a cache so filled has the sizes of one filled by a prompt. Each round decodes and takes the
tokens back, the sides in turns.

Two parts: the model itself as each side runs it, as far as it has positions; and the 7B's and
the 12.25B's positions over random weights 1/16 as wide with the real window, to its 32768
tokens, where mlx-lm runs the 12.25B unrolled.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from bench import machine
from bench.context_report import plots as plots
from bench.context_report import text as text
from bench.engines import timed
from bench.memory import NARROW
from bench.pair import Pair
from bench.random_model import write_random
from bench.report import Spread, ratio, rounds
from bench.suite import Results, Settings
from mlx_cerebrum.cache import REWIND, STEP, WindowedKVCache
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.config import ModelConfig
from mlx_cerebrum.decode import PREFILL_STEP, generate_step
from mlx_cerebrum.errors import MemoryBudgetError
from mlx_cerebrum.load import choose_storage, load_model, planned_config
from mlx_cerebrum.memory import request_bytes, require
from mlx_cerebrum.model import Model
from mlx_cerebrum.plan import resolve

LENGTHS = (1024, 4096, 8192, 16384, 32768)
PLANS = ("cerebrum-12.25b", "cerebrum-7b")
PEER = "mlx-lm, 12.25b unrolled"
_PEER_CHUNK = 2048  # mlx-lm's own default
_TOKENS = 6  # decoded in a round at most: fewer than ours can always take back
_SHARE = 0.3  # of settings.seconds, for the rounds of one length

Decode = Callable[[], float]  # one round: tokens a second
Prepare = Callable[[int, int], tuple[Decode, Sequence[Any]]]  # length, tokens -> and its caches


def measure(
    pair: Pair,
    settings: Settings,
    lengths: Sequence[int] = LENGTHS,
    geometry: dict[str, Any] = NARROW,
) -> Results:
    """Lengths that a model has no positions for are left out."""
    config = pair.a.config(pair.checkpoint(), pair.window)
    model: list[Results] = []
    missing = None
    try:
        sides = {
            name: partial(_ours, one) for name, one in zip(pair.names, pair.models(), strict=True)
        }
        model = _lengths(_fitting(lengths, config), sides, settings)
        del sides
    except MemoryBudgetError as error:
        missing = str(error)
    pair.release()
    mx.clear_cache()
    return {
        "names": list(pair.names),
        "window": config.sliding_window,
        "positions": config.max_position_embeddings,
        "tokens": _tokens(settings),
        "model": model,
        "model_missing": missing,
        "random": _random(settings, lengths, geometry),
    }


def _random(settings: Settings, lengths: Sequence[int], geometry: dict[str, Any]) -> Results:
    """The two Cerebrum models over narrow random weights, and mlx-lm on the unrolled one."""
    settings.say("context: writing a narrow random model, folded and unrolled")
    stored, copied = settings.work / "narrow", settings.work / "narrow-unrolled"
    write_random(stored, geometry)
    write_random(copied, geometry, layers=resolve(PLANS[0]).layer_map(32))
    checkpoint = open_checkpoint(stored)
    config = planned_config(checkpoint.config, PLANS[0], None)
    merged = load_model(checkpoint, config, choose_storage(checkpoint, None, "auto"))
    base = merged.view(resolve(PLANS[1]).layer_map(32))
    dtype = merged.model.norm.weight.dtype
    sides: dict[str, Prepare] = {
        name: partial(_ours, model) for name, model in zip(PLANS, (merged, base), strict=True)
    }
    peer, difference = None, None
    if machine.version("mlx-lm") is not None:
        peer = _load_peer(copied, dtype)
        difference = _difference(merged, peer)
        sides[PEER] = partial(_peer, peer, config)
    return {
        "names": list(sides),
        "mlx_lm": machine.version("mlx-lm"),
        "logits_differ_by": difference,
        "dtype": str(dtype).rpartition(".")[2],
        "hidden_size": config.hidden_size,
        "window": config.sliding_window,
        "most_held": _most_held(config, dtype.size),
        "lengths": _lengths(_fitting(lengths, config), sides, settings),
    }


def _lengths(
    lengths: Sequence[int], sides: Mapping[str, Prepare], settings: Settings
) -> list[Results]:
    """The first length warms up; after it every kernel has run."""
    return [_length(n, sides, settings, warm=n == lengths[0]) for n in lengths]


def _length(
    length: int, sides: Mapping[str, Prepare], settings: Settings, *, warm: bool
) -> Results:
    """Rounds of all sides that fit in memory, each decoding its last tokens up to `length`."""
    settings.say(f"context: {length} tokens")
    runs: dict[str, Decode] = {}
    caches: dict[str, Sequence[Any]] = {}
    missing: dict[str, str] = {}
    for name, prepare in sides.items():
        try:
            runs[name], caches[name] = prepare(length, _tokens(settings))
        except MemoryBudgetError as error:
            missing[name] = str(error)
    seconds = _SHARE * settings.seconds
    paces = rounds(runs, settings.rounds, seconds=seconds, warm=warm) if runs else {}
    found = {
        name: {
            "decode": Spread.of(pace).as_json(),
            "kv": sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[name]),
        }
        for name, pace in paces.items()
    }
    compared = [paces[name] for name in (PLANS[0], PEER) if name in paces]
    caches.clear()
    runs.clear()
    mx.clear_cache()
    return {
        "length": length,
        "rounds": max(map(len, paces.values()), default=0),
        "sides": found,
        "missing": missing,
        "ratio": ratio(*compared).as_json() if len(compared) == 2 else None,
    }


def _ours(model: Model, length: int, tokens: int) -> tuple[Decode, Sequence[WindowedKVCache]]:
    """Raises MemoryBudgetError for a length whose caches can't fit."""
    dtype = model.model.norm.weight.dtype
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


def _peer(
    peer: nn.Module, config: ModelConfig, length: int, tokens: int
) -> tuple[Decode, Sequence[Any]]:
    """mlx-lm's own loop and caches. Raises MemoryBudgetError for what can't fit."""
    from mlx_lm.generate import generate_step as peer_step
    from mlx_lm.models.cache import make_prompt_cache

    dtype = peer.model.norm.weight.dtype
    _require(replace(config, sliding_window=None), length, tokens, dtype.size)
    cache: list[Any] = make_prompt_cache(peer)
    filled = length - tokens
    for layer in cache:
        fill(layer, filled, _PEER_CHUNK, config, dtype)
    mx.eval([(layer.keys, layer.values) for layer in cache])

    def decode() -> float:
        steps = peer_step(mx.array([1]), peer, max_tokens=tokens, prompt_cache=cache)
        run = timed((int(token) for token, _ in steps), 1)
        for layer in cache:
            layer.trim(layer.offset - filled)
        return run.decode_tps

    return decode, cache


def _require(config: ModelConfig, length: int, tokens: int, item_bytes: int) -> None:
    needed = request_bytes(config, length - tokens + 1, tokens, item_bytes, PREFILL_STEP)
    require(needed, f"a context of {length} tokens", "measure it where there is more memory")


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
    needed = length if window is None else window + cache.rewind + 4 * PREFILL_STEP
    skipped = max(0, length - needed) // PREFILL_STEP * PREFILL_STEP
    cache.state = (None, None, skipped, skipped, window or 0, cache.rewind, cache.step)
    fill(cache, length - skipped, PREFILL_STEP, config, dtype)


def _load_peer(directory: Path, dtype: mx.Dtype) -> nn.Module:
    from mlx_lm.utils import load_model as peer_load

    peer: nn.Module
    peer, _ = peer_load(directory)
    peer.set_dtype(dtype)  # what ours computes in: the same numbers, widened
    mx.eval(peer.parameters())
    return peer


def _difference(model: Model, peer: nn.Module) -> float:
    """The largest difference of the logits inside the window."""
    ids = mx.array([[1 + 37 * n % (model.config.vocab_size - 1) for n in range(32)]])
    difference = mx.max(mx.abs(model(ids).astype(mx.float32) - peer(ids).astype(mx.float32)))
    return cast(float, difference.item())


def _most_held(config: ModelConfig, item_bytes: int) -> int | None:
    """Bytes that ours never exceeds: window, rewind and one chunk of slack, at each position."""
    if config.sliding_window is None:
        return None
    entries = config.sliding_window + REWIND + max(STEP, PREFILL_STEP)
    return config.kv_values_per_token() * item_bytes * entries


def _fitting(lengths: Sequence[int], config: ModelConfig) -> list[int]:
    return [length for length in lengths if length <= config.max_position_embeddings]


def _tokens(settings: Settings) -> int:
    return max(2, min(settings.tokens, _TOKENS))
