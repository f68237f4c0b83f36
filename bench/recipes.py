"""What a recipe's bits buy: perplexity dense, uniform, mixed and by plan, at equal sizes.

Every side is a directory that `python -m convert` writes, so what is measured is what a user gets.
`plan` runs twice: in the 4 bits of `uniform`, and in those of mixed_4_6. With `--calibrate TEXT`
it uses a table measured on this model under this plan; without, the one that comes with the
package.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from bench import perplexity, process
from bench.perplexity import text as text
from bench.report import parser, run
from bench.suite import Results
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import open_checkpoint

MIXED = "mixed_4_6"


def main(argv: list[str] | None = None) -> int:
    p = parser("recipes", "Perplexity of a model quantized by each recipe, at equal sizes.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--plan", metavar="NAME|FILE", help="a layer plan")
    p.add_argument("--calibrate", metavar="FILE", help="text (or table) for the recipe plan")
    perplexity.add_text(p)
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    plan = ["-q", "--q-recipe", "plan"]
    plan += ["--calibrate", args.calibrate] if args.calibrate else []
    with tempfile.TemporaryDirectory() as folder:
        made = {
            name: convert(args, Path(folder, name), *flags)
            for name, flags in {
                "dense": [],
                "uniform": ["-q", "--q-bits", "4"],
                "plan": [*plan, "--q-bits", "4"],
                MIXED: ["-q", "--q-recipe", MIXED],
            }.items()
        }
        budget = perplexity.stored_bits(open_checkpoint(Path(made[MIXED])))
        larger = f"plan at {budget:.2f}"
        made[larger] = convert(args, Path(folder, larger), *plan, "--q-budget", str(budget))
        found = perplexity.measure(list(made.values()), None, args)
    return dict(zip(made, found.values(), strict=True))


def convert(args: argparse.Namespace, path: Path, *flags: str) -> str:
    """Run the converter into `path`, in a process of its own: as users start it.

    Raises CerebrumError with its message.
    """
    words = ["convert", "--hf-path", args.model, "--mlx-path", str(path)]
    words += ["--quiet", "--dtype", "bfloat16", *flags]
    words += [] if args.plan is None else ["--plan", args.plan]
    if open_checkpoint(hub.resolve(args.model)).config.quantization is not None:
        words.append("--dequantize")
    process.seconds(words)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
