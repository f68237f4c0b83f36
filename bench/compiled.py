"""Would `mx.compile` pay? The whole decode step compiled, against the step as it is, in turns.

A compiled step has fixed shapes: it writes into a buffer at a place that is an array, and attends
to all of the buffer behind a mask. What it saves is building the graph in Python and the kernels
that are fused; what it costs is the wider attention, and, once, tracing and compiling (on the CPU
MLX starts a C++ compiler). So a step is compiled only where the saving repays that within an
answer; this says after how many tokens it would.
"""

import argparse
import sys
import time
from statistics import median
from typing import Any, cast

import mlx.core as mx

from bench import machine, plain
from bench.report import Spread, parser, publish, ratio, rounds, table
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill
from mlx_cerebrum.model.cache import STEP
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import load

_PROMPT, _TOKENS = 64, 32


class Bucket:
    """A position's cache inside a compiled step: a buffer of fixed size."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array) -> None:
        self.keys, self.values, self.offset = keys, values, offset

    def make_mask(self, N: int, return_array: bool, window_size: int | None) -> mx.array:
        return (mx.arange(self.keys.shape[2]) <= self.offset)[None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        at = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, at, axes=(2,))
        self.values = mx.slice_update(self.values, values, at, axes=(2,))
        return self.keys, self.values


def main(argv: list[str] | None = None) -> int:
    p = parser("compiled", "The decode step under mx.compile, against the step as it is.")
    p.add_argument("--rounds", type=int, default=9, help="rounds in turns (default: 9)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    small, _ = plain.models(plain.CASES["decode, small"])
    found = {"small, random": measure(small, args.rounds)}
    found["demo"] = measure(load("demo")[0], args.rounds)
    publish(args, "compiled", found, text(found))
    return 0


def measure(model: Model, count: int) -> dict[str, Any]:
    """Seconds a token of both, and what the first compiled step took."""

    def step(token: mx.array, offset: mx.array, *buffers: mx.array) -> tuple[mx.array, ...]:
        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        caches: Any = [Bucket(keys, values, offset) for keys, values in pairs]
        following = mx.argmax(model(token[None], caches)[:, -1], axis=-1).astype(mx.int32)
        return following, offset + 1, *(a for c in caches for a in (c.keys, c.values))

    compiled = mx.compile(step)

    def run(function: Any) -> tuple[float, list[int]]:
        cache = model.make_cache()
        prefill(model, mx.arange(1, _PROMPT + 1), cache)
        token, tokens = mx.array([7], dtype=mx.int32), []
        state = [mx.array(_PROMPT), *(a for c in cache for a in (c.keys, c.values))]
        for each in cache:
            each.keys = each.values = None  # else every step would copy them
        seconds = []
        for _ in range(_TOKENS):
            started = time.perf_counter()
            token, *state = function(token, *state)
            mx.eval(token, state)
            seconds.append(time.perf_counter() - started)
            tokens.append(cast(int, token.item()))
        return median(seconds), tokens

    def eager() -> tuple[float, list[int]]:
        cache = model.make_cache()
        prefill(model, mx.arange(1, _PROMPT + 1), cache)
        token, tokens, seconds = mx.array([7], dtype=mx.int32), [], []
        for _ in range(_TOKENS):
            started = time.perf_counter()
            token = mx.argmax(model(token[None], cache)[:, -1], axis=-1)
            mx.eval(token)
            seconds.append(time.perf_counter() - started)
            tokens.append(cast(int, token.item()))
        return median(seconds), tokens

    assert _PROMPT + _TOKENS < STEP  # one bucket
    started = time.perf_counter()
    run(compiled)
    first = time.perf_counter() - started
    done = rounds({"as it is": eager, "compiled": lambda: run(compiled)}, count)
    paces = {name: [1 / seconds for seconds, _ in each] for name, each in done.items()}
    again, plainly = (median([s for s, _ in done[n]]) for n in ("compiled", "as it is"))
    cost = first - again * _TOKENS
    return {
        "positions": model.config.num_positions,
        "pace": {name: Spread.of(values).as_json() for name, values in paces.items()},
        "ratio": ratio(paces["compiled"], paces["as it is"]).as_json(),
        "cost": cost,
        "repaid_after": cost / (plainly - again) if again < plainly else None,
        "same_tokens": done["compiled"][0][1] == done["as it is"][0][1],
    }


def text(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, one in found.items():
        paces = (Spread(**one["pace"][side]).text(1) for side in ("as it is", "compiled"))
        repaid = one["repaid_after"]
        rows.append(
            [
                name,
                str(one["positions"]),
                *paces,
                Spread(**one["ratio"]).text(2),
                f"{one['cost']:.1f}",
                "never" if repaid is None else f"{repaid:.0f} tokens",
                "yes" if one["same_tokens"] else "no",
            ]
        )
    header = ["decoding", "positions", "as it is, tokens/s", "compiled", "ratio"]
    return [table([*header, "compiling took, s", "repaid after", "same tokens"], rows)]


if __name__ == "__main__":
    sys.exit(main())
