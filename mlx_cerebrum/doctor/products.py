"""float32 products are float32's.

By default MLX computes products of several rows in TF32 where a GPU has it (M5, NVIDIA from Ampere
on): 10 bits of a number instead of 23 (MLX's utils.h, `enable_tf32`).
"""

import os

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.doctor.check import Found, Settings

MOST = 1e-6  # of the result, by Frobenius' norm; float32 makes about 2e-7, TF32 3e-4
_SIZE, _GROUP = 512, 64


def dense(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


def packed(x: mx.array, weight: mx.array, bits: int) -> tuple[mx.array, mx.array]:
    """By a weight in so many bits; and what these stand for."""
    whole, scales, biases = mx.quantize(weight, _GROUP, bits)
    made = mx.quantized_matmul(x, whole, scales, biases, True, _GROUP, bits)
    return made, mx.dequantize(whole, scales, biases, _GROUP, bits)


def products(settings: Settings) -> Found:
    """A product of 512 x 512 matrices, dense and packed, against the same in float64."""
    random = np.random.default_rng(0)
    x, weight = (random.standard_normal((_SIZE, _SIZE), dtype=np.float32) for _ in range(2))
    errors = {"dense": _error(dense(mx.array(x), mx.array(weight)), x, weight)}
    for bits in (8, 4):
        made, meant = packed(mx.array(x), mx.array(weight), bits)
        errors[f"{bits}-bit"] = _error(made, x, np.array(meant))
    words = ", ".join(f"{error:.1e} {kind}" for kind, error in errors.items())
    asked = os.environ.get("MLX_ENABLE_TF32")
    return Found(
        max(errors.values()) < MOST,
        f"{words}; MLX_ENABLE_TF32 is {asked or 'not set'}",
        data={"errors": errors, "MLX_ENABLE_TF32": asked},
    )


def _error(made: mx.array, x: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> float:
    meant = x.astype(np.float64) @ weight.astype(np.float64).T
    return float(np.linalg.norm(np.array(made, dtype=np.float64) - meant) / np.linalg.norm(meant))
