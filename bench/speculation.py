"""Does guessing pay? Plain decoding and each drafter in turns, on quoting and on open questions.

A target pass over a few rows costs little more than over one, where reading the weights is what
takes time. So tokens guessed cheaply and checked together are tokens won, if enough guesses hold
(mlx_cerebrum/speculative.py). Three figures say whether: how many tokens a target pass yields,
what the guesses cost, and the pace, side by side with plain decoding of the same tokens. The cost
model (mlx_cerebrum/decoding/policy.py) foretells the pace from the other two; both are shown, so
that it can be judged before it is trusted for machines that are not here.

Every answer is compared token by token with the plain one. In float32 they must be equal.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx

from bench import bootstrap, machine
from bench.chat_prompts import GROUNDED, OPEN
from bench.pair import open_pair
from bench.report import parser, publish, rounds
from bench.speculation_report import text
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import generate_step
from mlx_cerebrum.decoding.draft_models import draft_model
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.decoding.speculative import Speculation, speculation, speculative_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.text import tell

Run = dict[str, Any]
Drafting = Callable[[], Speculation | None]


def flags() -> cli.ArgumentParser:
    p = parser("speculation", "Plain decoding against each drafter, side by side.")
    p.add_argument("--model", default="demo", help="what to run (default: demo)")
    p.add_argument("--plan-a", help="the plan of the first model (default: its own)")
    p.add_argument("--plan-b", help="the plan of the second (default: the card's formula)")
    p.add_argument(
        "--window", type=int, metavar="TOKENS", help="sliding window (default: the model's)"
    )
    p.add_argument("--draft-bits", type=int, default=4, help="of the packed drafter (default: 4)")
    p.add_argument("--tokens", type=int, default=64, help="tokens an answer (default: 64)")
    p.add_argument("--rounds", type=int, default=3, help="rounds a question (default: 3)")
    p.add_argument("--only", choices=("a", "b"), help="measure one of the two (default: both)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.rounds < 1 or args.tokens < 2:
        raise RequestError("--rounds must be at least 1 and --tokens at least 2")
    pair = open_pair(args.model, args.plan_a, args.plan_b, window=args.window)
    tokenizer = pair.tokenizer()
    if tokenizer is None:
        raise RequestError(f"{args.model} has no tokenizer; speculation is measured on text")
    kinds = {"quoting": GROUNDED, "open": OPEN}
    ids = {
        f"{kind}: {name}": tokenizer.apply_chat_template([{"role": "user", "content": question}])
        for kind, questions in kinds.items()
        for name, question in questions.items()
    }
    models = dict(zip(pair.names, pair.models(), strict=True))
    if args.only:
        only = pair.names["ab".index(args.only)]
        models = {only: models[only]}
    found = {name: _measure(model, ids, args) for name, model in models.items()}
    publish(args, "speculation", found, text(found))
    return 0


def _measure(model: Model, prompts: dict[str, list[int]], args: argparse.Namespace) -> Run:
    packed = draft_model(model, bits=args.draft_bits)
    sides: dict[str, Drafting] = {
        "plain": lambda: None,
        "ngram": lambda: speculation(model),
        f"{args.draft_bits}-bit": lambda: speculation(model, [packed], ngrams=False),
    }
    costs = {f"{args.draft_bits}-bit": bytes_read(packed) / bytes_read(model)}
    order = tuple(range(model.config.num_hidden_layers))
    if order != model.config.layer_map:
        stored = model.view(order)
        sides["stored order"] = lambda: speculation(model, [stored], ngrams=False)
        costs["stored order"] = bytes_read(stored) / bytes_read(model)
        sides["auto"] = lambda: speculation(model, [stored])
    else:
        sides["auto"] = sides.pop("ngram")  # all there is without another model's weights
    answers: dict[str, Any] = {}
    for name, prompt in prompts.items():
        tell(f"{name}: {', '.join(sides)}")
        runs = {side: _runner(model, prompt, make, args.tokens) for side, make in sides.items()}
        answers[name] = rounds(runs, args.rounds, warm=False)
    return {
        "positions": model.config.num_positions,
        "bytes_read": bytes_read(model),
        "draft_cost": costs,
        "rows": _row_costs(model),
        "sides": {side: _side(answers, side, costs.get(side, 0.0)) for side in sides},
    }


def _runner(model: Model, prompt: list[int], make: Drafting, tokens: int) -> Callable[[], Run]:
    def run() -> Run:
        drafting = make()
        steps = (
            generate_step(prompt, model, max_tokens=tokens)
            if drafting is None
            else speculative_step(prompt, model, drafting, max_tokens=tokens)
        )
        answer, started, first = [next(steps)], time.perf_counter(), 1
        answer += list(steps)
        seconds = time.perf_counter() - started
        found: Run = {"tokens": answer, "pace": (len(answer) - first) / seconds}
        if drafting is not None:
            found["rounds"] = drafting.rounds
        return found

    return run


def _side(answers: dict[str, dict[str, list[Run]]], side: str, draft: float) -> Run:
    """One side's figures: pace over plain by question, histogram, equal tokens."""
    ratios, passes = {}, Counter[tuple[str, int, int]]()
    equal = compared = 0
    for name, runs in answers.items():
        pairs = list(zip(runs[side], runs["plain"], strict=True))
        ratios[name] = median([mine["pace"] / plain["pace"] for mine, plain in pairs])
        for mine, plain in pairs:
            passes.update(mine.get("rounds", {}))
            compared += len(plain["tokens"])
            equal += sum(a == b for a, b in zip(mine["tokens"], plain["tokens"], strict=True))
    found: Run = {"ratios": ratios, "equal": equal, "compared": compared}
    for kind in ("quoting", "open", ""):
        of_kind = [value for name, value in ratios.items() if name.startswith(kind)]
        values = bootstrap.interval(of_kind)
        found[kind or "all"] = {"mean": values.value, "low": values.low, "high": values.high}
    if passes:
        found |= _guesses(passes, draft)
    return found


def _guesses(passes: Counter[tuple[str, int, int]], draft: float) -> Run:
    """Tokens a pass, agreement, and how many guesses of a round held, by how many were made."""
    tokens = sum(count * (1 + held) for (_, _, held), count in passes.items())
    guessing = {key: count for key, count in passes.items() if key[1]}
    trials = sum(count * (held + (held < made)) for (_, made, held), count in guessing.items())
    hits = sum(count * held for (_, _, held), count in guessing.items())
    histogram: dict[str, list[int]] = {}
    for (_, made, held), count in guessing.items():
        row = histogram.setdefault(str(made), [0] * (made + 1))
        row[held] += count
    return {
        "tokens_per_pass": tokens / passes.total(),
        "share_of_passes_that_guess": sum(guessing.values()) / passes.total(),
        "agreement": hits / trials if trials else None,
        "mean_drafts": sum(k[1] * c for k, c in guessing.items()) / max(sum(guessing.values()), 1),
        "held_by_drafts": histogram,
        "draft_cost": draft,
    }


def _row_costs(model: Model, lengths: tuple[int, ...] = (1, 2, 4, 8, 16)) -> dict[str, float]:
    """Seconds of a target pass of L rows over that of one, 64 tokens in."""
    cache = model.make_cache()
    mx.eval(model(mx.arange(64)[None], cache))

    def passes(length: int) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            mx.eval(mx.argmax(model(mx.arange(length)[None], cache), axis=-1))
            seconds = time.perf_counter() - started
            for layer_cache in cache:
                layer_cache.trim(length)
            return seconds

        return run

    found = rounds({str(length): passes(length) for length in lengths}, 5)
    one = found["1"]
    return {
        length: median([a / b for a, b in zip(seconds, one, strict=True)])
        for length, seconds in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
