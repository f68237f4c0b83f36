"""From a checkpoint to a model that runs: cast, packed and fused, a block at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import device
from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import available_bytes
from mlx_cerebrum.model.tensors import EMBEDDING, FINAL_NORM, HEAD, PARTS, matrix_shapes
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint
from mlx_cerebrum.weights.quantize import FUSED, PIECE, Packing, fuse_projections, matrix_bytes
from mlx_cerebrum.weights.safetensors_file import ITEM_BYTES

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in FLOATS.values()}

_PIECE = 32 * PIECE  # bytes at most: a piece in float32, and up to 7 more while it is unpacked

SMALLER = "try --q-bits 4, or a smaller model"

Progress = Callable[[int, int], None]  # bytes ready, bytes in all


@dataclass(frozen=True)
class Storage:
    """How a checkpoint's weights will be held in memory, decided before any is read."""

    dtype: mx.Dtype  # of activations, dense weights and scales
    packings: dict[str, Packing | None]  # module path -> how it is packed after reading
    dequantize: bool  # packed weights become dense
    nbytes: int  # of all matrices, once loaded
    transient: int  # more than that while loading, at most: what makes a matrix what it is held as


def choose_storage(checkpoint: Checkpoint, requested: Packing | None, dtype: str) -> Storage:
    """The dtype policy. `auto` is the checkpoint's own dtype on a GPU.

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
        raise ConfigError(f"no matrix of {checkpoint.path} divides into {requested}")

    stored = DTYPES[FLOATS[checkpoint.weight_dtype]]

    def storage(dtype: mx.Dtype, dequantize: bool = False) -> Storage:
        held = {module: None if dequantize else packing for module, packing in packings.items()}
        size = most = 0
        for sources in _load_order(checkpoint.config):
            before = size
            for source in sources:
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
    if device.on_gpu():
        return storage(stored)
    dense = storage(mx.float32, dequantize=True)
    if requested is None and dense.nbytes < 0.8 * available_bytes():
        return dense
    return storage(mx.float32 if any(packings.values()) else stored)


def _load_order(config: ModelConfig) -> list[list[str]]:
    """The matrices in the order they are read: what is stacked into one, or may be, together.

    The large tables first, while little else is held; of each block the largest first, so that
    the last ones are small.
    """
    shapes = matrix_shapes(config)
    stacked = {name: fused for fused, names in FUSED.items() for name in names}
    blocks: dict[str, dict[str, list[str]]] = {}
    for module in shapes:
        parent, _, name = module.rpartition(".")
        part = ".".join(module.split(".")[:3])
        target = f"{parent}.{stacked.get(name, name)}"
        blocks.setdefault(part, {}).setdefault(target, []).append(module)
    tables = [part for part in (HEAD, EMBEDDING) if part in blocks]
    order = [blocks.pop(part) for part in tables] + list(blocks.values())
    return [
        sources
        for targets in order
        for sources in sorted(targets.values(), key=lambda s: -_weights(shapes, s))
    ]


def _weights(shapes: Mapping[str, tuple[int, int]], modules: Iterable[str]) -> int:
    return sum(prod(shapes[module]) for module in modules if module in shapes)


def _working_bytes(
    checkpoint: Checkpoint, module: str, shape: tuple[int, int], held: Packing | None
) -> int:
    """Bytes that making a matrix what is held takes besides: as it is read, and on the way."""
    own = checkpoint.packing(module)
    wide = 4 * prod(shape)
    piece = min(8 * wide, _PIECE)
    if module in checkpoint.repacked:
        return piece
    names = (f"{module}.{part}" for part in PARTS)
    found = [name for name in names if name in checkpoint.shapes]
    read = sum(prod(checkpoint.shapes[n]) * ITEM_BYTES[checkpoint.dtypes[n]] for n in found)
    if own == held or device.on_gpu():
        return read
    return read + (piece if held is None else wide)  # the CPU widens what it packs


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


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, storage: Storage, progress: Progress | None = None
) -> Model:
    """Read, fuse, cast and pack the weights of `config`'s stored blocks, a matrix at a time.

    Peak memory is the model's plus `storage.transient`.
    """
    held = {} if storage.dequantize else storage.packings
    model = Model(config)
    # Nothing of this is computed: the modules only take their final form, to be filled below.
    nn.quantize(
        model, class_predicate=lambda path, _: p.as_config() if (p := held.get(path)) else False
    )
    for block in model.model.layers:
        fuse_projections(block)
    shapes = matrix_shapes(config)
    ready = 0
    for part, prefix in _parts(model):
        targets = _sources(part, prefix)
        for target, sources in sorted(targets.items(), key=lambda t: -_weights(shapes, t[1])):
            arrays = _arrays(checkpoint, sources, storage)
            mx.eval(arrays)
            model.load_weights([(f"{target}.{n}", a) for n, a in arrays.items()], strict=False)
            del arrays
            matrices = [source for source in sources if source in shapes]
            ready += sum(matrix_bytes(shapes[m], held.get(m), storage.dtype.size) for m in matrices)
        mx.clear_cache()
        if progress is not None:
            progress(ready, storage.nbytes)
    return model


def _parts(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """What is reported together, with its path, in `_load_order`: each block and other module."""
    if not model.config.tie_word_embeddings:
        yield model.lm_head, HEAD
    yield model.model.embed_tokens, EMBEDDING
    for i, block in enumerate(model.model.layers):
        yield block, f"model.layers.{i}"
    yield model.model.norm, FINAL_NORM


def _sources(part: nn.Module, prefix: str) -> dict[str, list[str]]:
    """Every module with weights under `part` -> the checkpoint's modules it is stacked from."""
    found = {}
    for path, module in part.named_modules():
        if "weight" in module:
            name = f"{prefix}.{path}" if path else prefix
            parent, _, last = name.rpartition(".")
            found[name] = [f"{parent}.{source}" for source in FUSED.get(last, ())] or [name]
    return found


def _arrays(checkpoint: Checkpoint, sources: list[str], storage: Storage) -> dict[str, mx.array]:
    """One module's arrays as they will be held; packing, unpacking and casts go row by row, so
    what is stacked is made so apart."""
    each = [_held(checkpoint, source, storage) for source in sources]
    return {part: mx.concatenate([arrays[part] for arrays in each]) for part in each[0]}


def _held(checkpoint: Checkpoint, source: str, storage: Storage) -> dict[str, mx.array]:
    packing = storage.packings.get(source)
    if packing is None:
        arrays = checkpoint.read(source)
    elif storage.dequantize:
        if source in checkpoint.repacked:  # exactly
            arrays = {"weight": checkpoint.dense(source)}
        else:
            arrays = {"weight": packing.dequantize(checkpoint.read(source), storage.dtype)}
    elif packing == checkpoint.packing(source):
        arrays = checkpoint.read(source)
    else:
        arrays = checkpoint.repack(source, packing)
    floats = DTYPES.values()
    held = {n: a.astype(storage.dtype) if a.dtype in floats else a for n, a in arrays.items()}
    mx.eval(held)
    if storage.dtype == mx.float16 and "scales" in held and arrays["scales"].dtype == mx.float32:
        for part in ("scales", "biases"):
            if not mx.all(mx.isfinite(held[part])):
                raise CheckpointError(
                    f"{checkpoint.path}: {source} has {part} too large for float16;"
                    " try --dtype bfloat16 or float32"
                )
    return held
