"""Writing safetensors as a stream: header first, then tensor by tensor as each is computed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from convert.outputs import Module, Spec
from mlx_cerebrum.checkpoint import INDEX
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.memory import human
from mlx_cerebrum.safetensors_file import ITEM_BYTES

MAX_SHARD_BYTES = 5_000_000_000  # the hub's and mergekit's default
CODES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
_SLACK = 64_000_000  # config, tokenizer and headers


def nbytes(specs: tuple[Spec, ...]) -> int:
    return sum(prod(spec.shape) * ITEM_BYTES[spec.dtype] for spec in specs)


def shards(modules: list[Module], limit: int = MAX_SHARD_BYTES) -> list[list[Module]]:
    """Modules in order, cut where a shard would pass `limit` bytes."""
    found: list[list[Module]] = [[]]
    size = 0
    for module in modules:
        more = nbytes(module.specs)
        if found[-1] and size + more > limit:
            found.append([])
            size = 0
        found[-1].append(module)
        size += more
    return found


@contextmanager
def new_directory(destination: Path, needed: int) -> Iterator[Path]:
    """A directory to fill that becomes `destination` when all went well, and else is gone.

    Raises CheckpointError when `destination` exists or `needed` bytes are not free.
    """
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; name a new directory, or remove it")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent} does not exist; make it first")
    free = shutil.disk_usage(parent).free
    if needed + _SLACK > free:
        raise CheckpointError(
            f"{destination} needs {human(needed)} of disk and {human(free)} are free;"
            " free some space, name another disk, or quantize (-q)"
        )
    partial = parent / f".{destination.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    partial.mkdir()
    try:
        yield partial
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_weights(
    directory: Path,
    modules: list[Module],
    metadata: dict[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write all modules as numbered shards and their index; returns each file's SHA-256.

    One module's tensors are in memory at a time.
    """
    groups = shards(modules)
    total = sum(nbytes(module.specs) for module in modules)
    weight_map: dict[str, str] = {}
    hashes: dict[str, str] = {}
    done = 0
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with (directory / name).open("wb") as file:
            digest = hashlib.sha256()
            _write(file, digest, _header(group, metadata))
            for module in group:
                arrays = module.arrays()
                for spec in module.specs:
                    _write(file, digest, _data(arrays.pop(spec.name), spec))
                    weight_map[spec.name] = name
                mx.clear_cache()
                done += nbytes(module.specs)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        hashes[name] = digest.hexdigest()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)
    return hashes


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _header(modules: list[Module], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for module in modules:
        for spec in module.specs:
            end = at + nbytes((spec,))
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, end],
            }
            at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return len(text).to_bytes(8, "little") + text


def _data(array: mx.array, spec: Spec) -> memoryview:
    """The array's bytes. What was promised in the header must be what was computed."""
    if array.shape != spec.shape or CODES.get(array.dtype) != spec.dtype:
        raise CheckpointError(
            f"{spec.name} came out as {array.dtype} {list(array.shape)}, not {spec.dtype}"
            f" {list(spec.shape)}"
        )
    flat = np.asarray(array.view(_UNSIGNED[array.dtype.size])).reshape(-1)
    return np.ascontiguousarray(flat).data.cast("B")


def _write(file: BinaryIO, digest: Any, data: bytes | memoryview) -> None:
    file.write(data)
    digest.update(data)
