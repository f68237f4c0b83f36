"""`python -m bench`: what the second model costs and gives, and how both stand to the peers.

python -m bench                                      every suite on the demo model
python -m bench --model DIR --suite speed,memory     some of them, on another
python -m bench --model DIR --out bench/results/NAME tables, pictures and JSON for others
python -m bench --random-7b                          the 7B's geometry, random weights
python -m bench plans --sweep                        perplexity over a family of layer plans
python -m bench render DIR                           tables and pictures again, from the JSON
"""

import argparse
import datetime
import importlib
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

from bench import machine, render, suite
from bench.pair import Pair, open_pair
from bench.random_model import RandomCheckpoint
from bench.report import add_common, public
from bench.suite import Effort, Results, Suite
from mlx_cerebrum import cli, device
from mlx_cerebrum.errors import CerebrumError, RequestError
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.text import one_line, say, tell
from mlx_cerebrum.weights.opening import ModelSpec

# Those that measure in processes of their own come first, before this one holds weights.
SUITES = ("memory", "peers", "speed", "context", "quality")
FULL_SIZE = "full_size"
COMMANDS = {"plans": "bench.plans", "render": "bench.render"}


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="python -m bench",
        description="Compare two layer plans over one set of weights, and both with other engines.",
        epilog="also: python -m bench plans --help, python -m bench render --help",
    )
    p.add_argument(
        "--model",
        default="demo",
        metavar="DIR|FILE.gguf|HUBID|demo",
        help="whose weights (default: demo, a small trained model)",
    )
    p.add_argument(
        "--plan-a",
        metavar="NAME|FILE",
        help="the first model's layer plan (default: cerebrum-7b for 32 blocks, else as it is)",
    )
    p.add_argument(
        "--plan-b",
        metavar="NAME|FILE",
        help="the second's (default: cerebrum-12.25b, else the model card's formula)",
    )
    p.add_argument(
        "--suite",
        default="all",
        metavar="NAME[,NAME]",
        help=f"of {', '.join(SUITES)}, all (default: all)",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="write results.json, README.md, plots")
    p.add_argument(
        "--random-7b",
        action="store_true",
        help="random weights of the 7B's exact geometry, 14.5 GB in memory (with --q-bits less)",
    )
    p.add_argument(
        "--q-bits", type=int, metavar="N", help="pack dense weights while loading (default: don't)"
    )
    p.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="sliding window (default: the model's; 0: none)",
    )
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="each side (default: 5)")
    p.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="after which no new round of one comparison begins (default: 20)",
    )
    p.add_argument(
        "--tokens", type=int, default=32, metavar="N", help="decoded for a pace (default: 32)"
    )
    quality = p.add_argument_group("quality")
    quality.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="UTF-8 (default: two that come along)"
    )
    quality.add_argument(
        "--text-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="of each text, for each window length (default: 2048)",
    )
    quality.add_argument(
        "--tasks",
        default="",
        metavar="NAME[,NAME]",
        help="of lm-evaluation-harness, zero-shot: arc_challenge,gsm8k,minerva_math need the hub"
        " (default: arithmetic that comes along)",
    )
    quality.add_argument(
        "--task-dir",
        type=Path,
        metavar="DIR",
        help="more task files for it; they can name Python code, which then runs",
    )
    quality.add_argument(
        "--limit", type=int, metavar="N", help="questions of each task (default: all of them)"
    )
    p.add_argument("--work", type=Path, metavar="DIR", help="for large files (default: temporary)")
    add_common(p)
    return p


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return cast(int, importlib.import_module(COMMANDS[words[0]]).main(words[1:]))
    args = parser().parse_args(words)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args, words), args.debug)


def _run(args: argparse.Namespace, words: list[str]) -> int:
    names = _names(args)
    if args.rounds < 1 or args.tokens < 2 or args.text_tokens < 2:
        raise RequestError("--rounds must be at least 1, --tokens and --text-tokens at least 2")
    if args.seconds <= 0:
        raise RequestError("--seconds must be more than 0")
    if args.limit is not None and args.limit < 1:
        raise RequestError("--limit must be at least 1")
    if args.random_7b:
        if args.model != "demo" or args.window is not None:
            raise RequestError("--random-7b is a model and a window of its own: drop the other")
        random = RandomCheckpoint(Path("random-7b"))
        spec = ModelSpec(random.path, q_bits=args.q_bits)
        pair = Pair.of(random, spec, args.plan_a, args.plan_b)
    else:
        pair = open_pair(
            args.model, args.plan_a, args.plan_b, window=args.window, q_bits=args.q_bits
        )
    document = new_document(["python", "-m", "bench", *words], pair)
    if args.out is not None:
        document = joined(args.out, document)
    # As generate runs, and mlx-lm: on Metal the weights stay resident.
    with tempfile.TemporaryDirectory(dir=args.work) as folder, limits():
        settings = _settings(args, Path(folder))
        for name in names:
            try:
                run_suite(document, name, pair, settings)
            except CerebrumError as error:
                if len(names) == 1:
                    raise
                # One question that this model can't be asked must not cost the others.
                document["suites"][name] = {"not_measured": one_line(str(error))}
                settings.say(f"{name}: not measured: {error}")
            if args.out is not None:  # what is done is kept, whatever comes after
                suite.write(args.out, document)
    if args.out is not None:
        render.report(document, args.out)
    if not args.json:
        say(render.report(document))  # without the pictures
    say(json.dumps(document, ensure_ascii=False))
    return 0


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    if args.random_7b:
        if args.suite != "all":
            raise RequestError("--random-7b has suites of its own, speed and memory: drop --suite")
        # Paces at all lengths would take hours on a CPU.
        return (FULL_SIZE, "speed") if device.on_gpu() else (FULL_SIZE,)
    asked = SUITES if args.suite == "all" else tuple(args.suite.split(","))
    for name in asked:
        if name not in SUITES:
            raise RequestError(f"--suite {name!r} is not one of {', '.join(SUITES)}, all")
    return tuple(name for name in SUITES if name in asked)


def _settings(args: argparse.Namespace, work: Path) -> Effort:
    return Effort(
        work=work,
        rounds=args.rounds,
        seconds=args.seconds,
        tokens=args.tokens,
        texts=tuple(map(Path, args.text)),
        text_tokens=args.text_tokens,
        tasks=tuple(filter(None, args.tasks.split(","))),
        task_dir=args.task_dir,
        limit=args.limit,
        say=tell,
    )


def new_document(command: list[str], pair: Pair) -> Results:
    """A document without results yet. Its command holds no path of this machine."""
    return {
        "schema": 1,
        "command": shlex.join(public(word) for word in command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.card(),
        "model": pair.card(),
        "seconds": {},
        "runs": {},
        "suites": {},
    }


def run_suite(document: Results, name: str, pair: Pair, settings: Effort) -> None:
    """Measure one suite into the document. Raises a CerebrumError where it can't be."""
    settings.say(f"== {name}")
    module = cast(Suite, importlib.import_module(f"bench.{name}"))
    started = time.perf_counter()
    results = module.measure(pair, settings)
    record(document, name, results, time.perf_counter() - started)


def record(document: Results, name: str, results: Results, seconds: float) -> None:
    """Put a suite's results into the document, with what made them."""
    document["suites"][name] = results
    document["seconds"][name] = round(seconds, 1)
    document["runs"][name] = {
        "command": document["command"],
        "date": document["date"],
        "commit": machine.commit(),
    }


def joined(directory: Path, document: Results) -> Results:
    """The document to go on with: what `directory` holds already, of this machine and model.

    Raises RequestError where it holds another's: a table must not mix two.
    """
    if not (directory / suite.FILE).exists():
        # What single benches printed with --json may lie there already.
        if directory.exists() and any(path.suffix != ".json" for path in directory.iterdir()):
            raise RequestError(f"{directory} is in use and holds no {suite.FILE}; name another")
        return document
    before = suite.read(directory / suite.FILE)
    for key in ("machine", "model"):
        found = [one.get(key, {}) | {"load_average": None} for one in (document, before)]
        if found[0] != found[1]:
            raise RequestError(f"{directory} holds results of another {key}; name another --out")
    kept = {key: before.get(key, {}) for key in ("suites", "seconds", "runs")}
    return document | kept


if __name__ == "__main__":
    sys.exit(main())
