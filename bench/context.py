"""Decoding at a long context: pace, and bytes of keys and values, with the window and without.

Each decoded token reads the keys and values of all tokens before it, and they are all kept. A
sliding window bounds both: Mistral's is 4096 tokens, and Cerebrum's with it. mlx-lm runs the same
files as a Llama, with full attention. So **past the window the two do not compute the same
function**: the model was trained with the window, and its reference (transformers) honours it.

What a decoded token costs depends on how many keys there are, not on what they say. So caches are
filled with random keys and values, in chunks as a prompt comes, without running the model; each
round decodes some tokens and takes them back, the sides in turns.

Two parts: the model itself, as far as it has positions, and mlx-lm on a copy of each side with a
layer for each position; then the 7B's and the 12.25B's positions over random weights 1/16 as
wide with the real window, to 32768 tokens, where mlx-lm runs the 12.25B unrolled.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from bench import machine
from bench.attempts import one_line
from bench.bandwidth import BITS, parameters_read
from bench.copies import Copies
from bench.engines import timed
from bench.memory import MB, NARROW
from bench.pair import Pair, Side
from bench.plots import Picture, curves
from bench.random_model import GEOMETRIES, write_random
from bench.report import Spread, ratio, rounds, table
from bench.suite import Effort, Results
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import MemoryBudgetError
from mlx_cerebrum.model.cache import REWIND, STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import Workload, require
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.weights.opening import ModelSpec, open_model, planned_config

LENGTHS = (1024, 4096, 8192, 16384, 32768)
PLANS = ("cerebrum-12.25b", "cerebrum-7b")
PEER = "mlx-lm, 12.25b unrolled"
PROBE = 32  # tokens of the prompt whose logits are compared
_KV_ITEM = 2  # bytes of a key or value at full size
_TOKENS = 6  # decoded in a round at most: fewer than ours can always take back
_SHARE = 0.3  # of effort.seconds, for the rounds of one length
_PEER_CHUNK = 2048  # mlx-lm's own default
_REMEDY = "measure it where there is more memory"


@dataclass(frozen=True)
class Runner:
    """A model, and how its own library decodes with it."""

    config: ModelConfig  # with the window that its caches keep to
    dtype: mx.Dtype
    chunk: int  # tokens of a prompt at once
    make_caches: Callable[[], Sequence[Any]]
    steps: Callable[[Sequence[Any], int], Iterator[int]]  # caches, tokens to decode

    def prepare(self, length: int, tokens: int) -> tuple[Callable[[], float], Sequence[Any]]:
        """A round that decodes the last `tokens` of `length`, and the caches it decodes with.

        A round returns tokens/s, and takes its tokens back. Raises MemoryBudgetError for caches
        that can't fit.
        """
        filled = length - tokens
        request = Workload(self.config, self.dtype.size, filled + 1, tokens, prefill_step())
        require(request.bytes, f"a context of {length} tokens", _REMEDY)
        caches = self.make_caches()
        for cache in caches:
            fill(cache, filled, self.chunk, self.config, self.dtype)

        def decode() -> float:
            run = timed(self.steps(caches, tokens), 1)
            for cache in caches:
                cache.trim(cache.offset - filled)
            return run.decode_tps

        return decode, caches


def ours(model: Model) -> Runner:
    def steps(caches: Sequence[Any], tokens: int) -> Iterator[int]:
        return generate_step([1], model, max_tokens=tokens, cache=caches)

    return Runner(model.config, model.dtype, prefill_step(), model.make_cache, steps)


def peer(model: nn.Module, config: ModelConfig) -> Runner:
    """mlx-lm's model, with its own loop and caches: they keep everything."""
    from mlx_lm.generate import generate_step as peer_step
    from mlx_lm.models.cache import make_prompt_cache

    def steps(caches: Sequence[Any], tokens: int) -> Iterator[int]:
        found = peer_step(mx.array([1]), model, max_tokens=tokens, prompt_cache=caches)
        return (int(token) for token, _ in found)

    config, dtype = replace(config, sliding_window=None), model.model.norm.weight.dtype
    return Runner(config, dtype, _PEER_CHUNK, partial(make_prompt_cache, model), steps)


def fill(cache: Any, length: int, chunk: int, config: ModelConfig, dtype: mx.Dtype) -> None:
    """Append random keys and values of `length` tokens, in chunks as a prompt comes."""
    shape = (1, config.num_key_value_heads, chunk, config.head_dim)
    keys, values = (mx.random.uniform(-1, 1, shape, dtype) for _ in range(2))
    for start in range(0, length, chunk):
        rows = min(chunk, length - start)
        cache.update_and_fetch(keys[:, :, :rows], values[:, :, :rows])
        mx.eval(cache.keys, cache.values)


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


def measure(
    pair: Pair,
    effort: Effort,
    lengths: Sequence[int] = LENGTHS,
    geometry: dict[str, Any] = NARROW,
) -> Results:
    """Lengths that a model has no positions for are left out."""
    config = pair.a.config
    model = _model(pair, effort, lengths)
    pair.release()
    mx.clear_cache()
    return {
        "names": list(pair.names),
        "window": config.sliding_window,
        "positions": config.max_position_embeddings,
        "tokens": _tokens(effort),
        "model": model,
        "random": _random(effort, lengths, geometry),
    }


def _model(pair: Pair, effort: Effort, lengths: Sequence[int]) -> Results:
    """The model itself, and mlx-lm on each side."""
    runners = {name: ours(model) for name, model in zip(pair.names, pair.models(), strict=True)}
    peers: Results = {}
    missing = {}
    for side, model in zip(pair.sides, pair.models(), strict=True):
        name = f"mlx-lm, {side.name}"
        try:
            copy = _copy(pair, side, effort)
            peers[name] = {"of": side.name, "logits_differ_by": difference(model, copy)}
            runners[name] = peer(copy, model.config)
        except Exception as error:  # a peer may raise anything
            missing[name] = one_line(error)
    measured = _lengths(lengths, runners, peers, effort)
    return {"peers": peers, "peers_missing": missing, "lengths": measured}


def _copy(pair: Pair, side: Side, effort: Effort) -> nn.Module:
    """mlx-lm's model of one side. Its files are gone when it is loaded.

    Raises CerebrumError for what can't be written, MemoryBudgetError for what can't be loaded.
    """
    effort.say(f"context: {side.name} for mlx-lm")
    storage, config = pair.storage(), side.config
    needed = storage.nbytes * config.executed_parameters // config.stored_parameters
    require(needed, "loading its copy", _REMEDY)
    with tempfile.TemporaryDirectory(dir=effort.work) as folder:
        return load_peer(Copies(pair, side, Path(folder)).directory(), storage.dtype)


def _random(effort: Effort, lengths: Sequence[int], geometry: dict[str, Any]) -> Results:
    """The two Cerebrum models over narrow random weights, and mlx-lm on the unrolled one."""
    effort.say("context: writing a narrow random model, folded and unrolled")
    stored, copied = effort.work / "narrow", effort.work / "narrow-unrolled"
    write_random(stored, geometry)
    write_random(copied, geometry, layers=resolve(PLANS[0]).layer_map(32))
    merged = open_model(ModelSpec(stored, plan=PLANS[0])).load()
    base = merged.view(resolve(PLANS[1]).layer_map(32))
    config, dtype, copy = merged.config, merged.dtype, load_peer(copied, merged.dtype)
    runners = {PLANS[0]: ours(merged), PLANS[1]: ours(base), PEER: peer(copy, config)}
    peers: Results = {PEER: {"of": PLANS[0], "logits_differ_by": difference(merged, copy)}}
    # Ours never holds more: the window, what can be taken back, one chunk of slack.
    entries = geometry["sliding_window"] + REWIND + max(STEP, prefill_step())
    return {
        "names": list(runners),
        "peers": peers,
        "mlx_lm": machine.version("mlx-lm"),
        "dtype": str(dtype).rpartition(".")[2],
        "hidden_size": config.hidden_size,
        "window": config.sliding_window,
        "most_held": config.kv_values_per_token() * dtype.size * entries,
        "bytes_alone": [{"length": LENGTHS[-1], "ratios": bytes_alone(config, LENGTHS[-1])}],
        "lengths": _lengths(lengths, runners, peers, effort),
    }


def _lengths(
    lengths: Sequence[int], runners: Mapping[str, Runner], peers: Results, effort: Effort
) -> list[Results]:
    """For each length rounds of all that fit in memory; `peers` say what of ours each is `of`."""
    most = min(runner.config.max_position_embeddings for runner in runners.values())
    found: list[Results] = []
    for length in (n for n in lengths if n <= most):
        effort.say(f"context: {length} tokens")
        runs: dict[str, Callable[[], float]] = {}
        held: dict[str, Sequence[Any]] = {}
        missing: dict[str, str] = {}
        mx.clear_cache()  # the last length's
        for name, runner in runners.items():
            try:
                runs[name], held[name] = runner.prepare(length, _tokens(effort))
            except MemoryBudgetError as error:
                missing[name] = str(error)
        # After the first length every kernel has run.
        paces = rounds(runs, effort.rounds, seconds=_SHARE * effort.seconds, warm=not found)
        found.append(
            {
                "length": length,
                "rounds": max(map(len, paces.values()), default=0),
                "sides": {
                    name: {
                        "decode": Spread.of(pace).as_json(),
                        "kv": sum(cache.nbytes for cache in held[name]),
                    }
                    for name, pace in paces.items()
                },
                "missing": missing,
                "ratios": {
                    name: ratio(paces[one["of"]], paces[name]).as_json()
                    for name, one in peers.items()
                    if name in paces and one["of"] in paces
                },
            }
        )
    return found


def bytes_alone(narrow: ModelConfig, length: int) -> dict[str, float]:
    """Bytes that mlx-lm reads for a token after `length` over those that ours reads, by arithmetic.

    Ours reads the weights and the window's keys and values, mlx-lm those of all tokens.
    """
    full = planned_config(ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"]), PLANS[0], None)
    models = [("narrow", narrow, "bf16")]
    models += [(f"{PLANS[0]}, {kind}", full, kind) for kind in ("bf16", "4-bit")]
    found = {}
    for name, config, kind in models:
        weights = parameters_read(config) * BITS[kind] / 8
        token = config.kv_values_per_token() * _KV_ITEM
        seen = min(length, config.sliding_window or length)
        found[name] = round((weights + length * token) / (weights + seen * token), 4)
    return found


def _tokens(effort: Effort) -> int:
    return max(2, min(effort.tokens, _TOKENS))


def text(results: Results) -> list[str]:
    model, random = results["model"], results["random"]
    bound, first = random["most_held"], random["names"][0]
    held = [row["sides"][first]["kv"] for row in random["lengths"] if first in row["sides"]]
    kept = "never exceeded" if max(held, default=0) <= bound else "EXCEEDED"
    peers = model["peers"] | random["peers"]
    differ = "; ".join(f"{name} {one['logits_differ_by']:.1g}" for name, one in peers.items())
    missing = model["peers_missing"] | {
        f"{row['length']} tokens, {name}": reason
        for part in (model, random)
        for row in part["lengths"]
        for name, reason in row["missing"].items()
    }
    alone = random["bytes_alone"][-1]
    saved = "; ".join(f"{name} {value:.2f}" for name, value in alone["ratios"].items())
    return [
        f"Decode at a context, keys and values filled at random; each round decodes"
        f" {results['tokens']} tokens and takes them back. Median (lowest-highest) of rounds in"
        f" turns. This model's window: {results['window'] or 'none'}; its positions:"
        f" {results['positions']}.",
        _table(model, [*results["names"], *model["peers"]], "this model"),
        f"The Cerebrum models' positions over random {random['dtype']} weights (hidden size"
        f" {random['hidden_size']}) with their window of {random['window']} tokens.",
        _table(random, random["names"], "random weights"),
        *(f"{name}: not measured: {reason}" for name, reason in missing.items()),
        f"Ours may hold the window, what can be taken back and one chunk, {bound / MB:.1f} MB for"
        f" {first}: {kept} ({max(held, default=0) / MB:.1f} MB).",
        f"mlx-lm {random['mlx_lm']} runs the same weights in the dtype and bits ours computes with,"
        " a layer for each position, with full attention. How far its logits of a prompt inside the"
        f" window ({PROBE} tokens) are from ours, at most: {differ}. Past the window the two do not"
        " compute the same function: the model was trained to see the window only. A ratio there"
        " says what the window saves, not how well a kernel is written.",
        f"**From bytes alone, not measured**, at {alone['length']} tokens: what mlx-lm reads for a"
        " token (weights, and keys and values of all tokens) over what ours reads (weights, and the"
        f" window's): {saved}. More than that the window can't save where decoding is bound by"
        " bandwidth: at full size less than over narrow weights, which are few for their keys and"
        " values.",
    ]


def _table(part: Results, names: Sequence[str], label: str) -> str:
    """A part's lengths: paces, bytes, and ours over each peer. Empty where it did not fit."""
    header = [f"context, {label}"]
    header += [f"{name}, {unit}" for unit in ("tokens/s", "MB") for name in names]
    header += [f"ours / {name}" for name in part["peers"]]
    rows = []
    for row in part["lengths"]:
        sides = [row["sides"].get(name) for name in names]
        ratios = [row["ratios"].get(name) for name in part["peers"]]
        cells = [Spread.read(side["decode"]).text() if side else "" for side in sides]
        cells += [f"{side['kv'] / MB:.1f}" if side else "" for side in sides]
        cells += [Spread.read(found).text(2) if found else "" for found in ratios]
        rows.append([str(row["length"]), *cells, str(row["rounds"])])
    return table([*header, "rounds"], rows)


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    random = results["random"]

    def series(value: Callable[[Results], Spread]) -> dict[str, list[tuple[float, Spread]]]:
        rows = random["lengths"]
        return {
            n: [(float(row["length"]), value(row["sides"][n])) for row in rows if n in row["sides"]]
            for n in random["names"]
        }

    toy = f"random weights, hidden size {random['hidden_size']}"
    without, x = "ours with the window and mlx-lm without", "tokens of context"
    return {
        "context": curves(
            series(lambda side: Spread.read(side["decode"])),
            f"Decode pace over the context, {without}.",
            x=x,
            y="tokens/s",
            title=f"Decode over the context: {toy}",
            of=toy,
        ),
        "context-kv": curves(
            series(lambda side: Spread.of([side["kv"] / MB])),
            f"Bytes of keys and values over the context, {without}.",
            x=x,
            y="MB",
            title=f"Keys and values held: {toy}",
            log_y=True,
            of=toy,
        ),
    }
