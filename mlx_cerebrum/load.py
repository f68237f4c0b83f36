"""From a checkpoint to a model that runs: planned, cast, packed and fused, a block at a time."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum import hub
from mlx_cerebrum.checkpoint import FLOATS, Checkpoint, matrix_shapes, open_checkpoint
from mlx_cerebrum.config import MOST, ModelConfig
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.memory import available_bytes, on_gpu, require
from mlx_cerebrum.model import Model
from mlx_cerebrum.plan import LayerPlan
from mlx_cerebrum.plan import resolve as resolve_plan
from mlx_cerebrum.quantize import FUSED, Packing, fuse_projections
from mlx_cerebrum.tokenizer import Tokenizer

DTYPES: dict[str, mx.Dtype] = {name: getattr(mx, name) for name in FLOATS.values()}

SMALLER = "try --q-bits 4, or a smaller model"

Progress = Callable[[int, int], None]  # bytes ready, bytes in all


@dataclass(frozen=True)
class Storage:
    """How a checkpoint's weights will be held in memory, decided before any is read."""

    dtype: mx.Dtype  # of activations, dense weights and scales
    packings: dict[str, Packing | None]  # module path -> how it is packed after reading
    dequantize: bool  # packed weights become dense
    nbytes: int  # of all matrices, once loaded
    transient: int  # more than that while loading, at most: the largest part as it is read


def load(
    path_or_repo: str | Path,
    plan: str | LayerPlan | None = None,
    q_bits: int | None = None,
    dtype: str = "auto",
    *,
    q_group_size: int = 64,
    window: int | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[Model, Tokenizer]:
    """A model and its tokenizer from a directory, a `.gguf` file, a hub id, or `"demo"`.

    `plan` (a LayerPlan, a named plan or a YAML file) lays the blocks out anew; without it the
    checkpoint's own order stands. `q_bits` packs a dense checkpoint on the way in. `dtype`
    is "auto" or float32, float16, bfloat16. `window` overrides the sliding window (tokens; 0
    for none). Raises a CerebrumError, one line, for whatever can't be honoured.
    """
    checkpoint = open_checkpoint(hub.resolve(path_or_repo, revision))
    tokenizer = load_tokenizer(checkpoint)
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


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer. Raises ConfigError if it has ids the model has no row for."""
    tokenizer = checkpoint.tokenizer()
    rows = checkpoint.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}"
        )
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
    if requested is not None and checkpoint.config.quantization is not None:
        raise ConfigError(f"{checkpoint.path} is quantized already; drop --q-bits")
    shapes = matrix_shapes(checkpoint.config)
    packings: dict[str, Packing | None] = {}
    for module, (_, columns) in shapes.items():
        fits = requested is not None and requested.fits(columns)
        packings[module] = checkpoint.packing(module) or (requested if fits else None)
    if requested is not None and not any(packings.values()):
        raise ConfigError(f"no matrix of {checkpoint.path} divides into {requested}")

    stored = DTYPES[FLOATS[checkpoint.weight_dtype]]

    def storage(dtype: mx.Dtype, dequantize: bool = False) -> Storage:
        held = {module: None if dequantize else packing for module, packing in packings.items()}
        size = sum(
            matrix_bytes(shape, held[module], dtype.size) for module, shape in shapes.items()
        )
        parts: Counter[str] = Counter()  # bytes as read, of each block and other module
        for module, shape in shapes.items():
            part = ".".join(module.split(".")[:3])
            parts[part] += matrix_bytes(shape, checkpoint.packing(module), stored.size)
        # And what the CPU packs it widens to float32, a matrix at a time.
        table = checkpoint.config.vocab_size * checkpoint.config.hidden_size
        widened = 4 * table if requested is not None and not on_gpu() else 0
        transient = max(parts.values()) + widened
        return Storage(dtype, packings, dequantize, size, transient)

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


def smaller_weights(
    checkpoint: Checkpoint, requested: Packing | None, dtype: str
) -> list[tuple[str, Storage]]:
    """The flags that would hold the weights in fewer bits, most bits first, and how they would."""
    if checkpoint.config.quantization is not None:
        return []
    given, group = (requested.bits, requested.group_size) if requested else (16, 64)
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
    """Read, fuse, cast and pack the weights of `config`'s stored blocks, a block at a time.

    Peak memory is the model's plus one block's.
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
        weights: list[tuple[str, mx.array]] = []
        for target, sources in _sources(part, prefix).items():
            arrays = _arrays(checkpoint, sources, storage)
            weights += [(f"{target}.{name}", array) for name, array in arrays.items()]
            matrices = [source for source in sources if source in shapes]
            ready += sum(matrix_bytes(shapes[m], held.get(m), storage.dtype.size) for m in matrices)
        model.load_weights(weights, strict=False)
        del arrays, weights
        mx.eval(part.parameters())
        if progress is not None:
            progress(ready, storage.nbytes)
    mx.clear_cache()
    return model


def _parts(model: Model) -> Iterator[tuple[nn.Module, str]]:
    """What is read and evaluated together, with its path: each block, and each other module."""
    if not model.config.tie_word_embeddings:
        yield model.lm_head, "lm_head"  # the large tables first, while little else is held
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
    """One module's arrays as they will be held; sources packed alike are stacked as stored."""
    if len({storage.packings.get(source) for source in sources}) > 1:  # dense by the time they meet
        each = [_arrays(checkpoint, [source], storage) for source in sources]
        return {"weight": mx.concatenate([arrays["weight"] for arrays in each])}
    read = [checkpoint.read(source) for source in sources]
    arrays = {part: mx.concatenate([r[part] for r in read]) for part in read[0]}
    packing = storage.packings.get(sources[0])
    if packing is not None and "scales" not in arrays:
        arrays = packing.quantize(arrays["weight"])
    if packing is not None and storage.dequantize:
        return {"weight": packing.dequantize(arrays, storage.dtype)}
    floats = DTYPES.values()
    return {part: a.astype(storage.dtype) if a.dtype in floats else a for part, a in arrays.items()}


def matrix_bytes(shape: tuple[int, int], packing: Packing | None, item_bytes: int) -> int:
    """Bytes of a matrix as it will be held; `item_bytes` of a dense weight, a scale, a bias."""
    rows, columns = shape
    if packing is None or not packing.fits(columns):
        return rows * columns * item_bytes
    scale_bytes = item_bytes * 2 if packing.mode == "affine" else 1
    return rows * columns * packing.bits // 8 + rows * columns // packing.group_size * scale_bytes
