"""The plain path against mlx-lm's, where its cost is of different kinds: four cases, in turns.

Decoding a small model costs kernels launched and Python run; decoding a large one costs the bytes
of its weights. A prompt of 2048 tokens costs matrix products; one of 16384 costs attention, which
a window of 4096 bounds for us and not for mlx-lm (stock mlx-lm ignores it, so beyond 4096 tokens
the two do not compute the same function). Random float32 weights, the 12.25B's layer order; mlx-lm
runs its own loop and its own settings on the same arrays, a layer for each position. Inside the
window the tokens must be equal.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from bench import engines, machine
from bench.engines import Run
from bench.report import Spread, parser, publish, ratio, rounds, table
from mlx_cerebrum import cli
from mlx_cerebrum.decoding.decode import prefill_step
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.weights.loading import fuse_projections


@dataclass(frozen=True)
class Case:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    blocks: int  # 32: laid out as the 12.25B; fewer: rows of half of them, by quarters
    prompt: int
    tokens: int
    rounds: int


CASES = {
    "decode, small": Case(128, 448, 4, 1, 32, 32, 48, 9),
    "decode, large": Case(2048, 7168, 16, 4, 8, 32, 8, 7),
    "prefill of 2048": Case(512, 1792, 8, 2, 8, 2048, 2, 5),
    "prefill of 16384": Case(128, 448, 2, 1, 4, 16384, 2, 2),
}
_VOCABULARY = 2000


def flags() -> cli.ArgumentParser:
    p = parser("plain", "Plain decoding and prefill against mlx-lm's, side by side.")
    p.add_argument("--case", choices=tuple(CASES), help="one of them (default: all)")
    p.add_argument("--rounds", type=int, help="rounds in turns (default: by case, 2 to 9)")
    return p


def main(argv: list[str] | None = None) -> int:
    args = flags().parse_args(argv)
    machine.use_openblas(not args.no_openblas)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    if args.rounds is not None and args.rounds < 1:
        raise RequestError(f"--rounds must be at least 1, not {args.rounds}")
    names = [args.case] if args.case else list(CASES)
    found = {name: measure(CASES[name], args.rounds) for name in names}
    publish(args, "plain", found, text(found))
    return 0


def measure(case: Case, count: int | None = None) -> dict[str, Any]:
    """Both engines on one set of random weights; medians of `count` rounds."""
    mine, theirs = models(case)
    prompt = [1 + 37 * n % (_VOCABULARY - 1) for n in range(case.prompt)]
    ours = engines.ours(mine)
    sides: dict[str, Callable[[], Run]] = {
        "ours": lambda: ours.generate(prompt, case.tokens),
        "mlx-lm": peer(theirs, prompt, case.tokens),
    }
    runs = rounds(sides, count or case.rounds, warm=case.prompt < 10000)
    found: dict[str, Any] = {
        "positions": mine.config.num_positions,
        "weights": sum(a.nbytes for a in dict(tree_flatten(theirs.parameters())).values()),
        "rounds": len(runs["ours"]),
        "same_tokens": runs["ours"][0].tokens == runs["mlx-lm"][0].tokens,
    }
    for kind in ("prefill_tps", "decode_tps"):
        paces = {side: [getattr(run, kind) for run in done] for side, done in runs.items()}
        found[kind] = {side: Spread.of(values).as_json() for side, values in paces.items()}
        found[kind]["ratio"] = ratio(paces["ours"], paces["mlx-lm"]).as_json()
    return found


def peer(model: nn.Module, prompt: list[int], tokens: int) -> Callable[[], Run]:
    """mlx-lm's own loop; prefill in the faster of its chunks and ours, tried on 2048 tokens."""
    from mlx_lm.generate import generate_step

    def run(prompt: list[int], tokens: int, **chunks: int) -> Run:
        steps = generate_step(mx.array(prompt), model, max_tokens=tokens, **chunks)
        return engines.timed((int(token) for token, _ in steps), len(prompt))

    best: dict[str, int] = {}
    if len(prompt) > prefill_step() + 1:
        run(prompt[:64], 1)
        ways: tuple[dict[str, int], ...] = ({}, {"prefill_step_size": prefill_step()})
        best = min(ways, key=lambda way: run(prompt[:2048], 1, **way).first)
    return lambda: run(prompt, tokens, **best)


def models(case: Case) -> tuple[Model, nn.Module]:
    """Ours, and mlx-lm's unrolled: the same random arrays, ours then fused."""
    from mlx_lm.models import llama

    raw = {
        "model_type": "mistral",
        "hidden_size": case.hidden,
        "intermediate_size": case.inner,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "num_hidden_layers": case.blocks,
        "vocab_size": _VOCABULARY,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    config = ModelConfig.from_dict(raw)
    layer_map = LayerPlan.named("cerebrum-12.25b").layer_map(32)
    if case.blocks < 32:
        quarter = case.blocks // 4
        layer_map = tuple(
            block
            for first in range(0, case.blocks - quarter, quarter)
            for block in range(first, first + 2 * quarter)
        )
    mine = Model(config.with_map(layer_map, None))
    mx.eval(mine.parameters())
    known = raw | {"num_hidden_layers": len(layer_map), "sliding_window": None}
    theirs = llama.Model(llama.ModelArgs.from_dict(known))
    weights = dict(tree_flatten(mine.parameters()))
    copied = {name: a for name, a in weights.items() if not name.startswith("model.layers.")}
    for position, block in enumerate(layer_map):
        prefix = f"model.layers.{block}."
        copied |= {
            f"model.layers.{position}.{name.removeprefix(prefix)}": array
            for name, array in weights.items()
            if name.startswith(prefix)
        }
    theirs.load_weights(list(copied.items()))
    for each in mine.model.layers:
        fuse_projections(each)
    mx.eval(mine.parameters(), theirs.parameters())
    return mine, theirs


def text(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, one in found.items():
        kind = "decode_tps" if name.startswith("decode") else "prefill_tps"
        paces = one[kind]
        rows.append(
            [
                name,
                str(one["positions"]),
                f"{one['weights'] / 1e6:.0f}",
                *(Spread(**paces[side]).text(1) for side in ("ours", "mlx-lm")),
                Spread(**paces["ratio"]).text(2),
                str(one["rounds"]),
                "yes" if one["same_tokens"] else "no",
            ]
        )
    header = ["", "positions", "weights, MB", "ours, tokens/s", "mlx-lm, tokens/s"]
    return [table([*header, "ours / mlx-lm", "rounds", "same tokens"], rows)]


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Two runs' ratios, and the pace now."""
    rows = []
    for name, now in after.items():
        kind = "decode_tps" if name.startswith("decode") else "prefill_tps"
        cells = [Spread(**one[name][kind]["ratio"]).text(2) for one in (before, after)]
        pace = Spread(**now[kind]["ours"]).text(1)
        same = "yes" if now["same_tokens"] else "no"
        rows.append(
            [name, str(now["positions"]), f"{now['weights'] / 1e6:.0f}", *cells, pace, same]
        )
    header = ["ours / mlx-lm", "positions", "mlx-lm's weights, MB", "before", "after"]
    return table([*header, "ours now, tokens/s", "same tokens"], rows)


if __name__ == "__main__":
    sys.exit(main())
