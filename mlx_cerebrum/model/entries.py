"""Cached keys or values: dense, or packed to fewer bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_cerebrum.errors import RequestError
from mlx_cerebrum.model.config import ModelConfig

KV_BITS = (8, 4)  # that a packed value may have


class Packed(NamedTuple):
    """Keys or values `[B, H, T, D]` in fewer bits, as `mx.quantize` packs rows of D values."""

    weight: mx.array  # [B, H, T, D * bits / 32]
    scales: mx.array  # [B, H, T, D / group_size]
    biases: mx.array


Entries = mx.array | Packed


def kv_group(width: int) -> int:
    """Values that share a scale when entries `width` wide are packed (mx.quantize's groups)."""
    return 64 if width % 64 == 0 else 32


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


def pack(entries: mx.array, bits: int | None) -> Entries:
    """Dense `[B, H, T, D]` packed to `bits`; None: as they are."""
    if bits is None:
        return entries
    return Packed(*mx.quantize(entries, kv_group(entries.shape[-1]), bits))


def unpack(entries: Entries, width: int) -> mx.array:
    """The dense `[B, H, T, width]` that `entries` stand for."""
    if isinstance(entries, Packed):
        return mx.dequantize(*entries, **packing(entries, width))
    return entries


def packing(entries: Packed, width: int) -> dict[str, Any]:
    """How rows of `width` values were packed, as mx.quantize's functions are told it."""
    return {"group_size": kv_group(width), "bits": 32 * entries.weight.shape[-1] // width}


def each(change: Callable[..., mx.array], *entries: Any) -> Any:
    """`change` applied to dense entries, or to each of the arrays that packed ones consist of.

    Given several entries, all dense or all packed, it is applied to their arrays side by side.
    """
    if isinstance(entries[0], tuple):
        return type(entries[0])(*(change(*arrays) for arrays in zip(*entries, strict=True)))
    return change(*entries)


def nbytes(entries: Any) -> int:
    return sum(a.nbytes for a in entries) if isinstance(entries, tuple) else int(entries.nbytes)
