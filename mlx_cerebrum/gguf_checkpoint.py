"""A GGUF file as a Checkpoint: config, tokenizer and tensors from the one file."""

from pathlib import Path

import mlx.core as mx

from mlx_cerebrum.checkpoint import Checkpoint, Extent
from mlx_cerebrum.gguf import GGUFFile, iter_tensors, model_config, modules
from mlx_cerebrum.gguf_blocks import FLOATS
from mlx_cerebrum.quantize import Packing
from mlx_cerebrum.tokenizer import Tokenizer


class GGUFCheckpoint(Checkpoint):
    """One `.gguf` file; its packed integers, scales and biases kept as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GGUFFile.open(path)
        self.config, self.raw_config = model_config(self.file)
        self._readers = dict(iter_tensors(self.file))
        self._tensors = modules(self.file, self.config)
        self.shapes, self.dtypes = {}, {}
        quantization = self.config.quantization or {}
        for module, tensor in self._tensors.items():
            if tensor.ggml_type in FLOATS:
                self.shapes[f"{module}.weight"] = tensor.shape
                self.dtypes[f"{module}.weight"] = tensor.ggml_type
                continue
            rows, columns = tensor.shape
            packing = Packing.from_config(quantization, module)
            for part, shape in packing.shapes(rows, columns).items():
                self.shapes[f"{module}.{part}"] = shape
                self.dtypes[f"{module}.{part}"] = "U32" if part == "weight" else "F16"

    def read(self, module: str) -> dict[str, mx.array]:
        return self._readers[module]()

    def extents(self, module: str) -> dict[str, Extent]:
        tensor = self._tensors[module]
        return {"weight": Extent(self.path, tensor.offset, tensor.nbytes)}

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.file.metadata)
