"""Where the time of one decode step and of one prefill chunk goes, by kind of operation.

python -m bench.step_profile                                  the demo model
python -m bench.step_profile --plan PLAN --context 2048       positions of a plan, longer ago
python -m bench.step_profile --geometry narrow --plan cerebrum-12.25b --context 16384
                                                              random weights, a real window

The whole pass and each of its kinds run in turns, after a warm-up, and medians are compared. A
kind runs alone, once for every position (see bench/step_kinds.py), so its time is what it costs
where nothing else interferes; building its graph is not counted. The whole is timed in two
parts: *building* its graph in Python, when nothing is computed yet, and evaluating that. A
generation on a GPU builds a step while the one before it runs; here the two do not overlap.

What is left of the whole is the *rest*: the kernels' scheduling where it costs more in a long
graph than in short ones, masks, buffers given back. It is below zero where the kinds apart cost
more than together; each of them waits once for its result, which the table states.

Bytes are those read at least: weights, keys and values, and the inputs. FLOPs are those the
result asks for; what a kernel computes beside it, and masks away, counts as time only.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import machine
from bench.memory import NARROW
from bench.random_model import GEOMETRIES, RandomCheckpoint
from bench.report import Spread, parser, public, publish, table
from bench.step_kinds import MOVING, WHOLE, Pass, Timing, decode_pass, prefill_pass, timed
from bench.suite import Results
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import STEP
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.model.memory import GB, Workload, require
from mlx_cerebrum.weights.opening import (
    ModelSpec,
    Opened,
    open_model,
)
from mlx_cerebrum.weights.storage import SMALLER

BUILD, REST = "building the graph", "the rest"
SHAPES = {"narrow": NARROW, "cerebrum-7b": GEOMETRIES["cerebrum-7b"]}
_COPIES = 3  # of the keys and values: the caches, what attention alone reads, what is moved


def command_line() -> cli.ArgumentParser:
    p = parser("step_profile", "Where one decode step and one prefill chunk spend their time.")
    p.add_argument("--model", metavar="DIR|FILE.gguf|HUBID|demo", help="which (default: demo)")
    p.add_argument(
        "--geometry",
        choices=sorted(SHAPES),
        help="random weights instead: 1/16 as wide as the 7B, or the 7B's own; both with its"
        " blocks and window",
    )
    p.add_argument("--plan", metavar="NAME|FILE", help="layer plan (default: as it is)")
    p.add_argument("--q-bits", type=int, metavar="N", help="pack dense weights while loading")
    p.add_argument("--window", type=int, metavar="TOKENS", help="sliding window (0: none)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="before (default: 512)")
    p.add_argument(
        "--chunk",
        type=int,
        default=prefill_step(),
        metavar="N",
        help=f"tokens of the prefill chunk (default: {prefill_step()}, as generate runs)",
    )
    p.add_argument("--rounds", type=int, default=9, metavar="N", help="of each (default: 9)")
    p.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="after which no new round of a pass begins (default: 60)",
    )
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write the results, for others")
    return p


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = command_line().parse_args(words)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args, words), args.debug)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    if min(args.context, args.chunk, args.rounds) < 1 or args.seconds < 0:
        raise RequestError("--context, --chunk and --rounds must be at least 1, --seconds 0")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise RequestError(f"--out {args.out}: there is no such folder")
    model, name = _open(args)
    with limits():
        results = measure(model, args.context, args.chunk, args.rounds, args.seconds)
    results = {"model": name, "plan": args.plan} | results
    publish(args, "step_profile", results, text(results))
    if args.out is not None:
        write(args.out, ["python", "-m", "bench.step_profile", *words], results)
    return 0


def write(path: Path, command: list[str], results: Results) -> None:
    """The results with what made them, for bench/results."""
    document = {
        "bench": "step_profile",
        "command": shlex.join(public(word) for word in command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": machine.commit(),
        "machine": machine.card(),
        "results": results,
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _open(args: argparse.Namespace) -> tuple[Model, str]:
    """The model and its name. Raises a CerebrumError for what can't be loaded or can't fit."""
    if args.geometry is not None and args.model is not None:
        raise RequestError("--geometry is a model of random weights: drop --model")
    name = f"random, {args.geometry}" if args.geometry else public(args.model or "demo")
    spec = ModelSpec(args.model or "demo", plan=args.plan, q_bits=args.q_bits, window=args.window)
    if args.geometry is not None:
        opened = Opened.of(RandomCheckpoint(Path(name), SHAPES[args.geometry]), spec)
    else:
        opened = open_model(spec)
    storage = opened.storage
    needed = storage.nbytes + storage.transient
    needed += _needed(opened.config, args.context, args.chunk, storage.dtype.size)
    require(needed, f"profiling {name}", f"{SMALLER}, or a shorter --context")
    return opened.load(), name


def _needed(config: ModelConfig, context: int, chunk: int, item_bytes: int) -> int:
    return _COPIES * Workload(config, item_bytes, context + chunk + 1, 1, chunk).bytes


def measure(
    model: Model, context: int, chunk: int, count: int = 9, seconds: float = 60.0
) -> Results:
    """One decode step and one prefill chunk of `chunk` tokens, each after `context` tokens."""
    config = model.config
    nothing = mx.zeros(1)
    mx.eval(nothing)
    waits = [timed(lambda: [nothing + 1]).evaluate for _ in range(50)]
    results: Results = {
        "positions": config.num_positions,
        "hidden_size": config.hidden_size,
        "window": config.sliding_window,
        "dtype": str(model.dtype).rpartition(".")[2],
        "context": context,
        "chunk": chunk,
        "wait": Spread.of(waits).as_json(),  # evaluating one addition of one number
        "decode": _measured(decode_pass(model, context), 3 * count, seconds),
    }
    mx.clear_cache()
    results["prefill"] = _measured(prefill_pass(model, context, chunk), count, seconds)
    return results


def _measured(found: Pass, count: int, seconds: float) -> Results:
    return summed(found.times(count, seconds), found)


def summed(times: dict[str, list[Timing]], found: Pass) -> Results:
    """Medians of seconds; the rest is what is left of the whole's."""
    kinds: Results = {
        name: {
            "seconds": Spread.of([t.evaluate for t in times[name]]).as_json(),
            "bytes": kind.nbytes,
            "flops": kind.flops,
        }
        for name, kind in found.kinds.items()
    }
    whole = Spread.of([t.build + t.evaluate for t in times[WHOLE]])
    build = Spread.of([t.build for t in times[WHOLE]])
    apart = sum(kind["seconds"]["median"] for kind in kinds.values())
    results: Results = {
        "rounds": len(times[WHOLE]),
        "whole": whole.as_json(),
        "build": build.as_json(),
        "kinds": kinds,
        "rest": float(f"{whole.median - build.median - apart:.5g}"),
    }
    if found.moving is not None:
        moving = Spread.of([t.evaluate for t in times[MOVING]])
        results["moving"] = {"seconds": moving.as_json(), "bytes": found.moving.nbytes}
    return results


def text(results: Results) -> list[str]:
    """A table for each pass, and what it leaves out."""
    window = f"a window of {results['window']}" if results["window"] else "no window"
    after = f"after {results['context']} tokens"
    decode, prefill = results["decode"], results["prefill"]
    moving = decode["moving"]["seconds"]["median"] * 1000
    return [
        f"{results['model']}, {results['plan'] or 'as it is'}: {results['positions']} positions,"
        f" {results['hidden_size']} wide, {window}, {results['dtype']}."
        f" Medians of {decode['rounds']} and {prefill['rounds']} rounds; every kind of operation"
        f" alone waits {results['wait']['median'] * 1e6:.0f} µs for its result.",
        _table(f"one decode step {after}", decode),
        f"One step in {STEP} moves the caches to new buffers: {moving:.2f} ms instead of its"
        f" appending, {moving / STEP:.3f} ms a token.",
        _table(f"a prefill chunk of {results['chunk']} {after}", prefill),
        f"Decoding {1 / decode['whole']['median']:.1f} tokens/s, prefilling"
        f" {results['chunk'] / prefill['whole']['median']:.1f}. A rest below zero: the kinds cost"
        f" more apart than together.",
    ]


def _table(title: str, found: Results) -> str:
    whole = found["whole"]["median"]

    def row(name: str, seconds: float, kind: dict[str, Any] | None = None) -> list[str]:
        cells = [name, f"{seconds * 1000:.2f}", f"{seconds / whole:.1%}"]
        for work, unit in (("bytes", 1e6), ("flops", 1e6)):
            cells.append(f"{kind[work] / unit:.2f}" if kind and kind[work] else "")
        for work in ("bytes", "flops"):
            cells.append(f"{kind[work] / GB / seconds:.2f}" if kind and kind[work] else "")
        return cells

    kinds = found["kinds"]
    every = {work: sum(kind[work] for kind in kinds.values()) for work in ("bytes", "flops")}
    rows = [row(name, kind["seconds"]["median"], kind) for name, kind in kinds.items()]
    rows += [row(BUILD, found["build"]["median"]), row(REST, found["rest"])]
    rows.append(row("all of it", whole, every))
    return table([title, "ms", "share", "MB", "MFLOP", "GB/s", "GFLOP/s"], rows)


if __name__ == "__main__":
    sys.exit(main())
