"""A safetensors header, read with suspicion.

Format: 8 bytes little-endian header length, a JSON object `name -> {dtype, shape,
data_offsets}`, then the data (huggingface/safetensors, README). Nothing in it is trusted:
offsets must be in bounds, gap-free and of the size their dtype and shape say.
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from mlx_cerebrum.errors import CheckpointError

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
}
_MAX_HEADER = 100_000_000  # the limit of the format's own implementation


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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is truncated: {size} bytes, no header")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is truncated or not safetensors: its header claims {length} bytes"
                    f" of a {size} byte file"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from None
    entries = _parse(path, text)
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not safetensors: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not safetensors: its header is not a JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def natural(values: Any) -> TypeGuard[list[int]]:
        return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)

    if not isinstance(entry, dict) or entry.get("dtype") not in ITEM_BYTES:
        raise CheckpointError(f"{path}: the header of {name!r} has no known dtype")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not natural(shape) or not natural(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: the header of {name!r} has no valid shape and offsets")
    nbytes = offsets[1] - offsets[0]
    if nbytes != prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise CheckpointError(
            f"{path}: {name!r} has {nbytes} bytes, but its dtype {entry['dtype']} and"
            f" shape {shape} need {prod(shape) * ITEM_BYTES[entry['dtype']]}"
        )
    return TensorInfo(entry["dtype"], tuple(shape), data_start + offsets[0], nbytes)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            raise CheckpointError(f"{path}: {name!r} overlaps another tensor or leaves a gap")
        at += tensor.nbytes
    if at > size:
        raise CheckpointError(
            f"{path} is truncated: {size} bytes of the {at} its header describes;"
            " download or copy it again"
        )
    if at < size:
        raise CheckpointError(f"{path} has {size - at} bytes after its last tensor")
