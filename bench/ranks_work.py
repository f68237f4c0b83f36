"""What each process of bench.ranks runs: the model alone, or with a launcher's environment a part.

python -m bench.ranks_work prompt --model demo --prompt 4096

The one that answers prints what it found, as JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

from bench.engines import prompt_ids, timed
from bench.pair import formula
from bench.suite import Results
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decoder import Decoder, generate_step
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.ranks import backend
from mlx_cerebrum.ranks.links import Links
from mlx_cerebrum.ranks.machines import Machines
from mlx_cerebrum.text import say
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.opening import ModelSpec, Opened, open_checkpoint, open_model

_BEFORE = 64  # tokens of an answer's prompt
_WARM = 4  # steps
_ENDLESS = 1 << 20  # tokens of an answer: more than any run decodes


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(prog="bench.ranks_work", description="One process of bench.ranks.")
    p.add_argument("what", choices=WHAT)
    p.add_argument("--model", default="demo", metavar="DIR|demo", help="which (default: demo)")
    plan = "layer plan (default: the card's formula)"
    p.add_argument("--plan", metavar="NAME|FILE", help=plan)
    p.add_argument("--prompt", type=int, default=512, help="tokens (default: 512)")
    p.add_argument("--rows", type=int, default=1, help="answers at once (default: 1)")
    p.add_argument("--tokens", type=int, default=32, help="of each answer (default: 32)")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    checkpoint = open_checkpoint(hub.resolve(args.model))
    blocks = checkpoint.config.num_hidden_layers
    spec = ModelSpec(args.model, plan=resolve(args.plan) if args.plan else formula(blocks))
    opened: Opened
    if (launched := backend()) is None:
        opened = open_model(spec)
    else:
        machines = Machines(Links(launched), None, tensor_parallel=False)
        if machines.follows:
            return machines.follow(spec)
        opened = machines.open(spec)
    ids = prompt_ids(checkpoint, args.prompt + args.rows + _BEFORE)
    say(json.dumps(WHAT[args.what](opened.load(), ids, args)))
    return 0


def _prompt(model: Model, ids: list[int], args: argparse.Namespace) -> Results:
    """A prompt's tokens a second, until the first of the answer was there."""
    timed(generate_step(ids[-_BEFORE:], model, max_tokens=2), _BEFORE)
    found = timed(generate_step(ids[: args.prompt], model, max_tokens=1), args.prompt)
    return {"pace": found.prefill_tps, "answers": [found.tokens]}


def _answers(model: Model, ids: list[int], args: argparse.Namespace) -> Results:
    """Tokens a second of all answers together."""
    decoder, answers = _begun(model, ids, args.rows)
    before, started = [g.chosen for g in answers], time.perf_counter()
    while min(g.chosen for g in answers) < max(before) + args.tokens:
        decoder.step()
    took = time.perf_counter() - started
    said = [g.tokens[g.prompt :][: args.tokens] for g in answers]
    return {"pace": (sum(g.chosen for g in answers) - sum(before)) / took, "answers": said}


def _beside(model: Model, ids: list[int], args: argparse.Namespace) -> Results:
    """The same while another's prompt is read; seconds to its first token, and between theirs."""
    decoder, answers = _begun(model, ids, args.rows)
    new = Generation(model, ids[-args.prompt :], model.make_cache(), _ENDLESS)
    before = sum(g.chosen for g in answers)
    started = time.perf_counter()
    decoder.add(new)
    times = [started]  # of the first answer's tokens
    while not new.chosen:
        if any(advance.generation is answers[0] for advance in decoder.step()):
            times.append(time.perf_counter())
    took = time.perf_counter() - started
    gaps = [after - before for before, after in pairwise(times)]
    tokens = sum(g.chosen for g in answers) - before
    return {
        "pace": tokens / took,
        "first": took,
        "gap": median(gaps),
        "answers": [new.tokens[new.prompt :]],
    }


def _begun(model: Model, ids: list[int], rows: int) -> tuple[Decoder, list[Generation]]:
    """So many answers under way; their prompts differ."""
    decoder = Decoder()
    prompts = [ids[row : row + _BEFORE] for row in range(rows)]
    answers = [Generation(model, prompt, model.make_cache(), _ENDLESS) for prompt in prompts]
    for each in answers:
        decoder.add(each)
    while not all(each.chosen for each in answers):
        decoder.step()
    for _ in range(_WARM):
        decoder.step()
    return decoder, answers


WHAT: dict[str, Callable[[Model, list[int], argparse.Namespace], Results]] = {
    "prompt": _prompt,
    "answers": _answers,
    "beside": _beside,
}


if __name__ == "__main__":
    sys.exit(main())
