"""A directory of safetensors in Hugging Face's layout, as a Checkpoint."""

from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import (
    config_problem,
    directory_problem,
    folder_problem,
    stand_in,
    unfinished,
)
from mlx_cerebrum.installed import program
from mlx_cerebrum.model.config import ModelConfig, read_json
from mlx_cerebrum.model.tensors import EMBEDDING, HEAD, PARTS
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import Checkpoint, Extent
from mlx_cerebrum.weights.safetensors_file import TensorInfo, read_header

INDEX = "model.safetensors.index.json"
# Buffers that old checkpoints carry and that the architecture computes anew.
BUFFERS = ("rotary_emb.inv_freq",)
_PIECE = 2**22  # bytes compared at once
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Place = tuple[str, TensorInfo]  # the file a tensor is in, and where in it


class SafetensorsCheckpoint(Checkpoint):
    """Dense, quantized by mlx-lm, or folded. `tensors`: what the headers say, and in which file."""

    def __init__(
        self,
        path: Path,
        raw_config: dict[str, Any],
        config: ModelConfig,
        tensors: Mapping[str, Place],
    ) -> None:
        """`path`: the directory whose config and headers were read. Raises as `_as_stored` does."""
        self.path, self.raw_config, self.tensors = path, raw_config, tensors
        if _table_stored_as(config, tensors) == HEAD:
            tensors = {
                name.replace(f"{HEAD}.", f"{EMBEDDING}."): where for name, where in tensors.items()
            }
        self.config = _as_stored(config, path, tensors)
        kept = {name: info for name, (_, info) in tensors.items() if not name.endswith(BUFFERS)}
        self.shapes = {name: info.shape for name, info in kept.items()}
        self.dtypes = {name: info.dtype for name, info in kept.items()}
        spare = self.config.tie_word_embeddings and f"{HEAD}.weight" in kept
        self.spare = frozenset({HEAD} if spare else ())
        self._open: dict[str, dict[str, mx.array]] = {}

    @classmethod
    def open(cls, path: Path) -> "SafetensorsCheckpoint":
        """Read the directory's config, index and headers.

        Raises CheckpointError or ConfigError for the first of them that is no good.
        """
        raw_config, config = _config(path)
        headers = {file: read_header(path / file) for file in weight_files(path)}
        return cls._of(path, raw_config, config, headers)

    @classmethod
    def of_headers(
        cls, path: Path, headers: Mapping[str, Mapping[str, TensorInfo]]
    ) -> "SafetensorsCheckpoint":
        """A directory whose weight files are not there yet, by their headers: what is known of
        their tensors before they come. Raises as `open` does, and for a tied head that is stored
        too, since only its values say whether it is used.
        """
        raw_config, config = _config(path)
        names = {name for header in headers.values() for name in header}
        if config.tie_word_embeddings and {f"{HEAD}.weight", f"{EMBEDDING}.weight"} <= names:
            raise CheckpointError(
                f"{path.name} stores a head that its config ties to the embedding: fetch it whole"
                f" (`{program('hf')} download`), and convert that"
            )
        return cls._of(path, raw_config, config, headers)

    @classmethod
    def _of(
        cls,
        path: Path,
        raw_config: dict[str, Any],
        config: ModelConfig,
        headers: Mapping[str, Mapping[str, TensorInfo]],
    ) -> "SafetensorsCheckpoint":
        tensors: dict[str, Place] = {}
        for file, header in headers.items():
            for name, info in header.items():
                if name in tensors:
                    other = tensors[name][0]
                    raise CheckpointError(f"{path}: {name} is in both {other} and {file}")
                tensors[name] = (file, info)
        _check_index(path, tensors)
        return cls(path, raw_config, config, tensors)

    def read(self, module: str) -> dict[str, mx.array]:
        return {part: self._take(name) for part, name in self._parts(module).items()}

    def _parts(self, module: str) -> dict[str, str]:
        """The names that the module's parts are stored under."""
        if module == EMBEDDING:
            module = _table_stored_as(self.config, self.tensors)
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


def _config(path: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The directory's config.json, as it is and as it is meant.

    Raises CheckpointError where the directory is no checkpoint, ConfigError.
    """
    if problem := directory_problem(path):
        raise CheckpointError(f"{path}: {problem}")
    if not (path / "config.json").exists():
        problem = folder_problem(path) or "it has no config.json"
        raise CheckpointError(f"{path} is not a checkpoint: {problem}")
    raw_config = read_json(path / "config.json")
    if problem := config_problem(raw_config):
        raise CheckpointError(f"{path}: {problem}")
    return raw_config, ModelConfig.from_dict(raw_config, str(path / "config.json"))


def _table_stored_as(config: ModelConfig, tensors: Container[str]) -> str:
    """The module that the embedding is stored as.

    Some savers (`safetensors.torch.save_model`) store a tied table once, under the name that comes
    first in the alphabet: the head's. transformers reads that.
    """
    head_only = f"{EMBEDDING}.weight" not in tensors and f"{HEAD}.weight" in tensors
    return HEAD if config.tie_word_embeddings and head_only else EMBEDDING


def _as_stored(config: ModelConfig, path: Path, tensors: Mapping[str, Place]) -> ModelConfig:
    """The config, corrected by the tensors of the directory `path`.

    Where it ties the head to the embedding, but a head with other values is stored, that one is
    used, as in transformers (`tie_weights`). Raises CheckpointError where a file ends early.
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


def no_checkpoint(path: Path) -> str:
    """Why a file that is not GGUF can't be read."""
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


def _check_index(path: Path, tensors: Mapping[str, Place]) -> None:
    if not (path / INDEX).exists():
        return
    for name, file in read_json(path / INDEX)["weight_map"].items():
        if not name.endswith(BUFFERS) and tensors.get(name, ("",))[0] != file:
            raise CheckpointError(f"{path}: {INDEX} says {name} is in {file}; it is not")
