"""Many layer plans on one text, what they have in common run once.

The hidden states after a plan's first steps depend on those steps alone, so plans that begin alike
share them: each goes on from the deepest state it shares with another, depth first through the trie
of all plans. Only prefixes can be shared: the same last blocks, after other ones, see another
stream.

Whole windows of text are scored at once under the causal mask, as in training, without a KV cache.
What the base model says, which each plan is compared with, is kept for one piece of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import mlx.core as mx
import numpy as np

from bench.bootstrap import Values
from bench.likelihood import compared, log_softmax
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model

Step = tuple[int, float, float]  # block, factor of attention's write, factor of the MLP's
Path = tuple[Step, ...]
T = TypeVar("T")

ROWS = 128  # tokens whose logits are in memory at once
PIECE_BYTES = 256 * 2**20  # of the base model's log-probabilities, unless one window has more
_MOST = 100.0  # nats a token: what stands for a 16-bit plan whose logits are no numbers any more


def path(config: ModelConfig) -> Path:
    """The steps of a plan; positions without a scale have 1."""
    scales = config.residual_scales or [(1.0, 1.0)] * config.num_positions
    return tuple((block, *pair) for block, pair in zip(config.layer_map, scales, strict=True))


def positions(paths: Sequence[Path]) -> int:
    """Steps that a walk over all paths runs: one for every prefix."""
    return len({steps[: depth + 1] for steps in paths for depth in range(len(steps))})


def walk(
    paths: Sequence[Path], h: T, run: Callable[[int, T, int, int], T]
) -> Iterator[tuple[int, T]]:
    """Each path's index and what `h` has become at its end, each step of the trie run once.

    `run(index, h, start, stop)` runs these steps of that path.
    """

    def below(members: list[int], h: T, depth: int) -> Iterator[tuple[int, T]]:
        # In sorted order the first and the last differ earliest.
        first, last = paths[members[0]], paths[members[-1]]
        differ = (at for at, (x, y) in enumerate(zip(first, last, strict=False)) if x != y)
        shared = next(differ, min(len(first), len(last)))
        h = run(members[0], h, depth, shared)
        for step, group in groupby(members, lambda member: paths[member][shared : shared + 1]):
            if step:
                yield from below(list(group), h, shared)
            else:
                yield from ((member, h) for member in group)

    return below(sorted(range(len(paths)), key=lambda member: paths[member]), h, 0)


def evaluate(
    base: Model,
    plans: Sequence[Model],
    windows: mx.array,
    say: Callable[[str], None] = lambda line: None,
) -> list[Values]:
    """The base and each plan, views of the same weights, against the base (see
    likelihood.compared) on token windows `[B, L + 1]`: `[4, tokens]` each."""
    a_window = 4 * base.config.vocab_size * (windows.shape[1] - 1)
    step = max(1, PIECE_BYTES // a_window)
    found: list[list[Values]] = [[] for _ in range(1 + len(plans))]
    paths = [path(plan.config) for plan in plans]

    def run(plan: int, h: mx.array, start: int, stop: int) -> mx.array:
        h = plans[plan].run(h, start=start, stop=stop)
        mx.eval(h)
        return h

    for first in range(0, windows.shape[0], step):
        piece = windows[first : first + step]
        h = base.embed(piece[:, :-1])
        end = base.run(h)
        score = scorer(base, piece[:, 1:], end)
        found[0].append(score(end))
        for done, (plan, end) in enumerate(walk(paths, h, run)):
            found[1 + plan].append(score(end))
            if done % 10 == 9:
                say(f"{done + 1} of {len(paths)} plans")
        mx.clear_cache()
    return [np.concatenate(parts, axis=1) for parts in found]


def scorer(base: Model, targets: mx.array, h: mx.array) -> Callable[[mx.array], Values]:
    """Scores hidden states `[B, L, D]` against the base's own, `h`.

    `targets` are the token ids `[B, L]` that follow. What is no number counts as worst.
    """
    ids: list[int] = targets.reshape(-1).tolist()  # type: ignore[assignment]

    def read(h: mx.array) -> Iterator[mx.array]:
        """Log-probabilities of ROWS tokens at a time."""
        flat = h.reshape(-1, h.shape[-1])
        for first in range(0, len(flat), ROWS):
            yield log_softmax(base.logits(flat[first : first + ROWS]))

    known = list(read(h))

    def score(h: mx.array) -> Values:
        found = compared(known, read(h), ids)
        return np.nan_to_num(found, nan=_MOST, posinf=_MOST, neginf=_MOST)

    return score
