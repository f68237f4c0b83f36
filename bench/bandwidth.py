"""How many bytes a second memory delivers, here and elsewhere: the ceiling of decoding.

A decoded token reads every weight it runs once, so tokens per second can't exceed bandwidth
over bytes per token (the roofline's slanted side; Williams et al. 2009, doi
10.1145/1498765.1498785). The bandwidth is measured here as this machine's MLX reaches it, by a
copy and by a matrix-vector product, which is what decoding does; and looked up as the chip's
maker publishes it, which no program reaches. From the published ones follows what other machines
should make of a model.
"""

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from bench import machine
from bench.report import table
from bench.suite import Results
from mlx_cerebrum.decoding.policy import bytes_read
from mlx_cerebrum.model.config import ModelConfig
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
# What engines were published to reach of the roof with a 7B in 4 bits on Apple's GPUs, least and
# most. llama.cpp (its table of Llama-2-7B Q4_0 on Apple silicon): 45% on an M2 Ultra (94
# tokens/s), 84% on an M2 (21.9). mlx-lm (its benchmark table): 60% on an M2 Ultra (120.5). The
# larger the chip, the smaller the share.
KNOWN = (0.45, 0.84)
# bits a weight: bf16, and affine groups of 64 with 16-bit scale and bias
BITS = {"bf16": 16.0, "8-bit": 8.5, "4-bit": 4.5}
_CHIPS = tuple(chip for chip in PUBLISHED if chip.startswith("Apple"))
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


def times_of(make: Callable[[], mx.array]) -> list[float]:
    """Seconds that computing what `make` makes took, each time, after once to warm up."""
    took = []
    for _ in range(1 + _ROUNDS):
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


def projected(configs: dict[str, ModelConfig]) -> Results:
    """Of each model and precision: bytes a token, and the roof in tokens/s of each chip."""
    models: Results = {}
    for name, config in configs.items():
        for kind, bits in BITS.items():
            nbytes = int(parameters_read(config) * bits / 8)
            roofs = {chip: [gbs * GB / nbytes for gbs in PUBLISHED[chip]] for chip in _CHIPS}
            models[f"{name}, {kind}"] = {"bytes_per_token": nbytes, "roof": roofs}
    return {"known": list(KNOWN), "models": models}


def parameters_read(config: ModelConfig) -> int:
    """Parameters that decoding a token reads: every position's block, the last norm, the head."""
    # The embedding is a row, not a matrix, to a token; a tied one is read as the head.
    read = config.num_positions * config.block_parameters
    return read + config.vocab_size * config.hidden_size + config.hidden_size


def text(found: Results) -> list[str]:
    models, (least, most) = found["models"], found["known"]

    def cell(roof: float) -> str:
        paces = (f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in (roof, roof * least, roof * most))
        return "{} ({}-{})".format(*paces)

    rows = [
        [chip, "/".join(f"{gbs:g}" for gbs in PUBLISHED[chip])]
        + [cell(max(model["roof"][chip])) for model in models.values()]
        for chip in _CHIPS
    ]
    read = ", ".join(f"{name} {one['bytes_per_token'] / GB:.2f} GB" for name, one in models.items())
    return [
        "**A projection, not a measurement**: decode tokens/s at short context, the roof"
        " (published bandwidth / bytes read a token) and, in brackets,"
        f" {least:.0%} to {most:.0%} of it, as engines are known to reach,"
        " large chips less. Of two GPUs by one name the larger. Read a token:"
        f" {read}.",
        table(["chip", "GB/s", *models], rows),
    ]
