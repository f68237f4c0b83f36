"""Attention as the model computes it, against the definition in float64.

Queries, keys, values and what packed entries are scaled by are numbers that all three types have
exactly, so that one reference serves them all and only the computing is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum import device
from mlx_cerebrum.doctor.check import Found, Settings
from mlx_cerebrum.model.attention import attend
from mlx_cerebrum.model.cache import Mask, causal_mask
from mlx_cerebrum.model.entries import Entries, Packed, pack, unpack

# Of the largest number that comes out; of 16 bits four units in the last place of 1: a score, its
# weight, what is added up and an unpacked value are rounded.
BOUNDS = {"float32": 1e-5, "float16": 4 * 2**-10, "bfloat16": 4 * 2**-7}
HEADS = {64: (6, 2), 96: (2, 2), 128: (8, 2)}  # width: heads, those of keys; 128 is Mistral's
QUERIES = (1, 2, 8, 9, 64, 512)
KEYS = (0, 95, 1100, 4607)  # besides the queries; the last: in all, at most
MOST_KEYS = 4607  # a window of 4096 less the query's own, and a chunk of 512
MASKS = ("none", "causal", "window", "rows")
WINDOW = 300
_KINDS = (None, 8, 4)  # bits of packed entries
_FEW = 9  # queries at most of several rows together
_LONG = 1 << 20  # scores of a head; beyond, what takes long is left out
_CPU_WORK = 3e7  # products in 16 bits that MLX's CPU backend makes in a moment

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    width: int
    queries: int
    keys: int
    mask: str


def shapes(quick: bool) -> Iterator[Shape]:
    for width in (64, 128) if quick else HEADS:
        for queries in (1, 8, 9, 512) if quick else QUERIES:
            wanted = (queries + 95, MOST_KEYS) if quick else _keys(queries)
            for keys in wanted:
                for mask in MASKS:
                    most = {"rows": _FEW, "none": _LONG // keys}.get(mask, queries)
                    if queries <= most:
                        yield Shape(width, queries, keys, mask)


def _keys(queries: int) -> list[int]:
    return sorted({min(queries + more, MOST_KEYS) for more in KEYS})


def attention(settings: Settings) -> Found:
    """Dense and packed entries in three types; the largest error of each."""
    mx.random.seed(0)
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    counts: dict[tuple[str, str], int] = {}
    for shape in shapes(settings.quick):
        rows = 2 if shape.mask == "rows" else 1
        heads, kv_heads = HEADS[shape.width]
        queries = _numbers(rows, heads, shape.queries, shape.width)
        keys, values = (_numbers(rows, kv_heads, shape.keys, shape.width) for _ in range(2))
        mask, visible = _mask(shape, rows)
        scale = shape.width**-0.5
        for bits in _kinds(shape):
            k, v = _held(keys, bits), _held(values, bits)
            meant = reference(
                _wide(queries),
                _wide(unpack(k, shape.width)),
                _wide(unpack(v, shape.width)),
                scale,
                visible,
            )
            for name in _types(shape):
                dtype = getattr(mx, name)
                made = attend(queries.astype(dtype), _cast(k, dtype), _cast(v, dtype), scale, mask)
                error = float(np.abs(_wide(made) - meant).max() / np.abs(meant).max())
                at = "dense" if bits is None else f"{bits}-bit", name
                counts[at] = counts.get(at, 0) + 1
                if error >= worst.get(at, (0.0, ""))[0] or error != error:  # NaN
                    worst[at] = error, _words(shape)
        mx.clear_cache()
    missed = [at for at, (error, _) in worst.items() if not error < BOUNDS[at[1]]]
    head = ["entries", "type", "cases", "largest error", "bound", "where"]
    table = [
        [*at, str(counts[at]), f"{worst[at][0]:.1e}", f"{BOUNDS[at[1]]:.1e}", worst[at][1]]
        for at in sorted(worst)
    ]
    largest = {name: max(e for at, (e, _) in worst.items() if at[1] == name) for name in BOUNDS}
    words = ", ".join(f"{error:.1e} in {name}" for name, error in largest.items())
    return Found(
        not missed, f"{sum(counts.values())} cases; at most {words}", [head, *table], largest
    )


def reference(
    queries: Numbers, keys: Numbers, values: Numbers, scale: float, visible: npt.NDArray[np.bool_]
) -> Numbers:
    """Queries `[B, H, L, D]` over keys and values `[B, kv heads, T, D]`, where `visible`, which is
    `[L, T]` or `[B, 1, L, T]`."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(entries, group, axis=1) for entries in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2)
    scores *= scale
    np.copyto(scores, -np.inf, where=~np.broadcast_to(visible, scores.shape))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    found: Numbers = scores @ values / scores.sum(axis=-1, keepdims=True)
    return found


def _mask(shape: Shape, rows: int) -> tuple[Mask, npt.NDArray[np.bool_]]:
    """As the model gives it to `attend`, and which keys each query sees."""
    L, T = shape.queries, shape.keys
    i, j = np.arange(T - L, T)[:, None], np.arange(T)[None]
    if shape.mask == "none":
        return None, np.ones((L, T), dtype=np.bool_)
    if shape.mask == "causal":
        return "causal", j <= i
    if shape.mask == "window":
        return causal_mask(L, T - L, WINDOW), (j <= i) & (j > i - WINDOW)
    holes = np.arange(rows)[:, None, None, None] * (T // 3)  # the second row is shorter
    visible = (j <= i) & ((j >= holes) | (j == i))
    return mx.array(visible), visible


def _kinds(shape: Shape) -> tuple[int | None, ...]:
    if shape.queries * shape.keys > _LONG and shape.mask != "window":
        return (None,)
    return _KINDS


def _types(shape: Shape) -> list[str]:
    """All on a GPU. MLX's CPU backend multiplies 16-bit numbers a thousand times more slowly."""
    heads, _ = HEADS[shape.width]
    work = heads * shape.queries * shape.keys * shape.width
    return ["float32"] if not device.on_gpu() and work > _CPU_WORK else list(BOUNDS)


def _numbers(*sizes: int) -> mx.array:
    return mx.random.normal(sizes).astype(mx.bfloat16).astype(mx.float32)


def _held(entries: mx.array, bits: int | None) -> Entries:
    """Packed with scales and biases of few bits."""
    held = pack(entries, bits)
    if isinstance(held, Packed):
        few = (part.astype(mx.bfloat16).astype(mx.float32) for part in held[1:])
        return Packed(held.weight, *few)
    return held


def _cast(entries: Entries, dtype: mx.Dtype) -> Entries:
    if isinstance(entries, Packed):
        return Packed(entries.weight, *(part.astype(dtype) for part in entries[1:]))
    return entries.astype(dtype)


def _wide(array: mx.array) -> Numbers:
    return np.array(array.astype(mx.float32), dtype=np.float64)


def _words(shape: Shape) -> str:
    return f"{shape.queries} over {shape.keys}, heads of {shape.width}, mask {shape.mask}"
