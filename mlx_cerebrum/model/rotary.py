"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama."""

import math
from functools import lru_cache
from threading import get_ident
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device


@lru_cache(maxsize=4)
def _tables(
    thread: int, width: int, base: float, offset: int, length: int
) -> tuple[mx.array, mx.array]:
    """`(cos, sin)` of every angle, `[length, width]`; sin's first half is negative.

    Each thread has its own: it can't use an array that another one has yet to compute.
    """
    powers = mx.arange(width // 2, dtype=mx.float32) * (-2 * math.log(base) / width)
    angles = mx.arange(offset, offset + length, dtype=mx.float32)[:, None] * mx.exp(powers)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)


# The last batch's: offsets, what else they were made for, tables.
_batch: tuple[mx.array, tuple[int, float, int], tuple[mx.array, mx.array]] | None = None


def _batch_tables(
    width: int, base: float, offsets: mx.array, length: int
) -> tuple[mx.array, mx.array]:
    """`(cos, sin)` for sequences at different `offsets [B]`: each `[B, 1, length, width]`.

    Positions whose caches share one array of offsets share the tables made for it.
    """
    global _batch
    last, made_for = _batch, (width, base, length)
    if last is not None and last[0] is offsets and last[1] == made_for:
        return last[2]
    powers = mx.arange(width // 2, dtype=mx.float32) * (-2 * math.log(base) / width)
    positions = offsets.reshape(-1, 1, 1, 1) + mx.arange(length)[:, None]
    angles = positions.astype(mx.float32) * mx.exp(powers)
    cos, sin = mx.cos(angles), mx.sin(angles)
    tables = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
    _batch = offsets, made_for, tables
    return tables


class Rotary(nn.Module):
    """Turns `[B, H, L, width]`, tokens `offset` and on, by their positions.

    On a GPU `mx.fast.rope` is one kernel. On the CPU it is 22 more primitives in every position
    of the layer map, sines and cosines among them; there one step's tables serve them all.
    """

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def __call__(self, x: mx.array, offset: Any) -> mx.array:
        """`offset` is the first token's position, of each sequence where it is an array `[B]`."""
        if device.on_gpu():
            return mx.fast.rope(
                x, self.width, traditional=False, base=self.base, scale=1.0, offset=offset
            )
        made_for = (self.width, self.base, offset, x.shape[2])
        if isinstance(offset, int):
            cos, sin = _tables(get_ident(), *made_for)
        else:  # mlx-lm's batched caches
            cos, sin = _batch_tables(*made_for)
        left, right = mx.split(x, 2, axis=-1)
        return (x * cos + mx.concatenate([right, left], axis=-1) * sin).astype(x.dtype)
