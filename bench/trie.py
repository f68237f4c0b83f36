"""Many layer plans on one text, what they have in common run once.

A plan is a path of steps, (block, what its attention and MLP writes are multiplied by). The
hidden states after the first steps depend on those steps alone, so plans that begin alike
share them: sorted, the paths are the depth-first walk of a trie, and each plan goes on from
the deepest state it shares with the one before. Only prefixes can be shared: the same last
blocks, after other ones, see another stream.

Whole windows of text are scored at once under the causal mask, as in training; nothing is
generated, so there is no KV cache. Of the base model, what each plan is compared with is kept
for one piece of the text at a time, whatever its length.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.model.cache import attention_mask
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import require

Step = tuple[int, float, float]  # block, factor of attention's write, factor of the MLP's
Path = tuple[Step, ...]
Values = npt.NDArray[np.float64]

ROWS = 128  # tokens whose logits are in memory at once
PIECE_BYTES = 256 * 2**20  # of the base model's probabilities, unless one window has more
_MOST = 100.0  # nats a token: what stands for a 16-bit plan whose logits are no numbers any more
_EVERY = 10.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Scores:
    """What one plan does on every scored token, in the order of the text.

    losses: negative log-likelihood, nats. agrees: 1 where its best token is the base model's.
    divergence: KL(base || plan) of the next token's distribution, nats.
    """

    losses: Values
    agrees: Values
    divergence: Values


@dataclass(frozen=True)
class Leg:
    """One plan's share of the walk: start from a kept state, run the rest of its path."""

    plan: int  # which of the paths
    start: int  # steps that an earlier leg has run
    keep: tuple[int, ...]  # depths that later legs start from


def path(
    layer_map: Sequence[int], residual_scales: Sequence[tuple[float, float]] | None = None
) -> Path:
    """The steps of a plan; positions without a scale have 1."""
    scales = residual_scales or [(1.0, 1.0)] * len(layer_map)
    return tuple((block, *pair) for block, pair in zip(layer_map, scales, strict=True))


def schedule(paths: Sequence[Path]) -> list[Leg]:
    """The order to run the paths in, each step of their trie once."""
    order = sorted(range(len(paths)), key=lambda plan: paths[plan])
    shared = [_common(paths[a], paths[b]) for a, b in pairwise(order)]  # each with the next
    legs = []
    for place, plan in enumerate(order):
        start = shared[place - 1] if place else 0
        keep, lowest = set(), len(paths[plan])
        for depth in shared[place:]:
            lowest = min(lowest, depth)
            if lowest <= start:
                break
            keep.add(lowest)
        legs.append(Leg(plan, start, tuple(sorted(keep))))
    return legs


def positions(paths: Sequence[Path]) -> int:
    """Steps that a walk over all paths runs."""
    return sum(len(paths[leg.plan]) - leg.start for leg in schedule(paths))


def _common(a: Path, b: Path) -> int:
    differing = (depth for depth, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def embed(model: Model, tokens: mx.array) -> mx.array:
    """Token ids `[B, L]` -> the residual stream `[B, L, D]` before the first block."""
    h: mx.array = model.model.embed_tokens(tokens)
    return h.astype(model.dtype)


def run(model: Model, h: mx.array, steps: Path) -> mx.array:
    """The residual stream `[B, L, D]` of whole windows after `steps`; evaluated."""
    mask = attention_mask(h.shape[1], 0, model.config.sliding_window)
    for block, *scales in steps:
        unscaled = scales == [1.0, 1.0]
        h = model.model.layers[block](h, mask, None, None if unscaled else (scales[0], scales[1]))
    mx.eval(h)
    return h


def logits(model: Model, h: mx.array) -> mx.array:
    """`[T, D]` -> float32 `[T, V]`."""
    h = model.model.norm(h)
    tied = model.config.tie_word_embeddings
    out = model.model.embed_tokens.as_linear(h) if tied else model.lm_head(h)
    return out.astype(mx.float32)


def walk(model: Model, tokens: mx.array, paths: Sequence[Path]) -> Iterator[tuple[int, mx.array]]:
    """Each path's index and its last hidden states `[B, L, D]`, in the order of `schedule`."""
    states = {0: embed(model, tokens)}
    for leg in schedule(paths):
        states = {depth: h for depth, h in states.items() if depth <= leg.start}
        at, h = leg.start, states[leg.start]
        for depth in (*leg.keep, len(paths[leg.plan])):
            h = run(model, h, paths[leg.plan][at:depth])
            at = depth
            if depth in leg.keep:
                states[depth] = h
        yield leg.plan, h


class Base:
    """What the base model says of a piece of text; other plans are scored against it."""

    def __init__(self, model: Model, targets: mx.array, h: mx.array) -> None:
        """`targets` are the token ids `[B, L]` that follow those behind `h`, `[B, L, D]`."""
        self.model = model
        self.targets = targets.reshape(-1)
        self.said: list[tuple[mx.array, mx.array, mx.array]] = []  # for each ROWS tokens
        for out, _ in self._chunks(h):
            log_probs = out - mx.logsumexp(out, axis=-1, keepdims=True)
            probs = mx.exp(log_probs)
            self.said.append((probs, (probs * log_probs).sum(axis=-1), out.argmax(axis=-1)))
            mx.eval(self.said[-1])

    def score(self, h: mx.array) -> Scores:
        found = []
        for (out, targets), (probs, mean, best) in zip(self._chunks(h), self.said, strict=True):
            log_probs = out - mx.logsumexp(out, axis=-1, keepdims=True)
            loss = -mx.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
            # Of log-probabilities, not logits: those are large where the probabilities are, and
            # the rounding of their sum would show.
            divergence = mean - (probs * log_probs).sum(axis=-1)
            agrees = (out.argmax(axis=-1) == best).astype(mx.float32)
            found.append(np.array(mx.stack([loss, agrees, divergence]), dtype=np.float64))
        losses, agreement, kl = np.nan_to_num(
            np.concatenate(found, axis=1), nan=_MOST, posinf=_MOST, neginf=_MOST
        )
        return Scores(losses, agreement, kl)

    def _chunks(self, h: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
        """Logits and targets of ROWS tokens at a time."""
        flat = h.reshape(-1, h.shape[-1])
        for first in range(0, flat.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            yield logits(self.model, flat[rows]), self.targets[rows]


def pieces(model: Model, windows: mx.array) -> list[mx.array]:
    """The windows `[B, L + 1]` in parts whose probabilities under the base fit PIECE_BYTES."""
    a_window = 4 * model.config.vocab_size * (windows.shape[1] - 1)
    step = max(1, PIECE_BYTES // a_window)
    return [windows[first : first + step] for first in range(0, windows.shape[0], step)]


def pace(model: Model, windows: mx.array) -> tuple[float, float]:
    """Seconds for one position, and for one plan's logits, over all the windows."""
    piece = pieces(model, windows)[0]
    times = windows.shape[0] / piece.shape[0]
    tokens, targets = piece[:, :-1], piece[:, 1:]
    some = path(range(min(4, model.config.num_hidden_layers)))
    h = run(model, embed(model, tokens), some)  # to warm up
    base = Base(model, targets, h)
    blocks, heads = [], []
    for _ in range(3):  # the best of them: a busy moment must not stand for the whole sweep
        started = time.perf_counter()
        run(model, h, some)
        middle = time.perf_counter()
        base.score(h)
        blocks.append(middle - started)
        heads.append(time.perf_counter() - middle)
    return times * min(blocks) / len(some), times * min(heads)


def evaluate(
    model: Model,
    windows: mx.array,
    base: Path,
    paths: Sequence[Path],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Scores, list[Scores]]:
    """The base model's scores and every path's, on token windows `[B, L + 1]`.

    Raises MemoryBudgetError where a piece of the text doesn't fit.
    """
    parts = pieces(model, windows)
    require(_bytes(model, parts[0], paths), "comparing plans", "give a smaller --context")
    found: list[list[Scores]] = [[] for _ in range(1 + len(paths))]
    started = said = time.perf_counter()
    done = 0
    for piece in parts:
        tokens, targets = piece[:, :-1], piece[:, 1:]
        h = run(model, embed(model, tokens), base)
        reference = Base(model, targets, h)
        found[0].append(reference.score(h))
        for plan, h in walk(model, tokens, paths):
            found[1 + plan].append(reference.score(h))
            done += 1
            if time.perf_counter() - said > _EVERY:
                said = time.perf_counter()
                say(f"{done} of {len(paths) * len(parts)} plans in {said - started:.0f} s")
        mx.clear_cache()
    joined = [_joined(scores) for scores in found]
    return joined[0], joined[1:]


def _bytes(model: Model, piece: mx.array, paths: Sequence[Path]) -> int:
    """An upper bound: probabilities, kept states, and a block's and a chunk's own arrays."""
    config, tokens = model.config, piece.shape[0] * (piece.shape[1] - 1)
    kept = max((len(leg.keep) for leg in schedule(paths)), default=0)
    states = (kept + 8) * tokens * config.hidden_size + 3 * tokens * config.intermediate_size
    return 4 * (tokens * config.vocab_size + states + 4 * ROWS * config.vocab_size)


def _joined(parts: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.agrees for part in parts]),
        np.concatenate([part.divergence for part in parts]),
    )
