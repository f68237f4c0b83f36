"""Writing a GGUF file's tensors as a stream: read, scaled, rounded, hashed, appended."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.model.memory import human
from mlx_cerebrum.tokenizer.vocabulary import first_line
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.gguf_file import GGML_TYPES

ALIGNMENT = 32  # GGUF's default
# A kind holds magnitudes below this: the least that would round to infinity (of Q8_0, a block's
# scale in float16).
_LIMITS = {"F32": inf, "F16": 65520.0, "BF16": 3.3961775292304957e38, "Q8_0": 127 * 65520.0}
_SIZES = {name: (elements, nbytes) for name, elements, nbytes in GGML_TYPES.values()}
_CHUNK = 1 << 22  # weights in float32 at a time: 16 MB
_SLACK = 64_000_000  # the header: vocabulary, template, tensor table

Floats = npt.NDArray[np.float32]
Quantize = Callable[[Floats, str], npt.NDArray[Any]]  # rows, kind -> the same rows, stored


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


class Stream:
    """Tensors appended to a file that has its header. `digest` is the whole file's SHA-256."""

    def __init__(
        self,
        file: BinaryIO,
        quantize: Quantize,
        total: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.file = file
        self.quantize = quantize
        self.total = total
        self.progress = progress
        self.done = 0
        self.digest = hashlib.sha256(file.read())  # leaves the file at its end
        self.starts: dict[tuple[str, float | None], int] = {}

    def append(self, checkpoint: Checkpoint, tensor: Tensor) -> None:
        """Write one tensor, from the source or, where it was written before, from there."""
        self._align()
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

    def finish(self) -> None:
        """Everything on disk."""
        self._align()
        self.file.flush()
        os.fsync(self.file.fileno())

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
        stored = np.ascontiguousarray(self.quantize(rows, tensor.kind))
        return stored.reshape(-1).view(np.uint8).data

    def _weights(self, data: bytes | memoryview) -> None:
        self._put(data)
        self.done += len(data)
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _align(self) -> None:
        self._put(bytes(-self.file.tell() % ALIGNMENT))

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
    step = max(1, _CHUNK // prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], step):
        part = {name: array[start : start + step] for name, array in arrays.items()}
        dense = packing.dequantize(part, mx.float32) if packing else part["weight"]
        yield np.asarray(dense.astype(mx.float32))


def paired(rows: mx.array, heads: int) -> mx.array:
    """Each head's rows from Hugging Face's order (first elements of all rotating pairs, then the
    second ones) to llama.cpp's (pair by pair): `gguf_blocks.half_split` undone."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


@contextmanager
def new_file(destination: Path, needed: int) -> Iterator[Path]:
    """A path to write that becomes `destination` when all went well, and else is gone.

    Raises CheckpointError when `destination` exists or is being written by another run, when
    `needed` bytes are not free, and when the disk fails.
    """
    _check_free(destination)
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent} does not exist; make it first")
    free = shutil.disk_usage(parent).free
    if needed + _SLACK > free:
        raise CheckpointError(
            f"{destination} needs {human(needed)} of disk and {human(free)} are free;"
            " free some space, name another disk, or write Q8_0"
        )
    partial = parent / f".{destination.stem}.partial.gguf"  # a suffix our reader takes
    try:
        with replacing(destination, partial):
            _check_free(destination)
            yield partial
            _check_free(destination)
    except OSError as error:
        problem = error.strerror or error
        raise CheckpointError(f"{destination} can't be written: {problem}") from None


def _check_free(destination: Path) -> None:
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new file, or remove it")
