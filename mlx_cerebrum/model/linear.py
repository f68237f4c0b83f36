"""Matrices of the model times its activations."""

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device

# OpenBLAS multiplies products of up to this size (tokens x rows x columns) as they lie. A larger
# one it packs first, which reads and writes the matrix once more than the product itself.
_SMALL = 1_000_000
_FEW_ROWS = 1200
# With OpenBLAS 0.3.21, for several tokens at once only wide matrices gain by it: a 4096 x 14336
# one some four times for 1 token, three for 8, two for 16, nothing for 32.
_FEW_TOKENS, _WIDE = 16, 1024


@cache
def _pieces(tokens: int, rows: int, columns: int) -> int:
    """Into how many equal pieces the rows are cut for each product to be small; 1: left whole."""
    if tokens > 1 and (tokens > _FEW_TOKENS or columns < _WIDE):
        return 1
    for pieces in range(1, rows):
        piece = rows // pieces
        if rows % pieces == 0 and piece <= _FEW_ROWS and tokens * piece * columns <= _SMALL:
            return pieces
    return 1


def multiply(x: mx.array, weight: mx.array) -> mx.array:
    """`[..., K]` times `[N, K]` transposed -> `[..., N]`.

    A few tokens' vectors are multiplied piece by piece on Linux's CPU. With OpenBLAS a large model
    decodes almost twice as fast for it (bench.plain); the demo, whose matrices are small, gains
    little on an idle machine, more on a busy one. MLX's own BLAS does not mind.
    """
    rows, columns = weight.shape
    tokens = x.size // columns
    pieces = _pieces(tokens, rows, columns) if device.on_linux_cpu() else 1
    if pieces == 1:
        return x @ weight.T
    cut = weight.reshape(pieces, rows // pieces, columns).swapaxes(-1, -2)
    parts = x.reshape(1, tokens, columns) @ cut  # [pieces, tokens, rows / pieces]
    return parts.swapaxes(0, 1).reshape(*x.shape[:-1], rows)


class Linear(nn.Linear):
    """nn.Linear without a bias, by `multiply`."""

    def __call__(self, x: mx.array) -> mx.array:
        return multiply(x, self.weight)


class Embedding(nn.Embedding):
    """nn.Embedding; as a head, by `multiply`."""

    def as_linear(self, x: mx.array) -> mx.array:
        return multiply(x, self.weight)
