"""The 7B and the 12.25B at their real size, with random weights: bytes, one block, pace.

Neither memory nor speed depends on what the weights are, so nothing is downloaded and nothing
is on disk: 32 blocks of random bfloat16 are made in memory (14.5 GB; `--q-bits` packs them on
the way). Bytes carry over to every machine. Paces do not: on MLX's CPU backend the 12.25B takes
some ten seconds a token, so at most 32 prompt tokens and 4 decoded are run there, once, and a
single block is timed alone, in each precision, where rounds can be had.

What Metal should make of it is projected from bytes and published bandwidths, and says so.
"""

import time
from statistics import median

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench import bandwidth, projection
from bench.engines import prompt_ids
from bench.pair import Pair
from bench.plots import Picture
from bench.report import Spread, table
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import generate_step, prefill_step
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock
from mlx_cerebrum.model.memory import GB, Workload
from mlx_cerebrum.weights.loading import fuse_projections
from mlx_cerebrum.weights.quantize import Packing

_CPU_PROMPT, _CPU_TOKENS, _CPU_ROUNDS = 32, 4, 1
_GPU_PROMPT = 512
_BLOCK_ROUNDS = 5


def measure(pair: Pair, settings: Effort) -> Results:
    gpu = device.on_gpu()
    prompt = prompt_ids(pair.checkpoint(), _GPU_PROMPT if gpu else _CPU_PROMPT)
    tokens = settings.tokens if gpu else _CPU_TOKENS
    storage = pair.storage()
    settings.say(f"one block alone, then {storage.nbytes / GB:.1f} GB of random weights")
    config = pair.a.config
    blocks = {name: _block(config, *kind) for name, kind in _kinds().items()}
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    models = dict(zip(pair.names, pair.models(), strict=True))
    loaded, peak = mx.get_active_memory() - held, mx.get_peak_memory() - held
    sides = {}
    for name, model in models.items():
        settings.say(f"{name}: {len(prompt)} prompt tokens, {tokens} decoded")
        rounds = settings.rounds if gpu else _CPU_ROUNDS
        runs = [_generate(model, prompt, tokens) for _ in range(rounds)]
        request = Workload(model.config, storage.dtype.size, len(prompt), tokens, prefill_step())
        sides[name] = {
            "positions": model.config.num_positions,
            "bytes_per_token": bandwidth.token_bytes(model, len(prompt)),
            "prefill": Spread.of([len(prompt) / run["first"] for run in runs]).as_json(),
            "decode": Spread.of([1 / run["token"] for run in runs]).as_json(),
            "kv": runs[0]["kv"],
            "kv_predicted": request.cache_bytes,
            "peak": max(run["peak"] for run in runs) - held,
        }
    return {
        "gpu": gpu,
        "names": list(pair.names),
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "rounds": settings.rounds if gpu else _CPU_ROUNDS,
        "weights": {
            "dtype": str(storage.dtype).rpartition(".")[2],
            "bits": pair.packing.bits if pair.packing else None,
            "predicted": storage.nbytes,
            "loaded": loaded,
            "peak_loading": peak,
        },
        "sides": sides,
        "blocks": blocks,
        "projection": projection.project({n: m.config for n, m in models.items()}),
    }


def _generate(model: Model, prompt: list[int], tokens: int) -> dict[str, float]:
    """Seconds to the first token and for each one after it; bytes of keys and values; peak."""
    mx.clear_cache()
    mx.reset_peak_memory()
    cache = model.make_cache()
    steps = generate_step(prompt, model, max_tokens=tokens + 1, cache=cache)
    started = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    return {
        "first": first - started,
        "token": (time.perf_counter() - first) / tokens,
        "kv": sum(layer.nbytes for layer in cache),
        "peak": mx.get_peak_memory(),
    }


def _kinds() -> dict[str, tuple[mx.Dtype, Packing | None]]:
    """What a block is timed in; packed with the activations that the loader would choose."""
    activations = mx.bfloat16 if device.on_gpu() else mx.float32
    return {
        "bfloat16": (mx.bfloat16, None),
        "float32": (mx.float32, None),
        "8-bit": (activations, Packing(8, 64)),
        "4-bit": (activations, Packing(4, 64)),
    }


def _block(config: ModelConfig, dtype: mx.Dtype, packing: Packing | None) -> dict[str, float]:
    """One block alone: its bytes, seconds of a decode step, GB/s that makes."""
    block = TransformerBlock(config)
    block.set_dtype(dtype)
    if packing is not None:
        nn.quantize(block, packing.group_size, packing.bits)
    fuse_projections(block)
    mx.eval(block.parameters())
    nbytes = sum(array.nbytes for array in dict(tree_flatten(block.parameters())).values())
    x = mx.ones((1, 1, config.hidden_size), dtype)
    seconds = median(bandwidth.times_of(lambda: block(x, None, None, None), _BLOCK_ROUNDS))
    return {"bytes": nbytes, "seconds": seconds, "reached": nbytes / seconds / GB}


def text(results: Results) -> list[str]:
    a, b = results["names"]
    sides, weights = results["sides"], results["weights"]

    def gb(value: float) -> str:
        return f"{value / GB:.3f}"

    def pace(name: str, phase: str) -> str:
        found = Spread(**sides[name][phase])
        return found.text(1) if results["gpu"] else f"{found.median:.3f}"

    def row(label: str, key: str) -> list[str]:
        return [label, *(gb(sides[name][key]) for name in (a, b))]

    decode = [sides[name]["decode"]["median"] for name in (b, a)]
    read = [sides[name]["bytes_per_token"] for name in (a, b)]
    rows = [
        ["positions over 32 blocks", *(str(sides[name]["positions"]) for name in (a, b))],
        row("read a token, GB", "bytes_per_token"),
        row("keys and values, GB", "kv"),
        row("the same, predicted", "kv_predicted"),
        row("peak while generating, GB", "peak"),
        ["prefill, tokens/s", *(pace(name, "prefill") for name in (a, b))],
        ["decode, tokens/s", *(pace(name, "decode") for name in (a, b))],
    ]
    block_rows = [
        [kind, f"{one['bytes'] / 1e6:.1f}", f"{one['seconds'] * 1e3:.1f}", f"{one['reached']:.2f}"]
        for kind, one in results["blocks"].items()
    ]
    packed = f" packed to {weights['bits']} bits" if weights["bits"] else ""
    warning = (
        []
        if results["gpu"]
        else [
            "**MLX's CPU backend: the paces below say nothing about Metal.** It has no fast 16-bit"
            " or quantized kernels. Bytes carry over."
        ]
    )
    return [
        f"Random weights of the 7B's exact geometry, {weights['dtype']}{packed}, held once for both"
        f" models: {gb(weights['loaded'])} GB (predicted {gb(weights['predicted'])}), at most"
        f" {gb(weights['peak_loading'])} while loading.",
        *warning,
        f"{results['prompt_tokens']} prompt tokens, {results['tokens']} decoded,"
        f" rounds: {results['rounds']}.",
        table(["", a, b], rows),
        f"By bytes {b} should decode at {read[0] / read[1]:.2f} of {a}'s pace; measured"
        f" {decode[0] / decode[1]:.2f}.",
        f"One block alone, a decode step (median of {_BLOCK_ROUNDS}):",
        table(["a block in", "MB", "ms", "GB/s"], block_rows),
        *projection.text(results["projection"]),
    ]


def plots(results: Results, machine: Results) -> dict[str, Picture]:
    return {}
