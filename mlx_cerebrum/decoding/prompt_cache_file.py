"""A conversation's caches on disk: one safetensors file, resumed only by a run that it fits.

Tensors: `tokens`, `starts` (which token each position's first entry belongs to), for position n
`keys.n` and `values.n` (`.weight`, `.scales`, `.biases` where packed), and `checksum`, the CRC-32
of everything before it, last. The metadata names the format and the identity: all that decides
what a cache entry is.
"""

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from mlx_cerebrum.decoding.prompt_cache import PromptCache
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files import json_file
from mlx_cerebrum.files.replacing import replacing
from mlx_cerebrum.model.entries import Packed, kv_group
from mlx_cerebrum.model.forward import Model
from mlx_cerebrum.model.memory import human, require
from mlx_cerebrum.weights.identity import Identity
from mlx_cerebrum.weights.safetensors_file import (
    CODES,
    ITEM_BYTES,
    TensorInfo,
    header_bytes,
    read_whole_header,
)

FORMAT = "mlx-cerebrum prompt cache"
VERSION = "1"
SUFFIX = ".safetensors"
PARTS = ("keys", "values")
_MOST_MARKS = 1000  # three a turn: more are as good as none, and each costs time
_CHUNK = 1 << 22
_SLACK = 1 << 20  # the file system's own
_NEW = "name another file, or remove it"


def check_destination(path: Path) -> None:
    """Raise CheckpointError, before any work, where `save_prompt_cache` could not write.

    That is: no such directory, another suffix, or a file that is not a prompt cache.
    """
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path} must be named *{SUFFIX} to hold a prompt cache")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path.absolute().parent} does not exist; make it first")
    if path.exists():
        _read(path)


def save_prompt_cache(prompt_cache: PromptCache, path: Path, identity: Identity) -> None:
    """Write the caches, with the entries that are kept from before their windows.

    An existing file is replaced only by a whole one. Raises CheckpointError when `path` is
    something else's, when the disk has no room, and when writing fails.
    """
    check_destination(path)
    tensors = {name: (CODES[a.dtype], a.shape) for name, a in _tensors(prompt_cache)}
    tensors["checksum"] = ("U32", (1,))
    head = header_bytes(tensors, _described(prompt_cache, identity))
    destination = path.resolve()
    free = shutil.disk_usage(destination.parent).free
    needed = len(head) + sum(prod(s) * ITEM_BYTES[d] for d, s in tensors.values())
    if needed + _SLACK > free:
        raise CheckpointError(
            f"{path} needs {human(needed)} of disk and {human(free)} are free; free some space"
        )
    try:
        partial = destination.with_name(f".{destination.stem}.partial{SUFFIX}")
        with replacing(destination, partial) as file:
            checksum = zlib.crc32(head)
            file.write(head)
            for _, array in _tensors(prompt_cache):
                entries = memoryview(cast(Any, mx.contiguous(array).view(mx.uint8)))
                checksum = zlib.crc32(entries, checksum)
                file.write(entries)
            file.write(struct.pack("<I", checksum))
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror or error}") from None


def _described(prompt_cache: PromptCache, identity: Identity) -> dict[str, str]:
    marks = json.dumps(prompt_cache.cache[0].marks)
    bits = str(prompt_cache.kv_bits or "none")
    return {"format": FORMAT, "version": VERSION, "marks": marks, **identity, "kv-bits": bits}


def _tensors(prompt_cache: PromptCache) -> Iterator[tuple[str, mx.array]]:
    """What a file holds besides the checksum, in order; each computed when it is asked for."""
    yield "tokens", mx.array(prompt_cache.tokens, mx.int32)
    cache = prompt_cache.cache if prompt_cache.tokens else []
    yield "starts", mx.array([c.whole().start for c in cache], mx.int32)
    for position, c in enumerate(cache):
        stretch = c.whole()  # one at a time: joined, it is a copy
        for kind, entries in zip(PARTS, (stretch.keys, stretch.values), strict=True):
            yield from _named(f"{kind}.{position}", entries)


def _named(name: str, entries: mx.array | Packed) -> Iterator[tuple[str, mx.array]]:
    if isinstance(entries, Packed):
        yield from ((f"{name}.{part}", a) for part, a in entries._asdict().items())
    else:
        yield name, entries


def check_prompt_cache(path: Path, identity: Identity, kv_bits: int | None = None) -> int:
    """The bytes `load_prompt_cache` would take; no model is needed.

    Raises CheckpointError where `load_prompt_cache` would.
    """
    return sum(tensor.nbytes for tensor in _checked(path, identity, kv_bits)[0].values())


def _checked(
    path: Path, identity: Identity, kv_bits: int | None
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The header of a prompt cache, which must have been made as one would be here."""
    tensors, metadata = _read(path)
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} has format {metadata.get('version')}, not {VERSION}; {_NEW}")
    here = identity | {"kv-bits": str(kv_bits or "none")}
    differing = [
        f"{name} ({metadata.get(name, 'not named')}, here {value})"
        for name, value in here.items()
        if metadata.get(name) != value
    ]
    if differing:
        raise CheckpointError(f"{path} was made with another {' and '.join(differing)}; {_NEW}")
    return tensors, metadata


def load_prompt_cache(
    path: Path,
    model: Model,
    identity: Identity,
    kv_bits: int | None = None,
    max_bytes: int | None = None,
) -> PromptCache:
    """The PromptCache that `save_prompt_cache` wrote, to go on from.

    Raises CheckpointError, naming what differs, unless the same model, read and run the same
    way, made it; and for a file that is damaged or something else. MemoryBudgetError when it
    can't fit.
    """
    header, metadata = _checked(path, identity, kv_bits)
    require(sum(t.nbytes for t in header.values()), f"the prompt cache {path}", _NEW)
    prompt_cache = PromptCache(model, kv_bits, max_bytes)
    _check_sum(path, header)
    _restore(prompt_cache, path, model, header, metadata)
    return prompt_cache


def _read(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """A prompt cache's header. Raises CheckpointError for any other file."""
    tensors, metadata = read_whole_header(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is safetensors, but not a prompt cache; name another file")
    return tensors, metadata


def _check_sum(path: Path, header: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError unless every byte of the file is as it was written."""
    stored = header.get("checksum")
    if stored is None or (stored.dtype, stored.shape) != ("U32", (1,)):
        raise CheckpointError(f"{path} is damaged: it has no checksum; {_NEW}")
    checksum, left = 0, stored.offset
    try:
        with path.open("rb") as file:
            while left and (data := file.read(min(_CHUNK, left))):
                checksum, left = zlib.crc32(data, checksum), left - len(data)
            (wanted,) = struct.unpack("<I", file.read(4).ljust(4))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from None
    if left or checksum != wanted:
        raise CheckpointError(f"{path} is damaged: its checksum is wrong; {_NEW}")


def _restore(
    prompt_cache: PromptCache,
    path: Path,
    model: Model,
    header: dict[str, TensorInfo],
    metadata: dict[str, str],
) -> None:
    """Fill an empty cache from a file whose bytes are sound; its shapes must be the model's."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: {what}; {_NEW}")

    try:
        loaded = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise refuse(f"MLX can't read it: {error}") from None
    assert isinstance(loaded, dict)
    for name in ("tokens", "starts"):
        if name not in header or header[name].dtype != "I32" or len(header[name].shape) != 1:
            raise refuse(f"it has no {name}")
    (offset,), (positions,) = header["tokens"].shape, header["starts"].shape
    if offset > (most := model.config.max_position_embeddings):
        raise refuse(f"it has {offset} tokens, the model {most} at most")
    if positions != (len(prompt_cache.cache) if offset else 0):
        raise refuse(f"it has {positions} positions, the model {len(prompt_cache.cache)}")
    tokens, starts = (cast(list[int], loaded[name].tolist()) for name in ("tokens", "starts"))
    if any(not 0 <= token < model.config.vocab_size for token in tokens):
        raise refuse("it has tokens the model has not")
    seen = prompt_cache.cache[0].window
    visible = offset if seen is None else min(offset, seen - 1)
    if any(not 0 <= start <= offset - visible for start in starts):
        raise refuse("it lacks entries of the window")
    expected = {
        name: shape
        for position, start in enumerate(starts)
        for name, shape in _shapes(model, position, offset - start, prompt_cache.kv_bits).items()
    }
    found = {name: (t.dtype, t.shape) for name, t in header.items()}
    for name in ("tokens", "starts", "checksum"):
        del found[name]
    if wrong := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        raise refuse(f"{wrong[0]} is {found.get(wrong[0])}, the model's {expected.get(wrong[0])}")
    marks = json_file.parse(metadata.get("marks", ""), f"{path}: the marks", CheckpointError)
    if not isinstance(marks, list) or not all(type(mark) is int for mark in marks):
        raise refuse("its marks are not a list of whole numbers")
    for position, (start, layer_cache) in enumerate(zip(starts, prompt_cache.cache, strict=False)):
        keys, values = (_entries(loaded, f"{kind}.{position}") for kind in PARTS)
        mx.eval(keys, values)
        settings = layer_cache.state[4:]
        layer_cache.state = (keys, values, offset, start, *settings)
    prompt_cache.tokens = tokens
    for mark in sorted(set(marks).intersection(range(offset + 1)))[-_MOST_MARKS:]:
        if all(c.reachable(mark) == mark for c in prompt_cache.cache):
            for layer_cache in prompt_cache.cache:
                layer_cache.mark(mark)


def _entries(loaded: dict[str, mx.array], name: str) -> mx.array | Packed:
    if name in loaded:
        return loaded.pop(name)
    return Packed(*(loaded.pop(f"{name}.{part}") for part in Packed._fields))


def _shapes(
    model: Model, position: int, length: int, bits: int | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Safetensors dtypes and shapes of one position's `length` entries, by name."""
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    dtype = CODES[model.dtype]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for kind in PARTS:
        name = f"{kind}.{position}"
        if bits is None:
            found[name] = (dtype, (1, heads, length, width))
            continue
        groups = (dtype, (1, heads, length, width // kv_group(width)))
        found[f"{name}.weight"] = ("U32", (1, heads, length, width * bits // 32))
        found |= {f"{name}.scales": groups, f"{name}.biases": groups}
    return found
