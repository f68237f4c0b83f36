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

Two parts: the model itself as each side runs it, as far as it has positions, mlx-lm on a copy of
each side with a layer for each position; and the 7B's and the 12.25B's positions over random
weights 1/16 as wide with the real window, to its 32768 tokens, where mlx-lm runs the 12.25B
unrolled. Narrow weights are few for their keys and values, so what the window saves is more there
than at full size: what bytes alone allow stands below, for both.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from bench import machine, projection
from bench.attempts import one_line
from bench.context_report import plots as plots
from bench.context_report import text as text
from bench.context_sides import Decode, Prepare, difference, load_peer, ours, peer
from bench.copies import Copies
from bench.memory import NARROW
from bench.pair import Pair, Side
from bench.random_model import GEOMETRIES, write_random
from bench.report import Spread, ratio, rounds
from bench.suite import Effort, Results
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import MemoryBudgetError
from mlx_cerebrum.model.cache import REWIND, STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import require
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.opening import ModelSpec, open_model, planned_config

LENGTHS = (1024, 4096, 8192, 16384, 32768)
PLANS = ("cerebrum-12.25b", "cerebrum-7b")
PEER = "mlx-lm, 12.25b unrolled"
BYTES_AT = (4096, 16384, 32768)
_KV_ITEM = 2  # bytes of a key or value at full size
_TOKENS = 6  # decoded in a round at most: fewer than ours can always take back
_SHARE = 0.3  # of settings.seconds, for the rounds of one length


def measure(
    pair: Pair,
    settings: Effort,
    lengths: Sequence[int] = LENGTHS,
    geometry: dict[str, Any] = NARROW,
) -> Results:
    """Lengths that a model has no positions for are left out."""
    config = pair.a.config
    model: Results = {"peers": {}, "peers_missing": {}, "lengths": [], "missing": None}
    try:
        model |= _model(pair, settings, _fitting(lengths, config))
    except MemoryBudgetError as error:
        model["missing"] = str(error)
    pair.release()
    mx.clear_cache()
    return {
        "names": list(pair.names),
        "window": config.sliding_window,
        "positions": config.max_position_embeddings,
        "tokens": _tokens(settings),
        "model": model,
        "random": _random(settings, lengths, geometry),
    }


def _model(pair: Pair, settings: Effort, lengths: Sequence[int]) -> Results:
    """The model itself, and mlx-lm on each side. Raises MemoryBudgetError where ours can't fit."""
    sides: dict[str, Prepare] = {}
    theirs: dict[str, Prepare] = {}
    peers: Results = {}
    missing = {}
    for side, model in zip(pair.sides, pair.models(), strict=True):
        sides[side.name] = partial(ours, model)
        if machine.version("mlx-lm") is None:
            continue
        name = f"mlx-lm, {side.name}"
        try:
            copy = _copy(pair, side, model.config, settings)
            peers[name] = {"of": side.name, "logits_differ_by": difference(model, copy)}
            theirs[name] = partial(peer, copy, model.config)
        except Exception as error:  # a peer may raise anything
            missing[name] = one_line(error)
    compared = {name: found["of"] for name, found in peers.items()}
    measured = _lengths(lengths, sides | theirs, compared, settings)
    return {"peers": peers, "peers_missing": missing, "lengths": measured}


def _copy(pair: Pair, side: Side, config: ModelConfig, settings: Effort) -> nn.Module:
    """mlx-lm's model of one side. Its files are gone when it is loaded.

    Raises CerebrumError for what can't be written, MemoryBudgetError for what can't be loaded.
    """
    settings.say(f"context: {side.name} for mlx-lm")
    storage = pair.storage()
    needed = storage.nbytes * config.executed_parameters // config.stored_parameters
    require(needed, "loading its copy", "measure it where there is more memory")
    with tempfile.TemporaryDirectory(dir=settings.work) as folder:
        return load_peer(Copies(pair, side, Path(folder)).directory(), storage.dtype)


def _random(settings: Effort, lengths: Sequence[int], geometry: dict[str, Any]) -> Results:
    """The two Cerebrum models over narrow random weights, and mlx-lm on the unrolled one."""
    settings.say("context: writing a narrow random model, folded and unrolled")
    stored, copied = settings.work / "narrow", settings.work / "narrow-unrolled"
    write_random(stored, geometry)
    write_random(copied, geometry, layers=resolve(PLANS[0]).layer_map(32))
    merged = open_model(ModelSpec(stored, plan=PLANS[0])).load()
    config = merged.config
    base = merged.view(resolve(PLANS[1]).layer_map(32))
    dtype = merged.dtype
    sides: dict[str, Prepare] = {
        name: partial(ours, model) for name, model in zip(PLANS, (merged, base), strict=True)
    }
    differ = None
    if machine.version("mlx-lm") is not None:
        copy = load_peer(copied, dtype)
        differ = difference(merged, copy)
        sides[PEER] = partial(peer, copy, config)
    compared = {PEER: PLANS[0]} if PEER in sides else {}
    return {
        "names": list(sides),
        "peers": {name: {"of": of, "logits_differ_by": differ} for name, of in compared.items()},
        "mlx_lm": machine.version("mlx-lm"),
        "dtype": str(dtype).rpartition(".")[2],
        "hidden_size": config.hidden_size,
        "window": config.sliding_window,
        "most_held": _most_held(config, dtype.size),
        "bytes_alone": _bytes_alone(config),
        "lengths": _lengths(_fitting(lengths, config), sides, compared, settings),
    }


def _lengths(
    lengths: Sequence[int],
    sides: Mapping[str, Prepare],
    compared: Mapping[str, str],
    settings: Effort,
) -> list[Results]:
    """The first length warms up; after it every kernel has run."""
    return [_length(n, sides, compared, settings, warm=n == lengths[0]) for n in lengths]


def _length(
    length: int,
    sides: Mapping[str, Prepare],
    compared: Mapping[str, str],
    settings: Effort,
    *,
    warm: bool,
) -> Results:
    """Rounds of all sides that fit in memory, each decoding its last tokens up to `length`.

    `compared` names the side of ours that each peer stands beside.
    """
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
    ratios = {
        name: ratio(paces[of], paces[name]).as_json()
        for name, of in compared.items()
        if of in paces and name in paces
    }
    caches.clear()
    runs.clear()
    mx.clear_cache()
    return {
        "length": length,
        "rounds": max(map(len, paces.values()), default=0),
        "sides": found,
        "missing": missing,
        "ratios": ratios,
    }


def _bytes_alone(narrow: ModelConfig) -> list[Results]:
    """Bytes that mlx-lm reads for a token over those that ours reads, with nothing measured.

    Ours reads the weights and the window's keys and values, mlx-lm those of all tokens.
    """
    full = planned_config(ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"]), PLANS[0], None)
    models = {
        "narrow": (narrow, "bf16"),
        f"{PLANS[0]}, bf16": (full, "bf16"),
        f"{PLANS[0]}, 4-bit": (full, "4-bit"),
    }
    rows = []
    for length in BYTES_AT:
        row = {}
        for name, (config, kind) in models.items():
            weights = projection.project({"": config})["models"][f", {kind}"]["bytes_per_token"]
            token = config.kv_values_per_token() * _KV_ITEM
            seen = min(length, config.sliding_window or length)
            row[name] = round((weights + length * token) / (weights + seen * token), 4)
        rows.append({"length": length, "ratios": row})
    return rows


def _most_held(config: ModelConfig, item_bytes: int) -> int | None:
    """Bytes that ours never exceeds: window, rewind and one chunk of slack, at each position."""
    if config.sliding_window is None:
        return None
    entries = config.sliding_window + REWIND + max(STEP, prefill_step())
    return config.kv_values_per_token() * item_bytes * entries


def _fitting(lengths: Sequence[int], config: ModelConfig) -> list[int]:
    return [length for length in lengths if length <= config.max_position_embeddings]


def _tokens(settings: Effort) -> int:
    return max(2, min(settings.tokens, _TOKENS))
