"""What folding saves: bytes loaded, folded against unrolled, and what loading peaks at.

The 12.25B runs 32 stored blocks in 56 positions. Unrolled, as mergekit writes it, 24 of its
56 layers are second copies; folded, each block is in memory once, so the blocks should take
32/56 of the bytes. Embedding, head and final norm are the same in both. A second view of
loaded weights (the 7B beside the 12.25B) should take nothing at all.

Random weights of a small geometry stand in for the real ones: bytes do not depend on values.
Each figure comes from a fresh process and from MLX's own counters, never from shapes: the
blocks' bytes are what `mx.get_active_memory` falls by when the blocks are dropped. Both
forms hold the same model, which is checked on its logits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import machine
from bench.random_model import GEOMETRIES, write_random
from bench.report import parser, publish, table
from mlx_cerebrum import cli
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.load import choose_storage, load_model, planned_config
from mlx_cerebrum.plan import resolve

PLAN = "cerebrum-12.25b"
MB = 1e6
PROBE = (1, 17, 4242, 9, 31999, 500, 7, 7)  # token ids whose logits tell models apart


def main(argv: list[str] | None = None) -> int:
    p = parser("memory", "Bytes of weights folded and unrolled, and the peak while loading.")
    p.add_argument("--measure", type=Path, metavar="DIR", help="load DIR, print its bytes as JSON")
    p.add_argument("--plan", metavar="NAME|FILE", help="with --measure: lay DIR's blocks out so")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.plan)))
        return 0
    geometry = GEOMETRIES["small"]
    layer_map = resolve(PLAN).layer_map(geometry["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as folder:
        stored, copied = Path(folder) / "stored", Path(folder) / "unrolled"
        write_random(stored, geometry)
        write_random(copied, geometry, layers=layer_map)
        folded, unrolled = _fresh(stored, "--plan", PLAN), _fresh(copied)
    results = {
        "folded": folded,
        "unrolled": unrolled,
        "block_ratio": folded["blocks"] / unrolled["blocks"],
        "expected_ratio": geometry["num_hidden_layers"] / len(layer_map),
        "same_logits": folded["logits"] == unrolled["logits"],
    }
    publish(args, "memory", results, _text(results))
    return 0


def measure(directory: Path, plan: str | None) -> dict[str, Any]:
    """Load a model in this process; bytes by MLX's counters, `predicted` by the loader."""
    checkpoint = open_checkpoint(directory)
    config = planned_config(checkpoint.config, plan, None)
    storage = choose_storage(checkpoint, None, "auto")
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(checkpoint, config, storage)
    loaded, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before

    view = model.view(tuple(range(config.num_hidden_layers)))
    logits = model(mx.array([PROBE]))[0, -1, :8].tolist()
    view(mx.array([PROBE]))  # nothing more is made by running it, either
    mx.clear_cache()
    viewed = mx.get_active_memory() - before

    per_block = len(model.model.layers)
    model.model.layers.clear()
    rest = mx.get_active_memory() - before
    return {
        "stored_blocks": per_block,
        "positions": config.num_positions,
        "predicted": storage.nbytes,
        "loaded": loaded,
        "peak": peak,
        "view": viewed - loaded,
        "blocks": viewed - rest,
        "rest": rest,
        "logits": logits,
    }


def _fresh(directory: Path, *flags: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", "--measure", str(directory), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise CerebrumError(last.removeprefix("error: "))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _text(results: dict[str, Any]) -> list[str]:
    forms = ("folded", "unrolled")

    def row(label: str, key: str, digits: int = 1) -> list[str]:
        return [label, *(f"{results[form][key] / MB:.{digits}f}" for form in forms)]

    def share(label: str, numerator: str, denominator: str) -> list[str]:
        return [
            label,
            *(f"{results[f][numerator] / results[f][denominator]:.4f}" for f in forms),
        ]

    def over(form: str) -> str:
        found = results[form]
        block = found["blocks"] / found["stored_blocks"]
        return f"{(found['peak'] - found['loaded']) / block:.2f}"

    rows = [
        ["stored blocks", *(str(results[form]["stored_blocks"]) for form in forms)],
        ["positions", *(str(results[form]["positions"]) for form in forms)],
        row("blocks, MB", "blocks", 2),
        row("embedding, head, norm, MB", "rest", 2),
        row("loaded, MB", "loaded", 2),
        share("loader's prediction / loaded", "predicted", "loaded"),
        row("peak while loading, MB", "peak", 2),
        ["peak above loaded, in blocks", *(over(form) for form in forms)],
        ["a second view, bytes", *(str(results[form]["view"]) for form in forms)],
    ]
    return [
        "Random weights of the small geometry, read by MLX's own counters.",
        table(["", *forms], rows),
        f"Block bytes folded / unrolled: {results['block_ratio']:.4f}"
        f" (32/56 = {results['expected_ratio']:.4f}). Same model: "
        f"{'yes, logits equal' if results['same_logits'] else 'NO, logits differ'}.",
    ]


if __name__ == "__main__":
    sys.exit(main())
