"""What a recipe's bits buy: perplexity dense, uniform, mixed and by plan, at equal sizes.

Every side is a directory that `python -m convert` writes, so what is measured is what a user gets.
`plan` runs twice by default: in the bits of `uniform`, and in those of `mixed_4_6`. With
`--calibrate TEXT` it uses a table measured on this model under this plan; without, the one that
comes with the package.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine
from bench.perplexity import TEXTS, report, stored_bits
from bench.perplexity import lines as text
from bench.report import parser, publish
from mlx_cerebrum import cli
from mlx_cerebrum.errors import CerebrumError
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import open_checkpoint


def main(argv: list[str] | None = None) -> int:
    p = parser("recipes", "Perplexity of a model quantized by each recipe, at equal sizes.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--plan", metavar="NAME|FILE", help="a layer plan")
    p.add_argument("--calibrate", metavar="FILE", help="text (or table) for the recipe plan")
    p.add_argument("--q-bits", type=int, default=4, metavar="N", help="of uniform (default: 4)")
    p.add_argument("--mixed", default="mixed_4_6", metavar="NAME", help="default: mixed_4_6")
    p.add_argument(
        "--text", nargs="+", default=[str(t) for t in TEXTS], metavar="FILE", help="UTF-8 text"
    )
    p.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each (default: 4096)")
    p.add_argument("--context", type=int, default=512, metavar="N", help="a window (default: 512)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bits = ["--q-bits", str(args.q_bits)]
        plan = ["-q", "--q-recipe", "plan"]
        if args.calibrate:
            plan += ["--calibrate", args.calibrate]
        made = {
            "dense": convert(args, folder / "dense"),
            "uniform": convert(args, folder / "uniform", "-q", *bits),
            "plan": convert(args, folder / "plan", *plan, *bits),
            args.mixed: convert(args, folder / args.mixed, "-q", "--q-recipe", args.mixed),
        }
        budget = stored_bits(open_checkpoint(made[args.mixed]))
        larger = f"plan at {budget:.2f}"
        made[larger] = convert(args, folder / larger, *plan, "--q-budget", str(budget))
        texts = [Path(file) for file in args.text]
        paths = [str(path) for path in made.values()]
        results = report(paths, None, texts, args.tokens, args.context)
        results = dict(zip(made, results.values(), strict=True))
    publish(args, "recipes", results, text(results))
    return 0


def convert(args: argparse.Namespace, path: Path, *flags: str) -> Path:
    """Run the converter, in a process of its own: benches measure it as users start it.

    Raises CerebrumError with its message.
    """
    command = [sys.executable, "-m", "convert", "--hf-path", args.model, "--mlx-path", str(path)]
    command += ["--quiet", "--dtype", "bfloat16", *flags]
    if args.plan is not None:
        command += ["--plan", args.plan]
    if open_checkpoint(hub.resolve(args.model)).config.quantization is not None:
        command.append("--dequantize")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CerebrumError(done.stderr.strip().removeprefix("error: ") or "convert failed")
    return path


if __name__ == "__main__":
    sys.exit(main())
