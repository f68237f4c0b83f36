"""A checkpoint on disk: which tensors it has, checked against its config, read one at a time.

Every source (a directory of safetensors, a GGUF file) looks the same from here: a config, a
tokenizer, and tensors under Hugging Face's names. Shapes are known from headers, so a wrong
file is refused before a byte of data is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_cerebrum.config import ModelConfig, read_json
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.quantize import Packing
from mlx_cerebrum.safetensors_file import TensorInfo, read_header
from mlx_cerebrum.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"
# safetensors' names of the dtypes weights have -> torch's, which are also MLX's.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that old checkpoints carry and that the architecture computes anew.
_BUFFERS = ("rotary_emb.inv_freq",)
_PARTS = ("weight", "scales", "biases")  # of a module, those that are not weight where it is packed
_PIECE = 2**22  # bytes compared at once
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Place = tuple[str, TensorInfo]  # the file a tensor is in, and where in it


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every weight matrix of the stored model: module path -> `[out, in]`."""
    D, width = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    inner = config.intermediate_size
    block = {
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "mlp.gate_proj": (inner, D),
        "mlp.up_proj": (inner, D),
        "mlp.down_proj": (D, inner),
    }
    shapes = {"model.embed_tokens": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    return shapes if config.tie_word_embeddings else shapes | {"lm_head": (config.vocab_size, D)}


def norm_names(config: ModelConfig) -> list[str]:
    """Every RMSNorm weight, `[D]`."""
    kinds = ("input_layernorm", "post_attention_layernorm")
    blocks = range(config.num_hidden_layers)
    return [f"model.layers.{i}.{kind}.weight" for i in blocks for kind in kinds] + [
        "model.norm.weight"
    ]


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
    """

    path: Path
    config: ModelConfig
    raw_config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    spare: frozenset[str] = frozenset()

    @abstractmethod
    def read(self, module: str) -> dict[str, mx.array]:
        """The arrays of one module (`weight`; `scales` and `biases` where it is quantized).

        Nothing here keeps them alive: a module that is read again is read from disk again.
        """

    @abstractmethod
    def extents(self, module: str) -> dict[str, Extent]:
        """Where the module's parts are stored, in whatever format they are."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer: ...

    def packing(self, module: str) -> Packing | None:
        """How the matrix at this module path is quantized; None when it is dense."""
        if f"{module}.scales" not in self.shapes:
            return None
        if self.config.quantization is None:
            raise CheckpointError(
                f"{self.path}: {module} is quantized, but the config has no 'quantization'"
            )
        return Packing.from_config(self.config.quantization, module)

    @property
    def weight_dtype(self) -> str:
        """The safetensors dtype that most of the dense or scale values have."""
        kinds = [kind for kind in self.dtypes.values() if kind in FLOATS]
        return max(sorted(set(kinds)), key=kinds.count) if kinds else "F16"

    def check(self) -> None:
        """Compare names, shapes and dtypes with the config, without reading data.

        Raises CheckpointError naming the missing, extra or misshapen tensors.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for module, (rows, columns) in matrix_shapes(self.config).items():
            if packing := self.packing(module):
                shapes = packing.shapes(rows, columns)
                expected |= {f"{module}.{name}": shape for name, shape in shapes.items()}
            else:
                expected[f"{module}.weight"] = (rows, columns)
        for module in self.spare:  # a head like the one that is used
            rows, columns = self.config.vocab_size, self.config.hidden_size
            packing = self.packing(module)
            table = packing.shapes(rows, columns) if packing else {"weight": (rows, columns)}
            expected |= {f"{module}.{part}": shape for part, shape in table.items()}
        expected |= dict.fromkeys(norm_names(self.config), (self.config.hidden_size,))

        def refuse(problem: str, names: list[str]) -> None:
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise CheckpointError(f"{self.path}: {problem}: {', '.join(names[:3])}{more}")

        refuse("tensors missing", [name for name in expected if name not in self.shapes])
        refuse("tensors the model has no place for", [n for n in self.shapes if n not in expected])
        wrong = [
            f"{name} is {list(self.shapes[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if self.shapes[name] != shape
        ]
        refuse("tensors of the wrong shape", wrong)
        odd = [
            f"{name} is {self.dtypes[name]}"
            for name in expected
            if self.dtypes[name] not in self._dtypes_allowed(name)
        ]
        refuse("tensors of a dtype they can't have", odd)

    def _dtypes_allowed(self, name: str) -> set[str]:
        module, _, part = name.rpartition(".")
        packing = self.packing(module)
        if packing is None or (packing.mode == "affine" and part != "weight"):
            return set(FLOATS)
        return {"U32"} if part == "weight" else {"U8"}


class SafetensorsCheckpoint(Checkpoint):
    """A directory in Hugging Face's layout: dense, mlx-lm quantized, or folded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "adapter_config.json").exists():
            raise CheckpointError(
                f"{path} holds a LoRA adapter, which is not supported: merge it into its base first"
            )
        self.raw_config = read_json(path / "config.json") if _has_config(path) else {}
        self.config = ModelConfig.from_dict(self.raw_config, str(path / "config.json"))
        self.files = weight_files(path)
        self.tensors: dict[str, Place] = {}
        for file in self.files:
            for name, info in read_header(path / file).items():
                if name in self.tensors:
                    other = self.tensors[name][0]
                    raise CheckpointError(f"{path}: {name} is in both {other} and {file}")
                if not name.endswith(_BUFFERS):
                    self.tensors[name] = (file, info)
        self._check_index()
        self.shapes = {name: info.shape for name, (_, info) in self.tensors.items()}
        self.dtypes = {name: info.dtype for name, (_, info) in self.tensors.items()}
        if self.config.tie_word_embeddings and "lm_head.weight" in self.tensors:
            self.config = as_stored(self.config, path, self.tensors)
            if self.config.tie_word_embeddings:
                self.spare = frozenset({"lm_head"})
        self._open: dict[str, dict[str, mx.array]] = {}

    def _check_index(self) -> None:
        if not (self.path / INDEX).exists():
            return
        for name, file in read_json(self.path / INDEX)["weight_map"].items():
            if not name.endswith(_BUFFERS) and self.tensors.get(name, ("",))[0] != file:
                raise CheckpointError(f"{self.path}: {INDEX} says {name} is in {file}; it is not")

    def read(self, module: str) -> dict[str, mx.array]:
        return {part: self._take(f"{module}.{part}") for part in self.extents(module)}

    def extents(self, module: str) -> dict[str, Extent]:
        names = {part: f"{module}.{part}" for part in _PARTS}
        found = {part: self.tensors[n] for part, n in names.items() if n in self.tensors}
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


def as_stored(config: ModelConfig, path: Path, tensors: Mapping[str, Place]) -> ModelConfig:
    """The config as the tensors of the directory `path` have it.

    A head that `tie_word_embeddings` calls the embedding, but is stored with other values, is used
    as it is stored: transformers does that (`tie_weights`). Raises CheckpointError where a file
    ends early.
    """
    if not config.tie_word_embeddings or "lm_head.weight" not in tensors:
        return config

    def parts(module: str) -> dict[str, Place]:
        return {part: tensors[n] for part in _PARTS if (n := f"{module}.{part}") in tensors}

    head, table = parts("lm_head"), parts("model.embed_tokens")
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
    """A directory or a `.gguf` file, its tensors checked against its config.

    Raises CheckpointError or ConfigError, one line each, for anything else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    checkpoint = SafetensorsCheckpoint(path) if path.is_dir() else _open_file(path)
    checkpoint.check()
    return checkpoint


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        from mlx_cerebrum.gguf_checkpoint import GGUFCheckpoint  # brings numpy: 0.1 s

        return GGUFCheckpoint(path)
    if any(path.match(pattern) for pattern in _PICKLES):
        raise CheckpointError(f"{path} is a pickle, which can run code: convert it to safetensors")
    raise CheckpointError(f"{path} is not a checkpoint: name its directory, or a .gguf file")


def _has_config(path: Path) -> bool:
    if (path / "config.json").exists():
        return True
    raise CheckpointError(f"{path} is not a checkpoint: it has no config.json")


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
                raise CheckpointError(f"{path / file} is missing, but {INDEX} lists it")
        return sorted(set(weight_map.values()))
    if (path / "model.safetensors").exists():
        return ["model.safetensors"]
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(f"{path} has {len(found)} safetensors files but no {INDEX}")
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{path} has only pickled weights (.bin), which can run code: convert them to"
            " safetensors"
        )
    raise CheckpointError(f"{path} has no safetensors files")
