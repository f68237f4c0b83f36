"""Blocks stored once, read once: what one pass for all sequences gains, and what it costs.

python -m bench.schedule                                        all of it, minutes
python -m bench.schedule --model demo --only rows --rows 8      one part of it

A decoder takes its sequences forward along a schedule of blocks (mlx_cerebrum/model/schedule.py),
so that a block is read once a step, however many answers of whichever plans need it there. Asked
is, each in one run whose sides take turns:

- orders: an answer of each plan at once, against one after the other. Where reading weights is all
  that takes time the gain is the limit: both maps' positions over the schedule's.
- rows: several answers of one plan, against mlx-lm's `BatchGenerator` over the same model.
- halves: half of 8 answers on each plan, against two `BatchGenerator`s.
- draws: half of 8 answers on each plan, each drawn with a seed of its own, against the same alone.
  The draws are the same, but 16 bits round logits otherwise in company: how many answers change?
- graph: primitives of a decode step with 8 rows, ours and `BatchGenerator`'s, as bench.primitives
  counts them.

A pace is of steps that decode, after short prompts; all sides go on from round to round, so their
contexts grow alike. Tokens are compared: in float32 all must be equal. Besides the demo model there
are two of random weights, made in memory, 1.7 GB each in float32: 8 wide blocks in 14 positions,
and 32 blocks in 56.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx

from bench.engines import prompt_ids
from bench.pair import Pair, open_pair
from bench.primitives import count_as_on_metal
from bench.random_model import GEOMETRIES, RandomCheckpoint
from bench.report import Spread, parser, ratio, rounds, run, table
from bench.step_profile import forget
from bench.suite import Results
from mlx_cerebrum import device
from mlx_cerebrum.decoding.decode import greedy, prefill
from mlx_cerebrum.decoding.decoder import Decoder
from mlx_cerebrum.decoding.generation import Generation
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.decoding.sampling import Sampling
from mlx_cerebrum.doctor.graph import count, kernels
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model import together
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.model.schedule import schedule
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.opening import ModelSpec
from mlx_cerebrum.weights.quantize import AFFINE_BITS

PARTS = ("orders", "rows", "halves", "draws", "graph")
HALVES = 8  # answers on two plans, and rows of the graph
_PROMPT = 64  # tokens
_ENDLESS = 1 << 20  # tokens of an answer: more than any run decodes
_CEREBRUM = GEOMETRIES["cerebrum-7b"] | {"vocab_size": 4096}
RANDOM: dict[str, dict[str, Any]] = {  # all heads 128 wide, as the 7B's
    "random-8": _CEREBRUM
    | {"num_hidden_layers": 8, "hidden_size": 2048, "intermediate_size": 7168}
    | {"num_attention_heads": 16, "num_key_value_heads": 4},
    "random-32": _CEREBRUM
    | {"num_hidden_layers": 32, "hidden_size": 1024, "intermediate_size": 3584}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
}

Job = tuple[Model, list[int]]  # an answer: what runs, and its prompt
Sides = dict[str, Sequence["Ours | Peer"]]  # each one, or several that run one after the other


class Ours:
    """A decoder and its jobs, greedy unless `seeds` are given."""

    def __init__(self, jobs: Sequence[Job], seeds: Sequence[int] | None = None) -> None:
        self._decoder = Decoder()
        draws = [Sampling(temp=1.0, seed=seed).sampler() for seed in seeds or ()]
        self._all = [
            Generation(m, list(ids), m.make_cache(), _ENDLESS, draws[at] if draws else greedy)
            for at, (m, ids) in enumerate(jobs)
        ]
        for one in self._all:
            prefill(one.model, mx.array(one.tokens[:-1]), one.caches)
            self._decoder.add(one)

    def step(self) -> None:
        self._decoder.step()

    @property
    def answers(self) -> list[list[int]]:
        return [one.tokens[one.prompt :] for one in self._all]


class Peer:
    """mlx-lm's `BatchGenerator`, for jobs of one model."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        from mlx_lm.generate import BatchGenerator  # seconds, which other benches can do without
        from mlx_lm.models.cache import KVCache, RotatingKVCache

        def step(tokens: mx.array, cache: Sequence[Any]) -> mx.array:
            for other in cache[1:]:
                other.offset = cache[0].offset  # equal, and now one array: see cpu.Rotary
            return model(tokens, cache)

        ((model, _), *_), size = jobs, len(jobs)
        window = model.config.sliding_window
        sizes = {"completion_batch_size": size, "prefill_batch_size": size}
        generator = BatchGenerator(step, sampler=greedy, stream=device.stream(), **sizes)
        generator.close()  # gives back the wired limit it sets
        places = model.config.layer_map
        make = partial(RotatingKVCache, window) if window else KVCache
        caches = [[make() for _ in places] for _ in jobs]
        for (_, ids), own in zip(jobs, caches, strict=True):
            prefill(model, mx.array(ids[:-1]), own)
        last = [ids[-1:] for _, ids in jobs]
        generator.insert(last, max_tokens=[_ENDLESS] * size, caches=caches)
        self._generator, self.answers = generator, [list[int]() for _ in jobs]

    def step(self) -> None:
        for response in self._generator.next()[1]:
            self.answers[response.uid].append(response.token)  # numbered from 0


def main(argv: list[str] | None = None) -> int:
    p = parser("schedule", "One pass for all sequences: both orders at once, rows, primitives.")
    models, names = ["demo", *RANDOM], f"what to run, {' and '.join(RANDOM)} among it"
    p.add_argument("--model", nargs="+", default=models[:2], metavar="NAME", help=names)
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts (default: all)")
    p.add_argument("--q-bits", type=int, choices=AFFINE_BITS, help="a weight (default: dense)")
    counts = [2, 4, 8, 16, 32]
    p.add_argument("--rows", type=int, nargs="+", default=counts, metavar="N", help="answers")
    p.add_argument("--tokens", type=int, default=16, help="an answer and round (default: 16)")
    p.add_argument("--rounds", type=int, default=7, help="of each comparison (default: 7)")
    seconds = "after which no further round of a comparison begins (default: 60)"
    p.add_argument("--seconds", type=float, default=60.0, help=seconds)
    return run(p, _measure, text, argv)


def _measure(args: argparse.Namespace) -> Results:
    if min(args.tokens, args.rounds, *args.rows) < 1:
        raise RequestError("--tokens, --rounds and --rows must be at least 1")
    return {Path(name).name: _of_model(name, args) for name in args.model}


def _of_model(name: str, args: argparse.Namespace) -> Results:
    if name in RANDOM:
        checkpoint = RandomCheckpoint(Path(name), RANDOM[name])
        pair = Pair.of(checkpoint, ModelSpec(checkpoint.path, q_bits=args.q_bits))
    else:
        pair = open_pair(name, q_bits=args.q_bits)
    configs = [side.config for side in pair.sides]
    order = schedule(config.layer_map for config in configs)
    positions = [config.num_positions for config in configs]
    found: Results = {
        "positions": positions,
        "schedule": len(order) if order else sum(positions),
        "bits": args.q_bits,
    }
    tell(f"{name}: {pair.storage().nbytes / GB:.1f} GB of weights")
    a, b = pair.models()
    if "graph" in args.only:
        found["graph"] = _graphs(a, b)
    ids = prompt_ids(pair.checkpoint(), _PROMPT + max(*args.rows, HALVES))

    def jobs(count: int, *models: Model) -> list[Job]:
        """So many answers for each; their prompts differ, and their lengths a little."""
        return [(m, ids[row : _PROMPT + row // 2]) for m in models for row in range(count)]

    if "orders" in args.only:
        tell(f"{name}: both orders")
        together = Ours(jobs(1, a, b))
        apart = [Ours(jobs(1, model)) for model in (a, b)]
        found["orders"] = _paces({"at once": [together], "one after the other": apart}, args)
        both = bytes_read(a) + bytes_read(b)
        found["read"] = {
            "at once": bytes_read(a.view(order)) if order else both,
            "one after the other": both,
        }
    if "draws" in args.only:
        tell(f"{name}: draws")
        found["draws"] = {}
        for dtype in ("float32", "bfloat16"):
            spec = ModelSpec(pair.checkpoint().path, q_bits=args.q_bits, dtype=dtype)
            sides = Pair.of(pair.checkpoint(), spec).models()
            found["draws"][dtype] = _draws(jobs(HALVES // 2, *sides), args.tokens * args.rounds)
    if "rows" in args.only:
        found["rows"] = {}
        for count in args.rows:
            tell(f"{name}: {count} rows")
            own = jobs(count, a)
            found["rows"][str(count)] = _paces({"ours": [Ours(own)], "mlx-lm": [Peer(own)]}, args)
    if "halves" in args.only:
        tell(f"{name}: {HALVES} rows on both plans")
        half = HALVES // 2
        peers = [Peer(jobs(half, model)) for model in (a, b)]
        found["halves"] = _paces({"ours": [Ours(jobs(half, a, b))], "mlx-lm": peers}, args)
    return found


def _paces(sides: Sides, args: argparse.Namespace) -> Results:
    """Tokens a second of each side, all its answers together, and how many tokens are equal."""
    for each in sides.values():
        _pace(each, 3)  # answers are put together, every kernel has run
    runs = {side: partial(_pace, each, args.tokens) for side, each in sides.items()}
    found: Results = dict(rounds(runs, args.rounds, seconds=args.seconds, warm=False))
    mine, others = ([a for one in each for a in one.answers] for each in sides.values())
    # A peer may be a token behind.
    pairs = [(x, y) for a, b in zip(mine, others, strict=True) for x, y in zip(a, b, strict=False)]
    return found | {"equal": sum(x == y for x, y in pairs), "compared": len(pairs)}


def _draws(jobs: Sequence[Job], tokens: int) -> Results:
    """How many answers of so many tokens change in company, and of how many draws that was one."""

    def answers(jobs: Sequence[Job], seeds: Sequence[int]) -> list[list[int]]:
        ours = Ours(jobs, seeds)
        while min(map(len, ours.answers)) < tokens:
            ours.step()
        return [answer[:tokens] for answer in ours.answers]

    seeds = range(len(jobs))
    alone = [answers([job], [seed])[0] for job, seed in zip(jobs, seeds, strict=True)]
    held = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), tokens)
        for pair in zip(alone, answers(jobs, seeds), strict=True)
    ]
    changed = sum(count < tokens for count in held)
    # After an answer's first other token its draws are of another text.
    return {"answers": len(jobs), "changed": changed, "draws": sum(held) + changed}


def _pace(each: Sequence[Ours | Peer], steps: int) -> float:
    started = time.perf_counter()
    for one in each:
        for _ in range(steps):
            one.step()
    mx.synchronize(device.stream())  # the step that was started ahead
    tokens = steps * sum(len(one.answers) for one in each)
    return tokens / (time.perf_counter() - started)


def _graphs(a: Model, b: Model) -> Results:
    """By backend and company: primitives of a step and those that compute, of both sides."""
    found: Results = {}
    for backend in dict.fromkeys((device.backend(), "metal")):
        found[backend] = {}
        for company, models in {"one plan": [a], "half on each": [a, b]}.items():
            prompts = [[1] * (HALVES + row) for row in range(HALVES // len(models))]
            jobs = [[(model, prompt) for prompt in prompts] for model in models]
            sides: Sides = {
                "ours": [Ours([job for own in jobs for job in own])],
                "mlx-lm": [Peer(own) for own in jobs],
            }
            found[backend][company] = {
                side: _primitives(each, backend, a.config.head_dim) for side, each in sides.items()
            }
    return found


class _BuiltError(Exception):
    """A step's graph is there: it need not be computed."""


def _primitives(each: Sequence[Ours | Peer], backend: str, head_dim: int) -> dict[str, int]:
    """Of a step of each, when all answers have joined."""

    def build() -> list[Any]:
        graphs: list[Any] = []

        def take(*arrays: Any) -> None:
            graphs.append(arrays)
            raise _BuiltError

        with (
            mock.patch.object(mx, "async_eval", take),
            mock.patch.object(together, "begin_to_compute"),  # what is begun has no graph any more
        ):
            for one in each:
                with contextlib.suppress(_BuiltError):
                    one.step()
        return graphs

    _pace(each, 2)
    forget()
    here = backend == device.backend()
    counts = count(build()) if here else count_as_on_metal(build, head_dim)
    return {"primitives": counts.total(), "kernels": kernels(counts)}


def text(results: Results) -> list[str]:
    """What the parts found, of all models."""
    orders, rows, draws, graphs = [], [], [], []
    for name, found in results.items():
        a, b = found["positions"]
        label = f"{name}, {found['bits']} bits" if found["bits"] else name
        if "orders" in found:
            sides = "at once", "one after the other"
            paces = _cells(found["orders"], *sides)
            limit = f"{(a + b) / found['schedule']:.2f}"
            read = [f"{found['read'][side] / 2 / GB:.2f}" for side in sides]
            positions = f"{a} + {b} in {found['schedule']}"
            orders.append([label, positions, *paces[:3], limit, *read, paces[3]])
        for number, paces in found.get("rows", {}).items():
            rows.append([f"{label}, {number} rows", *_cells(paces, "ours", "mlx-lm")])
        if "halves" in found:
            halves = _cells(found["halves"], "ours", "mlx-lm")
            rows.append([f"{label}, half of {HALVES} on each plan", *halves])
        for dtype, drawn in found.get("draws", {}).items():
            changed = f"{drawn['changed']} of {drawn['answers']}", drawn["draws"]
            draws.append([f"{label}, {dtype}", *map(str, changed)])
        for backend, companies in found.get("graph", {}).items():
            for company, counts in companies.items():
                cells = [f"{one['primitives']} ({one['kernels']})" for one in counts.values()]
                ours, theirs = (counts[side]["kernels"] for side in ("ours", "mlx-lm"))
                graphs.append([f"{label}, {company}, {backend}", *cells, f"{ours / theirs:.2f}"])
    reads = "GB a token at once", "apart"
    said = [
        (
            "An answer of each plan, tokens/s of both together: at once, and one after the other"
            " (apart). The limit is both plans' positions over the schedule's; GB are of weights,"
            " computed.",
            ["model", "positions", "at once", "apart", "ratio", "limit", *reads, "same tokens"],
            orders,
        ),
        (
            "Several answers, tokens/s of all together, against mlx-lm's `BatchGenerator` over the"
            " same model; for two plans against two of them, one after the other.",
            ["model, answers", "ours", "mlx-lm", "ours/its", "same tokens"],
            rows,
        ),
        (
            f"Answers drawn with a seed, half of {HALVES} on each plan, that are other ones in"
            " company than alone; draws up to the first other token.",
            ["model, computed in", "changed", "draws"],
            draws,
        ),
        (
            f"Primitives of a decode step of {HALVES} rows, and in brackets those of them that"
            " compute: kernels to launch.",
            ["model, rows, backend", "ours", "mlx-lm", "kernels, ours/its"],
            graphs,
        ),
    ]
    return [
        part for words, header, lines in said if lines for part in (words, table(header, lines))
    ]


def _cells(found: Results, mine: str, other: str) -> list[str]:
    """Both paces, their ratio, and tokens that are equal."""
    paces = [Spread.of(found[side]).text() for side in (mine, other)]
    same = f"{found['equal']} of {found['compared']}"
    return [*paces, ratio(found[mine], found[other]).text(2), same]


if __name__ == "__main__":
    sys.exit(main())
