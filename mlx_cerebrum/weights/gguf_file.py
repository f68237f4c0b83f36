"""The GGUF container: typed metadata and a table of tensors, read without trusting either.

Layout (little endian): magic, version, tensor count, metadata count; the metadata as
key, type, value; the tensor table as name, dimensions, type, offset; padding to
`general.alignment`; the tensors. No count, length or offset is believed until the bytes it
speaks of are found, and none decides how much memory is taken.
"""

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.files.foreign import stand_in
from mlx_cerebrum.weights.gguf_paths import MAGIC, part_paths

# Metadata and tensor table together; the largest vocabularies take about 15 MB.
MAX_HEADER = 64 << 20
# Values become Python objects of up to 100 times their size, so their number is bounded too:
# those in arrays (a vocabulary of 256 thousand tokens, with merges, scores and types, has 1.3
# million), and keys and tensors (some hundred).
MAX_VALUES = 2_000_000
MAX_ENTRIES = 100_000

# ggml's tensor types: number -> (name, elements in a block, bytes of a block).
# fmt: off
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 15: ("Q8_K", 256, 292),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on
BLOCK_WEIGHTS = {name: elements for name, elements, _ in GGML_TYPES.values()}
BLOCK_BYTES = {name: nbytes for name, _, nbytes in GGML_TYPES.values()}

# Metadata value types: number -> how one value is stored.
_SCALARS: dict[int, Struct] = {
    number: Struct("<" + code) for number, code in enumerate("BbHhIif?")
} | {10: Struct("<Q"), 11: Struct("<q"), 12: Struct("<d")}
_STRING, _ARRAY = 8, 9
_U32, _U64 = Struct("<I"), Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    `shape` is row-major as in numpy (`[out, in]` for a linear layer), `ggml_type` a name
    such as "Q4_0", `offset` counts from the start of the file: of a split model's, `part`.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header; tensor bytes are read when asked for.

    Of a split model this is the first part, with the tensors of all; `parts` are the files.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    identity: tuple[int, int]  # size and modification time, to notice a replaced file
    parts: tuple["GGUFFile", ...] = ()

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """Read and check the header of the file at `path`, and of the parts that belong to it.

        Raises CheckpointError, naming the byte, for anything that is not a sound
        little-endian GGUF of version 2 or 3, and for parts that are missing or of other models.
        """
        file = cls._open_one(path)
        count = file.metadata.get("split.count", 1)
        if type(count) is int and count in (0, 1):
            return file
        if type(count) is not int or count < 0:
            raise CheckpointError(f"{path}: split.count must be a number of parts")
        return cls._joined(file, part_paths(path, count))

    @classmethod
    def _joined(cls, opened: "GGUFFile", paths: list[Path]) -> "GGUFFile":
        """The model of all these parts, of which one is `opened` already."""
        parts = tuple(opened if p == opened.path else cls._open_one(p) for p in paths)
        first, count = parts[0], len(parts)
        tensors: dict[str, GGUFTensor] = {}
        for number, part in enumerate(parts):
            said = (part.metadata.get("split.no", number), part.metadata.get("split.count"))
            if said != (number, count):
                raise CheckpointError(
                    f"{part.path} says it is part {quote(str(said[0]))} of {quote(str(said[1]))}"
                    f" (counted from 0), not {number} of {count}: of another model, or renamed"
                )
            for key in ("general.architecture", "general.name"):
                mine, its = first.metadata.get(key), part.metadata.get(key)
                if None not in (mine, its) and mine != its:
                    raise CheckpointError(
                        f"{part.path} is of another model: its {key} is {quote(str(its))}, not"
                        f" {quote(str(mine))}"
                    )
            for name, tensor in part.tensors.items():
                if name in tensors:
                    other = parts[tensors[name].part].path.name
                    raise CheckpointError(f"{part.path}: tensor {quote(name)} is in {other} too")
                tensors[name] = replace(tensor, part=number)
        total = first.metadata.get("split.tensors.count", len(tensors))
        if total != len(tensors):
            raise CheckpointError(
                f"{first.path}: its parts have {len(tensors)} tensors, not the"
                f" {quote(str(total))} it says: they are of different models"
            )
        return cls(first.path, first.metadata, tensors, first.identity, parts)

    def holder(self, tensor: GGUFTensor) -> "GGUFFile":
        """The file with the tensor's bytes."""
        return self.parts[tensor.part] if self.parts else self

    @classmethod
    def _open_one(cls, path: Path) -> "GGUFFile":
        if problem := stand_in(path):
            raise CheckpointError(problem)
        try:
            with path.open("rb") as handle:
                identity = _identity(handle.fileno())
                if identity[0] == 0:
                    raise CheckpointError(f"{path} is empty")
                with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    header = _Header(path, data)
                    metadata, tensors = header.read()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        return cls(path, metadata, tensors, identity)

    def blocks(self, tensor: GGUFTensor, limit: int) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's blocks in file order, in pieces `[n, bytes of a block]` with n <= limit."""
        file, width = self.holder(tensor), BLOCK_BYTES[tensor.ggml_type]
        try:
            with file.path.open("rb") as handle:
                if _identity(handle.fileno()) != file.identity:
                    raise CheckpointError(f"{file.path} changed while it was being read")
                handle.seek(tensor.offset)
                left = tensor.nbytes // width
                while left:
                    piece = np.empty((min(left, limit), width), np.uint8)
                    if handle.readinto(piece.data) != piece.nbytes:
                        raise CheckpointError(
                            f"{file.path} ended inside tensor {quote(tensor.name)}"
                        )
                    yield piece
                    left -= len(piece)
        except OSError as error:
            raise CheckpointError(f"{file.path} cannot be read: {error.strerror}") from None

    def read(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """All bytes of one tensor, flat."""
        return next(self.blocks(tensor, tensor.nbytes)).reshape(-1)


def quote(text: str) -> str:
    """A name from a file made fit for a one-line message."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


class _Header:
    """A cursor over the header; every complaint says at which byte and in what."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.end = min(len(data), MAX_HEADER)
        self.place = "header"
        self.values = 0  # in arrays, so far

    def fail(self, text: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: byte {self.position} ({self.place}): {text}")

    def need(self, count: int) -> None:
        if count > self.end - self.position:
            self.fail(
                "it runs past the end of the file: truncated or damaged"
                if self.end == len(self.data)
                else f"the header is larger than {MAX_HEADER >> 20} MiB: damaged"
            )

    def take(self, count: int) -> bytes:
        self.need(count)
        start = self.position
        self.position += count
        return self.data[start : self.position]

    def number(self, kind: Struct) -> Any:
        self.need(kind.size)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def string(self) -> str:
        text = self.take(self.number(_U64))
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.fail("text that is not UTF-8")

    def strings(self, count: int) -> list[str]:
        """`string` for whole vocabularies, where a method call per token would show."""
        data, end, position, unpack = self.data, self.end, self.position, _U64.unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                if start > end or (stop := start + unpack(data, position)[0]) > end:
                    self.position = position
                    self.need(end)  # always more than what is left
                values.append(data[start:stop].decode())
                position = stop
        except UnicodeDecodeError:
            self.position = position
            self.fail(f"entry {len(values)} is not UTF-8")
        self.position = position
        return values

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            self.fail(f"value type {kind} is unknown")
        return self.number(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.number(_U32), self.number(_U64)
        item = _SCALARS.get(kind, _U64)  # a text takes 8 bytes at least, for its length
        self.need(item.size * count)
        self.values += count
        if self.values > MAX_VALUES:
            self.fail(f"the metadata has arrays of more than {MAX_VALUES} values: damaged")
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            self.fail(f"arrays of value type {kind} are not supported")
        values: list[Any] = np.frombuffer(self.take(item.size * count), item.format).tolist()
        return values

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        tensor_count, metadata_count = self.preamble()
        for count, size, what in ((metadata_count, 13, "keys"), (tensor_count, 32, "tensors")):
            self.need(size * count)  # what each takes at least
            if count > MAX_ENTRIES:
                self.fail(f"it has {count} {what}, more than {MAX_ENTRIES}: damaged")
        metadata = self.metadata(metadata_count)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.place = "general.alignment"
            self.fail("it must be a power of two")
        entries = [self.tensor(index) for index in range(tensor_count)]
        start = -(-self.position // alignment) * alignment
        return metadata, self.placed(entries, start, alignment)

    def preamble(self) -> tuple[int, int]:
        if (magic := self.take(4)) != MAGIC:
            if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
                raise CheckpointError(
                    f"{self.path} is a GGML file, from before GGUF: take the model as GGUF"
                )
            raise CheckpointError(f"{self.path} is not a GGUF file (it does not begin with 'GGUF')")
        version = self.number(_U32)
        if version and not version & 0xFFFF:
            self.fail("big-endian files are not supported: export it again as little-endian")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported, only 2 and 3: export it again")
        return self.number(_U64), self.number(_U64)

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            self.place = f"metadata entry {index}"
            key = self.string()
            self.place = f"metadata key {quote(key)}"
            if key in metadata:
                self.fail("it is there twice")
            metadata[key] = self.value(self.number(_U32))
        return metadata

    def tensor(self, index: int) -> GGUFTensor:
        """One entry of the tensor table, its offset still counted from the data's start."""
        self.place = f"tensor entry {index}"
        name = self.string()
        self.place = f"tensor {quote(name)}"
        dimensions = self.number(_U32)
        if not 1 <= dimensions <= 4:
            self.fail(f"it has {dimensions} dimensions, not 1 to 4")
        shape = tuple(self.number(_U64) for _ in range(dimensions))[::-1]
        number, offset = self.number(_U32), self.number(_U64)
        if number not in GGML_TYPES:
            self.fail(f"its type number {number} is unknown")
        ggml_type, elements, nbytes = GGML_TYPES[number]
        size = 1
        for dimension in shape:
            size *= dimension
        if not size or shape[-1] % elements:
            self.fail(f"its shape {shape} cannot be stored as {ggml_type}")
        return GGUFTensor(name, shape, ggml_type, offset, size // elements * nbytes)

    def placed(
        self, entries: list[GGUFTensor], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        """The table with absolute offsets, every tensor inside the file and none over another."""
        tensors: dict[str, GGUFTensor] = {}
        for entry in entries:
            self.place = f"tensor {quote(entry.name)}"
            if entry.name in tensors:
                self.fail("it is there twice")
            offset = start + entry.offset
            if entry.offset % alignment:
                self.fail(f"its offset {entry.offset} is not a multiple of {alignment}")
            if offset + entry.nbytes > len(self.data):
                self.fail(
                    f"its data ends at byte {offset + entry.nbytes} but the file has "
                    f"{len(self.data)}: truncated, fetch it again"
                )
            tensors[entry.name] = GGUFTensor(
                entry.name, entry.shape, entry.ggml_type, offset, entry.nbytes
            )
        for one, other in pairwise(sorted(tensors.values(), key=lambda tensor: tensor.offset)):
            if one.offset + one.nbytes > other.offset:
                self.place = f"tensor {quote(other.name)}"
                self.fail(f"its data overlaps that of {quote(one.name)}")
        return tensors
