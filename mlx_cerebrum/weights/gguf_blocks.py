"""ggml's quantized blocks as MLX arrays: where MLX has a like format, the integers are moved.

ggml stores a row as blocks: of 32 elements with a float16 scale d (and minimum m), or of 256
in 8 groups of 32, whose scales are 6-bit integers s (and minima t) times the block's d (and e).
MLX's affine format at group size 32 holds the same integers in one stream of bits, lowest
first, and per group a scale and a bias, w = scale * q + bias.

    Q4_0   w = d (q - 8)    q in 0..15       scale d, bias -8 d
    Q4_1   w = d q + m      q in 0..15       scale d, bias m
    Q5_0   w = d (q - 16)   q in 0..31       scale d, bias -16 d
    Q5_1   w = d q + m      q in 0..31       scale d, bias m
    Q8_0   w = d q          q in -128..127   q + 128, scale d, bias -128 d
    Q4_K   w = d s q - e t  q in 0..15       scale d s, bias -e t
    Q5_K   w = d s q - e t  q in 0..31       scale d s, bias -e t

All of it is exact in float32. Products like d s have up to 17 significant bits: float32 scales.
Rounding those to float16 moves a weight by at most 2**-11 (|scale| q + |bias|), as long as they
are normal numbers there.

The other kinds have groups of 16, tables or codebooks. The gguf package dequantizes them, some
rows at a time, and MLX packs the rows anew, into 8 bits unless asked otherwise.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.installed import install_command
from mlx_cerebrum.model.tensors import PARTS
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.gguf_file import BLOCK_WEIGHTS, GGUFFile, GGUFTensor, quote
from mlx_cerebrum.weights.quantize import AFFINE_GROUPS, PIECE, Packing, joined

GROUP_SIZE = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
# Kinds whose scales are float32.
WIDE = ("Q4_K", "Q5_K")
# What the gguf package dequantizes.
# fmt: off
REPACKED = (
    "Q2_K", "Q3_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)
# fmt: on

_HALF, _BYTES = "<f2", "u1"
_BLOCKS = {
    "Q4_0": np.dtype([("d", _HALF), ("low", _BYTES, 16)]),
    "Q4_1": np.dtype([("d", _HALF), ("m", _HALF), ("low", _BYTES, 16)]),
    "Q5_0": np.dtype([("d", _HALF), ("high", _BYTES, 4), ("low", _BYTES, 16)]),
    "Q5_1": np.dtype([("d", _HALF), ("m", _HALF), ("high", _BYTES, 4), ("low", _BYTES, 16)]),
    "Q8_0": np.dtype([("d", _HALF), ("low", _BYTES, 32)]),
    "Q4_K": np.dtype([("d", _HALF), ("m", _HALF), ("scales", _BYTES, 12), ("low", _BYTES, 128)]),
    "Q5_K": np.dtype(
        [
            *(("d", _HALF), ("m", _HALF), ("scales", _BYTES, 12)),
            *(("high", _BYTES, 32), ("low", _BYTES, 128)),
        ]
    ),
}
_CHUNK_BLOCKS = 16384  # of 32 weights, 0.5 MB: the temporaries stay in the processor's cache
_MAX_HALF = 65504.0  # the largest finite float16

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.generic]
Rows = TypeVar("Rows", npt.NDArray[np.generic], mx.array)


def stored_packing(tensor: GGUFTensor) -> Packing | None:
    """How `read_arrays` packs a matrix of this type: None for floats.

    A repacked one's group is the widest that divides its rows: 8.25 bits a weight.
    """
    if tensor.ggml_type in BITS:
        return Packing(BITS[tensor.ggml_type], GROUP_SIZE)
    if tensor.ggml_type in REPACKED:
        groups = [size for size in AFFINE_GROUPS if tensor.shape[-1] % size == 0]
        return Packing(8, max(groups))
    return None


def read_arrays(
    file: GGUFFile,
    tensor: GGUFTensor,
    rotary_heads: int | None = None,
    packing: Packing | None = None,
) -> dict[str, mx.array]:
    """Read one tensor: `{"weight"}`, or `{"weight", "scales", "biases"}` if it is quantized.

    `weight` is [*, in] in the stored float type, or uint32 [out, in * bits / 32]; `scales`
    and `biases` are float16 [out, in / group], or float32 where float16 would round or is too
    small. `packing` replaces `stored_packing` for a kind that is repacked. `rotary_heads` undoes
    llama.cpp's row order of a q or k projection with that many heads. Raises CheckpointError if
    the data is damaged, or the gguf package is needed and not there.
    """
    if tensor.ggml_type in REPACKED:
        packed = _repacked(file, tensor, packing or stored_packing(tensor))
        return {name: half_split(array, rotary_heads) for name, array in packed.items()}
    if tensor.ggml_type in FLOATS:
        arrays = {"weight": _floats(file, tensor)}
    else:
        arrays = dict(zip(PARTS, _affine(file, tensor), strict=True))
    arrays = {name: half_split(array, rotary_heads) for name, array in arrays.items()}
    bfloat16 = tensor.ggml_type == "BF16"  # numpy has no such type: its bits came as uint16
    return {
        name: mx.array(array).view(mx.bfloat16) if bfloat16 else mx.array(array)
        for name, array in arrays.items()
    }


def read_dense(file: GGUFFile, tensor: GGUFTensor, rotary_heads: int | None = None) -> mx.array:
    """What a repacked kind's blocks mean: float32 [out, in]. Raises as `read_arrays`."""
    rows = joined(tensor.shape, (mx.array(rows) for rows in _dequantized(file, tensor)))
    return half_split(rows, rotary_heads)


def half_split(rows: Rows, heads: int | None) -> Rows:
    """Each head's rows from llama.cpp's order (pairs that rotate together are neighbours)
    to Hugging Face's (first elements of all pairs, then the second ones); without heads as is."""
    if heads is None:
        return rows
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _floats(file: GGUFFile, tensor: GGUFTensor) -> npt.NDArray[np.generic]:
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.ggml_type]
    return file.read(tensor).view(kind).reshape(tensor.shape)


def _affine(file: GGUFFile, tensor: GGUFTensor) -> tuple[Scales, Scales, Scales]:
    """Packed integers, scales and biases of a matrix whose integers are moved."""
    kind = tensor.ggml_type
    out, width = tensor.shape
    groups = out * width // GROUP_SIZE
    layout, integers = _BLOCKS[kind], _INTEGERS[kind]
    symmetric = "m" not in (layout.names or ())
    held: npt.DTypeLike = np.float32 if kind in WIDE else np.float16
    weight = np.empty((groups, GROUP_SIZE * BITS[kind] // 8), np.uint8)
    scales, biases = np.empty(groups, held), np.empty(groups, held)
    start = 0
    for chunk in file.blocks(tensor, max(1, _CHUNK_BLOCKS * 32 // BLOCK_WEIGHTS[kind])):
        block = chunk.reshape(-1).view(layout)
        packed = integers(block).reshape(-1, weight.shape[1])
        part = slice(start, start + len(packed))
        weight[part] = packed
        if kind in WIDE:
            scales[part], biases[part] = _super_scales(block)
        else:
            scales[part] = block["d"]
            if not symmetric:
                biases[part] = block["m"]
        start = part.stop
    largest = _largest(scales)
    _check_finite(file, tensor, largest)
    if not symmetric:
        _check_finite(file, tensor, _largest(biases))
    else:
        zero = 1 << (BITS[kind] - 1)
        if largest * zero > _MAX_HALF:
            scales = scales.astype(np.float32)
        # A power of two times a float16: exact.
        biases = scales * scales.dtype.type(-zero)
    shape = (out, width // GROUP_SIZE)
    return weight.view("<u4").reshape(out, -1), scales.reshape(shape), biases.reshape(shape)


def _nibbles(low: Bytes) -> Bytes:
    """Reorder 4-bit integers: ggml's byte k of m holds elements k (low) and m + k (high); MLX's
    holds 2k and 2k + 1. [n, m] -> [n, 2, m / 2]. Works on the two bytes of a uint16 at once.
    """
    pairs = np.ascontiguousarray(low).view("<u2")
    shifted = pairs >> 4
    packed = np.empty((len(pairs), 2, pairs.shape[1]), np.uint8)
    packed[:, 0] = (pairs & 0x0F) | (shifted & 0xF0)
    packed[:, 1] = (shifted & 0x0F) | ((pairs >> 8) & 0xF0)
    return packed


def _fives(integers: Bytes) -> Bytes:
    """5-bit integers, one a byte, as a stream of bits: [n, 8] -> [n, 5].

    Eight at once in a uint64: neighbours are pushed together, then pairs, then fours.
    """
    x = np.ascontiguousarray(integers).view("<u8").reshape(-1)
    x = (x & 0x001F001F001F001F) | ((x & 0x1F001F001F001F00) >> 3)
    x = (x & 0x000003FF000003FF) | ((x & 0x03FF000003FF0000) >> 6)
    x = (x & 0x00000000000FFFFF) | ((x & 0x000FFFFF00000000) >> 12)
    return np.ascontiguousarray(x.view(np.uint8).reshape(-1, 8)[:, :5])


def _fives_of_32(block: npt.NDArray[np.void]) -> Bytes:
    """Q5_0's and Q5_1's: the fifth bits of elements 0 to 31 lie in order."""
    fifth = np.unpackbits(block["high"], axis=1, bitorder="little") << np.uint8(4)
    low = block["low"]
    fifth[:, :16] |= low & 0x0F
    fifth[:, 16:] |= low >> 4
    return _fives(fifth.reshape(-1, 8))


def _fives_of_256(block: npt.NDArray[np.void]) -> Bytes:
    """Q5_K's: bit g of byte k is the fifth bit of group g's element k."""
    low, high = block["low"].reshape(-1, 4, 32), block["high"]
    integers = np.empty((len(low), 8, 32), np.uint8)
    integers[:, 0::2] = low & 0x0F
    integers[:, 1::2] = low >> 4
    for group in range(8):
        shift = group - 4
        integers[:, group] |= (high >> shift if shift > 0 else high << -shift) & 0x10
    return _fives(integers.reshape(-1, 8))


_INTEGERS: dict[str, Callable[[npt.NDArray[np.void]], Bytes]] = {
    "Q4_0": lambda block: _nibbles(block["low"]),
    "Q4_1": lambda block: _nibbles(block["low"]),
    "Q5_0": _fives_of_32,
    "Q5_1": _fives_of_32,
    "Q8_0": lambda block: block["low"] ^ np.uint8(0x80),
    "Q4_K": lambda block: _nibbles(block["low"].reshape(-1, 32)),
    "Q5_K": _fives_of_256,
}


def _super_scales(
    block: npt.NDArray[np.void],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Scales and biases of the 8 groups of each block, flat.

    Of its 12 bytes the first 4 hold the first four scales, the next 4 the first four minima, in
    6 bits; the last 4 the low halves of the other scales and minima, whose high two bits are
    those left over in the first 8 bytes.
    """
    first, second, rest = np.moveaxis(block["scales"].reshape(-1, 3, 4), 1, 0)
    scales = np.hstack([first & 0x3F, (rest & 0x0F) | ((first >> 2) & 0x30)])
    minima = np.hstack([second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)])
    with np.errstate(invalid="ignore"):  # infinity times zero: refused later
        wide = block["d"].astype(np.float32)[:, None] * scales
        offset = block["m"].astype(np.float32)[:, None] * minima
    return wide.reshape(-1), -offset.reshape(-1)


def _repacked(file: GGUFFile, tensor: GGUFTensor, packing: Packing | None) -> dict[str, mx.array]:
    """A matrix dequantized and packed again, some rows at a time; scales in float16."""
    assert packing is not None
    shapes = packing.shapes(*tensor.shape)
    whole: dict[str, mx.array] = {}
    start = 0
    for rows in _dequantized(file, tensor):
        for part, array in packing.quantize(mx.array(rows)).items():
            piece = array.astype(mx.float16) if array.dtype == mx.float32 else array
            if part not in whole:
                whole[part] = mx.zeros(shapes[part], piece.dtype)
            whole[part][start : start + len(rows)] = piece
        mx.eval(whole)  # in place
        start += len(rows)
    return whole


def _dequantized(file: GGUFFile, tensor: GGUFTensor) -> Iterator[npt.NDArray[np.float32]]:
    """The rows that blocks of a repacked kind mean, in float32, some at a time."""
    try:
        import gguf  # 0.2 s, for these kinds only
    except ImportError:
        raise CheckpointError(
            f"{file.path}: tensor {quote(tensor.name)} is stored as {tensor.ggml_type}, which takes"
            f" the gguf package to read: {install_command(None, 'gguf')}"
        ) from None
    kind = gguf.GGMLQuantizationType[tensor.ggml_type]
    width = tensor.shape[-1]
    blocks = width // BLOCK_WEIGHTS[tensor.ggml_type]  # of a row
    for piece in file.blocks(tensor, max(1, PIECE // width) * blocks):
        with np.errstate(all="ignore"):  # damaged scales: refused below
            rows = gguf.quants.dequantize(piece.reshape(len(piece) // blocks, -1), kind)
        _check_finite(file, tensor, float(np.abs(rows).max()))
        yield rows


def _check_finite(file: GGUFFile, tensor: GGUFTensor, largest: float) -> None:
    if not np.isfinite(largest):
        raise CheckpointError(
            f"{file.path}: tensor {quote(tensor.name)} has a scale that is not a finite number: "
            "damaged, fetch it again"
        )


def _largest(values: npt.NDArray[np.generic]) -> float:
    """The largest magnitude; infinities and NaN count as larger than any number, as they
    do in the bit patterns compared here (much faster than float16 arithmetic)."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    bits = values.view(unsigned) & (np.iinfo(unsigned).max >> 1)
    return float(bits.max().view(values.dtype))
