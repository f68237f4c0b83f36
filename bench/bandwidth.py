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
from statistics import median
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


def measured(dtype: mx.Dtype = mx.float32) -> dict[str, float]:
    """GB/s of a copy (bytes read and written) and of matrix-vector products (bytes read).

    The fastest seen, over widths that models have: it is a ceiling that is asked for.
    """
    size = min(_COPY_BYTES, available_bytes() // 8)
    source = mx.zeros(size // 4, mx.float32) + 1.0
    mx.eval(source)
    # A kernel that only moves: MLX may alias a copy.
    copy = min(times_of(lambda: mx.eval(-source), _ROUNDS))
    reads = []
    for columns in _WIDTHS:
        matrix = mx.zeros((size // dtype.size // columns, columns), dtype) + 1
        vector = mx.ones((1, columns), dtype)
        mx.eval(matrix, vector)
        product = partial(_multiply, vector, matrix)
        reads.append(matrix.nbytes / min(times_of(product, _ROUNDS)))
        del matrix, product
    mx.clear_cache()
    return {"copy": 2 * source.nbytes / copy / GB, "matvec": max(reads) / GB}


def _multiply(vector: mx.array, matrix: mx.array) -> None:
    """As a linear layer multiplies: `[1, in]` by the transpose of `[out, in]`."""
    mx.eval(multiply(vector, matrix))


def times_of(run: Callable[[], None], count: int) -> list[float]:
    """Seconds of `count` runs, after one to warm up."""
    run()
    took = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        took.append(time.perf_counter() - started)
    return took


def seconds_of(run: Callable[[], None], count: int = _ROUNDS) -> float:
    """The median of `times_of`."""
    return median(times_of(run, count))


def token_bytes(model: Model, context: int = 0) -> int:
    """Bytes that decoding one token reads: each position's weights, the head, keys and values.

    `context` counts the tokens before it. Of the embedding it reads a row, which is left out.
    """
    config, norm = model.config, model.model.norm.weight
    weights = bytes_read(model) + norm.nbytes
    visible = context if config.sliding_window is None else min(context, config.sliding_window)
    return weights + config.kv_values_per_token() * norm.dtype.size * visible


def card(dtype: mx.Dtype) -> dict[str, Any]:
    """The measured figures and the published one, where the chip's is known."""
    chip = machine.chip()
    return {"chip": chip, "published": published(chip), "measured": measured(dtype)}
