"""`python -m bench`: what the second model costs and gives, and how both stand to the peers.

python -m bench                                      every suite on the demo model
python -m bench --model DIR --suite speed,memory     some of them, on another
python -m bench --model DIR --out bench/results/NAME tables, pictures and JSON for others
python -m bench --random-7b                          the 7B's geometry, random weights
python -m bench plans --sweep                        perplexity over a family of layer plans
python -m bench render DIR                           tables and pictures again, from the JSON
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from bench import machine, render, suite
from bench.pair import Pair, open_pair
from bench.random_model import RandomCheckpoint
from bench.report import add_common
from bench.suite import Effort
from mlx_cerebrum import cli, device
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.text import one_line, tell
from mlx_cerebrum.weights.opening import ModelSpec

# Those that measure in processes of their own come first, before this one holds weights.
SUITES = ("memory", "peers", "speed", "context", "quality")
COMMANDS = ("plans", "render")


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m bench",
        description="Compare two layer plans over one set of weights, and both with other engines.",
        epilog="also: python -m bench plans --help, python -m bench render --help",
    )
    model = "whose weights (default: demo, a small trained model)"
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help=model)
    plan = "the first model's layer plan (default: cerebrum-7b for 32 blocks, else as it is)"
    p.add_argument("--plan-a", metavar="NAME|FILE", help=plan)
    plan = "the second's (default: cerebrum-12.25b, else the model card's formula)"
    p.add_argument("--plan-b", metavar="NAME|FILE", help=plan)
    names = f"of {', '.join(SUITES)} (default: all of them)"
    p.add_argument("--suite", default="all", metavar="NAME[,NAME]", help=names)
    p.add_argument("--out", type=Path, metavar="DIR", help="write results.json, README.md, plots")
    seven = "random weights of the 7B's exact geometry, 14.5 GB in memory (with --q-bits less)"
    p.add_argument("--random-7b", action="store_true", help=seven)
    bits = "pack dense weights while loading (default: don't)"
    p.add_argument("--q-bits", type=int, metavar="N", help=bits)
    window = "sliding window (default: the model's; 0: none)"
    p.add_argument("--window", type=int, metavar="TOKENS", help=window)
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="each side (default: 5)")
    seconds = "after which no new round of one comparison begins (default: 20)"
    p.add_argument("--seconds", type=float, default=20.0, metavar="S", help=seconds)
    tokens = "decoded for a pace (default: 32)"
    p.add_argument("--tokens", type=int, default=32, metavar="N", help=tokens)
    p.add_argument("--work", type=Path, metavar="DIR", help="for large files (default: temporary)")
    quality = p.add_argument_group("quality")
    text = "UTF-8 (default: two that come along)"
    quality.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    tokens = "of each text, for each window length (default: 2048)"
    quality.add_argument("--text-tokens", type=int, default=2048, metavar="N", help=tokens)
    tasks = (
        "of lm-evaluation-harness, zero-shot: arc_challenge,gsm8k,minerva_math need the hub"
        " (default: arithmetic that comes along)"
    )
    quality.add_argument("--tasks", default="", metavar="NAME[,NAME]", help=tasks)
    tasks = "more task files for it; they can name Python code, which then runs"
    quality.add_argument("--task-dir", type=Path, metavar="DIR", help=tasks)
    limit = "questions of each task (default: all of them)"
    quality.add_argument("--limit", type=int, metavar="N", help=limit)
    add_common(p)
    return p


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return int(suite.module(words[0]).main(words[1:]))
    args = parser().parse_args(words)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args, words), args.debug)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    if args.rounds < 1 or args.tokens < 2 or args.text_tokens < 2:
        raise RequestError("--rounds must be at least 1, --tokens and --text-tokens at least 2")
    if args.seconds <= 0 or (args.limit is not None and args.limit < 1):
        raise RequestError("--seconds must be more than 0, --limit at least 1")
    names = _names(args)
    if args.random_7b:
        random = RandomCheckpoint(Path("random-7b"))
        pair = Pair.of(random, ModelSpec(random.path, q_bits=args.q_bits), args.plan_a, args.plan_b)
    else:
        pair = open_pair(
            args.model, args.plan_a, args.plan_b, window=args.window, q_bits=args.q_bits
        )
    document = suite.begun(["python", "-m", "bench", *words], pair, args.out)
    # As generate runs, and mlx-lm: on Metal the weights stay resident.
    with tempfile.TemporaryDirectory(dir=args.work) as folder, limits():
        effort = Effort(
            work=Path(folder),
            rounds=args.rounds,
            seconds=args.seconds,
            tokens=args.tokens,
            texts=tuple(args.text),
            text_tokens=args.text_tokens,
            tasks=tuple(filter(None, args.tasks.split(","))),
            task_dir=args.task_dir,
            limit=args.limit,
        )
        for name in names:
            tell(f"== {name}")
            started = time.perf_counter()
            try:
                results = suite.module(name).measure(pair, effort)
            except CerebrumError as error:
                if len(names) == 1:
                    raise
                # One question that this model can't be asked must not cost the others.
                results = {"not_measured": one_line(str(error))}
                tell(f"{name}: not measured: {error}")
            suite.record(document, name, results, time.perf_counter() - started)
            if args.out is not None:  # what is done is kept, whatever comes after
                suite.write(args.out, document)
    render.publish(document, args.out, only_json=args.json)
    return 0


def _names(args: argparse.Namespace) -> list[str]:
    if args.random_7b:
        if args.model != "demo" or args.window is not None or args.suite != "all":
            raise RequestError(
                "--random-7b is a model, a window and suites of its own: drop --model, --window"
                " and --suite"
            )
        # Paces at all lengths would take hours on a CPU.
        return ["full_size", "speed"] if device.on_gpu() else ["full_size"]
    asked = SUITES if args.suite == "all" else args.suite.split(",")
    for name in asked:
        if name not in SUITES:
            raise RequestError(f"--suite {name!r} is not one of {', '.join(SUITES)}, all")
    return [name for name in SUITES if name in asked]


if __name__ == "__main__":
    sys.exit(main())
