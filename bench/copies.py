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
    """The files of `side` in `folder`. Writing one raises CerebrumError."""

    pair: Pair
    side: Side
    folder: Path

    @property
    def _storage(self) -> Storage:
        return self.pair.storage()

    @property
    def _quantized(self) -> bool:
        return self.pair.checkpoint().config.quantization is not None

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
        """Unrolled, in the dtype and the bits that ours computes with.

        The model's own directory, where that is what the others would read.
        """
        dtype = str(self._storage.dtype).rpartition(".")[2]
        packed = self._quantized and not self._storage.dequantize  # as it is stored, and stays
        packing, checkpoint = self.pair.packing, self.pair.checkpoint()
        as_stored = packed or (not self._quantized and FLOATS[checkpoint.weight_dtype] == dtype)
        changed = packing is not None or self.pair.window is not None or not self._in_order()
        if as_stored and not changed and self.pair.path.is_dir():
            return self.pair.path
        form = ["--layout", "unrolled", "--no-verify"]
        form += [] if packed else ["--dtype", dtype]
        form += ["--dequantize"] if self._quantized and not packed else []
        if packing is not None:
            form += ["-q", "--q-bits", str(packing.bits), "--q-group-size", str(packing.group_size)]
        return self._converted("unrolled", form)

    def gguf(self, kind: str) -> Path:
        """Unrolled, its matrices in `kind`."""
        return self._converted(f"{kind}.gguf", ["--gguf", kind])

    def _converted(self, name: str, form: list[str]) -> Path:
        path = self.folder / name
        given = {
            "--hf-path": self.pair.path,
            "--mlx-path": path,
            "--plan": self.side.plan_file(self.folder),
            "--window": self.pair.window,
        }
        words = [w for flag, v in given.items() if v is not None for w in (flag, str(v))]
        if not path.exists():
            process.seconds(["convert", "--quiet", *words, *form])
        return path

    def _in_order(self) -> bool:
        """Whether this side runs the stored blocks as they are stored."""
        configs = self.pair.checkpoint().config, self.side.config  # folded, it has its own order
        stored = tuple(range(configs[0].num_hidden_layers))
        return all(c.layer_map == stored and c.residual_scales is None for c in configs)


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
