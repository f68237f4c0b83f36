"""A checkpoint on disk: which tensors it has, checked against its config, read one at a time.

Every source (a directory of safetensors, a GGUF file) looks the same from here: a config, a
tokenizer, and tensors under Hugging Face's names. Shapes are known from headers, so a wrong
file is refused before a byte of data is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import mlx.core as mx

from mlx_cerebrum.errors import CerebrumError, CheckpointError
from mlx_cerebrum.files.foreign import (
    config_problem,
    directory_problem,
    folder_problem,
    stand_in,
    tensor_problem,
    unfinished,
)
from mlx_cerebrum.model.config import ModelConfig, read_json
from mlx_cerebrum.model.tensors import EMBEDDING, HEAD, PARTS, matrix_shapes, norm_paths
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.gguf_paths import gguf_at
from mlx_cerebrum.weights.quantize import Packing
from mlx_cerebrum.weights.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
# safetensors' names of the dtypes weights have -> torch's, which are also MLX's.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HELD = (*FLOATS, "U32", "U8")
# Buffers that old checkpoints carry and that the architecture computes anew.
BUFFERS = ("rotary_emb.inv_freq",)
_PIECE = 2**22  # bytes compared at once
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Place = tuple[str, TensorInfo]  # the file a tensor is in, and where in it


@dataclass(frozen=True)
class Extent:
    """Where an array's stored bytes lie: `offset` and `nbytes` count from the file's start."""

    path: Path
    offset: int
    nbytes: int


class Checkpoint(ABC):
    """A readable source. `shapes` maps tensor names to shapes; `read` gets one module's.

    `spare` are modules that are stored though the model never reads them: a tied model's head,
    the embedding's bytes once more. `config` is what the tensors mean: a head that says it is tied
    but is stored with other values is not, as transformers has it.
    `repacked` are matrices stored in a format MLX has none like: `read` packs them anew, as
    `packing` says, `repack` in another way, and `dense` gives what is stored.
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

        Nothing here keeps them alive: a module that is read again is read from disk again.
        """

    def dense(self, module: str) -> mx.array:
        """One matrix unpacked: float32 where it is packed, else as stored."""
        arrays, packing = self.read(module), self.packing(module)
        return packing.dequantize(arrays, mx.float32) if packing else arrays["weight"]

    def repack(self, module: str, packing: Packing) -> dict[str, mx.array]:
        """One matrix as `read` gives it, packed in this way instead of `self.packing(module)`."""
        return packing.quantize(self.dense(module))

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

    def packing(self, module: str) -> Packing | None:
        """How the matrix at this module path is quantized; None when it is dense."""
        return packing_of(self.config, self.shapes, module)

    @property
    def weight_dtype(self) -> str:
        """The safetensors dtype that most of the dense or scale values have.

        Our converter keeps the scales of packed matrices in float32 where float16 would round; then
        it is what the converter says the model is in.
        """
        kinds = [kind for kind in self.dtypes.values() if kind in FLOATS]
        most = max(sorted(set(kinds)), key=kinds.count) if kinds else "F16"
        converted = self.config.quantization is not None and "provenance" in self.raw_config
        stated = {name: code for code, name in FLOATS.items()}.get(self.config.dtype or "")
        return stated if converted and stated else most

    def check(self) -> None:
        """Compare names, shapes and dtypes with the config, without reading data.

        Raises CheckpointError naming the missing, extra or misshapen tensors.
        """
        directory = self.path if self.path.is_dir() else self.path.parent
        for problem, names in misfits(self.config, self.shapes, self.dtypes, self.spare, directory):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            listed = f": {', '.join(names[:3])}{more}" if names else ""
            raise CheckpointError(f"{self.path}: {problem}{listed}")


def packing_of(config: ModelConfig, names: Container[str], module: str) -> Packing | None:
    """How the matrix at this module path of a checkpoint with these tensors is quantized."""
    if f"{module}.scales" not in names:
        return None
    if config.quantization is None:
        raise CheckpointError(f"{module} is quantized, but the config has no 'quantization'")
    return Packing.from_config(config.quantization, module)


def described(
    config: ModelConfig, path: Path, tensors: Mapping[str, Place]
) -> tuple[ModelConfig, dict[str, tuple[int, ...]], dict[str, str], frozenset[str]]:
    """What the tensors of the directory `path` mean: the config as they have it, their shapes and
    dtypes, buffers left out, and the spare modules. Raises CheckpointError as `as_stored` does."""
    if table_stored_as(config, tensors) == HEAD:
        tensors = {
            name.replace(f"{HEAD}.", f"{EMBEDDING}."): place for name, place in tensors.items()
        }
    kept = {name: info for name, (_, info) in tensors.items() if not name.endswith(BUFFERS)}
    shapes = {name: info.shape for name, info in kept.items()}
    dtypes = {name: info.dtype for name, info in kept.items()}
    stored = as_stored(config, path, tensors)
    spare = stored.tie_word_embeddings and f"{HEAD}.weight" in kept
    return stored, shapes, dtypes, frozenset({HEAD} if spare else ())


def misfits(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    spare: Iterable[str],
    directory: Path,
) -> Iterator[tuple[str, list[str]]]:
    """What of the tensors is not as the config has it: each problem, and the tensors with it.

    Loading stops at the first one, verifying has them all: what one takes, the other does.
    directory: where the checkpoint lies, and perhaps what its quantizer left.
    """
    matrices: dict[str, tuple[int, int]] = dict(matrix_shapes(config))
    matrices |= dict.fromkeys(spare, (config.vocab_size, config.hidden_size))
    norms = [f"{module}.weight" for module in norm_paths(config)]
    known = {f"{module}.{part}" for module in matrices for part in PARTS}.union(norms)
    odd = any(name not in known or kind not in _HELD for name, kind in dtypes.items())
    if odd and (problem := tensor_problem(dtypes, directory)):
        yield problem, []
        return
    expected: dict[str, tuple[tuple[int, ...], Container[str]]] = {}
    for module, (rows, columns) in matrices.items():
        try:
            packing = packing_of(config, shapes, module)
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
        "tensors missing": [name for name in expected if name not in shapes],
        "tensors the model has no place for": [name for name in shapes if name not in expected],
        "tensors of the wrong shape": [
            f"{name} is {list(shapes[name])}, not {list(shape)}"
            for name, (shape, _) in expected.items()
            if name in shapes and shapes[name] != shape
        ],
        "tensors of a dtype they can't have": [
            f"{name} is {dtypes[name]}"
            for name, (_, allowed) in expected.items()
            if name in dtypes and dtypes[name] not in allowed
        ],
    }
    yield from ((problem, names) for problem, names in found.items() if names)


class SafetensorsCheckpoint(Checkpoint):
    """A directory in Hugging Face's layout: dense, mlx-lm quantized, or folded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if problem := directory_problem(path):
            raise CheckpointError(f"{path}: {problem}")
        if not (path / "config.json").exists():
            problem = folder_problem(path) or "it has no config.json"
            raise CheckpointError(f"{path} is not a checkpoint: {problem}")
        self.raw_config = read_json(path / "config.json")
        if problem := config_problem(self.raw_config):
            raise CheckpointError(f"{path}: {problem}")
        self.config = ModelConfig.from_dict(self.raw_config, str(path / "config.json"))
        self.files = weight_files(path)
        self.tensors: dict[str, Place] = {}
        for file in self.files:
            for name, info in read_header(path / file).items():
                if name in self.tensors:
                    other = self.tensors[name][0]
                    raise CheckpointError(f"{path}: {name} is in both {other} and {file}")
                self.tensors[name] = (file, info)
        self._check_index()
        self.config, self.shapes, self.dtypes, self.spare = described(
            self.config, path, self.tensors
        )
        self._open: dict[str, dict[str, mx.array]] = {}

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in read_json(self.path / INDEX)["weight_map"].items():
            if not name.endswith(BUFFERS) and self.tensors.get(name, ("",))[0] != file:
                raise CheckpointError(f"{self.path}: {INDEX} says {name} is in {file}; it is not")

    def read(self, module: str) -> dict[str, mx.array]:
        return {part: self._take(name) for part, name in self._parts(module).items()}

    def _parts(self, module: str) -> dict[str, str]:
        """The names that the module's parts are stored under."""
        if module == EMBEDDING:
            module = table_stored_as(self.config, self.tensors)
        names = {part: f"{module}.{part}" for part in PARTS}
        return {part: name for part, name in names.items() if name in self.tensors}

    def extents(self, module: str) -> dict[str, Extent]:
        found = {part: self.tensors[name] for part, name in self._parts(module).items()}
        return {
            part: Extent(self.path / file, info.offset, info.nbytes)
            for part, (file, info) in found.items()
        }

    def _take(self, name: str) -> mx.array:
        # mx.load is lazy: opening a file reads its header, evaluating an array its bytes.
        file = self.tensors[name][0]
        if name not in self._open.get(file, {}):
            try:
                loaded = mx.load(str(self.path / file))
            except RuntimeError as error:
                raise CheckpointError(f"{self.path / file}: {error}") from None
            assert isinstance(loaded, dict)
            self._open[file] = loaded
        return self._open[file].pop(name)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_directory(self.path, self.config.eos_token_ids)


def table_stored_as(config: ModelConfig, tensors: Container[str]) -> str:
    """The module whose tensors are the embedding's.

    Of a tied table some savers keep only the head's name, the first of the two in the alphabet
    (`safetensors.torch.save_model`); transformers reads that.
    """
    head_only = f"{EMBEDDING}.weight" not in tensors and f"{HEAD}.weight" in tensors
    return HEAD if config.tie_word_embeddings and head_only else EMBEDDING


def as_stored(config: ModelConfig, path: Path, tensors: Mapping[str, Place]) -> ModelConfig:
    """The config as the tensors of the directory `path` have it.

    A head that `tie_word_embeddings` calls the embedding, but is stored with other values, is used
    as it is stored: transformers does that (`tie_weights`). Raises CheckpointError where a file
    ends early.
    """
    if not config.tie_word_embeddings or f"{HEAD}.weight" not in tensors:
        return config

    def parts(module: str) -> dict[str, Place]:
        return {part: tensors[n] for part in PARTS if (n := f"{module}.{part}") in tensors}

    head, table = parts(HEAD), parts(EMBEDDING)
    alike = head.keys() == table.keys() and all(_alike(path, head[p], table[p]) for p in head)
    return config if alike else replace(config, tie_word_embeddings=False)


def _alike(path: Path, one: Place, other: Place) -> bool:
    """Whether two tensors are the same to the byte; a piece at a time, of files of any size."""
    (file, info), (other_file, other_info) = one, other
    if (info.dtype, info.shape) != (other_info.dtype, other_info.shape):
        return False
    with (path / file).open("rb") as first, (path / other_file).open("rb") as second:
        first.seek(info.offset)
        second.seek(other_info.offset)
        for start in range(0, info.nbytes, _PIECE):
            size = min(_PIECE, info.nbytes - start)
            piece = first.read(size)
            if len(piece) != size:
                raise CheckpointError(f"{path / file} is truncated")
            if piece != second.read(size):
                return False
    return True


def open_checkpoint(path: Path) -> Checkpoint:
    """A directory or a GGUF file, its tensors checked against its config (see `gguf_at`).

    Raises CheckpointError or ConfigError, one line each, for anything else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if (gguf := gguf_at(path)) is not None:
        from mlx_cerebrum.weights.gguf_checkpoint import GGUFCheckpoint  # brings numpy: 0.1 s

        checkpoint: Checkpoint = GGUFCheckpoint(gguf)
    elif path.is_dir():
        checkpoint = SafetensorsCheckpoint(path)
    else:
        raise CheckpointError(no_checkpoint(path))
    checkpoint.check()
    return checkpoint


def no_checkpoint(path: Path) -> str:
    """Why a file that is no GGUF can't be read."""
    if problem := stand_in(path):
        return problem
    if any(path.match(pattern) for pattern in _PICKLES):
        return f"{path} is a pickle, which can run code: convert it to safetensors"
    return f"{path} is not a checkpoint: name its directory, or a GGUF file"


def weight_files(path: Path) -> list[str]:
    """The safetensors files of a directory, from its index where it has one.

    Raises CheckpointError for none, for pickles only, and for an index that points elsewhere.
    """
    if (path / INDEX).exists():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path / INDEX} has no weight_map")
        for name, file in weight_map.items():
            inside = isinstance(file, str) and Path(file).name == file and "\\" not in file
            if not inside or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path / INDEX}: {name} is said to be in {file!r}, which is not a safetensors"
                    " file of the directory"
                )
            if not (path / file).is_file():
                raise CheckpointError(
                    f"{path / file} is missing, but {INDEX} lists it{unfinished(path / file)}"
                )
        files = sorted(set(weight_map.values()))
        if "model.safetensors" not in files and (path / "model.safetensors").exists():
            raise CheckpointError(
                f"{path} has model.safetensors beside {INDEX}, which does not list it; tools differ"
                " in which they read: remove one"
            )
        return files
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{path} has {len(found)} safetensors files but no {INDEX}: fetch it too"
        )
    if problem := folder_problem(path):
        raise CheckpointError(f"{path} has no safetensors files: {problem}")
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{path} has only pickled weights (.bin), which can run code: convert them to"
            " safetensors"
        )
    raise CheckpointError(f"{path} has no safetensors files")
