"""In 16 bits, how often does checking guesses together change an answer, and is it only at ties?

Rows computed together round otherwise than a row alone. In float32 that has not been seen to change
a greedy token; in bfloat16 the two best logits are often closer than the rounding. Here every
answer is decoded plainly, and then fed to the model again in rounds of 8 rows, as a drafter that is
always right would: the most that guessing can do. Counted are the tokens whose choice differs, and
for each the margin between the two best logits of the plain step, beside how far logits of the
same token move between the two (the noise). A token may differ only where the margin is within
twice the noise.
"""

import argparse
import sys
from typing import Any, cast

import mlx.core as mx

from bench import machine
from bench.chat_prompts import GROUNDED, OPEN
from bench.report import parser, publish, table
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.weights.opening import load
from mlx_cerebrum.weights.storage import DTYPES

_ROWS = 8


def main(argv: list[str] | None = None) -> int:
    p = parser("ties", "Greedy tokens of rows computed together against rows computed alone.")
    p.add_argument("--model", default="demo", help="what to run (default: demo)")
    p.add_argument("--plan", metavar="NAME|FILE", help="layer plan (default: the model's own)")
    p.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bfloat16", help="of it all (default: bfloat16)"
    )
    p.add_argument("--tokens", type=int, default=48, help="tokens an answer (default: 48)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    model, tokenizer = load(args.model, args.plan)
    model.set_dtype(DTYPES[args.dtype])  # dense weights too: packed ones are slow on a CPU
    found: dict[str, Any] = {"tokens": 0, "differing": [], "noise": []}
    for question in (GROUNDED | OPEN).values():
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        _compare(model, ids, args.tokens, found)
    publish(args, "ties", found, text(found))
    return 0


def _compare(model: Model, prompt: list[int], count: int, found: dict[str, Any]) -> None:
    cache = model.make_cache()
    prefill(model, mx.array(prompt[:-1]), cache)
    tokens, alone = prompt[-1:], []
    for _ in range(count):
        logits = model(mx.array([tokens[-1:]]), cache)[0, -1].astype(mx.float32)
        alone.append(logits)
        tokens.append(cast(int, mx.argmax(logits).item()))
    for layer_cache in cache:
        layer_cache.trim(count)
    rows = [tokens[start : start + _ROWS] for start in range(0, count, _ROWS)]
    together = [model(mx.array([each]), cache)[0].astype(mx.float32) for each in rows]
    both = zip(alone, mx.concatenate(together), strict=False)
    for plain, other in both:
        best = mx.sort(plain)[-2:]
        found["tokens"] += 1
        found["noise"].append(cast(float, mx.max(mx.abs(plain - other)).item()))
        if mx.argmax(plain).item() != mx.argmax(other).item():
            found["differing"].append(
                {"margin": cast(float, (best[1] - best[0]).item()), "noise": found["noise"][-1]}
            )


def text(found: dict[str, Any]) -> list[str]:
    noise = sorted(found["noise"])
    worst = max((one["margin"] / one["noise"] for one in found["differing"]), default=0.0)
    row = [
        str(found["tokens"]),
        f"{len(found['differing'])}",
        f"{len(found['differing']) / found['tokens']:.2%}",
        f"{noise[len(noise) // 2]:.3f} ({noise[-1]:.3f})",
        f"{worst:.2f}",
    ]
    header = ["tokens", "differ", "rate", "noise of a logit: median (most)", "margin / noise, most"]
    return [table(header, [row])]


if __name__ == "__main__":
    sys.exit(main())
