"""Where attention in slices pays on the CPU, against MLX's own, in turns.

MLX's own computes all scores of a chunk and takes their exponentials a value at a time there
(mlx_cerebrum/model/cpu.py says why that is slow). Slices cost calls instead: some 30
operations for each head and slice. So they pay from some number of scores on (`LEAST`), and a
slice has a best size (`SLICE`): fewer scores cost more calls, more of them leave the core's cache.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast
from unittest import mock

import mlx.core as mx

from bench import machine
from bench.report import Spread, parser, publish, ratio, rounds, table
from mlx_cerebrum import cli, device
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model import cpu
from mlx_cerebrum.model.cpu import LEAST, SLICE, attend_in_slices

HEADS = {"9 of 64": (9, 3, 64), "32 of 128": (32, 8, 128)}  # the demo's, the 7B's
SHAPES = ((8, 1024), (16, 2048), (128, 256), (256, 256), (256, 1024), (256, 2048), (256, 4351))
SIZES = (SLICE // 2, SLICE, 2 * SLICE)


def main(argv: list[str] | None = None) -> int:
    p = parser("attention", "Attention over a prompt on the CPU: in slices, and MLX's own.")
    p.add_argument("--rounds", type=int, default=9, help="rounds in turns (default: 9)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if device.on_gpu():
        raise RequestError("this compares two ways of the CPU; MLX computes on a GPU here")
    if args.rounds < 1:
        raise RequestError(f"--rounds must be at least 1, not {args.rounds}")
    found = {
        name: [measure(*heads, *shape, args.rounds) for shape in SHAPES]
        for name, heads in HEADS.items()
    }
    publish(args, "attention", found, text(found))
    return 0


def measure(
    heads: int, kv_heads: int, width: int, length: int, keys: int, count: int
) -> dict[str, Any]:
    """Seconds of one chunk's attention, whole and by size of slice, and what memory it took."""
    queries = mx.random.normal((1, heads, length, width))
    entries, values = (mx.random.normal((1, kv_heads, keys, width)) for _ in range(2))
    mx.eval(queries, entries, values)
    asked: dict[str, Any] = {"scale": width**-0.5, "mask": "causal"}

    def own() -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, entries, values, **asked)

    def sliced(size: int) -> mx.array:
        with mock.patch.object(cpu, "SLICE", size):
            return attend_in_slices(queries, entries, values, **asked)

    def run(way: Callable[[], mx.array]) -> tuple[float, int]:
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        mx.eval(way())
        seconds = time.perf_counter() - started
        return seconds, mx.get_peak_memory() - before

    ways: dict[str, Callable[[], mx.array]] = {"own": own}
    ways |= {str(size): partial(sliced, size) for size in SIZES}
    sides = {name: partial(run, way) for name, way in ways.items()}
    done = rounds(sides, count)
    seconds = {side: [one[0] for one in each] for side, each in done.items()}
    return {
        "length": length,
        "keys": keys,
        "own": Spread.of(seconds["own"]).as_json(),
        "speedup": {str(s): ratio(seconds["own"], seconds[str(s)]).as_json() for s in SIZES},
        "bytes": {side: max(one[1] for one in each) for side, each in done.items()},
        "error": cast(float, mx.max(mx.abs(sliced(SLICE) - own())).item()),
    }


def text(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, all_of_it in found.items():
        for one in all_of_it:
            taken = one["length"] * one["keys"] >= LEAST
            rows.append(
                [
                    f"{name}, {one['length']} over {one['keys']}",
                    f"{1e3 * one['own']['median']:.1f}",
                    *(Spread(**one["speedup"][str(size)]).text(2) for size in SIZES),
                    "slices" if taken else "MLX's own",
                    f"{one['bytes'][str(SLICE)] / one['bytes']['own']:.2f}",
                    f"{one['error']:.0e}",
                ]
            )
    header = ["heads, queries over keys", "MLX's own, ms"]
    header += [f"in slices of {size // 1024}k" for size in SIZES]
    return [table([*header, "taken", "memory", "differ by"], rows)]


if __name__ == "__main__":
    sys.exit(main())
