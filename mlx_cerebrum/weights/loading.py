"""From a checkpoint to a model that runs: planned, cast, packed and fused, a block at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.model.config import MOST, ModelConfig
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import available_bytes, on_gpu, require
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.plan.layer_plan import resolve as resolve_plan
from mlx_cerebrum.text import tell
from mlx_cerebrum.tokenizer.chat_formats import BUILT_IN, ChatFormat, read_format
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights import hub
from mlx_cerebrum.weights.checkpoint import FLOATS, Checkpoint, matrix_shapes, open_checkpoint
from mlx_cerebrum.weights.quantize import FUSED, PIECE, Packing, fuse_projections
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


def load(
    path_or_repo: str | Path,
    plan: str | LayerPlan | None = None,
    q_bits: int | None = None,
    dtype: str = "auto",
    *,
    q_group_size: int = 64,
    window: int | None = None,
    revision: str | None = None,
    template: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a directory, a `.gguf` file, a hub id, or `"demo"`.

    `plan` (a LayerPlan, a named plan or a YAML file) lays the blocks out anew; without it the
    checkpoint's own order stands. `q_bits` packs a dense checkpoint on the way in. `dtype`
    is "auto" or float32, float16, bfloat16. `window` overrides the sliding window (tokens; 0
    for none). `template` is how conversations are written: a name of `chat_formats.BUILT_IN` or a
    Jinja file; without it the checkpoint's own, Cerebrum's for a Cerebrum that has none, else
    what `tokenizer.format.assumed` says. Raises a CerebrumError, one line, for whatever can't be
    honoured.
    """
    chosen = None if template is None else read_format(template)
    checkpoint = open_checkpoint(hub.resolve(path_or_repo, revision))
    tokenizer = load_tokenizer(checkpoint, chosen)
    packing = None if q_bits is None else Packing(q_bits, q_group_size)
    config = planned_config(checkpoint.config, plan, window)
    storage = choose_storage(checkpoint, packing, dtype)
    require(
        storage.nbytes + storage.transient,
        f"loading {checkpoint.path.name}",
        "take a smaller model",
        [(flag, s.nbytes + s.transient) for flag, s in smaller_weights(checkpoint, packing, dtype)],
    )
    return load_model(checkpoint, config, storage, progress), tokenizer


def load_tokenizer(checkpoint: Checkpoint, chosen: ChatFormat | None = None) -> Tokenizer:
    """The checkpoint's tokenizer, writing conversations as `chosen`, by default as `load` has it.

    Raises ConfigError if it is of another model. Added tokens past the model's last row, such as
    a padding that nobody writes, are named on stderr; a prompt that has one is refused.
    """
    tokenizer = checkpoint.tokenizer()
    rows = checkpoint.config.vocab_size
    beyond = tokenizer.vocab_size - rows
    if beyond > 0 and not tokenizer.only_added(rows):
        raise ConfigError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}"
        )
    if beyond > 0:
        tell(
            f"note: the tokenizer's added tokens from {rows} on ({beyond} of them) are past the "
            f"model's {rows} rows; a prompt that has one will be refused"
        )
    if chosen is not None:
        tokenizer.use_format(chosen)
    elif tokenizer.chat_template is None and any(
        "cerebrum" in n.lower() for n in checkpoint.names()
    ):
        tokenizer.use_format(BUILT_IN["cerebrum"])
    return tokenizer


def planned_config(
    config: ModelConfig, plan: str | LayerPlan | None, window: int | None
) -> ModelConfig:
    """The checkpoint's config with a plan's layer map and a window override applied.

    A plan always names stored blocks: it replaces the map and scales a folded source has.
    """
    if plan is not None:
        plan = resolve_plan(plan) if isinstance(plan, str) else plan
        blocks = config.num_hidden_layers
        config = config.with_map(plan.layer_map(blocks), plan.residual_scales(blocks))
    if window is not None:
        if window < 0:
            raise ConfigError(f"window {window} is negative; use 0 for full attention")
        config = replace(config, sliding_window=min(window, MOST) or None)
    return config


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
    if on_gpu():
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
    tables = [part for part in ("lm_head", "model.embed_tokens") if part in blocks]
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
    names = (f"{module}.{part}" for part in ("weight", "scales", "biases"))
    found = [name for name in names if name in checkpoint.shapes]
    read = sum(prod(checkpoint.shapes[n]) * ITEM_BYTES[checkpoint.dtypes[n]] for n in found)
    if own == held or on_gpu():
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
        yield model.lm_head, "lm_head"
    yield model.model.embed_tokens, "model.embed_tokens"
    for i, block in enumerate(model.model.layers):
        yield block, f"model.layers.{i}"
    yield model.model.norm, "model.norm"


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


def matrix_bytes(shape: tuple[int, int], packing: Packing | None, item_bytes: int) -> int:
    """Bytes of a matrix as it will be held; `item_bytes` of a dense weight, a scale, a bias."""
    rows, columns = shape
    if packing is None or not packing.fits(columns):
        return rows * columns * item_bytes
    scale_bytes = item_bytes * 2 if packing.mode == "affine" else 1
    return rows * columns * packing.bits // 8 + rows * columns // packing.group_size * scale_bytes
