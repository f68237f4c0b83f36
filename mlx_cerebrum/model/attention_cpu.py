"""Attention over a prompt on Linux's CPU, in float32: one head and some queries at a time.

Of the 15 ns that MLX's own takes there for a score, 12 are its exponential, which it computes a
value at a time where it has no Accelerate (mlx/backend/cpu/simd). A power of two made of sums,
products and shifts of whole arrays takes 2, as long as the scores stay in the core's cache. Slices
also leave out the keys after their last query, and most of the memory.
"""

import math

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.model.cache import Mask, causal_mask

# Measured by bench.attention:
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
    if dtype != mx.float32 or not device.on_linux_cpu():
        return False
    if length < _FEWEST or length * keys < LEAST:
        return False
    return not isinstance(mask, mx.array) or mask.ndim == 2  # one for all sequences


def attend_in_slices(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask
) -> mx.array:
    """As `attention.attend`, of dense float32. A mask hides all that comes after a query."""
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


def exp2(x: mx.array) -> mx.array:
    """2 to the power of each of `x`, float32 of at most 0; 0 from -127 down.

    Between -127 and -126, where float32 has no full precision, it is some tiny number.
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
    """Values that `attend_in_slices` holds at most, until there are `keys`, besides its result's.

    MLX's CPU backend issues about 100 operations ahead of those computed: some six slices', which
    hold five arrays each until they are.
    """
    scores, largest = length * keys, max(SLICE, _ROWS * keys)
    full, all_of_them = max(1, scores // largest), math.ceil(scores / largest)  # slices of a head
    as_they_are = min(heads * all_of_them, 6) * (scores // all_of_them)
    when_full = min(heads * full, 6) * min(scores, largest)
    return 5 * max(as_they_are, when_full)
