"""A safetensors header: read with suspicion; written ahead of data that follows in pieces.

Format: 8 bytes little-endian header length, a JSON object `name -> {dtype, shape,
data_offsets}`, then the data (huggingface/safetensors, README). Nothing in it is trusted:
offsets must be in bounds, gap-free and of the size their dtype and shape say.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.foreign import stand_in, unfinished

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
CODES: dict[mx.Dtype, str] = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.int32: "I32",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
_MAX_TENSORS = 100_000  # one file of all the blocks that are supported has fewer
_MAX_RANK = 32  # a product of more sizes could take minutes


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `offset` and `nbytes` are in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name, without reading their data.

    Raises CheckpointError (one line, with the file) for anything that does not add up.
    """
    return read_whole_header(path)[0]


def read_whole_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors, and the texts beside them (`__metadata__`). Raises as `read_header` does."""
    if problem := stand_in(path):
        raise CheckpointError(problem)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes, no header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, json_file.MAX_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or not safetensors: its header claims {length} bytes"
                    f" of a {size} byte file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    return parse_header(path, text, size)


def parse_header(
    path: Path, text: bytes, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and texts of a header, read from a file of `size` bytes that `path` names.

    Raises as `read_header` does; `path` need not exist.
    """
    entries = json_file.parse(text, f"{path}: the header", CheckpointError)
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} is not safetensors: its header is not a JSON object")
    if len(entries) > _MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(entries)} tensors; {_MAX_TENSORS} are supported")
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is not text by name")
    tensors = {name: _tensor(path, name, entry, 8 + len(text)) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + len(text), size)
    return tensors, metadata


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> bytes:
    """What stands before the data of these tensors (name -> dtype, shape), in this order.

    Its end is aligned to 8 bytes, so that readers may map the data.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def natural(values: Any) -> TypeGuard[list[int]]:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: the header of {name!r} has no known dtype")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2 or len(shape) > _MAX_RANK:
        raise CheckpointError(f"{path}: the header of {name!r} has no valid shape and offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes != prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(
            f"{path}: {name!r} has {nbytes} bytes, but its dtype {dtype} and shape {shape!s:.80}"
            f" need {prod(shape) * ITEM_BYTES[dtype]!s:.40}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise CheckpointError(f"{path}: {name!r} overlaps another tensor or leaves a gap")
        at += tensor.nbytes
    if at > size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes of the {at} its header describes;"
            f" download or copy it again{unfinished(path)}"
        )
    if at < size:
        raise CheckpointError(f"{path} has {size - at} bytes after its last tensor")
