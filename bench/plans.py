"""Any layer plan in seconds: perplexity and agreement of many plans over one loaded model.

python -m bench plans --sweep                              a family of plans, as a map
python -m bench plans --model DIR --plan cerebrum-12.25b   this plan beside the base
python -m bench plans --yaml s13-w4-r1 > plan.yml          one of the family, for convert

A self-merge has no weights of its own, so trying one needs no merge on disk: every plan is a
walk over the same blocks, and plans that begin alike share the work (bench/trie.py). All are
scored on the same windows of text against the *base*, each block once in order:

- perplexity, exp of the mean negative log-likelihood a token. What counts is the difference
  from the base in nats a token: it is paired token by token, so its standard error is far
  smaller than that of either.
- agreement, how often the plan's best next token is the base's own.
- KL(base || plan), by how much the next token's distribution has moved, in nats.

The family is defined in bench/plan_family.py. Always measured are the model card's own plan (of
32 blocks the 12.25B), the same with the writes of duplicated blocks scaled by sqrt(1/2), and the
same blocks run twice one by one and as a whole. How to read it: a plan that runs more positions
costs time on every token, and without further training it nearly always predicts worse. The map
says where in a model that costs least. The best of many plans was chosen on this text, so its
figure flatters it: measure it again on another.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from bench import machine, render, suite
from bench.pair import Pair, open_pair
from bench.perplexity import TEXTS, compare, perplexity
from bench.plan_family import SQRT_HALF, Cell, Grid, card, grids, other_ways, scale
from bench.plan_map import pictures
from bench.plan_table import paragraphs, survivors
from bench.plots import Picture
from bench.report import parser
from bench.suite import Effort, Results
from bench.trie import Path as Steps
from bench.trie import Scores, evaluate, pace, path, positions
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve
from mlx_cerebrum.text import say, tell
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer

SECONDS = 150.0  # that a sweep may take unless asked otherwise
CONTEXT = 256
TOKENS = 256  # of each text
_LISTS = ("starts", "widths", "repeats", "scales")


def command_line() -> cli.ArgumentParser:
    p = parser("plans", "Perplexity and agreement of many layer plans over one loaded model.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--sweep", action="store_true", help="try a family of plans, draw its map")
    p.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="NAME|FILE",
        help="measure this one too: a named plan, YAML, or one of the family (repeatable)",
    )
    p.add_argument("--yaml", metavar="NAME", help="print a plan of the family, measure nothing")
    p.add_argument("--text", nargs="+", default=[], metavar="FILE", help="UTF-8 (default: two)")
    p.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help=f"of each (default: {TOKENS})"
    )
    p.add_argument(
        "--context", type=int, default=CONTEXT, metavar="N", help=f"a window (default: {CONTEXT})"
    )
    for name in _LISTS:
        kind = scale if name == "scales" else int
        p.add_argument(
            f"--{name}", nargs="+", type=kind, default=[], metavar="N", help="only these in a sweep"
        )
    p.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help=f"what a sweep should take: as many starts as fit (default: {SECONDS:.0f})",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="write results, pictures, best plans")
    return p


def main(argv: list[str] | None = None) -> int:
    args = command_line().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    words = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _run(args, words), args.debug)


def measure(
    pair: Pair,
    settings: Effort,
    *,
    context: int = CONTEXT,
    sweep: Sequence[Grid] = (),
    plans: Sequence[LayerPlan | Cell] = (),
) -> Results:
    """The base, the card's plan with and without its scale, `plans`, and the cells of a grid.

    Of several grids, the first that should take no longer than `settings.seconds`, or the last.
    Raises RequestError for a model without a tokenizer and a text without a window.
    """
    tokenizer = pair.tokenizer()
    if tokenizer is None:
        raise RequestError(f"{pair.path} has no tokenizer, and plans are measured on text")
    texts = settings.texts or TEXTS
    windows = read_windows(tokenizer, texts, settings.text_tokens, context)
    model = pair.models()[0]
    blocks, longest = model.config.num_hidden_layers, model.config.max_position_embeddings
    if context > longest:
        raise RequestError(f"a context of {context} tokens is past the model's {longest}")
    own = card(blocks)
    always = [own, card(blocks, SQRT_HALF), *other_ways(own)]
    per_position, per_plan = pace(model, windows)
    for grid in sweep or (None,):
        cells = [] if grid is None else grid.cells(blocks)
        members = list(dict.fromkeys([*always, *plans, *cells]))
        paths = [_steps(member, blocks) for member in members]
        run, asked = positions(paths), sum(map(len, paths))
        expected = per_position * (blocks + run) + per_plan * (2 + len(paths))
        if expected <= settings.seconds:
            break
    settings.say(
        f"{len(paths)} plans, {asked} positions, of which {run} are run: the rest is shared;"
        f" about {expected:.0f} s"
    )
    started = time.perf_counter()
    base = path(range(blocks))
    reference, scores = evaluate(model, windows, base, paths, settings.say)
    return {
        "blocks": blocks,
        "texts": [text.stem for text in texts],
        "tokens": len(reference.losses),
        "context": context,
        "grid": None if grid is None else {name: list(getattr(grid, name)) for name in _LISTS},
        "card": [cell.name for cell in always[:2]],
        "other_ways": [cell.name for cell in always[2:]],
        "given": [plan.name for plan in plans],
        "base": {"name": "base"} | _figures(base, reference, reference),
        "plans": [
            _place(member) | _figures(steps, score, reference)
            for member, steps, score in zip(members, paths, scores, strict=True)
        ],
        "positions_asked": asked,
        "positions_run": run,
        "seconds_expected": _round(expected),
        "seconds": _round(time.perf_counter() - started),
    }


def text(results: Results) -> list[str]:
    """Markdown paragraphs and tables."""
    return paragraphs(results)


def plots(results: Results, machine_card: Results) -> dict[str, Picture]:
    """The maps, of a sweep only."""
    return pictures(results)


def read_windows(
    tokenizer: Tokenizer, texts: Sequence[Path], tokens: int, context: int
) -> mx.array:
    """Token ids `[B, context]`: as many windows of each text as score `tokens`, or as it has.

    They don't overlap; each starts with BOS where the tokenizer adds one, and its first id is
    only context. Raises RequestError for a text that has none.
    """
    start = tokenizer.encode("")
    step = context - len(start)
    if tokens < 1 or step < 2:
        raise RequestError("--tokens must be at least 1, and --context at least 3")
    rows: list[list[int]] = []
    for file in texts:
        try:
            ids = tokenizer.encode(file.read_text(encoding="utf-8"))[len(start) :]
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{file} can't be read as UTF-8 text: {error}") from None
        if len(ids) < step:
            raise RequestError(
                f"{file} has {len(ids)} tokens, a window {step}: give a longer text or a smaller"
                " --context"
            )
        count = min(-(-tokens // (context - 1)), len(ids) // step)
        rows += [start + ids[k * step : (k + 1) * step] for k in range(count)]
    return mx.array(rows, dtype=mx.int32)


def _steps(plan: LayerPlan | Cell, blocks: int) -> Steps:
    if isinstance(plan, Cell):
        return plan.path(blocks)
    return path(plan.layer_map(blocks), plan.residual_scales(blocks))


def _place(plan: LayerPlan | Cell) -> Results:
    """A plan's name and, of the family, its place there."""
    place = {"name": plan.name}
    return place | (vars(plan) if isinstance(plan, Cell) else {})


def _figures(steps: Steps, scores: Scores, reference: Scores) -> Results:
    losses = scores.losses.tolist()
    more, error = compare(losses, reference.losses.tolist())
    return {
        "positions": len(steps),
        "perplexity": _round(perplexity(losses)),
        "more_nats": _round(more),
        "standard_error": _round(error),
        "agreement": _round(float(scores.agrees.mean())),
        "kl": _round(float(scores.divergence.mean())),
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _run(args: argparse.Namespace, words: Sequence[str]) -> int:
    pair = open_pair(args.model)
    blocks = pair.checkpoint().config.num_hidden_layers
    if args.yaml is not None:
        cell = Cell.named(args.yaml)
        if cell is None:
            raise RequestError(f"{args.yaml!r} is not a plan of the family, such as s13-w4-r1")
        say(cell.plan(blocks).text, end="")
        return 0
    plans = [Cell.named(name) or resolve(name) for name in args.plan]
    if not args.sweep and not plans:
        raise RequestError("give --sweep for a family of plans, or --plan NAME for one")
    names = [plan.name for plan in plans]
    if len(set(names)) < len(names):
        raise RequestError("two of the plans have the same name: rename one's file")
    for plan in plans:
        _steps(plan, blocks)  # one for other blocks is refused before anything is loaded
    lists = [getattr(args, name) for name in _LISTS]
    if any(lists) and not args.sweep:
        raise RequestError("--starts, --widths, --repeats and --scales are for --sweep")
    sweep = grids(blocks, *lists) if args.sweep else []
    document = suite.begun(["python", "-m", "bench", "plans", *words], pair, args.out)
    with tempfile.TemporaryDirectory() as folder:
        settings = Effort(
            work=Path(folder),
            seconds=args.seconds,
            texts=tuple(map(Path, args.text)),
            text_tokens=args.tokens,
            say=tell,
        )
        with limits():
            results = measure(pair, settings, context=args.context, sweep=sweep, plans=plans)
    suite.record(document, "plans", results, results["seconds"])
    render.publish(document, args.out, only_json=args.json)
    if args.out is not None:
        write_plans(args.out / "plans", results)
    return 0


def write_plans(directory: Path, results: Results) -> None:
    """As YAML files, the plans of the family that lose least at their depth."""
    directory.mkdir(exist_ok=True)
    for name in survivors(results):
        cell = Cell.named(name)
        if cell is not None:
            yaml = cell.plan(results["blocks"]).text
            (directory / f"{name}.yml").write_text(yaml, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
