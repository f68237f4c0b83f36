"""A checkpoint and a plan as one GGUF file, which llama.cpp runs: unrolled, a layer a position.

Architecture "llama", as llama.cpp's own converter writes Mistral: its tensor names, the rows
of q and k in its order (pairs that rotate together side by side), norms in float32. Values
are computed in float32 (exact for any source), scaled, and rounded once to the kind asked
for, which takes the place of the plan's dtype.

Never more than one source tensor is in memory, and a slice of it in float32. A block that runs
again unchanged is copied from the file being written.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from convert.destination import check_free, require_space
from convert.gguf_vocabulary import tokenizer_metadata
from convert.layout import tensor_scale, unrolled_config
from convert.source import check_stamps, stamps
from mlx_cerebrum.errors import CheckpointError, ConfigError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.installed import install_command
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import (
    BLOCK,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    module_path,
    module_shapes,
)
from mlx_cerebrum.plan.layer_plan import LayerPlan
from mlx_cerebrum.tokenizer.vocabulary import first_line
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_checkpoint import gguf_name, rotary_heads
from mlx_cerebrum.weights.gguf_file import GGML_TYPES
from mlx_cerebrum.weights.opening import open_checkpoint

# What weights can be stored as, with llama.cpp's name for a file of them.
KINDS = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}
_MAX_LAYERS = 512  # llama.cpp's LLAMA_MAX_LAYERS
_ALIGNMENT = 32  # GGUF's default
# A kind holds magnitudes below this: the least that would round to infinity (of Q8_0, a block's
# scale in float16).
_LIMITS = {"F32": inf, "F16": 65520.0, "BF16": 3.3961775292304957e38, "Q8_0": 127 * 65520.0}
_SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}
_CHUNK = 1 << 22  # weights in float32 at a time: 16 MB
_SLACK = 64_000_000  # the header: vocabulary, template, tensor table

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the output: `module` of the checkpoint, times `scale`, stored as `kind`.

    rotary_heads: the heads of a q or k projection, whose rows change order.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    kind: str
    scale: float | None = None
    rotary_heads: int | None = None

    @property
    def nbytes(self) -> int:
        elements, nbytes = _SIZES[self.kind]
        return prod(self.shape) // elements * nbytes


def export(
    checkpoint: Checkpoint,
    destination: Path,
    plan: LayerPlan | None = None,
    *,
    window: int | None = None,
    kind: str = "F16",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `checkpoint` as `plan` lays it out into the new file `destination` (`NAME.gguf`).

    It is there whole or not at all. window: tokens to record, 0 for none. progress: called with
    the bytes of weights written and to write. Returns bytes, tensors, positions, bits_per_weight,
    sha256, and notes a person should see. Raises a CerebrumError for a file that exists, too
    little disk, weights that are not finite or too large for `kind`, and a tokenizer that GGUF
    can't express.
    """
    gguf = _package()
    if kind not in KINDS:
        raise ConfigError(f"GGUF weights can be {', '.join(KINDS)} here, not {kind}")
    if destination.suffix != ".gguf":
        raise ConfigError(f"{destination} must be a file named something.gguf")
    config = unrolled_config(checkpoint, plan, window)
    if config.num_positions > _MAX_LAYERS:
        raise ConfigError(f"{config.num_positions} layers; llama.cpp runs {_MAX_LAYERS} at most")
    tensors = _tensors(config, plan, kind)
    metadata, notes = tokenizer_metadata(checkpoint, config.vocab_size)
    notes += _notes(config, tensors, kind)
    total = sum(tensor.nbytes for tensor in tensors)
    before = stamps(checkpoint)
    with new_file(destination, total) as partial:
        _write_header(gguf, partial, config, kind, destination.stem, metadata, tensors)
        with partial.open("r+b") as file:
            stream = Stream(file, gguf, total, progress)
            for tensor in tensors:
                stream.append(checkpoint, tensor)
            stream.align()
        check_stamps(before)
        open_checkpoint(partial)  # what was written reads back: names, shapes, sizes
        size = partial.stat().st_size
    return {
        "bytes": size,
        "tensors": len(tensors),
        "positions": config.num_positions,
        "bits_per_weight": 8 * total / config.executed_parameters,
        "sha256": stream.digest.hexdigest(),
        "notes": notes,
    }


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        command = install_command(None, "gguf")
        raise ConfigError(f"writing GGUF needs the gguf package: {command}") from None
    module: ModuleType = gguf
    return module


def _tensors(config: ModelConfig, plan: LayerPlan | None, kind: str) -> list[Tensor]:
    """Every tensor of the file, in order."""
    shapes = module_shapes(config)

    def tensor(module: str, name: str, position: int | None = None) -> Tensor:
        shape = shapes[module]
        stored = "F32" if len(shape) == 1 else kind
        if stored == "Q8_0" and shape[-1] % 32:
            stored = "F16"  # as llama.cpp's converter does
        scale = tensor_scale(config, plan, position, module)
        heads = rotary_heads(config, module)
        return Tensor(gguf_name(name), module, shape, stored, scale, heads)

    found = [tensor(EMBEDDING, EMBEDDING)]
    for position, block in enumerate(config.layer_map):
        for part in BLOCK:
            found.append(tensor(module_path(block, part), module_path(position, part), position))
    found.append(tensor(FINAL_NORM, FINAL_NORM))
    if not config.tie_word_embeddings:  # llama.cpp takes token_embd for a missing output
        found.append(tensor(HEAD, HEAD))
    return found


def _notes(config: ModelConfig, tensors: list[Tensor], kind: str) -> list[str]:
    found = []
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        found.append(
            f"llama.cpp runs this without its sliding window: past {window} tokens its answers"
            f" differ, so start it with -c {window}"
        )
    if dense := sum(t.kind != kind and len(t.shape) == 2 for t in tensors):
        found.append(f"{dense} matrices don't divide into blocks of 32 and are stored as F16")
    return found


def _write_header(
    gguf: ModuleType,
    path: Path,
    config: ModelConfig,
    kind: str,
    name: str,
    metadata: dict[str, Any],
    tensors: list[Tensor],
) -> None:
    """Everything before the tensors' data."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[KINDS[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_positions)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window is not None:  # llama.cpp passes over it; we read it back
        writer.add_sliding_window(config.sliding_window)
    adders = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    for key, value in metadata.items():
        getattr(writer, f"add_{adders[type(value)]}")(key, value)
    for tensor in tensors:
        # raw_dtype says how the values are stored; the dtype before it is then not used.
        stored = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


class Stream:
    """Tensors appended to a file that has its header. `digest` is the whole file's SHA-256."""

    def __init__(
        self,
        file: BinaryIO,
        gguf: ModuleType,
        total: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.file = file
        self.gguf = gguf
        self.total = total
        self.progress = progress
        self.done = 0
        self.digest = hashlib.sha256(file.read())  # leaves the file at its end
        self.starts: dict[tuple[str, float | None], int] = {}

    def append(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        """Write one tensor, from the source or, where it was written before, from there."""
        self.align()
        start = self.file.tell()
        before = self.starts.setdefault((tensor.module, tensor.scale), start)
        if before == start:
            for rows in _rows(checkpoint, tensor):
                self._weights(self._encode(rows, tensor, f"{checkpoint.path}: {tensor.module}"))
            mx.clear_cache()
            return
        self.file.flush()
        end = before + tensor.nbytes
        for at in range(before, end, 4 * _CHUNK):
            self._weights(os.pread(self.file.fileno(), min(4 * _CHUNK, end - at), at))

    def _encode(self, rows: Floats, tensor: Tensor, place: str) -> memoryview:
        """Rows as the file stores them. Raises CheckpointError for what it can't hold."""
        if tensor.scale is not None:
            with np.errstate(over="ignore", invalid="ignore"):  # said below, in a line of our own
                rows = rows * np.float32(tensor.scale)
        largest = float(np.abs(rows).max())
        if not np.isfinite(largest):
            raise CheckpointError(f"{place} has values that are not finite: damaged, or scaled so")
        if largest >= _LIMITS[tensor.kind]:
            raise CheckpointError(
                f"{place} reaches {largest:.5g}, too large for {tensor.kind}; write BF16 or F32"
            )
        kind = self.gguf.GGMLQuantizationType[tensor.kind]
        stored: npt.NDArray[Any] = np.ascontiguousarray(self.gguf.quants.quantize(rows, kind))
        return stored.reshape(-1).view(np.uint8).data

    def _weights(self, data: bytes | memoryview) -> None:
        self._put(data)
        self.done += len(data)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def align(self) -> None:
        """Fill up to where a tensor may begin, or the file end."""
        self._put(bytes(-self.file.tell() % _ALIGNMENT))

    def _put(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)


def _rows(checkpoint: Checkpoint, tensor: Tensor) -> Iterator[Floats]:
    """The module's weight in float32, some rows at a time, in llama.cpp's order."""
    packing = checkpoint.packing(tensor.module)
    if tensor.module in checkpoint.repacked:
        arrays, packing = {"weight": checkpoint.dense(tensor.module)}, None
    else:
        arrays = checkpoint.read(tensor.module)
    if tensor.rotary_heads is not None:
        arrays = {part: paired(array, tensor.rotary_heads) for part, array in arrays.items()}
    try:
        mx.eval(arrays)
    except RuntimeError as error:  # a file that changed since its header was read
        raise CheckpointError(f"{checkpoint.path}: {tensor.module}: {first_line(error)}") from None
    rows, step = tensor.shape[0], max(1, _CHUNK // prod(tensor.shape[1:]))
    for start in range(0, rows, step):
        part = {name: array[start : min(start + step, rows)] for name, array in arrays.items()}
        dense = packing.dequantize(part, mx.float32) if packing else part["weight"]
        yield np.asarray(dense.astype(mx.float32))


def paired(rows: mx.array, heads: int) -> mx.array:
    """Each head's rows from Hugging Face's order (first elements of all rotating pairs, then the
    second ones) to llama.cpp's (pair by pair): `gguf_blocks.half_split` undone."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@contextmanager
def new_file(destination: Path, needed: int) -> Iterator[Path]:
    """A path to write that becomes `destination` when all went well, and else is gone.

    Raises CheckpointError as `check_free` does, when another run is writing it, when `needed`
    bytes are not free, and when the disk fails.
    """
    check_free(destination, "file")
    require_space(destination, needed + _SLACK, "write Q8_0")
    partial = destination.with_name(f".{destination.stem}.partial.gguf")  # our reader's suffix
    try:
        with replacing(destination, partial):
            check_free(destination, "file")
            yield partial
            check_free(destination, "file")
    except OSError as error:
        problem = error.strerror or error
        raise CheckpointError(f"{destination} can't be written: {problem}") from None
