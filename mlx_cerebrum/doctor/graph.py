"""What MLX has yet to compute, counted: the primitives of a graph, and the kernels among them."""

import io
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

# fmt: off
# They only look at another's memory under other shapes and strides.
VIEWS = frozenset([
    "AsStrided", "Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
])
# fmt: on


def count(outputs: Any) -> Counter[str]:
    """Primitives by name behind unevaluated arrays, in whatever lists or tuples they are.

    Elementwise operations compiled into one are one node, whose name lists them: "Compiled".
    """
    found: dict[str, Any] = dict(tree_flatten(outputs))
    dot = io.StringIO()
    mx.export_to_dot(dot, *(array for array in found.values() if isinstance(array, mx.array)))
    names = re.findall(r'\[label ?= ?"([^"]+)", shape=rectangle\]', dot.getvalue())
    return Counter("Compiled" if name.startswith("Compiled") else name for name in names)


def kernels(counts: Mapping[str, int]) -> int:
    """Primitives that compute."""
    return sum(n for name, n in counts.items() if name not in VIEWS)
