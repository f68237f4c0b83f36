"""How many bytes a second memory delivers: the ceiling of decoding.

A decoded token reads every weight it runs once, so tokens per second can't exceed bandwidth
over bytes per token (the roofline's slanted side; Williams et al. 2009, doi
10.1145/1498765.1498785). The bandwidth is measured here as this machine's MLX reaches it, by a
copy and by a matrix-vector product, which is what decoding does; and looked up as the chip's
maker publishes it, which no program reaches.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from bench import machine
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.model.cpu import multiply
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import GB, available_bytes

# GB/s, from Apple's and NVIDIA's specifications. Two figures: the smaller GPU's, the larger's.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "Apple M1": (68.25,),
    "Apple M1 Pro": (200,),
    "Apple M1 Max": (400,),
    "Apple M1 Ultra": (800,),
    "Apple M2": (100,),
    "Apple M2 Pro": (200,),
    "Apple M2 Max": (400,),
    "Apple M2 Ultra": (800,),
    "Apple M3": (100,),
    "Apple M3 Pro": (150,),
    "Apple M3 Max": (300, 400),
    "Apple M3 Ultra": (819,),
    "Apple M4": (120,),
    "Apple M4 Pro": (273,),
    "Apple M4 Max": (410, 546),
    "Apple M5": (153,),
    "Apple M5 Pro": (307,),
    "Apple M5 Max": (460, 614),
    "NVIDIA H100": (2039, 3352),
    "NVIDIA H200": (4800,),
    "NVIDIA A100": (1555, 2039),
}
_COPY_BYTES = 512_000_000
_WIDTHS = (1024, 4096, 8192)
_ROUNDS = 9


def published(chip: str) -> tuple[float, ...] | None:
    """The maker's figure for a chip by the name the system gives it, if it is known."""
    found = re.match(r"Apple M\d+(?: (?:Pro|Max|Ultra))?|NVIDIA [A-Z]+\d+", chip)
    return PUBLISHED.get(found[0]) if found else None


def measured(dtype: mx.Dtype) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of matrix-vector products (bytes read).

    The fastest seen, over widths that models have: it is a ceiling that is asked for.
    """
    size = min(_COPY_BYTES, available_bytes() // 8)
    source = mx.zeros(size // 4, mx.float32) + 1.0
    mx.eval(source)
    copy = min(times_of(lambda: -source))  # a kernel that only moves: MLX may alias a copy
    reads = []
    for columns in _WIDTHS:
        matrix = mx.zeros((size // dtype.size // columns, columns), dtype) + 1
        vector = mx.ones((1, columns), dtype)
        mx.eval(matrix, vector)
        # As a linear layer multiplies: `[1, in]` by the transpose of `[out, in]`.
        reads.append(matrix.nbytes / min(times_of(partial(multiply, vector, matrix))))
    mx.clear_cache()
    return {"copy": 2 * source.nbytes / copy / GB, "matvec": max(reads) / GB}


def times_of(make: Callable[[], mx.array], count: int = _ROUNDS) -> list[float]:
    """Seconds that computing what `make` makes took, each time, after once to warm up."""
    took = []
    for _ in range(1 + count):
        started = time.perf_counter()
        mx.eval(make())
        took.append(time.perf_counter() - started)
    return took[1:]


def token_bytes(model: Model, context: int = 0) -> int:
    """Bytes that decoding one token reads: each position's weights, the head, keys and values.

    `context` counts the tokens before it. Of the embedding it reads a row, which is left out.
    """
    config, norm = model.config, model.model.norm.weight
    visible = min(context, config.sliding_window or context)
    entries = config.kv_values_per_token() * norm.dtype.size * visible
    return bytes_read(model) + norm.nbytes + entries


def card(dtype: mx.Dtype) -> dict[str, Any]:
    """The measured figures and the published one, where the chip's is known."""
    chip = machine.chip()
    return {"chip": chip, "published": published(chip), "measured": measured(dtype)}
