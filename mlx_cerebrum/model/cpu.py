"""What the CPU backend computes in another way than MLX's own, because it is faster there.

Products with one token's vector, rotary positions, attention over a prompt. On a GPU the modules
here call MLX's kernels. Where Accelerate does the work (macOS), products and attention are MLX's.

On two cores of an EPYC, in float32, products in pieces make a token of a 1.8 GB model 1.21 times as
fast (1.16 to 1.25 in five rounds), one of the demo 1.03 times. The rest took ours / mlx-lm, in
tokens/s, from 1.04 to 1.39 for a prompt of 2048 tokens, and from 1.99 to 3.24 for one of 16384.
"""

import math
from collections import deque
from functools import cache, lru_cache
from threading import get_ident
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device
from mlx_cerebrum.model.cache import Mask, causal_mask

# ---- Products

# OpenBLAS has kernels for small products on processors with AVX-512, which read a matrix where it
# lies: one core then reads as fast as the memory gives it. Any other product copies it first, piece
# by piece, on all cores. These are the largest they take (kernel/x86_64/
# sgemm_small_kernel_permit_skylakex.c). On two cores of a Xeon, in pieces as small as that, a
# matrix of 3072 x 576 takes 0.79 of the time for 1 vector, 0.83 for 2, 0.93 for 4; for 8 as long.
_SMALL = frozenset(["skylakex", "cooperlake", "sapphirerapids"])  # kernels that are so
_SMALL_RESULT, _SMALL_WORK, _SMALL_TOKENS = 1200, 1_000_000, 4

# Without them a matrix of many rows is multiplied faster in pieces, by a few vectors: on two cores
# of an EPYC (OpenBLAS 0.3.21) one of 28672 x 4096 takes 0.76 of the time for 1, 0.71 for 2, 0.82
# for 8, 0.90 for 32, in pieces of 900 to 1800 rows. One of 3072 rows takes as long or longer. One
# of few columns gains for 1 vector (the demo's head), and for 16 takes 1.3 times as long. (Pieces
# that shrink as the vectors become more take up to nine times as long.)
_MANY_ROWS, _MANY_COLUMNS, _FEW_TOKENS = 4096, 1024, 32
_PIECE = 1200  # rows, at most


@cache
def _pieces(tokens: int, rows: int, columns: int) -> int:
    """Into how many equal pieces the rows are cut; 1: left whole."""
    if tokens <= _SMALL_TOKENS and device.openblas_kernels().lower() in _SMALL:
        most = min(_SMALL_RESULT, _SMALL_WORK // columns) // tokens
        counts = range(-(-rows // most), 4 * rows // most) if most else range(0)
    elif tokens > _FEW_TOKENS or rows < _MANY_ROWS or (tokens > 1 and columns < _MANY_COLUMNS):
        return 1
    else:
        counts = range(-(-rows // _PIECE), 3 * rows // _PIECE)  # for a third of it at least
    return next((n for n in counts if rows % n == 0), 1)


def multiply(x: mx.array, weight: mx.array) -> mx.array:
    """`[..., K]` times `[N, K]` transposed -> `[..., N]`.

    On Linux's CPU a few tokens' vectors are multiplied by a large matrix piece by piece. MLX's own
    BLAS is as fast either way.
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


# ---- Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), halves paired as in Llama

Tables = tuple[mx.array, mx.array]
Shape = tuple[int, ...]


def _tables(positions: mx.array, base: float, shape: Shape) -> Tables:
    """`(cos, sin)` of every angle: float `positions [..., 1]` -> `shape`, `[B, H, L, width]`.

    The first half of sin is negative.
    """
    width = shape[-1]
    powers = mx.arange(width // 2, dtype=mx.float32) * (-2 * math.log(base) / width)
    angles = positions * mx.exp(powers)
    cos, sin = mx.cos(angles), mx.sin(angles)
    cos, sin = mx.concatenate([cos, cos], axis=-1), mx.concatenate([-sin, sin], axis=-1)
    return mx.broadcast_to(cos, shape), mx.broadcast_to(sin, shape)


@lru_cache(maxsize=4)
def _tables_of_one(thread: int, base: float, offset: int, shape: Shape) -> Tables:
    """Those of sequences that are all at the same `offset`.

    Each thread has its own: it can't use an array that another one has yet to compute.
    """
    positions = mx.arange(offset, offset + shape[2], dtype=mx.float32)
    return _tables(positions[:, None], base, shape)


# The last batches': offsets, what else they were made for, tables. Several, since a step may change
# between companies of sequences.
_batches: deque[tuple[mx.array, tuple[float, Shape], Tables]] = deque(maxlen=4)


def _tables_of_batch(base: float, offsets: mx.array, shape: Shape) -> Tables:
    """Those of sequences at different `offsets [B]`.

    Positions whose caches share one array of offsets share the tables made for it.
    """
    made_for = base, shape
    for known, what, tables in list(_batches):
        if known is offsets and what == made_for:
            return tables
    positions = offsets.reshape(-1, 1, 1, 1) + mx.arange(shape[2])[:, None]
    tables = _tables(positions.astype(mx.float32), base, shape)
    _batches.append((offsets, made_for, tables))
    return tables


class Rotary(nn.Module):
    """Turns `[B, H, L, width]`, tokens `offset` and on, by their positions.

    On a GPU `mx.fast.rope` is one kernel. On the CPU it is 22 more primitives in every position
    of the layer map, sines and cosines among them; there one step's tables serve them all.
    """

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def __call__(self, x: mx.array, offset: Any, rest: int = 0) -> mx.array:
        """All heads but the last `rest`, `[B, H - rest, L, width]`.

        `offset` is the first token's position, of each sequence where it is an array `[B]`.
        """
        turned = x.shape[1] - rest
        if device.on_gpu():
            # Metal's kernel copies what it is given first, where one sequence's heads don't follow
            # the other's at once (RoPE::eval_gpu). Of several, the rest are turned for nothing: 8
            # of 48 heads in place of a kernel. q, k and v of a company are then 3 kernels with
            # attention's copy of the queries, 4 without this, 5 as three matrices.
            of_one = x[:, :turned] if len(x) == 1 else x
            return mx.fast.rope(
                of_one, self.width, traditional=False, base=self.base, scale=1.0, offset=offset
            )[:, :turned]
        x = x[:, :turned]
        if isinstance(offset, int):
            cos, sin = _tables_of_one(get_ident(), self.base, offset, x.shape)
        else:  # mlx-lm's batched caches
            cos, sin = _tables_of_batch(self.base, offset, x.shape)
        left, right = mx.split(x, 2, axis=-1)
        return (x * cos + mx.concatenate([right, left], axis=-1) * sin).astype(x.dtype)


# ---- Attention over a prompt, in float32 on Linux: one head and some queries at a time
#
# Of the 15 ns that MLX's own takes there for a score, 12 are its exponential, which it computes a
# value at a time where it has no Accelerate (mlx/backend/cpu/simd). A power of two made of sums,
# products and shifts of whole arrays takes 2, as long as the scores stay in the core's cache.
# Slices also leave out the keys after their last query, and most of the memory.

# Measured on two cores of an EPYC, heads 64 and 128 wide: slices of 128k scores make a chunk of 256
# queries 1.2 to 1.7 times as fast as MLX's own, over 256 to 4351 keys, and 8 queries slower.
SLICE = 1 << 17  # scores computed at a time
LEAST = 1 << 16  # scores of a head from which on slices always paid
_FEWEST = 8  # queries from which on that holds: fewer were not measured
_ROWS = 32  # queries in a slice, at least: for each of them all keys are read again

_LOG2_E = 1 / math.log(2)
# 2^f for -1/2 <= f <= 1/2: 1, then f, f^2, ...; least squares of the relative error over the
# extremes of a Chebyshev polynomial, 1 held fast. Within 2e-7 of it in float32.
_POWERS = (1.0, 0.6931468844, 0.2402223796, 0.0555089302, 0.0096717030, 0.0013218675)
_ROUND = 1.5 * 2.0**23  # added to a small float32, it rounds it: its lowest bits are the integer
_EXPONENT = 23  # the bit where a float32's exponent begins


def in_slices(length: int, keys: int, dtype: mx.Dtype, mask: Mask) -> bool:
    """Whether `attend_in_slices` is the way for `length` queries over `keys`."""
    if length < _FEWEST or length * keys < LEAST or dtype != mx.float32:
        return False
    if not device.on_linux_cpu():
        return False
    return not isinstance(mask, mx.array) or mask.ndim == 2  # one for all sequences


def attend_in_slices(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask
) -> mx.array:
    """As `attention.attend`, for dense float32. Any mask hides what comes after a query."""
    B, H, L, _ = queries.shape
    kv_heads, T = keys.shape[1:3]
    queries = queries * (scale * _LOG2_E)  # scores are then powers of two
    keys = keys.swapaxes(-1, -2)
    rows = _rows(L, B * T)
    slices = []
    for start in range(0, L, rows):
        end = min(start + rows, L)
        seen = T if mask is None else T - L + end  # keys that one of these queries may see
        visible = None if mask is None or isinstance(mask, str) else mask[start:end, :seen]
        if isinstance(mask, str):
            visible = causal_mask(end - start, T - L + start, None)
        heads = []
        for head in range(H):
            group = head * kv_heads // H
            scores = queries[:, head, start:end] @ keys[:, group, :, :seen]
            if visible is not None:
                scores = mx.where(visible, scores, -mx.inf)
            weights = exp2(scores - mx.max(scores, axis=-1, keepdims=True))
            total = mx.sum(weights, axis=-1, keepdims=True)
            heads.append(weights @ values[:, group, :seen] / total)
        slices.append(mx.stack(heads, axis=1))
    return mx.concatenate(slices, axis=2)


def by_rows(length: int, sharing: int, keys: int) -> bool:
    """Whether `attend_by_rows` is the way for `length` queries of `sharing` heads over `keys`.

    Not where one product for the heads would be too large for kernels that take each head's. Else
    it takes 0.7 of the time for 100 and for 2000 keys, heads 64 and 128 wide; there 1.1.
    """
    if not length < _FEWEST or not device.on_linux_cpu():
        return False
    return not length * keys <= _SMALL_RESULT < sharing * length * keys


def attend_by_rows(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask
) -> mx.array:
    """As `attention.attend`, for a few queries over dense entries.

    The queries of all heads that share keys are rows of one product, so that keys and values are
    read once; MLX's own reads them for each head.
    """
    B, H, L, D = queries.shape
    kv_heads, T = keys.shape[1:3]
    rows = (queries * scale).reshape(B, kv_heads, -1, D)
    scores = rows @ keys.swapaxes(-1, -2)
    if mask is not None:
        visible = causal_mask(L, T - L, None) if isinstance(mask, str) else mask
        scores = mx.where(visible, scores.reshape(B, H, L, T), -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(B, kv_heads, -1, T)
    return (weights @ values).reshape(B, H, L, D)


def exp2(x: mx.array) -> mx.array:
    """2 to the power of each number in `x`, which are float32 and at most 0.

    From -127 down it is 0. Between -127 and -126, where float32 has no full precision, it is some
    tiny number.
    """
    x = mx.maximum(x, -127.0)  # exactly there all bits come out as 0
    whole = x + _ROUND
    rest = x - (whole - _ROUND)
    power = rest * _POWERS[-1] + _POWERS[-2]
    for coefficient in reversed(_POWERS[:-2]):
        power = power * rest + coefficient
    # Adding to the exponent's bits multiplies by a power of two.
    bits = mx.view(power, mx.int32) + (mx.view(whole, mx.int32) << _EXPONENT)
    return mx.view(bits, mx.float32)


def _rows(length: int, keys: int) -> int:
    """How many of `length` queries make a slice: about as many in each."""
    return math.ceil(length / math.ceil(length / max(_ROWS, SLICE // keys)))


def scores_held(length: int, keys: int, heads: int) -> int:
    """The most values that `attend_in_slices` holds at once, besides its result, while a cache
    grows to `keys` entries.

    MLX's CPU backend issues about 100 operations ahead of those computed. That is some six slices,
    each with five arrays in memory until it is computed.
    """
    scores, largest = length * keys, max(SLICE, _ROWS * keys)
    full, all_of_them = max(1, scores // largest), math.ceil(scores / largest)  # slices of a head
    as_they_are = min(heads * all_of_them, 6) * (scores // all_of_them)
    when_full = min(heads * full, 6) * min(scores, largest)
    return 5 * max(as_they_are, when_full)
