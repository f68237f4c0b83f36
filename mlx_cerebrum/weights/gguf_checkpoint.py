"""A GGUF file as a Checkpoint: config, tokenizer and tensors from the one file."""

from pathlib import Path

import mlx.core as mx

from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint, Extent
from mlx_cerebrum.weights.gguf import GGUFFile, model_config, modules, rotary_heads
from mlx_cerebrum.weights.gguf_blocks import (
    FLOATS,
    REPACKED,
    WIDE,
    read_arrays,
    read_dense,
    stored_packing,
)
from mlx_cerebrum.weights.quantize import Packing

_CODES = {name: code for code, name in FLOATS.items()}


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or the parts of a split one; packed integers kept as they are where MLX can."""

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile.open(path)
        self.path = self.file.path  # of a split model the first part
        self.config, self.raw_config = model_config(self.file)
        self._tensors = modules(self.file, self.config)
        self.repacked = frozenset(m for m, t in self._tensors.items() if t.ggml_type in REPACKED)
        self.shapes, self.dtypes = {}, {}
        for module, tensor in self._tensors.items():
            packing = stored_packing(tensor)
            if packing is None:
                self.shapes[f"{module}.weight"] = tensor.shape
                self.dtypes[f"{module}.weight"] = tensor.ggml_type
                continue
            rows, columns = tensor.shape
            scales = "F32" if tensor.ggml_type in WIDE else "F16"
            for part, shape in packing.shapes(rows, columns).items():
                self.shapes[f"{module}.{part}"] = shape
                self.dtypes[f"{module}.{part}"] = "U32" if part == "weight" else scales

    def read(self, module: str) -> dict[str, mx.array]:
        return read_arrays(self.file, self._tensors[module], rotary_heads(self.config, module))

    def repack(self, module: str, packing: Packing) -> dict[str, mx.array]:
        heads = rotary_heads(self.config, module)
        return read_arrays(self.file, self._tensors[module], heads, packing)

    def dense(self, module: str) -> mx.array:
        if module not in self.repacked:
            return super().dense(module)
        heads = rotary_heads(self.config, module)
        return read_dense(self.file, self._tensors[module], heads)

    def extents(self, module: str) -> dict[str, Extent]:
        tensor = self._tensors[module]
        holder = self.file.holder(tensor).path
        return {"weight": Extent(holder, tensor.offset, tensor.nbytes)}

    @property
    def weight_dtype(self) -> str:
        """Of most matrices; packed ones' scales come from float16, whatever they are held in."""
        return _CODES[self.raw_config["dtype"]]

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.file.metadata)

    def names(self) -> list[str]:
        said = (self.file.metadata.get(f"general.{key}") for key in ("name", "basename"))
        return [*super().names(), *(name for name in said if isinstance(name, str))]
