"""What each of several processes runs in these tests: rank 0 answers, the others follow.

`python program.py WHAT CHECKPOINT OUT [--split N,N] [--tensor-parallel]`, with a launcher's
environment. OUT takes what rank 0 found, as JSON.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent))
from company import Company, Counted, in_a_sampler, in_reading_logprobs, tiny_views
from ranks_ring import LONG, SIZES

from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decoder import generate_step
from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.model.cache import WindowedKVCache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import resolve
from mlx_cerebrum.ranks import backend
from mlx_cerebrum.ranks.links import Links
from mlx_cerebrum.ranks.machines import Machines
from mlx_cerebrum.weights.opening import ModelSpec

TOKENS = 64
Found = dict[str, Any]


class Shared(Company):
    """Sequences whose caches are on several machines, checked against one machine's model."""

    whole: Sequence[Model] = ()

    def caches(self, model: Model) -> list[WindowedKVCache]:
        made = model.make_cache()
        for cache in made:
            cache.rewind = min(cache.rewind, self.rewind)
        return made

    def alone(self, model: Model, tokens: list[int]) -> mx.array:
        key = model.config.layer_map, model.config.residual_scales
        same = next(m for m in self.whole if (m.config.layer_map, m.config.residual_scales) == key)
        return same(mx.array([tokens]))[0]


def company(model: Model, seeds: Sequence[int], sequences: int) -> Found:
    """Random sequences of both orders, of which each is checked as it leaves."""
    orders = tuple(range(model.config.num_hidden_layers)), model.config.layer_map
    whole = tiny_views(model.config.sliding_window, orders, **SIZES)
    views = [model.view(w.config.layer_map, w.config.residual_scales) for w in whole]
    left = most = held = 0
    for seed in seeds:
        there = Shared(random.Random(seed), views, 64, 256, 1 + seed % 7)
        there.whole = whole
        if model.lead.shares.tensor:  # others run the blocks too: nobody could go on
            there.faults = (in_a_sampler, in_reading_logprobs)
        there.run(sequences)
        left, held = left + there.left, held + there.held
        most = max(most, there.most)
    return {"left": left, "most": most, "held": held, "guessed": Counted.made}


def answers(model: Model) -> Found:
    """Past the window, greedy and seeded, with packed caches, and of a question that is edited."""
    prompt = [3 + i * i % 9 for i in range(30)]
    drawn = Sampling(0.8, seed=7).sampler()
    found: Found = {
        "greedy": list(generate_step(prompt, model, max_tokens=TOKENS)),
        "drawn": list(generate_step(prompt, model, max_tokens=20, sampler=drawn)),
    }
    packed = model.make_cache(8) if model.config.head_dim % 32 == 0 else None
    if packed is not None:
        found["packed"] = list(generate_step(prompt, model, max_tokens=20, cache=packed))
    kept = PromptCache(model)
    found["edited"] = [_asked(kept, [*prompt[:cut], 5, 7, 5]) for cut in (30, 12, 25, 3, 30)]
    copied = kept.copy()
    found["copies"] = [_asked(each, prompt[:20]) for each in (copied, kept, copied)]
    cache = model.make_cache()
    chunks = [prompt[:7], prompt[7:8], prompt[8:]]
    logits = [model(mx.array([chunk]), cache)[0] for chunk in chunks]
    found["logits"] = mx.concatenate(logits).tolist()
    return found


def _asked(kept: PromptCache, prompt: list[int]) -> list[int]:
    rest = kept.begin(prompt)
    found = list(generate_step(rest, kept.model, max_tokens=3, cache=kept.cache))
    kept.end(prompt + found)
    return found


WHAT: dict[str, Callable[[Model], Found]] = {
    "answers": answers,
    "company": lambda model: company(model, [3], 12),
    "much company": lambda model: company(model, range(10, 50), 25),
}


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=WHAT)
    p.add_argument("path", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--split")
    p.add_argument("--tensor-parallel", action="store_true")
    p.add_argument("--q-bits", type=int)
    p.add_argument("--plan", default=LONG)
    args = p.parse_args()
    spec = ModelSpec(args.path, dtype="float32", q_bits=args.q_bits)
    launched = backend()
    assert launched is not None
    machines = Machines(Links(launched, patience=30.0), args.split, args.tensor_parallel)
    if machines.follows:
        return machines.follow(spec, [args.plan])
    base = machines.open(spec, [args.plan]).load()
    model = base.view(resolve(args.plan).layer_map(base.config.num_hidden_layers))
    args.out.write_text(json.dumps(WHAT[args.what](model)))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
