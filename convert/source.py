"""A checkpoint read once, in the order it lies on disk, a few megabytes at a time."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from convert.integrity import PIECE, Bytes, HashedFile, known_sha256, small_files
from mlx_cerebrum.errors import CheckpointError
from mlx_cerebrum.model.tensors import module_shapes
from mlx_cerebrum.weights.checkpoint import Checkpoint
from mlx_cerebrum.weights.safetensors_checkpoint import SafetensorsCheckpoint
from mlx_cerebrum.weights.safetensors_file import CODES, ITEM_BYTES, read_header

_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}


class Stamp(NamedTuple):
    """What tells that a file is another one, or was written to since: `changed` can't be set
    back. A disk that was away may have another `device` later, and number its files anew."""

    path: str
    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @property
    def lasting(self) -> tuple[str, int, int, int]:
        return self.path, self.size, self.modified, self.changed


Stamps = dict[Path, Stamp]
_WHOSE = {"provenance": "its provenance's", "hub": "the hub's"}
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


@dataclass(frozen=True)
class Rows:
    """Some rows of one of a module's arrays: bytes in row-major order, safetensors' dtype."""

    data: Bytes
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: mx.array, stream: mx.Stream | None = None) -> "Rows":
        flat = np.asarray(array.view(_UNSIGNED[array.dtype.size], stream=stream)).reshape(-1)
        return cls(np.ascontiguousarray(flat).view(np.uint8), CODES[array.dtype], array.shape)

    def slice(self, start: int, stop: int) -> "Rows":
        """Some of them; no copy."""
        width = len(self.data) // self.shape[0]
        data = self.data[start * width : stop * width]
        return Rows(data, self.dtype, (stop - start, *self.shape[1:]))

    def array(self, stream: mx.Stream | None = None) -> mx.array:
        array = mx.array(self.data.view(_NUMPY[self.dtype]).reshape(self.shape))
        return array.view(mx.bfloat16, stream=stream) if self.dtype == "BF16" else array


class Source:
    """The pieces of a checkpoint's modules; with `verify`, every byte of its files is hashed.

    `dense`: matrices that are `repacked` come unpacked, in float32. `hasher` is a pool of one
    thread, which does the hashing beside everything else.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        verify: bool,
        hasher: ThreadPoolExecutor,
        dense: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self._dense = checkpoint.repacked if dense else frozenset()
        names = [*module_shapes(checkpoint.config), *sorted(checkpoint.spare)]
        at = {name: checkpoint.extents(name)["weight"] for name in names}
        self.modules = sorted(names, key=lambda name: (at[name].path, at[name].offset))
        self.nbytes = sum(e.nbytes for n in names for e in checkpoint.extents(n).values())
        self.stats = self._stamps()
        self.paths = list(self.stats)
        self._verify, self._hasher = verify, hasher
        self._stored_as_is = isinstance(checkpoint, SafetensorsCheckpoint)
        self._files: dict[Path, HashedFile] = {}

    def _stamps(self) -> Stamps:
        return stamps(self.checkpoint)

    def has(self, module: str) -> bool:
        """Whether the module can be read without waiting for it."""
        return True

    def leave(self, module: str, sync: Callable[[], None]) -> None:
        """Called when all of a module is written; `sync` makes that survive a power cut."""

    def pieces(self, module: str, limit: int | None = None) -> Iterator[dict[str, Rows]]:
        """The module's parts, some rows of each at a time: about PIECE bytes.

        limit: how many rows are wanted, from the first; None for all.

        Raises CheckpointError where a file ends early, changes or can't be read.
        """
        names = self.checkpoint.parts(module)
        shapes = {part: self.checkpoint.shapes[name] for part, name in names.items()}
        dtypes = {part: self.checkpoint.dtypes[name] for part, name in names.items()}
        rows = shapes["weight"][0]
        width = sum(ITEM_BYTES[dtypes[p]] * prod(shapes[p][1:]) for p in shapes)
        step = rows if len(shapes["weight"]) == 1 else max(1, PIECE // width)
        decoded = None if self._stored_as_is else self._decoded(module)
        extents = self.checkpoint.extents(module)
        wanted = rows if limit is None else min(limit, rows)
        for start in range(0, wanted, step):
            stop = min(start + step, wanted)
            if decoded is not None:
                yield {p: Rows.of(array[start:stop]) for p, array in decoded.items()}
                continue
            piece = {}
            for part, shape in shapes.items():
                extent, stride = extents[part], extents[part].nbytes // rows
                file = self.open(extent.path)
                data = file.read(extent.offset + start * stride, (stop - start) * stride)
                piece[part] = Rows(data, dtypes[part], (stop - start, *shape[1:]))
            yield piece

    def _decoded(self, module: str) -> dict[str, mx.array]:
        if module in self._dense:
            return {"weight": self.checkpoint.dense(module)}
        return self.checkpoint.read(module)

    def open(self, path: Path) -> HashedFile:
        if path not in self._files:
            self._files[path] = HashedFile(path, self._verify, self._hasher)
        return self._files[path]

    def finish(self) -> dict[str, str]:
        """Each file's SHA-256 (none without `verify`), compared with what is known of it.

        Raises CheckpointError for a file that is not what the hub sent, or what a conversion
        recorded when it wrote it.
        """
        hashes: dict[str, str] = {}
        if self._verify and self.checkpoint.path.is_dir():
            for name, actual, wanted in small_files(self.checkpoint.path)[1]:
                raise CheckpointError(
                    f"{self.checkpoint.path / name} is damaged: its hash is {actual[:12]}..., the"
                    f" hub's {wanted[:12]}...; fetch it again (--no-verify ignores this)"
                )
        for path in self.paths:
            found = self.open(path).finish()
            if found is None:
                continue
            hashes[path.name] = found
            for whose, known in known_sha256(path, self.checkpoint.raw_config).items():
                if known != found:
                    raise CheckpointError(
                        f"{path} is damaged: its SHA-256 is {found[:12]}..., {_WHOSE[whose]}"
                        f" {known[:12]}...; fetch or convert it again (--no-verify ignores this)"
                    )
        check_stamps(self.stats)
        return hashes

    def new_digest(self, module: str) -> "hashlib._Hash":
        """A hash that the bytes of a module can go into: begun with what the bytes mean."""
        names = self.checkpoint.parts(module).values()
        meant = [(self.checkpoint.dtypes[name], self.checkpoint.shapes[name]) for name in names]
        return hashlib.sha256(repr(meant).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def stamps(checkpoint: Checkpoint) -> Stamps:
    """What tells whether the checkpoint's files are others later, or were written to.

    Raises CheckpointError where they are others already than when it was opened.
    """
    names = [*module_shapes(checkpoint.config), *sorted(checkpoint.spare)]
    found: Stamps = {}
    for path in sorted({e.path for n in names for e in checkpoint.extents(n).values()}):
        try:
            found[path] = _stat(path)
        except OSError:
            raise _changed(path) from None
        if isinstance(checkpoint, SafetensorsCheckpoint):
            own = {n: info for n, (file, info) in checkpoint.tensors.items() if file == path.name}
            if read_header(path) != own:
                raise _changed(path)
    return found


def check_stamps(before: Stamps) -> None:
    """Raise CheckpointError for a file that has changed since `before`."""
    for path, stamp in before.items():
        try:
            same = _stat(path) == stamp
        except OSError:
            same = False
        if not same:
            raise _changed(path)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} changed while it was read; start again")


def _stat(path: Path) -> Stamp:
    s = path.stat()
    times = s.st_mtime_ns, s.st_ctime_ns
    return Stamp(str(path.resolve()), s.st_dev, s.st_ino, s.st_size, *times)
