"""A checkpoint on disk: which tensors it has, checked against its config, read one at a time.

Every source (a directory of safetensors, a GGUF file) looks the same from here: a config, a
tokenizer, and tensors under Hugging Face's names. Shapes are known from headers, so a wrong
file is refused before a byte of data is read.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import mlx.core as mx

from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.files.foreign import tensor_problem
from mlx_cerebrum.model.config import ModelConfig
from mlx_cerebrum.model.tensors import PARTS, matrix_shapes, norm_paths
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.safetensors_file import ITEM_BYTES

# safetensors' names of the dtypes weights have -> torch's, which are also MLX's.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FLOAT_CODES = {name: code for code, name in FLOATS.items()}
_HELD = (*FLOATS, "U32", "U8")


@dataclass(frozen=True)
class Extent:
    """Where an array's stored bytes lie: `offset` and `nbytes` count from the file's start."""

    path: Path
    offset: int
    nbytes: int

    def samples(self, count: int, size: int) -> Iterator[bytes]:
        """`count` evenly spread pieces of `size` bytes at most, from the very first byte to the
        very last. Raises CheckpointError where the file can't be read."""
        size = min(size, self.nbytes)
        try:
            with self.path.open("rb", buffering=0) as file:
                for i in range(count):
                    at = self.offset + (self.nbytes - size) * i // (count - 1)
                    yield os.pread(file.fileno(), size, at)
        except OSError as error:
            raise CheckpointError(f"{self.path} can't be read: {error.strerror or error}") from None


class Checkpoint(ABC):
    """A readable source. `shapes` maps tensor names to shapes; `read` gets one module's.

    `config` is config.json, corrected by the tensors: a head that is stored with values of its own
    is not tied. `spare` are modules that are stored but never read: a tied model's head, which is
    the embedding once more. `repacked` are matrices in a format that MLX does not have: `read`
    packs them anew as `packing` says, `repack` in another way, and `dense` gives exactly what is
    stored.
    """

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    spare: frozenset[str] = frozenset()
    repacked: frozenset[str] = frozenset()

    @abstractmethod
    def read(self, module: str) -> dict[str, mx.array]:
        """The arrays of one module (`weight`; `scales` and `biases` where it is quantized).

        They are not kept: a module that is asked for again is read from disk again.
        """

    def dense(self, module: str) -> mx.array:
        """One matrix unpacked: float32 where it is packed, else as stored."""
        arrays, packing = self.read(module), self.packing(module)
        return packing.dequantize(arrays, mx.float32) if packing else arrays["weight"]

    def repack(self, module: str, packing: Packing) -> dict[str, mx.array]:
        """One matrix as `read` gives it, packed in this way instead of `self.packing(module)`."""
        return packing.quantize(self.dense(module))

    def read_bytes(self, module: str) -> int:
        """The memory that `read` takes."""
        names = self.parts(module).values()
        return sum(prod(self.shapes[name]) * ITEM_BYTES[self.dtypes[name]] for name in names)

    @abstractmethod
    def extents(self, module: str) -> dict[str, Extent]:
        """Where the module's parts are stored, in whatever format they are."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    def names(self) -> list[str]:
        """What the checkpoint is called: as a path or on the hub, in its config, and what it was
        converted from."""
        snapshot = self.path.parent.name == "snapshots"  # the hub's cache: models--OWNER--NAME
        found: list[Any] = [self.path.parents[1].name] if snapshot else [self.path.name]
        found += [self.path.resolve().name, self.raw_config.get("_name_or_path")]
        entry: Any = self.raw_config.get("provenance")
        while isinstance(entry, dict):
            found.append(entry.get("source"))
            entry = entry.get("from")
        return [PurePath(name).name for name in found if isinstance(name, str)]

    def parts(self, module: str) -> dict[str, str]:
        """The names of the module's tensors: of its `weight`, and of what lies beside it."""
        names = {part: f"{module}.{part}" for part in PARTS}
        return {part: name for part, name in names.items() if name in self.shapes}

    def packing(self, module: str) -> Packing | None:
        """How the matrix at this module path is quantized; None when it is dense."""
        if f"{module}.scales" not in self.shapes:
            return None
        if self.config.quantization is None:
            raise CheckpointError(f"{module} is quantized, but the config has no 'quantization'")
        return Packing.from_config(self.config.quantization, module)

    @property
    def weight_dtype(self) -> str:
        """The safetensors dtype of most dense weights and scales.

        Our converter keeps scales in float32 where float16 would round them; what it wrote is of
        the dtype that its config names.
        """
        kinds = [kind for kind in self.dtypes.values() if kind in FLOATS]
        most = max(sorted(set(kinds)), key=kinds.count) if kinds else "F16"
        converted = self.config.quantization is not None and "provenance" in self.raw_config
        stated = FLOAT_CODES.get(self.config.dtype or "")
        return stated if converted and stated else most

    def problems(self) -> Iterator[tuple[str, list[str]]]:
        """Where the tensors don't fit the config: each problem, and the tensors that have it.

        No data is read. Opening stops at the first one, and verifying lists them all, so that both
        accept the same checkpoints.
        """
        config = self.config
        matrices: dict[str, tuple[int, int]] = dict(matrix_shapes(config))
        matrices |= dict.fromkeys(self.spare, (config.vocab_size, config.hidden_size))
        norms = [f"{module}.weight" for module in norm_paths(config)]
        known = {f"{module}.{part}" for module in matrices for part in PARTS}.union(norms)
        if any(name not in known or kind not in _HELD for name, kind in self.dtypes.items()):
            directory = self.path if self.path.is_dir() else self.path.parent
            if problem := tensor_problem(self.dtypes, directory):
                yield problem, []
                return
        expected: dict[str, tuple[tuple[int, ...], Container[str]]] = {}
        for module, (rows, columns) in matrices.items():
            try:
                packing = self.packing(module)
            except CerebrumError as error:
                yield str(error), []
                return
            if packing is None:
                expected[f"{module}.weight"] = (rows, columns), FLOATS
                continue
            scales: Container[str] = FLOATS if packing.mode == "affine" else ("U8",)
            for part, shape in packing.shapes(rows, columns).items():
                expected[f"{module}.{part}"] = shape, ("U32",) if part == "weight" else scales
        expected |= dict.fromkeys(norms, ((config.hidden_size,), FLOATS))
        found = {
            "tensors missing": [name for name in expected if name not in self.shapes],
            "tensors the model has no place for": [n for n in self.shapes if n not in expected],
            "tensors of the wrong shape": [
                f"{name} is {list(self.shapes[name])}, not {list(shape)}"
                for name, (shape, _) in expected.items()
                if name in self.shapes and self.shapes[name] != shape
            ],
            "tensors of a dtype they can't have": [
                f"{name} is {self.dtypes[name]}"
                for name, (_, allowed) in expected.items()
                if name in self.dtypes and self.dtypes[name] not in allowed
            ],
        }
        yield from ((problem, names) for problem, names in found.items() if names)

    def check(self) -> None:
        """Raise CheckpointError for the first of the `problems`, if there is one."""
        for problem, names in self.problems():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = f": {', '.join(names[:3])}{more}" if names else ""
            raise CheckpointError(f"{self.path}: {problem}{listed}")
