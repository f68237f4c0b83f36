"""One side's weights in the files that other engines read, written when they are asked for.

`python -m convert` writes them, a process of its own: mlx-lm and transformers read a directory
with one layer per position, llama.cpp a GGUF file. It predicts the disk space that it needs, and
refuses in one line what does not fit; that line then stands in the peer's row.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from bench import process
from bench.pair import Pair, Side
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.gguf_file import GGUFFile
from mlx_cerebrum.weights.storage import Storage

_KINDS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}


@dataclass
class Copies:
    """The files of `side` in `folder`."""

    pair: Pair
    side: Side
    folder: Path

    def __post_init__(self) -> None:
        self._storage: Storage = self.pair.storage()
        self._quantized = self.pair.checkpoint().config.quantization is not None

    @property
    def dense(self) -> bool:
        """Whether ours holds its matrices in the activations' dtype."""
        return self._storage.dequantize or not any(self._storage.packings.values())

    @property
    def kind(self) -> str:
        """What GGUF calls the dtype that ours computes in."""
        return _KINDS[self._storage.dtype]

    @property
    def native(self) -> Path | None:
        """The model's own file, where that is a quantized GGUF file and in this side's order."""
        path = self.pair.path
        return path if self._quantized and path.suffix == ".gguf" and self._in_order() else None

    def directory(self) -> Path:
        """Unrolled, in the dtype and the bits that ours computes with. Raises CerebrumError."""
        if self._readable():
            return self.pair.path
        path = self.folder / "unrolled"
        if path.exists():
            return path
        form = ["--layout", "unrolled", "--no-verify"]
        packing = self.pair.packing
        if self._quantized and self._storage.dequantize:
            form.append("--dequantize")
        if not self._quantized or self._storage.dequantize:
            form += ["--dtype", self._dtype]
        if packing is not None:
            form += ["-q", "--q-bits", str(packing.bits), "--q-group-size", str(packing.group_size)]
        return self._convert(path, form)

    def gguf(self, kind: str) -> Path:
        """Unrolled, its matrices in `kind`. Raises CerebrumError."""
        path = self.folder / f"{kind}.gguf"
        return path if path.exists() else self._convert(path, ["--gguf", kind])

    @property
    def _dtype(self) -> str:
        return str(self._storage.dtype).rpartition(".")[2]

    def _convert(self, path: Path, form: list[str]) -> Path:
        plan = self.side.plan
        order = [] if plan is None else ["--plan", str(self.side.plan_file(self.folder))]
        window = self.pair.window
        width = [] if window is None else ["--window", str(window)]
        source = ["--hf-path", str(self.pair.path), "--mlx-path", str(path), "--quiet"]
        process.seconds(["convert", *source, *order, *width, *form])
        return path

    def _readable(self) -> bool:
        """Whether the model's own directory is what the others read, so that none is written."""
        checkpoint, changed = self.pair.checkpoint(), self.pair.packing or self.pair.window
        if changed is not None or not self.pair.path.is_dir() or not self._in_order():
            return False
        if self._quantized:
            return not self._storage.dequantize
        return FLOATS[checkpoint.weight_dtype] == self._dtype

    def _in_order(self) -> bool:
        """Whether this side runs the stored blocks as they are stored."""
        source = self.pair.checkpoint().config  # folded, it has an order of its own
        config = self.side.config
        stored = tuple(range(config.num_hidden_layers))
        return all(c.layer_map == stored and c.residual_scales is None for c in (source, config))


def main_type(path: Path) -> str:
    """The type that most bytes of a GGUF file have, such as Q4_1."""
    count: Counter[str] = Counter()
    for tensor in GGUFFile.open(path).tensors.values():
        count[tensor.ggml_type] += tensor.nbytes
    return count.most_common(1)[0][0]


def nbytes(path: Path) -> int:
    """What loading it takes: the bytes of its weight files."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
