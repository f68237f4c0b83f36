"""Checkpoint directories in Hugging Face's layout, as stock tools read them; a block per file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cerebrum.checkpoint import INDEX, Checkpoint, matrix_shapes, norm_names
from mlx_cerebrum.config import ModelConfig

Arrays = dict[str, mx.array]  # tensors by name


def by_block(config: ModelConfig) -> list[list[str]]:
    """Module paths of the stored model: those outside the blocks first, then block by block."""
    names = [*matrix_shapes(config), *(n.removesuffix(".weight") for n in norm_names(config))]
    groups: list[list[str]] = [[] for _ in range(1 + config.num_hidden_layers)]
    for name in names:
        groups[1 + int(name.split(".")[2]) if ".layers." in name else 0].append(name)
    return groups


def write_checkpoint(
    directory: Path, config: dict[str, Any], files: Sequence[Callable[[], Arrays]]
) -> int:
    """Write config.json, one safetensors file per entry of `files`, and their index.

    Each file's tensors are made when its turn comes and dropped after it. Returns the
    tensors' bytes. Raises FileExistsError for a directory that is there already.
    """
    directory.mkdir()
    weight_map: dict[str, str] = {}
    total = 0
    for number, make in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        arrays = make()
        mx.save_safetensors(str(directory / name), arrays, {"format": "mlx"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
        del arrays
        mx.clear_cache()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / INDEX, index)
    _write_json(directory / "config.json", config)
    return total


def export(checkpoint: Checkpoint, directory: Path, *, dense: bool) -> None:
    """Copy `checkpoint` so that mlx-lm reads it, tokenizer included.

    Dense: every tensor in float32, packed ones dequantized in float32. Else as stored, in
    mlx-lm's quantized layout.
    """

    def tensors(module: str) -> Arrays:
        arrays = checkpoint.read(module)
        packing = checkpoint.packing(module)
        if dense and packing is not None:
            arrays = {"weight": packing.dequantize(arrays, mx.float32)}
        if dense:
            arrays = {"weight": arrays["weight"].astype(mx.float32)}
        return {f"{module}.{part}": array for part, array in arrays.items()}

    def file(modules: list[str]) -> Callable[[], Arrays]:
        return lambda: {name: a for m in modules for name, a in tensors(m).items()}

    config = checkpoint.config
    raw = checkpoint.raw_config | {
        # What mlx-lm would guess otherwise: it takes a missing tie_word_embeddings as true.
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
    }
    if dense:
        raw = {key: value for key, value in raw.items() if not key.startswith("quantization")}
        raw["torch_dtype"] = raw["dtype"] = "float32"
    write_checkpoint(directory, raw, [file(modules) for modules in by_block(config)])
    checkpoint.tokenizer().save(directory)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
