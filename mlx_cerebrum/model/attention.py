"""Attention over cached entries, as they are held: dense, or packed to fewer bits."""

from typing import Any

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.cache import KV_BITS, REWIND, Entries, Mask, Packed, causal_mask, kv_group
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.cpu import attend_in_slices, in_slices

# Up to so many queries multiply packed entries as they are; more have them unpacked first. Metal
# then reads the packed bytes only, for a round of drafts as for a plain step. CUDA's kernel takes
# no slice of a buffer (MLX's QuantizedMatmul::eval_gpu). The CPU's product
# unpacks for every row anew: it takes 0.3 to 0.8 of the time for one query (256 to 4096 entries,
# heads 64 or 128 wide), 0.4 to 1.8 for two, 1.0 to 3.0 for four, 1.7 to 4.8 for 16.
_PACKED_ROWS = {"metal": REWIND, "cuda": 0, "cpu": 1}


def packed_rows() -> int:
    """Most queries that multiply packed entries as they are."""
    return _PACKED_ROWS[device.backend()]


def check_kv_bits(config: ModelConfig, bits: int | None) -> None:
    """Raise RequestError for cache entries that can't be packed to `bits`; None: stay dense."""
    if bits is None:
        return
    if bits not in KV_BITS:
        raise RequestError(f"kv-bits must be 8 or 4, not {bits}")
    if config.head_dim % kv_group(config.head_dim):
        raise RequestError(
            f"kv-bits needs heads a multiple of 32 wide; this model's are {config.head_dim}:"
            " leave kv-bits out"
        )


def attend(queries: mx.array, keys: Entries, values: Entries, scale: float, mask: Mask) -> mx.array:
    """Queries `[B, H, L, D]` over keys and values `[B, kv heads, T, D]` -> `[B, H, L, D]`.

    `mask` is None, "causal" (the queries are the last L of T) or boolean `[L, T]`, which hides
    what comes after a query too. No more than one position's entries are ever unpacked.
    """
    few = queries.shape[2] <= packed_rows()
    if few and isinstance(keys, Packed) and isinstance(values, Packed):
        return _attend_packed(queries, keys, values, scale, mask)
    keys, values = unpack(keys, queries.shape[-1]), unpack(values, queries.shape[-1])
    if in_slices(queries.shape[2], keys.shape[2], queries.dtype, mask):
        return attend_in_slices(queries, keys, values, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def unpack(entries: Entries, width: int) -> mx.array:
    """The dense `[B, kv heads, T, width]` that `entries` stand for."""
    if isinstance(entries, Packed):
        return mx.dequantize(*entries, **_packing(entries, width))
    return entries


def _packing(entries: Packed, width: int) -> dict[str, Any]:
    """How rows of `width` values were packed, as mx.quantize's functions are told it."""
    return {"group_size": kv_group(width), "bits": 32 * entries.weight.shape[-1] // width}


def _attend_packed(
    queries: mx.array, keys: Packed, values: Packed, scale: float, mask: Mask
) -> mx.array:
    B, H, L, D = queries.shape
    _, kv_heads, T, _ = keys.weight.shape
    # The CPU's product adds up in what it is given: 16 bits would lose more than packing does.
    rows = (queries if device.on_gpu() else queries.astype(mx.float32)) * scale
    # Queries that share a kv head are rows of one product, which reads its entries once.
    rows = rows.reshape(B, kv_heads, H // kv_heads * L, D)
    scores = mx.quantized_matmul(rows, *keys, transpose=True, **_packing(keys, D))
    if mask is not None:
        visible = causal_mask(L, T - L, None) if isinstance(mask, str) else mask
        scores = scores.reshape(B, H, L, T)
        scores = mx.where(visible, scores, -mx.inf).reshape(B, kv_heads, H // kv_heads * L, T)
    weights = mx.softmax(scores, axis=-1, precise=True)  # computed in float32
    out = mx.quantized_matmul(weights, *values, transpose=False, **_packing(values, D))
    return out.reshape(B, H, L, D).astype(queries.dtype)
