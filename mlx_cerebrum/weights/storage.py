"""How weights will be held in memory, and in which order they are read: decided before reading."""

import contextlib
from dataclasses import dataclass, replace
from math import prod

import mlx.core as mx

from mlx_cerebrum import device
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import available_bytes
from mlx_cerebrum.model.tensors import (
    EMBEDDING,
    FUSED,
    HEAD,
    matrix_shapes,
    module_shapes,
    place,
)
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.quantize import PIECE, Packing, matrix_bytes

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in FLOATS.values()}

_PIECE = 32 * PIECE  # bytes at most: a piece in float32, and up to 7 more while it is unpacked

SMALLER = "try --q-bits 4, or a smaller model"


def dtype_name(dtype: mx.Dtype) -> str:
    """As `--dtype` has it: bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


@dataclass(frozen=True)
class Storage:
    """How a checkpoint's weights will be held in memory, decided before any is read."""

    dtype: mx.Dtype  # of activations, dense weights and scales
    packings: dict[str, Packing | None]  # module path -> how it is packed after reading
    dequantize: bool  # packed weights become dense
    nbytes: int  # of all matrices, once loaded
    transient: int  # what loading takes besides, at most: matrices on their way
    otherwise: mx.Dtype | None = None  # instead of `dtype`, where a value is too large for that


def choose_storage(checkpoint: Checkpoint, requested: Packing | None, dtype: str) -> Storage:
    """The dtype policy. `auto` is the checkpoint's own dtype on a GPU; one that emulates bfloat16
    takes float16 for it, unless a value would overflow.

    The CPU backend has no fast 16-bit path and its quantized matmuls are slower than dense
    ones: float32 throughout where that fits in memory, else packed weights with float32
    activations, else 16 bits as stored. Bits asked for on the way in stay packed. Raises
    ConfigError for what can't be combined.
    """
    quantized = checkpoint.config.quantization is not None and not checkpoint.repacked
    if requested is not None and quantized:
        raise ConfigError(f"{checkpoint.path} is quantized already; drop --q-bits")
    shapes = matrix_shapes(checkpoint.config)
    packings: dict[str, Packing | None] = {}
    for module, (_, columns) in shapes.items():
        packings[module] = own = checkpoint.packing(module)
        changes = own is None or module in checkpoint.repacked
        if requested is not None and changes and requested.fits(columns):
            packings[module] = requested
    if requested is not None and not any(packings.values()):
        fits = requested.refit(columns for _, columns in shapes.values())
        raise ConfigError(f"no matrix of {checkpoint.path} divides into {requested}{fits}")

    order = reading_order(checkpoint.config)
    stored = DTYPES[FLOATS[checkpoint.weight_dtype]]

    def storage(dtype: mx.Dtype, dequantize: bool = False) -> Storage:
        held = {module: None if dequantize else packing for module, packing in packings.items()}
        size = most = 0
        for sources in (sources for part in order for sources in part.values()):
            before = size
            for source in (source for source in sources if source in shapes):
                nbytes = matrix_bytes(shapes[source], held[source], dtype.size)
                working = _working_bytes(checkpoint, source, shapes[source], held[source])
                most = max(most, size + nbytes + working)
                size += nbytes
            if len(sources) > 1:  # apart, and stacked
                most = max(most, 2 * size - before)
        return Storage(dtype, packings, dequantize, size, most - size)

    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not auto, {', '.join(DTYPES)}")
        return storage(DTYPES[dtype])
    if stored == mx.bfloat16 and device.emulates_bfloat16():
        return replace(storage(mx.float16), otherwise=stored)
    if device.on_gpu():
        return storage(stored)
    dense = storage(mx.float32, dequantize=True)
    if requested is None and dense.nbytes < 0.8 * available_bytes():
        return dense
    return storage(mx.float32 if any(packings.values()) else stored)


def reading_order(config: ModelConfig) -> list[dict[str, list[str]]]:
    """For each table, each block and the final norm: a stacked matrix -> the modules it is of.

    The large tables first, while little else is held; of each block the largest first, so that
    the last ones are small.
    """
    shapes = module_shapes(config)
    stacked = {name: fused for fused, names in FUSED.items() for name in names}
    parts: dict[str | int, dict[str, list[str]]] = {HEAD: {}, EMBEDDING: {}}
    for module in shapes:
        inside = place(module)
        parent, dot, name = module.rpartition(".")
        target = f"{parent}{dot}{stacked.get(name, name)}"
        part = parts.setdefault(module if inside is None else inside[0], {})
        part.setdefault(target, []).append(module)

    def size(group: tuple[str, list[str]]) -> int:
        return sum(prod(shapes[module]) for module in group[1])

    found = [sorted(part.items(), key=size, reverse=True) for part in parts.values()]
    return [dict(part) for part in found if part]


def _working_bytes(
    checkpoint: Checkpoint, module: str, shape: tuple[int, int], held: Packing | None
) -> int:
    """Bytes that reading and converting a matrix takes, besides what is then held."""
    own = checkpoint.packing(module)
    wide = 4 * prod(shape)
    piece = min(8 * wide, _PIECE)
    if module in checkpoint.repacked:
        return piece
    read = checkpoint.read_bytes(module)
    if own == held or device.on_gpu():
        return read
    if held is None:
        return read + piece
    # The CPU widens what it packs. Scales and biases come in float32, then as the matrix was.
    return read + wide + 2 * (4 + 2) * prod(shape) // held.group_size


def smaller_weights(
    checkpoint: Checkpoint, requested: Packing | None, dtype: str
) -> list[tuple[str, Storage]]:
    """The flags that would hold the weights in fewer bits, most bits first, and how they would."""
    if checkpoint.config.quantization is not None and not checkpoint.repacked:
        return []
    stored = 8 if checkpoint.repacked else 16
    given, group = (requested.bits, requested.group_size) if requested else (stored, 64)
    found = []
    for bits in (8, 4):
        if bits < given:
            with contextlib.suppress(ConfigError):  # rows that don't divide into groups
                storage = choose_storage(checkpoint, Packing(bits, group), dtype)
                found.append((f"--q-bits {bits}", storage))
    return found
