"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama."""

import math
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.memory import on_gpu


@lru_cache(maxsize=4)
def _tables(width: int, base: float, offset: int, length: int) -> tuple[mx.array, mx.array]:
    """`(cos, sin)` of every angle, `[length, width]`; sin's first half is negative."""
    powers = mx.arange(width // 2, dtype=mx.float32) * (-2 * math.log(base) / width)
    angles = mx.arange(offset, offset + length, dtype=mx.float32)[:, None] * mx.exp(powers)
    cos, sin = mx.cos(angles), mx.sin(angles)
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)


class Rotary(nn.Module):
    """Turns `[B, H, L, width]`, tokens `offset` and on, by their positions.

    On a GPU `mx.fast.rope` is one kernel. On the CPU it is 22 more primitives in every position
    of the layer map, sines and cosines among them; there one step's tables serve them all.
    """

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def __call__(self, x: mx.array, offset: Any) -> mx.array:
        if on_gpu() or not isinstance(offset, int):  # mlx-lm's batched caches have arrays
            return mx.fast.rope(
                x, self.width, traditional=False, base=self.base, scale=1.0, offset=offset
            )
        cos, sin = _tables(self.width, self.base, offset, x.shape[2])
        left, right = mx.split(x, 2, axis=-1)
        return (x * cos + mx.concatenate([right, left], axis=-1) * sin).astype(x.dtype)
