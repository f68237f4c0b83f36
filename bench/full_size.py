"""The 7B and the 12.25B at their real size, with random weights: bytes and pace.

Neither memory nor speed depends on what the weights are, so nothing is downloaded and nothing
is on disk: 32 blocks of random bfloat16 are made in memory (14.5 GB; `--q-bits` packs them on
the way). Bytes carry over to every machine. Paces do not: on MLX's CPU backend the 12.25B takes
some ten seconds a token, so 32 prompt tokens and 4 decoded are run there, once.

What Metal should make of it is projected from bytes and published bandwidths, and says so.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from bench import bandwidth
from bench.engines import prompt_ids, timed
from bench.pair import Pair
from bench.report import Spread, table
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.model.memory import GB, Workload

_CPU_PROMPT, _CPU_TOKENS, _CPU_ROUNDS = 32, 4, 1
_GPU_PROMPT = 512


def measure(pair: Pair, effort: Effort) -> Results:
    gpu = device.on_gpu()
    prompt = prompt_ids(pair.checkpoint(), _GPU_PROMPT if gpu else _CPU_PROMPT)
    tokens, count = (effort.tokens, effort.rounds) if gpu else (_CPU_TOKENS, _CPU_ROUNDS)
    storage = pair.storage()
    effort.say(f"{storage.nbytes / GB:.1f} GB of random weights")
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    models = dict(zip(pair.names, pair.models(), strict=True))
    loaded, loading = mx.get_active_memory() - held, mx.get_peak_memory() - held
    sides = {}
    for name, model in models.items():
        effort.say(f"{name}: {len(prompt)} prompt tokens, {tokens} decoded")
        mx.clear_cache()
        mx.reset_peak_memory()
        runs = []
        for _ in range(count):
            cache = model.make_cache()
            steps = generate_step(prompt, model, max_tokens=tokens + 1, cache=cache)
            runs.append(timed(steps, len(prompt)))
        request = Workload(model.config, storage.dtype.size, len(prompt), tokens, prefill_step())
        sides[name] = {
            "positions": model.config.num_positions,
            "bytes_per_token": bandwidth.token_bytes(model, len(prompt)),
            "prefill": Spread.of([run.prefill_tps for run in runs]).as_json(),
            "decode": Spread.of([run.decode_tps for run in runs]).as_json(),
            "kv": sum(layer.nbytes for layer in cache),
            "kv_predicted": request.cache_bytes,
            "peak": mx.get_peak_memory() - held,
        }
    return {
        "names": list(pair.names),
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "rounds": count,
        "weights": {
            "dtype": str(storage.dtype).rpartition(".")[2],
            "bits": pair.packing.bits if pair.packing else None,
            "predicted": storage.nbytes,
            "loaded": loaded,
            "peak_loading": loading,
        },
        "sides": sides,
        "projection": bandwidth.projected({n: m.config for n, m in models.items()}),
    }


def text(results: Results) -> list[str]:
    a, b = results["names"]
    weights, sides = results["weights"], [results["sides"][name] for name in (a, b)]

    def gb(value: float) -> str:
        return f"{value / GB:.3f}"

    def pace(found: Results) -> str:
        return Spread.read(found).text(3)

    rows: list[tuple[str, str, Callable[[Any], str]]] = [
        ("positions over 32 blocks", "positions", str),
        ("read a token, GB", "bytes_per_token", gb),
        ("keys and values, GB", "kv", gb),
        ("the same, predicted", "kv_predicted", gb),
        ("peak while generating, GB", "peak", gb),
        ("prefill, tokens/s", "prefill", pace),
        ("decode, tokens/s", "decode", pace),
    ]
    expected = sides[0]["bytes_per_token"] / sides[1]["bytes_per_token"]
    decoded = sides[1]["decode"]["median"] / sides[0]["decode"]["median"]
    packed = f" packed to {weights['bits']} bits" if weights["bits"] else ""
    return [
        f"Random weights of the 7B's exact geometry, {weights['dtype']}{packed}, held once for both"
        f" models: {gb(weights['loaded'])} GB (predicted {gb(weights['predicted'])}), at most"
        f" {gb(weights['peak_loading'])} while loading.",
        f"{results['prompt_tokens']} prompt tokens, {results['tokens']} decoded,"
        f" rounds: {results['rounds']}.",
        table(
            ["", a, b],
            [[label, *(show(side[key]) for side in sides)] for label, key, show in rows],
        ),
        f"By bytes {b} should decode at {expected:.2f} of {a}'s pace; measured {decoded:.2f}.",
        *bandwidth.text(results["projection"]),
    ]
