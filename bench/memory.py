"""Bytes of weights, of keys and values, and at the peak: predicted, then measured.

Whether a model fits is asked before anything is allocated, so the answer is a prediction, and a
prediction nobody checks is a guess. Each configuration here is a process of its own. It predicts
first, by the functions the runtime refuses requests with: the weights' bytes, the caches' bytes
after a prompt and a few tokens, and the peak, which is the weights and `request_bytes`. Then it
loads, generates, and reads MLX's counters (`mx.get_active_memory`, `mx.get_peak_memory`), never
shapes. What loading peaks at is bounded rather than predicted: the loader asks for room for its
largest part besides the model.

The configurations: folded and unrolled, as stored and in 8 and 4 bits, and past a window (a
small one, 256 tokens) that bounds the caches; all of random weights in a small geometry, as
bytes do not depend on values. Then the model asked for, as each side runs it. The 12.25B runs
32 stored blocks in 56 positions. Unrolled, as mergekit writes it, 24 of its 56 layers are
second copies; folded, each block is in memory once, so the blocks should take 32/56 of the
bytes. A second view of loaded weights (the 7B beside the 12.25B) should take nothing at all.

Full size is arithmetic by the same functions, marked as a prediction; nothing of it is written.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from bench import process
from bench.memory_report import plots as plots
from bench.memory_report import text as text
from bench.pair import Pair
from bench.random_model import GEOMETRIES, RandomCheckpoint, write_random
from bench.suite import Effort, Results
from mlx_cerebrum import cli, device
from mlx_cerebrum.decoding.decode import generate_step, prefill_step
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import Workload, require
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.text import say
from mlx_cerebrum.weights.opening import (
    ModelSpec,
    Opened,
    open_model,
    planned_config,
)
from mlx_cerebrum.weights.storage import SMALLER

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


@dataclass(frozen=True)
class Case:
    """One configuration, as a process of its own is asked to measure it."""

    name: str
    directory: Path
    plan: str | None = None  # a name or a YAML file; None: the blocks' own order
    view: str | None = None  # what a second view runs
    bits: int | None = None
    window: int | None = None

    def arguments(self) -> list[str]:
        flags = {
            "--plan": self.plan,
            "--view": self.view,
            "--q-bits": self.bits,
            "--window": self.window,
        }
        given = [[flag, str(value)] for flag, value in flags.items() if value is not None]
        return ["bench.memory", str(self.directory), *(word for pair in given for word in pair)]


def measure(
    pair: Pair,
    settings: Effort,
    geometry: dict[str, Any] = NARROW,
    bits: Sequence[int | None] = BITS,
) -> Results:
    pair.release()  # what this process holds is lost to those that measure
    settings.say("memory: writing a small random model, folded and unrolled")
    blocks, layers = geometry["num_hidden_layers"], resolve(PLAN).layer_map(32)
    stored, copied = settings.work / "stored", settings.work / "unrolled"
    write_random(stored, geometry)
    write_random(copied, geometry, layers=layers)
    random = [_answer(case, settings) for case in _random_cases(stored, copied, bits)]
    both = [row["measured"] for row in random[:2] if "measured" in row]
    compared = len(both) == 2
    return {
        "tolerance": TOLERANCE,
        "hidden_size": geometry["hidden_size"],
        "window": geometry["sliding_window"],
        "small_window": SMALL_WINDOW,
        "random": random,
        "model": [_answer(case, settings) for case in _model_cases(pair, settings)],
        "block_ratio": both[0]["blocks"] / both[1]["blocks"] if compared else None,
        "expected_ratio": blocks / len(layers),
        "same_logits": both[0]["logits"] == both[1]["logits"] if compared else None,
        "full_size": {
            "prompt": _FULL_PROMPT,
            "chunk": _FULL_STEP,
            "positions": GEOMETRIES["cerebrum-7b"]["max_position_embeddings"],
            "rows": [row for each in BITS for row in _full_size(each)],
        },
    }


def _random_cases(stored: Path, copied: Path, bits: Sequence[int | None]) -> Iterator[Case]:
    for each in bits:
        held = "as stored" if each is None else f"{each}-bit"
        yield Case(f"folded, {held}", stored, PLAN, bits=each)
        yield Case(f"unrolled, {held}", copied, bits=each)
    past = f"past a window of {SMALL_WINDOW}"
    yield Case(f"folded, {past}", stored, PLAN, window=SMALL_WINDOW)
    yield Case(f"unrolled, {past}", copied, window=SMALL_WINDOW)


def _model_cases(pair: Pair, settings: Effort) -> Iterator[Case]:
    """Each side of the pair, with the other as its second view."""
    if isinstance(
        pair.checkpoint(), RandomCheckpoint
    ):  # made in memory: a process of its own can't open it
        return
    bits = None if pair.packing is None else pair.packing.bits
    plans = [
        None if side.plan is None else str(side.plan_file(settings.work)) for side in pair.sides
    ]
    for name, plan, view in zip(pair.names, plans, reversed(plans), strict=True):
        yield Case(name, pair.path, plan, view, bits, pair.window)


def _answer(case: Case, settings: Effort) -> Results:
    """What the case's process found, or why it could not."""
    settings.say(f"memory: {case.name}")
    try:
        found: Results = process.answer(case.arguments())
    except CerebrumError as error:
        return {"name": case.name, "not_measured": str(error)}
    return {"name": case.name} | found


def inspect(case: Case) -> Results:
    """Predict, load and generate in this process. Raises a CerebrumError for what can't fit."""
    spec = ModelSpec(case.directory, plan=case.plan, q_bits=case.bits, window=case.window)
    opened = open_model(spec)
    config, storage = opened.config, opened.storage
    other = planned_config(opened.checkpoint.config, case.view, case.window)
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
    require(needed, f"{case.directory.name} with a prompt of {prompt}", SMALLER)

    before = _active()
    mx.reset_peak_memory()
    model = opened.load()
    weights, loading = _active() - before, mx.get_peak_memory() - before
    mx.reset_peak_memory()
    cache = model.make_cache()
    ids = [1 + n % (config.vocab_size - 1) for n in range(prompt)]
    for _ in generate_step(ids, model, max_tokens=_TOKENS, cache=cache):
        pass
    peak, kv = mx.get_peak_memory() - before, _active() - before - weights
    cache.clear()

    probe = [[token % config.vocab_size for token in _PROBE]]
    logits = model(mx.array(probe))[0, -1, :8].tolist()
    alone = _active() - before
    view = model.view(other.layer_map, other.residual_scales)
    mx.eval(view(mx.array(probe)))  # nothing more is made by running it, either
    viewed = _active() - before
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
            "blocks": viewed - (_active() - before),
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


def _full_size(bits: int | None) -> Iterator[Results]:
    """The 7B's geometry, folded (either model) and unrolled (the 12.25B), by arithmetic."""
    raw = GEOMETRIES["cerebrum-7b"]
    positions = len(resolve(PLAN).layer_map(raw["num_hidden_layers"]))
    for form, layers in (("folded", raw["num_hidden_layers"]), ("unrolled", positions)):
        checkpoint = RandomCheckpoint(Path(form), raw | {"num_hidden_layers": layers})
        plan = PLAN if form == "folded" else None
        spec = ModelSpec(form, plan=plan, q_bits=bits, dtype="bfloat16")
        opened = Opened.of(checkpoint, spec)
        config, weights = opened.config, opened.storage.nbytes
        request = Workload(config, 2, _FULL_PROMPT, _FULL_TOKENS, _FULL_STEP)
        with mock.patch.object(device, "backend", return_value="metal"):
            needed = request.bytes
        yield {
            "form": form,
            "bits": bits,
            "weights": weights,
            "kv": request.cache_bytes,
            "peak": weights + needed,
            "kv_no_window": config.kv_values_per_token() * 2 * config.max_position_embeddings,
        }


def main(argv: list[str] | None = None) -> int:
    """Measure one configuration, and print it as JSON: what each line of the suite starts."""
    p = cli.ArgumentParser(prog="bench.memory", description="Predicted and measured bytes of DIR.")
    p.add_argument("directory", type=Path, metavar="DIR", help="a checkpoint, or a GGUF file")
    p.add_argument("--plan", metavar="NAME|FILE", help="lay its blocks out so")
    p.add_argument("--view", metavar="NAME|FILE", help="a second view's plan (default: as stored)")
    p.add_argument("--q-bits", type=int, metavar="N", help="pack dense weights while loading")
    p.add_argument("--window", type=int, metavar="TOKENS", help="sliding window (0: none)")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _print(args), args.debug)


def _print(args: argparse.Namespace) -> int:
    case = Case("", args.directory, args.plan, args.view, args.q_bits, args.window)
    say(json.dumps(inspect(case)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
