"""Does guessing pay? Plain decoding and each drafter in turns, on quoting and on open questions.

A target pass over a few rows costs little more than over one, where reading the weights is what
takes time. So tokens guessed cheaply and checked together are tokens won, if enough guesses hold
(mlx_cerebrum/decoding/speculative.py). Three figures say whether: how many tokens a target pass
yields, what the guesses cost, and the pace beside plain decoding of the same tokens. The cost
model (mlx_cerebrum/decoding/policy.py) foretells the pace from the other two; both are shown, so
that it can be judged before it is trusted for machines that are not here.

Every answer is compared token by token with the plain one. In float32 they must be equal.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from statistics import median

import mlx.core as mx

from bench import bootstrap
from bench.bandwidth import BITS, parameters_read
from bench.chat_prompts import GROUNDED, OPEN
from bench.engines import timed
from bench.pair import open_pair
from bench.random_model import GEOMETRIES
from bench.report import parser, ratio, rounds, run, table
from bench.suite import Results
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.draft_models import draft_model
from mlx_cerebrum.decoding.policy import MOST_DRAFTS, Costs, best_drafts, bytes_read, speedup
from mlx_cerebrum.decoding.speculative import Speculation, speculation
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.opening import planned_config

ROWS = (1, 2, 4, 8, 16)  # of a target pass whose cost is measured
# A row more of a target pass, in decode steps, on a GPU that is bound by bandwidth: assumed.
METAL_ROWS = (0.1, 0.02)
AGREEMENTS = (70, 80, 90)  # percent: that tables project for
PROJECTED = (  # bits of the target and of the drafter, and which model drafts
    ("bf16", "bf16", "7B"),
    ("bf16", "4-bit", "12.25B"),
    ("bf16", "4-bit", "7B"),
    ("8-bit", "4-bit", "12.25B"),
    ("8-bit", "4-bit", "7B"),
    ("4-bit", "4-bit", "7B"),
)

Drafting = Callable[[], Speculation | None]


def main(argv: list[str] | None = None) -> int:
    p = parser("speculation", "Plain decoding against each drafter, side by side.")
    p.add_argument("--model", default="demo", help="what to run (default: demo)")
    p.add_argument("--plan-a", help="the plan of the first model (default: its own)")
    p.add_argument("--plan-b", help="the plan of the second (default: the card's formula)")
    p.add_argument("--window", type=int, metavar="TOKENS", help="sliding window (default: its own)")
    p.add_argument("--draft-bits", type=int, default=4, help="of the packed drafter (default: 4)")
    p.add_argument("--tokens", type=int, default=64, help="tokens an answer (default: 64)")
    p.add_argument("--rounds", type=int, default=3, help="rounds a question (default: 3)")
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    if args.rounds < 1 or args.tokens < 2:
        raise RequestError("--rounds must be at least 1 and --tokens at least 2")
    pair = open_pair(args.model, args.plan_a, args.plan_b, window=args.window)
    tokenizer = pair.tokenizer()
    if tokenizer is None:
        raise RequestError(f"{args.model} has no tokenizer; speculation is measured on text")
    prompts = {
        f"{kind}: {name}": tokenizer.apply_chat_template([{"role": "user", "content": question}])
        for kind, questions in (("quoting", GROUNDED), ("open", OPEN))
        for name, question in questions.items()
    }
    models = zip(pair.names, pair.models(), strict=True)
    return {name: _of_model(model, prompts, args) for name, model in models}


def _of_model(model: Model, prompts: dict[str, list[int]], args: argparse.Namespace) -> Results:
    packed = f"{args.draft_bits}-bit"
    drafters = {packed: draft_model(model, bits=args.draft_bits)}
    sides: dict[str, Drafting] = {
        "plain": lambda: None,
        "ngram": partial(speculation, model),
        packed: partial(speculation, model, [drafters[packed]], ngrams=False),
    }
    order = tuple(range(model.config.num_hidden_layers))
    if order != model.config.layer_map:
        drafters["stored order"] = stored = model.view(order)
        sides["stored order"] = partial(speculation, model, [stored], ngrams=False)
        sides["auto"] = partial(speculation, model, [stored])
    else:
        sides["auto"] = sides.pop("ngram")  # all there is without another model's weights
    answers: dict[str, dict[str, list[Results]]] = {}
    for name, prompt in prompts.items():
        tell(f"{name}: {', '.join(sides)}")
        runs = {side: partial(_answer, model, prompt, make, args) for side, make in sides.items()}
        answers[name] = rounds(runs, args.rounds, warm=False)
    read = bytes_read(model)
    return {
        "positions": model.config.num_positions,
        "draft_cost": {name: bytes_read(drafter) / read for name, drafter in drafters.items()},
        "rows": _row_costs(model),
        "sides": {side: _side(answers, side) for side in sides},
    }


def _answer(model: Model, prompt: list[int], make: Drafting, args: argparse.Namespace) -> Results:
    drafting, most = make(), args.tokens
    if drafting is None:
        steps = generate_step(prompt, model, max_tokens=most)
    else:
        steps = generate_step(prompt, model, speculation=drafting, max_tokens=most)
    done = timed(steps, len(prompt))
    found: Results = {"tokens": done.tokens, "pace": done.decode_tps}
    return found | {"rounds": drafting.rounds if drafting else {}}


def _side(answers: dict[str, dict[str, list[Results]]], side: str) -> Results:
    """One side's figures: pace over plain by question, equal tokens, and how its guesses went."""
    ratios = {}
    passes = Counter[tuple[str, int, int]]()  # (drafter, guesses made, held) -> how often
    equal = compared = 0
    for name, runs in answers.items():
        pairs = list(zip(runs[side], runs["plain"], strict=True))
        ratios[name] = median(mine["pace"] / plain["pace"] for mine, plain in pairs)
        for mine, plain in pairs:
            passes.update(mine["rounds"])
            compared += len(plain["tokens"])
            equal += sum(a == b for a, b in zip(mine["tokens"], plain["tokens"], strict=True))
    found: Results = {"ratios": ratios, "equal": equal, "compared": compared}
    for kind, begins in (("quoting", "quoting"), ("open", "open"), ("all", "")):
        values = [value for name, value in ratios.items() if name.startswith(begins)]
        mean = bootstrap.interval(values)
        found[kind] = {"mean": mean.value, "low": mean.low, "high": mean.high}
    return found | _guesses(passes) if passes else found


def _guesses(passes: Counter[tuple[str, int, int]]) -> Results:
    """Tokens a pass, and of the passes that guess how much, and how often a guess held."""
    tried = [(made, held) for _, made, held in passes.elements() if made]
    hits = sum(held for _, held in tried)
    misses = sum(held < made for made, held in tried)  # what follows a miss was not compared
    return {
        "tokens_per_pass": 1 + hits / passes.total(),
        "share_of_passes_that_guess": len(tried) / passes.total(),
        "agreement": hits / (hits + misses) if tried else None,
        "mean_drafts": sum(made for made, _ in tried) / max(len(tried), 1),
    }


def _row_costs(model: Model) -> dict[str, float]:
    """Seconds of a target pass of L rows over that of one, 64 tokens in."""
    cache = model.make_cache()
    mx.eval(model(mx.arange(64)[None], cache))

    def seconds(length: int) -> float:
        started = time.perf_counter()
        mx.eval(mx.argmax(model(mx.arange(length)[None], cache), axis=-1))
        took = time.perf_counter() - started
        for layer_cache in cache:
            layer_cache.trim(length)
        return took

    found = rounds({str(length): partial(seconds, length) for length in ROWS}, 5)
    return {length: ratio(took, found["1"]).median for length, took in found.items()}


def text(results: Results) -> list[str]:
    parts = [
        "Decode pace over plain decoding's: the mean of each question's median over rounds in"
        " turns, with its bootstrap interval over the questions; and as the cost model foretells it"
        " from what the guesses and a target pass of several rows cost here."
    ]
    header = ["quoting", "open", "all ten", "foretold", "tokens a pass", "passes that guess"]
    header += ["guesses each", "agreement", "same tokens"]
    for name, model in results.items():
        sides = [[side, *_cells(model, side)] for side in model["sides"] if side != "plain"]
        rows = ", ".join(f"{length}: {cost:.2f}" for length, cost in model["rows"].items())
        parts += [
            table([f"{name}, {model['positions']} positions", *header], sides),
            f"A target pass of L rows, over one of 1 row, here: {rows}.",
        ]
    return parts + metal()


def _cells(model: Results, side: str) -> list[str]:
    one = model["sides"][side]
    paces = [one[kind] for kind in ("quoting", "open", "all")]
    shown = [f"{pace['mean']:.2f} ({pace['low']:.2f}-{pace['high']:.2f})" for pace in paces]
    guesses = [""] * 5
    if one.get("agreement") is not None:
        # auto's guesses come from several drafters, at several costs
        several = side == "auto" and len(model["draft_cost"]) > 1
        guesses = [
            "" if several else f"{foretold(model, side):.2f}",
            f"{one['tokens_per_pass']:.2f}",
            f"{one['share_of_passes_that_guess']:.0%}",
            f"{one['mean_drafts']:.1f}",
            f"{one['agreement']:.0%}",
        ]
    return [*shown, *guesses, f"{one['equal']} of {one['compared']}"]


def foretold(model: Results, side: str) -> float:
    """The cost model's speed-up of all passes: for the guesses made, with the rows' cost here."""
    one, draft = model["sides"][side], model["draft_cost"].get(side, 0.0)
    drafts = max(1, round(one["mean_drafts"]))
    near = min(ROWS[1:], key=lambda length: abs(length - 1 - drafts))
    costs = Costs(draft, max(0.0, (model["rows"][str(near)] - 1) / (near - 1)))
    # Passes that guess yield g tokens each at cost c; plain ones 1 at 1.
    gain = speedup(one["agreement"], drafts, costs)
    cost = 1 + drafts * (costs.draft + costs.row)
    share = one["share_of_passes_that_guess"]
    return float((share * gain * cost + (1 - share)) / (share * cost + (1 - share)))


def metal() -> list[str]:
    """For which precisions the 12.25B reaches the 7B's pace, from bytes: a projection."""
    config = ModelConfig.from_dict(GEOMETRIES["cerebrum-7b"])
    read = {
        name: parameters_read(planned_config(config, plan, None))
        for name, plan in (("7B", "cerebrum-7b"), ("12.25B", "cerebrum-12.25b"))
    }
    needed = read["12.25B"] / read["7B"]
    rows = []
    for target, drafter, name in PROJECTED:
        draft = read[name] * BITS[drafter] / (read["12.25B"] * BITS[target])

        def gain(percent: int, row: float, draft: float = draft) -> float:
            return best_drafts(percent / 100, Costs(draft, row), MOST_DRAFTS)[1]

        gains = ["-".join(f"{gain(a, row):.2f}" for row in METAL_ROWS) for a in AGREEMENTS]
        enough = [
            next((f"{a}%" for a in range(50, 100) if gain(a, row) >= needed), "none")
            for row in reversed(METAL_ROWS)
        ]
        reaches = " to ".join(dict.fromkeys(enough))
        rows.append([f"{target}, {name} {drafter}", f"{draft:.2f}", *gains, reaches])
    header = ["target, drafter", "bytes drafted / read", *(f"agreement {a}%" for a in AGREEMENTS)]
    return [
        "**A projection, not a measurement**: the 12.25B on a GPU bound by bandwidth, speed-up over"
        " its own plain decoding, for a row's cost of"
        f" {METAL_ROWS[0]:g} to {METAL_ROWS[1]:g} decode steps (assumed) and the best number of"
        f" guesses. The chip does not matter: bytes are read at one pace. {needed:.2f} is the 7B's"
        " own pace.",
        table([*header, "agreement that reaches the 7B"], rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
