"""Bytes of weights, of keys and values, and at the peak: predicted, then measured.

Each configuration is a process of its own. It predicts first, by the functions that the runtime
refuses requests with: bytes of the weights, of the caches after a prompt and a few tokens, and at
the peak. Then it loads, generates, and reads MLX's counters (`mx.get_active_memory`,
`mx.get_peak_memory`), never shapes. What loading peaks at is bounded rather than predicted: the
loader asks for room for its largest part besides the model.

The configurations: folded and unrolled, as stored and in 8 and 4 bits, and past a small window
that bounds the caches; all of random weights in a small geometry, as bytes do not depend on
values. Then the model asked for, as each side runs it. Folded, each of the 12.25B's 32 blocks is
in memory once, so the blocks should take 32/56 of the unrolled one's bytes. A second view of
loaded weights (the 7B beside the 12.25B) should take nothing at all.

Full size is arithmetic by the same functions, marked as a prediction; nothing of it is written.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from bench.pair import Pair
from bench.random_model import GEOMETRIES, RandomCheckpoint, write_random
from bench.report import columns
from bench.suite import Effort, Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB, Workload, require
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_model, planned_config
from mlx_cerebrum.weights.storage import SMALLER

MB = 1e6
PLAN = "cerebrum-12.25b"
BITS = (None, 8, 4)  # None: as stored
TOLERANCE = 0.05
SMALL_WINDOW = 256
# `small` with its heads regrouped to a width that Metal has a fused attention kernel for.
NARROW = GEOMETRIES["small"] | {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
_PROMPT, _TOKENS = 1024, 8
# On the CPU backend a prompt is shortened to this many multiplications; packed ones are slow.
_CPU_WORK, _CPU_PACKED = 1e11, 3e9
_PROBE = (1, 17, 4242, 9, 31999, 500, 7, 7)  # token ids whose logits tell models apart
_FULL_PROMPT, _FULL_TOKENS, _FULL_STEP = 8192, 256, 512  # fills the window twice, Metal's chunk


def measure(
    pair: Pair,
    effort: Effort,
    geometry: dict[str, Any] = NARROW,
    bits: Sequence[int | None] = BITS,
) -> Results:
    pair.release()  # what this process holds is lost to those that measure
    effort.say("memory: writing a small random model, folded and unrolled")
    stored, copied = effort.work / "stored", effort.work / "unrolled"
    write_random(stored, geometry)
    write_random(copied, geometry, layers=resolve(PLAN).layer_map(32))
    random = {}
    for each in bits:
        held = "as stored" if each is None else f"{each}-bit"
        random[f"folded, {held}"] = ModelSpec(stored, plan=PLAN, q_bits=each)
        random[f"unrolled, {held}"] = ModelSpec(copied, q_bits=each)
    past = f"past a window of {SMALL_WINDOW}"
    random[f"folded, {past}"] = ModelSpec(stored, plan=PLAN, window=SMALL_WINDOW)
    random[f"unrolled, {past}"] = ModelSpec(copied, window=SMALL_WINDOW)
    spec, (a, b) = replace(pair.opened.spec, name=pair.path), pair.sides
    return {
        "tolerance": TOLERANCE,
        "hidden_size": geometry["hidden_size"],
        "window": geometry["sliding_window"],
        "random": [_answer(name, each, None, effort) for name, each in random.items()],
        "model": [
            _answer(side.name, replace(spec, plan=side.plan), other.plan, effort)
            for side, other in ((a, b), (b, a))
        ],
        "full_size": {
            "prompt": _FULL_PROMPT,
            "chunk": _FULL_STEP,
            "positions": GEOMETRIES["cerebrum-7b"]["max_position_embeddings"],
            "rows": [_full_size(form, each) for each in BITS for form in ("folded", "unrolled")],
        },
    }


def _answer(name: str, spec: ModelSpec, view: LayerPlan | None, effort: Effort) -> Results:
    """What a process of its own found, or why it could not."""
    effort.say(f"memory: {name}")
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        try:
            return {"name": name} | alone.submit(inspect, spec, view).result()
        except (CerebrumError, BrokenProcessPool) as error:  # refused, or killed
            return {"name": name, "not_measured": str(error)}


def inspect(spec: ModelSpec, view: LayerPlan | None) -> Results:
    """Predict, load and generate, in a process that holds nothing yet; then view it as `view`.

    Raises a CerebrumError for what can't fit.
    """
    opened = open_model(spec)
    config, storage = opened.config, opened.storage
    other = planned_config(opened.checkpoint.config, view, spec.window)
    packed = not storage.dequantize and any(storage.packings.values())
    prompt = prompt_tokens(config, packed)
    request = Workload(config, storage.dtype.size, prompt, _TOKENS, prefill_step())
    predicted = {
        "weights": storage.nbytes,
        "kv": request.cache_bytes,
        "peak": storage.nbytes + request.bytes,
        "loading": storage.nbytes + storage.transient,
    }
    needed = max(predicted["peak"], predicted["loading"])
    require(needed, f"{opened.checkpoint.path.name} with a prompt of {prompt}", SMALLER)

    model = opened.load()
    weights, loading = _active(), mx.get_peak_memory()
    mx.reset_peak_memory()
    cache = model.make_cache()
    ids = [1 + n % (config.vocab_size - 1) for n in range(prompt)]
    for _ in generate_step(ids, model, max_tokens=_TOKENS, cache=cache):
        pass
    peak, kv = mx.get_peak_memory(), _active() - weights
    cache.clear()

    probe = [[token % config.vocab_size for token in _PROBE]]
    logits = model(mx.array(probe))[0, -1, :8].tolist()
    alone = _active()
    second = model.view(other.layer_map, other.residual_scales)
    mx.eval(second(mx.array(probe)))  # nothing more is made by running it, either
    viewed = _active()
    model.model.layers.clear()
    return {
        "positions": config.num_positions,
        "stored_blocks": config.num_hidden_layers,
        "window": config.sliding_window,
        "dtype": str(storage.dtype).rpartition(".")[2],
        "prompt": prompt,
        "tokens": _TOKENS,
        "predicted": predicted,
        "measured": {
            "weights": weights,
            "kv": kv,
            "peak": peak,
            "loading": loading,
            "view": viewed - alone,
            "blocks": viewed - _active(),
            "logits": logits,
        },
    }


def _active() -> int:
    """Bytes of live arrays, once what was issued has let go of its own."""
    mx.synchronize()
    return mx.get_active_memory()


def prompt_tokens(config: ModelConfig, packed: bool) -> int:
    """How long a prompt is measured: all of it on a GPU, what takes some seconds on a CPU."""
    work = _CPU_PACKED if packed else _CPU_WORK
    affordable = _PROMPT if device.on_gpu() else int(work / config.executed_parameters)
    return max(2, min(_PROMPT, max(16, affordable), config.max_position_embeddings - _TOKENS))


def full_size(form: str, bits: int | None) -> Opened:
    """The 12.25B in the 7B's geometry, "folded" or "unrolled", with no weight made."""
    raw = GEOMETRIES["cerebrum-7b"]
    folded = form == "folded"
    layers = raw["num_hidden_layers"] if folded else len(resolve(PLAN).layer_map(32))
    checkpoint = RandomCheckpoint(Path(form), raw | {"num_hidden_layers": layers})
    plan = PLAN if folded else None
    return Opened.of(checkpoint, ModelSpec(form, plan=plan, q_bits=bits, dtype="bfloat16"))


def on_metal(request: Workload) -> int:
    """The bytes that a request takes there: no attention scores are held."""
    with mock.patch.object(device, "backend", return_value="metal"):
        return request.bytes


def _full_size(form: str, bits: int | None) -> Results:
    opened = full_size(form, bits)
    config, weights = opened.config, opened.storage.nbytes
    request = Workload(config, 2, _FULL_PROMPT, _FULL_TOKENS, _FULL_STEP)
    return {
        "form": form,
        "bits": bits,
        "weights": weights,
        "kv": request.cache_bytes,
        "peak": weights + on_metal(request),
        "kv_no_window": config.kv_values_per_token() * 2 * config.max_position_embeddings,
    }


def errors(row: Results) -> dict[str, float]:
    """How far each prediction is off, as a share of what was measured."""
    said = {"weights": "weights", "kv": "keys and values", "peak": "peak"}
    return {n: row["predicted"][key] / row["measured"][key] - 1 for key, n in said.items()}


def text(results: Results) -> list[str]:
    everything = results["random"] + results["model"]
    rows = [row for row in everything if "measured" in row]
    tolerance, full = results["tolerance"], results["full_size"]

    def worst(row: Results) -> str:
        name, error = max(errors(row).items(), key=lambda one: abs(one[1]))
        return f"{error:+.1%} ({name})"

    def both(row: Results, key: str) -> str:
        return f"{row['predicted'][key] / MB:.1f} / {row['measured'][key] / MB:.1f}"

    def gb(row: Results, key: str) -> str:
        return f"{row[key] / GB:.2f}"

    most = 1 + tolerance
    right = sum(max(map(abs, errors(row).values())) <= tolerance for row in rows)
    kept = sum(row["measured"]["loading"] <= most * row["predicted"]["loading"] for row in rows)
    view = max((row["measured"]["view"] for row in rows), default=0)
    return [
        f"Random weights of a small geometry (hidden size {results['hidden_size']}, a window of"
        f" {results['window']} tokens unless a smaller is named), then the model itself. Each line"
        " is a process of its own, read by MLX's counters.",
        columns(
            rows,
            ("predicted / measured, MB", lambda row: row["name"]),
            ("held in", lambda row: row["dtype"]),
            ("prompt", lambda row: str(row["prompt"])),
            ("weights", partial(both, key="weights")),
            ("keys and values", partial(both, key="kv")),
            ("peak", partial(both, key="peak")),
            ("loading, a bound", partial(both, key="loading")),
            ("off by at most", worst),
        ),
        f"{right} of {len(rows)} configurations are predicted within {tolerance:.0%}; loading"
        f" passes its bound by no more than that in {kept}. A second view of the weights took"
        f" {view} bytes at most.",
        *_folding(rows),
        *(
            f"{row['name']}: not measured: {row['not_measured']}"
            for row in everything
            if row not in rows
        ),
        "The 7B's geometry at full size, GB: **predicted, not measured**, for a prompt of"
        f" {full['prompt']} tokens in chunks of {full['chunk']} on Metal, which fills the window."
        " Folded holds the 7B, the 12.25B or both, and the caches are the 12.25B's; unrolled is"
        f" the 12.25B as mergekit writes it. Last, the caches of {full['positions']} tokens in an"
        " engine that ignores the window.",
        columns(
            full["rows"],
            ("", lambda row: f"{row['form']}, {_precision(row)}"),
            ("weights", partial(gb, key="weights")),
            ("keys and values", partial(gb, key="kv")),
            ("peak", partial(gb, key="peak")),
            ("keys and values, no window", partial(gb, key="kv_no_window")),
        ),
    ]


def _folding(rows: Sequence[Results]) -> list[str]:
    """Whether folding saves the second copies, and computes the same."""
    found = [row for row in rows if row["name"] in ("folded, as stored", "unrolled, as stored")]
    if len(found) < 2:
        return []
    folded, unrolled = found
    saved = folded["measured"]["blocks"] / unrolled["measured"]["blocks"]
    expected = folded["stored_blocks"] / unrolled["stored_blocks"]
    same = folded["measured"]["logits"] == unrolled["measured"]["logits"]
    return [
        f"Block bytes folded / unrolled: {saved:.4f} (expected {expected:.4f}). Same model:"
        f" {'yes, logits equal' if same else 'NO, logits differ'}."
    ]


def _precision(row: Results) -> str:
    return "bfloat16" if row["bits"] is None else f"{row['bits']}-bit"
