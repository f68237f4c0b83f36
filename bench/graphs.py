"""Graphs of primitives, built and counted by name, never evaluated.

Each primitive that computes is a kernel to launch. Those that only look at another's memory
under other shapes and strides (`VIEWS`) launch nothing, unless no view can have the shape.

A graph depends on shapes alone, so models are `hollow`: every parameter is a zero stretched over
its shape, which takes no memory, and the real geometries are counted as they are.

Counts are this backend's. Metal has one kernel each for RMSNorm, RoPE, attention and unpacking,
where the CPU backend composes them of others: `count_as_on_metal` puts one marker in place of
each call, and tells the model that it is there.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_cerebrum import device

Counts = Counter[str]

# fmt: off
VIEWS = frozenset([
    "AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
])
# fmt: on
_NODE = re.compile(r'\[label ?= ?"([^"]+)", shape=rectangle\]')
# What stands for Metal's kernels: primitives that no model here uses, that keep their input's
# shape, and that mx.compile leaves alone.
_MARKERS: dict[str, tuple[str, Callable[..., mx.array]]] = {
    "CumMax": ("RMSNorm", mx.cummax),
    "CumMin": ("RoPE", mx.cummin),
    "CumProd": ("ScaledDotProductAttention", mx.cumprod),
}
# Head widths that both of Metal's attention kernels have: for one token, and for a chunk.
_METAL_HEADS = (64, 128)


def parse(dot: str) -> Counts:
    """Primitives by name in a graph as `mx.export_to_dot` writes it.

    Elementwise operations compiled into one are one node, whose name lists them: "Compiled".
    """
    names = _NODE.findall(dot)
    return Counter("Compiled" if name.startswith("Compiled") else name for name in names)


def count(outputs: Any) -> Counts:
    """Primitives behind unevaluated arrays, in whatever lists or tuples they are."""
    found: dict[str, Any] = dict(tree_flatten(outputs))
    dot = io.StringIO()
    mx.export_to_dot(dot, *(array for array in found.values() if isinstance(array, mx.array)))
    return parse(dot.getvalue())


def count_as_on_metal(build: Callable[[], Any], head_dim: int) -> Counts:
    """Primitives of the graph that `build` would make on Metal; what it makes here is no use."""

    def marker(run: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def mark(x: mx.array, *rest: Any, **named: Any) -> mx.array:
            others = [a for a in (*rest, *named.values()) if isinstance(a, mx.array)]
            return run(mx.depends([x], others)[0] if others else x, axis=-1)

        return mark

    def unpack(weight: mx.array, scales: mx.array, **named: Any) -> mx.array:
        # Counted as Concatenate: a marker has no other shape than its input's.
        others = [weight] if named["biases"] is None else [weight, named["biases"]]
        return mx.concatenate(mx.depends([scales], others) * named["group_size"], axis=-1)

    norm, rope, attention = (marker(run) for _, run in _MARKERS.values())
    if head_dim not in _METAL_HEADS:
        attention = mx.fast.scaled_dot_product_attention
    with (
        mock.patch.object(mx.fast, "rms_norm", norm),
        mock.patch.object(mx.fast, "rope", rope),
        mock.patch.object(device, "backend", return_value="metal"),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(mx, "dequantize", unpack),
    ):
        found = count(build())
    del found["Depends"]  # holds a marker's other inputs, no more
    return Counter({_MARKERS[k][0] if k in _MARKERS else k: n for k, n in found.items()})


def kernels(counts: Mapping[str, int]) -> int:
    """Primitives that compute."""
    return sum(n for name, n in counts.items() if name not in VIEWS)


def line(points: Mapping[int, Counts]) -> tuple[Counts, Counts]:
    """`(per position, besides)` of the counts at two numbers of positions.

    Raises ValueError where they do not differ by a whole number for each position.
    """
    (few, short), (many, long) = sorted(points.items())
    per: Counts = Counter()
    for name in short | long:
        per[name], left = divmod(long[name] - short[name], many - few)
        if left:
            raise ValueError(f"{name}: {short[name]} at {few} and {long[name]} at {many} positions")
    besides = Counter({name: short[name] - few * per[name] for name in per})
    return _nonzero(per), _nonzero(besides)


def at(positions: int, per: Counts, besides: Counts) -> Counts:
    """Counts at a number of positions, from those of `line`."""
    names = set(per) | set(besides)
    return _nonzero(Counter({name: positions * per[name] + besides[name] for name in names}))


def _nonzero(counts: Counts) -> Counts:
    """Without what is zero; below zero stays (Counter's own sums would drop it)."""
    return Counter({name: n for name, n in counts.items() if n})


def hollow(module: nn.Module, bits: int | None = None) -> nn.Module:
    """The module, packed to `bits`, its parameters zeros that take one number's memory each."""
    if bits is not None:
        nn.quantize(module, group_size=64, bits=bits)
    module.update(
        tree_map(
            lambda array: mx.broadcast_to(mx.zeros((), array.dtype), array.shape),
            module.parameters(),
        )
    )
    mx.eval(module.parameters())
    return module
