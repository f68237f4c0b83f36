"""Decode and prefill, ours against mlx-lm: same weights, same prompt, same process.

Generating has two phases with different limits. Prefill runs the whole prompt through the
model at once: large matrix products, bound by arithmetic. Decode runs one token at a time:
every weight is read once per token, so it is bound by memory bandwidth, and next to that by
the work around the matrices (kernels to launch, Python to run), which is what two engines on
the same matrices can differ in.

Both engines read one directory of dense float32 weights, made from the model for the
occasion, and the weights are compared bit for bit before anything is timed. mlx-lm's
`generate_step` runs as it comes. A ratio above 1 means that ours is faster. Tokens are
compared too: a faster engine that says something else would prove nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine
from bench.directory import export
from bench.engines import Run, mlx_lm, ours, prompt_ids, same_weights
from bench.report import Spread, parser, publish, ratio, rounds, table
from mlx_cerebrum import cli, hub
from mlx_cerebrum.checkpoint import open_checkpoint
from mlx_cerebrum.decode import PREFILL_STEP
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.stream import check_request

TARGET = 1.0  # ours is to be no slower
PHASES = ("prefill_tps", "decode_tps")


def main(argv: list[str] | None = None) -> int:
    p = parser("speed", "Decode and prefill tokens per second, ours against mlx-lm.")
    p.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|HUBID|demo", help="which")
    p.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    p.add_argument("--tokens", type=int, default=64, metavar="N", help="to generate (default: 64)")
    p.add_argument("--rounds", type=int, default=5, metavar="N", help="each side (default: 5)")
    args = p.parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.tokens < 2 or args.rounds < 1:
        raise RequestError("a pace needs --tokens of 2 or more and --rounds of 1 or more")
    checkpoint = open_checkpoint(hub.resolve(args.model))
    check_request(checkpoint.config, args.prompt_tokens, args.tokens, PREFILL_STEP)
    prompt = prompt_ids(checkpoint, args.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        export(checkpoint, dense, dense=True)
        our_engine, our_model = ours(dense)
        peer_engine, peer_model = mlx_lm(dense)
    weights = same_weights(our_model, peer_model)
    runs = rounds(
        {
            "mlx-cerebrum": lambda: our_engine(prompt, args.tokens),
            "mlx-lm": lambda: peer_engine(prompt, args.tokens),
        },
        args.rounds,
    )
    results = compare(runs["mlx-cerebrum"], runs["mlx-lm"])
    results["weights_equal"] = weights
    publish(args, "speed", results, _text(args, results))
    return 0


def compare(ours: list[Run], peers: list[Run]) -> dict[str, Any]:
    """Both sides' pace, the ratio (ours over the peer's) of each phase, tokens compared."""
    results: dict[str, Any] = {}
    for phase in PHASES:
        mine, theirs = ([getattr(run, phase) for run in runs] for runs in (ours, peers))
        results[phase] = {
            "mlx-cerebrum": Spread.of(mine).as_json(),
            "mlx-lm": Spread.of(theirs).as_json(),
            "ratio": ratio(mine, theirs).as_json(),
        }
    agreeing = [a == b for a, b in zip(ours[0].tokens, peers[0].tokens, strict=True)]
    results["tokens_equal"] = all(agreeing)
    results["tokens_agreeing"] = agreeing.index(False) if False in agreeing else len(agreeing)
    return results


def _text(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    rows = []
    for phase, label in zip(PHASES, ("prefill, tokens/s", "decode, tokens/s"), strict=True):
        found = {name: Spread(**spread) for name, spread in results[phase].items()}
        rows.append(
            [
                label,
                found["mlx-cerebrum"].text(),
                found["mlx-lm"].text(),
                found["ratio"].text(2),
                "yes" if found["ratio"].median >= TARGET else "no",
            ]
        )
    header = ["phase", "mlx-cerebrum", "mlx-lm", "ratio", f"at least {TARGET}"]
    return [
        f"{args.model} in float32, {args.prompt_tokens} prompt tokens, {args.tokens} generated;"
        f" median (lowest-highest) of {args.rounds} rounds in turns.",
        table(header, rows),
        f"Weights equal bit for bit: {'yes' if results['weights_equal'] else 'NO'}. Generated"
        f" tokens equal: {'yes' if results['tokens_equal'] else 'NO'}"
        f" ({results['tokens_agreeing']} of {args.tokens} before any difference).",
    ]


if __name__ == "__main__":
    sys.exit(main())
