"""Checkpoint directories in Hugging Face's layout, as stock tools read them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import matrix_shapes, norm_paths
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX
from mlx_cerebrum.weights.safetensors_file import CODES

Arrays = dict[str, mx.array]  # tensors by name


def by_block(config: ModelConfig) -> list[list[str]]:
    """Module paths of the stored model: those outside the blocks first, then block by block."""
    names = [*matrix_shapes(config), *norm_paths(config)]
    groups: list[list[str]] = [[] for _ in range(1 + config.num_hidden_layers)]
    for name in names:
        groups[1 + int(name.split(".")[2]) if ".layers." in name else 0].append(name)
    return groups


def write_checkpoint(
    directory: Path, config: dict[str, Any], parts: Sequence[Callable[[], Arrays]], shards: int = 1
) -> int:
    """Write config.json, the tensors of all `parts` in `shards` safetensors files, their index.

    Each part's tensors are made when its turn comes and dropped after it. Returns the
    tensors' bytes. Raises FileExistsError for a directory that is there already.
    """
    directory.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        bounds = [len(parts) * k // shards for k in (number - 1, number)]
        sizes = _write_file(directory / name, parts[slice(*bounds)])
        weight_map |= dict.fromkeys(sizes, name)
        total += sum(sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / INDEX, index)
    _write_json(directory / "config.json", config)
    return total


def _write_file(path: Path, parts: Sequence[Callable[[], Arrays]]) -> dict[str, int]:
    """One safetensors file, a part in memory at a time; returns each tensor's bytes.

    The header goes in last, into room kept for it: the format allows spaces after the JSON.
    """
    room = 8 + 4096 * (1 + len(parts))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    with path.open("wb") as file:
        file.seek(room)
        for make in parts:
            for name, array in make().items():
                code = CODES[array.dtype]
                offsets = [at, at + array.nbytes]
                header[name] = {"dtype": code, "shape": array.shape, "data_offsets": offsets}
                flat = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
                file.write(np.ascontiguousarray(np.asarray(flat)).data.cast("B"))
                at += array.nbytes
            mx.clear_cache()
        text = json.dumps(header).encode()
        if len(text) > room - 8:
            raise ValueError(f"{path}: a header of {len(text)} bytes, room for {room - 8}")
        file.seek(0)
        file.write((room - 8).to_bytes(8, "little") + text.ljust(room - 8))
    del header["__metadata__"]
    return {name: b - a for name, (a, b) in ((n, e["data_offsets"]) for n, e in header.items())}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
