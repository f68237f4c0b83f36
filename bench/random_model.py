"""A checkpoint of random weights: the real shapes where only shapes matter.

Speed and memory do not depend on what the weights are, so `python -m bench.random_model DIR
--geometry cerebrum-7b` stands in for the 14.5 GB download. Weights are drawn as initialised
models draw them (normal, standard deviation 1/sqrt(inputs)), so activations keep their size
through any number of layers. Every tensor has its own seed, and block by block is written:
little memory, and the same seed gives the same file. What it generates is noise.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from bench.directory import Arrays, by_block, write_checkpoint
from mlx_cerebrum import cli
from mlx_cerebrum.errors import ConfigError
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.memory import GB
from mlx_cerebrum.model.tensors import matrix_shapes, norm_paths
from mlx_cerebrum.text import say
from mlx_cerebrum.tokenizer.files import FILES
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint, Extent

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


def write_random(
    directory: Path,
    raw: dict[str, Any],
    layers: Sequence[int] | None = None,
    seed: int = 0,
    shards: int = 1,
) -> int:
    """Write a random bfloat16 checkpoint of the geometry `raw`; returns its bytes.

    `layers` writes an unrolled merge: one layer per entry, layers of one number alike.
    """
    if layers is not None:
        raw = raw | {"num_hidden_layers": len(layers)}
    config = ModelConfig.from_dict(raw)
    shapes = matrix_shapes(config)

    def file(modules: list[str], drawn: int) -> Arrays:
        """`modules` are drawn as block number `drawn` - 1; 0 is what lies outside the blocks."""
        arrays = {}
        for number, module in enumerate(modules):
            if module in shapes:
                random = np.random.default_rng((seed, drawn, number))
                weight = _normal(random, *shapes[module])
            else:  # RMSNorm
                weight = mx.ones(config.hidden_size, mx.bfloat16)
            arrays[f"{module}.weight"] = weight
        return arrays

    blocks = range(config.num_hidden_layers) if layers is None else layers
    drawn = [0, *(1 + block for block in blocks)]
    files = [partial(file, *each) for each in zip(by_block(config), drawn, strict=True)]
    return write_checkpoint(directory, raw, files, shards)


class RandomCheckpoint(Checkpoint):
    """The 7B's geometry with weights that are made when they are read: nothing on disk.

    Seeds differ by tensor, so no two are alike; read again, a tensor is the same again.
    """

    def __init__(self, path: Path, raw: dict[str, Any] | None = None) -> None:
        self.path = path
        self.raw_config = dict(_CEREBRUM if raw is None else raw)
        self.config = ModelConfig.from_dict(self.raw_config)
        self._matrices = matrix_shapes(self.config)
        self.shapes = {f"{name}.weight": shape for name, shape in self._matrices.items()}
        norms = [f"{name}.weight" for name in norm_paths(self.config)]
        self.shapes |= dict.fromkeys(norms, (self.config.hidden_size,))
        self.dtypes = dict.fromkeys(self.shapes, "BF16")

    def read(self, module: str) -> Arrays:
        shape = self.shapes[f"{module}.weight"]
        if module not in self._matrices:  # RMSNorm
            return {"weight": mx.ones(shape, mx.bfloat16)}
        # Uniform: drawn twice as fast as a normal on the CPU, and of the same deviation.
        reach = (3 / shape[1]) ** 0.5
        key = mx.random.key(list(self._matrices).index(module))
        return {"weight": mx.random.uniform(-reach, reach, shape, mx.bfloat16, key)}

    def extents(self, module: str) -> dict[str, Extent]:
        raise NotImplementedError("random weights are stored nowhere")

    def tokenizer(self) -> Tokenizer:
        raise ConfigError(f"{self.path} has no tokenizer: its weights are random")


def _normal(random: np.random.Generator, rows: int, columns: int) -> mx.array:
    """bfloat16 `[rows, columns]`, drawn in pieces: float32 of the whole would be twice its size."""
    step = max(1, 4_000_000 // columns)
    pieces = []
    for start in range(0, rows, step):
        piece = random.standard_normal((min(step, rows - start), columns), np.float32)
        pieces.append(mx.array(piece * np.float32(columns**-0.5)).astype(mx.bfloat16))
        mx.eval(pieces[-1])
    return mx.concatenate(pieces)


def parser() -> cli.ArgumentParser:
    p = cli.ArgumentParser(
        prog="bench.random_model", description="Write a checkpoint of random bfloat16 weights."
    )
    p.add_argument("directory", type=Path, metavar="DIR", help="must not exist yet")
    p.add_argument("--geometry", choices=sorted(GEOMETRIES), default="small", help="its shapes")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="copy this tokenizer's files")
    p.add_argument("--shards", type=int, default=3, metavar="N", help="weight files (default: 3)")
    p.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    p.add_debug()
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return cli.run(lambda: _run(args), args.debug)


def _run(args: argparse.Namespace) -> int:
    found = [args.tokenizer / name for name in FILES] if args.tokenizer else []
    found = [file for file in found if file.is_file()]
    if args.tokenizer and not found:
        raise ConfigError(f"{args.tokenizer} has no tokenizer files")
    raw = GEOMETRIES[args.geometry]
    stored = 2 * ModelConfig.from_dict(raw).stored_parameters
    free = shutil.disk_usage(args.directory.absolute().parent).free
    if stored > free:
        raise ConfigError(
            f"{args.directory} needs {stored / GB:.2f} GB and {free / GB:.2f} are free"
        )
    started = time.perf_counter()
    written = write_random(args.directory, raw, seed=args.seed, shards=max(1, args.shards))
    for file in found:
        shutil.copyfile(file, args.directory / file.name)
    took = time.perf_counter() - started
    say(f"{args.directory}: {args.geometry}, {written / GB:.2f} GB in {took:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
