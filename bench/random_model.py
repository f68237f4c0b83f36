"""A checkpoint of random weights: the real shapes where only shapes matter.

Speed and memory do not depend on what the weights are, so `python -m bench.random_model DIR
--geometry cerebrum-7b` stands in for the 14.5 GB download. Weights have the deviation of
initialised models (1/sqrt(inputs)), so activations keep their size through any number of layers.
What it generates is noise, the same every time.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cerebrum import cli
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.model.tensors import BLOCK, module_path, module_shapes, place
from mlx_cerebrum.text import say
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint, Extent
from mlx_cerebrum.weights.safetensors_checkpoint import INDEX

_CEREBRUM: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "cerebrum-7b": _CEREBRUM,
    # 1/16 of the width: 0.85 million parameters a block, 191 MB in 56 float32 layers.
    "small": _CEREBRUM
    | {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8}
    | {"num_key_value_heads": 2, "head_dim": 32},
}


class RandomCheckpoint(Checkpoint):
    """The 7B's geometry, or `raw`, with weights that are made when they are read: none on disk.

    Seeds differ by tensor, so no two are alike; read again, a tensor is the same again.
    """

    def __init__(self, path: Path, raw: dict[str, Any] | None = None) -> None:
        self.path = path
        self.raw_config = dict(_CEREBRUM if raw is None else raw)
        self.config = ModelConfig.from_dict(self.raw_config)
        modules = module_shapes(self.config)
        self.shapes = {f"{module}.weight": shape for module, shape in modules.items()}
        self.dtypes = dict.fromkeys(self.shapes, "BF16")
        self._seeds = {name: seed for seed, name in enumerate(self.shapes)}

    def read(self, module: str) -> dict[str, mx.array]:
        name = f"{module}.weight"
        shape = self.shapes[name]
        if len(shape) == 1:  # RMSNorm
            return {"weight": mx.ones(shape, mx.bfloat16)}
        # Uniform: drawn twice as fast as a normal on the CPU, and of the same deviation.
        reach = (3 / shape[1]) ** 0.5
        key = mx.random.key(self._seeds[name])
        return {"weight": mx.random.uniform(-reach, reach, shape, mx.bfloat16, key)}

    def extents(self, module: str) -> dict[str, Extent]:
        raise NotImplementedError("random weights are stored nowhere")

    def tokenizer(self) -> Tokenizer:
        raise ConfigError(f"{self.path} has no tokenizer: its weights are random")


def write_random(directory: Path, raw: dict[str, Any], layers: Sequence[int] | None = None) -> int:
    """Write a random bfloat16 checkpoint of the geometry `raw`; returns its tensors' bytes.

    `layers` writes an unrolled merge: one layer per entry, layers of one number alike. One file
    a layer, so that one layer is in memory at a time. Raises FileExistsError for a directory
    that is there already.
    """
    source = RandomCheckpoint(directory, raw)
    layers = range(source.config.num_hidden_layers) if layers is None else layers
    outside = [module for module in module_shapes(source.config) if place(module) is None]
    parts = [{module: module for module in outside}]  # what is written -> what it is read as
    for position, block in enumerate(layers):
        parts.append({module_path(position, kind): module_path(block, kind) for kind in BLOCK})
    directory.mkdir()
    files: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        arrays = {f"{new}.weight": source.read(old)["weight"] for new, old in part.items()}
        mx.save_safetensors(str(directory / file), arrays, {"format": "pt"})
        files |= dict.fromkeys(arrays, file)
        total += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    config = source.raw_config | {"num_hidden_layers": len(layers)}
    for name, value in ((INDEX, index), ("config.json", config)):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return total


def main(argv: list[str] | None = None) -> int:
    p = cli.ArgumentParser(
        prog="bench.random_model", description="Write a checkpoint of random bfloat16 weights."
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="must not exist yet")
    p.add_argument("--geometry", choices=sorted(GEOMETRIES), default="small", help="its shapes")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy this tokenizer's files")
    p.add_debug()
    args = p.parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    found = [args.tokenizer / name for name in FILES] if args.tokenizer else []
    found = [file for file in found if file.is_file()]
    if args.tokenizer and not found:
        raise ConfigError(f"{args.tokenizer} has no tokenizer files")
    raw, directory = GEOMETRIES[args.geometry], args.directory
    needed = 2 * ModelConfig.from_dict(raw).stored_parameters
    free = shutil.disk_usage(directory.absolute().parent).free
    if needed > free:
        raise ConfigError(f"{directory} needs {needed / GB:.2f} GB and {free / GB:.2f} are free")
    started = time.perf_counter()
    written = write_random(directory, raw)
    for file in found:
        shutil.copyfile(file, directory / file.name)
    took = time.perf_counter() - started
    say(f"{directory}: {args.geometry}, {written / GB:.2f} GB in {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
