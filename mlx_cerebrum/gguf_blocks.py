"""ggml's quantized blocks as MLX arrays, exactly: integers are moved, never requantized.

ggml stores a row as blocks of 32 elements, each its float16 scale d (and minimum m)
followed by its integers. MLX's affine format at group size 32 holds the same numbers in
three arrays: uint32 words with element i in bits `bits * (i % per_word)`, and per group
a scale and a bias, w = scale * q + bias.

    Q4_0   w = d (q - 8)    q in 0..15       scale d, bias -8 d
    Q4_1   w = d q + m      q in 0..15       scale d, bias m
    Q8_0   w = d q          q in -128..127   q + 128, scale d, bias -128 d
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.gguf_file import GGUFFile, TensorInfo, quote

GROUP_SIZE = 32
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}

_BLOCKS = {
    "Q4_0": np.dtype([("scale", "<f2"), ("quants", "u1", 16)]),
    "Q4_1": np.dtype([("scale", "<f2"), ("bias", "<f2"), ("quants", "u1", 16)]),
    "Q8_0": np.dtype([("scale", "<f2"), ("quants", "u1", 32)]),
}
_CHUNK_BLOCKS = 16384  # about 0.5 MB: the temporaries stay in the processor's cache
_MAX_HALF = 65504.0  # the largest finite float16


def read_arrays(
    file: GGUFFile, tensor: TensorInfo, rotary_heads: int | None = None
) -> dict[str, mx.array]:
    """Read one tensor: `{"weight"}`, or `{"weight", "scales", "biases"}` if it is quantized.

    `weight` is [*, in] in the stored float type, or uint32 [out, in * bits / 32]; `scales`
    and `biases` are float16 [out, in / 32], or float32 where a bias is too large for
    float16. `rotary_heads` undoes llama.cpp's row order of a q or k projection with that
    many heads. Raises CheckpointError if the data is damaged.
    """
    if tensor.ggml_type in FLOATS:
        arrays = {"weight": _floats(file, tensor)}
    else:
        arrays = dict(zip(("weight", "scales", "biases"), _affine(file, tensor), strict=True))
    if rotary_heads is not None:
        arrays = {name: half_split(array, rotary_heads) for name, array in arrays.items()}
    bfloat16 = tensor.ggml_type == "BF16"  # numpy has no such type: its bits came as uint16
    return {
        name: mx.array(array).view(mx.bfloat16) if bfloat16 else mx.array(array)
        for name, array in arrays.items()
    }


def half_split(rows: npt.NDArray[np.generic], heads: int) -> npt.NDArray[np.generic]:
    """Each head's rows from llama.cpp's order (pairs that rotate together are neighbours)
    to Hugging Face's (first elements of all pairs, then the second ones)."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _floats(file: GGUFFile, tensor: TensorInfo) -> npt.NDArray[np.generic]:
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.ggml_type]
    return file.read(tensor).view(kind).reshape(tensor.shape)


def _affine(
    file: GGUFFile, tensor: TensorInfo
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Packed integers, scales and biases of a quantized matrix."""
    kind = tensor.ggml_type
    out, width = tensor.shape
    groups = out * width // GROUP_SIZE
    weight = np.empty((groups, GROUP_SIZE * BITS[kind] // 8), np.uint8)
    scales = np.empty(groups, np.float16)
    biases = np.empty(groups, np.float16)
    start = 0
    for chunk in file.blocks(tensor, _CHUNK_BLOCKS):
        block = chunk.reshape(-1).view(_BLOCKS[kind])
        part = slice(start, start + len(block))
        weight[part] = block["quants"] ^ 0x80 if kind == "Q8_0" else _nibbles(block["quants"])
        scales[part] = block["scale"]
        if kind == "Q4_1":
            biases[part] = block["bias"]
        start = part.stop
    largest = max(_largest(scales), _largest(biases) if kind == "Q4_1" else 0.0)
    if not np.isfinite(largest):
        raise CheckpointError(
            f"{file.path}: tensor {quote(tensor.name)} has a scale that is not a finite number: "
            "damaged, fetch it again"
        )
    if kind != "Q4_1":
        zero = 1 << (BITS[kind] - 1)
        if largest * zero > _MAX_HALF:
            scales = scales.astype(np.float32)
        # A power of two times a float16: exact.
        biases = scales * scales.dtype.type(-zero)
    shape = (out, width // GROUP_SIZE)
    return weight.view("<u4").reshape(out, -1), scales.reshape(shape), biases.reshape(shape)


def _nibbles(quants: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Reorder 4-bit integers, [n, 16] bytes: ggml's byte k holds elements k (low) and
    k + 16 (high); MLX's holds 2k and 2k + 1. Works on the two bytes of a uint16 at once.
    """
    pairs = np.ascontiguousarray(quants).view("<u2")
    shifted = pairs >> 4
    packed = np.empty((len(quants), 2, 8), np.uint8)
    packed[:, 0] = (pairs & 0x0F) | (shifted & 0xF0)
    packed[:, 1] = (shifted & 0x0F) | ((pairs >> 8) & 0xF0)
    return packed.reshape(-1, 16)


def _largest(values: npt.NDArray[np.float16]) -> float:
    """The largest magnitude; infinities and NaN count as larger than any number, as they
    do in the bit patterns compared here (much faster than float16 arithmetic)."""
    bits = values.view(np.uint16) & 0x7FFF
    return float(bits.max().view(np.float16))
