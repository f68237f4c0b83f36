"""From pressing return to the first token: whole processes, ours against mlx-lm.

A person who asks one question waits for the interpreter, the imports, the weights, the
prompt and the first token, in that order, and for a small model the first three are nearly
all of it. So whole processes are timed, started the way a person starts them, to their end
after one token. Each has the files it needs in the page cache: it is work that is measured,
not the disk.

mlx-lm can't read the demo's GGUF file, so the same model is written as directories for the
occasion: with the stored integers in mlx-lm's quantized layout, and dense in float32. Three
comparisons follow: each its own file of the same integers, both the float32 directory, and
ours unpacking the GGUF against mlx-lm spared from unpacking anything. A ratio below 1 means
that ours is faster.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import machine
from bench.directory import export
from bench.report import Spread, parser, publish, ratio, rounds, table
from mlx_cerebrum import cli, hub
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.errors import CerebrumError, RequestError

TARGET = 0.6  # of the peer's time, at most
# What is read -> the process that reads it.
OURS = {"stored": "mlx-cerebrum, as stored", "dense": "mlx-cerebrum, float32"}
PEER = {"stored": "mlx-lm, quantized", "dense": "mlx-lm, float32"}
COMPARISONS = (("stored", "stored"), ("dense", "dense"), ("stored", "dense"))  # ours, the peer's


def main(argv: list[str] | None = None) -> int:
    p = parser("start", "Seconds from the start of a process to its first token, ours and mlx-lm.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|demo", help="which")
    p.add_argument("--prompt", default="The capital of France is", metavar="TEXT", help="what")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="each side (default: 5)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise RequestError("--rounds must be at least 1")
    path = hub.resolve(args.model)
    asked = ["--prompt", args.prompt, "--max-tokens", "1"]
    with tempfile.TemporaryDirectory() as folder:
        quantized, dense = Path(folder) / "quantized", Path(folder) / "dense"
        # Opened anew each time: a checkpoint's modules can be read once.
        export(open_checkpoint(path), quantized, dense=False)
        export(open_checkpoint(path), dense, dense=True)
        models = {
            OURS["stored"]: ("mlx_cerebrum.generate", path),
            OURS["dense"]: ("mlx_cerebrum.generate", dense),
            PEER["stored"]: ("mlx_lm.generate", quantized),
            PEER["dense"]: ("mlx_lm.generate", dense),
        }
        sides = {
            label: partial(process_seconds, [module, "--model", str(model), *asked])
            for label, (module, model) in models.items()
        }
        seconds = rounds(sides, args.rounds)
    results: dict[str, Any] = {
        "seconds": {label: Spread.of(found).as_json() for label, found in seconds.items()},
        "ratios": {
            f"{OURS[ours]} / {PEER[peer]}": ratio(
                seconds[OURS[ours]], seconds[PEER[peer]]
            ).as_json()
            for ours, peer in COMPARISONS
        },
    }
    publish(args, "start", results, _text(args, results))
    return 0


def process_seconds(arguments: Sequence[str]) -> float:
    """Wall time of `python -m ...`, from the start to the exit."""
    # Neither side may ask the network anything.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment
    )
    took = time.perf_counter() - started
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise CerebrumError(f"python -m {arguments[0]} failed: {last}")
    return took


def _text(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    paces = [[name, Spread(**s).text(2)] for name, s in results["seconds"].items()]
    ratios = {name: Spread(**found) for name, found in results["ratios"].items()}
    shares = [
        [name, share.text(2), "yes" if share.median <= TARGET else "no"]
        for name, share in ratios.items()
    ]
    return [
        f"{args.model}, one token, whole process with its files in the page cache;"
        f" median (lowest-highest) of {args.rounds} rounds in turns.",
        table(["process", "seconds"], paces),
        table(["comparison", "ratio", f"at most {TARGET}"], shares),
    ]


if __name__ == "__main__":
    sys.exit(main())
