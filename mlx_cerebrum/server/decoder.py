"""A model as mlx-lm's `BatchGenerator` calls it."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.server.lm import BatchRotatingKVCache


class Decoder:
    """Float32 logits `[B, 1, V]`, one array of offsets for all positions.

    Set `narrow` when sequences have left a batch: with the next step its buffers become as
    short as those that stay allow.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.narrow = False

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        if self.narrow:
            self.narrow = False
            close_up(cache)
        for other in cache[1:]:
            other.offset = cache[0].offset  # equal, and now the same array: see Rotary
        # In 16 bits, subtracting the log-sum would make ties of tokens that differ.
        return self._model(tokens, cache).astype(mx.float32)


def close_up(caches: Sequence[Any]) -> None:
    """Drop the padding that all rows begin with: only one that has left needed the length.

    mlx-lm's caches without a window do so themselves. Those with one would stay as long as the
    longest row was, and in a batch that is never empty grow to the whole window for every row.
    """
    if not isinstance(caches[0], BatchRotatingKVCache):
        return
    padding = min(caches[0].left_padding.tolist())  # the same in all positions
    if padding <= 0:
        return
    for c in caches:
        keys, values, offset, left_padding, window, _, end, rotated = c.state
        if rotated:  # into the order of time
            keys, values = (mx.roll(kv, -end, 2) for kv in (keys, values))
            end = window
        keys, values = keys[..., padding:end, :], values[..., padding:end, :]
        length = end - padding
        c.state = keys, values, offset, left_padding - padding, window, length, length, False
