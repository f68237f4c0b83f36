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
same blocks run twice one by one and as a whole. A plan that runs more positions costs time on every
token, and without further training it nearly always predicts worse: the map says where in a model
that costs least. The best of many plans was chosen on this text: measure it again on another.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench import machine, render, suite, trie
from bench.bootstrap import Values, standard_error
from bench.likelihood import TEXTS, strided, text_ids
from bench.pair import Pair, open_pair
from bench.plan_family import SQRT_HALF, Cell, card, grid, other_ways, scale
from bench.plan_report import plots, text
from bench.report import parser
from bench.suite import Effort, Results
from mlx_cerebrum import cli
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.limits import limits
from mlx_cerebrum.plan.layer_plan import LayerPlan, resolve
from mlx_cerebrum.text import say, tell

__all__ = ["measure", "plots", "text"]

CONTEXT = 256
_LISTS: dict[str, Callable[[str], float]] = {
    "starts": int,
    "widths": int,
    "repeats": int,
    "scales": scale,
}


def command_line() -> cli.ArgumentParser:
    p = parser("plans", "Perplexity and agreement of many layer plans over one loaded model.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--sweep", action="store_true", help="try a family of plans, draw its map")
    plan = "measure this one too: a named plan, YAML, or one of the family (repeatable)"
    p.add_argument("--plan", action="append", default=[], metavar="NAME|FILE", help=plan)
    p.add_argument("--yaml", metavar="NAME", help="print a plan of the family, measure nothing")
    text = "UTF-8 (default: two that come along)"
    p.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help=text)
    p.add_argument("--tokens", type=int, default=256, metavar="N", help="of each (default: 256)")
    context = "a window (default: 256)"
    p.add_argument("--context", type=int, default=CONTEXT, metavar="N", help=context)
    for name, kind in _LISTS.items():
        only = "only these in a sweep"
        p.add_argument(f"--{name}", nargs="+", type=kind, default=[], metavar="N", help=only)
    p.add_argument("--out", type=Path, metavar="DIR", help="write results, a page, its map")
    return p


def main(argv: list[str] | None = None) -> int:
    args = command_line().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    words = sys.argv[1:] if argv is None else argv
    return cli.run(lambda: _run(args, words), args.debug)


def measure(
    pair: Pair,
    effort: Effort,
    context: int = CONTEXT,
    lists: Mapping[str, list[Any]] | None = None,  # as plan_family.grid has them
    plans: Sequence[LayerPlan | Cell] = (),
) -> Results:
    """The base, the card's plan with and without its scale, `plans`, and the family's members
    that combine the `lists`.

    Raises a CerebrumError for a model without a tokenizer, a text without a window, and lists
    that no plan of so many blocks fits.
    """
    tokenizer, texts = pair.opened.tokenizer, effort.texts or TEXTS
    windows = [
        window
        for file in texts
        for window in strided(*text_ids(tokenizer, file), context, effort.text_tokens)
    ]
    model = pair.models()[0]
    blocks, longest = model.config.num_hidden_layers, model.config.max_position_embeddings
    if context > longest:
        raise RequestError(f"a context of {context} tokens is past the model's {longest}")
    own = card(blocks)
    always = [own, card(blocks, SQRT_HALF), *other_ways(own)]
    cells = [Cell(*place) for place in product(*lists.values())] if lists else []
    cells = [cell for cell in cells if cell.fits(blocks)]
    if lists and not cells:
        raise RequestError(f"no plan of these lists fits a model of {blocks} blocks")
    members = list(dict.fromkeys([*always, *plans, *cells]))
    orders = [_layers(member, blocks) for member in members]
    views = [model.view(each.layer_map(blocks), each.residual_scales(blocks)) for each in orders]
    paths = [trie.path(view.config) for view in views]
    asked, run = sum(map(len, paths)), trie.positions(paths)
    effort.say(f"{len(paths)} plans, {asked} positions, of which {run} are run: the rest is shared")
    started = time.perf_counter()
    base = model.view(tuple(range(blocks)))
    reference, *scores = trie.evaluate(base, views, mx.array(windows, dtype=mx.int32), effort.say)
    return {
        "blocks": blocks,
        "texts": [file.stem for file in texts],
        "tokens": reference.shape[1],
        "context": context,
        "grid": dict(lists) if lists else None,
        "card": [cell.name for cell in always[:2]],
        "other_ways": [cell.name for cell in always[2:]],
        "given": [plan.name for plan in plans],
        "base": {"name": "base", "positions": blocks} | _figures(reference),
        "plans": [
            {"name": member.name, "positions": len(steps)}
            | (vars(member) if isinstance(member, Cell) else {})
            | _figures(score)
            for member, steps, score in zip(members, paths, scores, strict=True)
        ],
        "positions_asked": asked,
        "positions_run": run,
        "seconds": _round(time.perf_counter() - started),
    }


def _layers(plan: LayerPlan | Cell, blocks: int) -> LayerPlan:
    return plan.plan(blocks) if isinstance(plan, Cell) else plan


def _figures(scores: Values) -> Results:
    base, losses, kl, agrees = scores
    found = {
        "perplexity": math.exp(losses.mean()),
        "more_nats": (losses - base).mean(),
        "standard_error": standard_error(losses - base),
        "agreement": agrees.mean(),
        "kl": kl.mean(),
    }
    return {name: _round(value) for name, value in found.items()}


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
    if len({plan.name for plan in plans}) < len(plans):
        raise RequestError("two of the plans have the same name: rename one's file")
    for plan in plans:  # one for other blocks is refused before anything is loaded
        _layers(plan, blocks).layer_map(blocks)
    given = {name: sorted(set(getattr(args, name))) for name in _LISTS}
    if any(given.values()) and not args.sweep:
        raise RequestError("--starts, --widths, --repeats and --scales are for --sweep")
    lists = {name: given[name] or usual for name, usual in grid(blocks).items() if args.sweep}
    document = suite.begun(["python", "-m", "bench", "plans", *words], pair, args.out)
    with tempfile.TemporaryDirectory() as folder, limits():
        effort = Effort(Path(folder), texts=tuple(args.text), text_tokens=args.tokens, say=tell)
        results = measure(pair, effort, args.context, lists, plans)
    suite.record(document, "plans", results, results["seconds"])
    render.publish(document, args.out, only_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
