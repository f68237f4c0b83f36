"""One step of several sequences, in one pass over the blocks they share.

The pass follows a schedule (`model/schedule.py`). At each of its entries the tokens of all
sequences that need this block there are one matrix, so the block's weights are read once for all
of them. Only attention looks at each sequence's own cache.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_cerebrum import device
from mlx_cerebrum.model.attention import Scales, Span, Spans
from mlx_cerebrum.model.cache import Cache
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.schedule import schedule

_STRIDE = 4  # positions after which a CPU begins


class Part(NamedTuple):
    """Sequences of one model whose caches are together: `tokens` `[B, L]` are next for each."""

    model: Model
    tokens: mx.array  # what the model's `embed` takes
    caches: Sequence[Cache]  # one for each position of the model's map
    wanted: bool = True  # whether anything is done with what the last position gives


def run_together(parts: Sequence[Part]) -> list[mx.array]:
    """What the last position gives for each part's tokens, `[B, L, D]`; the caches take them.

    All models are views of the same weights. Maps that have too little in common run one after
    the other.
    """
    maps = dict.fromkeys(part.model.config.layer_map for part in parts)
    order = schedule(maps)
    if order is not None:
        return _along(order, parts)
    found: dict[int, mx.array] = {}
    for one in maps:
        own = [i for i, part in enumerate(parts) if part.model.config.layer_map == one]
        found |= zip(own, run_together([parts[i] for i in own]), strict=True)
    return [found[i] for i in range(len(parts))]


def begin_together(parts: Sequence[Part]) -> Callable[[], list[mx.array]]:
    """The same in two: what comes back gives the result. Other machines run their part meanwhile,
    so several such steps may be under way, of sequences of their own."""
    if (elsewhere := parts[0].model.elsewhere) is not None:
        begun: Callable[[], list[mx.array]] = elsewhere.begin(parts)
        return begun
    hidden = run_together(parts)
    return lambda: hidden


def begin_to_compute(h: mx.array) -> None:
    """On a CPU, while the graph of the rest is being built; a GPU has the step before to do."""
    if not device.on_gpu():
        mx.async_eval(h)


class _Walk:
    """A part on its way through its positions."""

    def __init__(self, part: Part) -> None:
        model, tokens, self.caches, _ = part
        config = model.config
        self.map, self.scales, self.at = config.layer_map, config.residual_scales, 0
        if len(self.caches) != len(self.map):
            raise ValueError(f"{len(self.caches)} caches for {len(self.map)} positions")
        self.rows, length = tokens.shape[:2]
        self.h = model.embed(tokens)  # [B, L, D]
        first = self.caches[0]
        self.mask = first.make_mask(length, return_array=False, window_size=config.sliding_window)
        # Of every token, in the sequence; as numpy, so that parts can be joined at any entry.
        offsets = np.asarray(first.offset, dtype=np.int32).reshape(-1, 1)
        self.positions = (offsets + np.arange(length, dtype=np.int32)).reshape(-1)

    @property
    def block(self) -> int | None:
        """The block that comes next; None at the end."""
        return self.map[self.at] if self.at < len(self.map) else None


def _along(order: Sequence[int], parts: Sequence[Part]) -> list[mx.array]:
    walks = [_Walk(part) for part in parts]
    layers = parts[0].model.model.layers
    together: list[_Walk] = []  # several, whose tokens are the rows of `h`, in this order
    h = mx.array([])
    offsets: dict[tuple[_Walk, ...], mx.array] = {}  # one array for each company: see cpu.Rotary
    for number, block in enumerate(order, start=1):
        now = [walk for walk in walks if walk.block == block]
        if now != together:
            _take_apart(h, together)
            together = now if len(now) > 1 else []
            if together:
                h = mx.concatenate([w.h.reshape(w.positions.size, 1, -1) for w in now], axis=0)
        if together:
            if (company := tuple(now)) not in offsets:
                offsets[company] = mx.array(np.concatenate([walk.positions for walk in now]))
            spans = [Span(w.rows, w.positions.size, w.caches[w.at], w.mask) for w in now]
            h = layers[block](h, None, Spans(offsets[company], spans), _scales(now, h.dtype))
        else:
            (walk,) = now
            scales = None if walk.scales is None else walk.scales[walk.at]
            h = walk.h = layers[block](walk.h, walk.mask, walk.caches[walk.at], scales)
        for walk in now:
            walk.at += 1
        if number % _STRIDE == 0:
            begin_to_compute(h)
    _take_apart(h, together)
    return [walk.h for walk in walks]


def _take_apart(h: mx.array, walks: Sequence[_Walk]) -> None:
    """Give each its rows of `h`, `[B, L, D]`."""
    start = 0
    for walk in walks:
        end = start + walk.positions.size
        walk.h = h[start:end].reshape(walk.rows, -1, h.shape[-1])
        start = end


def _scales(walks: Sequence[_Walk], dtype: mx.Dtype) -> Scales | None:
    """What weighs attention and MLP: one number each where all agree, else `[N, 1, 1]`."""
    wanted = [(1.0, 1.0) if w.scales is None else w.scales[w.at] for w in walks]
    if all(pair == wanted[0] for pair in wanted):
        return None if wanted[0] == (1.0, 1.0) else wanted[0]
    sizes = [walk.positions.size for walk in walks]
    attention, mlp = (
        np.repeat(column, sizes).reshape(-1, 1, 1) for column in zip(*wanted, strict=True)
    )
    return mx.array(attention, dtype=dtype), mx.array(mlp, dtype=dtype)
