"""What a checkpoint's headers, index, config and tokenizer say, and where they disagree.

No weight is read here. Unlike opening a checkpoint, which stops at the first fault, every
finding is kept.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_cerebrum import gguf
from mlx_cerebrum.checkpoint import FLOATS, INDEX, Place, as_stored, matrix_shapes, norm_names
from mlx_cerebrum.config import MODEL_TYPES, ModelConfig, model_type, read_json
from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.gguf_blocks import BITS
from mlx_cerebrum.gguf_file import GGUFFile
from mlx_cerebrum.quantize import Packing
from mlx_cerebrum.safetensors_file import TensorInfo, read_header
from mlx_cerebrum.tokenizer import Tokenizer

_BUFFERS = ("rotary_emb.inv_freq",)  # what old checkpoints carry and every loader computes anew


@dataclass(frozen=True)
class Span:
    """A tensor's bytes in a file; `dtype` is safetensors' or ggml's name."""

    dtype: str
    offset: int
    nbytes: int


@dataclass
class Findings:
    """What was found about the checkpoint at `path`; `spans` is None for an unreadable header."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    spans: dict[str, dict[str, Span] | None] = field(default_factory=dict)  # by file
    problems: list[dict[str, Any]] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, text: str, file: str | None = None, tensors: Iterable[str] = ()) -> None:
        self.problems.append({"file": file, "problem": text, "tensors": list(tensors)})

    @contextmanager
    def catch(self, file: str | None = None) -> Iterator[None]:
        """Make an error of the body a problem, its path given once."""
        try:
            yield
        except CerebrumError as error:
            text = str(error)
            for prefix in (self.path / (file or ""), self.path):
                text = text.removeprefix(f"{prefix}: ").removeprefix(f"{prefix} ")
            self.problem(text.replace(f"{self.path}{os.sep}", ""), file)


def directory(path: Path) -> Findings:
    """Examine a directory of safetensors. Raises CheckpointError when it holds none."""
    found = Findings(path)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files and not (path / INDEX).exists():
        raise CheckpointError(f"{path} has no safetensors files")
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        found.spans[file] = None
        with found.catch(file):
            headers[file] = read_header(path / file)
            spans = {n: Span(t.dtype, t.offset, t.nbytes) for n, t in headers[file].items()}
            found.spans[file] = spans
    found.checked.append("headers")
    used = _indexed(found, headers) if (path / INDEX).exists() else _unindexed(found, files)
    tensors: dict[str, Place] = {}
    for file in used:
        twice = [name for name in headers.get(file, {}) if name in tensors]
        if twice:
            found.problem("tensors that an earlier file has too", file, twice)
        tensors |= {name: (file, info) for name, info in headers.get(file, {}).items()}
    with found.catch("config.json"):
        found.config = read_json(path / "config.json")
    config = _config(found) if found.config else None
    complete = all(found.spans.get(file) is not None for file in used)
    if config is not None and complete:
        stored = as_stored(config, path, tensors)
        if stored != config:
            found.notes.append("config.json says the head is tied, but it is stored and differs")
        _compare(found, stored, {name: info for name, (_, info) in tensors.items()})
    elif config is not None:
        found.unchecked.append("shapes against config.json: a header can't be read")
    _tokenizer(found, config, lambda eos: Tokenizer.from_directory(path, eos))
    code = found.config.get("model_file")
    if isinstance(code, str):
        found.notes.append(f"config.json names code for mlx-lm to run: {code}")
        if not (path / code).is_file():
            found.problem(f"model_file {code} is missing", "config.json")
    return found


def _indexed(found: Findings, headers: dict[str, dict[str, TensorInfo]]) -> list[str]:
    """Compare index and headers, both ways; the present files that the index lists."""
    weight_map: Any = None
    with found.catch(INDEX):
        index = read_json(found.path / INDEX)
        weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if weight_map is not None or not found.problems or found.problems[-1]["file"] != INDEX:
            found.problem("it has no weight_map", INDEX)
        return sorted(headers)
    found.checked.append("index against headers")
    listed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        listed.setdefault(str(file), []).append(name)
    for file, names in sorted(listed.items()):
        if file not in found.spans:
            inside = Path(file).name == file and file.endswith(".safetensors")
            text = "is missing" if inside else "is not a safetensors file of the directory"
            found.problem(f"{file} {text}, but the index lists it", INDEX, names)
        elif file in headers:
            absent = [name for name in names if name not in headers[file]]
            if absent:
                found.problem(f"the index says {file} holds tensors it does not", INDEX, absent)
    used = [file for file in sorted(listed) if file in found.spans]
    for file in used:
        extra = [name for name in headers.get(file, {}) if weight_map.get(name) != file]
        if extra:
            found.problem(f"{file} holds tensors the index does not place there", INDEX, extra)
    _stray(found, [file for file in found.spans if file not in listed])
    metadata = index.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(t.nbytes for file in used for t in headers.get(file, {}).values())
    if claimed is None:
        found.unchecked.append(f"the index's total_size: {INDEX} has none")
    elif len(used) == len(listed) and set(used) <= set(headers) and claimed != actual:
        found.problem(f"total_size is {claimed!r}, the tensors have {actual} bytes", INDEX)
    return used


def _unindexed(found: Findings, files: list[str]) -> list[str]:
    if "model.safetensors" in files:
        _stray(found, [file for file in files if file != "model.safetensors"])
        return ["model.safetensors"]
    if len(files) > 1:
        found.problem(f"{len(files)} safetensors files, but no {INDEX}")
    return files


def _stray(found: Findings, files: list[str]) -> None:
    """Weight files that are no part of the model: mlx-lm loads every `model*.safetensors`,
    and transformers prefers `model.safetensors` to an index."""
    for file in files:
        if file.startswith("model"):
            found.problem("it is no part of the model, but mlx-lm would load it too", file)
        else:
            found.notes.append(f"{file} is no part of the model")


def _config(found: Findings) -> ModelConfig | None:
    kind = model_type(found.config)
    if kind not in MODEL_TYPES:
        found.unchecked.append(f"shapes against config.json: model_type {kind!r} is not known here")
        return None
    with found.catch("config.json"):
        return ModelConfig.from_dict(found.config, str(found.path / "config.json"))
    return None


def _compare(found: Findings, config: ModelConfig, tensors: dict[str, TensorInfo]) -> None:
    """Names, shapes and dtypes against the config."""
    found.checked.append("names, shapes and dtypes against config.json")
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for module, (rows, columns) in matrix_shapes(config).items():
        if f"{module}.scales" not in tensors:
            expected[f"{module}.weight"] = (rows, columns), tuple(FLOATS)
            continue
        if config.quantization is None:
            found.problem(f"{module} is quantized, but there is no 'quantization'", "config.json")
            return
        try:
            packing = Packing.from_config(config.quantization, module)
        except ConfigError as error:
            found.problem(str(error), "config.json")
            return
        scales = tuple(FLOATS) if packing.mode == "affine" else ("U8",)
        for part, shape in packing.shapes(rows, columns).items():
            expected[f"{module}.{part}"] = shape, ("U32",) if part == "weight" else scales
    expected |= dict.fromkeys(norm_names(config), ((config.hidden_size,), tuple(FLOATS)))
    unused = ("lm_head.",) if config.tie_word_embeddings else ()
    wrong = {
        "tensors missing": [name for name in expected if name not in tensors],
        "tensors the model has no place for": [
            name
            for name in tensors
            if name not in expected and not name.endswith(_BUFFERS) and not name.startswith(unused)
        ],
        "tensors of the wrong shape": [
            f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
            for name, (shape, _) in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
        "tensors of a dtype they can't have": [
            f"{name} is {tensors[name].dtype}"
            for name, (_, dtypes) in expected.items()
            if name in tensors and tensors[name].dtype not in dtypes
        ],
    }
    for text, names in wrong.items():
        if names:
            found.problem(text, None, names)
    kinds = {FLOATS[tensor.dtype] for tensor in tensors.values() if tensor.dtype in FLOATS}
    if config.dtype is not None and kinds and config.dtype not in kinds:
        found.notes.append(f"config.json says {config.dtype}, the tensors are {sorted(kinds)}")


def _tokenizer(
    found: Findings, config: ModelConfig | None, read: Callable[[tuple[int, ...]], Tokenizer]
) -> None:
    """Whether the tokenizer loads, and names no token the model has no row for."""
    if config is None:  # another architecture's may be of a kind that is not known here
        found.unchecked.append("the tokenizer")
        return
    found.checked.append("tokenizer")
    with found.catch():
        tokenizer, rows = read(config.eos_token_ids), config.vocab_size
        if tokenizer.vocab_size > rows:
            found.problem(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
        beyond = sorted(token for token in tokenizer.eos_token_ids if token >= rows)
        if beyond:
            found.problem(f"end tokens {beyond} are past the vocabulary of {rows}")


def gguf_file(path: Path) -> Findings:
    """Examine a GGUF file: header, tensors against metadata, tokenizer."""
    found = Findings(path.parent, spans={path.name: None})
    with found.catch(path.name):
        file = GGUFFile.open(path)
        tensors = file.tensors.values()
        found.checked.append("header")
        found.spans[path.name] = {t.name: Span(t.ggml_type, t.offset, t.nbytes) for t in tensors}
        config, odd = None, sorted({t.ggml_type for t in tensors} - {*FLOATS, *BITS})
        if odd:
            found.unchecked.append(f"shapes against metadata: types {', '.join(odd)}")
        elif file.metadata.get("split.count", 1) not in (0, 1):
            found.unchecked.append("shapes against metadata: one part of several")
        else:
            try:
                config, _ = gguf.model_config(file)
                found.checked.append("names, shapes and types against metadata")
            except ConfigError as error:  # another architecture: sound for its own tools
                found.unchecked.append(f"shapes against metadata: {error}")
        _tokenizer(found, config, lambda _: Tokenizer.from_gguf(file.metadata))
    return found
