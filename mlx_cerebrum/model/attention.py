"""Attention over cached entries, as they are held: dense, or packed to fewer bits."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.model.cache import REWIND, Cache, Mask, causal_mask
from mlx_cerebrum.model.cpu import attend_by_rows, attend_in_slices, by_rows, in_slices
from mlx_cerebrum.model.entries import Entries, Packed, each, packing, unpack

# Up to so many queries multiply packed entries as they are; more have them unpacked first. Metal
# then reads the packed bytes only, for a round of drafts as for a plain step. CUDA's kernel takes
# no slice of a buffer (MLX's QuantizedMatmul::eval_gpu). The CPU's product unpacks for every row
# anew. Against unpacking first it takes 0.3 to 0.8 of the time for one query (256 to 4096 entries,
# heads 64 or 128 wide), 0.4 to 1.8 for two, 1.0 to 3.0 for four, 1.7 to 4.8 for 16.
_PACKED_ROWS = {"metal": REWIND, "cuda": 0, "cpu": 1}


# Metal multiplies up to so many rows by packed values with a kernel that splits a long cache among
# many threads. More take one whose tiles have 32 rows (MLX's QuantizedMatmul::eval_gpu).
_VECTOR_ROWS = 3


def packed_rows() -> int:
    """Most queries that multiply packed entries as they are."""
    return _PACKED_ROWS[device.backend()]


def attend(queries: mx.array, keys: Entries, values: Entries, scale: float, mask: Mask) -> mx.array:
    """Queries `[B, H, L, D]` over keys and values `[B, kv heads, T, D]` -> `[B, H, L, D]`.

    `mask` is None, "causal" (the queries are the last L of T) or boolean `[L, T]`, which also hides
    what comes after a query. No more than one position's entries are ever unpacked.
    """
    few = queries.shape[2] <= packed_rows()
    if few and isinstance(keys, Packed) and isinstance(values, Packed):
        return _attend_packed(queries, keys, values, scale, mask)
    keys, values = unpack(keys, queries.shape[-1]), unpack(values, queries.shape[-1])
    if in_slices(queries.shape[2], keys.shape[2], queries.dtype, mask):
        return attend_in_slices(queries, keys, values, scale, mask)
    if by_rows(queries.shape[2], queries.shape[1] // keys.shape[1], keys.shape[2]):
        return attend_by_rows(queries, keys, values, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _attend_packed(
    queries: mx.array, keys: Packed, values: Packed, scale: float, mask: Mask
) -> mx.array:
    B, H, L, D = queries.shape
    _, kv_heads, T, _ = keys.weight.shape
    sharing = H // kv_heads * L  # rows of queries that share a kv head
    # The CPU's product adds up in what it is given: 16 bits would lose more than packing does.
    rows = (queries if device.on_gpu() else queries.astype(mx.float32)) * scale
    # They are rows of one product, which reads its entries once.
    rows = rows.reshape(B, kv_heads, sharing, D)
    scores = mx.quantized_matmul(rows, *keys, transpose=True, **packing(keys, D))
    if mask is not None:
        visible = causal_mask(L, T - L, None) if isinstance(mask, str) else mask
        scores = mx.where(visible, scores.reshape(B, H, L, T), -mx.inf)
    # Computed in float32, of scores that a GPU rounds to the queries' dtype. In bfloat16 that adds
    # nothing to what packing does: on the demo model the KL from dense entries is 5.9e-4 with and
    # without it in 8 bits, 0.14 in 4. Scores in float32 would be four kernels more a position.
    weights = mx.softmax(scores, axis=-1, precise=True)
    # Here too, but for a few queries on a GPU: each head's are then rows of its own product,
    # which the CPU takes longer for, with the same bits.
    apart = L <= _VECTOR_ROWS and device.on_gpu()
    weights = weights.reshape(B, kv_heads, -1, L if apart else sharing, T)
    values = each(lambda array: mx.expand_dims(array, 2), values)
    out = mx.quantized_matmul(weights, *values, transpose=False, **packing(values, D))
    return out.reshape(B, H, L, D).astype(queries.dtype)


# What weighs a block's attention and MLP: numbers, or one `[N, 1, 1]` each for the tokens.
Scales = tuple[float, float] | tuple[mx.array, mx.array]


class Span(NamedTuple):
    """Consecutive tokens of a step that attend over one cache: those of `rows` sequences."""

    rows: int
    tokens: int
    cache: Cache
    mask: Mask


class Spans(NamedTuple):
    """One position's caches in a step that has several. Each token is a sequence of length 1 here,
    at its `offset` `[N]`."""

    offset: mx.array
    spans: Sequence[Span]

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Queries `[N, H, 1, D]`, new keys and values `[N, kv heads, 1, D]` -> `[N, H, 1, D]`."""
        found, start = [], 0
        for rows, tokens, cache, mask in self.spans:
            own = slice(start, start := start + tokens)
            q, k, v = (_rows(part[own], rows) for part in (queries, keys, values))
            out = attend(q, *cache.update_and_fetch(k, v), scale, mask)
            if tokens > rows:
                out = out.swapaxes(1, 2).reshape(tokens, -1, 1, out.shape[-1])
            found.append(out)
        return mx.concatenate(found, axis=0)


def _rows(tokens: mx.array, rows: int) -> mx.array:
    """`[rows * L, H, 1, D]` -> `[rows, H, L, D]`."""
    count, heads, _, width = tokens.shape
    if count == rows:
        return tokens
    return tokens.reshape(rows, -1, heads, width).swapaxes(1, 2)
