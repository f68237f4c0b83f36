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

from mlx_cerebrum.errors import CerebrumError, CheckpointError, ConfigError
from mlx_cerebrum.files.foreign import config_problem, directory_problem, unfinished
from mlx_cerebrum.model.config import MODEL_TYPES, ModelConfig, model_type, read_json
from mlx_cerebrum.tokenizer.tokenizer import Tokenizer
from mlx_cerebrum.weights.checkpoint import FLOATS
from mlx_cerebrum.weights.gguf_blocks import BITS, REPACKED
from mlx_cerebrum.weights.gguf_checkpoint import GGUFCheckpoint
from mlx_cerebrum.weights.gguf_file import GGUFFile
from mlx_cerebrum.weights.opening import load_tokenizer, open_checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import (
    BUFFERS,
    INDEX,
    Place,
    SafetensorsCheckpoint,
    weight_files,
)
from mlx_cerebrum.weights.safetensors_file import TensorInfo, read_header


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
    if problem := directory_problem(path):
        raise CheckpointError(f"{path}: {problem}")
    files = sorted(file.name for file in path.glob("*.safetensors"))
    if not files and not (path / INDEX).exists():
        weight_files(path)  # raises: it says what there is instead
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
    config = _config(found)
    complete = all(found.spans.get(file) is not None for file in used)
    if config is not None and complete:
        with found.catch():
            _compare(found, config, tensors)
    elif config is not None:
        found.unchecked.append("shapes against config.json: a header can't be read")
    _tokenizer(found, config, lambda eos: Tokenizer.from_directory(path, eos))
    if config is not None:
        _loads(found, path)
    code = found.config.get("model_file")
    if isinstance(code, str):
        missing = "" if (path / code).is_file() else ", which is missing"
        found.notes.append(f"config.json names code for mlx-lm to run: {code}{missing}")
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
            left = unfinished(found.path / file) if inside else ""
            found.problem(f"{file} {text}, but the index lists it{left}", INDEX, names)
        elif file in headers:
            absent = [n for n in names if n not in headers[file] and not n.endswith(BUFFERS)]
            if absent:
                found.problem(f"the index says {file} holds tensors it does not", INDEX, absent)
    used = [file for file in sorted(listed) if file in found.spans]
    for file in used:
        extra = [name for name in headers.get(file, {}) if weight_map.get(name) != file]
        if extra:  # a fault only where they are missing, or twice, elsewhere
            found.notes.append(f"{file} holds {len(extra)} tensors the index does not place there")
    _stray(found, [file for file in found.spans if file not in listed])
    metadata = index.get("metadata")
    claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(t.nbytes for file in used for t in headers.get(file, {}).values())
    if claimed is None:
        found.unchecked.append(f"the index's total_size: {INDEX} has none")
    elif len(used) == len(listed) and set(used) <= set(headers) and claimed != actual:
        found.notes.append(
            f"{INDEX}: total_size is {claimed!r:.40}, the tensors have {actual} bytes"
        )
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
        if file == "model.safetensors":
            found.problem("the index does not list it, but transformers would read it alone", file)
        elif file.startswith("model"):
            found.notes.append(f"{file} is no part of the model, but mlx-lm would load it too")
        else:
            found.notes.append(f"{file} is no part of the model")


def _config(found: Findings) -> ModelConfig | None:
    """The config, where it is one that can be run here."""
    kind = model_type(found.config)
    if not found.config:
        return None
    if problem := config_problem(found.config):
        found.problem(problem, "config.json")
    elif kind is not None and kind not in MODEL_TYPES:
        found.unchecked.append(f"shapes against config.json: model_type {kind!r} is not known here")
    else:
        with found.catch("config.json"):
            return ModelConfig.from_dict(found.config, str(found.path / "config.json"))
    return None


def _compare(found: Findings, config: ModelConfig, tensors: dict[str, Place]) -> None:
    """Names, shapes and dtypes against the config."""
    found.checked.append("names, shapes and dtypes against config.json")
    checkpoint = SafetensorsCheckpoint(found.path, found.config, config, tensors)
    if checkpoint.config != config:
        found.notes.append("config.json says the head is tied, but it is stored and differs")
    for problem, names in checkpoint.problems():
        found.problem(problem, None, names)
    kinds = {FLOATS[kind] for kind in checkpoint.dtypes.values() if kind in FLOATS}
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
            found.notes.append(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}")
        beyond = sorted(token for token in tokenizer.eos_token_ids if token >= rows)
        if beyond:
            found.notes.append(f"end tokens {beyond} are past the vocabulary of {rows}")


def _loads(found: Findings, path: Path) -> None:
    """Whatever loading refuses is a problem, seen above or not."""
    if not found.problems:
        with found.catch(path.name if path.is_file() else None):
            load_tokenizer(open_checkpoint(path))


def gguf_file(path: Path) -> Findings:
    """Examine a GGUF file, and the parts that belong to it: headers, tensors, tokenizer."""
    found = Findings(path.parent, spans={path.name: None})
    with found.catch(path.name):
        file = GGUFFile.open(path)
        found.checked.append("header")
        found.spans = {
            part.path.name: {
                t.name: Span(t.ggml_type, t.offset, t.nbytes) for t in part.tensors.values()
            }
            for part in file.parts or (file,)
        }
        kinds = {tensor.ggml_type for tensor in file.tensors.values()}
        config, odd = None, sorted(kinds - {*FLOATS, *BITS, *REPACKED})
        if odd:
            found.unchecked.append(f"shapes against metadata: types {', '.join(odd)}")
        else:
            try:
                config = GGUFCheckpoint(file).config
                found.checked.append("names, shapes and types against metadata")
            except ConfigError as error:  # another architecture: sound for its own tools
                found.unchecked.append(f"shapes against metadata: {error}")
        _tokenizer(found, config, lambda _: Tokenizer.from_gguf(file.metadata))
        if config is not None:
            _loads(found, path)
    return found
