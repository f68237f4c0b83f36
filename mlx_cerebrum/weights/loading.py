"""From a checkpoint to a model that runs: cast, packed and fused, a block at a time."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.forward import Model, TransformerBlock
from mlx_cerebrum.model.tensors import FUSED, PARTS, matrix_shapes
from mlx_cerebrum.text import tell
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.quantize import matrix_bytes
from mlx_cerebrum.weights.storage import DTYPES, Storage, dtype_name, reading_order

Progress = Callable[[int, int], None]  # bytes ready, bytes in all


class TooLargeError(CheckpointError):
    """A stored value is too large for float16; `what` says of which tensor, without a path."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(f"{path}: {what}; try --dtype bfloat16 or float32")
        self.what = what


def load_model(
    checkpoint: Checkpoint, config: ModelConfig, storage: Storage, progress: Progress | None = None
) -> Model:
    """Read, fuse, cast and pack the weights of `config`'s stored blocks, a matrix at a time.

    Peak memory is the model's plus `storage.transient`.
    """
    pieces = load_in_pieces(checkpoint, config, storage)
    while True:
        try:
            ready = next(pieces)
        except StopIteration as whole:
            model: Model = whole.value
            return model
        if progress is not None:
            progress(ready, storage.nbytes)


def load_in_pieces(
    checkpoint: Checkpoint, config: ModelConfig, storage: Storage
) -> Generator[int, None, Model]:
    """As `load_model`, for who has other work between two matrices: yields the bytes that are
    ready, returns the model. Where `storage.otherwise` is needed, it begins again."""
    try:
        return (yield from _pieces(checkpoint, config, storage))
    except TooLargeError as error:
        if storage.otherwise is None:
            raise
        kept = replace(storage, dtype=storage.otherwise, otherwise=None)
        tell(f"note: {error.what}; loading in {dtype_name(kept.dtype)} instead")
    mx.clear_cache()  # nothing holds the first attempt's matrices any more
    return (yield from _pieces(checkpoint, config, kept))


def _pieces(
    checkpoint: Checkpoint, config: ModelConfig, storage: Storage
) -> Generator[int, None, Model]:
    held = {} if storage.dequantize else storage.packings
    model = Model(config)
    # Nothing is computed here: the modules only take their final form, to be filled below.
    nn.quantize(
        model, class_predicate=lambda path, _: p.as_config() if (p := held.get(path)) else False
    )
    for block in model.model.layers:
        fuse_projections(block)
    paths = {path for path, module in model.named_modules() if "weight" in module}
    shapes = matrix_shapes(config)
    ready = 0
    for part in reading_order(config):
        for stacked, sources in part.items():
            groups = {stacked: sources} if stacked in paths else {name: [name] for name in sources}
            for path, names in groups.items():
                arrays = _arrays(checkpoint, names, storage)
                mx.eval(arrays)
                model.load_weights([(f"{path}.{n}", a) for n, a in arrays.items()], strict=False)
                del arrays
            matrices = [source for source in sources if source in shapes]
            ready += sum(matrix_bytes(shapes[m], held.get(m), storage.dtype.size) for m in matrices)
            yield ready
        mx.clear_cache()
    return model


def _arrays(checkpoint: Checkpoint, sources: list[str], storage: Storage) -> dict[str, mx.array]:
    """One module's arrays as they will be held. Packing, unpacking and casts go row by row, so
    matrices that are stacked go through them one by one."""
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
    if storage.dtype == mx.float16:
        for part, stored in arrays.items():
            if stored.dtype in (mx.float32, mx.bfloat16) and _overflowed(stored, held[part]):
                what = "values" if part == "weight" else part
                raise TooLargeError(checkpoint.path, f"{source} has {what} too large for float16")
    return held


def _overflowed(stored: mx.array, held: mx.array) -> bool:
    """Whether a number became infinite. What was stored as none stays so, in any dtype."""
    if mx.isfinite(mx.stack([held.min(), held.max()])).all():  # makes no array of their size
        return False
    return bool(mx.any(mx.isfinite(stored) & ~mx.isfinite(held)))


def fuse_projections(block: TransformerBlock) -> None:
    """Join a block's q/k/v and its gate/up into one matrix each, where they are packed alike.

    One large matmul instead of three (two) small ones: fewer kernels to launch a token.
    """
    for parent, fused in ((block.self_attn, "qkv_proj"), (block.mlp, "gate_up_proj")):
        _fuse(parent, FUSED[fused], fused)


def _fuse(parent: nn.Module, names: tuple[str, ...], fused: str) -> None:
    parts = [getattr(parent, name) for name in names]
    if len({_layout(part) for part in parts}) > 1:
        return
    joined = parts[0]
    for name in PARTS:
        if name in joined:
            joined[name] = mx.concatenate([part[name] for part in parts], axis=0)
    for name in names:
        delattr(parent, name)
    setattr(parent, fused, joined)


def _layout(linear: nn.Module) -> tuple[Any, ...]:
    """What must agree for two matrices to be stacked."""
    packing = tuple(getattr(linear, name, None) for name in ("bits", "group_size", "mode"))
    return (*packing, linear.weight.dtype, linear.weight.shape[-1])
